// Similarity of two tokens from their product and one number of each.

#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/primitives.cuh"

namespace pruneops {

// What similarity needs of one token besides the product: 1 / norm (cosine; 0 for a zero vector) or squared norm
// (euclidean). NaN for a token that is not finite, so that its similarities are NaN and never compare.
__device__ __forceinline__ float companion_of(float square, bool cosine) {
  if (!(square <= FLT_MAX / 4)) return NAN;
  if (!cosine) return square;
  return square < FLT_MIN ? 0.0f : 1.0f / sqrtf(square);
}

// Symmetric to the bit.
__device__ __forceinline__ float similarity(float dot, float a, float b, bool cosine) {
  return cosine ? dot * (a * b) : 2 * dot - (a + b);
}

}  // namespace pruneops
