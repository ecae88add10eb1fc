// A warp sum whose mask names lanes that do not come.
#include "program.h"

__global__ void warp_sum(const int* in, int* out, int n) {
  const int lane = int(threadIdx.x);
#ifdef FAULT
  if (lane >= n) return;
#endif
  int sum = lane < n ? in[lane] : 0;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (lane == 0) *out = sum;
}

int main() {
  return run_in_both_orders([] {
    auto in = poisoned(20), out = poisoned(1);
    for (int i = 0; i < 20; ++i) in[i] = i;
    FN_LAUNCH(warp_sum, 1, 32, 0, nullptr, in.get(), out.get(), 20);
    return out[0] == 190;
  });
}
