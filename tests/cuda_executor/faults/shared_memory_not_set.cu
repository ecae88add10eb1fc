// A counter in shared memory that nobody sets to zero: a previous block must not do it by chance.
#include "program.h"

__global__ void count_odd(const int* in, int* out) {
  FN_SHARED(int, count);
#ifndef FAULT
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
#endif
  if (in[threadIdx.x] % 2) atomicAdd(&count, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    out[blockIdx.x] = count;
    count = 0;
  }
}

int main() {
  return run_in_both_orders([] {
    auto in = poisoned(32), out = poisoned(3);
    for (int i = 0; i < 32; ++i) in[i] = i;
    FN_LAUNCH(count_odd, 3, 32, 0, nullptr, in.get(), out.get());
    return out[1] == 16 && out[2] == 16;
  });
}
