// CUDA glue of compositing: scratch, the current stream, and the kernels' place in the registry. The op has made the
// tensors' device the current one.
#include "blend/composite_cuda.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>

#include "blend/composite_op.h"

namespace fastnuggets::composite {
namespace {

// The scratch goes back when the call returns: the allocator gives it again only to what follows on this stream.
template <class How, void (*launch)(const How&, void*, cudaStream_t)>
void with_scratch(const How& how) {
  const auto bytes = std::int64_t(cuda::scratch_bytes(how));
  const at::Tensor scratch = at::empty({bytes}, at::TensorOptions(at::kCUDA).dtype(at::kByte));
  launch(how, scratch.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
}

const Kernels kCuda{&with_scratch<Composite, cuda::composite>,
                    &with_scratch<CompositeBackward, cuda::composite_backward>};
const Register kRegistered(at::kCUDA, kCuda);

}  // namespace
}  // namespace fastnuggets::composite
