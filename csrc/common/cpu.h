// CPU kernels: instruction sets chosen at run time, and memory that is written once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define FN_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
// 512-bit registers must be asked for: GCC prefers 256 bits for this target.
#define FN_TARGET_AVX512 \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")))
#else
#define FN_TARGET_AVX2
#define FN_TARGET_AVX512
#endif

namespace fastnuggets {

enum class Simd : int { generic, avx2, avx512 };

// What the processor has, or less if FASTNUGGETS_SIMD=generic|avx2 says so.
inline Simd simd() {
  static const Simd level = [] {
    Simd best = Simd::generic;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Simd::avx2;
    if (best == Simd::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      best = Simd::avx512;
#endif
    const char* asked = std::getenv("FASTNUGGETS_SIMD");
    const std::string_view wish = asked == nullptr ? "" : asked;
    if (wish == "generic") return Simd::generic;
    if (wish == "avx2" && best == Simd::avx512) return Simd::avx2;
    return best;
  }();
  return level;
}

// Stores that bypass the cache: a line is not read before it is written, which is most of what a fill costs.
#if defined(__x86_64__)
inline void stream_copy(char* to, const char* from, std::size_t bytes) {
  const std::size_t head = std::min<std::size_t>(-reinterpret_cast<std::uintptr_t>(to) % 64, bytes);
  std::memcpy(to, from, head);
  std::size_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    for (int j = 0; j < 64; j += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + j),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + j)));
  }
  std::memcpy(to + i, from + i, bytes - i);
}

inline void stream_zeros(char* to, std::size_t bytes) {
  const std::size_t head = std::min<std::size_t>(-reinterpret_cast<std::uintptr_t>(to) % 64, bytes);
  std::memset(to, 0, head);
  std::size_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    for (int j = 0; j < 64; j += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + j), _mm_setzero_si128());
  }
  std::memset(to + i, 0, bytes - i);
}

// Larger outputs are streamed: smaller ones may still be in the cache when they are read next. A virtual machine may
// report the whole host's cache, hence the bound.
inline std::size_t stream_from() {
  static const std::size_t bytes = [] {
    constexpr std::size_t kMost = std::size_t(32) << 20;
    const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return cache > 0 ? std::min(kMost, std::size_t(cache)) : kMost;
  }();
  return bytes;
}

// Orders streamed stores before what follows on this thread.
inline void stream_end() { _mm_sfence(); }
#else
inline void stream_copy(char* to, const char* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
inline void stream_zeros(char* to, std::size_t bytes) { std::memset(to, 0, bytes); }
inline void stream_end() {}
inline std::size_t stream_from() { return ~std::size_t(0); }
#endif

// A fresh output costs more in page faults than in arithmetic; huge pages make them 512 times fewer. Only a hint.
inline void ask_for_huge_pages(void* data, std::size_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kHugePage = std::uintptr_t(2) << 20;
  const std::uintptr_t start = (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

}  // namespace fastnuggets
