// CPU kernel: tiles of the database are turned so that a vector holds one word of several rows, and every query of a
// block meets the tile while it is in the cache. Counting bits by table look-ups in registers (Mula, Kurz, Lemire,
// "Faster population counts using AVX2 instructions", The Computer Journal 61(1), 2018) then needs no sum across lanes.
#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <vector>

#include "common/cpu.h"
#include "screen/screen_math.h"
#include "screen/screen_op.h"

namespace fastnuggets::screen {
namespace {

using Index = std::int64_t;
using Word = std::uint64_t;

constexpr Index kTile = 64;           // rows
constexpr Index kQueries = 64;        // that meet a tile one after the other
constexpr Index kLeastRows = 2048;    // of the database, for a thread
constexpr Index kParallel = 1 << 18;  // pairs of words: a second thread costs more than fewer of them

#define FN_BODY inline __attribute__((always_inline))

// Rows of the database, word by word, and their numbers of bits. Rows beyond the last are empty.
struct Tile {
  std::vector<Word> words;  // [W, kTile]
  Word bits[kTile];
};

// The best rows so far, a heap with the worst of them on top, and what a row must reach to be among them.
struct Best {
  std::vector<Word> keys;
  Word least;
};

// Rows into a tile, read in their order in memory.
using Turn = void (*)(const char* rows, Index n, Index W, Tile& tile);

void turn_words(const char* rows, Index n, Index W, Index first, Tile& tile) {
  for (Index j = 0; j < n; ++j)
    for (Index w = first; w < W; ++w) std::memcpy(&tile.words[std::size_t(w * kTile + j)], rows + (j * W + w) * 8, 8);
}
void turn_generic(const char* rows, Index n, Index W, Tile& tile) {
  if (n < kTile) std::fill(tile.words.begin(), tile.words.end(), 0);
  turn_words(rows, n, W, 0, tile);
}

// Which of the tile's rows reach `least`, as bits; and each row's bits in common with the query.
using Meet = Word (*)(const Tile& tile, const Word* query, Index W, Word query_bits, Word least, Word* common);
#define FN_MEET const Tile &tile, const Word *query, Index W, Word query_bits, Word least, Word *common

template <int kWords>
FN_BODY Word meet(FN_MEET) {
  if (kWords > 0) W = kWords;
  Word reach = 0;
  for (Index j = 0; j < kTile; ++j) common[j] = 0;
  for (Index w = 0; w < W; ++w) {
    const Word* const words = tile.words.data() + w * kTile;
    for (Index j = 0; j < kTile; ++j) common[j] += Word(std::popcount(words[j] & query[w]));
  }
  for (Index j = 0; j < kTile; ++j) {
    const Overlap o{std::int32_t(common[j]), std::int32_t(query_bits + tile.bits[j])};
    reach |= Word(reaches(o, least)) << j;
  }
  return reach;
}
template <int kWords>
Word meet_generic(FN_MEET) {
  return meet<kWords>(tile, query, W, query_bits, least, common);
}

#if defined(__x86_64__)
// The compiler turns std::popcount into the instruction for it, for eight rows at a time.
template <int kWords>
__attribute__((target("avx2,avx512f,avx512dq,avx512bw,avx512vl,avx512vpopcntdq,prefer-vector-width=512"))) Word
meet_avx512(FN_MEET) {
  return meet<kWords>(tile, query, W, query_bits, least, common);
}

FN_TARGET_AVX2 FN_BODY __m256i bits_of_bytes(__m256i x) {
  const __m256i table =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(x, low)),
                         _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low)));
}

// Four words of four rows at a time.
FN_TARGET_AVX2 void turn_avx2(const char* rows, Index n, Index W, Tile& tile) {
  if (n < kTile) return turn_generic(rows, n, W, tile);
  const Index fours = W / 4 * 4;
  for (Index j = 0; j < kTile; j += 4) {
    for (Index w = 0; w < fours; w += 4) {
      const auto row = [&](Index i) FN_TARGET_AVX2 {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + ((j + i) * W + w) * 8));
      };
      const auto put = [&](Index i, __m256i words) FN_TARGET_AVX2 {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile.words.data() + (w + i) * kTile + j), words);
      };
      const __m256i a = row(0), b = row(1), c = row(2), d = row(3);
      const __m256i ab02 = _mm256_unpacklo_epi64(a, b), ab13 = _mm256_unpackhi_epi64(a, b);
      const __m256i cd02 = _mm256_unpacklo_epi64(c, d), cd13 = _mm256_unpackhi_epi64(c, d);
      put(0, _mm256_permute2x128_si256(ab02, cd02, 0x20));
      put(1, _mm256_permute2x128_si256(ab13, cd13, 0x20));
      put(2, _mm256_permute2x128_si256(ab02, cd02, 0x31));
      put(3, _mm256_permute2x128_si256(ab13, cd13, 0x31));
    }
  }
  if (fours < W) turn_words(rows, n, W, fours, tile);
}

constexpr Index kBytesHold = 31;  // words whose bits a byte can count

template <int kWords>
FN_TARGET_AVX2 Word meet_avx2(FN_MEET) {
  if (kWords > 0) W = kWords;
  const __m256i zero = _mm256_setzero_si256(), bar = _mm256_set1_epi64x((long long)least);
  const __m256i own = _mm256_set1_epi64x((long long)query_bits);
  Word reach = 0;
  for (Index j = 0; j < kTile; j += 4) {
    __m256i sum = zero;
    for (Index first = 0; first < W; first += kBytesHold) {
      const Index end = std::min(W, first + kBytesHold);
      __m256i bytes = zero;
      for (Index w = first; w < end; ++w) {
        const Word* const words = tile.words.data() + w * kTile + j;
        const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
        bytes = _mm256_add_epi8(bytes, bits_of_bytes(_mm256_and_si256(row, _mm256_set1_epi64x((long long)query[w]))));
      }
      sum = _mm256_add_epi64(sum, _mm256_sad_epu8(bytes, zero));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(common + j), sum);
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile.bits + j));
    const __m256i united = _mm256_sub_epi64(_mm256_add_epi64(bits, own), sum);
    const __m256i below = _mm256_cmpgt_epi64(_mm256_mul_epu32(united, bar), _mm256_slli_epi64(sum, kPartBits));
    reach |= Word(~_mm256_movemask_pd(_mm256_castsi256_pd(below)) & 15) << j;
  }
  return reach;
}
#endif

struct Level {
  Turn turn;
  Meet meet;
};

// The words of a row are a constant where they are usual: 166 and 1024 bits.
template <int kWords>
Level level_of() {
#if defined(__x86_64__)
  static const bool counts = __builtin_cpu_supports("avx512vpopcntdq");
  if (simd() == Simd::avx512 && counts) return {&turn_avx2, &meet_avx512<kWords>};
  if (simd() != Simd::generic) return {&turn_avx2, &meet_avx2<kWords>};
#endif
  return {&turn_generic, &meet_generic<kWords>};
}
Level level_of(Index W) { return W == 3 ? level_of<3>() : W == 16 ? level_of<16>() : level_of<0>(); }

void add(Best& best, Word made, Index room) {
  std::vector<Word>& keys = best.keys;
  if (Index(keys.size()) == room) {
    if (made <= keys.front()) return;
    std::pop_heap(keys.begin(), keys.end(), std::greater<>());
    keys.pop_back();
  }
  keys.push_back(made);
  std::push_heap(keys.begin(), keys.end(), std::greater<>());
  // Rows come in order: one that is only as good as the worst, and comes later, is not wanted.
  if (Index(keys.size()) == room) best.least = std::max(best.least, part_of(keys.front()) + 1);
}

// Rows [first, last) of the database against some queries.
void scan(const Search& how, Level level, const Word* queries, Index Q, Index first, Index last, Best* best) {
  const Index W = how.W;
  const std::vector<Word> ones(std::size_t(W), ~Word(0));
  Tile tile{std::vector<Word>(std::size_t(W * kTile)), {}};
  Word common[kTile], query_bits[kQueries];
  for (Index q = 0; q < Q; ++q) {
    query_bits[q] = 0;
    for (Index w = 0; w < W; ++w) query_bits[q] += Word(std::popcount(queries[q * W + w]));
  }
  for (Index at = first; at < last; at += kTile) {
    const Index n = std::min(kTile, last - at);
    level.turn(static_cast<const char*>(how.database) + at * W * 8, n, W, tile);
    level.meet(tile, ones.data(), W, 0, 0, tile.bits);
    const Word present = n == kTile ? ~Word(0) : (Word(1) << n) - 1;
    for (Index q = 0; q < Q; ++q) {
      Word reach = level.meet(tile, queries + q * W, W, query_bits[q], best[q].least, common) & present;
      for (; reach != 0; reach &= reach - 1) {
        const int j = std::countr_zero(reach);
        const Overlap o{std::int32_t(common[j]), std::int32_t(query_bits[q] + tile.bits[j])};
        if (similarity(o) >= how.threshold) add(best[q], key(part(o), at + j), how.k);
      }
    }
  }
}

Overlap overlap(const Search& how, Index q, Index row) {
  const char *a = static_cast<const char*>(how.queries) + q * how.W * 8,
             *b = static_cast<const char*>(how.database) + row * how.W * 8;
  Overlap o{0, 0};
  for (Index w = 0; w < how.W; ++w) {
    Word x, y;
    std::memcpy(&x, a + w * 8, 8);
    std::memcpy(&y, b + w * 8, 8);
    o.common += std::popcount(x & y);
    o.sum += std::popcount(x) + std::popcount(y);
  }
  return o;
}

// The best of all parts' for a query, in order.
void write(const Search& how, Index q, std::vector<Word>& keys) {
  const Index found = std::min(how.k, Index(keys.size()));
  std::partial_sort(keys.begin(), keys.begin() + found, keys.end(), std::greater<>());
  for (Index r = 0; r < how.k; ++r) {
    const Index row = r < found ? row_of(keys[std::size_t(r)]) : -1;
    how.index[q * how.k + r] = row;
    how.similarity[q * how.k + r] = row < 0 ? 0.0 : similarity(overlap(how, q, row));
  }
}

// A task is a block of queries and a part of the database. What comes out depends on neither: keys are all different.
void search(const Search& how, const at::Tensor&) {
  const Index blocks = (how.Q + kQueries - 1) / kQueries, threads = at::get_num_threads();
  const Index parts = std::clamp((4 * threads + blocks - 1) / blocks, Index(1), how.N / kLeastRows + 1);
  const Index rows = (how.N + parts - 1) / parts;
  const Level level = level_of(how.W);
  std::vector<Word> words(std::size_t(how.Q * how.W));
  if (!words.empty()) std::memcpy(words.data(), how.queries, words.size() * 8);
  std::vector<Best> best(std::size_t(parts * how.Q), Best{{}, least_part(how.threshold)});  // [parts, Q]
  const Index grain = how.Q * how.N * how.W < kParallel ? blocks * parts : 1;
  at::parallel_for(0, blocks * parts, grain, [&](Index task, Index end) {
    for (; task < end; ++task) {
      const Index part = task / blocks, q = task % blocks * kQueries;
      const Index first = std::min(how.N, part * rows), last = std::min(how.N, first + rows);
      scan(how, level, words.data() + q * how.W, std::min(kQueries, how.Q - q), first, last,
           best.data() + part * how.Q + q);
    }
  });
  at::parallel_for(0, how.Q, 16, [&](Index q, Index end) {
    for (; q < end; ++q) {
      std::vector<Word>& keys = best[std::size_t(q)].keys;
      for (Index part = 1; part < parts; ++part) {
        const std::vector<Word>& more = best[std::size_t(part * how.Q + q)].keys;
        keys.insert(keys.end(), more.begin(), more.end());
      }
      write(how, q, keys);
    }
  });
}

const Kernels kCpu{&search};
const Register kRegistered(at::kCPU, kCpu);

}  // namespace
}  // namespace fastnuggets::screen
