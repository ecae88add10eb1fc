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
FN_BODY void convert_from(Dtype dtype, const void* from, Index at, Index n, R* to) {
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

template <class S, class R>
FN_BODY void store(const R* from, Index n, S* to) {
  using C = typename Compute<S>::type;
#pragma omp simd
  for (Index i = 0; i < n; ++i) to[i] = Store<S>::of(C(from[i]));
}
template <class R>
FN_BODY void convert_to(const R* from, Index n, Dtype dtype, void* to, Index at) {
  if (dtype == Dtype::float16) return store(from, n, static_cast<Half*>(to) + at);
  store(from, n, static_cast<BFloat16*>(to) + at);
}

// ---- widths of a chunk

enum class Need { std, log, slopes };  // beside std

template <class R>
struct Widths {
  alignas(64) R std[kChunk], log[kChunk], std_slope[kChunk], log_slope[kChunk];
};

template <Form form, Need need, class R>
FN_BODY void widths(const R* x, Index n, Widths<R>& to) {
  R *const std = to.std, *const log = to.log, *const std_slope = to.std_slope, *const log_slope = to.log_slope;
#pragma omp simd
  for (Index i = 0; i < n; ++i) {
    const Spread<R> s = spread_of<form>(x[i]);
    std[i] = s.std;
    if constexpr (need == Need::log) log[i] = s.log;
    if constexpr (need == Need::slopes) std_slope[i] = s.std_slope;
    if constexpr (need == Need::slopes) log_slope[i] = s.log_slope;
  }
}

// The same of the argument of a softplus, in short loops: in one each element waits for a chain of 50 operations, and
// the processor sees too few elements ahead to fill the time.
template <Need need, class R>
FN_BODY void widths_of_rho(const R* x, Index n, Widths<R>& to) {
  R *const std = to.std, *const log = to.log, *const std_slope = to.std_slope, *const log_slope = to.log_slope;
  R* const e = to.log;
#pragma omp simd
  for (Index i = 0; i < n; ++i) e[i] = exp_of_minus_size(x[i]);
#pragma omp simd
  for (Index i = 0; i < n; ++i) std[i] = softplus(x[i], e[i]);
  if constexpr (need == Need::log) {
#pragma omp simd
    for (Index i = 0; i < n; ++i) log[i] = log_softplus(x[i], std[i]);
  } else if constexpr (need == Need::slopes) {
#pragma omp simd
    for (Index i = 0; i < n; ++i) {
      const R slope = softplus_slope(x[i], e[i]);
      std_slope[i] = slope;
      log_slope[i] = log_softplus_slope(x[i], std[i], slope);
    }
  }
}

template <Need need, class R>
FN_BODY void widths(Form form, const R* x, Index n, Widths<R>& to) {
  switch (form) {
    case Form::std:
      return widths<Form::std, need>(x, n, to);
    case Form::logvar:
      return widths<Form::logvar, need>(x, n, to);
    case Form::log_std:
      return widths<Form::log_std, need>(x, n, to);
    case Form::var:
      return widths<Form::var, need>(x, n, to);
    case Form::rho:
      return widths_of_rho<need>(x, n, to);
  }
}
template <class R>
FN_BODY void widths(Form form, Need need, const R* x, Index n, Widths<R>& to) {
  switch (need) {
    case Need::std:
      return widths<Need::std>(form, x, n, to);
    case Need::log:
      return widths<Need::log>(form, x, n, to);
    case Need::slopes:
      return widths<Need::slopes>(form, x, n, to);
  }
}

// One function an instruction set, called: inlined into every kernel these would be most of the library.
template <Simd level, class R>
struct Called;

#define FN_CALLED(LEVEL, TARGET, R)                                                                                \
  template <>                                                                                                      \
  struct Called<Simd::LEVEL, R> {                                                                                  \
    TARGET __attribute__((noinline)) static void load(Dtype dtype, const void* from, Index at, Index n, R* to) {   \
      convert_from(dtype, from, at, n, to);                                                                        \
    }                                                                                                              \
    TARGET __attribute__((noinline)) static void store(const R* from, Index n, Dtype dtype, void* to, Index at) {  \
      convert_to(from, n, dtype, to, at);                                                                          \
    }                                                                                                              \
    TARGET __attribute__((noinline)) static void width(Form form, Need need, const R* x, Index n, Widths<R>& to) { \
      widths(form, need, x, n, to);                                                                                \
    }                                                                                                              \
  };
FN_CALLED(generic, , float)
FN_CALLED(avx2, FN_TARGET_AVX2, float)
FN_CALLED(avx512, FN_TARGET_AVX512, float)
FN_CALLED(generic, , double)
FN_CALLED(avx2, FN_TARGET_AVX2, double)
#undef FN_CALLED

template <class R>
constexpr Dtype kDtype = std::is_same_v<R, double> ? Dtype::float64 : Dtype::float32;

// Elements [at, at + n) in the type R: where they are, or in the buffer of kChunk.
template <Simd level, class R>
FN_BODY const R* loaded(const Operand& from, Dtype dtype, Index at, Index n, R* buffer) {
  if (from.data != nullptr && !from.constant) {
    if (dtype == kDtype<R>) return static_cast<const R*>(from.data) + at;
    Called<level, R>::load(dtype, from.data, at, n, buffer);
    return buffer;
  }
  R value = R(from.value);
  if (from.data != nullptr) Called<level, R>::load(dtype, from.data, 0, 1, &value);
  std::fill_n(buffer, n, value);
  return buffer;
}

// Where to put elements [at, at + n): their place or, for another type, the buffer, from which `stored` takes them.
template <class R>
FN_BODY R* room(void* out, Dtype dtype, Index at, R* buffer) {
  return out != nullptr && dtype == kDtype<R> ? static_cast<R*>(out) + at : buffer;
}
template <Simd level, class R>
FN_BODY void stored(const R* from, void* out, Dtype dtype, Index at, Index n) {
  if (out != nullptr && dtype != kDtype<R>) Called<level, R>::store(from, n, dtype, out, at);
}

// ---- noise

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
      constexpr Kind before = kind == Kind::gumbel ? Kind::exponential : kind;
#pragma omp simd
      for (int i = 0; i < kPhiloxBlock; ++i) out[i] = noise_of<before>(words[i]);
      if constexpr (kind == Kind::gumbel) {
#pragma omp simd
        for (int i = 0; i < kPhiloxBlock; ++i) out[i] = gumbel_of(out[i]);
      }
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
FN_BODY void make_noise(Kind kind, const PhiloxStream& stream, const Parameter& parameter, Index at, Index n,
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

template <Simd level>
void chunk_of_noise(Kind kind, const PhiloxStream& stream, const Parameter& parameter, Index at, Index n, float* noise);
template <Simd level>
void normal_blocks(const PhiloxStream& stream, Index first, Index blocks, float* normals);

#define FN_NOISE(LEVEL, TARGET)                                                                                        \
  template <>                                                                                                          \
  TARGET void chunk_of_noise<Simd::LEVEL>(Kind kind, const PhiloxStream& stream, const Parameter& parameter, Index at, \
                                          Index n, float* noise) {                                                     \
    make_noise<Simd::LEVEL>(kind, stream, parameter, at, n, noise);                                                    \
  }                                                                                                                    \
  template <>                                                                                                          \
  TARGET void normal_blocks<Simd::LEVEL>(const PhiloxStream& stream, Index first, Index blocks, float* normals) {      \
    for (Index b = 0; b < blocks; ++b)                                                                                 \
      normal_block<Simd::LEVEL>(stream, std::uint64_t(first + b), normals + b * kPhiloxBlock);                         \
  }
FN_NOISE(generic, __attribute__((noinline)))
FN_NOISE(avx2, FN_TARGET_AVX2 __attribute__((noinline)))
FN_NOISE(avx512, FN_TARGET_AVX512 __attribute__((noinline)))
#undef FN_NOISE

// The normals of any n <= kChunk elements, somewhere in the buffer of kNoiseRoom.
template <Simd level>
FN_BODY const float* normals(const PhiloxStream& stream, Index at, Index n, float* buffer) {
  const Index first = at / kPhiloxBlock, blocks = (at + n + kPhiloxBlock - 1) / kPhiloxBlock - first;
  normal_blocks<level>(stream, first, blocks, buffer);
  return buffer + at % kPhiloxBlock;
}

// ---- out = loc + scale noise

template <Simd level, class R>
FN_BODY void scaled_noise(const ScaledNoise& how, Index from, Index to) {
  const PhiloxStream stream = stream_of(how.key);
  const Parameter parameter(how.kind, how.parameter);
  // The noise itself is made where it is to be; a last chunk, whose blocks reach beyond the end, is not.
  const auto is = [](const Operand& o, double value) { return o.data == nullptr && o.value == value; };
  const bool itself = how.dtype == Dtype::float32 && is(how.loc, 0) && is(how.scale, 1);
  alignas(64) float noise[kChunk];
  alignas(64) R locs[kChunk], scales[kChunk], outs[kChunk];
  for (Index chunk = from; chunk < to; ++chunk) {
    const Index at = chunk * kChunk, n = std::min(kChunk, how.numel - at);
    if (itself && n == kChunk) {
      chunk_of_noise<level>(how.kind, stream, parameter, at, n, static_cast<float*>(how.out) + at);
      continue;
    }
    chunk_of_noise<level>(how.kind, stream, parameter, at, n, noise);
    const R* const scale = loaded<level>(how.scale, how.dtype, at, n, scales);
    R* const out = room(how.out, how.dtype, at, outs);
    const R* const loc = loaded<level>(how.loc, how.dtype, at, n, locs);
#pragma omp simd
    for (Index i = 0; i < n; ++i) out[i] = fused(scale[i], R(noise[i]), loc[i]);
    stored<level>(out, how.out, how.dtype, at, n);
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

template <Simd level, class R>
struct Priors {
  alignas(64) R means[kChunk], stds[kChunk], inverses[kChunk], logs[kChunk];
  const R* mean;

  // A constant prior is worked out once.
  FN_BODY Priors(const Normal& how) {
    if (how.prior_std.data == nullptr || how.prior_std.constant)
      fill(how, 0, std::min(kChunk, how.shape.rows * how.shape.n));
  }
  FN_BODY void at(const Normal& how, Index at, Index n) {
    mean = loaded<level>(how.prior_mean, how.dtype, at, n, means);
    if (how.prior_std.data != nullptr && !how.prior_std.constant) fill(how, at, n);
  }
  FN_BODY void fill(const Normal& how, Index at, Index n) {
    const R* const std = loaded<level>(how.prior_std, how.dtype, at, n, stds);
    R *const inverse = inverses, *const log = logs;
#pragma omp simd
    for (Index i = 0; i < n; ++i) {
      const Prior<R> prior = prior_of(std[i]);
      inverse[i] = prior.inverse;
      log[i] = prior.log;
    }
  }
};

template <Simd level, class R>
FN_BODY void normal_units(const Normal& how, double* pieces, Index from, Index to) {
  const Units units(how.shape);
  const PhiloxStream stream = how.key == nullptr ? PhiloxStream{} : stream_of(how.key);
  const Need need = how.kl == nullptr ? Need::std : Need::log;
  alignas(64) float noises[kNoiseRoom];
  alignas(64) R means[kChunk], spreads[kChunk], zs[kChunk], vars[kChunk], terms[kChunk];
  Widths<R> width;
  Priors<level, R> prior(how);
  for (Index u = from; u < to; ++u) {
    const Unit unit(units, u);
    const Index at = unit.at, n = unit.n;
    const R* const mean = loaded<level>(how.mean, how.dtype, at, n, means);
    const R* const spread = loaded<level>(how.spread, how.dtype, at, n, spreads);
    Called<level, R>::width(how.form, need, spread, n, width);
    const R *const std = width.std, *const log = width.log;
    if (how.z != nullptr) {
      const float* const noise = normals<level>(stream, at, n, noises);
      R* const z = room(how.z, how.dtype, at, zs);
#pragma omp simd
      for (Index i = 0; i < n; ++i) z[i] = fused(std[i], R(noise[i]), mean[i]);
      stored<level>(z, how.z, how.dtype, at, n);
    }
    if (how.var != nullptr) {
      R* const var = room(how.var, how.dtype, at, vars);
#pragma omp simd
      for (Index i = 0; i < n; ++i) var[i] = product(std[i], std[i]);
      stored<level>(var, how.var, how.dtype, at, n);
    }
    if (how.kl != nullptr) {
      prior.at(how, at, n);
      const R *const prior_mean = prior.mean, *const inverse = prior.inverses, *const prior_log = prior.logs;
#pragma omp simd
      for (Index i = 0; i < n; ++i)
        terms[i] = normal_kl(mean[i], std[i], log[i], prior_mean[i], inverse[i], prior_log[i]);
      sum_rows(terms, units, unit, u, static_cast<R*>(how.kl), pieces);
    }
  }
}

template <Simd level, class R>
FN_BODY void normal_backward_units(const NormalBackward& how, Index from, Index to) {
  const Normal& forward = how.forward;
  const Dtype dtype = forward.dtype;
  const Units units(forward.shape);
  const bool draws = forward.key != nullptr, squares = how.grad_var.data != nullptr;
  const PhiloxStream stream = draws ? stream_of(forward.key) : PhiloxStream{};
  alignas(64) float noises[kNoiseRoom];
  alignas(64) R means[kChunk], spreads[kChunk], grad_zs[kChunk], grad_vars[kChunk], grad_kls[kChunk], by_stds[kChunk],
      outs[4][kChunk];
  R* const by_std = by_stds;  // what comes of z and of var
  Widths<R> width;
  Priors<level, R> prior(forward);
  for (Index u = from; u < to; ++u) {
    const Unit unit(units, u);
    const Index at = unit.at, n = unit.n;
    const R* const mean = loaded<level>(forward.mean, dtype, at, n, means);
    const R* const spread = loaded<level>(forward.spread, dtype, at, n, spreads);
    const R* const grad_z = loaded<level>(how.grad_z, dtype, at, n, grad_zs);
    Called<level, R>::width(forward.form, Need::slopes, spread, n, width);
    const R *const std = width.std, *const std_slope = width.std_slope, *const log_slope = width.log_slope;
    if (draws) {
      const float* const noise = normals<level>(stream, at, n, noises);
#pragma omp simd
      for (Index i = 0; i < n; ++i) by_std[i] = product(grad_z[i], R(noise[i]));
    } else {
      std::fill_n(by_std, n, R(0));
    }
    if (squares) {
      const R* const grad_var = loaded<level>(how.grad_var, dtype, at, n, grad_vars);
#pragma omp simd
      for (Index i = 0; i < n; ++i) by_std[i] = fused(R(2) * grad_var[i], std[i], by_std[i]);
    }
    R* out[4];
    for (int k = 0; k < 4; ++k) out[k] = room(how.grads[k], dtype, at, outs[k]);
    R *const by_mean = out[0], *const by_spread = out[1], *const by_prior_mean = out[2], *const by_prior_std = out[3];
    if (how.grad_kl == nullptr) {
#pragma omp simd
      for (Index i = 0; i < n; ++i) by_spread[i] = by_std[i] * std_slope[i];
      std::copy_n(grad_z, n, by_mean);
      for (int k = 2; k < 4; ++k)
        if (how.grads[k] != nullptr) std::fill_n(out[k], n, R(0));
    } else {
      prior.at(forward, at, n);
      const R *const prior_mean = prior.mean, *const inverse = prior.inverses;
      const R* const grad_kl = spread_rows(static_cast<const R*>(how.grad_kl), units, unit, grad_kls);
#pragma omp simd
      for (Index i = 0; i < n; ++i) {
        by_mean[i] = grad_of_mean(grad_z[i], grad_kl[i], mean[i], prior_mean[i], inverse[i]);
        by_spread[i] = grad_of_spread(by_std[i], grad_kl[i], std[i], std_slope[i], log_slope[i], inverse[i]);
      }
      if (how.grads[2] != nullptr || how.grads[3] != nullptr) {
#pragma omp simd
        for (Index i = 0; i < n; ++i) {
          by_prior_mean[i] = grad_of_prior_mean(grad_kl[i], mean[i], prior_mean[i], inverse[i]);
          by_prior_std[i] = grad_of_prior_std(grad_kl[i], mean[i], std[i], prior_mean[i], inverse[i]);
        }
      }
    }
    for (int k = 0; k < 4; ++k) stored<level>(out[k], how.grads[k], dtype, at, n);
  }
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
    const R* const logit = loaded<level>(how.logits, how.dtype, start, some, logits);
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
    stored<level>(y, how.out, how.dtype, unit.at, unit.n);
  }
}

template <Simd level, class R>
FN_BODY void gumbel_softmax_backward_units(const GumbelSoftmaxBackward& how, Index from, Index to) {
  const Units units(how.shape, true);
  const Index n = how.shape.n, most = units.most();
  const R inverse_tau = R(1) / R(how.tau);
  std::vector<R> buffer(std::size_t(4 * most));
  R *const grads = buffer.data(), *const softs = grads + most, *const terms = softs + most, *const outs = terms + most;
  for (Index u = from; u < to; ++u) {
    const Unit unit(units, u);
    const R* const grad = loaded<level>(how.grad, how.dtype, unit.at, unit.n, grads);
    const R* const soft = loaded<level>(how.soft, how.dtype, unit.at, unit.n, softs);
    R* const out = room(how.out, how.dtype, unit.at, outs);
#pragma omp simd
    for (Index i = 0; i < unit.n; ++i) terms[i] = grad[i] * soft[i];
    for (Index r = 0; r < unit.rows; ++r) {
      const Index at = r * n;
      const R dot = sum_row(terms + at, n);
#pragma omp simd
      for (Index i = at; i < at + n; ++i) out[i] = soft[i] * (grad[i] - dot) * inverse_tau;
    }
    stored<level>(out, how.out, how.dtype, unit.at, unit.n);
  }
}

// ---- divergence from the log-uniform prior

template <Approximation approximation, class R>
FN_BODY void log_uniform_terms(const R* log_alpha, Index n, R* out) {
#pragma omp simd
  for (Index i = 0; i < n; ++i) out[i] = log_uniform_kl<approximation>(log_alpha[i]);
}
template <Approximation approximation, class R>
FN_BODY void log_uniform_slopes(const R* log_alpha, const R* weight, Index n, R* out) {
#pragma omp simd
  for (Index i = 0; i < n; ++i) out[i] = weight[i] * log_uniform_slope<approximation>(log_alpha[i]);
}

template <Simd level, Approximation approximation, class R>
FN_BODY void log_uniform_units(const LogUniform& how, double* pieces, Index from, Index to) {
  const Units units(how.shape);
  alignas(64) R inputs[kChunk], weights[kChunk], outs[kChunk];
  for (Index u = from; u < to; ++u) {
    const Unit unit(units, u);
    const R* const log_alpha = loaded<level>(how.log_alpha, how.dtype, unit.at, unit.n, inputs);
    if (how.grad == nullptr) {
      log_uniform_terms<approximation>(log_alpha, unit.n, outs);
      sum_rows(outs, units, unit, u, static_cast<R*>(how.kl), pieces);
      continue;
    }
    const R* const weight = spread_rows(static_cast<const R*>(how.grad_kl), units, unit, weights);
    R* const out = room(how.grad, how.dtype, unit.at, outs);
    log_uniform_slopes<approximation>(log_alpha, weight, unit.n, out);
    stored<level>(out, how.grad, how.dtype, unit.at, unit.n);
  }
}
template <Simd level, class R>
FN_BODY void log_uniform_units(const LogUniform& how, double* pieces, Index from, Index to) {
  switch (how.approximation) {
    case Approximation::molchanov:
      return log_uniform_units<level, Approximation::molchanov, R>(how, pieces, from, to);
    case Approximation::kingma:
      return log_uniform_units<level, Approximation::kingma, R>(how, pieces, from, to);
    case Approximation::ard:
      return log_uniform_units<level, Approximation::ard, R>(how, pieces, from, to);
  }
}

// ---- one clone an instruction set

template <Simd level, class R>
struct Jobs {
  FN_BODY static void run(const ScaledNoise& how, double*, Index from, Index to) {
    scaled_noise<level, R>(how, from, to);
  }
  FN_BODY static void run(const Normal& how, double* pieces, Index from, Index to) {
    normal_units<level, R>(how, pieces, from, to);
  }
  FN_BODY static void run(const NormalBackward& how, double*, Index from, Index to) {
    normal_backward_units<level, R>(how, from, to);
  }
  FN_BODY static void run(const GumbelSoftmax& how, double*, Index from, Index to) {
    gumbel_softmax_units<level, R>(how, from, to);
  }
  FN_BODY static void run(const GumbelSoftmaxBackward& how, double*, Index from, Index to) {
    gumbel_softmax_backward_units<level, R>(how, from, to);
  }
  FN_BODY static void run(const LogUniform& how, double* pieces, Index from, Index to) {
    log_uniform_units<level, R>(how, pieces, from, to);
  }
};

template <class R, class How>
void run_generic(const How& how, double* pieces, Index from, Index to) {
  Jobs<Simd::generic, R>::run(how, pieces, from, to);
}
template <class R, class How>
FN_TARGET_AVX2 void run_avx2(const How& how, double* pieces, Index from, Index to) {
  Jobs<Simd::avx2, R>::run(how, pieces, from, to);
}
template <class R, class How>
FN_TARGET_AVX512 void run_avx512(const How& how, double* pieces, Index from, Index to) {
  Jobs<Simd::avx512, R>::run(how, pieces, from, to);
}
// Of float64, whose logarithms are the library's, AVX-512 would make little more.
template <class R, class How>
auto clone() {
  if constexpr (std::is_same_v<R, float>)
    if (simd() == Simd::avx512) return &run_avx512<R, How>;
  return simd() == Simd::generic ? &run_generic<R, How> : &run_avx2<R, How>;
}

// Shares out units of at least kChunk elements among threads.
template <class How>
void share_out(const How& how, Dtype dtype, double* pieces, Index units, Index size = kChunk) {
  constexpr Index kParallel = 16 * kChunk;  // elements that are worth a second thread
  const auto kernel = dtype == Dtype::float64 ? clone<double, How>() : clone<float, How>();
  at::parallel_for(0, units, std::max<Index>(1, kParallel / size),
                   [&](Index from, Index to) { kernel(how, pieces, from, to); });
}

// The sums of rows that came in pieces, in as many lanes as a warp has.
void add_pieces(const Units& units, const std::vector<double>& pieces, Dtype dtype, void* sums) {
  for (Index row = 0; row < units.rows; ++row) {
    constexpr Index kLanes = 32;
    double lanes[kLanes] = {};
    for (Index p = 0; p < units.pieces; ++p) lanes[p % kLanes] += pieces[std::size_t(row * units.pieces + p)];
    for (Index half = kLanes / 2; half > 0; half /= 2)
      for (Index l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    const double total = lanes[0];
    if (dtype == Dtype::float64)
      static_cast<double*>(sums)[row] = total;
    else
      static_cast<float*>(sums)[row] = float(total);
  }
}

template <class How>
void share_out_rows(const How& how, Dtype dtype, Rows shape, void* sums) {
  const Units units(shape);
  const bool in_pieces = sums != nullptr && units.pieces > 1;
  std::vector<double> pieces(in_pieces ? std::size_t(units.count()) : 0);
  share_out(how, dtype, pieces.data(), units.count());
  if (in_pieces) add_pieces(units, pieces, dtype, sums);
}

void run_scaled_noise(const ScaledNoise& how) { share_out(how, how.dtype, nullptr, (how.numel + kChunk - 1) / kChunk); }
void run_normal(const Normal& how) { share_out_rows(how, how.dtype, how.shape, how.kl); }
void run_normal_backward(const NormalBackward& how) {
  share_out_rows(how, how.forward.dtype, how.forward.shape, nullptr);
}
template <class How>
void run_whole_rows(const How& how) {
  const Units units(how.shape, true);
  if (how.shape.n > 0) share_out(how, how.dtype, nullptr, units.count(), units.most());
}
void run_log_uniform(const LogUniform& how) { share_out_rows(how, how.dtype, how.shape, how.kl); }

const Kernels kCpu{&run_scaled_noise,
                   &run_normal,
                   &run_normal_backward,
                   &run_whole_rows<GumbelSoftmax>,
                   &run_whole_rows<GumbelSoftmaxBackward>,
                   &run_log_uniform};
const Register kRegistered(at::kCPU, kCpu);

}  // namespace
}  // namespace fastnuggets::sample
