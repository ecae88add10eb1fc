// The generator and its transforms for ctypes: words, uniforms and normals of a stream, one element at a time or by the
// blocks of an instruction set.
#include "common/philox_cpu.h"

using namespace fastnuggets;

namespace {

using std::int64_t, std::uint32_t, std::uint64_t;

constexpr int kOneByOne = -1;

template <Simd level>
FN_HD void word_blocks(const PhiloxStream& stream, uint64_t first, int64_t blocks, uint32_t* out) {
  for (int64_t b = 0; b < blocks; ++b) philox_block<level>(stream, first + uint64_t(b), out + b * kPhiloxBlock);
}

template <Simd level>
FN_HD void normal_blocks(const PhiloxStream& stream, uint64_t first, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b) normal_block<level>(stream, first + uint64_t(b), out + b * kPhiloxBlock);
}

#define FN_CLONE(LEVEL, TARGET)                                                                          \
  TARGET void words_##LEVEL(const PhiloxStream& stream, uint64_t first, int64_t blocks, uint32_t* out) { \
    word_blocks<Simd::LEVEL>(stream, first, blocks, out);                                                \
  }                                                                                                      \
  TARGET void normals_##LEVEL(const PhiloxStream& stream, uint64_t first, int64_t blocks, float* out) {  \
    normal_blocks<Simd::LEVEL>(stream, first, blocks, out);                                              \
  }
FN_CLONE(generic, )
FN_CLONE(avx2, FN_TARGET_AVX2)
FN_CLONE(avx512, FN_TARGET_AVX512)

PhiloxWords words_of(const PhiloxStream& stream, uint64_t element) {
  return philox_words(stream, element / 64 * 16 + element % 16);
}

}  // namespace

extern "C" {

int best_level() { return int(simd()); }

void philox_of(uint64_t seed, const uint32_t* counter, uint32_t* out) {
  const PhiloxWords words = philox(seed, {{counter[0], counter[1], counter[2], counter[3]}});
  for (int j = 0; j < kPhiloxWords; ++j) out[j] = words.word[j];
}

void words(int level, uint64_t seed, uint32_t word2, uint32_t word3, uint64_t first, int64_t blocks, uint32_t* out) {
  const PhiloxStream stream{seed, word2, word3};
  if (level == int(Simd::generic)) words_generic(stream, first, blocks, out);
  if (level == int(Simd::avx2)) words_avx2(stream, first, blocks, out);
  if (level == int(Simd::avx512)) words_avx512(stream, first, blocks, out);
  if (level != kOneByOne) return;
  for (int64_t i = 0; i < blocks * 64; ++i) out[i] = words_of(stream, first * 64 + uint64_t(i)).word[i % 64 / 16];
}

void normals(int level, uint64_t seed, uint32_t word2, uint32_t word3, uint64_t first, int64_t blocks, float* out) {
  const PhiloxStream stream{seed, word2, word3};
  if (level == int(Simd::generic)) normals_generic(stream, first, blocks, out);
  if (level == int(Simd::avx2)) normals_avx2(stream, first, blocks, out);
  if (level == int(Simd::avx512)) normals_avx512(stream, first, blocks, out);
  if (level != kOneByOne) return;
  for (int64_t i = 0; i < blocks * 64; ++i) {
    const PhiloxWords words = words_of(stream, first * 64 + uint64_t(i));
    const int j = int(i % 64 / 32 * 2);
    const NormalPair pair = normal_pair(words.word[j], words.word[j + 1]);
    out[i] = i % 32 < 16 ? pair.cosine : pair.sine;
  }
}

void uniforms(const uint32_t* words, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = uniform(words[i]);
}

void pairs(const uint32_t* radius, const uint32_t* angle, int64_t n, float* cosine, float* sine) {
  for (int64_t i = 0; i < n; ++i) {
    const NormalPair pair = normal_pair(radius[i], angle[i]);
    cosine[i] = pair.cosine;
    sine[i] = pair.sine;
  }
}

// What a caller does with a normal, written as a compiler likes to contract it.
void shifted(const uint32_t* radius, const uint32_t* angle, int64_t n, float mean, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = mean + normal_pair(radius[i], angle[i]).cosine;
}
}
