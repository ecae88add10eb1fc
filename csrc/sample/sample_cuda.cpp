// CUDA glue of sampling: scratch, the current stream, and the kernels' place in the registry. The op has made the
// tensors' device the current one.
#include "sample/sample_cuda.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>

#include "sample/sample_op.h"

namespace fastnuggets::sample {
namespace {

template <class How, void (*launch)(const How&, cudaStream_t)>
void on_device(const How& how) {
  launch(how, c10::cuda::getCurrentCUDAStream());
}

// The scratch goes back when the call returns: the allocator gives it again only to what follows on this stream.
template <class How, void (*launch)(const How&, cuda::Scratch, cudaStream_t)>
void with_scratch(const How& how) {
  const std::size_t bytes = cuda::scratch_bytes(how);
  at::Tensor scratch;
  if (bytes > 0) scratch = at::empty({std::int64_t(bytes)}, at::TensorOptions(at::kCUDA).dtype(at::kByte));
  launch(how, {bytes > 0 ? scratch.mutable_data_ptr() : nullptr, bytes}, c10::cuda::getCurrentCUDAStream());
}

const Kernels kCuda{&on_device<ScaledNoise, cuda::scaled_noise>,
                    &with_scratch<Normal, cuda::normal>,
                    &on_device<NormalBackward, cuda::normal_backward>,
                    &with_scratch<GumbelSoftmax, cuda::gumbel_softmax>,
                    &on_device<GumbelSoftmaxBackward, cuda::gumbel_softmax_backward>,
                    &with_scratch<LogUniform, cuda::log_uniform>};
const Register kRegistered(at::kCUDA, kCuda);

}  // namespace
}  // namespace fastnuggets::sample
