// Stored numbers and those computed with, on the device.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "common/storage.h"

namespace fastnuggets {

// Half goes by the instructions for it, which give the bits of storage.h, but for those of a NaN.
template <class To, class S>
__device__ To convert(S x) {
  if constexpr (std::is_same_v<To, S>) {
    return x;
  } else if constexpr (std::is_same_v<S, Half>) {
    return To(__half2float(__ushort_as_half(x.bits)));
  } else if constexpr (std::is_same_v<To, Half>) {
    return {__half_as_ushort(__float2half_rn(float(x)))};
  } else if constexpr (std::is_arithmetic_v<To>) {
    return To(load(x));
  } else {
    return Store<To>::of(typename Compute<To>::type(x));
  }
}

}  // namespace fastnuggets
