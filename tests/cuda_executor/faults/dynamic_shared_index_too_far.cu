// One element past the end of dynamic shared memory.
#include "program.h"

#ifdef FAULT
constexpr int kStep = 1;
#else
constexpr int kStep = 0;
#endif

__global__ void copy(const int* in, int* out) {
  FN_DYNAMIC_SHARED(int, values);
  values[threadIdx.x + kStep] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + kStep];
}

int main() {
  return run_in_both_orders([] {
    auto in = poisoned(32), out = poisoned(32);
    for (int i = 0; i < 32; ++i) in[i] = i;
    FN_LAUNCH(copy, 1, 32, 32 * sizeof(int), nullptr, in.get(), out.get());
    return out[0] == 0 && out[31] == 31;
  });
}
