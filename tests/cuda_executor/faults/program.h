// A program around one small kernel: exit status 0 if it is right in both thread orders, 1 if not or if it failed.
#pragma once

#include <cstdio>
#include <functional>
#include <memory>

#include "common/launch.cuh"

// Allocated at its exact size, and poisoned, so that a tail that nobody writes cannot look right.
inline std::unique_ptr<int[]> poisoned(int n) {
  std::unique_ptr<int[]> data(new int[n]);
  for (int i = 0; i < n; ++i) data[i] = -1;
  return data;
}

inline int run_in_both_orders(const std::function<bool()>& is_right) {
  for (const bool reversed : {false, true}) {
    cuda_executor::executor().reversed = reversed;
    const char* const order = reversed ? "reversed" : "forward";
    try {
      if (!is_right()) return std::fprintf(stderr, "wrong result, %s order\n", order), 1;
    } catch (const std::exception& error) {
      return std::fprintf(stderr, "%s, %s order\n", error.what(), order), 1;
    }
  }
  return 0;
}
