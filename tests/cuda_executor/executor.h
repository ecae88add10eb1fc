// Runs CUDA kernels on the CPU: every thread of a block is a fiber, blocks run one after another.
//
// A fiber runs until it meets a barrier or a warp collective, so the order of threads between two barriers is known:
// ascending, or descending when reversed. A read that needs a barrier which is not there finds poison in one of the
// two. Shared memory is allocated at its exact size, for AddressSanitizer, and filled with 0xFF (a NaN, an index of -1)
// before each block. Anything CUDA leaves undefined at a barrier or collective is an error here.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace cuda_executor {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kPoison = 0xFF;

enum class Collective { barrier, shuffle, ballot };

struct Fiber {
  enum class State { ready, block_barrier, collective, done };

  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  Collective collective;
  unsigned mask;     // lanes that take part in the collective
  unsigned source;   // lane that a shuffle reads
  uint64_t payload;  // in: this lane's value or predicate; out: the result
};

class Executor {
 public:
  bool reversed = false;
  uint64_t blocks_started = 0;

  void launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
    gridDim = grid;
    blockDim = block;
    body_ = std::move(body);
    shared_bytes_ = shared_bytes;
    threads_ = block.x * block.y * block.z;
    while (fibers_.size() < threads_) fibers_.push_back(std::make_unique<Fiber>());
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks; ++i) run_block(reversed ? blocks - 1 - i : i);
  }

  void* dynamic_shared() { return dynamic_shared_.get(); }
  unsigned lane() const { return current_ % warpSize; }

  // Returns how many threads of the block came with a predicate that holds.
  int block_barrier(bool predicate = false) {
    Fiber& fiber = *fibers_[current_];
    fiber.state = Fiber::State::block_barrier;
    fiber.payload = predicate;
    leave_fiber();
    return int(fiber.payload);
  }

  uint64_t collective(Collective kind, unsigned mask, uint64_t payload, unsigned source = 0) {
    Fiber& fiber = *fibers_[current_];
    fiber.state = Fiber::State::collective;
    fiber.collective = kind;
    fiber.mask = mask;
    fiber.payload = payload;
    fiber.source = source;
    leave_fiber();
    return fiber.payload;
  }

 private:
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::function<void()> body_;
  std::unique_ptr<char[]> dynamic_shared_;
  size_t shared_bytes_ = 0;
  unsigned threads_ = 0, current_ = 0;
  ucontext_t scheduler_;
#ifdef __SANITIZE_ADDRESS__
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
#endif

  void run_block(uint64_t index) {
    blockIdx = {unsigned(index % gridDim.x), unsigned(index / gridDim.x % gridDim.y),
                unsigned(index / gridDim.x / gridDim.y)};
    ++blocks_started;
    dynamic_shared_.reset(new char[shared_bytes_]);
    std::memset(dynamic_shared_.get(), kPoison, shared_bytes_);
    for (unsigned t = 0; t < threads_; ++t) start_fiber(*fibers_[t]);
    do {
      for (unsigned i = 0; i < threads_; ++i) {
        const unsigned t = reversed ? threads_ - 1 - i : i;
        if (fibers_[t]->state == Fiber::State::ready) resume(t);
      }
    } while (release());
    if (count(Fiber::State::done) != threads_) fail_stuck();
  }

  void start_fiber(Fiber& fiber) {
    fiber.state = Fiber::State::ready;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }

  static void fiber_main();

  void resume(unsigned t) {
    current_ = t;
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fibers_[t]->stack.get(), kStackBytes);
#endif
    swapcontext(&scheduler_, &fibers_[t]->context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  void leave_fiber() {
    Fiber& fiber = *fibers_[current_];
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    const bool done = fiber.state == Fiber::State::done;
    __sanitizer_start_switch_fiber(done ? nullptr : &fake_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
    swapcontext(&fiber.context, &scheduler_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  unsigned count(Fiber::State state) const {
    unsigned n = 0;
    for (unsigned t = 0; t < threads_; ++t) n += fibers_[t]->state == state;
    return n;
  }

  // Called when no fiber can run: lets complete barriers and collectives go on, false if there is none.
  bool release() {
    bool released = false;
    for (unsigned first = 0; first < threads_; first += warpSize) {
      for (unsigned lane = 0; lane < warpSize && first + lane < threads_; ++lane) {
        const Fiber& fiber = *fibers_[first + lane];
        if (fiber.state == Fiber::State::collective && complete(first, lane)) {
          finish_collective(first, fiber.mask);
          released = true;
        }
      }
    }
    if (!released && count(Fiber::State::block_barrier) == threads_) {
      uint64_t predicates = 0;
      for (unsigned t = 0; t < threads_; ++t) predicates += fibers_[t]->payload;
      for (unsigned t = 0; t < threads_; ++t) {
        fibers_[t]->state = Fiber::State::ready;
        fibers_[t]->payload = predicates;
      }
      released = true;
    }
    return released;
  }

  bool complete(unsigned first, unsigned lane) const {
    const Fiber& mine = *fibers_[first + lane];
    if (!(mine.mask >> lane & 1)) fail("a lane takes part in a warp collective whose mask leaves it out");
    for (unsigned other = 0; other < warpSize; ++other) {
      if (!(mine.mask >> other & 1)) continue;
      if (first + other >= threads_) fail("the mask of a warp collective names a lane that the block does not have");
      const Fiber& fiber = *fibers_[first + other];
      if (fiber.state != Fiber::State::collective || fiber.mask != mine.mask || fiber.collective != mine.collective) {
        return false;
      }
    }
    return true;
  }

  void finish_collective(unsigned first, unsigned mask) {
    uint64_t payload[warpSize] = {};
    uint64_t votes = 0;
    for (unsigned lane = 0; lane < warpSize; ++lane) {
      if (!(mask >> lane & 1)) continue;
      payload[lane] = fibers_[first + lane]->payload;
      if (payload[lane]) votes |= uint64_t(1) << lane;
    }
    for (unsigned lane = 0; lane < warpSize; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Fiber& fiber = *fibers_[first + lane];
      fiber.state = Fiber::State::ready;
      if (fiber.collective == Collective::ballot) fiber.payload = votes;
      if (fiber.collective != Collective::shuffle) continue;
      if (!(mask >> fiber.source & 1)) fail("a shuffle reads from a lane that its mask leaves out");
      fiber.payload = payload[fiber.source];
    }
  }

  [[noreturn]] void fail_stuck() const {
    fail("no thread can go on: " + std::to_string(count(Fiber::State::block_barrier)) + " wait at __syncthreads, " +
         std::to_string(count(Fiber::State::collective)) + " at a warp collective, " +
         std::to_string(count(Fiber::State::done)) + " have left, of " + std::to_string(threads_));
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                             std::to_string(blockIdx.z) + "): " + what);
  }
};

inline Executor& executor() {
  static Executor instance;
  return instance;
}

inline void Executor::fiber_main() {
  Executor& self = executor();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_stack_, &self.scheduler_stack_bytes_);
#endif
  self.body_();
  self.fibers_[self.current_]->state = Fiber::State::done;
  self.leave_fiber();
}

// Static shared memory of one block: exact size, poisoned when a block first touches it.
template <class T>
class Shared {
 public:
  T& get() {
    if (block_ != executor().blocks_started) std::memset(static_cast<void*>(memory_.get()), kPoison, sizeof(T));
    block_ = executor().blocks_started;
    return *reinterpret_cast<T*>(memory_.get());
  }

 private:
  std::unique_ptr<char[]> memory_{new char[sizeof(T)]};
  uint64_t block_ = 0;
};

}  // namespace cuda_executor

#define FN_SHARED(type, name)                       \
  static cuda_executor::Shared<type> name##_shared; \
  auto& name = name##_shared.get()

#define FN_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_executor::executor().dynamic_shared())
