// CUDA's execution of a block on a CPU, for tests: one fiber per thread. Barriers and shuffles hand over to the next
// fiber; the order of fibers and of blocks is drawn from a seed, and shared memory is poisoned before every block, so
// that what relies on an order or on zeros does not pass every seed. Blocks run one after another.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline Dim3 threadIdx, blockIdx, blockDim, gridDim;
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using std::max;
using std::min;

namespace emulation {

constexpr size_t kStack = 128 << 10;

struct Fiber {
  enum State { ready, at_block_barrier, at_warp_barrier, done };
  ucontext_t context;
  jmp_buf resume;
  bool started;
  State state;
  Dim3 index;
  int warp, lane;
  unsigned turn;  // of the warp's slots
};

struct Warp {
  int lanes, waiting;
  alignas(16) char slots[2][32][32];
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> stacks;
  std::vector<uint64_t> shared;
  jmp_buf scheduler;
  Fiber* running = nullptr;
  int threads = 0, live = 0, waiting = 0, votes = 0, vote = 0;
  uint64_t random = 1;
  size_t most_shared = 0;  // bytes that any launch asked for
  const std::function<void(char*)>* kernel = nullptr;

  uint64_t next_random() {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return random;
  }

  template <class Numbers>
  void shuffle(Numbers& numbers) {
    for (size_t i = numbers.size(); i > 1; --i) std::swap(numbers[i - 1], numbers[next_random() % i]);
  }

  void yield(Fiber::State state) {
    running->state = state;
    if (!_setjmp(running->resume)) _longjmp(scheduler, 1);
    threadIdx = running->index;
  }

  void release(Fiber::State state, int warp) {
    for (Fiber& fiber : fibers)
      if (fiber.state == state && (warp < 0 || fiber.warp == warp)) fiber.state = Fiber::ready;
  }

  void block_barrier() {
    if (++waiting == threads) {
      waiting = 0, vote = votes, votes = 0;
      release(Fiber::at_block_barrier, -1);
      yield(Fiber::ready);
    } else {
      yield(Fiber::at_block_barrier);
    }
  }

  void warp_barrier() {
    Warp& warp = warps[running->warp];
    if (++warp.waiting == warp.lanes) {
      warp.waiting = 0;
      release(Fiber::at_warp_barrier, running->warp);
      yield(Fiber::ready);
    } else {
      yield(Fiber::at_warp_barrier);
    }
  }

  // What every lane of the warp has, at intervals of 32 bytes. Two sets of slots in turn: whoever passes the next
  // barrier knows that all have read this one.
  template <class V>
  const char (&gather(const V& value))[32][32] {
    static_assert(sizeof(V) <= 32, "lanes exchange up to 32 bytes");
    const unsigned turn = running->turn++ % 2;
    Warp& warp = warps[running->warp];
    memcpy(warp.slots[turn][running->lane], &value, sizeof(V));
    warp_barrier();
    return warp.slots[turn];
  }

  template <class V>
  V exchange(V value, int source) {
    V result;
    memcpy(&result, gather(value)[source], sizeof(V));
    return result;
  }

  [[noreturn]] static void start();

  void run_block() {
    std::fill(shared.begin(), shared.end(), ~uint64_t(0));  // NaN in every floating-point type, −1 in the others
    live = threads, waiting = votes = 0;
    for (Warp& warp : warps) warp.lanes = warp.waiting = 0;
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0);
    for (unsigned i = 0; i < unsigned(threads); ++i) {
      Fiber& fiber = fibers[i];
      fiber.started = false, fiber.state = Fiber::ready, fiber.turn = 0;
      fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
      fiber.warp = i / 32, fiber.lane = i % 32;
      ++warps[fiber.warp].lanes;
    }
    while (live > 0) {
      shuffle(order);
      bool progress = false;
      for (unsigned i : order) {
        Fiber& fiber = fibers[i];
        if (fiber.state != Fiber::ready) continue;
        progress = true, running = &fiber;
        if (_setjmp(scheduler)) continue;
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks.data() + i * kStack;
        fiber.context.uc_stack.ss_size = kStack;
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(start), 0);
        setcontext(&fiber.context);
      }
      if (!progress) {
        fprintf(stderr, "emulation: some threads wait at a barrier that others have passed or left\n");
        abort();
      }
    }
  }
};

inline Machine machine;

inline void Machine::start() {
  threadIdx = machine.running->index;
  (*machine.kernel)(reinterpret_cast<char*>(machine.shared.data()));
  machine.running->state = Fiber::done;
  --machine.live;
  _longjmp(machine.scheduler, 1);
}

// kernel(shared memory) for every thread of every block.
inline void launch(Dim3 grid, Dim3 block, size_t shared_bytes, uint64_t seed,
                   const std::function<void(char*)>& kernel) {
  const unsigned threads = block.x * block.y * block.z;
  Machine& m = machine;
  m.random = 0x9e3779b97f4a7c15 * (seed + 1);
  m.kernel = &kernel;
  m.threads = threads;
  gridDim = grid, blockDim = block;
  m.fibers.resize(threads), m.warps.resize((threads + 31) / 32);
  if (m.stacks.size() < threads * kStack) m.stacks.resize(threads * kStack);
  m.shared.resize((shared_bytes + 7) / 8);
  m.most_shared = max(m.most_shared, shared_bytes);
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  m.shuffle(order);
  for (unsigned i : order) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    m.run_block();
  }
}

}  // namespace emulation

// The most shared memory of any launch since the last call.
extern "C" __attribute__((used)) inline int64_t most_shared_bytes() {
  return std::exchange(emulation::machine.most_shared, 0);
}

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline void __syncthreads() { emulation::machine.block_barrier(); }

inline int __syncthreads_or(int predicate) {
  emulation::machine.votes |= predicate != 0;
  emulation::machine.block_barrier();
  const int result = emulation::machine.vote;
  emulation::machine.block_barrier();
  return result;
}

inline void __syncwarp(unsigned = ~0u) { emulation::machine.warp_barrier(); }

template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return emulation::machine.exchange(value, emulation::machine.running->lane ^ mask);
}

template <class V>
V __shfl_sync(unsigned, V value, int source) {
  return emulation::machine.exchange(value, source);
}
