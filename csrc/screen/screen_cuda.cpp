// CUDA glue of the search: scratch, the device's current stream, and the kernels' place in the registry.
#include "screen/screen_cuda.h"

#include "common/cuda_glue.h"
#include "screen/screen_op.h"

namespace fastnuggets::screen {
namespace {

// Rows of a view may begin at any byte.
at::Tensor aligned(const void* data, std::int64_t rows, const Search& how, const at::Tensor& like) {
  if (reinterpret_cast<std::uintptr_t>(data) % 8 == 0) return {};
  const std::size_t bytes = std::size_t(rows * how.W) * 8;
  const at::Tensor copy = scratch(bytes, like);
  C10_CUDA_CHECK(cudaMemcpyAsync(copy.mutable_data_ptr(), data, bytes, cudaMemcpyDeviceToDevice,
                                 c10::cuda::getCurrentCUDAStream()));
  return copy;
}

void search(const Search& given, const at::Tensor& like) {
  TORCH_CHECK_VALUE(given.k <= kMostOnDevice, "tanimoto_topk: k must be at most ", kMostOnDevice, " on ", like.device(),
                    ", got ", given.k);
  const c10::cuda::CUDAGuard device(like.device());
  Search how = given;
  const at::Tensor queries = aligned(how.queries, how.Q, how, like), rows = aligned(how.database, how.N, how, like);
  if (queries.defined()) how.queries = queries.const_data_ptr();
  if (rows.defined()) how.database = rows.const_data_ptr();
  const at::Tensor room = scratch(cuda::scratch_bytes(how), like);
  cuda::search(how, room.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
}

const Kernels kCuda{&search};
const Register kRegistered(at::kCUDA, kCuda);

}  // namespace
}  // namespace fastnuggets::screen
