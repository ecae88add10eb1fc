// What a driver of one kernels file needs: entry points that ctypes can call, and no exception across them.
#pragma once

#include <exception>
#include <string>

#include "executor.h"

// Runs the body; returns null, or what went wrong (valid until the next call).
template <class Body>
const char* guarded(Body body) {
  static std::string message;
  try {
    body();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

extern "C" inline __attribute__((used)) void set_thread_order(int reversed) {
  cuda_executor::executor().reversed = reversed != 0;
}
