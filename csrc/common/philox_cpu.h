// Blocks of random words and normals for CPU kernels, made with the instructions of the kernel: `level` is the one
// whose clone calls.
#pragma once

#include "common/cpu.h"
#include "common/normal.h"
#include "common/philox.h"

namespace fastnuggets {

#if defined(__x86_64__)
// Of philox_block's plain loop GCC makes more shuffles than arithmetic. Here a word is the low half of a 64-bit lane,
// the multiplication reads that half alone, and the other may hold anything. Two registers hold eight counters, dealt
// so that one shuffle puts their words in order.
FN_TARGET_AVX2 inline void philox_block_avx2(const PhiloxStream& stream, std::uint64_t block, std::uint32_t* words) {
  constexpr int kRegisters = kPhiloxLanes / 4;
  const std::uint64_t first = block * kPhiloxLanes;
  const std::uint32_t key0 = std::uint32_t(stream.seed), key1 = std::uint32_t(stream.seed >> 32);
  const __m256i m0 = _mm256_set1_epi32(int(kPhiloxMultiplier0)), m2 = _mm256_set1_epi32(int(kPhiloxMultiplier2));
  // Words 1 to 3 of a block's counters are all the same, so half of the first two rounds is the same for all lanes.
  const std::uint64_t round1 = std::uint64_t(stream.word2) * kPhiloxMultiplier2;
  const std::uint32_t word0 = std::uint32_t(round1 >> 32) ^ std::uint32_t(first >> 32) ^ key0;
  const std::uint64_t round2 = std::uint64_t(word0) * kPhiloxMultiplier0;
  const __m256i mix1 = _mm256_set1_epi32(int(stream.word3 ^ key1));
  const __m256i mix2 = _mm256_set1_epi32(int(std::uint32_t(round1) ^ (key0 + kPhiloxStep0)));
  const __m256i mix3 = _mm256_set1_epi32(int(std::uint32_t(round2 >> 32) ^ (key1 + kPhiloxStep1)));
  __m256i c[kRegisters][kPhiloxWords];
  for (int r = 0; r < kRegisters; ++r) {
    const std::uint32_t lane = std::uint32_t(first) + std::uint32_t(r / 2 * 8 + r % 2 * 2);
    const __m256i counter = _mm256_add_epi32(_mm256_set1_epi32(int(lane)), _mm256_setr_epi32(0, 0, 1, 0, 4, 0, 5, 0));
    const __m256i product1 = _mm256_mul_epu32(counter, m0);
    const __m256i product2 = _mm256_mul_epu32(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), mix1), m2);
    c[r][0] = _mm256_xor_si256(_mm256_srli_epi64(product2, 32), mix2);
    c[r][1] = product2;
    c[r][2] = _mm256_xor_si256(product1, mix3);
    c[r][3] = _mm256_set1_epi32(int(std::uint32_t(round2)));
  }
  for (int round = 2; round < kPhiloxRounds; ++round) {
    const __m256i k0 = _mm256_set1_epi32(int(key0 + std::uint32_t(round) * kPhiloxStep0));
    const __m256i k1 = _mm256_set1_epi32(int(key1 + std::uint32_t(round) * kPhiloxStep1));
    for (auto& w : c) {
      const __m256i product0 = _mm256_mul_epu32(w[0], m0), product2 = _mm256_mul_epu32(w[2], m2);
      w[0] = _mm256_xor_si256(_mm256_srli_epi64(product2, 32), _mm256_xor_si256(w[1], k0));
      w[1] = product2;
      w[2] = _mm256_xor_si256(_mm256_srli_epi64(product0, 32), _mm256_xor_si256(w[3], k1));
      w[3] = product0;
    }
  }
  for (int r = 0; r < kRegisters; r += 2) {
    for (int j = 0; j < kPhiloxWords; ++j) {
      const __m256 low = _mm256_castsi256_ps(c[r][j]), high = _mm256_castsi256_ps(c[r + 1][j]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + j * kPhiloxLanes + r * 4),
                          _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88)));
    }
  }
}
#endif

// The words of a block in the order of its elements.
template <Simd level>
FN_HD void philox_block(const PhiloxStream& stream, std::uint64_t block, std::uint32_t* words /* [64] */) {
#if defined(__x86_64__)
  if constexpr (level != Simd::generic) {
    philox_block_avx2(stream, block, words);
    return;
  }
#endif
  philox_block(stream, block, words);
}

// The normals of a block in the order of its elements.
template <Simd level>
FN_HD void normal_block(const PhiloxStream& stream, std::uint64_t block, float* normals /* [64] */) {
  alignas(64) std::uint32_t words[kPhiloxBlock];
  philox_block<level>(stream, block, words);
  normal_block(words, normals);
}

}  // namespace fastnuggets
