// sample_kernels.cu for ctypes, with sample.h's own structs: device pointers are pointers, the stream is none. Scratch
// is not a byte larger than asked for.
#include <memory>

#include "driver.h"
#include "sample/sample_cuda.h"

using namespace fastnuggets::sample;

namespace {

// Of as many bytes as asked for, or of so many if that is less.
class Memory {
 public:
  explicit Memory(std::size_t asked, std::size_t most = SIZE_MAX) : bytes_(asked < most ? asked : most) {
    if (bytes_ == 0) return;
    data_.reset(new char[bytes_]);
    std::memset(data_.get(), cuda_executor::kPoison, bytes_);
  }
  operator cuda::Scratch() const { return {data_.get(), bytes_}; }

 private:
  std::size_t bytes_;
  std::unique_ptr<char[]> data_;
};

}  // namespace

extern "C" {

const char* sample_scaled_noise(const ScaledNoise& how) {
  return guarded([&] { cuda::scaled_noise(how, nullptr); });
}
const char* sample_normal(const Normal& how) {
  return guarded([&] { cuda::normal(how, Memory(cuda::scratch_bytes(how)), nullptr); });
}
const char* sample_normal_backward(const NormalBackward& how) {
  return guarded([&] { cuda::normal_backward(how, nullptr); });
}
const char* sample_gumbel_softmax(const GumbelSoftmax& how, std::size_t most_bytes) {
  return guarded([&] { cuda::gumbel_softmax(how, Memory(cuda::scratch_bytes(how), most_bytes), nullptr); });
}
const char* sample_gumbel_softmax_backward(const GumbelSoftmaxBackward& how) {
  return guarded([&] { cuda::gumbel_softmax_backward(how, nullptr); });
}
const char* sample_log_uniform(const LogUniform& how) {
  return guarded([&] { cuda::log_uniform(how, Memory(cuda::scratch_bytes(how)), nullptr); });
}
}
