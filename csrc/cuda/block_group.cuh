// A team of co-resident blocks that meet without leaving the kernel.

#pragma once

#include "cuda/primitives.cuh"

namespace pruneops {

constexpr int kTeamPitch = 32;  // counters of two teams never share a cache line

// Needs a cooperative launch, and a counter that was zero when it began.
struct Team {
  unsigned* arrivals;
  int blocks;
  int rank;  // of this block
  unsigned target = 0;

  // All threads of all blocks; what any wrote before is seen by every one after. About 2 us over 132 blocks.
  __device__ void meet() {
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
