// Schema and checks of the search. Bits have no derivative, and autocast leaves them alone.
#include "screen/screen_op.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "common/op.h"

namespace fastnuggets::screen {
namespace {

using Two = std::tuple<at::Tensor, at::Tensor>;

void check_rows(const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kByte, "tanimoto_topk: ", name, " must be uint8, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) % 8 == 0 && t.size(1) <= 8 * kMostWords, "tanimoto_topk: ", name,
                    " must be [N, bytes] with bytes a multiple of 8, at most ", 8 * kMostWords, ", got ", t.sizes());
}

Two tanimoto_topk(const at::Tensor& queries, const at::Tensor& database, std::int64_t k, double threshold) {
  check_rows("queries", queries);
  check_rows("database", database);
  TORCH_CHECK_VALUE(queries.size(1) == database.size(1), "tanimoto_topk: queries have ", queries.size(1),
                    " bytes a row and the database ", database.size(1));
  TORCH_CHECK_VALUE(queries.device() == database.device(), "tanimoto_topk: database must be on ", queries.device(),
                    " like queries, got ", database.device());
  TORCH_CHECK_VALUE(database.size(0) <= kMostRows, "tanimoto_topk: database must have at most ", kMostRows,
                    " rows, got ", database.size(0));
  TORCH_CHECK_VALUE(k >= 0, "tanimoto_topk: k must not be negative, got ", k);
  TORCH_CHECK_VALUE(threshold >= 0 && threshold <= 1, "tanimoto_topk: threshold must be in [0, 1], got ", threshold);
  const at::Tensor similarity = at::empty({queries.size(0), k}, queries.options().dtype(at::kDouble));
  const at::Tensor index = at::empty({queries.size(0), k}, queries.options().dtype(at::kLong));
  const at::Tensor q = queries.contiguous(), d = database.contiguous();
  if (index.numel() > 0)
    kernels_on<Kernels>(queries.device())
        .search({q.const_data_ptr(), d.const_data_ptr(), q.size(0), d.size(0), q.size(1) / 8, k, threshold,
                 similarity.mutable_data_ptr<double>(), index.mutable_data_ptr<std::int64_t>()},
                q);
  return {similarity, index};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastnuggets, m) {
  m.def("tanimoto_topk(Tensor queries, Tensor database, int k, float threshold) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fastnuggets, CPU, m) { m.impl("tanimoto_topk", tanimoto_topk); }
TORCH_LIBRARY_IMPL(fastnuggets, CUDA, m) { m.impl("tanimoto_topk", tanimoto_topk); }
TORCH_LIBRARY_IMPL(fastnuggets, Autograd, m) {
  m.impl("tanimoto_topk", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastnuggets::screen
