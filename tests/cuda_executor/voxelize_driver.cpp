// voxelize_kernels.cu for ctypes: device pointers are pointers, the stream is none.
#include "driver.h"
#include "voxelize/voxelize_cuda.h"

using namespace fastnuggets;

extern "C" {

// Eight bytes a field, so that the other side needs no rules of alignment. Numbers are float, or double if is_double.
struct Call {
  int64_t is_double, is_dual;
  const void* coords;
  const int64_t *ptr, *channel;
  const void *weight, *size, *omega;
  int64_t weight_strides[2], size_strides[2], omega_strides[2];
  const void *center, *rotation, *translation;
  int64_t posed, B, K, N, C;
  const void* tangent[4];
  int64_t shape[3];
  double spacing[3];
  int64_t density, combine;
  double cutoff;
};
}

namespace {

template <class T>
struct Run {
  using R = Real<T>;
  cuda::CudaJob<T> job;
  std::unique_ptr<char[]> workspace;

  explicit Run(const Call& c) {
    const auto real = [](const void* p) { return static_cast<const R*>(p); };
    job.m = {real(c.coords),
             c.ptr,
             c.channel,
             {real(c.weight), c.weight_strides[0], c.weight_strides[1]},
             {real(c.size), c.size_strides[0], c.size_strides[1]},
             {real(c.omega), c.omega_strides[0], c.omega_strides[1]},
             real(c.center),
             real(c.rotation),
             real(c.translation),
             c.posed != 0,
             c.B,
             c.K,
             c.N,
             c.C};
    job.tangent = {real(c.tangent[0]), real(c.tangent[1]), real(c.tangent[2]), real(c.tangent[3])};
    job.grid = {{c.shape[0], c.shape[1], c.shape[2]},
                {c.spacing[0], c.spacing[1], c.spacing[2]},
                Density(c.density),
                Combine(c.combine),
                c.cutoff};
    const std::size_t bytes = cuda::workspace_bytes<T>(job.m);
    workspace.reset(new char[bytes]);
    std::memset(workspace.get(), 0xFF, bytes);
    job.workspace = workspace.get();
    job.stream = nullptr;
  }
};

template <class Body>
const char* for_type(const Call& c, Body body) {
  return guarded([&] {
    if (c.is_double && c.is_dual) return body(Run<Dual<double>>(c));
    if (c.is_double) return body(Run<double>(c));
    if (c.is_dual) return body(Run<Dual<float>>(c));
    return body(Run<float>(c));
  });
}

}  // namespace

extern "C" {

const char* forward(const Call* c, void* out, int64_t dtype) {
  return for_type(*c, [&](const auto& run) { cuda::voxelize_forward(run.job, out, cuda::Dtype(dtype)); });
}

const char* backward(const Call* c, const void* grad, int64_t dtype, void* const* to) {
  return for_type(*c, [&]<class T>(const Run<T>& run) {
    using R = Real<T>;
    cuda::voxelize_backward(
        run.job, grad, cuda::Dtype(dtype),
        {static_cast<R*>(to[0]), static_cast<R*>(to[1]), static_cast<R*>(to[2]), static_cast<R*>(to[3])});
  });
}

int64_t sparse_tiles(const Call* c) { return cuda::sparse_tiles(c->B * c->K, c->C, Run<float>(*c).job.grid); }

const char* sparse_count(const Call* c, int64_t* counts) {
  return guarded([&] {
    c->is_double ? cuda::voxelize_sparse_count(Run<double>(*c).job, counts)
                 : cuda::voxelize_sparse_count(Run<float>(*c).job, counts);
  });
}

const char* sparse_write(const Call* c, const int64_t* before, int64_t total, int64_t* places, void* values) {
  return guarded([&] {
    c->is_double ? cuda::voxelize_sparse_write(Run<double>(*c).job, before, total, places, static_cast<double*>(values))
                 : cuda::voxelize_sparse_write(Run<float>(*c).job, before, total, places, static_cast<float*>(values));
  });
}

const char* segment_sum(const double* x, const int64_t* ptr, int64_t segments, int64_t width, double* out) {
  return guarded([&] { cuda::segment_sum(x, ptr, segments, width, out, nullptr); });
}

const char* segment_expand(const double* y, const int64_t* ptr, int64_t segments, int64_t N, int64_t width,
                           double* out) {
  return guarded([&] { cuda::segment_expand(y, ptr, segments, N, width, out, nullptr); });
}
}
