// A block group: co-resident blocks of one launch that synchronise within the kernel.

#pragma once

#include "cuda/primitives.cuh"

namespace pruneops {

constexpr int kBarrierPitch = 32;  // in counters: no two groups share a cache line

// Needs a cooperative launch, and a counter per group that is zero at launch.
struct BlockGroup {
  unsigned* arrivals;
  int blocks;
  int rank;  // of this block
  unsigned target = 0;

  // Barrier over all threads of all blocks; writes before it are visible to all after it. About 2 us for 132 blocks.
  __device__ void sync() {
    __syncthreads();
    if (blocks == 1) return;
    target += blocks;
    if (threadIdx.x == 0) {
      arrive_release(arrivals);
      wait_acquire(arrivals, target);
    }
    __syncthreads();
  }
};

}  // namespace pruneops
