// A shared buffer that is filled again before everybody has read it: the fault shows in one thread order only.
#include "program.h"

__global__ void broadcast_first(const int* in, int* out, int rounds) {
  FN_SHARED(int, first);
  for (int r = 0; r < rounds; ++r) {
    if (threadIdx.x == 0) first = in[r];
    __syncthreads();
    out[r * blockDim.x + threadIdx.x] = first;
#ifndef FAULT
    __syncthreads();
#endif
  }
}

int main() {
  return run_in_both_orders([] {
    auto in = poisoned(3), out = poisoned(3 * 64);
    for (int r = 0; r < 3; ++r) in[r] = r;
    FN_LAUNCH(broadcast_first, 1, 64, 0, nullptr, in.get(), out.get(), 3);
    for (int i = 0; i < 3 * 64; ++i) {
      if (out[i] != i / 64) return false;
    }
    return true;
  });
}
