// filter_kernels.cu for ctypes, with filter.h's own structs: device pointers are pointers, the stream is none. Scratch
// is not a number larger than asked for, and begins as not a number.
#include <cstring>
#include <memory>

#include "blend/filter_cuda.h"
#include "blend/filter_math.h"
#include "driver.h"

using namespace fastnuggets::filter;

namespace {

std::unique_ptr<char[]> scratch(const Multiband& how, Parts parts) {
  const std::size_t number = how.dtype == fastnuggets::Dtype::float64 ? sizeof(double) : sizeof(float);
  const std::size_t bytes = std::size_t(multiband_scratch(how.shape, parts, how.levels)) * number;
  std::unique_ptr<char[]> made(new char[bytes]);
  std::memset(made.get(), 0xFF, bytes);
  return made;
}

}  // namespace

extern "C" {

const char* filter_taps(const FilterTaps& how) {
  return guarded([&] { cuda::taps(how, nullptr); });
}
const char* filter_step(const PyramidStep& how) {
  return guarded([&] { cuda::step(how, nullptr); });
}
const char* filter_multiband(Multiband& how) {
  const auto memory = scratch(how, kForwardParts);
  how.scratch = memory.get();
  return guarded([&] { cuda::multiband(how, nullptr); });
}
const char* filter_multiband_backward(MultibandBackward& how) {
  const auto memory = scratch(how.forward, kBackwardParts);
  how.forward.scratch = memory.get();
  return guarded([&] { cuda::multiband_backward(how, nullptr); });
}
}
