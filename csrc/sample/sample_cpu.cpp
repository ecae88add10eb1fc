// CPU kernels: threads share out chunks whose borders do not depend on their number, so neither do the bits. Noise is
// made a chunk at a time, in the cache, in the forward and again in the backward pass.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/cpu.h"
#include "common/philox_cpu.h"
#include "sample/sample_math.h"
#include "sample/sample_op.h"

#define FN_BODY inline __attribute__((always_inline))

namespace fastnuggets::sample {
namespace {

using Index = std::int64_t;

// ---- loads and stores of a chunk

template <class S, class R>
FN_BODY void convert(const S* from, Index n, R* to) {
#pragma omp simd
  for (Index i = 0; i < n; ++i) to[i] = R(load(from[i]));
}

template <class R>
FN_BODY void convert(Dtype dtype, const void* from, Index at, Index n, R* to) {
  switch (dtype) {
    case Dtype::float32:
      return convert(static_cast<const float*>(from) + at, n, to);
    case Dtype::float64:
      return convert(static_cast<const double*>(from) + at, n, to);
    case Dtype::float16:
      return convert(static_cast<const Half*>(from) + at, n, to);
    default:
      return convert(static_cast<const BFloat16*>(from) + at, n, to);
  }
}

template <class R>
constexpr Dtype kDtype = std::is_same_v<R, double> ? Dtype::float64 : Dtype::float32;

// Elements [at, at + n) in the type R: where they are, or in the buffer of kChunk.
template <class R>
FN_BODY const R* loaded(const Operand& from, Dtype dtype, Index at, Index n, R* buffer) {
  if (from.data != nullptr && !from.constant) {
    if (dtype == kDtype<R>) return static_cast<const R*>(from.data) + at;
    convert(dtype, from.data, at, n, buffer);
    return buffer;
  }
  R value = R(from.value);
  if (from.data != nullptr) convert(dtype, from.data, 0, 1, &value);
  std::fill_n(buffer, n, value);
  return buffer;
}

// Where to put elements [at, at + n): their place or, for another type, the buffer, from which `stored` takes them.
template <class R>
FN_BODY R* room(void* out, Dtype dtype, Index at, R* buffer) {
  return out != nullptr && dtype == kDtype<R> ? static_cast<R*>(out) + at : buffer;
}
template <class S, class R>
FN_BODY void store(const R* from, Index n, S* to) {
  using C = typename Compute<S>::type;
#pragma omp simd
  for (Index i = 0; i < n; ++i) to[i] = Store<S>::of(C(from[i]));
}
template <class R>
FN_BODY void stored(const R* from, void* out, Dtype dtype, Index at, Index n) {
  if (out == nullptr || dtype == kDtype<R>) return;
  if (dtype == Dtype::float16) return store(from, n, static_cast<Half*>(out) + at);
  store(from, n, static_cast<BFloat16*>(out) + at);
}

// ---- noise

FN_BODY PhiloxStream stream_of(const Index* key) {
  return {std::uint64_t(key[0]), std::uint32_t(std::uint64_t(key[1])), std::uint32_t(std::uint64_t(key[1]) >> 32)};
}

template <Simd level, Kind kind>
FN_BODY void noise_blocks(const PhiloxStream& stream, Index first, Index blocks, Parameter parameter, float* noise) {
  for (Index b = 0; b < blocks; ++b) {
    float* const out = noise + b * kPhiloxBlock;
    if constexpr (kind == Kind::normal || kind == Kind::gain) {
      normal_block<level>(stream, std::uint64_t(first + b), out);
      if constexpr (kind == Kind::gain) {
#pragma omp simd
        for (int i = 0; i < kPhiloxBlock; ++i) out[i] = exact::fma(parameter.value, out[i], 1.0f);
      }
    } else {
      alignas(64) std::uint32_t words[kPhiloxBlock];
      philox_block<level>(stream, std::uint64_t(first + b), words);
#pragma omp simd
      for (int i = 0; i < kPhiloxBlock; ++i) out[i] = noise_of<kind>(words[i]);
    }
  }
}

// `at` is a multiple of the group, of which so many are made.
template <Simd level>
FN_BODY void masks(const PhiloxStream& stream, Index at, Index groups, Parameter parameter, float* noise) {
  for (Index g = 0; g < groups; ++g) {
    alignas(64) std::uint32_t words[kPhiloxBlock];
    philox_block<level>(stream, std::uint64_t(at / kKeepGroup + g), words);
    for (int j = 0; j < kPhiloxWords; ++j) {
      float *const low = noise + g * kKeepGroup + 2 * j * kPhiloxLanes, *const high = low + kPhiloxLanes;
      const std::uint32_t* const word = words + j * kPhiloxLanes;
#pragma omp simd
      for (int i = 0; i < kPhiloxLanes; ++i) {
        low[i] = keep(word[i] & 0xFFFFu, parameter);
        high[i] = keep(word[i] >> 16, parameter);
      }
    }
  }
}

constexpr Index kNoiseRoom = kChunk + 2 * kPhiloxBlock;  // a block is begun and one is left unfinished

// The noise of the chunk that starts at element `at`.
template <Simd level>
FN_BODY void chunk_of_noise(Kind kind, const PhiloxStream& stream, const Parameter& parameter, Index at, Index n,
                            float* noise) {
  const Index first = at / kPhiloxBlock, blocks = (n + kPhiloxBlock - 1) / kPhiloxBlock;
  switch (kind) {
#define FN_KIND(KIND)                                                         \
  case Kind::KIND:                                                            \
    noise_blocks<level, Kind::KIND>(stream, first, blocks, parameter, noise); \
    break;
    FN_KIND(normal)
    FN_KIND(uniform)
    FN_KIND(laplace)
    FN_KIND(logistic)
    FN_KIND(gumbel)
    FN_KIND(exponential)
    FN_KIND(sign)
    FN_KIND(gain)
#undef FN_KIND
    case Kind::keep:
      masks<level>(stream, at, (n + kKeepGroup - 1) / kKeepGroup, parameter, noise);
      break;
  }
}

// The normals of any n <= kChunk elements, somewhere in the buffer of kNoiseRoom.
template <Simd level>
FN_BODY const float* normals(const PhiloxStream& stream, Index at, Index n, float* buffer) {
  const Index first = at / kPhiloxBlock, blocks = (at + n + kPhiloxBlock - 1) / kPhiloxBlock - first;
  for (Index b = 0; b < blocks; ++b) normal_block<level>(stream, std::uint64_t(first + b), buffer + b * kPhiloxBlock);
  return buffer + at % kPhiloxBlock;
}

// ---- out = loc + scale noise

template <Simd level, class R>
FN_BODY void scaled_noise(const ScaledNoise& how, Index from, Index to) {
  const PhiloxStream stream = stream_of(how.key);
  const Parameter parameter(how.kind, how.parameter);
  alignas(64) float noise[kChunk];
  alignas(64) R locs[kChunk], scales[kChunk], outs[kChunk];
  for (Index chunk = from; chunk < to; ++chunk) {
    const Index at = chunk * kChunk, n = std::min(kChunk, how.numel - at);
    chunk_of_noise<level>(how.kind, stream, parameter, at, n, noise);
    const R* const scale = loaded(how.scale, how.dtype, at, n, scales);
    R* const out = room(how.out, how.dtype, at, outs);
    const R* const loc = loaded(how.loc, how.dtype, at, n, locs);
#pragma omp simd
    for (Index i = 0; i < n; ++i) out[i] = fused(scale[i], R(noise[i]), loc[i]);
    stored(out, how.out, how.dtype, at, n);
  }
}

// ---- rows: sums over each in a fixed order

// Units of work: several rows of up to kChunk elements in all, or a piece of kChunk elements of a longer row, which may
// be asked for whole.
struct Units {
  Index rows, n;
  Index together;  // rows of a unit
  Index pieces;    // of a row

  FN_BODY explicit Units(Rows shape, bool whole = false)
      : rows(shape.rows),
        n(shape.n),
        together(n == 0 ? kChunk : std::max<Index>(1, kChunk / n)),
        pieces(whole ? 1 : std::max<Index>(1, (n + kChunk - 1) / kChunk)) {}
  FN_BODY Index most() const { return std::max(kChunk, pieces > 1 ? kChunk : n); }  // elements of a unit
  FN_BODY Index count() const { return pieces > 1 ? rows * pieces : (rows + together - 1) / together; }
};

struct Unit {
  Index row, rows;  // the first of so many
  Index at, n;      // elements

  FN_BODY Unit(const Units& units, Index u) {
    if (units.pieces > 1) {
      row = u / units.pieces;
      rows = 1;
      const Index start = u % units.pieces * kChunk;
      at = row * units.n + start;
      n = std::min(kChunk, units.n - start);
    } else {
      row = u * units.together;
      rows = std::min(units.together, units.rows - row);
      at = row * units.n;
      n = rows * units.n;
    }
  }
};

// In four vectors of 32 bytes: as an array GCC would keep them in memory.
template <class R>
FN_BODY R sum(const R* x, Index n) {
  typedef R Vector __attribute__((vector_size(32)));
  constexpr int kWidth = int(sizeof(Vector) / sizeof(R)), kStep = 4 * kWidth;
  Vector total0{}, total1{}, total2{}, total3{};
  Index i = 0;
  for (; i + kStep <= n; i += kStep) {
    Vector x0, x1, x2, x3;
    std::memcpy(&x0, x + i, sizeof x0);
    std::memcpy(&x1, x + i + kWidth, sizeof x1);
    std::memcpy(&x2, x + i + 2 * kWidth, sizeof x2);
    std::memcpy(&x3, x + i + 3 * kWidth, sizeof x3);
    total0 += x0;
    total1 += x1;
    total2 += x2;
    total3 += x3;
  }
  R lanes[kStep];
  std::memcpy(lanes, &total0, sizeof total0);
  std::memcpy(lanes + kWidth, &total1, sizeof total1);
  std::memcpy(lanes + 2 * kWidth, &total2, sizeof total2);
  std::memcpy(lanes + 3 * kWidth, &total3, sizeof total3);
  for (int l = 0; i < n; ++i, ++l) lanes[l] += x[i];
  for (int half = kStep / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// Sums of the unit's rows, or of its piece of a row.
template <class R>
FN_BODY void sum_rows(const R* terms, const Units& units, const Unit& unit, Index u, R* sums, double* pieces) {
  if (units.pieces > 1) {
    pieces[u] = double(sum(terms, unit.n));
  } else if (units.n == 1) {
    std::copy_n(terms, unit.rows, sums + unit.row);
  } else {
    for (Index r = 0; r < unit.rows; ++r) sums[unit.row + r] = sum(terms + r * units.n, units.n);
  }
}

// Each element's number of its row.
template <class R>
FN_BODY const R* spread_rows(const R* of_rows, const Units& units, const Unit& unit, R* buffer) {
  if (units.n == 1) return of_rows + unit.row;
  if (unit.rows == 1) {
    std::fill_n(buffer, unit.n, of_rows[unit.row]);
  } else {
    for (Index r = 0; r < unit.rows; ++r) std::fill_n(buffer + r * units.n, units.n, of_rows[unit.row + r]);
  }
  return buffer;
}

// ---- normals and their divergence

template <class R>
struct Priors {
  alignas(64) R means[kChunk], stds[kChunk], inverses[kChunk], logs[kChunk];
  const R* mean;

  // A constant prior is worked out once.
  FN_BODY Priors(const Normal& how) {
    if (how.prior_std.data == nullptr || how.prior_std.constant) fill(how, 0, kChunk);
  }
  FN_BODY void at(const Normal& how, Index at, Index n) {
    mean = loaded(how.prior_mean, how.dtype, at, n, means);
    if (how.prior_std.data != nullptr && !how.prior_std.constant) fill(how, at, n);
  }
  FN_BODY void fill(const Normal& how, Index at, Index n) {
    const R* const std = loaded(how.prior_std, how.dtype, at, n, stds);
    R *const inverse = inverses, *const log = logs;
#pragma omp simd
    for (Index i = 0; i < n; ++i) {
      const Prior<R> prior = prior_of(std[i]);
      inverse[i] = prior.inverse;
      log[i] = prior.log;
    }
  }
};

template <Form form, class R>
FN_BODY void draw(const R* mean, const R* spread, const float* noise, Index n, R* z) {
#pragma omp simd
  for (Index i = 0; i < n; ++i) z[i] = fused(spread_of<form>(spread[i]).std, R(noise[i]), mean[i]);
}

template <Form form, class R>
FN_BODY void square(const R* spread, Index n, R* var) {
#pragma omp simd
  for (Index i = 0; i < n; ++i) {
    const R std = spread_of<form>(spread[i]).std;
    var[i] = product(std, std);
  }
}

// The outputs of one loop: the width is worked out once.
struct Wanted {
  bool z, var;
};

template <Form form, Wanted wanted, class R>
FN_BODY void divergence(const R* mean, const R* spread, const float* noise, const Priors<R>& prior, Index n, R* z,
                        R* var, R* term) {
  const R *const prior_mean = prior.mean, *const inverse = prior.inverses, *const log = prior.logs;
#pragma omp simd
  for (Index i = 0; i < n; ++i) {
    const Spread<R> s = spread_of<form>(spread[i]);
    if constexpr (wanted.z) z[i] = fused(s.std, R(noise[i]), mean[i]);
    if constexpr (wanted.var) var[i] = product(s.std, s.std);
    term[i] = normal_kl(mean[i], s.std, s.log, prior_mean[i], inverse[i], log[i]);
  }
}

template <Simd level, Form form, class R>
FN_BODY void normal_units(const Normal& how, double* pieces, Index from, Index to) {
  const Units units(how.shape);
  const PhiloxStream stream = how.key == nullptr ? PhiloxStream{} : stream_of(how.key);
  alignas(64) float noises[kNoiseRoom];
  alignas(64) R means[kChunk], spreads[kChunk], zs[kChunk], vars[kChunk], terms[kChunk];
  Priors<R> prior(how);
  for (Index u = from; u < to; ++u) {
    const Unit unit(units, u);
    const Index at = unit.at, n = unit.n;
    const R* const mean = loaded(how.mean, how.dtype, at, n, means);
    const R* const spread = loaded(how.spread, how.dtype, at, n, spreads);
    const float* const noise = how.z == nullptr ? nullptr : normals<level>(stream, at, n, noises);
    R *const z = room(how.z, how.dtype, at, zs), *const var = room(how.var, how.dtype, at, vars);
    if (how.kl == nullptr) {
      if (how.z != nullptr) draw<form>(mean, spread, noise, n, z);
      if (how.var != nullptr) square<form>(spread, n, var);
    } else {
      prior.at(how, at, n);
      if (how.z != nullptr && how.var != nullptr)
        divergence<form, Wanted{true, true}>(mean, spread, noise, prior, n, z, var, terms);
      else if (how.z != nullptr)
        divergence<form, Wanted{true, false}>(mean, spread, noise, prior, n, z, var, terms);
      else if (how.var != nullptr)
        divergence<form, Wanted{false, true}>(mean, spread, noise, prior, n, z, var, terms);
      else
        divergence<form, Wanted{false, false}>(mean, spread, noise, prior, n, z, var, terms);
      sum_rows(terms, units, unit, u, static_cast<R*>(how.kl), pieces);
    }
    stored(z, how.z, how.dtype, at, n);
    stored(var, how.var, how.dtype, at, n);
  }
}

template <class R>
struct Grads {
  R *mean, *spread, *prior_mean, *prior_std;
};

// Without a divergence.
template <Form form, Wanted wanted, class R>
FN_BODY void grads_of_outputs(const R* grad_z, const R* grad_var, const R* spread, const float* noise, Index n,
                              R* by_spread) {
#pragma omp simd
  for (Index i = 0; i < n; ++i) {
    const Spread<R> s = spread_of<form>(spread[i]);
    R by_std = R(0);
    if constexpr (wanted.z) by_std = product(grad_z[i], R(noise[i]));
    if constexpr (wanted.var) by_std = fused(R(2) * grad_var[i], s.std, by_std);
    by_spread[i] = by_std * s.std_slope;
  }
}

template <Form form, Wanted wanted, class R>
FN_BODY void grads_of_all(const R* grad_z, const R* grad_var, const R* grad_kl, const R* mean, const R* spread,
                          const float* noise, const Priors<R>& prior, Index n, const Grads<R>& to) {
  const R *const prior_mean = prior.mean, *const inverse = prior.inverses;
  R *const by_mean = to.mean, *const by_spread = to.spread;
#pragma omp simd
  for (Index i = 0; i < n; ++i) {
    const Spread<R> s = spread_of<form>(spread[i]);
    const R q = s.std * inverse[i], d = (mean[i] - prior_mean[i]) * inverse[i];
    const R weight = grad_kl[i] * inverse[i];
    R by_std = R(0);
    if constexpr (wanted.z) by_std = product(grad_z[i], R(noise[i]));
    if constexpr (wanted.var) by_std = fused(R(2) * grad_var[i], s.std, by_std);
    by_mean[i] = fused(weight, d, wanted.z ? grad_z[i] : R(0));
    by_spread[i] = fused(fused(weight, q, by_std), s.std_slope, -(grad_kl[i] * s.log_slope));
  }
}

template <Form form, class R>
FN_BODY void grads_of_prior(const R* grad_kl, const R* mean, const R* spread, const Priors<R>& prior, Index n,
                            const Grads<R>& to) {
  const R *const prior_mean = prior.mean, *const inverse = prior.inverses;
  R *const by_mean = to.prior_mean, *const by_std = to.prior_std;
#pragma omp simd
  for (Index i = 0; i < n; ++i) {
    const R q = spread_of<form>(spread[i]).std * inverse[i], d = (mean[i] - prior_mean[i]) * inverse[i];
    const R weight = grad_kl[i] * inverse[i];
    by_mean[i] = -(weight * d);
    by_std[i] = weight * fused(-d, d, fused(-q, q, R(1)));
  }
}

template <Simd level, Form form, Wanted wanted, class R>
FN_BODY void normal_backward_units(const NormalBackward& how, Index from, Index to) {
  const Normal& forward = how.forward;
  const Dtype dtype = forward.dtype;
  const Units units(forward.shape);
  const PhiloxStream stream = wanted.z ? stream_of(forward.key) : PhiloxStream{};
  alignas(64) float noises[kNoiseRoom];
  alignas(64) R means[kChunk], spreads[kChunk], grad_zs[kChunk], grad_vars[kChunk], grad_kls[kChunk], outs[4][kChunk];
  Priors<R> prior(forward);
  for (Index u = from; u < to; ++u) {
    const Unit unit(units, u);
    const Index at = unit.at, n = unit.n;
    const R* const mean = loaded(forward.mean, dtype, at, n, means);
    const R* const spread = loaded(forward.spread, dtype, at, n, spreads);
    const R* const grad_z = wanted.z ? loaded(how.grad_z, dtype, at, n, grad_zs) : nullptr;
    const R* const grad_var = wanted.var ? loaded(how.grad_var, dtype, at, n, grad_vars) : nullptr;
    const float* const noise = wanted.z ? normals<level>(stream, at, n, noises) : nullptr;
    R* out[4];
    for (int k = 0; k < 4; ++k) out[k] = room(how.grads[k], dtype, at, outs[k]);
    const Grads<R> grads{out[0], out[1], out[2], out[3]};
    if (how.grad_kl == nullptr) {
      grads_of_outputs<form, wanted>(grad_z, grad_var, spread, noise, n, grads.spread);
      if (wanted.z && how.grads[0] != nullptr) std::copy_n(grad_z, n, grads.mean);
      for (int k = wanted.z ? 2 : 0; k < 4; k += k == 0 ? 2 : 1)
        if (how.grads[k] != nullptr) std::fill_n(out[k], n, R(0));
    } else {
      prior.at(forward, at, n);
      const R* const grad_kl = spread_rows(static_cast<const R*>(how.grad_kl), units, unit, grad_kls);
      grads_of_all<form, wanted>(grad_z, grad_var, grad_kl, mean, spread, noise, prior, n, grads);
      if (how.grads[2] != nullptr || how.grads[3] != nullptr)
        grads_of_prior<form>(grad_kl, mean, spread, prior, n, grads);
    }
    for (int k = 0; k < 4; ++k) stored(out[k], how.grads[k], dtype, at, n);
  }
}

template <Simd level, Form form, class R>
FN_BODY void normal_backward_units(const NormalBackward& how, Index from, Index to) {
  const bool var = how.grad_var.data != nullptr;
  if (how.forward.key == nullptr)
    var ? normal_backward_units<level, form, Wanted{false, true}, R>(how, from, to)
        : normal_backward_units<level, form, Wanted{false, false}, R>(how, from, to);
  else
    var ? normal_backward_units<level, form, Wanted{true, true}, R>(how, from, to)
        : normal_backward_units<level, form, Wanted{true, false}, R>(how, from, to);
}

// ---- softmax of noisy logits: a thread takes whole rows

// Elements [0, n) of the stream from `at` on, added to the logits and divided by tau.
template <Simd level, class R>
FN_BODY void noisy_logits(const GumbelSoftmax& how, const PhiloxStream& stream, Index at, Index n, R* y) {
  alignas(64) float noises[kNoiseRoom];
  alignas(64) R logits[kChunk];
  const R inverse_tau = R(1) / R(how.tau);
  const Parameter none(Kind::gumbel, 0);
  for (Index c = 0; c < n; c += kChunk) {
    const Index some = std::min(kChunk, n - c), start = at + c, skipped = start % kPhiloxBlock;
    chunk_of_noise<level>(Kind::gumbel, stream, none, start - skipped, some + skipped, noises);
    const R* const logit = loaded(how.logits, how.dtype, start, some, logits);
    const float* const noise = noises + skipped;
    R* const to = y + c;
#pragma omp simd
    for (Index i = 0; i < some; ++i) to[i] = product(logit[i] + R(noise[i]), inverse_tau);
  }
}

template <class R>
FN_BODY R largest(const R* y, Index n) {
  R most = y[0];
#pragma omp simd reduction(max : most)
  for (Index i = 0; i < n; ++i) most = y[i] > most ? y[i] : most;
  return most;
}

// A row's sum: of pieces of kChunk, in double, if it is longer than one.
template <class R>
FN_BODY R sum_row(const R* x, Index n) {
  if (n <= kChunk) return sum(x, n);
  double total = 0;
  for (Index at = 0; at < n; at += kChunk) total += double(sum(x + at, std::min(kChunk, n - at)));
  return R(total);
}

template <class R>
FN_BODY void soft_row(R* y, Index n) {
  const R most = largest(y, n);
#pragma omp simd
  for (Index i = 0; i < n; ++i) y[i] = exp_(y[i] - most);
  const R inverse = R(1) / sum_row(y, n);
#pragma omp simd
  for (Index i = 0; i < n; ++i) y[i] = y[i] * inverse;
}

// Where the softmax is NaN - of a NaN, or of an infinite largest - so is this.
template <class R>
FN_BODY void hard_row(R* y, Index n) {
  const R most = largest(y, n);
  R unlike = most - most;
#pragma omp simd reduction(+ : unlike)
  for (Index i = 0; i < n; ++i) unlike += y[i] == y[i] ? R(0) : R(1);
  const Index chosen = std::find(y, y + n, most) - y;
  std::fill_n(y, n, unlike == R(0) ? R(0) : R(NAN));
  if (unlike == R(0)) y[chosen] = R(1);
}

template <Simd level, class R>
FN_BODY void gumbel_softmax_units(const GumbelSoftmax& how, Index from, Index to) {
  const Units units(how.shape, true);
  const PhiloxStream stream = stream_of(how.key);
  const Index n = how.shape.n;
  std::vector<R> buffer(std::size_t(units.most()));
  for (Index u = from; u < to; ++u) {
    const Unit unit(units, u);
    R* const y = room(how.out, how.dtype, unit.at, buffer.data());
    noisy_logits<level>(how, stream, unit.at, unit.n, y);
    for (Index r = 0; r < unit.rows; ++r) how.hard ? hard_row(y + r * n, n) : soft_row(y + r * n, n);
    stored(y, how.out, how.dtype, unit.at, unit.n);
  }
}

template <class R>
FN_BODY void gumbel_softmax_backward_units(const GumbelSoftmaxBackward& how, Index from, Index to) {
  const Units units(how.shape, true);
  const Index n = how.shape.n, most = units.most();
  const R inverse_tau = R(1) / R(how.tau);
  std::vector<R> buffer(std::size_t(4 * most));
  R *const grads = buffer.data(), *const softs = grads + most, *const terms = softs + most, *const outs = terms + most;
  for (Index u = from; u < to; ++u) {
    const Unit unit(units, u);
    const R* const grad = loaded(how.grad, how.dtype, unit.at, unit.n, grads);
    const R* const soft = loaded(how.soft, how.dtype, unit.at, unit.n, softs);
    R* const out = room(how.out, how.dtype, unit.at, outs);
#pragma omp simd
    for (Index i = 0; i < unit.n; ++i) terms[i] = grad[i] * soft[i];
    for (Index r = 0; r < unit.rows; ++r) {
      const Index at = r * n;
      const R dot = sum_row(terms + at, n);
#pragma omp simd
      for (Index i = at; i < at + n; ++i) out[i] = soft[i] * (grad[i] - dot) * inverse_tau;
    }
    stored(out, how.out, how.dtype, unit.at, unit.n);
  }
}

// ---- divergence from the log-uniform prior

template <Approximation approximation, class R>
FN_BODY void log_uniform_units(const LogUniform& how, double* pieces, Index from, Index to) {
  const Units units(how.shape);
  alignas(64) R inputs[kChunk], weights[kChunk], outs[kChunk];
  for (Index u = from; u < to; ++u) {
    const Unit unit(units, u);
    const R* const log_alpha = loaded(how.log_alpha, how.dtype, unit.at, unit.n, inputs);
    if (how.grad == nullptr) {
#pragma omp simd
      for (Index i = 0; i < unit.n; ++i) outs[i] = log_uniform_kl<approximation>(log_alpha[i]);
      sum_rows(outs, units, unit, u, static_cast<R*>(how.kl), pieces);
      continue;
    }
    const R* const weight = spread_rows(static_cast<const R*>(how.grad_kl), units, unit, weights);
    R* const out = room(how.grad, how.dtype, unit.at, outs);
#pragma omp simd
    for (Index i = 0; i < unit.n; ++i) out[i] = weight[i] * log_uniform_slope<approximation>(log_alpha[i]);
    stored(out, how.grad, how.dtype, unit.at, unit.n);
  }
}

// ---- one clone an instruction set

// `which` is a Form or an Approximation.
template <Simd level, int which, class R>
struct Jobs {
  FN_BODY static void run(const ScaledNoise& how, double*, Index from, Index to) {
    scaled_noise<level, R>(how, from, to);
  }
  FN_BODY static void run(const Normal& how, double* pieces, Index from, Index to) {
    normal_units<level, Form(which), R>(how, pieces, from, to);
  }
  FN_BODY static void run(const NormalBackward& how, double*, Index from, Index to) {
    normal_backward_units<level, Form(which), R>(how, from, to);
  }
  FN_BODY static void run(const GumbelSoftmax& how, double*, Index from, Index to) {
    gumbel_softmax_units<level, R>(how, from, to);
  }
  FN_BODY static void run(const GumbelSoftmaxBackward& how, double*, Index from, Index to) {
    gumbel_softmax_backward_units<R>(how, from, to);
  }
  FN_BODY static void run(const LogUniform& how, double* pieces, Index from, Index to) {
    log_uniform_units<Approximation(which), R>(how, pieces, from, to);
  }
};

template <int which, class R, class How>
void run_generic(const How& how, double* pieces, Index from, Index to) {
  Jobs<Simd::generic, which, R>::run(how, pieces, from, to);
}
template <int which, class R, class How>
FN_TARGET_AVX2 void run_avx2(const How& how, double* pieces, Index from, Index to) {
  Jobs<Simd::avx2, which, R>::run(how, pieces, from, to);
}
template <int which, class R, class How>
FN_TARGET_AVX512 void run_avx512(const How& how, double* pieces, Index from, Index to) {
  Jobs<Simd::avx512, which, R>::run(how, pieces, from, to);
}
template <int which, class R, class How>
auto clone() {
  return simd() == Simd::avx512 ? &run_avx512<which, R, How>
         : simd() == Simd::avx2 ? &run_avx2<which, R, How>
                                : &run_generic<which, R, How>;
}

// Shares out units of at least kChunk elements among threads.
template <int which, class How>
void share_out(const How& how, Dtype dtype, double* pieces, Index units, Index size = kChunk) {
  constexpr Index kParallel = 16 * kChunk;  // elements that are worth a second thread
  const auto kernel = dtype == Dtype::float64 ? clone<which, double, How>() : clone<which, float, How>();
  at::parallel_for(0, units, std::max<Index>(1, kParallel / size),
                   [&](Index from, Index to) { kernel(how, pieces, from, to); });
}

// The sums of rows that came in pieces.
void add_pieces(const Units& units, const std::vector<double>& pieces, Dtype dtype, void* sums) {
  for (Index row = 0; row < units.rows; ++row) {
    double total = 0;
    for (Index p = 0; p < units.pieces; ++p) total += pieces[std::size_t(row * units.pieces + p)];
    if (dtype == Dtype::float64)
      static_cast<double*>(sums)[row] = total;
    else
      static_cast<float*>(sums)[row] = float(total);
  }
}

template <int which, class How>
void share_out_rows(const How& how, Dtype dtype, Rows shape, void* sums) {
  const Units units(shape);
  const bool in_pieces = sums != nullptr && units.pieces > 1;
  std::vector<double> pieces(in_pieces ? std::size_t(units.count()) : 0);
  share_out<which>(how, dtype, pieces.data(), units.count());
  if (in_pieces) add_pieces(units, pieces, dtype, sums);
}

template <class How>
void by_form(Form form, const How& how, Dtype dtype, Rows shape, void* sums) {
  switch (form) {
    case Form::std:
      return share_out_rows<int(Form::std)>(how, dtype, shape, sums);
    case Form::logvar:
      return share_out_rows<int(Form::logvar)>(how, dtype, shape, sums);
    case Form::log_std:
      return share_out_rows<int(Form::log_std)>(how, dtype, shape, sums);
    case Form::var:
      return share_out_rows<int(Form::var)>(how, dtype, shape, sums);
    case Form::rho:
      return share_out_rows<int(Form::rho)>(how, dtype, shape, sums);
  }
}

void run_scaled_noise(const ScaledNoise& how) {
  share_out<0>(how, how.dtype, nullptr, (how.numel + kChunk - 1) / kChunk);
}
void run_normal(const Normal& how) { by_form(how.form, how, how.dtype, how.shape, how.kl); }
void run_normal_backward(const NormalBackward& how) {
  by_form(how.forward.form, how, how.forward.dtype, how.forward.shape, nullptr);
}
template <class How>
void run_rows(const How& how) {
  const Units units(how.shape, true);
  if (how.shape.n > 0) share_out<0>(how, how.dtype, nullptr, units.count(), units.most());
}
void run_log_uniform(const LogUniform& how) {
  switch (how.approximation) {
    case Approximation::molchanov:
      return share_out_rows<int(Approximation::molchanov)>(how, how.dtype, how.shape, how.kl);
    case Approximation::kingma:
      return share_out_rows<int(Approximation::kingma)>(how, how.dtype, how.shape, how.kl);
    case Approximation::ard:
      return share_out_rows<int(Approximation::ard)>(how, how.dtype, how.shape, how.kl);
  }
}

const Kernels kCpu{
    &run_scaled_noise, &run_normal, &run_normal_backward, &run_rows<GumbelSoftmax>, &run_rows<GumbelSoftmaxBackward>,
    &run_log_uniform};
const Register kRegistered(at::kCPU, kCpu);

}  // namespace
}  // namespace fastnuggets::sample
