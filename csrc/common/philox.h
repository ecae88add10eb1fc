// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a bijection of
// four words under a key, so that any number of a stream is found without those before it.
//
// The layout that every kernel keeps to. The key is the 64-bit seed; the counter is the counter number n as two words,
// low half first, then two words of the caller (a call's offset or step, a stream's number). Element e of a stream is
// in block b = e / 64 at place p = e % 64; with l = p % 16 and j = p / 16 it takes word j of counter number 16 b + l.
// One vector register so holds neighbouring elements, and so does a half warp. Normals pair words (0, 1) and (2, 3) of
// a counter (normal.h).
#pragma once

#include "common/host_device.h"

namespace fastnuggets {

constexpr int kPhiloxWords = 4;   // of a counter
constexpr int kPhiloxLanes = 16;  // counters of a block
constexpr int kPhiloxBlock = kPhiloxWords * kPhiloxLanes;
constexpr int kPhiloxRounds = 10;
constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier2 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;  // of the key, a round

struct PhiloxWords {
  std::uint32_t word[kPhiloxWords];
};

// The key, and the half of the counter that does not count.
struct PhiloxStream {
  std::uint64_t seed;
  std::uint32_t word2, word3;
};

FN_HD PhiloxWords philox(std::uint64_t seed, PhiloxWords counter) {
  std::uint32_t key0 = std::uint32_t(seed), key1 = std::uint32_t(seed >> 32);
  std::uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t product0 = std::uint64_t(c0) * kPhiloxMultiplier0;
    const std::uint64_t product2 = std::uint64_t(c2) * kPhiloxMultiplier2;
    c0 = std::uint32_t(product2 >> 32) ^ c1 ^ key0;
    c1 = std::uint32_t(product2);
    c2 = std::uint32_t(product0 >> 32) ^ c3 ^ key1;
    c3 = std::uint32_t(product0);
    key0 += kPhiloxStep0;
    key1 += kPhiloxStep1;
  }
  return {{c0, c1, c2, c3}};
}

// The four words of counter number n of a stream.
FN_HD PhiloxWords philox_words(const PhiloxStream& stream, std::uint64_t n) {
  return philox(stream.seed, {{std::uint32_t(n), std::uint32_t(n >> 32), stream.word2, stream.word3}});
}

// The words of a block in the order of its elements. CPU kernels take philox_cpu.h's, which gives the same words.
FN_HD void philox_block(const PhiloxStream& stream, std::uint64_t block, std::uint32_t* words /* [64] */) {
  for (int lane = 0; lane < kPhiloxLanes; ++lane) {
    const PhiloxWords w = philox_words(stream, block * kPhiloxLanes + std::uint64_t(lane));
    for (int j = 0; j < kPhiloxWords; ++j) words[j * kPhiloxLanes + lane] = w.word[j];
  }
}

}  // namespace fastnuggets
