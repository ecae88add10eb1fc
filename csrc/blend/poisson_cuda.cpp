// CUDA glue of Poisson blending: scratch, the current stream, the device's shared memory, and the kernels' place in the
// registry. The op has made the tensors' device the current one.
#include "blend/poisson_cuda.h"

#include <c10/cuda/CUDAException.h>

#include "blend/poisson_op.h"
#include "common/cuda_glue.h"

namespace fastnuggets::poisson {
namespace {

// The scratch goes back when the call returns: the allocator gives it again only to what follows on this stream.
template <class How, void (*launch)(const How&, cuda::Shared, cuda::Scratch, cudaStream_t)>
void on_device(const How& how) {
  int shared = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, c10::cuda::current_device()));
  const std::size_t bytes = cuda::scratch_bytes(how, shared);
  at::Tensor scratch;
  if (bytes > 0) scratch = at::empty({std::int64_t(bytes)}, at::TensorOptions(at::kCUDA).dtype(at::kByte));
  launch(how, shared, {bytes > 0 ? scratch.mutable_data_ptr() : nullptr, bytes}, c10::cuda::getCurrentCUDAStream());
}

const Kernels kCuda{&on_device<Blend, cuda::blend>, &on_device<BlendBackward, cuda::blend_backward>};
const Register kRegistered(at::kCUDA, kCuda);

}  // namespace
}  // namespace fastnuggets::poisson
