// CUDA glue of the averages: the device, its current stream, and the kernels' place in the registry.
#include "average/average_cuda.h"

#include <ATen/ops/full.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "average/average_op.h"

namespace fastnuggets::average {
namespace {

template <class How, void (*launch)(const Rows&, const How&, cudaStream_t)>
void on_device(const Table& table, const How& how) {
  const c10::cuda::CUDAGuard device(table.device());
  launch(table.rows(), how, c10::cuda::getCurrentCUDAStream());
}

void swap_on_device(const Table& table) {
  const c10::cuda::CUDAGuard device(table.device());
  cuda::swap(table.rows(), c10::cuda::getCurrentCUDAStream());
}

at::Tensor find_nonfinite(const Table& table) {
  const c10::cuda::CUDAGuard device(table.device());
  const at::Tensor found = at::full({}, table.rows().R, at::TensorOptions(table.device()).dtype(at::kLong));
  static_assert(sizeof(long long) == sizeof(std::int64_t));
  cuda::first_nonfinite(table.rows(), reinterpret_cast<long long*>(found.mutable_data_ptr<std::int64_t>()),
                        c10::cuda::getCurrentCUDAStream());
  return found;
}

const Kernels kCuda{&on_device<Update, cuda::update>,
                    &on_device<Swag, cuda::swag>,
                    &on_device<Sample, cuda::sample>,
                    &on_device<WeightedSum, cuda::weighted_sum>,
                    &swap_on_device,
                    &find_nonfinite,
                    &on_device<Sgd, cuda::sgd>,
                    &on_device<AdamW, cuda::adamw>};
const Register kRegistered(at::kCUDA, kCuda);

}  // namespace
}  // namespace fastnuggets::average
