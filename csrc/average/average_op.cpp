// Schemas, checks and the tables of tensors of the averages. They write in place and have no derivative.
#include "average/average_op.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "common/op.h"

namespace fastnuggets::average {
namespace {

const Kernels& kernels(const Table& table) { return kernels_on<Kernels>(table.device()); }

bool full_precision(const at::Tensor& t) { return t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble; }

// Which type a tensor of such a column must have, if `t` has another; null if it is right.
const char* wrong_type(Kind kind, const at::Tensor& t, const at::Tensor& first) {
  switch (kind) {
    case Kind::number:
      return at::isFloatingType(t.scalar_type()) && dtype_of(t.scalar_type()) ? nullptr
                                                                              : "float32, float64, float16 or bfloat16";
    case Kind::full:
    case Kind::ring:
      return full_precision(t) ? nullptr : "float32 or float64";
    case Kind::remainder:
      return t.scalar_type() == at::kShort ? nullptr : "int16";
    case Kind::like_first:
      return t.scalar_type() == first.scalar_type() ? nullptr : c10::toString(first.scalar_type());
  }
  return nullptr;
}

// Whether each has its elements at the same places as the other.
bool same_layout(at::IntArrayRef sizes, at::IntArrayRef strides, at::IntArrayRef others) {
  for (std::size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] > 1 && strides[i] != others[i]) return false;
  return true;
}

std::vector<std::int64_t> with_rows(std::int64_t rows, at::IntArrayRef rest) {
  std::vector<std::int64_t> all{rows};
  all.insert(all.end(), rest.begin(), rest.end());
  return all;
}

// How a tensor of the column has to lie, given the row's first tensor.
bool lies_well(Kind kind, const at::Tensor& t, const at::Tensor& first) {
  if (first.numel() == 0) return true;
  if (kind == Kind::ring) return same_layout(t.sizes(), t.strides(), with_rows(first.numel(), first.strides()));
  if (t.is_contiguous() && first.is_contiguous()) return true;
  return same_layout(t.sizes(), t.strides(), first.strides());
}

at::Tensor room_for(Kind kind, const at::Tensor& t, const at::Tensor& first) {
  if (kind != Kind::ring) return at::empty_strided(t.sizes(), first.strides(), t.options());
  return at::empty_strided(t.sizes(), with_rows(first.numel(), first.strides()), t.options());
}

void check_cell(const char* op, const Column& column, const Column& first, std::size_t row, at::Device device) {
  const at::Tensor &t = column.tensors[row], &f = first.tensors[row];
  TORCH_CHECK_VALUE(t.device() == device, op, ": ", column.name, "[", row, "] must be on ", device, ", got ",
                    t.device());
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, op, ": ", column.name, "[", row, "] must be a dense tensor, got ",
                    t.layout());
  if (column.kind == Kind::ring) {
    TORCH_CHECK_VALUE(t.dim() == f.dim() + 1 && t.sizes().slice(1) == f.sizes(), op, ": ", column.name, "[", row,
                      "] must be [K, *", f.sizes(), "], got ", t.sizes());
  } else {
    TORCH_CHECK_VALUE(t.sizes() == f.sizes(), op, ": ", column.name, "[", row, "] must be ", f.sizes(), " like ",
                      first.name, "[", row, "], got ", t.sizes());
  }
  const char* must = wrong_type(column.kind, t, f);
  TORCH_CHECK_TYPE(must == nullptr, op, ": ", column.name, "[", row, "] must be ", must, ", got ", t.scalar_type());
}

void* address(const at::Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }

}  // namespace

Table::Table(const char* op, std::vector<Column> columns, at::IntArrayRef streams) {
  const Column& first = columns[0];
  const std::size_t R = first.tensors.size(), C = columns.size();
  for (const Column& column : columns)
    TORCH_CHECK_VALUE(column.tensors.size() == R, op, ": ", column.name, " must be ", R, " tensors like ", first.name,
                      ", got ", column.tensors.size());
  TORCH_CHECK_VALUE(streams.empty() || streams.size() == R, op, ": streams must be ", R, " numbers, got ",
                    streams.size());
  if (R > 0) device_ = first.tensors[0].device();
  tensors_.reserve(R * C);
  first_block_.push_back(0);
  for (std::size_t r = 0; r < R; ++r) {
    for (const Column& column : columns) add(op, column, first, r);
    const std::int64_t stream = streams.empty() ? std::int64_t(r) : streams[r];
    TORCH_CHECK_VALUE(stream >= 0 && stream <= 0xFFFFFFFF, op, ": streams must be in 0..2^32-1, got ", stream);
    streams_.push_back(std::uint32_t(stream));
    numel_.push_back(first.tensors[r].numel());
    elements_ += numel_.back();
    first_block_.push_back(first_block_.back() + (numel_.back() + kBlock - 1) / kBlock);
  }
  rows_ = {numel_.data(), first_block_.data(), data_.data(), dtypes_.data(), streams_.data(), std::int64_t(R), int(C)};
  check_overlaps(op);
}

void Table::add(const char* op, const Column& column, const Column& first, std::size_t row) {
  check_cell(op, column, first, row, device_);
  const at::Tensor &t = column.tensors[row], &f = first.tensors[row];
  const bool is_first = &column == &first;
  TORCH_CHECK_VALUE(!is_first || t.is_non_overlapping_and_dense(), op, ": ", column.name, "[", row,
                    "] must be dense in memory, got sizes ", t.sizes(), ", strides ", t.strides());
  if (column.written) {
    t.mutable_data_ptr();  // memory that is shared until somebody writes is copied now
    written_.push_back(tensors_.size());
    add_counter(t);
  } else {
    watched_.push_back({t.unsafeGetTensorImpl(), t.storage().unsafeGetStorageImpl(), t.numel()});
  }
  data_.push_back(address(t));
  if (!is_first && !lies_well(column.kind, t, f)) {
    TORCH_CHECK_VALUE(!column.written, op, ": ", column.name, "[", row, "] must lie in memory like ", first.name, "[",
                      row, "], strides ", f.strides(), ", got ", t.strides());
    copies_.push_back({tensors_.size(), room_for(column.kind, t, f)});
    data_.back() = address(copies_.back().dense);
  }
  if (storages_.empty() || storages_.back().storage.unsafeGetStorageImpl() != t.storage().unsafeGetStorageImpl())
    storages_.push_back({t.storage(), t.storage().data()});
  tensors_.push_back(t);
  dtypes_.push_back(*dtype_of(t.scalar_type()));
}

// Views of one arena share a counter: what raises the last one's raises this one's.
void Table::add_counter(const at::Tensor& t) {
  if (t.is_inference()) return;
  if (!counters_.empty()) {
    const auto before = t._version();
    counters_.back().unsafeGetTensorImpl()->bump_version();
    if (t._version() != before) return;
  }
  counters_.push_back(t);
}

// Memory that is written may be that of no other tensor, but for one that is read for the same elements.
void Table::check_overlaps(const char* op) const {
  struct Range {
    const char *start, *stop;
    std::int64_t row;
    int written;
  };
  std::vector<Range> ranges;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const char* start = static_cast<const char*>(data_[i]);
    if (start == nullptr) continue;
    const std::int64_t bytes = tensors_[i].numel() * tensors_[i].element_size();
    ranges.push_back({start, start + bytes, std::int64_t(i) / rows_.C, 0});
  }
  for (const std::size_t i : written_)
    if (data_[i] != nullptr)
      ranges.push_back({static_cast<const char*>(data_[i]), nullptr, std::int64_t(i) / rows_.C, 1});
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.start < b.start; });
  const char *end = nullptr, *written_end = nullptr;
  for (std::size_t k = 0; k < ranges.size();) {
    Range merged = ranges[k];
    for (++k; k < ranges.size() && ranges[k].start == merged.start && ranges[k].row == merged.row; ++k) {
      merged.written += ranges[k].written;
      merged.stop = std::max(merged.stop, ranges[k].stop);
    }
    TORCH_CHECK_VALUE(merged.written <= 1 && merged.start >= (merged.written ? end : written_end), op,
                      ": a tensor of row ", merged.row,
                      " that is written shares its memory with another; give tied weights once");
    end = std::max(end, merged.stop);
    if (merged.written) written_end = std::max(written_end, merged.stop);
  }
}

bool Table::current() {
  for (const Watched& w : watched_)
    if (w.tensor->unsafe_storage().unsafeGetStorageImpl() != w.storage || w.tensor->numel() != w.numel) return false;
  for (const Held& held : storages_)
    if (held.storage.data() != held.data) return false;
  for (const Copy& copy : copies_) copy.dense.copy_(tensors_[copy.cell]);
  return true;
}

void Table::bump_versions() const {
  for (const at::Tensor& t : counters_) t.unsafeGetTensorImpl()->bump_version();
}

namespace {

template <class How>
void run(Table& table, void (*Kernels::*kernel)(const Table&, const How&), const How& how) {
  if (table.elements() > 0) (kernels(table).*kernel)(table, how);
  table.bump_versions();
}

// A contiguous vector of numbers that the kernel uses by value, or reads from the device.
Scalars scalars(const char* op, const char* name, const at::Tensor& given, std::int64_t count, at::Device device) {
  TORCH_CHECK_TYPE(given.scalar_type() == at::kDouble, op, ": ", name, " must be float64, got ", given.scalar_type());
  TORCH_CHECK_VALUE(given.dim() == 1 && given.size(0) == count, op, ": ", name, " must be [", count, "], got ",
                    given.sizes());
  TORCH_CHECK_VALUE(count <= kMostScalars, op, ": ", name, " must be at most ", kMostScalars, ", got ", count);
  TORCH_CHECK_VALUE(given.is_cpu() || given.device() == device, op, ": ", name, " must be on the CPU or on ", device,
                    ", got ", given.device());
  Scalars made;
  made.count = int(count);
  made.device = given.is_cpu() ? nullptr : given.const_data_ptr<double>();
  if (given.is_cpu()) std::copy_n(given.const_data_ptr<double>(), count, made.value);
  return made;
}

Scalars scalars(const char* op, const char* name, at::ArrayRef<double> given, std::int64_t count) {
  TORCH_CHECK_VALUE(std::int64_t(given.size()) == count && count <= kMostScalars, op, ": ", name, " must be ", count,
                    " numbers, at most ", kMostScalars, ", got ", given.size());
  Scalars made;
  made.count = int(count);
  made.device = nullptr;
  std::copy_n(given.data(), count, made.value);
  return made;
}

// The list of `count` tensors for each of K = size / count.
std::vector<at::TensorList> lists(const char* op, const char* name, at::TensorList all, std::size_t count) {
  TORCH_CHECK_VALUE(count == 0 ? all.empty() : all.size() % count == 0, op, ": ", name, " must be a multiple of ",
                    count, " tensors, got ", all.size());
  std::vector<at::TensorList> parts;
  for (std::size_t k = 0; count > 0 && k < all.size() / count; ++k) parts.push_back(all.slice(k * count, count));
  return parts;
}

// The sets of averages, each with a rate.
std::int64_t sets_of(at::TensorList averages, at::TensorList weights, std::int64_t rates) {
  return weights.empty() ? rates : std::int64_t(averages.size() / weights.size());
}

constexpr const char* kUpdate = "average_update_";

Rounding rounding_of(std::int64_t number, at::TensorList averages, at::TensorList remainders) {
  TORCH_CHECK_VALUE(number >= 0 && number <= 2, kUpdate, ": rounding must be 0, 1 or 2, got ", number);
  const auto rounding = Rounding(number);
  const std::size_t wanted = rounding == Rounding::compensated ? averages.size() : 0;
  TORCH_CHECK_VALUE(remainders.size() == wanted, kUpdate, ": remainders must be ", wanted, " tensors, got ",
                    remainders.size());
  if (rounding == Rounding::nearest) return rounding;
  for (const at::Tensor& a : averages)
    TORCH_CHECK_TYPE(a.scalar_type() == at::kBFloat16, kUpdate,
                     ": averages must be bfloat16 for stochastic or compensated rounding, got ", a.scalar_type());
  return rounding;
}

Table update_table(at::TensorList averages, at::TensorList remainders, at::TensorList weights,
                   at::IntArrayRef streams) {
  std::vector<Column> columns;
  const std::vector<at::TensorList> sets = lists(kUpdate, "averages", averages, weights.size());
  for (const at::TensorList& set : sets)
    columns.push_back({"averages", set, columns.empty() ? Kind::number : Kind::like_first, true});
  for (const at::TensorList& set : lists(kUpdate, "remainders", remainders, weights.size()))
    columns.push_back({"remainders", set, Kind::remainder, true});
  TORCH_CHECK_VALUE(weights.empty() || !sets.empty(), kUpdate, ": averages must not be empty");
  columns.push_back({"weights", weights, Kind::number, false});
  return Table(kUpdate, std::move(columns), streams);
}

void average_update_(FN_AVERAGE_UPDATE) {
  const Rounding how = rounding_of(rounding, averages, remainders);
  Table table = update_table(averages, remainders, weights, streams);
  table.current();
  run(table, &Kernels::update,
      Update{scalars(kUpdate, "rates", rates.contiguous(), sets_of(averages, weights, rates.numel()), table.device()),
             how, std::uint64_t(seed), std::uint32_t(step)});
}

// Of lists whose lengths a table has checked.
void check_type_of(const char* op, const char* name, at::TensorList tensors, at::TensorList mean) {
  for (std::size_t r = 0; r < tensors.size(); ++r)
    TORCH_CHECK_TYPE(tensors[r].scalar_type() == mean[r].scalar_type(), op, ": ", name, "[", r, "] must be ",
                     mean[r].scalar_type(), " like mean, got ", tensors[r].scalar_type());
}

void swag_update_(FN_SWAG_UPDATE) {
  constexpr const char* kOp = "swag_update_";
  TORCH_CHECK_VALUE(num_collected >= 0, kOp, ": num_collected must not be negative, got ", num_collected);
  std::vector<Column> columns{{"mean", mean, Kind::full, true}, {"m2", m2, Kind::like_first, true}};
  if (!deviations.empty()) columns.push_back({"deviations", deviations, Kind::ring, true});
  columns.push_back({"weights", weights, Kind::number, false});
  Table table(kOp, std::move(columns));
  check_type_of(kOp, "deviations", deviations, mean);
  for (const at::Tensor& ring : deviations)
    TORCH_CHECK_VALUE(row >= 0 && row < ring.size(0), kOp, ": row must be in 0..", ring.size(0) - 1, ", got ", row);
  table.current();
  run(table, &Kernels::swag, Swag{1.0 / double(num_collected + 1), !deviations.empty(), row});
}

void swag_sample_(FN_SWAG_SAMPLE) {
  constexpr const char* kOp = "swag_sample_";
  std::vector<Column> all{{"out", out, Kind::number, true}, {"mean", mean, Kind::full, false}};
  all.push_back({"m2", m2, Kind::full, false});
  if (columns.numel() > 0) all.push_back({"deviations", deviations, Kind::ring, false});
  Table table(kOp, std::move(all), streams);
  check_type_of(kOp, "m2", m2, mean);
  if (columns.numel() > 0) check_type_of(kOp, "deviations", deviations, mean);
  for (std::size_t r = 0; columns.numel() > 0 && r < deviations.size(); ++r)
    TORCH_CHECK_VALUE(deviations[r].size(0) >= columns.numel(), kOp, ": deviations[", r, "] must have at least ",
                      columns.numel(), " rows, got ", deviations[r].size(0));
  table.current();
  run(table, &Kernels::sample,
      Sample{scalars(kOp, "columns", columns.contiguous(), columns.numel(), table.device()), diagonal,
             std::uint64_t(seed), std::uint32_t(step)});
}

void weighted_sum_(at::TensorList out, at::TensorList sources, const at::Tensor& coefficients) {
  constexpr const char* kOp = "weighted_sum_";
  std::vector<Column> columns{{"out", out, Kind::number, true}};
  for (const at::TensorList& set : lists(kOp, "sources", sources, out.size()))
    columns.push_back({"sources", set, Kind::number, false});
  const auto count = out.empty() ? coefficients.numel() : std::int64_t(columns.size()) - 1;
  Table table(kOp, std::move(columns));
  table.current();
  run(table, &Kernels::weighted_sum,
      WeightedSum{scalars(kOp, "coefficients", coefficients.contiguous(), count, table.device())});
}

void swap_tensors_(at::TensorList first, at::TensorList second) {
  Table table("swap_", {{"first", first, Kind::number, true}, {"second", second, Kind::like_first, true}});
  table.current();
  if (table.elements() > 0) kernels(table).swap(table);
  table.bump_versions();
}

at::Tensor first_nonfinite(at::TensorList weights) {
  // One column has no layout to agree on, but it must be dense: what is not is copied.
  Tensors dense;
  for (const at::Tensor& w : weights) dense.push_back(w.is_non_overlapping_and_dense() ? w : w.contiguous());
  Table table("first_nonfinite", {{"weights", dense, Kind::number, false}});
  return kernels(table).first_nonfinite(table);
}

// The columns of a fused optimizer step: its state in one type, then the averages.
Table optimizer_table(const char* op, std::vector<Column> columns, at::TensorList averages) {
  for (const at::TensorList& set : lists(op, "averages", averages, columns[0].tensors.size()))
    columns.push_back({"averages", set, Kind::number, true});
  return Table(op, std::move(columns));
}

void sgd_ema_step_(FN_SGD) {
  constexpr const char* kOp = "sgd_ema_step_";
  std::vector<Column> columns{{"weights", weights, Kind::full, true}, {"grads", grads, Kind::like_first, false}};
  if (!momentum.empty()) columns.push_back({"momentum", momentum, Kind::like_first, true});
  TORCH_CHECK_VALUE(!momentum.empty() || momentum_rate == 0, kOp, ": momentum must be ", weights.size(),
                    " tensors for momentum_rate ", momentum_rate, ", got none");
  Table table = optimizer_table(kOp, std::move(columns), averages);
  table.current();
  run(table, &Kernels::sgd,
      Sgd{scalars(kOp, "rates", rates.contiguous(), sets_of(averages, weights, rates.numel()), table.device()), lr,
          momentum_rate, dampening, weight_decay, !momentum.empty(), nesterov, maximize, first});
}

void adamw_ema_step_(FN_ADAMW) {
  constexpr const char* kOp = "adamw_ema_step_";
  TORCH_CHECK_VALUE(step >= 1, kOp, ": step must be at least 1, got ", step);
  Table table = optimizer_table(kOp,
                                {{"weights", weights, Kind::full, true},
                                 {"grads", grads, Kind::like_first, false},
                                 {"exp_avg", exp_avg, Kind::like_first, true},
                                 {"exp_avg_sq", exp_avg_sq, Kind::like_first, true}},
                                averages);
  table.current();
  run(table, &Kernels::adamw,
      AdamW{scalars(kOp, "rates", rates.contiguous(), sets_of(averages, weights, rates.numel()), table.device()),
            lr / (1 - std::pow(beta1, double(step))), std::sqrt(1 - std::pow(beta2, double(step))), beta1, beta2, eps,
            1 - lr * weight_decay, maximize});
}

// ---- autograd: nothing is recorded, and nobody may believe that something was

template <class Question>
bool any(at::TensorList tensors, Question question) {
  return std::any_of(tensors.begin(), tensors.end(), question);
}
template <class Question>
bool any(const at::Tensor& tensor, Question question) {
  return question(tensor);
}
template <class Other, class Question>
bool any(const Other&, Question) {
  return false;
}

template <class Op, class Signature>
struct WithoutDerivative;
template <class Op, class Return, class... Args>
struct WithoutDerivative<Op, Return(Args...)> {
  static Return call(Args... args) {
    const auto tangent = [](const at::Tensor& t) { return has_tangent(t); };
    TORCH_CHECK_NOT_IMPLEMENTED(!(any(args, tangent) || ...), Op::name, " has no forward-mode derivative");
    const auto gradient = [](const at::Tensor& t) { return t.requires_grad(); };
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled() || !(any(args, gradient) || ...), Op::name,
                                " has no derivative: call it under torch.no_grad()");
    static const auto op = typed<Return(Args...)>(Op::name);
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(args...);
  }
};

}  // namespace

Plan::Plan(Tensors averages, Tensors remainders, Tensors weights, std::int64_t rounding,
           std::vector<std::int64_t> streams)
    : averages_(std::move(averages)),
      remainders_(std::move(remainders)),
      weights_(std::move(weights)),
      rounding_(rounding_of(rounding, averages_, remainders_)),
      streams_(std::move(streams)),
      table_(update_table(averages_, remainders_, weights_, streams_)) {}

void Plan::refresh() {
  if (table_.current()) return;
  table_ = update_table(averages_, remainders_, weights_, streams_);
  table_.current();
}

void Plan::run(const Scalars& rates, std::int64_t seed, std::int64_t step) {
  average::run(table_, &Kernels::update, Update{rates, rounding_, std::uint64_t(seed), std::uint32_t(step)});
}

void Plan::update(const at::Tensor& rates, std::int64_t seed, std::int64_t step) {
  const at::NoGradGuard nothing_recorded;
  refresh();
  run(scalars(kUpdate, "rates", rates.contiguous(), sets_of(averages_, weights_, rates.numel()), table_.device()), seed,
      step);
}

void Plan::update(const std::vector<double>& rates, std::int64_t seed, std::int64_t step) {
  const at::NoGradGuard nothing_recorded;
  refresh();
  run(scalars(kUpdate, "rates", rates, sets_of(averages_, weights_, std::int64_t(rates.size()))), seed, step);
}

TORCH_LIBRARY_FRAGMENT(fastnuggets, m) {
  m.def(
      "average_update_(Tensor(a!)[] averages, Tensor(b!)[] remainders, Tensor[] weights, Tensor rates, int rounding, "
      "int seed, int step, int[] streams) -> ()");
  m.def(
      "swag_update_(Tensor(a!)[] mean, Tensor(b!)[] m2, Tensor(c!)[] deviations, Tensor[] weights, int num_collected, "
      "int row) -> ()");
  m.def(
      "swag_sample_(Tensor(a!)[] out, Tensor[] mean, Tensor[] m2, Tensor[] deviations, Tensor columns, float diagonal, "
      "int seed, int step, int[] streams) -> ()");
  m.def("weighted_sum_(Tensor(a!)[] out, Tensor[] sources, Tensor coefficients) -> ()");
  m.def("swap_tensors_(Tensor(a!)[] first, Tensor(b!)[] second) -> ()");
  m.def("first_nonfinite(Tensor[] weights) -> Tensor");
  m.def(
      "sgd_ema_step_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum, Tensor(c!)[] averages, Tensor rates, "
      "float lr, float momentum_rate, float dampening, float weight_decay, bool nesterov, bool maximize, bool first) "
      "-> ()");
  m.def(
      "adamw_ema_step_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
      "Tensor(d!)[] averages, Tensor rates, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "bool maximize, int step) -> ()");
}

#define FN_ON_DEVICES(OP) \
  OP(average_update_)     \
  OP(swag_update_)        \
  OP(swag_sample_)        \
  OP(weighted_sum_)       \
  OP(swap_tensors_)       \
  OP(first_nonfinite)     \
  OP(sgd_ema_step_)       \
  OP(adamw_ema_step_)

#define FN_KERNEL(NAME) m.impl(#NAME, NAME);
TORCH_LIBRARY_IMPL(fastnuggets, CPU, m){FN_ON_DEVICES(FN_KERNEL)} TORCH_LIBRARY_IMPL(fastnuggets, CUDA,
                                                                                     m){FN_ON_DEVICES(FN_KERNEL)}
#undef FN_KERNEL

#define FN_NAMED(NAME)                                         \
  struct Named_##NAME {                                        \
    static constexpr const char* name = "fastnuggets::" #NAME; \
  };
namespace {FN_ON_DEVICES(FN_NAMED)}  // namespace
#undef FN_NAMED

#define FN_AUTOGRAD(NAME) m.impl(#NAME, &WithoutDerivative<Named_##NAME, decltype(NAME)>::call);
TORCH_LIBRARY_IMPL(fastnuggets, Autograd, m) {
  FN_ON_DEVICES(FN_AUTOGRAD)
}
#undef FN_AUTOGRAD
#undef FN_ON_DEVICES

}  // namespace fastnuggets::average
