// What the CPU kernels of filters share: rows in the type that is computed in, and clones by instruction set.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "blend/filter_math.h"
#include "common/cpu.h"

#define FN_BODY inline __attribute__((always_inline))

namespace fastnuggets::filter {

template <class R>
constexpr int kLanes = 32 / sizeof(R);  // of a vector; GCC and clang make of it what the instruction set has
template <class R>
struct VectorOf {
  typedef R type __attribute__((vector_size(32)));
};
template <class R>
using Vector = typename VectorOf<R>::type;

// By reference: a vector that is returned has another calling convention in each instruction set.
template <class V>
FN_BODY void load_lanes(const void* from, V& lanes) {
  std::memcpy(&lanes, from, sizeof lanes);
}

// ---- stored numbers

// Bytes as R are the numbers that they are.
template <class S, class R>
FN_BODY void load_row(const S* from, Index n, R* to) {
  if constexpr (std::is_same_v<S, R>) {
    std::memcpy(to, from, std::size_t(n) * sizeof(R));
  } else {
#pragma omp simd
    for (Index i = 0; i < n; ++i) {
      if constexpr (std::is_integral_v<S>)
        to[i] = R(from[i]);
      else
        to[i] = R(load(from[i]));
    }
  }
}

// To nearest, ties to even, and what is outside becomes the nearest byte. Sums of bytes fit an int.
FN_BODY std::uint8_t to_byte(float x) {
  const std::int32_t whole = std::int32_t(__builtin_rintf(x));
  return std::uint8_t(whole < 0 ? 0 : whole > 255 ? 255 : whole);
}

template <class S, class R>
FN_BODY void store_row(const R* from, Index n, S* to) {
  if constexpr (std::is_same_v<S, R>) {
    std::memcpy(to, from, std::size_t(n) * sizeof(R));
  } else if constexpr (std::is_same_v<S, std::uint8_t>) {
#pragma omp simd
    for (Index i = 0; i < n; ++i) to[i] = to_byte(float(from[i]));
  } else {
#pragma omp simd
    for (Index i = 0; i < n; ++i) to[i] = Store<S>::of(typename Compute<S>::type(from[i]));
  }
}

// ---- work: a job is any struct with `template <Simd> void run(Index from, Index to) const`, always inlined

template <class Job>
void run_generic(const Job& job, Index from, Index to) {
  job.template run<Simd::generic>(from, to);
}
template <class Job>
FN_TARGET_AVX2 void run_avx2(const Job& job, Index from, Index to) {
  job.template run<Simd::avx2>(from, to);
}
template <class Job>
FN_TARGET_AVX512 void run_avx512(const Job& job, Index from, Index to) {
  job.template run<Simd::avx512>(from, to);
}

constexpr Index kParallel = Index(1) << 15;  // numbers that are worth a second thread

// Units of about `size` numbers each are shared out among threads.
template <class Job>
void share_out(const Job& job, Index units, Index size) {
  const auto kernel = simd() == Simd::avx512 ? &run_avx512<Job>
                      : simd() == Simd::avx2 ? &run_avx2<Job>
                                             : &run_generic<Job>;
  at::parallel_for(0, units, std::max<Index>(1, kParallel / std::max<Index>(1, size)),
                   [&](Index from, Index to) { kernel(job, from, to); });
}

}  // namespace fastnuggets::filter
