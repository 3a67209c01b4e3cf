// Emulates CUDA C++ on a CPU: every thread of every block is a fiber, all blocks are co-resident, shared memory is
// initialised to NaN, and a deadlock is an error.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim { unsigned x; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint4 { unsigned x, y, z, w; };
struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };

namespace emulation {

constexpr int kFiberBytes = 64 * 1024, kGuardBytes = 4096;

// `generation` grows when all `size` threads have arrived.
struct Barrier {
  unsigned size, arrived = 0, generation = 0, sum = 0, last_sum = 0;
};
struct Warp {
  Barrier barrier;
  int tag[2];                     // instruction of each exchange; all lanes must agree
  unsigned char slot[2][32][64];  // one value per lane, double-buffered
};
struct Block {
  std::vector<unsigned char> shared;
  Barrier barrier;
  Barrier* cluster;  // of all threads of the cluster; null for a cluster of one block
  unsigned rank;     // in the cluster
  std::vector<Warp> warps;
};
struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Fiber {
  dim thread, block_index;
  Block* block;
  const unsigned* word = nullptr;  // the fiber waits until *word differs from `seen`
  unsigned seen;
  unsigned cluster_generation;
  bool started = false, done = false;
  ucontext_t context;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  std::deque<std::vector<Copy>> copies{{}};  // cp.async groups; the last is not committed
};

inline Fiber* current;
inline jmp_buf scheduler;
inline dim block_size, grid_size;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda emulation: %s (block %u, thread %u)\n", what, current->block_index.x, current->thread.x);
  abort();
}

inline void wait_for_change(const unsigned* word, unsigned seen) {
  current->word = word;
  current->seen = seen;
  if (*word == seen && !_setjmp(current->state)) _longjmp(scheduler, 1);
  current->word = nullptr;
}

// Returns the generation that the thread arrives in.
inline unsigned arrive(Barrier& barrier, unsigned value = 0) {
  const unsigned generation = barrier.generation;
  barrier.sum += value;
  if (++barrier.arrived == barrier.size) {
    barrier.last_sum = barrier.sum;
    barrier.arrived = barrier.sum = 0;
    ++barrier.generation;
  }
  return generation;
}
inline unsigned arrive_and_wait(Barrier& barrier, unsigned value = 0) {
  wait_for_change(&barrier.generation, arrive(barrier, value));
  return barrier.last_sum;
}

// Exchanges one value per lane; returns those of all 32.
template <class V>
const unsigned char (*exchange(int tag, const V& mine))[64] {
  static_assert(sizeof(V) <= 64);
  Warp& warp = current->block->warps[current->thread.x / 32];
  const unsigned parity = warp.barrier.generation % 2;
  if (warp.barrier.arrived == 0) warp.tag[parity] = tag;
  if (warp.tag[parity] != tag) fail("lanes of a warp exchange in different instructions");
  memcpy(warp.slot[parity][current->thread.x % 32], &mine, sizeof mine);
  arrive_and_wait(warp.barrier);
  return warp.slot[parity];
}
template <class V>
V lane_value(const unsigned char (*slots)[64], int lane) {
  V v;
  memcpy(&v, slots[lane], sizeof v);
  return v;
}

inline void enter() {
  body();
  current->done = true;
  _longjmp(scheduler, 1);
}

// Runs a fiber until it waits or ends.
__attribute__((noinline)) inline void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kFiberBytes;
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

// Launches a kernel; `backwards` runs the last thread of the last block first.
inline void run(unsigned blocks, unsigned threads, size_t shared_bytes, bool backwards, std::function<void()> kernel,
                unsigned cluster = 1) {
  body = std::move(kernel);
  block_size.x = threads;
  grid_size.x = blocks;
  std::vector<Block> all(blocks);
  std::vector<Barrier> clusters(blocks / cluster, Barrier{threads * cluster});
  std::vector<Fiber> fibers(blocks * threads);
  for (unsigned b = 0; b < blocks; ++b) {
    all[b].shared.assign(shared_bytes + kGuardBytes, 0xff);
    all[b].barrier.size = threads;
    all[b].cluster = cluster > 1 ? &clusters[b / cluster] : nullptr;
    all[b].rank = b % cluster;
    all[b].warps.resize(threads / 32);
    for (auto& warp : all[b].warps) warp.barrier.size = 32;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[b * threads + t];
      fiber.thread.x = t;
      fiber.block_index.x = b;
      fiber.block = &all[b];
      fiber.stack.reset(new char[kFiberBytes]);
    }
  }
  // The least fair schedule: a warp runs until it waits, then other warps of its block, then other blocks.
  size_t left = fibers.size();
  const auto advance = [&](auto&& self, size_t first, size_t size) -> bool {
    bool progress = false;
    if (size == 1) {
      Fiber& fiber = fibers[first];
      if (fiber.done || (fiber.word && *fiber.word == fiber.seen)) return false;
      resume(fiber);
      left -= fiber.done;
      return true;
    }
    const size_t part = size > threads ? threads : size > 32 ? 32 : 1;
    for (size_t i = 0; i < size; i += part)
      while (self(self, first + (backwards ? size - part - i : i), part)) progress = true;
    return progress;
  };
  while (left > 0)
    if (!advance(advance, 0, fibers.size())) fail("deadlock");
  for (const Block& block : all)
    for (size_t i = shared_bytes; i < block.shared.size(); ++i)
      if (block.shared[i] != 0xff) fail("wrote past the end of shared memory");
}

// Memory poisoned with NaN (large numbers as integers), between guard regions that must stay unchanged.
class GuardedBuffer {
 public:
  explicit GuardedBuffer(size_t bytes) : memory(bytes / 2 + 2 * kGuard, kPoison) {}
  ~GuardedBuffer() {
    for (size_t i = 0; i < kGuard; ++i)
      if (memory[i] != kPoison || memory[memory.size() - 1 - i] != kPoison) fail("wrote outside the buffer");
  }
  template <class V>
  operator V*() { return reinterpret_cast<V*>(memory.data() + kGuard); }

 private:
  static constexpr size_t kGuard = 128;
  static constexpr uint16_t kPoison = 0x7fc0;
  std::vector<uint16_t> memory;
};

}  // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::current->block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)

using std::max;
using std::min;

inline void __syncthreads() { emulation::arrive_and_wait(emulation::current->block->barrier); }
inline int __syncthreads_count(bool v) { return emulation::arrive_and_wait(emulation::current->block->barrier, v); }
inline void __threadfence_block() {}
inline void __syncwarp() { emulation::exchange(0, 0); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return (*p += v) - v; }
inline void atomicOr(unsigned* p, unsigned v) { *p |= v; }
inline void atomicMin(unsigned* p, unsigned v) { *p = std::min(*p, v); }
inline int __ffs(unsigned v) { return __builtin_ffs(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(unsigned v) { return v ? __builtin_clz(v) : 32; }
template <class To, class From>
To bits_as(From v) {
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }

template <class V>
V __shfl_sync(unsigned, V v, int lane) {
  return emulation::lane_value<V>(emulation::exchange(1, v), lane);
}
template <class V>
V __shfl_xor_sync(unsigned, V v, int mask) {
  return emulation::lane_value<V>(emulation::exchange(2, v), threadIdx.x % 32 ^ mask);
}
template <class V>
V __shfl_up_sync(unsigned, V v, int step) {
  const int lane = threadIdx.x % 32;
  return emulation::lane_value<V>(emulation::exchange(7, v), lane < step ? lane : lane - step);
}
inline unsigned __ballot_sync(unsigned, bool v) {
  const auto slots = emulation::exchange(3, v);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= unsigned(emulation::lane_value<bool>(slots, lane)) << lane;
  return ballot;
}

namespace pruneops {

template <class S>
S& shared() {
  return *reinterpret_cast<S*>(emulation::current->block->shared.data());
}

template <class T>
float value_of(unsigned bits) {
  if constexpr (std::is_same_v<T, __half>) return bits_as<_Float16>(uint16_t(bits));
  return bits_as<float>(sizeof(T) == 2 ? bits << 16 : bits);
}

// Asynchronous copies are performed as late as allowed: when they are waited for.
inline void cp_async_16(void* to, const void* from, int bytes) {
  if (uintptr_t(to) % 16 || uintptr_t(from) % 16) emulation::fail("cp_async_16: address not aligned to 16 bytes");
  if (bytes < 0 || bytes > 16) emulation::fail("cp_async_16: bytes out of range");
  emulation::current->copies.back().push_back({to, from, bytes});
}
inline void cp_async_commit() { emulation::current->copies.emplace_back(); }
template <int PENDING>
void cp_async_wait() {
  auto& copies = emulation::current->copies;
  for (; copies.size() > PENDING + 1; copies.pop_front()) {
    for (const auto& copy : copies.front()) {
      memset(copy.to, 0, 16);
      memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  if (uintptr_t(row) % 16) emulation::fail("ldmatrix_x4: address not aligned to 16 bytes");
  const auto slots = emulation::exchange(4, row);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i)
    memcpy(&r[i], emulation::lane_value<const char*>(slots, 8 * i + lane / 4) + 4 * (lane % 4), 4);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Fragment { T a[4][2], b[2][2]; } mine;
  memcpy(mine.a, a, sizeof mine.a);
  memcpy(mine.b[0], &b0, 4);
  memcpy(mine.b[1], &b1, 4);
  const auto slots = emulation::exchange(5, mine);
  const int lane = threadIdx.x % 32;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, col = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2;
      const T va = emulation::lane_value<Fragment>(slots, row % 8 * 4 + pair).a[row / 8 + k / 8 * 2][k % 2];
      const T vb = emulation::lane_value<Fragment>(slots, col * 4 + pair).b[k / 8][k % 2];
      d[e] += value_of<T>(va.bits) * value_of<T>(vb.bits);
    }
  }
}

inline float exp2_approx(float x) {
  const float result = exp2f(x);
  return result < 0x1p-126f ? 0 : result;
}

inline unsigned warp_min(unsigned v) {
  const auto slots = emulation::exchange(6, v);
  for (int lane = 0; lane < 32; ++lane) v = std::min(v, emulation::lane_value<unsigned>(slots, lane));
  return v;
}

inline unsigned warp_sum(unsigned v) {
  const auto slots = emulation::exchange(8, v);
  v = 0;
  for (int lane = 0; lane < 32; ++lane) v += emulation::lane_value<unsigned>(slots, lane);
  return v;
}

// No-ops for a cluster of one block, as before compute capability 9.0.
inline void cluster_arrive() {
  auto& fiber = *emulation::current;
  if (fiber.block->cluster) fiber.cluster_generation = emulation::arrive(*fiber.block->cluster);
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  auto& fiber = *emulation::current;
  if (fiber.block->cluster) emulation::wait_for_change(&fiber.block->cluster->generation, fiber.cluster_generation);
}

template <class V>
V* cluster_peer(V* place, unsigned block) {
  auto& self = *emulation::current->block;
  if (block > self.rank && !self.cluster) emulation::fail("cluster_peer: no such block");
  auto& peer = *(&self - self.rank + block);
  if (peer.cluster != self.cluster) emulation::fail("cluster_peer: block of another cluster");
  if (self.cluster && self.cluster->generation == 0) emulation::fail("cluster_peer: the block may not have started");
  const auto offset = reinterpret_cast<unsigned char*>(place) - self.shared.data();
  if (offset < 0 || offset >= int64_t(self.shared.size())) emulation::fail("cluster_peer: not in shared memory");
  return reinterpret_cast<V*>(peer.shared.data() + offset);
}

inline void arrive_release(unsigned* counter) { ++*counter; }
inline void wait_acquire(const unsigned* counter, unsigned target) {
  for (unsigned seen; static_cast<int>((seen = *counter) - target) < 0;) emulation::wait_for_change(counter, seen);
}

}  // namespace pruneops
