// A stencil that reads one element past the end of its input.
#include "program.h"

__global__ void differences(const int* in, int* out, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
#ifdef FAULT
  if (i < n) out[i] = in[i + 1] - in[i];
#else
  if (i < n) out[i] = i + 1 < n ? in[i + 1] - in[i] : 0;
#endif
}

int main() {
  return run_in_both_orders([] {
    auto in = poisoned(100), out = poisoned(100);
    for (int i = 0; i < 100; ++i) in[i] = i;
    FN_LAUNCH(differences, 2, 64, 0, nullptr, in.get(), out.get(), 100);
    return out[0] == 1 && out[98] == 1;
  });
}
