// CUDA glue of filters: the current stream, and the kernels' place in the registry. The op has made the tensors' device
// the current one and allocated the scratch.
#include "blend/filter_cuda.h"

#include <c10/cuda/CUDAStream.h>

#include "blend/filter_op.h"

namespace fastnuggets::filter {
namespace {

template <class How, void (*launch)(const How&, cudaStream_t)>
void on_device(const How& how) {
  launch(how, c10::cuda::getCurrentCUDAStream());
}

const Kernels kCuda{&on_device<FilterTaps, cuda::taps>, &on_device<PyramidStep, cuda::step>,
                    &on_device<Multiband, cuda::multiband>, &on_device<MultibandBackward, cuda::multiband_backward>};
const Register kRegistered(at::kCUDA, kCuda);

}  // namespace
}  // namespace fastnuggets::filter
