// screen_kernels.cu for ctypes, with screen.h's own struct: device pointers are pointers, the stream is none.
#include "driver.h"
#include "screen/screen_cuda.h"

using namespace fastnuggets::screen;

extern "C" {

std::size_t screen_scratch_bytes(const Search& how) { return cuda::scratch_bytes(how); }
const char* screen_search(const Search& how, void* scratch) {
  return guarded([&] { cuda::search(how, scratch, nullptr); });
}
}
