// Reparametrized sampling: what the kernels of both ends are given.
//
// Element i of a call, counted in the logical row-major order of the output's shape, takes element i of the stream
// (common/philox.h) whose seed is key[0] and whose two words are the halves of key[1]. The key is read from memory of
// the device, so that nothing synchronises and a captured graph may change it.
#pragma once

#include <cstdint>

#include "common/storage.h"

namespace fastnuggets::sample {

// Densities of the noise; the order is that of KINDS in fastnuggets/ops/sample.py.
enum class Kind : int {
  normal,
  uniform,      // on (0, 1)
  laplace,      // of scale 1
  logistic,     // of scale 1
  gumbel,       // of scale 1
  exponential,  // of rate 1
  sign,         // -1 or 1
  keep,         // 1 / parameter with probability `parameter`, or 0; 16 bits an element (sample_math.h)
  gain,         // 1 + parameter * normal
};
constexpr int kKinds = 9;

// How a tensor says how wide a normal is; the order is that of FORMS in fastnuggets/ops/sample.py.
enum class Form : int { std, logvar, log_std, var, rho };  // rho: std = ln(1 + exp(rho))
constexpr int kForms = 5;

// Approximations of the KL divergence to the log-uniform prior; the order is that of APPROXIMATIONS.
enum class Approximation : int { molchanov, kingma, ard };
constexpr int kApproximations = 3;

// Constants as published.
// Molchanov, Ashukha, Vetrov, "Variational Dropout Sparsifies Deep Neural Networks", ICML 2017.
constexpr double kMolchanov[3] = {0.63576, 1.87320, 1.48695};
// Kingma, Salimans, Welling, "Variational Dropout and the Local Reparameterization Trick", NeurIPS 2015.
constexpr double kKingma[3] = {1.16145124, -1.50204118, 0.58629921};

// Elements that a thread takes at a time; a multiple of the stream's block.
constexpr std::int64_t kChunk = 1024;

// An input of the call's dtype: an element each, or one for all; without data it is `value`.
struct Operand {
  const void* data = nullptr;
  bool constant = false;
  double value = 0;
};

// out[i] = loc[i] + scale[i] noise(i)
struct ScaledNoise {
  Operand loc, scale;
  void* out;
  Dtype dtype;
  std::int64_t numel;
  const std::int64_t* key;  // [2]
  Kind kind;
  double parameter;
};

// [rows, n]; sums run over n.
struct Rows {
  std::int64_t rows, n;
};

// z = mean + std noise, var = std^2, and the divergence KL(N(mean, std^2) || N(prior_mean, prior_std^2)) summed over
// each row.
// Sums are of the type that is computed in: double for float64, else float.
struct Normal {
  Operand mean, spread, prior_mean, prior_std;
  Dtype dtype;
  Rows shape;
  Form form;
  const std::int64_t* key;  // [2]; null if there is no z
  void* z;                  // [rows, n] or null
  void* var;                // [rows, n] or null
  void* kl;                 // [rows] or null
};

struct NormalBackward {
  Normal forward;       // its z, var and kl are null
  Operand grad_z;       // [rows, n]; 0 where it is absent, and then `key` is null
  Operand grad_var;     // [rows, n]; 0 where it is absent
  const void* grad_kl;  // [rows] or null
  void* grads[4];       // [rows, n] each, of mean, spread, prior_mean, prior_std; null if it is not wanted
};

// Over each row: soft = softmax((logits + gumbel) / tau); `hard` is 1 at the largest and 0 elsewhere.
struct GumbelSoftmax {
  Operand logits;
  Dtype dtype;
  Rows shape;
  double tau;
  const std::int64_t* key;  // [2]
  bool hard;
  void* out;  // [rows, n]
};

// grad_logits = soft (grad - sum(grad soft)) / tau, sums over each row.
struct GumbelSoftmaxBackward {
  Operand grad, soft;
  Dtype dtype;
  Rows shape;
  double tau;
  void* out;  // [rows, n]
};

// The divergence of N(m, alpha m^2) from the log-uniform prior, summed over each row.
struct LogUniform {
  Operand log_alpha;
  Dtype dtype;
  Rows shape;
  Approximation approximation;
  void* kl;             // [rows]
  const void* grad_kl;  // [rows]; backward
  void* grad;           // [rows, n]; backward
};

}  // namespace fastnuggets::sample
