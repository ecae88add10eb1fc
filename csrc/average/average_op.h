// The host's side of a call: lists of tensors, checked and laid out as the rows of average.h, and the kernels of each
// device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "average/average.h"
#include "common/kernels.h"

namespace fastnuggets::average {

using Tensors = std::vector<at::Tensor>;

// What a column may hold, beside tensors of the shape of the first column's.
enum class Kind { number, full, like_first, remainder, ring };

struct Column {
  const char* name;
  at::TensorList tensors;  // one a row
  Kind kind;  // number: any floating type · full and ring: float32 or float64 · like_first: the first's type
  bool written;
};

// The tensors of a call as rows. Tensors that are only read and lie differently in memory are copied for each call.
class Table {
 public:
  Table(const char* op, std::vector<Column> columns, at::IntArrayRef streams = {});
  Table(Table&&) = default;  // rows_ points into vectors, which keep their memory when they are moved
  Table& operator=(Table&&) = default;

  // Makes what the kernels read current; false if a tensor's memory or size is no longer what the table was made of.
  // It costs more than the update of tiny tensors, so it touches as little of each as can be.
  bool current();
  // Tells autograd that the written tensors have changed.
  void bump_versions() const;

  const Rows& rows() const { return rows_; }
  at::Device device() const { return device_; }
  std::int64_t elements() const { return elements_; }

 private:
  void add(const char* op, const Column& column, const Column& first, std::size_t row);
  void add_counter(const at::Tensor& t);
  void check_overlaps(const char* op) const;

  struct Copy {
    std::size_t cell;
    at::Tensor dense;  // with the layout of the row
  };

  // What a cell that is only read was when the table was made; the tensor itself may get other memory.
  struct Watched {
    const c10::TensorImpl* tensor;
    const c10::StorageImpl* storage;
    std::int64_t numel;
  };
  struct Held {
    c10::Storage storage;
    const void* data;
  };

  Tensors tensors_;  // [R, C] as given
  std::vector<Watched> watched_;
  std::vector<Held> storages_;        // kept alive, each once if neighbours share it
  std::vector<at::Tensor> counters_;  // written tensors, one for each version counter
  std::vector<Copy> copies_;          // of tensors that lie differently
  std::vector<void*> data_;           // [R, C] what the kernels read and write
  std::vector<Dtype> dtypes_;         // [R, C]
  std::vector<std::int64_t> numel_;   // [R]
  std::vector<std::int64_t> first_block_;
  std::vector<std::uint32_t> streams_;
  std::vector<std::size_t> written_;  // cells
  Rows rows_{};
  at::Device device_ = at::kCPU;
  std::int64_t elements_ = 0;
};

// A device's kernels. average_cpu.cpp fills in the CPU's and, in a CUDA build, average_cuda.cpp the GPU's.
struct Kernels {
  void (*update)(const Table&, const Update&);
  void (*swag)(const Table&, const Swag&);
  void (*sample)(const Table&, const Sample&);
  void (*weighted_sum)(const Table&, const WeightedSum&);
  void (*swap)(const Table&);
  // One int64: the first row with an inf or a NaN, or R.
  at::Tensor (*first_nonfinite)(const Table&);
  void (*sgd)(const Table&, const Sgd&);
  void (*adamw)(const Table&, const AdamW&);
};

// average_update_ of the same tensors again and again.
class Plan {
 public:
  Plan(Tensors averages, Tensors remainders, Tensors weights, std::int64_t rounding, std::vector<std::int64_t> streams);
  // One rate for each set of averages: numbers, or a float64 tensor that may be on the device.
  void update(const std::vector<double>& rates, std::int64_t seed, std::int64_t step);
  void update(const at::Tensor& rates, std::int64_t seed, std::int64_t step);

 private:
  void refresh();
  void run(const Scalars& rates, std::int64_t seed, std::int64_t step);

  Tensors averages_, remainders_, weights_;
  Rounding rounding_;
  std::vector<std::int64_t> streams_;
  Table table_;
};

// The registered ops, through the dispatcher; shapes and meanings are in average.h and fastnuggets/ops/average.py.
#define FN_AVERAGE_UPDATE                                                                              \
  at::TensorList averages, at::TensorList remainders, at::TensorList weights, const at::Tensor &rates, \
      std::int64_t rounding, std::int64_t seed, std::int64_t step, at::IntArrayRef streams
#define FN_SWAG_UPDATE                                                                       \
  at::TensorList mean, at::TensorList m2, at::TensorList deviations, at::TensorList weights, \
      std::int64_t num_collected, std::int64_t row
#define FN_SWAG_SAMPLE                                                                                              \
  at::TensorList out, at::TensorList mean, at::TensorList m2, at::TensorList deviations, const at::Tensor &columns, \
      double diagonal, std::int64_t seed, std::int64_t step, at::IntArrayRef streams
#define FN_SGD                                                                                                        \
  at::TensorList weights, at::TensorList grads, at::TensorList momentum, at::TensorList averages,                     \
      const at::Tensor &rates, double lr, double momentum_rate, double dampening, double weight_decay, bool nesterov, \
      bool maximize, bool first
#define FN_ADAMW                                                                                           \
  at::TensorList weights, at::TensorList grads, at::TensorList exp_avg, at::TensorList exp_avg_sq,         \
      at::TensorList averages, const at::Tensor &rates, double lr, double beta1, double beta2, double eps, \
      double weight_decay, bool maximize, std::int64_t step

}  // namespace fastnuggets::average
