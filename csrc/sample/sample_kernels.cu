// A block of threads takes a tile: several short rows, or a piece of a long one. A thread makes the words of a counter
// of the stream and uses them at once for the elements that they belong to, which lie 16 apart: half a warp reads and
// writes 16 neighbours. Rows are summed in the order of the CPU kernels, so the bits are theirs; nothing depends on a
// schedule.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/convert.cuh"
#include "common/launch.cuh"
#include "sample/sample_cuda.h"
#include "sample/sample_math.h"

namespace fastnuggets::sample::cuda {
namespace {

using Index = std::int64_t;

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kThreads = 128, kWarp = 32;
constexpr int kBlocks = 8;            // that a processor shall hold of the larger kernels: 64 registers a thread
constexpr int kApart = kPhiloxLanes;  // elements of a counter

// The type that is computed in.
template <class S>
using Real = typename Compute<S>::type;

// An input from element `at` on.
template <class S>
class Input {
 public:
  using R = Real<S>;
  __device__ Input(const Operand& of, Index at) : value_(R(of.value)) {
    const S* const data = static_cast<const S*>(of.data);
    if (data != nullptr && of.constant) value_ = convert<R>(*data);
    if (data != nullptr && !of.constant) data_ = data + at;
  }
  __device__ bool constant() const { return data_ == nullptr; }
  __device__ R operator[](Index i) const { return constant() ? value_ : convert<R>(data_[i]); }

 private:
  const S* data_ = nullptr;
  R value_;
};

// An output from element `at` on, or null.
template <class S>
__device__ S* output(void* data, Index at) {
  return data == nullptr ? nullptr : static_cast<S*>(data) + at;
}

// ---- noise

// The counters that elements [at, at + n) come of, shared out among the block's threads: body(counter, first) with the
// place of its first element, counted from `at`. That may be outside, as may the others.
template <int kElements, class Body>
__device__ void for_counters(Index at, int n, Body body) {
  constexpr int kBlock = kElements * kPhiloxLanes;
  const int before = int(at % kBlock);
  const std::uint64_t counter = std::uint64_t(at / kBlock) * kPhiloxLanes;
  const unsigned counters = unsigned(before + n + kBlock - 1) / kBlock * kPhiloxLanes;
  for (unsigned c = threadIdx.x; c < counters; c += blockDim.x)
    body(counter + c, int(c / kPhiloxLanes * kBlock + c % kPhiloxLanes) - before);
}

// Those of a counter's elements that are among n: body(j, i) with the number in the counter and the place.
template <int kElements, class Body>
__device__ void for_elements(int first, int n, Body body) {
#pragma unroll
  for (int j = 0; j < kElements; ++j) {
    const int i = first + j * kApart;
    if (unsigned(i) < unsigned(n)) body(j, i);
  }
}

__device__ void normals(const PhiloxWords& words, float (&noise)[kPhiloxWords]) {
  for (int j = 0; j < kPhiloxWords; j += 2) {
    const NormalPair pair = normal_pair(words.word[j], words.word[j + 1]);
    noise[j] = pair.cosine;
    noise[j + 1] = pair.sine;
  }
}

template <Kind kind>
__device__ void noise_each(const PhiloxWords& words, float (&noise)[kPhiloxWords]) {
  for (int j = 0; j < kPhiloxWords; ++j) noise[j] = noise_of<kind>(words.word[j]);
}

// Of every kind but masks.
__device__ void noise_of_counter(Kind kind, const Parameter& parameter, const PhiloxWords& words,
                                 float (&noise)[kPhiloxWords]) {
  switch (kind) {
    case Kind::uniform:
      return noise_each<Kind::uniform>(words, noise);
    case Kind::laplace:
      return noise_each<Kind::laplace>(words, noise);
    case Kind::logistic:
      return noise_each<Kind::logistic>(words, noise);
    case Kind::gumbel:
      return noise_each<Kind::gumbel>(words, noise);
    case Kind::exponential:
      return noise_each<Kind::exponential>(words, noise);
    case Kind::sign:
      return noise_each<Kind::sign>(words, noise);
    default:
      normals(words, noise);
      if (kind != Kind::gain) return;
      for (int j = 0; j < kPhiloxWords; ++j) noise[j] = exact::fma(parameter.value, noise[j], 1.0f);
  }
}

// Masks: the words of a counter are enough for twice as many elements.
constexpr int kHalves = kKeepGroup / kPhiloxLanes;
__device__ void noise_of_counter(Kind, const Parameter& parameter, const PhiloxWords& words, float (&noise)[kHalves]) {
  for (int h = 0; h < kHalves; ++h) noise[h] = keep(words.word[h / 2] >> (16 * (h % 2)) & 0xFFFFu, parameter);
}

constexpr int kNoiseTile = 2048;  // elements of a block of threads

template <class S, int kElements>
__global__ void __launch_bounds__(kThreads)
    scaled_noise_tile(const __grid_constant__ ScaledNoise how, const Parameter parameter) {
  using R = Real<S>;
  const Index at = Index(blockIdx.x) * kNoiseTile;
  const int n = int(min(Index(kNoiseTile), how.numel - at));
  const Input<S> loc(how.loc, at), scale(how.scale, at);
  S* const out = output<S>(how.out, at);
  const PhiloxStream stream = stream_of(how.key);
  for_counters<kElements>(at, n, [&](std::uint64_t counter, int first) {
    R a[kElements] = {}, b[kElements] = {};
    for_elements<kElements>(first, n, [&](int j, int i) {
      a[j] = loc[i];
      b[j] = scale[i];
    });
    float noise[kElements];
    noise_of_counter(how.kind, parameter, philox_words(stream, counter), noise);
    for_elements<kElements>(first, n, [&](int j, int i) { out[i] = convert<S>(fused(b[j], R(noise[j]), a[j])); });
  });
}

// ---- tiles

// So many whole rows of n elements, kChunk at most in all, or n elements of one row.
struct Tile {
  Index row, at;  // the first
  int rows, n;

  __device__ int size() const { return rows * n; }
};

struct Tiles {
  Index rows, n;
  unsigned pieces;  // of a row; a grid has 2^31 - 1 tiles at most: more elements than any device holds
  int together;     // rows of a tile
  int team_bits;
  float inverse;  // of n

  Tiles(Dtype dtype, Rows shape)
      : rows(shape.rows),
        n(shape.n),
        pieces(unsigned(std::max<Index>(1, (n + kChunk - 1) / kChunk))),
        together(int(n == 0 ? kChunk : std::max<Index>(1, kChunk / n))),
        team_bits(0),
        inverse(1.0f / float(std::max<Index>(1, n))) {
    // A tile starts where a block of the stream does, if so many rows can be had.
    int even = kPhiloxBlock;
    while (even > 1 && n * (even / 2) % kPhiloxBlock == 0) even /= 2;
    if (together > even) together -= together % even;
    // The CPU has 32 lanes of float or 16 of double.
    const int most = dtype == Dtype::float64 ? 4 : 5;
    while (team_bits < most && (1 << team_bits) < n) ++team_bits;
  }

  dim3 grid() const { return dim3(unsigned(pieces > 1 ? rows * pieces : (rows + together - 1) / together)); }

  __device__ Tile operator[](unsigned u) const {
    if (pieces == 1) {
      const Index row = Index(u) * together;
      return {row, row * n, int(min(Index(together), rows - row)), int(n)};
    }
    const Index row = u / pieces, start = u % pieces * kChunk;
    return {row, row * n + start, 1, int(min(kChunk, n - start))};
  }

  // i / n for i < kChunk: the half keeps the quotient further from the next integer than it is wrong.
  __device__ int row_of(int i) const { return together == 1 ? 0 : int((float(i) + 0.5f) * inverse); }
};

// ---- sums

// Neighbouring threads, a power of two of them, that take a row or a piece of one.
struct Team {
  int size, lane, number, teams;

  __device__ explicit Team(int bits)
      : size(1 << bits),
        lane(int(threadIdx.x) & (size - 1)),
        number(int(threadIdx.x >> bits)),
        teams(int(blockDim.x >> bits)) {}
};

// The sum of terms 0 to n - 1 in the CPU's order, on the team's first lane. All lanes of the warp must come. Added so,
// a term that is a product is rounded before.
template <class R, class Term>
__device__ R sum(const Team& team, int n, Term term) {
  R total = R(0);
#pragma unroll 4
  for (int i = team.lane; i < n; i += team.size) total = fused(R(1), term(i), total);
  for (int half = team.size / 2; half > 0; half /= 2) total += __shfl_down_sync(kAllLanes, total, half, team.size);
  return total;
}

// Sums of the tile's rows, or of its piece of a row.
template <class R>
__device__ void sum_rows(const R* terms, const Tiles& tiles, const Tile& tile, void* sums, double* pieces) {
  const Team team(tiles.team_bits);
  for (int first = 0; first < tile.rows; first += team.teams) {
    const int row = first + team.number;
    const bool mine = row < tile.rows;
    const R total = sum<R>(team, mine ? tile.n : 0, [&](int i) { return terms[row * tile.n + i]; });
    if (!mine || team.lane > 0) continue;
    if (tiles.pieces > 1)
      pieces[blockIdx.x] = double(total);
    else
      static_cast<R*>(sums)[tile.row + row] = total;
  }
}

// The sums of rows that came in pieces; a warp takes a row.
template <class R>
__global__ void __launch_bounds__(kThreads) add_pieces(const double* pieces, Index count, Index rows, R* sums) {
  const Index row = Index(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int lane = int(threadIdx.x) % kWarp;
  double total = 0;
#pragma unroll 4
  for (Index p = lane; p < count; p += kWarp) total += pieces[row * count + p];
  for (int half = kWarp / 2; half > 0; half /= 2) total += __shfl_down_sync(kAllLanes, total, half);
  if (lane == 0) sums[row] = R(total);
}

// ---- normals and their divergence

template <class R>
__device__ Spread<R> spread_of(Form form, R x) {
  switch (form) {
    case Form::std:
      return sample::spread_of<Form::std>(x);
    case Form::logvar:
      return sample::spread_of<Form::logvar>(x);
    case Form::log_std:
      return sample::spread_of<Form::log_std>(x);
    case Form::var:
      return sample::spread_of<Form::var>(x);
    default:
      return sample::spread_of<Form::rho>(x);
  }
}

// A prior from element `at` on; a constant one is worked out once.
template <class S>
class PriorInput {
 public:
  using R = Real<S>;
  __device__ PriorInput(const Normal& how, Index at) : mean(how.prior_mean, at), std_(how.prior_std, at), constant_{} {
    if (std_.constant()) constant_ = prior_of(std_[0]);
  }
  __device__ Prior<R> operator[](int i) const { return std_.constant() ? constant_ : prior_of(std_[i]); }

  const Input<S> mean;

 private:
  const Input<S> std_;
  Prior<R> constant_;
};

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    normal_tile(const __grid_constant__ Normal how, const __grid_constant__ Tiles tiles, double* pieces) {
  using R = Real<S>;
  FN_SHARED(R[kChunk], terms);
  const Tile tile = tiles[blockIdx.x];
  const int n = tile.size();
  const Input<S> mean(how.mean, tile.at), spread(how.spread, tile.at);
  const PriorInput<S> prior(how, tile.at);
  S *const z = output<S>(how.z, tile.at), *const var = output<S>(how.var, tile.at);
  const PhiloxStream stream = z == nullptr ? PhiloxStream{} : stream_of(how.key);
  for_counters<kPhiloxWords>(tile.at, n, [&](std::uint64_t counter, int first) {
    R m[kPhiloxWords] = {}, x[kPhiloxWords] = {};
    for_elements<kPhiloxWords>(first, n, [&](int j, int i) {
      m[j] = mean[i];
      x[j] = spread[i];
    });
    float noise[kPhiloxWords] = {};
    if (z != nullptr) normals(philox_words(stream, counter), noise);
    for_elements<kPhiloxWords>(first, n, [&](int j, int i) {
      const Spread<R> s = spread_of(how.form, x[j]);
      if (z != nullptr) z[i] = convert<S>(fused(s.std, R(noise[j]), m[j]));
      if (var != nullptr) var[i] = convert<S>(product(s.std, s.std));
      if (how.kl == nullptr) return;
      const Prior<R> p = prior[i];
      terms[i] = normal_kl(m[j], s.std, s.log, prior.mean[i], p.inverse, p.log);
    });
  });
  if (how.kl == nullptr) return;
  __syncthreads();
  sum_rows(terms, tiles, tile, how.kl, pieces);
}

template <class R>
struct Grads {
  R of[4];  // mean, spread, prior_mean, prior_std
};

// `by_std` is what comes of z and of var.
template <class R>
__device__ Grads<R> normal_grads(R grad_z, R by_std, R grad_kl, R mean, const Spread<R>& s, R prior_mean, R inverse) {
  return {{grad_of_mean(grad_z, grad_kl, mean, prior_mean, inverse),
           grad_of_spread(by_std, grad_kl, s.std, s.std_slope, s.log_slope, inverse),
           grad_of_prior_mean(grad_kl, mean, prior_mean, inverse),
           grad_of_prior_std(grad_kl, mean, s.std, prior_mean, inverse)}};
}

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    normal_backward_tile(const __grid_constant__ NormalBackward how, const __grid_constant__ Tiles tiles) {
  using R = Real<S>;
  const Normal& forward = how.forward;
  const Tile tile = tiles[blockIdx.x];
  const int n = tile.size();
  const Input<S> mean(forward.mean, tile.at), spread(forward.spread, tile.at);
  const Input<S> grad_z(how.grad_z, tile.at), grad_var(how.grad_var, tile.at);
  const PriorInput<S> prior(forward, tile.at);
  const R* const grad_kl = static_cast<const R*>(how.grad_kl);
  const bool draws = forward.key != nullptr, squares = how.grad_var.data != nullptr;
  const PhiloxStream stream = draws ? stream_of(forward.key) : PhiloxStream{};
  for_counters<kPhiloxWords>(tile.at, n, [&](std::uint64_t counter, int first) {
    R x[kPhiloxWords] = {}, g[kPhiloxWords] = {};
    for_elements<kPhiloxWords>(first, n, [&](int j, int i) {
      x[j] = spread[i];
      g[j] = grad_z[i];
    });
    float noise[kPhiloxWords] = {};
    if (draws) normals(philox_words(stream, counter), noise);
    for_elements<kPhiloxWords>(first, n, [&](int j, int i) {
      const Spread<R> s = spread_of(forward.form, x[j]);
      R by_std = draws ? product(g[j], R(noise[j])) : R(0);
      if (squares) by_std = fused(R(2) * grad_var[i], s.std, by_std);
      Grads<R> grads{{g[j], by_std * s.std_slope, R(0), R(0)}};
      if (grad_kl != nullptr)
        grads = normal_grads(g[j], by_std, grad_kl[tile.row + tiles.row_of(i)], mean[i], s, prior.mean[i],
                             prior[i].inverse);
      for (int k = 0; k < 4; ++k)
        if (how.grads[k] != nullptr) output<S>(how.grads[k], tile.at)[i] = convert<S>(grads.of[k]);
    });
  });
}

// ---- divergence from the log-uniform prior

template <class R>
__device__ R log_uniform_kl(Approximation approximation, R log_alpha) {
  switch (approximation) {
    case Approximation::molchanov:
      return sample::log_uniform_kl<Approximation::molchanov>(log_alpha);
    case Approximation::kingma:
      return sample::log_uniform_kl<Approximation::kingma>(log_alpha);
    default:
      return sample::log_uniform_kl<Approximation::ard>(log_alpha);
  }
}

template <class R>
__device__ R log_uniform_slope(Approximation approximation, R log_alpha) {
  switch (approximation) {
    case Approximation::molchanov:
      return sample::log_uniform_slope<Approximation::molchanov>(log_alpha);
    case Approximation::kingma:
      return sample::log_uniform_slope<Approximation::kingma>(log_alpha);
    default:
      return sample::log_uniform_slope<Approximation::ard>(log_alpha);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    log_uniform_tile(const __grid_constant__ LogUniform how, const __grid_constant__ Tiles tiles, double* pieces) {
  using R = Real<S>;
  FN_SHARED(R[kChunk], terms);
  const Tile tile = tiles[blockIdx.x];
  const Input<S> log_alpha(how.log_alpha, tile.at);
  S* const grad = output<S>(how.grad, tile.at);
  for (int i = int(threadIdx.x); i < tile.size(); i += kThreads) {
    if (grad == nullptr) {
      terms[i] = log_uniform_kl(how.approximation, log_alpha[i]);
    } else {
      const R weight = static_cast<const R*>(how.grad_kl)[tile.row + tiles.row_of(i)];
      grad[i] = convert<S>(weight * log_uniform_slope(how.approximation, log_alpha[i]));
    }
  }
  if (grad != nullptr) return;
  __syncthreads();
  sum_rows(terms, tiles, tile, how.kl, pieces);
}

// ---- softmax of noisy logits

constexpr int kLongThreads = 512;  // of a block, which takes a row longer than kChunk
constexpr int kMostTeams = kLongThreads / 16;
constexpr int kStretch = 1 << 20;  // elements of a row that are numbered in 32 bits

// Those who share a row: a team or, if the row is long, all of the block's.
template <bool is_long>
struct Sharers : Team {
  using Team::Team;

  template <class Body>
  __device__ void for_each(Index n, Body body) const {
    const Index step = is_long ? kLongThreads : size;
#pragma unroll 2
    for (Index i = is_long ? int(threadIdx.x) : lane; i < n; i += step) body(i);
  }

  // What `choose` chooses, again and again, of the values of all threads.
  template <class T, class Choose>
  __device__ T chosen(T value, Choose choose) const {
    for (int half = size / 2; half > 0; half /= 2) value = choose(value, __shfl_xor_sync(kAllLanes, value, half, size));
    if constexpr (is_long) {
      FN_SHARED(T[kMostTeams], values);
      if (lane == 0) values[number] = value;
      __syncthreads();
      for (int t = 0; t < teams; ++t) value = choose(value, values[t]);
      __syncthreads();
    }
    return value;
  }

  // The sum of terms 0 to n - 1 in the CPU's order. In a long row a team takes a piece.
  template <class R, class Term>
  __device__ R sum_all(Index n, Term term) const {
    if constexpr (is_long) {
      FN_SHARED(R[kMostTeams], sums);
      double total = 0;
      for (Index first = 0; first < n; first += teams * kChunk) {
        const Index start = first + number * kChunk;
        const int some = int(max(Index(0), min(kChunk, n - start)));
        const R mine = sum<R>(*this, some, [&](int i) { return term(start + i); });
        if (lane == 0) sums[number] = mine;
        __syncthreads();
        for (int t = 0; t < teams; ++t) total += double(sums[t]);
        __syncthreads();
      }
      return R(total);
    } else {
      return __shfl_sync(kAllLanes, sum<R>(*this, int(n), term), 0, size);
    }
  }
};

template <class S>
__device__ void noisy_logits(const GumbelSoftmax& how, Index at, int n, Real<S>* y) {
  using R = Real<S>;
  const Input<S> logits(how.logits, at);
  const PhiloxStream stream = stream_of(how.key);
  const R inverse_tau = R(1) / R(how.tau);
  for_counters<kPhiloxWords>(at, n, [&](std::uint64_t counter, int first) {
    float noise[kPhiloxWords];
    noise_each<Kind::gumbel>(philox_words(stream, counter), noise);
    for_elements<kPhiloxWords>(first, n, [&](int j, int i) { y[i] = product(logits[i] + R(noise[j]), inverse_tau); });
  });
}

// `out` may be where y is: an element is written by the thread that reads it last.
template <class S, bool is_long>
__device__ void softmax_row(const Sharers<is_long>& sharers, const Real<S>* y, Index n, bool hard, S* out) {
  using R = Real<S>;
  const auto larger = [](R a, R b) { return a > b || a != a ? a : b; };  // NaN if one is
  R most = R(-HUGE_VALF);
  sharers.for_each(n, [&](Index i) { most = larger(most, y[i]); });
  most = sharers.chosen(most, larger);
  if (hard) {
    const auto smaller = [](long long a, long long b) { return a < b ? a : b; };
    long long first = n;
    sharers.for_each(n, [&](Index i) { first = y[i] == most ? smaller(first, i) : first; });
    first = sharers.chosen(first, smaller);
    const R zero = most - most;  // or NaN, as the softmax is where the largest is infinite or NaN
    sharers.for_each(n, [&](Index i) { out[i] = convert<S>(zero + R(i == first ? 1 : 0)); });
  } else {
    const auto e = [&](Index i) { return exp_(y[i] - most); };
    const R inverse = R(1) / sharers.template sum_all<R>(n, e);
    sharers.for_each(n, [&](Index i) { out[i] = convert<S>(e(i) * inverse); });
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    gumbel_softmax_tile(const __grid_constant__ GumbelSoftmax how, const __grid_constant__ Tiles tiles) {
  FN_SHARED(Real<S>[kChunk], y);
  const Tile tile = tiles[blockIdx.x];
  noisy_logits<S>(how, tile.at, tile.size(), y);
  __syncthreads();
  const Sharers<false> sharers(tiles.team_bits);
  for (int first = 0; first < tile.rows; first += sharers.teams) {
    const int row = first + sharers.number, n = row < tile.rows ? tile.n : 0, at = row * n;
    softmax_row(sharers, y + at, n, how.hard, output<S>(how.out, tile.at + at));
  }
}

// The noisy logits are put in `out` if that is of their type, else in the block's part of `scratch`.
template <class S>
__global__ void __launch_bounds__(kLongThreads, std::is_same_v<S, double> ? 1 : 2)
    gumbel_softmax_long(const __grid_constant__ GumbelSoftmax how, int team_bits, Real<S>* scratch) {
  const Index n = how.shape.n;
  const Sharers<true> sharers(team_bits);
  for (Index row = blockIdx.x; row < how.shape.rows; row += gridDim.x) {
    S* const out = output<S>(how.out, row * n);
    Real<S>* y = scratch + blockIdx.x * n;
    if constexpr (std::is_same_v<S, Real<S>>) y = out;
    for (Index start = 0; start < n; start += kStretch)
      noisy_logits<S>(how, row * n + start, int(min(Index(kStretch), n - start)), y + start);
    __syncthreads();
    softmax_row(sharers, y, n, how.hard, out);
    __syncthreads();
  }
}

template <class S, bool is_long>
__global__ void __launch_bounds__(is_long ? kLongThreads : kThreads)
    gumbel_softmax_backward_row(const __grid_constant__ GumbelSoftmaxBackward how, int team_bits) {
  using R = Real<S>;
  const Sharers<is_long> sharers(team_bits);
  const Index row = is_long ? Index(blockIdx.x) : Index(blockIdx.x) * sharers.teams + sharers.number;
  const Index n = row < how.shape.rows ? how.shape.n : 0, at = row * n;
  const Input<S> grad(how.grad, at), soft(how.soft, at);
  S* const out = output<S>(how.out, at);
  const R inverse_tau = R(1) / R(how.tau);
  const R dot = sharers.template sum_all<R>(n, [&](Index i) { return grad[i] * soft[i]; });
  sharers.for_each(n, [&](Index i) { out[i] = convert<S>(soft[i] * (grad[i] - dot) * inverse_tau); });
}

// ---- host

dim3 blocks(Index count, int of_block) { return dim3(unsigned((count + of_block - 1) / of_block)); }

// Without sums over rows a tensor is one row, whose pieces are blocks of the stream.
Tiles tiles_of(Dtype dtype, Rows shape, bool sums) {
  const Index numel = shape.rows * shape.n;
  return Tiles(dtype, sums ? shape : Rows{std::min<Index>(1, numel), numel});
}

std::size_t bytes_of_pieces(Dtype dtype, Rows shape) {
  const Tiles tiles(dtype, shape);
  return tiles.pieces > 1 ? std::size_t(tiles.rows) * tiles.pieces * sizeof(double) : 0;
}

template <class R>
void sum_pieces(const Tiles& tiles, const double* pieces, void* sums, cudaStream_t stream) {
  if (tiles.pieces == 1) return;
  FN_LAUNCH(add_pieces<R>, blocks(tiles.rows, kThreads / kWarp), dim3(kThreads), 0, stream, pieces, Index(tiles.pieces),
            tiles.rows, static_cast<R*>(sums));
}

}  // namespace

void scaled_noise(const ScaledNoise& how, cudaStream_t stream) {
  const Parameter parameter(how.kind, how.parameter);
  const dim3 grid = blocks(how.numel, kNoiseTile);
  for_floating(how.dtype, [&](auto of) {
    using S = decltype(of);
    if (how.kind == Kind::keep)
      FN_LAUNCH((scaled_noise_tile<S, kHalves>), grid, dim3(kThreads), 0, stream, how, parameter);
    else
      FN_LAUNCH((scaled_noise_tile<S, kPhiloxWords>), grid, dim3(kThreads), 0, stream, how, parameter);
  });
}

std::size_t scratch_bytes(const Normal& how) { return how.kl == nullptr ? 0 : bytes_of_pieces(how.dtype, how.shape); }

void normal(const Normal& how, Scratch scratch, cudaStream_t stream) {
  const Tiles tiles = tiles_of(how.dtype, how.shape, how.kl != nullptr);
  double* const pieces = static_cast<double*>(scratch.data);
  for_floating(how.dtype, [&](auto of) {
    using S = decltype(of);
    FN_LAUNCH(normal_tile<S>, tiles.grid(), dim3(kThreads), 0, stream, how, tiles, pieces);
    if (how.kl != nullptr) sum_pieces<Real<S>>(tiles, pieces, how.kl, stream);
  });
}

void normal_backward(const NormalBackward& how, cudaStream_t stream) {
  const Tiles tiles = tiles_of(how.forward.dtype, how.forward.shape, how.grad_kl != nullptr);
  for_floating(how.forward.dtype, [&](auto of) {
    FN_LAUNCH(normal_backward_tile<decltype(of)>, tiles.grid(), dim3(kThreads), 0, stream, how, tiles);
  });
}

std::size_t scratch_bytes(const LogUniform& how) {
  return how.grad != nullptr ? 0 : bytes_of_pieces(how.dtype, how.shape);
}

void log_uniform(const LogUniform& how, Scratch scratch, cudaStream_t stream) {
  const Tiles tiles(how.dtype, how.shape);
  double* const pieces = static_cast<double*>(scratch.data);
  for_floating(how.dtype, [&](auto of) {
    using S = decltype(of);
    FN_LAUNCH(log_uniform_tile<S>, tiles.grid(), dim3(kThreads), 0, stream, how, tiles, pieces);
    if (how.grad == nullptr) sum_pieces<Real<S>>(tiles, pieces, how.kl, stream);
  });
}

// Of a row: the noisy logits, where `out` is of another type.
std::size_t row_bytes(const GumbelSoftmax& how) {
  const bool half = how.dtype == Dtype::float16 || how.dtype == Dtype::bfloat16;
  return half && how.shape.n > kChunk ? std::size_t(how.shape.n) * sizeof(float) : 0;
}

std::size_t scratch_bytes(const GumbelSoftmax& how) {
  constexpr Index kBlocks = 1024;  // more than a device runs at a time
  return std::size_t(std::min(how.shape.rows, kBlocks)) * row_bytes(how);
}

void gumbel_softmax(const GumbelSoftmax& how, Scratch scratch, cudaStream_t stream) {
  const Tiles tiles(how.dtype, how.shape);
  if (tiles.n == 0) return;
  const std::size_t bytes = row_bytes(how);
  const Index most = bytes == 0 ? tiles.rows : Index(scratch.bytes / bytes);
  for_floating(how.dtype, [&](auto of) {
    using S = decltype(of);
    if (tiles.pieces == 1)
      FN_LAUNCH(gumbel_softmax_tile<S>, tiles.grid(), dim3(kThreads), 0, stream, how, tiles);
    else
      FN_LAUNCH(gumbel_softmax_long<S>, blocks(std::min(tiles.rows, most), 1), dim3(kLongThreads), 0, stream, how,
                tiles.team_bits, static_cast<Real<S>*>(scratch.data));
  });
}

void gumbel_softmax_backward(const GumbelSoftmaxBackward& how, cudaStream_t stream) {
  const Tiles tiles(how.dtype, how.shape);
  if (tiles.n == 0) return;
  for_floating(how.dtype, [&](auto of) {
    using S = decltype(of);
    if (tiles.pieces == 1)
      FN_LAUNCH((gumbel_softmax_backward_row<S, false>), blocks(tiles.rows, kThreads >> tiles.team_bits),
                dim3(kThreads), 0, stream, how, tiles.team_bits);
    else
      FN_LAUNCH((gumbel_softmax_backward_row<S, true>), blocks(tiles.rows, 1), dim3(kLongThreads), 0, stream, how,
                tiles.team_bits);
  });
}

}  // namespace fastnuggets::sample::cuda
