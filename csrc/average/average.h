// Averages of a model's weights: what the kernels of both ends are given.
//
// A call has R rows, one for each tensor of the model, and C columns: an average of it, its weight, a moment. All
// tensors of a row have the same number of elements in the same order of memory, so that element e of one belongs to
// element e of the others. Elements are counted in blocks that never span two rows; a thread or a thread block takes
// blocks, whatever the tensors' sizes.
#pragma once

#include <cstdint>

#include "common/storage.h"

namespace fastnuggets::average {

enum class Rounding : int { nearest, stochastic, compensated };

constexpr std::int64_t kBlock = 1024;  // elements; the noise of stochastic rounding comes in groups of 128

struct Rows {
  const std::int64_t* numel;        // [R]
  const std::int64_t* first_block;  // [R + 1], ascending from 0
  void* const* data;                // [R, C]
  const Dtype* dtype;               // [R, C]
  const std::uint32_t* stream;      // [R] tells the rows' random numbers apart
  std::int64_t R;
  int C;
};

// Numbers of a call that a captured CUDA graph may want to change: then they are read from `device`.
constexpr int kMostScalars = 128;
struct Scalars {
  double value[kMostScalars];
  const double* device;  // null: `value` counts
  int count;
};

// a <- a + rate (w - a) for each of the averages. Columns: averages, their remainders if compensated, the weight.
struct Update {
  Scalars rates;
  Rounding rounding;
  std::uint64_t seed;
  std::uint32_t step;
};

// Welford's step. Columns: mean, sum of squared deviations, the ring [K, numel] if there is one, the weight.
struct Swag {
  double rate;  // 1 / (sets of weights with this one)
  bool ring;
  std::int64_t row;  // of the ring, which takes the deviation
};

// out <- mean + diagonal sqrt(m2) z + sum over k of columns[k] ring[k]. Columns: out, mean, m2, the ring if count > 0.
struct Sample {
  Scalars columns;
  double diagonal;
  std::uint64_t seed;
  std::uint32_t step;
};

// out <- sum over k of coefficients[k] source k. Columns: out, the sources.
struct WeightedSum {
  Scalars coefficients;
};

// Columns: weight, gradient, momentum if there is one, the averages.
struct Sgd {
  Scalars rates;
  double lr, momentum, dampening, weight_decay;
  bool has_momentum, nesterov, maximize, first;
};

// Columns: weight, gradient, first and second moment, the averages.
struct AdamW {
  Scalars rates;
  double step_size;  // lr / (1 - beta1^step)
  double root;       // sqrt(1 - beta2^step)
  double beta1, beta2, eps;
  double shrink;  // 1 - lr weight_decay
  bool maximize;
};

}  // namespace fastnuggets::average
