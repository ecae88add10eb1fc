// CPU kernels: threads share out blocks of elements, so that neither the sizes of the tensors nor the number of threads
// matter to the speed or to a bit of the result. All arithmetic is element by element.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "average/average_math.h"
#include "average/average_op.h"
#include "common/cpu.h"
#include "common/philox_cpu.h"

#define FN_BODY inline __attribute__((always_inline))

namespace fastnuggets::average {
namespace {

using Index = std::int64_t;

// Elements [start, stop) of a row, start a multiple of kBlock.
struct Run {
  Index row, start, stop;
};

struct Cell {
  void* data;
  Dtype dtype;

  template <class S>
  FN_BODY S* at(Index element) const {
    return static_cast<S*>(data) + element;
  }
};

FN_BODY Cell cell(const Rows& rows, Index row, int column) {
  return {rows.data[row * rows.C + column], rows.dtype[row * rows.C + column]};
}

template <class S, class R>
FN_BODY const R* convert(const S* from, Index n, R* buffer) {
#pragma omp simd
  for (Index i = 0; i < n; ++i) buffer[i] = R(load(from[i]));
  return buffer;
}

// Elements in the type R: where they are, or in the buffer of kBlock.
template <class R>
FN_BODY const R* loaded(Cell from, Index at, Index n, R* buffer) {
  switch (from.dtype) {
    case Dtype::float32:
      if constexpr (std::is_same_v<R, float>) return from.at<float>(at);
      return convert(from.at<float>(at), n, buffer);
    case Dtype::float64:
      if constexpr (std::is_same_v<R, double>) return from.at<double>(at);
      return convert(from.at<double>(at), n, buffer);
    case Dtype::float16:
      return convert(from.at<Half>(at), n, buffer);
    default:
      return convert(from.at<BFloat16>(at), n, buffer);
  }
}

template <class S, class R>
FN_BODY void stored(const R* from, Index n, S* to) {
  using C = typename Compute<S>::type;
#pragma omp simd
  for (Index i = 0; i < n; ++i) to[i] = Store<S>::of(C(from[i]));
}

template <class R>
FN_BODY void stored(const R* from, Index n, Cell to, Index at) {
  switch (to.dtype) {
    case Dtype::float32:
      return stored(from, n, to.at<float>(at));
    case Dtype::float64:
      return stored(from, n, to.at<double>(at));
    case Dtype::float16:
      return stored(from, n, to.at<Half>(at));
    default:
      return stored(from, n, to.at<BFloat16>(at));
  }
}

// ---- update

template <class S, class R>
FN_BODY void lerp(S* a, const R* w, Index n, Lerp<R> step) {
#pragma omp simd
  for (Index i = 0; i < n; ++i) a[i] = Store<S>::of(step(load(a[i]), w[i]));
}

FN_BODY void lerp_split(BFloat16* a, std::int16_t* rest, const float* w, Index n, Lerp<float> step) {
#pragma omp simd
  for (Index i = 0; i < n; ++i) {
    const std::uint32_t next = one_nan(step(join(a[i], rest[i]), w[i]));
    a[i] = split_high(next);
    rest[i] = split_low(next);
  }
}

constexpr Index kNoiseGroup = 2 * kPhiloxBlock;  // 16-bit numbers of a block of words

// `at` is a multiple of the group.
template <Simd level>
FN_BODY void lerp_stochastic(BFloat16* a, const float* w, Index at, Index n, Lerp<float> step, PhiloxStream stream) {
  for (Index start = 0; start < n; start += kNoiseGroup) {
    std::uint32_t words[kPhiloxBlock];
    philox_block<level>(stream, std::uint64_t(at + start) / kNoiseGroup, words);
    for (int half = 0; half < 2 * kPhiloxWords; ++half) {
      const Index first = start + half * kPhiloxLanes;
      const std::uint32_t* const word = words + half / 2 * kPhiloxLanes;
      const int shift = 16 * (half % 2);
      const Index count = std::clamp<Index>(n - first, 0, kPhiloxLanes);
      if (count == kPhiloxLanes) {
#pragma omp simd
        for (Index i = 0; i < kPhiloxLanes; ++i)
          a[first + i] = round_stochastic(step(load(a[first + i]), w[first + i]), (word[i] >> shift) & 0xFFFFu);
      } else {
        for (Index i = 0; i < count; ++i)
          a[first + i] = round_stochastic(step(load(a[first + i]), w[first + i]), (word[i] >> shift) & 0xFFFFu);
      }
    }
  }
}

template <Simd level, class R>
FN_BODY void update_average(const Rows& rows, const Update& how, Index row, int k, const R* w, Index at, Index n) {
  const Cell a = cell(rows, row, k);
  const Lerp<R> step(how.rates.value[k]);
  if constexpr (std::is_same_v<R, double>)
    return lerp(a.at<double>(at), w, n, step);
  else {
    if (how.rounding == Rounding::compensated)
      return lerp_split(a.at<BFloat16>(at), cell(rows, row, how.rates.count + k).at<std::int16_t>(at), w, n, step);
    if (how.rounding == Rounding::stochastic) {
      // Averages of one weight differ in their decay; the same noise serves them.
      const PhiloxStream stream{how.seed, how.step, rows.stream[row]};
      return lerp_stochastic<level>(a.at<BFloat16>(at), w, at, n, step, stream);
    }
    switch (a.dtype) {
      case Dtype::float32:
        return lerp(a.at<float>(at), w, n, step);
      case Dtype::float16:
        return lerp(a.at<Half>(at), w, n, step);
      default:
        return lerp(a.at<BFloat16>(at), w, n, step);
    }
  }
}

template <Simd level, class R>
FN_BODY void update_as(const Rows& rows, const Update& how, Run run) {
  R buffer[kBlock];
  const Cell weight = cell(rows, run.row, rows.C - 1);
  // One average of weights in its own type needs no block: one long loop.
  const bool direct = how.rates.count == 1 && loaded<R>(weight, 0, 0, buffer) == weight.data;
  const Index most = direct ? run.stop - run.start : kBlock;
  for (Index at = run.start; at < run.stop; at += most) {
    const Index n = std::min(most, run.stop - at);
    const R* w = loaded(weight, at, n, buffer);
    for (int k = 0; k < how.rates.count; ++k) update_average<level>(rows, how, run.row, k, w, at, n);
  }
}

// CALL with R the type that a column is computed in.
#define FN_IN_TYPE_OF(COLUMN, ...)                           \
  if (cell(rows, run.row, COLUMN).dtype == Dtype::float64) { \
    using R = double;                                        \
    __VA_ARGS__;                                             \
  } else {                                                   \
    using R = float;                                         \
    __VA_ARGS__;                                             \
  }

template <Simd level>
FN_BODY void body(const Rows& rows, const Update& how, Run run) {
  FN_IN_TYPE_OF(0, update_as<level, R>(rows, how, run))
}

// ---- SWAG

template <class R>
FN_BODY void swag_as(const Rows& rows, const Swag& how, Run run) {
  R buffer[kBlock];
  R* mean = cell(rows, run.row, 0).at<R>(0);
  R* m2 = cell(rows, run.row, 1).at<R>(0);
  R* ring = how.ring ? cell(rows, run.row, 2).at<R>(how.row * rows.numel[run.row]) : nullptr;
  const R rate = R(how.rate);
  for (Index at = run.start; at < run.stop; at += kBlock) {
    const Index n = std::min(kBlock, run.stop - at);
    const R* w = loaded(cell(rows, run.row, rows.C - 1), at, n, buffer);
    R* const mean_at = mean + at;
    R* const m2_at = m2 + at;
    if (ring == nullptr) {
#pragma omp simd
      for (Index i = 0; i < n; ++i) {
        const Moments<R> next = welford(mean_at[i], m2_at[i], w[i], rate);
        mean_at[i] = next.mean;
        m2_at[i] = next.m2;
      }
    } else {
      R* const ring_at = ring + at;
#pragma omp simd
      for (Index i = 0; i < n; ++i) {
        const Moments<R> next = welford(mean_at[i], m2_at[i], w[i], rate);
        mean_at[i] = next.mean;
        m2_at[i] = next.m2;
        ring_at[i] = next.deviation;
      }
    }
  }
}

template <Simd level>
FN_BODY void body(const Rows& rows, const Swag& how, Run run) {
  FN_IN_TYPE_OF(0, swag_as<R>(rows, how, run))
}

template <Simd level, class R>
FN_BODY void sample_as(const Rows& rows, const Sample& how, Run run) {
  // Rows of the ring are far apart: a longer piece of each lets the hardware see it coming.
  constexpr Index kPiece = 4 * kBlock;
  R drawn[kPiece];
  float noise[kBlock];
  const R* mean = cell(rows, run.row, 1).at<R>(0);
  const R* m2 = cell(rows, run.row, 2).at<R>(0);
  const R* ring = how.columns.count > 0 ? cell(rows, run.row, 3).at<R>(0) : nullptr;
  const PhiloxStream stream{how.seed, how.step, rows.stream[run.row]};
  const R diagonal = R(how.diagonal);
  for (Index start = run.start; start < run.stop; start += kPiece) {
    const Index count = std::min(kPiece, run.stop - start);
    for (Index first = 0; first < count; first += kBlock) {
      const Index at = start + first, n = std::min(kBlock, count - first);
      for (Index i = 0; i < n; i += kPhiloxBlock)
        normal_block<level>(stream, std::uint64_t(at + i) / kPhiloxBlock, noise + i);
#pragma omp simd
      for (Index i = 0; i < n; ++i) {
        const R square = m2[at + i] > R(0) ? m2[at + i] : R(0);
        drawn[first + i] = multiply_add(diagonal * std::sqrt(square), R(noise[i]), mean[at + i]);
      }
    }
    for (int k = 0; k < how.columns.count; ++k) {
      const R* row = ring + k * rows.numel[run.row] + start;
      const R column = R(how.columns.value[k]);
#pragma omp simd
      for (Index i = 0; i < count; ++i) drawn[i] = multiply_add(column, row[i], drawn[i]);
    }
    stored(drawn, count, cell(rows, run.row, 0), start);
  }
}

template <Simd level>
FN_BODY void body(const Rows& rows, const Sample& how, Run run) {
  FN_IN_TYPE_OF(1, sample_as<level, R>(rows, how, run))
}

// ---- sums of several sets of weights

// Eight numbers as a vector: GCC and clang make of it what the instruction set has.
typedef float Floats __attribute__((vector_size(32)));
typedef std::uint32_t Words __attribute__((vector_size(32)));
typedef std::uint16_t Shorts __attribute__((vector_size(16)));
constexpr int kLanes = 8;

FN_BODY void load_lanes(const float* x, Floats& lanes) { std::memcpy(&lanes, x, sizeof lanes); }
FN_BODY void load_lanes(const BFloat16* x, Floats& lanes) {
  Shorts bits;
  std::memcpy(&bits, x, sizeof bits);
  const Words wide = __builtin_convertvector(bits, Words) << 16;
  std::memcpy(&lanes, &wide, sizeof lanes);
}

// Sums stay in registers over all sources, four vectors of them: as an array GCC would keep them in memory.
template <class S>
FN_BODY void sum_sources(const Rows& rows, const Scalars& c, Index row, Index at, Index n, float* sum) {
  const void* const* sources = rows.data + row * rows.C + 1;
  constexpr int kStep = 4 * kLanes;
  Index i = 0;
  for (; i + kStep <= n; i += kStep) {
    Floats sum0{}, sum1{}, sum2{}, sum3{};
    for (int k = 0; k < c.count; ++k) {
      const S* x = static_cast<const S*>(sources[k]) + at + i;
      const Floats factor = Floats{} + float(c.value[k]);
      Floats x0, x1, x2, x3;
      load_lanes(x, x0);
      load_lanes(x + kLanes, x1);
      load_lanes(x + 2 * kLanes, x2);
      load_lanes(x + 3 * kLanes, x3);
      sum0 += factor * x0;
      sum1 += factor * x1;
      sum2 += factor * x2;
      sum3 += factor * x3;
    }
    std::memcpy(sum + i, &sum0, sizeof sum0);
    std::memcpy(sum + i + kLanes, &sum1, sizeof sum1);
    std::memcpy(sum + i + 2 * kLanes, &sum2, sizeof sum2);
    std::memcpy(sum + i + 3 * kLanes, &sum3, sizeof sum3);
  }
  for (; i < n; ++i) {
    sum[i] = 0;
    for (int k = 0; k < c.count; ++k)
      sum[i] = multiply_add(float(c.value[k]), load(static_cast<const S*>(sources[k])[at + i]), sum[i]);
  }
}

template <class R>
FN_BODY void sum_mixed(const Rows& rows, const Scalars& c, Index row, Index at, Index n, R* sum) {
  R buffer[kBlock];
  std::fill_n(sum, n, R(0));
  for (int k = 0; k < c.count; ++k) {
    const R* x = loaded(cell(rows, row, 1 + k), at, n, buffer);
    const R factor = R(c.value[k]);
#pragma omp simd
    for (Index i = 0; i < n; ++i) sum[i] = multiply_add(factor, x[i], sum[i]);
  }
}

template <class R>
FN_BODY void weighted_sum_as(const Rows& rows, const WeightedSum& how, Run run) {
  R sum[kBlock];
  const Dtype* dtypes = rows.dtype + run.row * rows.C + 1;
  const bool alike = std::all_of(dtypes, dtypes + how.coefficients.count, [&](Dtype d) { return d == dtypes[0]; });
  for (Index at = run.start; at < run.stop; at += kBlock) {
    const Index n = std::min(kBlock, run.stop - at);
    if constexpr (std::is_same_v<R, float>) {
      if (alike && dtypes[0] == Dtype::bfloat16)
        sum_sources<BFloat16>(rows, how.coefficients, run.row, at, n, sum);
      else if (alike && dtypes[0] == Dtype::float32)
        sum_sources<float>(rows, how.coefficients, run.row, at, n, sum);
      else
        sum_mixed(rows, how.coefficients, run.row, at, n, sum);
    } else {
      sum_mixed(rows, how.coefficients, run.row, at, n, sum);
    }
    stored(sum, n, cell(rows, run.row, 0), at);
  }
}

template <Simd level>
FN_BODY void body(const Rows& rows, const WeightedSum& how, Run run) {
  FN_IN_TYPE_OF(0, weighted_sum_as<R>(rows, how, run))
}

// ---- optimizer steps

template <class R>
FN_BODY void step_block(const Rows& rows, const Sgd& how, Index row, Index at, Index n) {
  R* const w = cell(rows, row, 0).at<R>(at);
  const R* const g = cell(rows, row, 1).at<R>(at);
  R* const m = how.has_momentum ? cell(rows, row, 2).at<R>(at) : nullptr;
  if (m == nullptr) {
#pragma omp simd
    for (Index i = 0; i < n; ++i) w[i] = sgd(how, w[i], g[i], R(0)).weight;
  } else {
#pragma omp simd
    for (Index i = 0; i < n; ++i) {
      const SgdStep<R> next = sgd(how, w[i], g[i], m[i]);
      w[i] = next.weight;
      m[i] = next.momentum;
    }
  }
}

template <class R>
FN_BODY void step_block(const Rows& rows, const AdamW& how, Index row, Index at, Index n) {
  R* const w = cell(rows, row, 0).at<R>(at);
  const R* const g = cell(rows, row, 1).at<R>(at);
  R* const first = cell(rows, row, 2).at<R>(at);
  R* const second = cell(rows, row, 3).at<R>(at);
#pragma omp simd
  for (Index i = 0; i < n; ++i) {
    const AdamWStep<R> next = adamw(how, w[i], g[i], first[i], second[i]);
    w[i] = next.weight;
    first[i] = next.first;
    second[i] = next.second;
  }
}

// The new weights of a block are averaged while they are in the cache.
template <class R, class How>
FN_BODY void step_as(const Rows& rows, const How& how, Run run) {
  const int averages = rows.C - how.rates.count;
  R buffer[kBlock];
  for (Index at = run.start; at < run.stop; at += kBlock) {
    const Index n = std::min(kBlock, run.stop - at);
    step_block<R>(rows, how, run.row, at, n);
    const R* w = cell(rows, run.row, 0).at<R>(at);
    for (int k = 0; k < how.rates.count; ++k) {
      const Cell a = cell(rows, run.row, averages + k);
      if (a.dtype == cell(rows, run.row, 0).dtype) {
        lerp(a.at<R>(at), w, n, Lerp<R>(how.rates.value[k]));
        continue;
      }
      // Another type: computed in the weight's, rounded once.
      const R* before = loaded(a, at, n, buffer);
      const Lerp<R> step(how.rates.value[k]);
#pragma omp simd
      for (Index i = 0; i < n; ++i) buffer[i] = step(before[i], w[i]);
      stored(buffer, n, a, at);
    }
  }
}

template <Simd level>
FN_BODY void body(const Rows& rows, const Sgd& how, Run run) {
  FN_IN_TYPE_OF(0, step_as<R>(rows, how, run))
}
template <Simd level>
FN_BODY void body(const Rows& rows, const AdamW& how, Run run) {
  FN_IN_TYPE_OF(0, step_as<R>(rows, how, run))
}

// ---- bits

struct Swap {};
struct Search {
  std::atomic<Index>* found;
};

template <class S>
FN_BODY void swap_as(const Rows& rows, Run run) {
  S* const a = cell(rows, run.row, 0).at<S>(0);
  S* const b = cell(rows, run.row, 1).at<S>(0);
#pragma omp simd
  for (Index i = run.start; i < run.stop; ++i) {
    const S kept = a[i];
    a[i] = b[i];
    b[i] = kept;
  }
}

template <Simd level>
FN_BODY void body(const Rows& rows, const Swap&, Run run) {
  switch (cell(rows, run.row, 0).dtype) {
    case Dtype::float32:
      return swap_as<std::uint32_t>(rows, run);
    case Dtype::float64:
      return swap_as<std::uint64_t>(rows, run);
    default:
      return swap_as<std::uint16_t>(rows, run);
  }
}

template <class Bits>
FN_BODY bool has_nonfinite(const Bits* x, Index n, Bits exponent) {
  Bits found = 0;
#pragma omp simd reduction(| : found)
  for (Index i = 0; i < n; ++i) found |= Bits((x[i] & exponent) == exponent);
  return found != 0;
}

template <Simd level>
FN_BODY void body(const Rows& rows, const Search& how, Run run) {
  if (how.found->load(std::memory_order_relaxed) <= run.row) return;
  const Cell w = cell(rows, run.row, 0);
  const Index n = run.stop - run.start;
  bool found = false;
  switch (w.dtype) {
    case Dtype::float32:
      found = has_nonfinite(w.at<std::uint32_t>(run.start), n, kInfinity);
      break;
    case Dtype::float64:
      found = has_nonfinite(w.at<std::uint64_t>(run.start), n, std::uint64_t(0x7FF0000000000000));
      break;
    case Dtype::float16:
      found = has_nonfinite(w.at<std::uint16_t>(run.start), n, std::uint16_t(0x7C00));
      break;
    default:
      found = has_nonfinite(w.at<std::uint16_t>(run.start), n, std::uint16_t(0x7F80));
  }
  Index before = how.found->load(std::memory_order_relaxed);
  while (found && run.row < before && !how.found->compare_exchange_weak(before, run.row)) {
  }
}

// ---- one clone an instruction set: 256 bits do what memory allows

// Short rows lie anywhere in memory: no hardware sees the next one coming.
constexpr Index kAhead = 4;

// The runs that blocks [block, end) are made of.
template <Simd level, class How>
FN_BODY void runs(const Rows& rows, const How& how, Index block, Index end) {
  Index row = std::upper_bound(rows.first_block, rows.first_block + rows.R + 1, block) - rows.first_block - 1;
  for (; block < end; ++row) {
    const Index first = rows.first_block[row], stop = std::min(end, rows.first_block[row + 1]);
    if (block == stop) continue;
    if (row + kAhead < rows.R)
      for (int c = 0; c < rows.C; ++c) __builtin_prefetch(rows.data[(row + kAhead) * rows.C + c]);
    body<level>(rows, how, {row, (block - first) * kBlock, std::min((stop - first) * kBlock, rows.numel[row])});
    block = stop;
  }
}

template <class How>
void runs_generic(const Rows& rows, const How& how, Index block, Index end) {
  runs<Simd::generic>(rows, how, block, end);
}
template <class How>
FN_TARGET_AVX2 void runs_avx2(const Rows& rows, const How& how, Index block, Index end) {
  runs<Simd::avx2>(rows, how, block, end);
}

// Below this many elements a second thread costs more than it does.
constexpr Index kParallel = 1 << 15;

template <class How>
void for_each_run(const Table& table, const How& how) {
  const Rows& rows = table.rows();
  const auto kernel = simd() == Simd::generic ? &runs_generic<How> : &runs_avx2<How>;
  const Index blocks = rows.first_block[rows.R];
  at::parallel_for(0, blocks, table.elements() < kParallel ? blocks : 1,
                   [&](Index block, Index end) { kernel(rows, how, block, end); });
}

at::Tensor find_nonfinite(const Table& table) {
  std::atomic<Index> found(table.rows().R);
  for_each_run(table, Search{&found});
  const at::Tensor result = at::empty({}, at::kLong);
  *result.mutable_data_ptr<Index>() = found.load();
  return result;
}

const Kernels kCpu{&for_each_run<Update>,
                   &for_each_run<Swag>,
                   &for_each_run<Sample>,
                   &for_each_run<WeightedSum>,
                   [](const Table& table) { for_each_run(table, Swap{}); },
                   &find_nonfinite,
                   &for_each_run<Sgd>,
                   &for_each_run<AdamW>};
const Register kRegistered(at::kCPU, kCpu);

}  // namespace
}  // namespace fastnuggets::average
