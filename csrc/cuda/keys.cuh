// Scores as unsigned integers that sort alike: ties to the lowest index, +inf last, excluded past all.

#pragma once

#include <cstdint>

#include "cuda/primitives.cuh"

namespace pruneops {

using Key = unsigned long long;  // ordered(score) in the upper half, index in the lower

constexpr unsigned kExcluded = ~0u;         // ordered(NaN)
constexpr unsigned kInfinite = 0xff800000u;  // ordered(+inf)
constexpr Key kNoKey = ~Key(0);

__device__ __forceinline__ unsigned ordered_number(float score) {
  const unsigned bits = __float_as_uint(score + 0.0f);  // -0 and +0 are one score
  return bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ unsigned ordered(float score) { return score != score ? kExcluded : ordered_number(score); }

__device__ __forceinline__ float score_of(unsigned order) {
  return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

__device__ __forceinline__ Key make_key(unsigned order, unsigned index) { return Key(order) << 32 | index; }
__device__ __forceinline__ unsigned order_of(Key key) { return unsigned(key >> 32); }
__device__ __forceinline__ unsigned index_of(Key key) { return unsigned(key); }
__device__ __forceinline__ bool available(Key key) { return order_of(key) != kExcluded; }

// The least key of a warp, in all its lanes.
__device__ __forceinline__ Key warp_least(Key key) {
  const unsigned order = warp_min(order_of(key));
  return make_key(order, warp_min(order_of(key) == order ? index_of(key) : ~0u));
}

// The least key of a block, in all its threads; `slots`, 32 of them, must not be those of the call before.
__device__ __forceinline__ Key block_least(Key key, Key* slots) {
  const int lane = threadIdx.x % 32;
  key = warp_least(key);
  if (lane == 0) slots[threadIdx.x / 32] = key;
  __syncthreads();
  return warp_least(lane < blockDim.x / 32 ? slots[lane] : kNoKey);
}

}  // namespace pruneops
