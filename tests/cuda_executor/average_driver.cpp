// average_kernels.cu for ctypes, with average.h's own structs: device pointers are pointers, the stream is none.
#include "average/average_cuda.h"
#include "driver.h"

using namespace fastnuggets::average;

extern "C" {

const char* average_update(const Rows& rows, const Update& how) {
  return guarded([&] { cuda::update(rows, how, nullptr); });
}
const char* average_swag(const Rows& rows, const Swag& how) {
  return guarded([&] { cuda::swag(rows, how, nullptr); });
}
const char* average_sample(const Rows& rows, const Sample& how) {
  return guarded([&] { cuda::sample(rows, how, nullptr); });
}
const char* average_weighted_sum(const Rows& rows, const WeightedSum& how) {
  return guarded([&] { cuda::weighted_sum(rows, how, nullptr); });
}
const char* average_swap(const Rows& rows) {
  return guarded([&] { cuda::swap(rows, nullptr); });
}
const char* average_first_nonfinite(const Rows& rows, long long* found) {
  return guarded([&] { cuda::first_nonfinite(rows, found, nullptr); });
}
const char* average_sgd(const Rows& rows, const Sgd& how) {
  return guarded([&] { cuda::sgd(rows, how, nullptr); });
}
const char* average_adamw(const Rows& rows, const AdamW& how) {
  return guarded([&] { cuda::adamw(rows, how, nullptr); });
}
}
