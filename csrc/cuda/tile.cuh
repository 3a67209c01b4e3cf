// Tile GEMM: dot products of rows of x with rows of x, up to 128 x 128 at a time, by a block of 256 threads.
// Cost per feature step (64 half, 32 float) of a full tile: 32 KB copied, 2 x 128 x 128 x 64 (32) operations, one block
// barrier. float16 and bfloat16 use tensor cores (m16n8k16, float32 accumulators), float32 uses fused multiply-adds
// (never TF32). Features stream through a pipeline of three shared-memory stages of 128 bytes a row, 96 KB in all:
// cp.async of 16 bytes if base and strides are aligned, else element by element. 16-byte vectors are swizzled by row:
// copies and reads are bank-conflict-free. Every sum runs over the features in one order at any place in a tile, and
// dot(a, b) has the bits of dot(b, a): equal rows give equal bits in every kernel. Rows past the end are not loaded;
// accumulators of such rows hold no defined value.
// See docs/kernels/kcenter.md.

#pragma once

#include <cstdint>

#include "cuda/primitives.cuh"
#include "cuda/views.cuh"

namespace pruneops {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 128;
constexpr int kRowBytes = 128;  // of one row in one stage
constexpr int kStages = 3;
constexpr int kOperandBytes = kTile * kRowBytes;
constexpr int kPipelineBytes = kStages * 2 * kOperandBytes;
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000)
constexpr int kBlocksPerSM = 2;  // of kPipelineBytes, in 228 KB
#else
constexpr int kBlocksPerSM = 1;  // in 164 or 100 KB
#endif

// `count` consecutive rows of a matrix.
struct Rows {
  int first;
  int count;

  __device__ int64_t operator[](int i) const { return int64_t(first) + i; }
};

// Elements of a 16-byte vector.
template <class T>
constexpr int kVecSize = 16 / sizeof(T);

// Features [k, k + kVecSize) of a row of any alignment, zeros past its width.
template <class T>
__device__ __forceinline__ uint4 gather_vec(const T* row, int k, int width) {
  constexpr int kPerWord = 4 / sizeof(T);
  unsigned words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    words[w] = 0;
#pragma unroll
    for (int e = 0; e < kPerWord; ++e) {
      const int at = k + w * kPerWord + e;
      if (at < width) words[w] |= unsigned(reinterpret_cast<const Bits<T>*>(row)[at]) << 16 * e;
    }
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

// Byte offset of a vector within its row in shared memory; the swizzle repeats every eight rows.
__device__ __forceinline__ int swizzled_offset(int row, int vec) { return (vec ^ row % 8) * 16; }

// One thread's accumulators of a tile: kRows x kCols, at(i, j) of row(i) and col(j). Each warp has 32 rows and every
// other group of 16 columns.
template <class T>
struct Accumulators {
  static constexpr int kRows = 4, kCols = 16;
  float sum[2][8][4] = {};  // [16 rows][8 columns][element of the mma fragment]
  int lane = threadIdx.x % 32, row0 = threadIdx.x / 64 * 32, col0 = threadIdx.x / 32 % 2 * 16;

  __device__ int row(int i) const { return row0 + i / 2 * 16 + i % 2 * 8 + lane / 4; }
  __device__ int col(int j) const { return j / 4 * 32 + col0 + j / 2 % 2 * 8 + lane % 4 * 2 + j % 2; }
  __device__ float at(int i, int j) const { return sum[i / 2][j / 2][i % 2 * 2 + j % 2]; }

  __device__ void add(const unsigned char* a, const unsigned char* b) {
    a += (row0 + lane % 16) * kRowBytes;
    b += (col0 + lane / 16 * 8 + lane % 8) * kRowBytes;
#pragma unroll
    for (int k = 0; k < kRowBytes / 32; ++k) {  // 16 features
      const unsigned char* vec_a = a + swizzled_offset(lane, 2 * k + lane / 16);
      const unsigned char* vec_b = b + swizzled_offset(lane, 2 * k + lane / 8 % 2);
      unsigned fa[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) ldmatrix_x4(fa[i], vec_a + 16 * i * kRowBytes);
      unsigned fb[4][4];
#pragma unroll
      for (int g = 0; g < 4; ++g) ldmatrix_x4(fb[g], vec_b + g * 32 * kRowBytes);
#pragma unroll
      for (int g = 0; g < 4; ++g) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_m16n8k16<T>(sum[i][2 * g], fa[i], fb[g][0], fb[g][1]);
          mma_m16n8k16<T>(sum[i][2 * g + 1], fa[i], fb[g][2], fb[g][3]);
        }
      }
    }
  }
};

template <>
struct Accumulators<float> {
  static constexpr int kRows = 8, kCols = 8;
  float sum[8][8] = {};
  int row0 = threadIdx.x / 16, col0 = threadIdx.x % 16;

  __device__ int row(int i) const { return row0 + 16 * i; }
  __device__ int col(int j) const { return col0 + 16 * j; }
  __device__ float at(int i, int j) const { return sum[i][j]; }

  __device__ void add(const unsigned char* a, const unsigned char* b) {
    a += row0 * kRowBytes;
    b += col0 * kRowBytes;
#pragma unroll 1
    for (int k = 0; k < kRowBytes / 16; ++k) {  // 4 features
      const unsigned char* vec_a = a + swizzled_offset(row0, k);
      const unsigned char* vec_b = b + swizzled_offset(col0, k);
      float4 vb[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) vb[j] = *reinterpret_cast<const float4*>(vec_b + 16 * j * kRowBytes);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float4 va = *reinterpret_cast<const float4*>(vec_a + 16 * i * kRowBytes);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          sum[i][j] = fmaf(va.x, vb[j].x, sum[i][j]);
          sum[i][j] = fmaf(va.y, vb[j].y, sum[i][j]);
          sum[i][j] = fmaf(va.z, vb[j].z, sum[i][j]);
          sum[i][j] = fmaf(va.w, vb[j].w, sum[i][j]);
        }
      }
    }
  }
};

// One operand of a product: this thread copies vector `tid % 8` of rows `tid / 8 + 32 i`.
template <class T>
struct Operand {
  static constexpr int kRowsPerThread = kTile / (kThreads / 8);
  const T* source[kRowsPerThread];
  int count;

  __device__ Operand(const Matrix<T>& x, const Rows& rows) : count(rows.count) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int r = threadIdx.x / 8 + 32 * i;
      source[i] = r < count ? x.data + rows[r] * x.stride : x.data;
    }
  }

  __device__ void copy(const Matrix<T>& x, int step, unsigned char* to) const {
    const int vec = threadIdx.x % 8, row = threadIdx.x / 8;
    const int k = (step * 8 + vec) * kVecSize<T>;
    to += row * kRowBytes + swizzled_offset(row, vec);
    if (x.aligned) {
      const int bytes = max(0, min(16, (x.width - k) * int(sizeof(T))));
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i)
        if (row + 32 * i < count) cp_async_16(to + 32 * i * kRowBytes, source[i] + (bytes ? k : 0), bytes);
    } else {
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i)
        if (row + 32 * i < count)
          *reinterpret_cast<uint4*>(to + 32 * i * kRowBytes) = gather_vec(source[i], k, x.width);
    }
  }
};

// out += dot products of `rows` with `cols`. Called by all threads of the block. `pipeline` holds kPipelineBytes, to be
// reused after the next __syncthreads().
template <class T>
__device__ void multiply_rows(Accumulators<T>& out, const Matrix<T>& x, const Rows& rows, const Rows& cols,
                              unsigned char* pipeline) {
  const Operand<T> a(x, rows), b(x, cols);
  constexpr int kFeatures = kRowBytes / sizeof(T);
  const int steps = (x.width + kFeatures - 1) / kFeatures;
  const auto stage = [&](int step) { return pipeline + step % kStages * 2 * kOperandBytes; };
  const auto copy = [&](int step) {
    if (step < steps) {
      a.copy(x, step, stage(step));
      b.copy(x, step, stage(step) + kOperandBytes);
    }
    cp_async_commit();  // maybe empty, so that the count of pending groups stays constant
  };
  __syncthreads();  // earlier reads of shared memory are done
  for (int step = 0; step < kStages - 1; ++step) copy(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's copies are visible, and the stage refilled next is no longer read
    copy(step + kStages - 1);
    out.add(stage(step), stage(step) + kOperandBytes);
  }
  cp_async_wait<0>();
}

// sum + the squares of a vector's features.
template <class T>
__device__ __forceinline__ float add_squares(float sum, uint4 vec) {
  const unsigned words[4] = {vec.x, vec.y, vec.z, vec.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#pragma unroll
    for (int e = 0; e < int(4 / sizeof(T)); ++e) {
      const float v = value_of<T>(words[w] >> 16 * e);
      sum = fmaf(v, v, sum);
    }
  }
  return sum;
}

template <class T>
__device__ __forceinline__ uint4 load_vec(const T* at) {
  return *reinterpret_cast<const uint4*>(at);
}

// Features [k, k + kVecSize) of a row of x, zeros past its width.
template <class T>
__device__ __forceinline__ uint4 load_vec_padded(const Matrix<T>& x, const T* row, int k) {
  return x.aligned && k + kVecSize<T> <= x.width ? load_vec(row + k) : gather_vec(row, k, x.width);
}

// Sum of squares of one row, by a warp; the result is in all lanes.
template <class T>
__device__ float squared_norm(const Matrix<T>& x, const T* row) {
  constexpr int kBatch = 4, kStride = 32 * kVecSize<T>;
  float sum = 0;
  int k = threadIdx.x % 32 * kVecSize<T>;
  if (x.aligned) {
    for (; k + (kBatch - 1) * kStride + kVecSize<T> <= x.width; k += kBatch * kStride) {
      uint4 vecs[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) vecs[i] = load_vec(row + k + i * kStride);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) sum = add_squares<T>(sum, vecs[i]);
    }
  }
#pragma unroll 1
  for (; k < x.width; k += kStride) sum = add_squares<T>(sum, load_vec_padded(x, row, k));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

}  // namespace pruneops
