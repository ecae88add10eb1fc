// Four elements a thread; the length is not a multiple of four.
#include "program.h"

__global__ void iota(int* out, int n) {
  const int first = 4 * int(blockIdx.x * blockDim.x + threadIdx.x);
  if (first + 4 <= n) {
    for (int i = first; i < first + 4; ++i) out[i] = i;
  }
#ifndef FAULT
  else {
    for (int i = first; i < n; ++i) out[i] = i;
  }
#endif
}

int main() {
  return run_in_both_orders([] {
    auto out = poisoned(30);
    FN_LAUNCH(iota, 1, 32, 0, nullptr, out.get(), 30);
    for (int i = 0; i < 30; ++i) {
      if (out[i] != i) return false;
    }
    return true;
  });
}
