// The CPU ops: allocation, threads, and where finished rows go. The kernels are in voxelize_cpu_kernels.h.
#include "voxelize/voxelize_cpu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "common/cpu.h"
#include "voxelize/voxelize_args.h"

namespace fastnuggets {

namespace {

// ---- where rows go

// Converts and writes rows to the output, and zeros wherever no row comes; given `filled`, only where it says that
// something else may stand.
template <class R>
class DenseSink final : public Sink<R> {
 public:
  DenseSink(at::Tensor& out, std::int32_t* filled, const Grid& grid, bool streaming)
      : data_(static_cast<char*>(out.mutable_data_ptr())),
        filled_(filled),
        dtype_(out.scalar_type()),
        bytes_(std::int64_t(out.element_size())),
        grid_(grid),
        streaming_(streaming) {}

  void begin(std::int64_t volume, Window planes) {
    channel_ = volume * grid_.shape[0];
    plane_ = planes.first;
    last_ = planes.last;
    written_ = at(planes.first, 0);
  }
  void rows(std::int64_t plane, int first, int last, const R* values) override {
    clear_before(plane);
    if (filled_ != nullptr) clear_around(plane, first, last);
    const std::int64_t start = at(plane, first);
    const std::int64_t count = (last - first + 1) * grid_.shape[2];
    if (filled_ == nullptr) zeros(written_, start);
    copy(data_ + start, values, count);
    written_ = start + count * bytes_;
    plane_ = plane + 1;
  }
  void end() {
    clear_before(last_ + 1);
    if (filled_ == nullptr) zeros(written_, at(last_ + 1, 0));
    if (streaming_) stream_end();
  }

 private:
  std::int64_t at(std::int64_t plane, std::int64_t row) const {
    return ((channel_ + plane) * grid_.shape[1] + row) * grid_.shape[2] * bytes_;
  }
  void zeros(std::int64_t from, std::int64_t until) {
    if (until <= from) return;
    if (streaming_)
      stream_zeros(data_ + from, std::size_t(until - from));
    else
      std::memset(data_ + from, 0, std::size_t(until - from));
  }
  void clear_before(std::int64_t plane) {
    for (; filled_ != nullptr && plane_ < plane; ++plane_) clear_around(plane_, 0, -1);
  }
  // Clears what was filled outside rows first..last of a plane, and notes that these are filled now.
  void clear_around(std::int64_t plane, int first, int last) {
    std::int32_t* old = filled_ + 2 * (channel_ + plane);
    const int end = old[1] + 1;
    if (last < first) {
      zeros(at(plane, old[0]), at(plane, end));
    } else {
      zeros(at(plane, old[0]), at(plane, std::min(first, end)));
      zeros(at(plane, std::max(last + 1, old[0])), at(plane, end));
    }
    old[0] = first;
    old[1] = last;
  }
  template <class S>
  const char* converted(const R* values, std::int64_t count) {
    buffer_.resize(count * sizeof(S));
    S* to = reinterpret_cast<S*>(buffer_.data());
    for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<S>(values[i]);
    return buffer_.data();
  }
  const char* in_output_type(const R* values, std::int64_t count) {
    switch (dtype_) {
      case at::kHalf:
        return converted<at::Half>(values, count);
      case at::kBFloat16:
        return converted<at::BFloat16>(values, count);
      case at::kFloat:
        return converted<float>(values, count);
      default:
        return converted<double>(values, count);
    }
  }
  void copy(char* to, const R* values, std::int64_t count) {
    const char* from = dtype_ == c10::CppTypeToScalarType<R>::value ? reinterpret_cast<const char*>(values)
                                                                    : in_output_type(values, count);
    if (streaming_)
      stream_copy(to, from, std::size_t(count * bytes_));
    else
      std::memcpy(to, from, std::size_t(count * bytes_));
  }

  char* data_;
  std::int32_t* filled_;
  at::ScalarType dtype_;
  std::int64_t bytes_;
  const Grid& grid_;
  bool streaming_;
  std::int64_t channel_ = 0, plane_ = 0, last_ = 0, written_ = 0;
  std::vector<char> buffer_;
};

// Keeps the voxels that are not zero, with their place in the channel.
template <class R>
class SparseSink final : public Sink<R> {
 public:
  explicit SparseSink(const Grid& grid) : grid_(grid) {}
  void rows(std::int64_t plane, int first, int last, const R* values) override {
    const std::int64_t start = (plane * grid_.shape[1] + first) * grid_.shape[2];
    const std::int64_t count = (last - first + 1) * grid_.shape[2];
    for (std::int64_t i = 0; i < count; ++i) {
      if (values[i] == R(0)) continue;
      voxels.push_back(start + i);
      kept.push_back(values[i]);
    }
  }
  std::vector<std::int64_t> voxels;
  std::vector<R> kept;

 private:
  const Grid& grid_;
};

// ---- checks that look at the data

template <class R>
void check_molecules(const Molecules<R>& m) {
  TORCH_CHECK_VALUE(m.ptr[0] == 0 && m.ptr[m.B] == m.N, "ptr must run from 0 to the number of atoms ", m.N,
                    ", it runs from ", m.ptr[0], " to ", m.ptr[m.B]);
  for (std::int64_t b = 0; b < m.B; ++b)
    TORCH_CHECK_VALUE(m.ptr[b] <= m.ptr[b + 1], "ptr must ascend, ptr[", b, "] = ", m.ptr[b], " is followed by ",
                      m.ptr[b + 1]);
  for (std::int64_t n = 0; m.channel != nullptr && n < m.N; ++n)
    TORCH_CHECK_VALUE(m.channel[n] >= 0 && m.channel[n] < m.C, "channels must be in 0..", m.C - 1,
                      " (num_channels = ", m.C, "), atom ", n, " has ", m.channel[n]);
  const std::int64_t numbers = m.N * 3 * (m.posed ? m.K : 1);
  for (std::int64_t i = 0; i < numbers; ++i)
    TORCH_CHECK_VALUE(std::isfinite(m.coords[i]), "coords must be finite, atom ", i / (numbers / m.N), " has ",
                      m.coords[i]);
}

// ---- launch

// The planes of a channel are shared out only when there are too few channels to go round.
std::int64_t slabs_for(std::int64_t volumes, const Grid& grid) {
  const std::int64_t wanted = 4 * at::get_num_threads();
  if (volumes == 0 || volumes >= wanted) return 1;
  return std::max<std::int64_t>(1, std::min(grid.shape[0], (wanted + volumes - 1) / volumes));
}

// Calls f(unit, volume index) for every slab of every channel of every grid, on all threads.
template <class F>
void for_units(std::int64_t volumes, std::int64_t channels, const Grid& grid, std::int64_t slabs, F f) {
  const std::int64_t thick = (grid.shape[0] + slabs - 1) / slabs;
  const std::int64_t grain = std::max<std::int64_t>(1, 32768 / std::max<std::int64_t>(1, grid.voxels() / slabs));
  at::parallel_for(0, volumes * slabs, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t u = begin; u < end; ++u) {
      const std::int64_t volume = u / slabs, first = u % slabs * thick;
      const std::int64_t last = std::min(first + thick, grid.shape[0]) - 1;
      if (first <= last) f(Unit{volume / channels, volume % channels, {int(first), int(last)}}, volume);
    }
  });
}

template <class T>
void forward(const Job<Real<T>>& job, at::Tensor& out, std::int32_t* filled = nullptr) {
  const ForwardKernel<T> kernel = kernels<T>(job.grid.density).forward;
  const std::int64_t volumes = job.m.B * job.m.K * job.m.C;
  const bool streaming = out.nbytes() > stream_from();
  for_units(volumes, job.m.C, job.grid, slabs_for(volumes, job.grid), [&](Unit unit, std::int64_t volume) {
    DenseSink<Real<T>> sink(out, filled, job.grid, streaming);
    sink.begin(volume, unit.planes);
    kernel(job, unit, sink);
    sink.end();
  });
}

template <class T>
void backward(const Job<Real<T>>& job, const at::Tensor& grad, const Gradients<Real<T>>& to) {
  const BackwardKernel<T> kernel = kernels<T>(job.grid.density).backward;
  const GradientRows<Real<T>> rows{grad.const_data_ptr(), grad.scalar_type()};
  const Molecules<Real<T>>& m = job.m;
  constexpr std::int64_t kAtomsPerTask = 8;
  at::parallel_for(0, m.N, kAtomsPerTask, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t b = std::upper_bound(m.ptr, m.ptr + m.B + 1, begin) - m.ptr - 1;
    for (std::int64_t n = begin; n < end; ++n) {
      while (n >= m.ptr[b + 1]) ++b;
      kernel(job, rows, to, b, n);
    }
  });
}

// ---- ops

template <class R>
void voxelize_into(at::Tensor& out, const MoleculeTensors& t, const Grid& grid, std::int32_t* filled) {
  const Job<R> job{t.view<R>(), {}, grid};
  check_molecules(job.m);
  forward<R>(job, out, filled);
}

at::Tensor new_grid(const MoleculeTensors& t, const Grid& grid, at::ScalarType dtype) {
  at::Tensor out = at::empty({t.grids(), t.channels(), grid.shape[0], grid.shape[1], grid.shape[2]},
                             t.coords.options().dtype(dtype));
  ask_for_huge_pages(out.mutable_data_ptr(), out.nbytes());
  return out;
}

void fill(at::Tensor& out, const MoleculeTensors& t, const Grid& grid, std::int32_t* filled = nullptr) {
  if (t.coords.scalar_type() == at::kDouble)
    voxelize_into<double>(out, t, grid, filled);
  else
    voxelize_into<float>(out, t, grid, filled);
}

at::Tensor voxelize_cpu(FN_MOLECULES, FN_POSE, at::IntArrayRef shape, FN_RULE, at::ScalarType dtype) {
  check_new_grid(coords, ptr, channel, weight, size, omega, center, rotation, translation, shape, spacing, density,
                 combine, cutoff, dtype);
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega, center, rotation, translation);
  const Grid grid = make_grid(Pass::value, shape, spacing, density, combine, cutoff);
  at::Tensor out = new_grid(t, grid, dtype);
  fill(out, t, grid);
  return out;
}

void voxelize_into_cpu(at::Tensor& out, FN_MOLECULES, FN_POSE, FN_RULE, const OptionalTensor& filled) {
  check_into(out, coords, ptr, channel, weight, size, omega, center, rotation, translation, spacing, density, combine,
             cutoff, filled);
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega, center, rotation, translation);
  fill(out, t, make_grid(Pass::value, out.sizes().slice(2), spacing, density, combine, cutoff),
       given(filled) ? filled->mutable_data_ptr<int>() : nullptr);
}

template <class R>
std::tuple<at::Tensor, at::Tensor> sparse(const MoleculeTensors& t, const Grid& grid) {
  const Job<R> job{t.view<R>(), {}, grid};
  check_molecules(job.m);
  const ForwardKernel<R> kernel = kernels<R>(grid.density).forward;
  const std::int64_t volumes = t.grids() * t.channels(), slabs = slabs_for(volumes, grid);
  const std::int64_t thick = (grid.shape[0] + slabs - 1) / slabs;
  std::vector<SparseSink<R>> parts(volumes * slabs, SparseSink<R>(grid));
  for_units(volumes, t.channels(), grid, slabs, [&](Unit unit, std::int64_t volume) {
    kernel(job, unit, parts[volume * slabs + unit.planes.first / thick]);
  });
  std::int64_t filled = 0;
  for (const SparseSink<R>& part : parts) filled += std::int64_t(part.voxels.size());
  at::Tensor indices = at::empty({5, filled}, t.ptr.options()), values = at::empty({filled}, t.coords.options());
  std::int64_t* index = indices.mutable_data_ptr<int64_t>();
  R* value = values.mutable_data_ptr<R>();
  const std::int64_t height = grid.shape[1], width = grid.shape[2];
  std::int64_t i = 0;
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const std::int64_t volume = std::int64_t(p) / slabs;
    for (std::size_t j = 0; j < parts[p].voxels.size(); ++j, ++i) {
      const std::int64_t voxel = parts[p].voxels[j];
      const std::int64_t at[5] = {volume / t.channels(), volume % t.channels(), voxel / (height * width),
                                  voxel / width % height, voxel % width};
      for (int a = 0; a < 5; ++a) index[a * filled + i] = at[a];
      value[i] = parts[p].kept[j];
    }
  }
  return {indices, values};
}

std::tuple<at::Tensor, at::Tensor> voxelize_sparse_cpu(FN_MOLECULES, FN_POSE, at::IntArrayRef shape, FN_RULE,
                                                       at::ScalarType dtype) {
  check_new_grid(coords, ptr, channel, weight, size, omega, center, rotation, translation, shape, spacing, density,
                 combine, cutoff, dtype);
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega, center, rotation, translation);
  const Grid grid = make_grid(Pass::value, shape, spacing, density, combine, cutoff);
  auto [indices, values] = t.coords.scalar_type() == at::kDouble ? sparse<double>(t, grid) : sparse<float>(t, grid);
  return {indices, values.to(dtype)};
}

// A gradient that is wanted, or an empty tensor.
at::Tensor new_gradient(bool wanted, at::IntArrayRef sizes, const at::Tensor& like) {
  return wanted ? at::zeros(sizes, like.options()) : at::empty({0}, like.options());
}

template <class R>
R* data_if(bool wanted, at::Tensor& t) {
  return wanted ? t.mutable_data_ptr<R>() : nullptr;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> voxelize_backward_cpu(const at::Tensor& grad, FN_MOLECULES,
                                                                                 FN_RULE, std::array<bool, 4> wanted) {
  check_backward(grad, coords, ptr, channel, weight, size, omega, spacing, density, combine, cutoff);
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega);
  const at::Tensor g = grad.contiguous();
  const Grid grid = make_grid(Pass::slope, g.sizes().slice(2), spacing, density, combine, cutoff);
  at::Tensor to[4] = {new_gradient(wanted[0], coords.sizes(), weight), new_gradient(wanted[1], weight.sizes(), weight),
                      new_gradient(wanted[2], weight.sizes(), weight), new_gradient(wanted[3], weight.sizes(), weight)};
  const auto run = [&]<class R>(R) {
    const Job<R> job{t.view<R>(), {}, grid};
    check_molecules(job.m);
    backward<R>(job, g,
                {data_if<R>(wanted[0], to[0]), data_if<R>(wanted[1], to[1]), data_if<R>(wanted[2], to[2]),
                 data_if<R>(wanted[3], to[3])});
  };
  coords.scalar_type() == at::kDouble ? run(double()) : run(float());
  return {to[0], to[1], to[2], to[3]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> voxelize_double_backward_cpu(
    const OptionalTensor& position_tangent, const OptionalTensor& weight_tangent, const OptionalTensor& size_tangent,
    const OptionalTensor& omega_tangent, const at::Tensor& grad, FN_MOLECULES, FN_RULE) {
  check_backward(grad, coords, ptr, channel, weight, size, omega, spacing, density, combine, cutoff);
  const MoleculeTensors t(coords, ptr, channel, weight, size, omega);
  const OptionalTensor along[4] = {
      MoleculeTensors::contiguous(position_tangent), MoleculeTensors::contiguous(weight_tangent),
      MoleculeTensors::contiguous(size_tangent), MoleculeTensors::contiguous(omega_tangent)};
  const at::Tensor g = grad.contiguous();
  const Grid grid = make_grid(Pass::slope, g.sizes().slice(2), spacing, density, combine, cutoff);
  at::Tensor grid_gradient = at::empty(g.sizes(), g.options());
  at::Tensor to[4] = {at::zeros(coords.sizes(), weight.options()), at::zeros(weight.sizes(), weight.options()),
                      at::zeros(weight.sizes(), weight.options()), at::zeros(weight.sizes(), weight.options())};
  const auto run = [&]<class R>(R) {
    const Tangent<R> tangent{data_or_null<R>(along[0]), data_or_null<R>(along[1]), data_or_null<R>(along[2]),
                             data_or_null<R>(along[3])};
    const Job<R> job{t.view<R>(), tangent, grid};
    check_molecules(job.m);
    forward<Dual<R>>(job, grid_gradient);
    backward<Dual<R>>(job, g,
                      {to[0].mutable_data_ptr<R>(), to[1].mutable_data_ptr<R>(), to[2].mutable_data_ptr<R>(),
                       to[3].mutable_data_ptr<R>()});
  };
  coords.scalar_type() == at::kDouble ? run(double()) : run(float());
  return {grid_gradient, to[0], to[1], to[2], to[3]};
}

// ---- sums over the atoms of a molecule, and back

void check_ptr(const int64_t* ptr, int64_t segments, int64_t n) {
  TORCH_CHECK_VALUE(ptr[0] == 0 && ptr[segments] == n && std::is_sorted(ptr, ptr + segments + 1),
                    "ptr must ascend from 0 to ", n);
}

at::Tensor segment_sum_cpu(const at::Tensor& x, const at::Tensor& ptr) {
  check_segments("x", x, ptr);
  const at::Tensor from = x.contiguous();
  const at::Tensor bounds = ptr.contiguous();
  const int64_t* p = bounds.const_data_ptr<int64_t>();
  const int64_t segments = ptr.size(0) - 1, width = x.size(1);
  check_ptr(p, segments, x.size(0));
  at::Tensor out = at::empty({segments, width}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "segment_sum", [&] {
    const scalar_t* data = from.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t j = 0; j < width; ++j) {
        double sum = 0;
        for (int64_t i = p[s]; i < p[s + 1]; ++i) sum += data[i * width + j];
        to[s * width + j] = scalar_t(sum);
      }
  });
  return out;
}

at::Tensor segment_expand_cpu(const at::Tensor& y, const at::Tensor& ptr, int64_t n) {
  check_expansion(y, ptr);
  const at::Tensor from = y.contiguous();
  const at::Tensor bounds = ptr.contiguous();
  const int64_t* p = bounds.const_data_ptr<int64_t>();
  const int64_t segments = ptr.size(0) - 1, width = y.size(1);
  check_ptr(p, segments, n);
  at::Tensor out = at::empty({n, width}, y.options());
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "segment_expand", [&] {
    const scalar_t* data = from.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    for (int64_t s = 0; s < segments; ++s)
      for (int64_t i = p[s]; i < p[s + 1]; ++i) std::copy_n(data + s * width, width, to + i * width);
  });
  return out;
}

}  // namespace
}  // namespace fastnuggets

TORCH_LIBRARY_IMPL(fastnuggets, CPU, m) {
  m.impl("voxelize", &fastnuggets::voxelize_cpu);
  m.impl("voxelize_", &fastnuggets::voxelize_into_cpu);
  m.impl("voxelize_sparse", &fastnuggets::voxelize_sparse_cpu);
  m.impl("voxelize_backward", &fastnuggets::voxelize_backward_cpu);
  m.impl("voxelize_double_backward", &fastnuggets::voxelize_double_backward_cpu);
  m.impl("segment_sum", &fastnuggets::segment_sum_cpu);
  m.impl("segment_expand", &fastnuggets::segment_expand_cpu);
}
