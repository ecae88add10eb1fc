// poisson_kernels.cu for ctypes, with poisson.h's own structs: device pointers are pointers, the stream is none.
// Scratch is not a byte larger than asked for, or of `most_bytes` if that is less.
#include <memory>

#include "blend/poisson_cuda.h"
#include "driver.h"

using namespace fastnuggets::poisson;

namespace {

template <class How, class Run>
const char* with_scratch(const How& how, int shared, std::size_t most_bytes, Run run) {
  return guarded([&] {
    const std::size_t asked = cuda::scratch_bytes(how, shared), bytes = asked < most_bytes ? asked : most_bytes;
    const std::unique_ptr<char[]> data(new char[bytes]);
    std::memset(data.get(), cuda_executor::kPoison, bytes);
    run(how, shared, cuda::Scratch{data.get(), bytes}, nullptr);
  });
}

}  // namespace

extern "C" {

const char* poisson_blend(const Blend& how, int shared, std::size_t most_bytes) {
  return with_scratch(how, shared, most_bytes, [](auto... args) { cuda::blend(args...); });
}
const char* poisson_blend_backward(const BlendBackward& how, int shared, std::size_t most_bytes) {
  return with_scratch(how, shared, most_bytes, [](auto... args) { cuda::blend_backward(args...); });
}
std::size_t poisson_scratch_bytes(const Blend& how, int shared) { return cuda::scratch_bytes(how, shared); }
}
