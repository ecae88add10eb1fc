// A block of threads takes a query and a part of the database, a thread a row; rows come through shared memory, so that
// they are read in one piece. Rows that may be among the best are put into a room in shared memory as keys, in any
// order; when it is full they are sorted and the best k stay. A second kernel does the same with the keys of all parts.
// Keys are all different: what comes out depends on no schedule.
#include <algorithm>
#include <cstdint>

#include "common/launch.cuh"
#include "screen/screen_cuda.h"
#include "screen/screen_math.h"

namespace fastnuggets::screen::cuda {
namespace {

using Index = std::int64_t;
using Word = unsigned long long;

constexpr int kThreads = 128;
constexpr int kRoom = 2048;              // keys; a power of two
constexpr int kFull = kRoom - kThreads;  // more than this, and the next rows may find no place
constexpr int kChunk = 16;               // words of a row in shared memory
constexpr Index kBlocks = 1024;          // that keep a large GPU busy
constexpr Index kLeastRows = 8 * kRoom;  // of the database, for a block
static_assert(kMostOnDevice <= kFull);

// The best keys so far. All members are called by all threads of the block.
class Best {
 public:
  __device__ Best(Word* keys, int* count, int k) : keys_(keys), count_(count), k_(k) {
    if (threadIdx.x == 0) *count_ = 0;
    __syncthreads();
  }

  // The lowest key that is in; 0 while there is room.
  __device__ Word worst() const { return worst_; }

  // Of each thread, a key or 0.
  __device__ void offer(Word key) {
    const bool wanted = key > worst_;
    if (wanted) keys_[atomicAdd(count_, 1)] = key;
    held_ += __syncthreads_count(wanted);
    if (held_ > kFull) sort();
  }

  // The best k in order, then zeros.
  __device__ void sort() {
    for (int i = held_ + int(threadIdx.x); i < kRoom; i += kThreads) keys_[i] = 0;
    __syncthreads();
    // Batcher's bitonic network.
    for (int size = 2; size <= kRoom; size *= 2) {
      for (int apart = size / 2; apart > 0; apart /= 2) {
        for (int pair = int(threadIdx.x); pair < kRoom / 2; pair += kThreads) {
          const int low = pair / apart * 2 * apart + pair % apart, high = low + apart;
          const Word a = keys_[low], b = keys_[high];
          if ((a < b) == ((low & size) == 0)) {
            keys_[low] = b;
            keys_[high] = a;
          }
        }
        __syncthreads();
      }
    }
    held_ = held_ < k_ ? held_ : k_;
    worst_ = held_ == k_ ? keys_[k_ - 1] : 0;
    if (threadIdx.x == 0) *count_ = held_;
    __syncthreads();
  }

 private:
  Word* keys_;
  int* count_;
  int k_, held_ = 0;
  Word worst_ = 0;
};

__device__ Overlap overlap(const Word* a, const Word* b, Index W) {
  Overlap o{0, 0};
  for (Index w = 0; w < W; ++w) {
    o.common += __popcll(a[w] & b[w]);
    o.sum += __popcll(a[w]) + __popcll(b[w]);
  }
  return o;
}

__global__ void __launch_bounds__(kThreads)
    search_part(const __grid_constant__ Search how, Index parts, Index rows, Word* found /* [Q, parts, k] */) {
  FN_SHARED(Word[kRoom], keys);
  FN_SHARED(Word[kThreads][kChunk + 1], tile);  // one more: threads read neighbouring rows from different banks
  FN_SHARED(int, count);
  const Index q = blockIdx.x % how.Q, part = blockIdx.x / how.Q;
  const Word* const query = static_cast<const Word*>(how.queries) + q * how.W;
  const Word* const database = static_cast<const Word*>(how.database);
  const Index last = (part + 1) * rows < how.N ? (part + 1) * rows : how.N;
  const Word least = least_part(how.threshold);
  Best best(keys, &count, int(how.k));
  for (Index at = part * rows; at < last; at += kThreads) {
    const int present = last - at < kThreads ? int(last - at) : kThreads;
    Overlap o{0, 0};
    for (Index first = 0; first < how.W; first += kChunk) {
      const int words = how.W - first < kChunk ? int(how.W - first) : kChunk;
      for (int i = int(threadIdx.x); i < present * words; i += kThreads)
        tile[i / words][i % words] = database[(at + i / words) * how.W + first + i % words];
      __syncthreads();
      if (int(threadIdx.x) < present) {
        const Overlap more = overlap(tile[threadIdx.x], query + first, words);
        o = {o.common + more.common, o.sum + more.sum};
      }
      __syncthreads();
    }
    const Word bar = part_of(best.worst()) > least ? part_of(best.worst()) : least;
    const bool good = int(threadIdx.x) < present && reaches(o, bar) && similarity(o) >= how.threshold;
    best.offer(good ? key(screen::part(o), at + int(threadIdx.x)) : 0);
  }
  best.sort();
  for (Index r = threadIdx.x; r < how.k; r += kThreads) found[(q * parts + part) * how.k + r] = keys[r];
}

__global__ void __launch_bounds__(kThreads)
    merge_parts(const __grid_constant__ Search how, Index parts, const Word* found /* [Q, parts, k] */) {
  FN_SHARED(Word[kRoom], keys);
  FN_SHARED(int, count);
  const Index q = blockIdx.x, given = parts * how.k;
  Best best(keys, &count, int(how.k));
  for (Index at = 0; at < given; at += kThreads) {
    const Index i = at + int(threadIdx.x);
    best.offer(i < given ? found[q * given + i] : 0);
  }
  best.sort();
  const Word* const query = static_cast<const Word*>(how.queries) + q * how.W;
  for (Index r = threadIdx.x; r < how.k; r += kThreads) {
    const bool none = keys[r] == 0;
    const Index row = none ? 0 : row_of(keys[r]);
    how.index[q * how.k + r] = none ? -1 : row;
    const Word* const near = static_cast<const Word*>(how.database) + row * how.W;
    how.similarity[q * how.k + r] = none ? 0.0 : similarity(overlap(near, query, how.W));
  }
}

Index parts_of(const Search& how) {
  return std::clamp((kBlocks + how.Q - 1) / how.Q, Index(1), how.N / kLeastRows + 1);
}

}  // namespace

std::size_t scratch_bytes(const Search& how) { return std::size_t(how.Q * parts_of(how) * how.k) * sizeof(Word); }

void search(const Search& how, void* scratch, cudaStream_t stream) {
  const Index parts = parts_of(how), rows = (how.N + parts - 1) / parts;
  Word* const found = static_cast<Word*>(scratch);
  FN_LAUNCH(search_part, dim3(unsigned(how.Q * parts)), dim3(kThreads), 0, stream, how, parts, rows, found);
  FN_LAUNCH(merge_parts, dim3(unsigned(how.Q)), dim3(kThreads), 0, stream, how, parts, found);
}

}  // namespace fastnuggets::screen::cuda
