// Barriers, shuffles, votes and atomics together: inclusive prefix sums of several blocks, against a plain loop.
#include "program.h"

constexpr int kThreads = 96;
constexpr unsigned kAll = 0xffffffffu;

__global__ void prefix_sums(const int* in, int* out, int* total, int n) {
  FN_SHARED(int[kThreads / 32], warp_sums);
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  int sum = i < n ? in[i] : 0;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(kAll, sum, offset);
    if (lane >= offset) sum += below;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += warp_sums[w];
  if (i < n) out[i] = sum;
  if (threadIdx.x == kThreads - 1) atomicAdd(total, sum);
}

__global__ void count_by_vote(const int* in, int* out, int n) {
  const int lane = int(threadIdx.x);
  const unsigned odd = __ballot_sync(kAll, lane < n && in[lane] % 2);
  const int of_lane_zero = __shfl_sync(kAll, lane + 5, 0);
  const int of_neighbour = __shfl_xor_sync(kAll, lane, 1);
  out[lane] =
      1000 * __popc(odd) + 100 * (of_lane_zero == 5) + 10 * (of_neighbour == (lane ^ 1)) + __any_sync(kAll, lane == 7);
}

int main() {
  return run_in_both_orders([] {
    const int n = 250, blocks = 3;
    auto in = poisoned(n), out = poisoned(n), total = poisoned(1), votes = poisoned(32);
    for (int i = 0; i < n; ++i) in[i] = i % 7;
    total[0] = 0;
    FN_LAUNCH(prefix_sums, blocks, kThreads, 0, nullptr, in.get(), out.get(), total.get(), n);
    FN_LAUNCH(count_by_vote, 1, 32, 0, nullptr, in.get(), votes.get(), 20);
    int sum = 0, all = 0;
    for (int i = 0; i < n; ++i) {
      sum = i % kThreads ? sum + in[i] : in[i];
      all += in[i];
      if (out[i] != sum) return false;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (votes[lane] != 9111) return false;
    }
    return total[0] == all;
  });
}
