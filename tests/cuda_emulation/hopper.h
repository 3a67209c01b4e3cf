// Emulates csrc/cuda/hopper.cuh. Include it before the kernels; copies and products are performed as late as allowed.

#pragma once

#include "runtime.h"

#include <map>

namespace emulation {

// x [batch, rows, width] of 2-byte elements in boxes of `box_rows` rows of 64 features, with the 128-byte swizzle.
struct TensorMap {
  const uint16_t* data;
  int64_t row_stride, batch_stride;
  int width, rows, batch, box_rows;
};

struct Mbarrier {
  unsigned count = 0, arrived = 0, waiting = 0;
  int64_t bytes = 0;  // expected minus copied
  std::vector<std::function<int64_t()>> copies;
};
inline std::map<const void*, Mbarrier> mbarriers;

// The low half of the barrier's word counts phases.
inline void complete_if_done(uint64_t* word, Mbarrier& barrier) {
  if (barrier.arrived < barrier.count || barrier.bytes != 0) return;
  barrier.arrived = 0;
  ++*reinterpret_cast<unsigned*>(word);
}
inline Mbarrier& mbarrier_at(uint64_t* word) {
  if (!mbarriers.count(word)) fail("mbarrier: not initialised");
  return mbarriers[word];
}
inline void do_copies(uint64_t* word) {
  auto& barrier = mbarrier_at(word);
  auto copies = std::move(barrier.copies);
  barrier.copies.clear();
  for (auto& copy : copies) barrier.bytes -= copy();
  if (!copies.empty()) complete_if_done(word, barrier);
}
inline void add_copy(uint64_t* word, std::function<int64_t()> copy) {
  mbarrier_at(word).copies.push_back(std::move(copy));
  if (mbarrier_at(word).waiting) do_copies(word);
}

inline size_t shared_offset(const Block& block, const void* place) {
  const auto offset = static_cast<const unsigned char*>(place) - block.shared.data();
  if (offset < 0 || offset >= int64_t(block.shared.size())) fail("hopper: not in shared memory");
  return offset;
}
inline Block& cluster_block(unsigned rank) {
  auto& self = *current->block;
  return *(&self - self.rank + rank);
}
inline size_t swizzled(size_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

inline int64_t copy_box(Block& block, size_t to, const TensorMap& map, int feature, int row, int batch) {
  for (int r = 0; r < map.box_rows; ++r)
    for (int f = 0; f < 64; ++f) {
      const bool inside = feature + f < map.width && row + r >= 0 && row + r < map.rows && batch < map.batch;
      const uint16_t v = inside ? map.data[batch * map.batch_stride + (row + r) * map.row_stride + feature + f] : 0;
      memcpy(block.shared.data() + swizzled(to + 128 * r + 2 * f), &v, 2);
    }
  return int64_t(map.box_rows) * 128;
}

// Products of each thread that have been issued, in committed groups; the last is not committed.
inline std::map<const Fiber*, std::deque<std::vector<std::function<void()>>>> products;

}  // namespace emulation

namespace pruneops {

using TensorMap = emulation::TensorMap;

inline void mbarrier_init(uint64_t* barrier, unsigned count) {
  if (uintptr_t(barrier) % 8) emulation::fail("mbarrier_init: not aligned");
  *barrier = 0;
  emulation::mbarriers[barrier] = {count};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) {
  auto& state = emulation::mbarrier_at(barrier);
  if (++state.arrived > state.count) emulation::fail("mbarrier_arrive: more arrivals than expected");
  emulation::complete_if_done(barrier, state);
}
inline void mbarrier_arrive_peer(uint64_t* barrier, unsigned block) {
  const size_t offset = emulation::shared_offset(*emulation::current->block, barrier);
  mbarrier_arrive(reinterpret_cast<uint64_t*>(emulation::cluster_block(block).shared.data() + offset));
}
inline void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  emulation::mbarrier_at(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}
inline void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  const auto* phase = reinterpret_cast<const unsigned*>(barrier);
  auto& state = emulation::mbarrier_at(barrier);
  ++state.waiting;
  emulation::do_copies(barrier);
  while (*phase % 2 == parity) emulation::wait_for_change(phase, *phase);
  --state.waiting;
}

inline void mbarrier_wait_cluster(uint64_t* barrier, unsigned parity) { mbarrier_wait(barrier, parity); }

template <class V>
V* peer_place(V* place, unsigned block) {
  if (emulation::current->block->cluster && emulation::current->block->cluster->generation == 0)
    emulation::fail("hopper: the block may not have started");
  const size_t offset = emulation::shared_offset(*emulation::current->block, place);
  return reinterpret_cast<V*>(emulation::cluster_block(block).shared.data() + offset);
}
inline void mbarrier_arrive_expect_peer(uint64_t* barrier, unsigned bytes, unsigned block) {
  mbarrier_arrive_expect(peer_place(barrier, block), bytes);
}
template <class V>
void store_async(V* to, V value, uint64_t* barrier, unsigned block) {
  if (uintptr_t(to) % sizeof(V)) emulation::fail("store_async: not aligned");
  V* place = peer_place(to, block);
  emulation::add_copy(peer_place(barrier, block), [=] {
    memcpy(place, &value, sizeof value);
    return int64_t(sizeof value);
  });
}

inline void tensor_copy(void* to, const TensorMap& map, int feature, int row, int batch, uint64_t* barrier) {
  auto& block = *emulation::current->block;
  const size_t offset = emulation::shared_offset(block, to);
  if (offset % 128) emulation::fail("tensor_copy: not aligned to 128 bytes");
  emulation::add_copy(barrier, [=, &block] { return emulation::copy_box(block, offset, map, feature, row, batch); });
}
inline void tensor_multicast(void* to, const TensorMap& map, int feature, int row, int batch, uint64_t* barrier,
                             unsigned blocks) {
  auto& self = *emulation::current->block;
  const size_t offset = emulation::shared_offset(self, to), place = emulation::shared_offset(self, barrier);
  for (unsigned rank = 0; rank < 16; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    auto& block = emulation::cluster_block(rank);
    emulation::add_copy(reinterpret_cast<uint64_t*>(block.shared.data() + place),
                        [=, &block] { return emulation::copy_box(block, offset, map, feature, row, batch); });
  }
}
inline void fence_proxy_async() {}
inline void dependency_wait() {}
inline void dependents_launch() {}

// Here an operand is its offset in the block's shared memory.
inline uint64_t wgmma_operand(const void* tile) {
  return emulation::shared_offset(*emulation::current->block, tile);
}
inline uint64_t wgmma_next(uint64_t operand, int k) { return operand + 32 * k; }
inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto& groups = emulation::products[emulation::current];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
template <int PENDING>
void wgmma_wait() {
  auto& groups = emulation::products[emulation::current];
  for (; groups.size() > PENDING + 1; groups.pop_front())
    for (auto& product : groups.front()) product();
}
template <class T, int REGISTERS>
void wgmma(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool accumulate) {
  const unsigned char* memory = emulation::current->block->shared.data();
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float* sums = d;
  const auto value = [=](uint64_t operand, int row, int k) {
    T v;
    memcpy(&v, memory + emulation::swizzled(operand + 128 * row + 2 * k), 2);
    return value_of<T>(v.bits);
  };
  auto& groups = emulation::products[emulation::current];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back([=] {
    for (int i = 0; i < REGISTERS; ++i) {
      const int row = 16 * warp + lane / 4 + i % 4 / 2 * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = accumulate ? sums[i] : 0;
      for (int k = 0; k < 16; ++k) sum += value(a, row, k) * value(b, col, k);
      sums[i] = sum;
    }
  });
}
template <int COUNT>
void settle(float (&)[COUNT]) {}
template <int REGISTERS>
void release_registers() {}
template <int REGISTERS>
void acquire_registers() {}

}  // namespace pruneops
