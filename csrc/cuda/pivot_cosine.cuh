// Kernel of pivot cosines; pivot_cosine.cu describes it. See docs/kernels/pivot_cosine.md.

#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/hopper.cuh"
#include "cuda/primitives.cuh"
#include "cuda/similarity.cuh"
#include "cuda/tile.cuh"
#include "cuda/views.cuh"

namespace pruneops {

constexpr int kGroupSize = 8;   // pivots of one tensor-core product
constexpr int kTokenTiles = 3;  // of kGroupSize tokens, of one block
constexpr int kBlockTokens = kTokenTiles * kGroupSize;
constexpr int kSliceBytes = 128;  // of a row, that a warp multiplies at a time
constexpr int kSlotBytes = kBlockTokens * kSliceBytes;
constexpr int kChunks = 2;  // of a slice; the four lanes of a row load one together, 16 bytes each
template <class T>
constexpr int kChunk = 4 * kVecSize<T>;
template <class T>
constexpr int kSlice = kChunks * kChunk<T>;
template <class T>
constexpr int kMaxPivotGroups = sizeof(T) == 2 ? 8 : 4;  // of kGroupSize pivots, in one pass over x
template <class T, int GROUPS>
constexpr int kPivotBatch = GROUPS == 1 ? 1 : kMaxPivotGroups<T> / 2;  // groups loaded together

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
  int block_tokens;           // tokens of a block, at most kBlockTokens
  int row_blocks;             // blocks of a batch row
  Reduce reduce;
  float* out;  // [B, P, N], reduced [B, N]; of a packed x [P, T], [T]
};

// Number of blocks, of `rows` tokens each. Sequence s of a packed x starts at block cu_seqlens[s] / rows + s, which
// leaves enough blocks for any length: the host does not read cu_seqlens.
template <class T>
int64_t block_count(const PivotCosine<T>& p, int64_t batch, int rows) {
  return p.cu_seqlens ? p.tokens / rows + p.sequences : batch * ((p.tokens + rows - 1) / rows);
}

// Sets the tokens of a block: the fewest, at least `least`, with which as few waves of `slots` co-resident blocks
// suffice as with kBlockTokens. Returns the number of blocks.
template <class T>
int64_t share_tokens(PivotCosine<T>& p, int64_t batch, int least, int64_t slots) {
  const int64_t waves = (block_count(p, batch, kBlockTokens) + slots - 1) / slots;
  int rows = least;
  while (rows < kBlockTokens && block_count(p, batch, rows) > waves * slots) ++rows;
  p.block_tokens = rows;
  p.row_blocks = (p.tokens + rows - 1) / rows;
  return block_count(p, batch, rows);
}

// One warp's dot products of kBlockTokens tokens with 8 GROUPS pivots, and the squared norms of both. Lane l holds
// vector l % 4 of each chunk, of tokens l / 4 + 8 t and of pivots l / 4 + 8 j: 16 bytes that are one operand of two mma
// instructions, whose order of features is the same for tokens and pivots and leaves the dot products unchanged.
// Tokens are the eight columns of a product, pivots its rows. The product of eight rows with themselves has their
// squared norms on its diagonal. Tensor cores add up one slice; float32 additions do the rest.
template <class T, int GROUPS>
struct Dots {
  static constexpr int kPairs = (GROUPS + 1) / 2, kBatch = kPivotBatch<T, GROUPS>;
  float sum[kTokenTiles][kPairs][4] = {};  // [8 tokens][16 pivots][element of the mma fragment]
  float square[kTokenTiles + GROUPS] = {};

  // Tokens and groups j0 to j0 + kBatch - 1 of the pivots, of which the first `groups` count.
  __device__ __forceinline__ void add(const uint4 (&a)[kChunks][kTokenTiles], const uint4 (&b)[kChunks][kBatch],
                                      int j0, int groups) {
#pragma unroll
    for (int m = 0; m < (kBatch + 1) / 2; ++m) {  // outside: the operand of the pivots is shared by the tiles
      if (2 * m >= groups) continue;
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        float d[4] = {};
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
          multiply(d, b[c][2 * m], GROUPS == 1 ? a[c][t] : b[c][(2 * m + 1) % kBatch], a[c][t]);
        if (GROUPS == 1) square[t] += diagonal(d);
#pragma unroll
        for (int e = 0; e < (GROUPS == 1 ? 2 : 4); ++e) sum[t][j0 / 2 + m][e] += d[e];
      }
    }
    if (GROUPS > 1 && j0 == 0) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) square[t] += squares(a[0][t], a[1][t]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      if (j < groups) square[kTokenTiles + j0 + j] += squares(b[0][j], b[1][j]);
  }

  // Calls put(token, pivot, sum) for every sum.
  template <class Put>
  __device__ void for_each(const Put& put) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int j = 0; j < GROUPS; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          put(kGroupSize * t + lane % 4 * 2 + e, kGroupSize * j + lane / 4, sum[t][j / 2][j % 2 * 2 + e]);
  }

  // Calls put(row, square): tokens, then pivots.
  template <class Put>
  __device__ void for_each_square(const Put& put) const {
    const int lane = threadIdx.x % 32;
    if (lane / 8 != lane % 4) return;
#pragma unroll
    for (int i = 0; i < kTokenTiles + GROUPS; ++i) put(kGroupSize * i + lane / 4, square[i]);
  }

 private:
  // d [16, 8] += rows 0 to 7 and 8 to 15 of a chunk with the columns.
  __device__ static void multiply(float (&d)[4], const uint4& upper, const uint4& lower, const uint4& columns) {
    mma_m16n8k16<T>(d, {upper.x, lower.x, upper.y, lower.y}, columns.x, columns.y);
    mma_m16n8k16<T>(d, {upper.z, lower.z, upper.w, lower.w}, columns.z, columns.w);
  }

  // Of rows 8 to 15: element (8 + l / 4, l / 4) in the lanes with l / 8 = l % 4.
  __device__ static float diagonal(const float (&d)[4]) { return threadIdx.x / 4 % 2 ? d[3] : d[2]; }

  __device__ static float squares(const uint4& chunk0, const uint4& chunk1) {
    float d[4] = {};
    multiply(d, chunk0, chunk0, chunk0);
    multiply(d, chunk1, chunk1, chunk1);
    return diagonal(d);
  }
};

// Sum over the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

template <int GROUPS>
struct Dots<float, GROUPS> {
  static constexpr int kBatch = kPivotBatch<float, GROUPS>;
  float sum[kTokenTiles][kGroupSize * GROUPS] = {};  // of this lane's features
  float square[kTokenTiles + GROUPS] = {};

  __device__ __forceinline__ void add(const uint4 (&a)[kChunks][kTokenTiles], const uint4 (&b)[kChunks][kBatch],
                                      int j0, int groups) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
        if (j0 == 0) square[t] = add_squares<float>(square[t], a[c][t]);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (j >= groups) continue;
        float& s = square[kTokenTiles + j0 + j];
        s = add_squares<float>(s, b[c][j]);
        add_group(a[c], b[c][j], j0 + j);
      }
    }
  }

  template <class Put>
  __device__ void for_each(const Put& put) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int p = 0; p < kGroupSize * GROUPS; ++p) {
        const float s = quad_sum(sum[t][p]);
        if (lane % 4 == p % 4) put(kGroupSize * t + lane / 4, p, s);
      }
    }
  }

  template <class Put>
  __device__ void for_each_square(const Put& put) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kTokenTiles + GROUPS; ++i) {
      const float s = quad_sum(square[i]);
      if (lane % 4 == 0) put(kGroupSize * i + lane / 4, s);
    }
  }

 private:
  __device__ __forceinline__ void add_group(const uint4 (&a)[kTokenTiles], const uint4& b, int j) {
#pragma unroll
    for (int p = 0; p < kGroupSize; ++p) {
      const int lane = 4 * p + threadIdx.x % 4;  // holds this vector of pivot p
      const float x = from_lane(b.x, lane), y = from_lane(b.y, lane);
      const float z = from_lane(b.z, lane), w = from_lane(b.w, lane);
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        float& s = sum[t][kGroupSize * j + p];
        s = fmaf(__uint_as_float(a[t].x), x, s);
        s = fmaf(__uint_as_float(a[t].y), y, s);
        s = fmaf(__uint_as_float(a[t].z), z, s);
        s = fmaf(__uint_as_float(a[t].w), w, s);
      }
    }
  }

  __device__ static float from_lane(unsigned word, int lane) { return __uint_as_float(__shfl_sync(~0u, word, lane)); }
};

// The tokens of a block: up to p.block_tokens of one batch row or sequence.
struct TokenTile {
  int64_t batch;   // row of x, mask and out
  int64_t pivots;  // row of pivots
  int first, count;

  template <class T>
  __device__ explicit TokenTile(const PivotCosine<T>& p) {
    const int rows = p.block_tokens, block = blockIdx.x;
    int end = p.tokens;
    if (p.cu_seqlens) {
      const int lane = threadIdx.x % 32;
      const auto first_block = [&](int s) { return static_cast<int>(p.cu_seqlens[s]) / rows + s; };
      int sequence = 0;
      for (int size = p.sequences; size > 1;) {  // the last sequence whose first block is <= block
        const int step = (size + 31) / 32, probe = lane * step;
        const bool not_past = probe < size && first_block(sequence + probe) <= block;
        const int skip = (__popc(__ballot_sync(~0u, not_past)) - 1) * step;
        sequence += skip;
        size = min(step, size - skip);
      }
      batch = 0;
      pivots = sequence;
      end = p.cu_seqlens[sequence + 1];
      first = p.cu_seqlens[sequence] + (block - first_block(sequence)) * rows;
    } else {
      batch = pivots = block < p.row_blocks ? 0 : block / p.row_blocks;
      first = (block - batch * p.row_blocks) * rows;
    }
    count = min(rows, end - first);
  }
};

template <int GROUPS, int STAGES>
struct PivotShared {
  static constexpr int kPivots = kGroupSize * GROUPS;
  union {
    unsigned char slots[kWarps][STAGES][kSlotBytes];
    struct {
      float sum[kWarps][kPivots][kBlockTokens];
      float square[kWarps][kBlockTokens + kPivots];
      float norm_factor[kBlockTokens + kPivots];
      bool allowed[kBlockTokens];
    };
  };
};

// Slices of the tokens of a block, STAGES of them in flight, in slots of one warp. Vectors of odd rows are swapped by
// halves of a row, so that eight lanes which read half a row of two rows each meet no bank conflict.
template <class T, int STAGES>
struct TokenSlices {
  const Matrix<T>& x;
  const T* row;  // this lane copies vector l % 8 of rows l / 8 + 4 i; at the vector of row l / 8 in the first slice
  int count;     // rows of this lane
  unsigned char (&slots)[STAGES][kSlotBytes];

  __device__ TokenSlices(const Matrix<T>& x, const TokenTile& tile, unsigned char (&slots)[STAGES][kSlotBytes])
      : x(x), slots(slots) {
    const int lane = threadIdx.x % 32;
    row = x.data + (tile.first + lane / 8) * x.stride + lane % 8 * kVecSize<T>;
    count = (tile.count - lane / 8 + 3) / 4;
  }

  __device__ static int offset(int row, int vec) { return row * kSliceBytes + (vec ^ row % 2 * 4) * 16; }

  __device__ __forceinline__ void copy(int slice, int stage) const {
    const int lane = threadIdx.x % 32, k = slice * kSlice<T>;
    unsigned char* to = slots[stage] + offset(lane / 8, lane % 8);
    const T* from = row + k;
    if (x.aligned && k + kSlice<T> <= x.width) {
#pragma unroll
      for (int i = 0; i < kBlockTokens / 4; ++i, from += 4 * x.stride)
        if (i < count) cp_async_16(to + 4 * i * kSliceBytes, from, 16);
    } else {
      const int left = x.width - k - lane % 8 * kVecSize<T>;  // features from this lane's vector on
#pragma unroll 1
      for (int i = 0; i < count; ++i, from += 4 * x.stride)
        *reinterpret_cast<uint4*>(to + 4 * i * kSliceBytes) = gather_vec(from, 0, left);
    }
  }

  __device__ __forceinline__ void read(uint4 (&a)[kChunks][kTokenTiles], int stage) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
        a[c][t] = *reinterpret_cast<const uint4*>(slots[stage] + offset(kGroupSize * t + lane / 4, 4 * c + lane % 4));
  }
};

// Multiplies this warp's slices, every kWarps-th. Pivots come straight from L2, a batch of groups ahead of its use.
template <class T, int GROUPS, int STAGES>
__device__ __forceinline__ void multiply_slices(Dots<T, GROUPS>& dots, const Matrix<T>& x, const TokenTile& tile,
                                                const int64_t* pivots, int64_t pivots_stride, int pivots_count,
                                                unsigned char (&slots)[STAGES][kSlotBytes]) {
  constexpr int kBatch = kPivotBatch<T, GROUPS>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slices = (x.width + kSlice<T> - 1) / kSlice<T>;
  const int groups = (pivots_count + kGroupSize - 1) / kGroupSize;
  int pivot[GROUPS];  // loaded ahead of the copies, used behind them
#pragma unroll
  for (int j = 0; j < GROUPS; ++j) pivot[j] = pivots[min(lane / 4 + kGroupSize * j, pivots_count - 1) * pivots_stride];
  const TokenSlices<T, STAGES> tokens(x, tile, slots);
#pragma unroll 1
  for (int stage = 0; stage < STAGES; ++stage) {
    if (warp + stage * kWarps < slices) tokens.copy(warp + stage * kWarps, stage);
    cp_async_commit();
  }

  uint4 a[kChunks][kTokenTiles], b[kChunks][kBatch] = {}, next[kChunks][kBatch] = {};
  const auto load_next = [&](int slice, int j0) {  // groups j0 to j0 + kBatch - 1
    if (slice >= slices) return;
    const int k = slice * kSlice<T> + lane % 4 * kVecSize<T>;
    const auto load_with = [&](const auto& load) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
          if (j0 + j < groups) next[c][j] = load(x.data + pivot[j0 + j] * x.stride, k + c * kChunk<T>);
    };
    if (x.aligned && (slice + 1) * kSlice<T> <= x.width)
      load_with([](const T* row, int at) { return load_vec(row + at); });
    else
      load_with([&](const T* row, int at) { return gather_vec(row, at, x.width); });
  };
  const auto advance = [&] {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int j = 0; j < kBatch; ++j) b[c][j] = next[c][j];
  };
  load_next(warp, 0);
  advance();
  int stage = 0;
#pragma unroll 1
  for (int slice = warp; slice < slices; slice += kWarps) {
    if (GROUPS > kBatch)
      load_next(slice, kBatch % GROUPS);
    else
      load_next(slice + kWarps, 0);
    cp_async_wait<STAGES - 1>();
    __syncwarp();  // the copies of all lanes are visible
    tokens.read(a, stage);
    __syncwarp();  // the slot is no longer read
    if (slice + STAGES * kWarps < slices) tokens.copy(slice + STAGES * kWarps, stage);
    cp_async_commit();  // maybe empty, so that the count of pending groups stays constant
    stage = stage + 1 < STAGES ? stage + 1 : 0;
    dots.add(a, b, 0, groups);
    advance();
    if (GROUPS > kBatch) {
      load_next(slice + kWarps, 0);
      dots.add(a, b, kBatch % GROUPS, groups - kBatch);
      advance();
    }
  }
}

// A block per p.block_tokens tokens. Its warps split the features; there is one pass over x per 8 GROUPS pivots.
template <class T, int GROUPS, int STAGES>
__global__ void __launch_bounds__(kThreads, GROUPS == 1 ? kBlocksPerSM : 1)
    pivot_cosine_pass(const __grid_constant__ PivotCosine<T> p) {
  using Shared = PivotShared<GROUPS, STAGES>;
  constexpr int kPivots = Shared::kPivots, kSumsPerThread = (kPivots * kBlockTokens + kThreads - 1) / kThreads;
  Shared& sh = shared<Shared>();
  const int tid = threadIdx.x, warp = tid / 32;
  dependents_launch();  // the selection of pivot_bottomk
  const TokenTile tile(p);
  if (tile.count <= 0) return;
  const Matrix<T> x = p.x.matrix(tile.batch * p.x.batch_stride);
  const int64_t* pivots = p.pivots + tile.pivots * p.pivots_stride[0];
  unsigned allowed = 1;  // mask byte of token `tid` of the tile: loaded here, tested at the end
  if (p.mask.data && tid < tile.count) {
    const auto* mask = reinterpret_cast<const unsigned char*>(p.mask.data) + tile.batch * p.mask.stride[0];
    allowed = mask[(tile.first + tid) * p.mask.stride[1]];
  }
  float reduced = p.reduce == Reduce::kMax ? -INFINITY : 0;  // of token `tid` of the tile
  for (int first = 0; first < p.pivots_count; first += kPivots) {
    const int pass_pivots = min(kPivots, p.pivots_count - first);
    Dots<T, GROUPS> dots;
    multiply_slices<T, GROUPS, STAGES>(dots, x, tile, pivots + first * p.pivots_stride[1], p.pivots_stride[1],
                                       pass_pivots, sh.slots[warp]);
    __syncthreads();  // the slots are no longer read
    dots.for_each([&](int r, int c, float sum) { sh.sum[warp][c][r] = sum; });
    dots.for_each_square([&](int row, float square) { sh.square[warp][row] = square; });
    if (tid < kBlockTokens) sh.allowed[tid] = allowed != 0;
    __syncthreads();
    float dot[kSumsPerThread];
#pragma unroll
    for (int i = 0; i < kSumsPerThread; ++i) {
      const int at = min(tid + i * kThreads, kPivots * kBlockTokens - 1);
      dot[i] = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) dot[i] += (&sh.sum[w][0][0])[at];
    }
    if (tid < kBlockTokens + kPivots) {
      float square = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) square += sh.square[w][tid];
      sh.norm_factor[tid] = norm_factor(square, true);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSumsPerThread; ++i) {
      const int at = tid + i * kThreads, r = at % kBlockTokens, c = at / kBlockTokens;
      if (r >= tile.count || c >= pass_pivots) continue;
      const float cosine = similarity(dot[i], sh.norm_factor[r], sh.norm_factor[kBlockTokens + c], true);
      if (p.reduce != Reduce::kNone)
        sh.sum[0][c][r] = cosine;
      else
        p.out[(tile.batch * p.pivots_count + first + c) * p.tokens + tile.first + r] =
            sh.allowed[r] ? cosine : INFINITY;
    }
    if (p.reduce != Reduce::kNone) {
      __syncthreads();
      for (int c = 0; c < pass_pivots && tid < tile.count; ++c) {
        const float cosine = sh.sum[0][c][tid];
        if (p.reduce != Reduce::kMax)
          reduced += cosine;
        else if (reduced < cosine || cosine != cosine)  // keeps NaN
          reduced = cosine;
      }
    }
    __syncthreads();  // the next pass may overwrite the sums
  }
  if (p.reduce != Reduce::kNone && tid < tile.count) {
    if (p.reduce == Reduce::kMean) reduced /= p.pivots_count;
    p.out[tile.batch * p.tokens + tile.first + tid] = allowed != 0 ? reduced : INFINITY;
  }
}

}  // namespace pruneops
