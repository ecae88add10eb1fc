// Each thread hands its value to its left neighbour through shared memory.
#include "program.h"

__global__ void rotate(const int* in, int* out) {
  FN_SHARED(int[64], values);
  values[threadIdx.x] = in[threadIdx.x];
#ifndef FAULT
  __syncthreads();
#endif
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

int main() {
  return run_in_both_orders([] {
    auto in = poisoned(64), out = poisoned(64);
    for (int i = 0; i < 64; ++i) in[i] = i;
    FN_LAUNCH(rotate, 1, 64, 0, nullptr, in.get(), out.get());
    for (int i = 0; i < 64; ++i) {
      if (out[i] != (i + 1) % 64) return false;
    }
    return true;
  });
}
