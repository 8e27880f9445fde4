// CUDA C++ as plain C++, for tests: the kernels' own sources, run by the processor.
//
// Blocks run one after another. The threads of a block are fibers that take turns: a fiber runs
// until it reaches a barrier or a warp instruction and goes on when all that take part have come.
// A barrier that some thread never reaches is found and told, and shared memory keeps what the
// block before left in it. This tests logic and numbers; it shows no data races, nor what a card
// would make of them.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define CLF_ARGUMENT(T) const T&
#define __shared__ static
#define CLF_LAUNCH(kernel, blocks, threads, stream, ...) \
  (void)(stream), on_cpu::launch(int64_t(blocks), int(threads), [&] { kernel(__VA_ARGS__); })

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct uint4 {
  uint32_t x, y, z, w;
};

namespace on_cpu {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

enum class At { Ready, Block, Warp, Done };

#if defined(__x86_64__) && defined(__GNUC__)
// Saves what a call must preserve and goes on where the other stack left off. swapcontext does the
// same but asks the system for the signal mask each time, and there are millions of turns.
__attribute__((naked, noinline)) static void switch_stack(void**, void*) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
struct Context {
  void* stack_pointer = nullptr;
  void start(char* stack, size_t size, void (*entry)()) {
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + size) / 16 * 16);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  void go_to(Context& other) { switch_stack(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void go_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  At at = At::Ready;
  unsigned mask = 0;  // lanes that the warp instruction names
};

struct State {
  std::vector<Fiber> fibers;
  Context scheduler;
  int current = 0, threads = 0;
  unsigned block = 0, blocks = 0;
  const std::function<void()>* body = nullptr;
  std::vector<uint64_t> slots;  // what a lane gives to its warp
};

inline State& state() {
  static State s;
  return s;
}

inline void wait(At at, unsigned mask = 0) {
  State& s = state();
  Fiber& f = s.fibers[size_t(s.current)];
  f.at = at;
  f.mask = mask;
  f.context.go_to(s.scheduler);
}

inline void enter() {
  State& s = state();
  (*s.body)();
  s.fibers[size_t(s.current)].at = At::Done;
  s.fibers[size_t(s.current)].context.go_to(s.scheduler);
}

// Releases the warps and the block whose barrier is complete; false if nobody can go on.
inline bool release() {
  State& s = state();
  bool any = false, whole = true;
  for (int t = 0; t < s.threads; ++t) {
    const At at = s.fibers[size_t(t)].at;
    any |= at == At::Ready;
    whole &= at == At::Block || at == At::Done;
  }
  if (any) return true;
  for (int first = 0; first < s.threads; first += kWarp) {
    for (int t = first; t < std::min(first + kWarp, s.threads); ++t) {
      if (s.fibers[size_t(t)].at != At::Warp) continue;
      const unsigned mask = s.fibers[size_t(t)].mask;
      bool complete = true;
      for (int l = 0; l < kWarp; ++l)
        if (mask >> l & 1u)
          complete &= first + l < s.threads && s.fibers[size_t(first + l)].at == At::Warp &&
                      s.fibers[size_t(first + l)].mask == mask;
      if (!complete) continue;
      for (int l = 0; l < kWarp; ++l)
        if (mask >> l & 1u) s.fibers[size_t(first + l)].at = At::Ready;
      any = true;
    }
  }
  if (!any && whole) {
    for (int t = 0; t < s.threads; ++t)
      if (s.fibers[size_t(t)].at == At::Block) any = true, s.fibers[size_t(t)].at = At::Ready;
  }
  return any;
}

inline void run_block() {
  State& s = state();
  for (int t = 0; t < s.threads; ++t) {
    Fiber& f = s.fibers[size_t(t)];
    if (!f.stack) f.stack.reset(new char[kStack]);
    f.context.start(f.stack.get(), kStack, enter);
    f.at = At::Ready;
  }
  for (;;) {
    bool all_done = true;
    for (int t = 0; t < s.threads; ++t) {
      Fiber& f = s.fibers[size_t(t)];
      if (f.at == At::Ready) {
        s.current = t;
        s.scheduler.go_to(f.context);
      }
      all_done &= f.at == At::Done;
    }
    if (all_done) return;
    if (!release()) throw std::logic_error("threads of a block wait for one that never comes");
  }
}

inline void launch(int64_t blocks, int threads, const std::function<void()>& body) {
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024)
    throw std::invalid_argument("a grid that no card takes");
  State& s = state();
  if (int(s.fibers.size()) < threads) s.fibers.resize(size_t(threads));
  s.slots.assign(size_t(threads), 0);
  s.threads = threads;
  s.blocks = unsigned(blocks);
  s.body = &body;
  for (int64_t b = 0; b < blocks; ++b) {
    s.block = unsigned(b);
    run_block();
  }
}

inline Index thread_index() { return {unsigned(state().current), 0, 0}; }
inline Index block_index() { return {state().block, 0, 0}; }
inline Index block_size() { return {unsigned(state().threads), 1, 1}; }
inline Index grid_size() { return {state().blocks, 1, 1}; }

// Each lane gives a word; all that take part have given theirs when this returns.
template <class T>
uint64_t* exchange(unsigned mask, T value) {
  State& s = state();
  uint64_t word = 0;
  static_assert(sizeof(T) <= 8, "a word");
  std::memcpy(&word, &value, sizeof(T));
  s.slots[size_t(s.current)] = word;
  wait(At::Warp, mask);
  return &s.slots[size_t(s.current / kWarp * kWarp)];
}

template <class T>
T taken(unsigned mask, T value, int lane) {
  T result;
  uint64_t word = exchange(mask, value)[lane];
  std::memcpy(&result, &word, sizeof(T));
  wait(At::Warp, mask);  // nobody gives the next word before all have taken this one
  return result;
}

}  // namespace on_cpu

#define threadIdx (on_cpu::thread_index())
#define blockIdx (on_cpu::block_index())
#define blockDim (on_cpu::block_size())
#define gridDim (on_cpu::grid_size())

inline void __syncthreads() { on_cpu::wait(on_cpu::At::Block); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { on_cpu::wait(on_cpu::At::Warp, mask); }
template <class T>
T __shfl_sync(unsigned mask, T v, int lane) {
  return on_cpu::taken(mask, v, lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int other) {
  return on_cpu::taken(mask, v, int(threadIdx.x % 32) ^ other);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by) {
  const int lane = int(threadIdx.x % 32);
  return on_cpu::taken(mask, v, lane < int(by) ? lane : lane - int(by));
}
inline unsigned __ballot_sync(unsigned mask, bool v) {
  const uint64_t* words = on_cpu::exchange(mask, uint64_t(v));
  unsigned result = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1u) result |= unsigned(words[l]) << l;
  on_cpu::wait(on_cpu::At::Warp, mask);
  return result;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
template <class T>
T atomicAdd(T* p, T v) {
  T old = *p;
  *p += v;
  return old;
}
template <class T>
T atomicOr(T* p, T v) {
  T old = *p;
  *p |= v;
  return old;
}
template <class T>
T atomicMin(T* p, T v) {
  T old = *p;
  *p = std::min(*p, v);
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  T old = *p;
  *p = std::max(*p, v);
  return old;
}
