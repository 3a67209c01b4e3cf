// What the two paths of greedy k-center selection share; kcenter.cu describes them. See docs/kernels/kcenter.md.

#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/keys.cuh"
#include "cuda/primitives.cuh"
#include "cuda/similarity.cuh"
#include "cuda/tile.cuh"
#include "cuda/views.cuh"

namespace pruneops {


// seeds [B, P], null without seeds, and mask [B, N].
struct SeedsAndMask {
  const int64_t* seeds;
  int64_t seeds_stride[2];
  int64_t seeds_count;
  MaskView mask;

  // Seed `step` of a batch row, relative to `begin`; -1 if it is not in [0, n).
  __device__ int seed(int64_t row, int64_t step, int64_t begin, int n) const {
    const int64_t token = seeds[row * seeds_stride[0] + step * seeds_stride[1]] - begin;
    return token >= 0 && token < n ? static_cast<int>(token) : -1;
  }
  __device__ bool allows(int64_t row, int64_t token) const { return mask.at(row, token, true); }
};

struct Output {
  int64_t* indices;
  float* radii;
  bool cosine;

  // similarity: of the token to the set chosen before it; NaN if no token was left.
  __device__ void write(int64_t position, int64_t token, float similarity) const {
    const float distance = cosine ? fmaxf(0.0f, 1.0f - similarity) : sqrtf(fmaxf(0.0f, -similarity));
    indices[position] = token;
    radii[position] = similarity < INFINITY ? distance : NAN;
  }
};

// max(s, sim), or s if either is NaN.
__device__ __forceinline__ float update_max(float s, float sim) { return s < sim ? sim : s; }

}  // namespace pruneops
