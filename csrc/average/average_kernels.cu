// A block of threads takes a tile of one row; every element is read and written by one thread, so results depend on no
// schedule. The table of tensors travels in the kernel's parameters (32,764 bytes from CUDA 12.1 on): nothing is
// uploaded, nothing has to live longer than the call, and a captured graph keeps its own copy.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "average/average_cuda.h"
#include "average/average_math.h"
#include "common/convert.cuh"
#include "common/launch.cuh"
#include "common/normal.h"

namespace fastnuggets::average::cuda {
namespace {

using Index = std::int64_t;

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;

// A thread moves four neighbours at once, and several such quads, to have 64 bytes of each tensor under way. A quad of
// each lane of a warp lies beside the next lane's.
constexpr int kQuad = 4, kWarpQuads = kQuad * kWarp;
template <class R>
constexpr int kQuads = 16 / sizeof(R);
template <class R>
constexpr Index kTile = kWarps * kWarpQuads * kQuads<R>;

// Kernels for bits, which are of no type that is computed in.
struct Swap {};
struct Search {
  long long* found;
};

// ---- rows in the parameters

struct Record {
  Index numel;
  int first_tile;     // of the launch
  std::uint32_t tag;  // stream of random numbers, or number of the row
  // and a pointer and a Dtype for each column
};

FN_HD int record_bytes(int columns) {
  const int bytes = int(sizeof(Record)) + columns * int(sizeof(void*) + sizeof(Dtype));
  return (bytes + 7) / 8 * 8;
}

// What is declared is copied, used or not: a model of some 170 tensors does with the smaller table.
constexpr int kMostParameters = 32764 / 8 * 8, kFewParameters = 8192;

// As many records as fit beside `How` in so many bytes of parameters.
template <class How, int kParameters>
struct Packed {
  static constexpr int kBytes = (kParameters - 8 - int(sizeof(How))) / 8 * 8;
  int rows, columns;
  alignas(8) unsigned char records[kBytes];
};

struct Cell {
  void* data;
  Dtype dtype;

  template <class S>
  __device__ S* as() const {
    return static_cast<S*>(data);
  }
};

struct Row {
  const unsigned char* record;
  int columns;

  __device__ const Record& head() const { return *reinterpret_cast<const Record*>(record); }
  __device__ Cell cell(int column) const {
    const unsigned char* pointers = record + sizeof(Record);
    const unsigned char* dtypes = pointers + columns * sizeof(void*);
    return {reinterpret_cast<void* const*>(pointers)[column], Dtype(dtypes[column])};
  }
};

// The row that has a tile.
template <class Table>
__device__ Row row_of(const Table& table, int tile) {
  const int bytes = record_bytes(table.columns);
  int low = 0, high = table.rows;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    const Row row{table.records + middle * bytes, table.columns};
    (row.head().first_tile <= tile ? low : high) = middle;
  }
  return {table.records + low * bytes, table.columns};
}

// ---- elements

// Where a thread's quads are: `at`, at + kWarpQuads, ...
struct Place {
  Index at, numel;
  int lane;
  bool whole;  // all of the warp's are inside
};

template <class R>
using Part = R[kQuads<R>][kQuad];
template <class S, class R>
using PartOf = S[kQuads<R>][kQuad];

template <class S>
struct alignas(sizeof(S) * kQuad < 16 ? sizeof(S) * kQuad : 16) Quad {
  S x[kQuad];
};

template <class S>
__device__ bool aligned(const S* p) {
  return reinterpret_cast<std::uintptr_t>(p) % alignof(Quad<S>) == 0;
}

template <class S, class R, int N>
__device__ void read(const S* from, const Place& place, R (&to)[N][kQuad]) {
  from += place.at;
  if (place.whole && aligned(from)) {
    Quad<S> raw[N];
    for (int q = 0; q < N; ++q) raw[q] = *reinterpret_cast<const Quad<S>*>(from + q * kWarpQuads);
    for (int q = 0; q < N; ++q)
      for (int i = 0; i < kQuad; ++i) to[q][i] = convert<R>(raw[q].x[i]);
  } else {
    const Index left = place.numel - place.at;
    for (int q = 0; q < N; ++q)
      for (int i = 0; i < kQuad; ++i) {
        const int e = q * kWarpQuads + i;
        to[q][i] = e < left ? convert<R>(from[e]) : R{};
      }
  }
}

template <class S, class R, int N>
__device__ void write(S* to, const Place& place, const R (&from)[N][kQuad]) {
  to += place.at;
  if (place.whole && aligned(to)) {
    for (int q = 0; q < N; ++q) {
      Quad<S> raw;
      for (int i = 0; i < kQuad; ++i) raw.x[i] = convert<S>(from[q][i]);
      *reinterpret_cast<Quad<S>*>(to + q * kWarpQuads) = raw;
    }
  } else {
    const Index left = place.numel - place.at;
    for (int q = 0; q < N; ++q)
      for (int i = 0; i < kQuad; ++i) {
        const int e = q * kWarpQuads + i;
        if (e < left) to[e] = convert<S>(from[q][i]);
      }
  }
}

template <class Body>
__device__ void for_dtype(const Cell& cell, Body body) {
  switch (cell.dtype) {
    case Dtype::float32:
      return body(cell.as<float>());
    case Dtype::float64:
      return body(cell.as<double>());
    case Dtype::float16:
      return body(cell.as<Half>());
    default:
      return body(cell.as<BFloat16>());
  }
}

template <class R>
__device__ void read(const Cell& from, const Place& place, Part<R>& to) {
  for_dtype(from, [&](const auto* data) { read(data, place, to); });
}

template <class R>
__device__ void write(const Cell& to, const Place& place, const Part<R>& from) {
  for_dtype(to, [&](auto* data) { write(data, place, from); });
}

template <int N, class Body>
__device__ void for_each(Body body) {
  for (int q = 0; q < N; ++q)
    for (int i = 0; i < kQuad; ++i) body(q, i);
}

__device__ double scalar(const Scalars& of, int k) { return of.device != nullptr ? of.device[k] : of.value[k]; }

// ---- random numbers

// A lane computes a whole counter, whose words belong to elements of four lanes: they change hands in shared memory. A
// warp has two blocks at a time, the second half the banks away from the first.
constexpr int kBlockStride = kPhiloxBlock + kPhiloxLanes;
struct Exchange {
  std::uint32_t* words;  // [2, kBlockStride] of the warp
  int lane;

  // Of the counter that is this lane's in the two blocks.
  __device__ void put(const std::uint32_t (&word)[kPhiloxWords]) const {
    std::uint32_t* const first = words + lane / kPhiloxLanes * kBlockStride + lane % kPhiloxLanes;
    __syncwarp();  // the numbers before these have been read
    for (int j = 0; j < kPhiloxWords; ++j) first[j * kPhiloxLanes] = word[j];
    __syncwarp();
  }
  // At a place of a block, a multiple of four.
  __device__ Quad<std::uint32_t> get(int block, int place) const {
    return *reinterpret_cast<const Quad<std::uint32_t>*>(words + block * kBlockStride + place);
  }
};

__device__ Exchange exchange(int lane) {
  FN_SHARED(Quad<std::uint32_t>[kWarps][2 * kBlockStride / kQuad], words);
  return {words[threadIdx.x / kWarp]->x, lane};
}

// Normals of a thread's quads.
template <int N>
__device__ void normals(const PhiloxStream& stream, const Place& place, float (&z)[N][kQuad]) {
  const Exchange shared = exchange(place.lane);
  for (int q = 0; q < N; ++q) {
    // The warp's 128 elements are two blocks of the stream, and each lane has one of their counters.
    const PhiloxWords words = philox_words(stream, std::uint64_t(place.at + q * kWarpQuads) / kPhiloxWords);
    const NormalPair low = normal_pair(words.word[0], words.word[1]), high = normal_pair(words.word[2], words.word[3]);
    shared.put({exact::bits(low.cosine), exact::bits(low.sine), exact::bits(high.cosine), exact::bits(high.sine)});
    const auto mine = shared.get(place.lane / kPhiloxLanes, place.lane % kPhiloxLanes * kQuad);
    for (int i = 0; i < kQuad; ++i) z[q][i] = exact::value(mine.x[i]);
  }
}

// Numbers of 16 bits for a thread's quads: a block of words is enough for all 128 elements of the warp.
template <int N>
__device__ void halves(const PhiloxStream& stream, const Place& place, std::uint32_t (&noise)[N][kQuad]) {
  static_assert(N % 2 == 0);
  const Exchange shared = exchange(place.lane);
  const std::uint64_t first = std::uint64_t(place.at - place.lane * kQuad) / (2 * kPhiloxWords);  // counter
  const int half = place.lane * kQuad / kPhiloxLanes;
  for (int q = 0; q < N; q += 2) {
    const PhiloxWords words = philox_words(stream, first + std::uint64_t(q * kPhiloxLanes + place.lane));
    shared.put(words.word);
    for (int block = 0; block < 2; ++block) {
      const auto mine = shared.get(block, half / 2 * kPhiloxLanes + place.lane * kQuad % kPhiloxLanes);
      for (int i = 0; i < kQuad; ++i) noise[q + block][i] = mine.x[i] >> (16 * (half % 2)) & 0xFFFFu;
    }
  }
}

// ---- what is done with a thread's elements

__device__ void update_compensated(BFloat16* high, std::int16_t* low, const Place& place, const Part<float>& w,
                                   const Lerp<float>& step) {
  PartOf<BFloat16, float> a;
  PartOf<std::int16_t, float> rest;
  read(high, place, a);
  read(low, place, rest);
  for_each<kQuads<float>>([&](int q, int i) {
    const std::uint32_t next = one_nan(step(join(a[q][i], rest[q][i]), w[q][i]));
    a[q][i] = split_high(next);
    rest[q][i] = split_low(next);
  });
  write(high, place, a);
  write(low, place, rest);
}

__device__ void update_stochastic(BFloat16* data, const Place& place, const Part<float>& w, const Lerp<float>& step,
                                  const PartOf<std::uint32_t, float>& noise) {
  PartOf<BFloat16, float> a;
  read(data, place, a);
  for_each<kQuads<float>>([&](int q, int i) { a[q][i] = round_stochastic(step(load(a[q][i]), w[q][i]), noise[q][i]); });
  write(data, place, a);
}

template <class R>
__device__ void lerp(const Cell& average, const Place& place, const Part<R>& w, const Lerp<R>& step) {
  Part<R> a;
  read<R>(average, place, a);
  for_each<kQuads<R>>([&](int q, int i) { a[q][i] = step(a[q][i], w[q][i]); });
  write<R>(average, place, a);
}

template <class R>
__device__ void body(const Row& row, const Update& how, const Place& place) {
  Part<R> w;
  read<R>(row.cell(row.columns - 1), place, w);
  if constexpr (std::is_same_v<R, float>) {
    if (how.rounding == Rounding::compensated) {
      for (int k = 0; k < how.rates.count; ++k)
        update_compensated(row.cell(k).as<BFloat16>(), row.cell(how.rates.count + k).as<std::int16_t>(), place, w,
                           Lerp<float>(scalar(how.rates, k)));
      return;
    }
    if (how.rounding == Rounding::stochastic) {
      PartOf<std::uint32_t, float> noise;
      halves(PhiloxStream{how.seed, how.step, row.head().tag}, place, noise);
      for (int k = 0; k < how.rates.count; ++k)
        update_stochastic(row.cell(k).as<BFloat16>(), place, w, Lerp<float>(scalar(how.rates, k)), noise);
      return;
    }
  }
  for (int k = 0; k < how.rates.count; ++k) lerp<R>(row.cell(k), place, w, Lerp<R>(scalar(how.rates, k)));
}

template <class R>
__device__ void body(const Row& row, const Swag& how, const Place& place) {
  Part<R> w, mean, m2;
  R *const mean_at = row.cell(0).as<R>(), *const m2_at = row.cell(1).as<R>();
  read<R>(row.cell(row.columns - 1), place, w);
  read(mean_at, place, mean);
  read(m2_at, place, m2);
  for_each<kQuads<R>>([&](int q, int i) {
    const Moments<R> next = welford(mean[q][i], m2[q][i], w[q][i], R(how.rate));
    mean[q][i] = next.mean;
    m2[q][i] = next.m2;
    w[q][i] = next.deviation;
  });
  write(mean_at, place, mean);
  write(m2_at, place, m2);
  if (how.ring) write(row.cell(2).as<R>() + how.row * place.numel, place, w);
}

template <class R>
__device__ void body(const Row& row, const Sample& how, const Place& place) {
  Part<R> drawn, m2;
  PartOf<float, R> z;
  read(row.cell(1).as<R>(), place, drawn);
  read(row.cell(2).as<R>(), place, m2);
  normals(PhiloxStream{how.seed, how.step, row.head().tag}, place, z);
  for_each<kQuads<R>>([&](int q, int i) {
    using std::sqrt;
    const R deviation = sqrt(m2[q][i] < R(0) ? R(0) : m2[q][i]);
    drawn[q][i] = multiply_add(R(how.diagonal) * deviation, R(z[q][i]), drawn[q][i]);
  });
  for (int k = 0; k < how.columns.count; ++k) {
    Part<R> ring;
    read(row.cell(3).as<R>() + k * place.numel, place, ring);
    const R column = R(scalar(how.columns, k));
    for_each<kQuads<R>>([&](int q, int i) { drawn[q][i] = multiply_add(column, ring[q][i], drawn[q][i]); });
  }
  write<R>(row.cell(0), place, drawn);
}

template <class R>
__device__ void body(const Row& row, const WeightedSum& how, const Place& place) {
  Part<R> sum = {};
  for (int k = 0; k < how.coefficients.count; ++k) {
    Part<R> x;
    read<R>(row.cell(1 + k), place, x);
    const R c = R(scalar(how.coefficients, k));
    for_each<kQuads<R>>([&](int q, int i) { sum[q][i] = multiply_add(c, x[q][i], sum[q][i]); });
  }
  write<R>(row.cell(0), place, sum);
}

// The averages of a step's new weights, which are the last columns.
template <class R>
__device__ void follow(const Row& row, const Scalars& rates, const Place& place, const Part<R>& w) {
  for (int k = 0; k < rates.count; ++k)
    lerp<R>(row.cell(row.columns - rates.count + k), place, w, Lerp<R>(scalar(rates, k)));
}

template <class R>
__device__ void body(const Row& row, const Sgd& how, const Place& place) {
  Part<R> w, g, m = {};
  R *const w_at = row.cell(0).as<R>(), *const m_at = how.has_momentum ? row.cell(2).as<R>() : nullptr;
  read(w_at, place, w);
  read(row.cell(1).as<R>(), place, g);
  if (how.has_momentum) read(m_at, place, m);
  for_each<kQuads<R>>([&](int q, int i) {
    const SgdStep<R> next = average::sgd(how, w[q][i], g[q][i], m[q][i]);
    w[q][i] = next.weight;
    m[q][i] = next.momentum;
  });
  write(w_at, place, w);
  if (how.has_momentum) write(m_at, place, m);
  follow<R>(row, how.rates, place, w);
}

template <class R>
__device__ void body(const Row& row, const AdamW& how, const Place& place) {
  Part<R> w, g, first, second;
  R *const w_at = row.cell(0).as<R>(), *const first_at = row.cell(2).as<R>(), *const second_at = row.cell(3).as<R>();
  read(w_at, place, w);
  read(row.cell(1).as<R>(), place, g);
  read(first_at, place, first);
  read(second_at, place, second);
  for_each<kQuads<R>>([&](int q, int i) {
    const AdamWStep<R> next = average::adamw(how, w[q][i], g[q][i], first[q][i], second[q][i]);
    w[q][i] = next.weight;
    first[q][i] = next.first;
    second[q][i] = next.second;
  });
  write(w_at, place, w);
  write(first_at, place, first);
  write(second_at, place, second);
  follow<R>(row, how.rates, place, w);
}

template <class S>
__device__ void swap_as(const Row& row, const Place& place) {
  PartOf<S, float> a, b;
  read(row.cell(0).as<S>(), place, a);
  read(row.cell(1).as<S>(), place, b);
  write(row.cell(0).as<S>(), place, b);
  write(row.cell(1).as<S>(), place, a);
}

template <class>
__device__ void body(const Row& row, const Swap&, const Place& place) {
  switch (row.cell(0).dtype) {
    case Dtype::float32:
      return swap_as<std::uint32_t>(row, place);
    case Dtype::float64:
      return swap_as<std::uint64_t>(row, place);
    default:
      return swap_as<std::uint16_t>(row, place);
  }
}

template <class Bits>
__device__ bool has_nonfinite(const Row& row, const Place& place, Bits exponent) {
  PartOf<Bits, float> x;
  read(row.cell(0).as<Bits>(), place, x);
  bool found = false;
  for_each<kQuads<float>>([&](int q, int i) { found = found || (x[q][i] & exponent) == exponent; });
  return found;
}

__device__ bool has_nonfinite(const Row& row, const Place& place) {
  switch (row.cell(0).dtype) {
    case Dtype::float32:
      return has_nonfinite(row, place, kInfinity);
    case Dtype::float64:
      return has_nonfinite(row, place, std::uint64_t(0x7FF0000000000000));
    case Dtype::float16:
      return has_nonfinite(row, place, std::uint16_t(0x7C00));
    default:
      return has_nonfinite(row, place, std::uint16_t(0x7F80));
  }
}

template <class>
__device__ void body(const Row& row, const Search& how, const Place& place) {
  const long long number = row.head().tag;
  // What others have found is looked at for speed alone: the minimum comes out the same.
  const auto lower = [&] { return number < *static_cast<const volatile long long*>(how.found); };
  if (lower() && has_nonfinite(row, place) && lower()) atomicMin(how.found, number);
}

template <class How, class R, int kParameters>
__global__ void __launch_bounds__(kThreads)
    average_tile(const __grid_constant__ Packed<How, kParameters> table, const __grid_constant__ How how) {
  const Row row = row_of(table, int(blockIdx.x));
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  constexpr Index kOfWarp = kWarpQuads * kQuads<R>;
  const Index numel = row.head().numel, start = (int(blockIdx.x) - row.head().first_tile) * kTile<R> + warp * kOfWarp;
  if (start < numel) body<R>(row, how, {start + lane * kQuad, numel, lane, start + kOfWarp <= numel});
}

// ---- host

template <class How>
bool in_double(const Rows& rows, const How&, Index row) {
  if constexpr (std::is_same_v<How, Swap> || std::is_same_v<How, Search>) return false;
  return rows.dtype[row * rows.C + (std::is_same_v<How, Sample> ? 1 : 0)] == Dtype::float64;
}

template <class How, class R>
class Launches {
 public:
  Launches(const Rows& rows, const How& how, cudaStream_t stream) : rows_(rows), how_(how), stream_(stream) {
    packed_.rows = 0;
    packed_.columns = rows.C;
  }

  void all() {
    for (Index row = 0; row < rows_.R; ++row) {
      if (rows_.numel[row] == 0 || in_double(rows_, how_, row) != std::is_same_v<R, double>) continue;
      if (bytes() + record_bytes(rows_.C) > Most::kBytes) launch();
      add(row);
    }
    launch();
  }

 private:
  using Most = Packed<How, kMostParameters>;
  using Few = Packed<How, kFewParameters>;
  static_assert(sizeof(Most) + sizeof(How) <= 32764 && sizeof(Few) + sizeof(How) <= kFewParameters);

  int bytes() const { return packed_.rows * record_bytes(rows_.C); }

  void add(Index row) {
    const std::uint32_t tag = std::is_same_v<How, Search> ? std::uint32_t(row) : rows_.stream[row];
    // A grid has 2^31 - 1 tiles at most: more elements than any device holds.
    const Record head{rows_.numel[row], int(tiles_), tag};
    unsigned char* const record = packed_.records + bytes();
    const std::size_t columns = std::size_t(rows_.C);
    std::memcpy(record, &head, sizeof(head));
    std::memcpy(record + sizeof(head), rows_.data + row * rows_.C, columns * sizeof(void*));
    std::memcpy(record + sizeof(head) + columns * sizeof(void*), rows_.dtype + row * rows_.C, columns * sizeof(Dtype));
    tiles_ += (head.numel + kTile<R> - 1) / kTile<R>;
    ++packed_.rows;
  }

  void launch() {
    const dim3 grid{unsigned(tiles_)};
    if (packed_.rows == 0) return;
    if (bytes() <= Few::kBytes) {
      Few few;
      few.rows = packed_.rows;
      few.columns = packed_.columns;
      std::memcpy(few.records, packed_.records, std::size_t(bytes()));
      FN_LAUNCH((average_tile<How, R, kFewParameters>), grid, dim3(kThreads), 0, stream_, few, how_);
    } else {
      FN_LAUNCH((average_tile<How, R, kMostParameters>), grid, dim3(kThreads), 0, stream_, packed_, how_);
    }
    packed_.rows = 0;
    tiles_ = 0;
  }

  const Rows& rows_;
  const How& how_;
  cudaStream_t stream_;
  Index tiles_ = 0;
  Most packed_;
};

template <class How>
void run(const Rows& rows, const How& how, cudaStream_t stream) {
  Launches<How, float>(rows, how, stream).all();
  if constexpr (!std::is_same_v<How, Swap> && !std::is_same_v<How, Search>)
    Launches<How, double>(rows, how, stream).all();
}

}  // namespace

void update(const Rows& rows, const Update& how, cudaStream_t stream) { run(rows, how, stream); }
void swag(const Rows& rows, const Swag& how, cudaStream_t stream) { run(rows, how, stream); }
void sample(const Rows& rows, const Sample& how, cudaStream_t stream) { run(rows, how, stream); }
void weighted_sum(const Rows& rows, const WeightedSum& how, cudaStream_t stream) { run(rows, how, stream); }
void swap(const Rows& rows, cudaStream_t stream) { run(rows, Swap{}, stream); }
void first_nonfinite(const Rows& rows, long long* found, cudaStream_t stream) { run(rows, Search{found}, stream); }
void sgd(const Rows& rows, const Sgd& how, cudaStream_t stream) { run(rows, how, stream); }
void adamw(const Rows& rows, const AdamW& how, cudaStream_t stream) { run(rows, how, stream); }

}  // namespace fastnuggets::average::cuda
