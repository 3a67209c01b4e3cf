// Similarity of two tokens from their dot product and a norm factor of each.

#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/primitives.cuh"

namespace pruneops {

// `square` is |x|^2. Cosine: 1 / |x|, 0 for a zero vector. Euclidean: |x|^2. NaN for a non-finite token, so that every
// comparison with its similarities is false.
__device__ __forceinline__ float norm_factor(float square, bool cosine) {
  if (!(square <= FLT_MAX / 4)) return NAN;
  if (!cosine) return square;
  return square < FLT_MIN ? 0.0f : 1.0f / sqrtf(square);
}

// similarity(dot, a, b) and similarity(dot, b, a) have the same bits.
__device__ __forceinline__ float similarity(float dot, float a, float b, bool cosine) {
  return cosine ? dot * (a * b) : 2 * dot - (a + b);
}

}  // namespace pruneops
