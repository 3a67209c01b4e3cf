// Selection keys. A key orders tokens by score, then by index; +inf is the last score, excluded tokens sort after it.

#pragma once

#include <cstdint>

#include "cuda/primitives.cuh"

namespace pruneops {

using Key = unsigned long long;  // score bits (ordered_bits) in the upper half, token index in the lower

constexpr unsigned kExcluded = ~0u;                 // score bits of an excluded token
constexpr unsigned kOrderedInfinity = 0xff800000u;  // ordered_bits(+inf)
constexpr Key kLastKey = ~Key(0);

// The bits of a score, mapped so that unsigned comparison sorts as the scores do. Not for NaN.
__device__ __forceinline__ unsigned ordered_bits(float score) {
  const unsigned bits = __float_as_uint(score + 0.0f);  // -0 becomes +0
  return bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

// NaN marks an excluded token.
__device__ __forceinline__ unsigned ordered_or_excluded(float score) {
  return score != score ? kExcluded : ordered_bits(score);
}

// Inverse of ordered_bits.
__device__ __forceinline__ float score_of(unsigned bits) {
  return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

__device__ __forceinline__ Key make_key(unsigned bits, unsigned index) { return Key(bits) << 32 | index; }
__device__ __forceinline__ unsigned bits_of(Key key) { return unsigned(key >> 32); }
__device__ __forceinline__ unsigned index_of(Key key) { return unsigned(key); }
__device__ __forceinline__ bool available(Key key) { return bits_of(key) != kExcluded; }

// Minimum over a warp, returned to all lanes.
__device__ __forceinline__ Key warp_min_key(Key key) {
  const unsigned bits = warp_min(bits_of(key));
  return make_key(bits, warp_min(bits_of(key) == bits ? index_of(key) : ~0u));
}

// Minimum over a block, returned to all threads. `slots` holds 32 keys; two calls in a row need different slots.
__device__ __forceinline__ Key block_min_key(Key key, Key* slots) {
  const int lane = threadIdx.x % 32;
  key = warp_min_key(key);
  if (lane == 0) slots[threadIdx.x / 32] = key;
  __syncthreads();
  return warp_min_key(lane < blockDim.x / 32 ? slots[lane] : kLastKey);
}

}  // namespace pruneops
