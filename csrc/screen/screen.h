// The nearest rows of a database of bits: what the kernels are given.
//
// A row is W words of 64 bits, bit i of it being bit i % 64 of word i / 64 (little endian in memory, so that the bytes
// are those of a packed fingerprint). For each query the k rows that are most similar come out, the most similar first,
// of equal ones the one with the lower index first.
#pragma once

#include <cstdint>

namespace fastnuggets::screen {

constexpr std::int64_t kMostWords = 511;          // of a row: unions stay below 2^15 bits, see screen_math.h
constexpr std::int64_t kMostRows = 0xFFFFFFFFll;  // of a database
constexpr std::int64_t kMostOnDevice = 1024;      // k of the CUDA kernel

struct Search {
  const void* queries;   // [Q, W] words; on the CPU they may lie at any byte
  const void* database;  // [N, W]
  std::int64_t Q, N, W, k;
  double threshold;     // least similarity of a row that comes out
  double* similarity;   // [Q, k]; 0 where there is no row
  std::int64_t* index;  // [Q, k]; -1 where there is no row
};

}  // namespace fastnuggets::screen
