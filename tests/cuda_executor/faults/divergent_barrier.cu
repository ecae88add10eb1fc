// Half of the block leaves before the barrier.
#include "program.h"

__global__ void write(int* out, int n) {
  const int i = int(threadIdx.x);
#ifdef FAULT
  if (i >= n) return;
  __syncthreads();
#else
  __syncthreads();
  if (i >= n) return;
#endif
  out[i] = i;
}

int main() {
  return run_in_both_orders([] {
    auto out = poisoned(32);
    FN_LAUNCH(write, 1, 64, 0, nullptr, out.get(), 32);
    return out[0] == 0 && out[31] == 31;
  });
}
