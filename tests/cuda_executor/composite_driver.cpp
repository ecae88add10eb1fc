// composite_kernels.cu for ctypes, with composite.h's own structs: device pointers are pointers, the stream is none.
// Scratch is not a byte larger than asked for, and poisoned.
#include <cstring>
#include <memory>

#include "blend/composite_cuda.h"
#include "driver.h"

using namespace fastnuggets::composite;

namespace {

template <class How>
const char* run(const How& how, void (*launch)(const How&, void*, cudaStream_t)) {
  return guarded([&] {
    const std::size_t bytes = cuda::scratch_bytes(how);
    const std::unique_ptr<char[]> scratch(new char[bytes]);
    std::memset(scratch.get(), cuda_executor::kPoison, bytes);
    launch(how, scratch.get(), nullptr);
  });
}

}  // namespace

extern "C" {

const char* composite_forward(const Composite& how) { return run(how, cuda::composite); }
const char* composite_backward(const CompositeBackward& how) { return run(how, cuda::composite_backward); }
}
