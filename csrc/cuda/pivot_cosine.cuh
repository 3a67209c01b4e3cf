// Kernel of pivot cosines; pivot_cosine.cu describes it. See docs/kernels/pivot_cosine.md.

#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/primitives.cuh"
#include "cuda/similarity.cuh"
#include "cuda/tile.cuh"
#include "cuda/views.cuh"

namespace pruneops {

constexpr int kGroupSize = 8;  // pivots of one tensor-core product
constexpr int kSpan = 4;       // consecutive chunks of one warp
template <class T>
constexpr int kChunk = 4 * kVecSize<T>;  // features of a row that four lanes load together: 64 bytes
template <class T>
constexpr int kMaxPivotGroups = sizeof(T) == 2 ? 8 : 2;  // of kGroupSize pivots, in one pass over x

enum class Reduce { kNone, kMax, kMean, kSum };

template <class T>
struct PivotCosine {
  Tokens<T> x;
  const int64_t* pivots;  // [B, P]; of a packed x [n, P]
  int64_t pivots_stride[2];
  MaskView mask;
  const int64_t* cu_seqlens;  // [n + 1], or null
  int tokens;                 // N, or T
  int sequences;              // n
  int pivots_count;           // P
  Reduce reduce;
  float* out;  // [B, P, N], reduced [B, N]; of a packed x [P, T], [T]
};

// Number of blocks, of `rows` tokens each. Sequence s of a packed x starts at block cu_seqlens[s] / rows + s, which
// leaves enough blocks for any length: the host does not read cu_seqlens.
template <class T>
int64_t block_count(const PivotCosine<T>& p, int64_t batch, int rows) {
  return p.cu_seqlens ? p.tokens / rows + p.sequences : batch * ((p.tokens + rows - 1) / rows);
}

// One warp's accumulators: dot products of 16 TILES rows of x with 8 GROUPS pivots. Lane l holds a quarter of each
// chunk, vector l % 4, of rows l / 4 + 8 i and of pivots l / 4 + 8 j. The mma fragments number features differently;
// both operands use the same permutation, which leaves the dot products unchanged.
template <class T, int TILES, int GROUPS>
struct Dots {
  float sum[TILES][GROUPS][4] = {};  // [16 rows][8 pivots][element of the mma fragment]

  // A chunk of the rows and of pivots 8 j to 8 j + 7.
  __device__ __forceinline__ void add(const uint4 (&a)[2 * TILES], const uint4& b, int j) {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      const uint4 upper = a[2 * t], lower = a[2 * t + 1];
      mma_m16n8k16<T>(sum[t][j], {upper.x, lower.x, upper.y, lower.y}, b.x, b.y);
      mma_m16n8k16<T>(sum[t][j], {upper.z, lower.z, upper.w, lower.w}, b.z, b.w);
    }
  }

  // Calls put(row, pivot, sum) for every sum.
  template <class Put>
  __device__ void for_each(const Put& put) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int j = 0; j < GROUPS; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          put(16 * t + lane / 4 + e / 2 * 8, kGroupSize * j + lane % 4 * 2 + e % 2, sum[t][j][e]);
  }
};

// Sum over the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

template <int TILES, int GROUPS>
struct Dots<float, TILES, GROUPS> {
  float sum[2 * TILES][kGroupSize * GROUPS] = {};  // of this lane's features

  __device__ __forceinline__ void add(const uint4 (&a)[2 * TILES], const uint4& b, int j) {
#pragma unroll
    for (int p = 0; p < kGroupSize; ++p) {
      const int lane = 4 * p + threadIdx.x % 4;  // holds this vector of pivot p
      const float x = from_lane(b.x, lane), y = from_lane(b.y, lane);
      const float z = from_lane(b.z, lane), w = from_lane(b.w, lane);
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i) {
        float& s = sum[i][kGroupSize * j + p];
        s = fmaf(__uint_as_float(a[i].x), x, s);
        s = fmaf(__uint_as_float(a[i].y), y, s);
        s = fmaf(__uint_as_float(a[i].z), z, s);
        s = fmaf(__uint_as_float(a[i].w), w, s);
      }
    }
  }

  template <class Put>
  __device__ void for_each(const Put& put) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
#pragma unroll
      for (int p = 0; p < kGroupSize * GROUPS; ++p) {
        const float s = quad_sum(sum[i][p]);
        if (lane % 4 == p % 4) put(lane / 4 + 8 * i, p, s);
      }
    }
  }

 private:
  __device__ static float from_lane(unsigned word, int lane) { return __uint_as_float(__shfl_sync(~0u, word, lane)); }
};

// Up to 16 TILES tokens of one batch row or sequence.
struct TokenTile {
  int64_t batch;   // row of x, mask and out
  int64_t pivots;  // row of pivots
  int first, count;

  template <class T>
  __device__ TokenTile(const PivotCosine<T>& p, int rows) {
    int end = p.tokens;
    if (p.cu_seqlens) {
      const int lane = threadIdx.x % 32;
      const auto first_block = [&](int s) { return p.cu_seqlens[s] / rows + s; };
      int sequence = 0;
      for (int size = p.sequences; size > 1;) {  // the last sequence whose first block is <= blockIdx.x
        const int step = (size + 31) / 32, probe = lane * step;
        const bool not_past = probe < size && first_block(sequence + probe) <= blockIdx.x;
        const int skip = (__popc(__ballot_sync(~0u, not_past)) - 1) * step;
        sequence += skip;
        size = min(step, size - skip);
      }
      batch = 0;
      pivots = sequence;
      end = p.cu_seqlens[sequence + 1];
      first = p.cu_seqlens[sequence] + (blockIdx.x - first_block(sequence)) * rows;
    } else {
      const int tiles = (p.tokens + rows - 1) / rows;
      batch = pivots = blockIdx.x / tiles;
      first = blockIdx.x % tiles * rows;
    }
    count = min(rows, end - first);
  }
};

template <int TILES, int GROUPS>
struct PivotShared {
  static constexpr int kRows = 16 * TILES, kPivots = kGroupSize * GROUPS;
  float sum[kWarps][kPivots][kRows];
  float square[kWarps][kRows + kPivots];
  float norm_factor[kRows + kPivots];
};

// A block per 16 TILES tokens. Its warps split the features; there is one pass over x per 8 GROUPS pivots.
template <class T, int TILES, int GROUPS>
__global__ void __launch_bounds__(kThreads, GROUPS == 1 ? 2 : 1)
    pivot_cosine_pass(const __grid_constant__ PivotCosine<T> p) {
  using Shared = PivotShared<TILES, GROUPS>;
  constexpr int kRows = Shared::kRows, kPivots = Shared::kPivots;
  constexpr int kBatch = TILES * GROUPS < kSpan ? kSpan / (TILES * GROUPS) : 1;  // chunks in flight
  Shared& sh = shared<Shared>();
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, vec_offset = lane % 4 * kVecSize<T>;
  const TokenTile tile(p, kRows);
  if (tile.count <= 0) return;
  const Matrix<T> x = p.x.matrix(tile.batch * p.x.batch_stride);
  const int64_t* pivots = p.pivots + tile.pivots * p.pivots_stride[0];
  const T* row[2 * TILES];
#pragma unroll
  for (int i = 0; i < 2 * TILES; ++i)
    row[i] = x.data + (tile.first + min(lane / 4 + 8 * i, tile.count - 1)) * x.stride;

  const int chunks = (x.width + kChunk<T> - 1) / kChunk<T>, full_chunks = x.aligned ? x.width / kChunk<T> : 0;
  float reduced = p.reduce == Reduce::kMax ? -INFINITY : 0;  // of token `tid` of the tile
  for (int first = 0; first < p.pivots_count; first += kPivots) {
    const T* pivot[GROUPS];
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
      const int index = min(first + lane / 4 + kGroupSize * j, p.pivots_count - 1);
      pivot[j] = x.data + pivots[index * p.pivots_stride[1]] * x.stride;
    }
    Dots<T, TILES, GROUPS> dots;
    float square[2 * TILES] = {}, pivot_square[GROUPS] = {};
    const auto add_rows = [&](const uint4 (&a)[2 * TILES]) {
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i) square[i] = add_squares<T>(square[i], a[i]);
    };
    const auto add_pivots = [&](const uint4 (&a)[2 * TILES], const uint4& b, int j) {
      dots.add(a, b, j);
      pivot_square[j] = add_squares<T>(pivot_square[j], b);
    };
#pragma unroll 1
    for (int from = warp * kSpan; from < chunks; from += kWarps * kSpan) {
#pragma unroll 1
      for (int chunk = from; chunk < min(from + kSpan, chunks);) {
        const int k = chunk * kChunk<T> + vec_offset;
        if (chunk + kBatch <= full_chunks) {
          uint4 a[kBatch][2 * TILES], b[kBatch][GROUPS];
#pragma unroll
          for (int c = 0; c < kBatch; ++c)
#pragma unroll
            for (int i = 0; i < 2 * TILES; ++i) a[c][i] = load_vec(row[i] + k + c * kChunk<T>);
#pragma unroll
          for (int c = 0; c < kBatch; ++c)
#pragma unroll
            for (int j = 0; j < GROUPS; ++j) b[c][j] = load_vec(pivot[j] + k + c * kChunk<T>);
#pragma unroll
          for (int c = 0; c < kBatch; ++c) {
            add_rows(a[c]);
#pragma unroll
            for (int j = 0; j < GROUPS; ++j) add_pivots(a[c], b[c][j], j);
          }
          chunk += kBatch;
        } else {
          uint4 a[2 * TILES];
#pragma unroll
          for (int i = 0; i < 2 * TILES; ++i) a[i] = load_vec_padded(x, row[i], k);
          add_rows(a);
#pragma unroll
          for (int j = 0; j < GROUPS; ++j) add_pivots(a, load_vec_padded(x, pivot[j], k), j);
          ++chunk;
        }
      }
    }

    __syncthreads();  // the previous pass no longer reads shared memory
    dots.for_each([&](int r, int c, float sum) { sh.sum[warp][c][r] = sum; });
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
      const float sum = quad_sum(square[i]);
      if (lane % 4 == 0) sh.square[warp][lane / 4 + 8 * i] = sum;
    }
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
      const float sum = quad_sum(pivot_square[j]);
      if (lane % 4 == 0) sh.square[warp][kRows + lane / 4 + kGroupSize * j] = sum;
    }
    __syncthreads();
    if (tid < kRows + kPivots) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += sh.square[w][tid];
      sh.norm_factor[tid] = norm_factor(sum, true);
    }
    __syncthreads();
    const int pass_pivots = min(kPivots, p.pivots_count - first);
    for (int i = tid; i < kRows * pass_pivots; i += kThreads) {
      const int r = i % kRows, c = i / kRows;
      const int64_t token = tile.first + r;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += sh.sum[w][c][r];
      const float cosine = similarity(sum, sh.norm_factor[r], sh.norm_factor[kRows + c], true);
      if (p.reduce != Reduce::kNone) {
        sh.sum[0][c][r] = cosine;
      } else if (r < tile.count) {
        const bool allowed = p.mask.at(tile.batch, token, true);
        p.out[(tile.batch * p.pivots_count + first + c) * p.tokens + token] = allowed ? cosine : INFINITY;
      }
    }
    if (p.reduce != Reduce::kNone) {
      __syncthreads();
      for (int c = 0; c < pass_pivots && tid < kRows; ++c) {
        const float cosine = sh.sum[0][c][tid];
        if (p.reduce != Reduce::kMax)
          reduced += cosine;
        else if (reduced < cosine || cosine != cosine)  // keeps NaN
          reduced = cosine;
      }
    }
  }
  if (p.reduce != Reduce::kNone && tid < tile.count) {
    const int64_t token = tile.first + tid;
    if (p.reduce == Reduce::kMean) reduced /= p.pivots_count;
    p.out[tile.batch * p.tokens + token] = p.mask.at(tile.batch, token, true) ? reduced : INFINITY;
  }
}

}  // namespace pruneops
