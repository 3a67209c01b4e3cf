// Products of rows of x with rows of x, up to 128 x 128 at a time, by a block of 256 threads.
//
// float16 and bfloat16 go through the tensor cores (m16n8k16, float32 sums), float32 through fused
// multiply-adds (never TF32). Features stream through three shared-memory stages of 128 bytes a row,
// 96 KB in all, copied asynchronously 16 bytes at a time where base and strides allow, else element
// by element; the 16-byte pieces of a row are swapped by row number so that neither the copies nor
// the reads meet in a bank. Every sum runs over the features in the same order wherever its row and
// column sit in a tile, and a product does not depend on which factor is the row: equal rows give
// equal bits in every kernel. Rows past the end are not loaded; what their sums hold is never read.
//
// Cost per feature step (64 half, 32 float) of a full tile: 32 KB copied, 2 x 128 x 128 x 64 (32)
// operations, one block barrier.

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
constexpr int kPipelinesPerProcessor = 2;  // in 228 KB
#else
constexpr int kPipelinesPerProcessor = 1;  // in 164 or 100 KB
#endif

// Some rows of a matrix: `count` of them, from a list or one after another.
struct Rows {
  const int* list;  // a negative entry stands for a row whose products nobody uses
  int first;
  int count;

  __device__ int64_t operator[](int i) const { return list ? (list[i] < 0 ? 0 : list[i]) : int64_t(first) + i; }
};

// A piece is 16 bytes of a row.
template <class T>
constexpr int kPiece = 16 / sizeof(T);

// Features [k, k + kPiece) of a row of any alignment, zeros past its width.
template <class T>
__device__ __forceinline__ uint4 gather_piece(const T* row, int k, int width) {
  constexpr int kInWord = 4 / sizeof(T);
  unsigned words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    words[w] = 0;
#pragma unroll
    for (int e = 0; e < kInWord; ++e) {
      const int at = k + w * kInWord + e;
      if (at < width) words[w] |= unsigned(reinterpret_cast<const Bits<T>*>(row)[at]) << 16 * e;
    }
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

// Where a piece of a row lies within the row; the same in every eighth row.
__device__ __forceinline__ int piece_offset(int row, int piece) { return (piece ^ row % 8) * 16; }

// The sums one thread holds of a tile: kRows x kCols of them, at(i, j) of row(i) and col(j).
// Per tile row, slots() threads share its columns; slot() numbers this one among them. FULL fixes the arrangement for
// 128 x 128 and multiplies all of it; without FULL, work outside the rows and columns asked for is skipped.
template <class T, bool FULL>
struct Sums {
  static constexpr int kRows = 4, kCols = 16;
  float sum[2][8][4] = {};  // [16 rows][8 columns][element of the mma fragment]
  int lane, across, row0, col0;

  // Each warp has 32 rows and every `across`-th group of 16 columns, so that few rows still occupy all warps.
  __device__ explicit Sums(int rows) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    across = FULL || rows > 64 ? 2 : rows > 32 ? 4 : 8;
    row0 = warp / across * 32;
    col0 = warp % across * 16;
  }

  __device__ int row(int i) const { return row0 + i / 2 * 16 + i % 2 * 8 + lane / 4; }
  __device__ int col(int j) const { return j / 4 * 16 * across + col0 + j / 2 % 2 * 8 + lane % 4 * 2 + j % 2; }
  __device__ float at(int i, int j) const { return sum[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  __device__ int slot() const { return col0 / 4 + lane % 4; }
  __device__ int slots() const { return across * 4; }

  __device__ void add(const unsigned char* a, const unsigned char* b, int rows, int cols) {
    a += (row0 + lane % 16) * kRowBytes;
    b += (col0 + lane / 16 * 8 + lane % 8) * kRowBytes;
#pragma unroll
    for (int k = 0; k < kRowBytes / 32; ++k) {  // 16 features
      const unsigned char* piece_a = a + piece_offset(lane, 2 * k + lane / 16);
      const unsigned char* piece_b = b + piece_offset(lane, 2 * k + lane / 8 % 2);
      unsigned fa[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (FULL || row0 + 16 * i < rows) load_matrices(fa[i], piece_a + 16 * i * kRowBytes);
      unsigned fb[4][4];
#pragma unroll
      for (int g = 0; g < 4; ++g)
        if (FULL || g * 16 * across + col0 < cols) load_matrices(fb[g], piece_b + g * 16 * across * kRowBytes);
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        if (FULL || g * 16 * across + col0 < cols) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (FULL || row0 + 16 * i < rows) {
              multiply_add<T>(sum[i][2 * g], fa[i], fb[g][0], fb[g][1]);
              multiply_add<T>(sum[i][2 * g + 1], fa[i], fb[g][2], fb[g][3]);
            }
          }
        }
      }
    }
  }
};

template <bool FULL>
struct Sums<float, FULL> {
  static constexpr int kRows = 8, kCols = 8;
  float sum[8][8] = {};
  int row0, col0;

  __device__ explicit Sums(int) : row0(threadIdx.x / 16), col0(threadIdx.x % 16) {}

  __device__ int row(int i) const { return row0 + 16 * i; }
  __device__ int col(int j) const { return col0 + 16 * j; }
  __device__ float at(int i, int j) const { return sum[i][j]; }
  __device__ int slot() const { return col0; }
  __device__ int slots() const { return 16; }

  __device__ void add(const unsigned char* a, const unsigned char* b, int rows, int cols) {
    a += row0 * kRowBytes;
    b += col0 * kRowBytes;
#pragma unroll 1
    for (int k = 0; k < kRowBytes / 16; ++k) {  // 4 features
      const unsigned char* piece_a = a + piece_offset(row0, k);
      const unsigned char* piece_b = b + piece_offset(col0, k);
      float4 vb[8];
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (FULL || 16 * j < cols) vb[j] = *reinterpret_cast<const float4*>(piece_b + 16 * j * kRowBytes);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (FULL || 16 * i < rows) {
          const float4 va = *reinterpret_cast<const float4*>(piece_a + 16 * i * kRowBytes);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if (FULL || 16 * j < cols) {
              sum[i][j] = fmaf(va.x, vb[j].x, sum[i][j]);
              sum[i][j] = fmaf(va.y, vb[j].y, sum[i][j]);
              sum[i][j] = fmaf(va.z, vb[j].z, sum[i][j]);
              sum[i][j] = fmaf(va.w, vb[j].w, sum[i][j]);
            }
          }
        }
      }
    }
  }
};

// One operand of a product: this thread copies piece `tid % 8` of rows `tid / 8 + 32 i`.
template <class T>
struct Operand {
  static constexpr int kLines = kTile / (kThreads / 8);
  const T* line[kLines];
  int count;

  __device__ Operand(const Matrix<T>& x, const Rows& rows) : count(rows.count) {
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const int r = threadIdx.x / 8 + 32 * i;
      line[i] = r < count ? x.data + rows[r] * x.stride : x.data;
    }
  }

  __device__ void copy(const Matrix<T>& x, int step, unsigned char* to) const {
    const int piece = threadIdx.x % 8, row = threadIdx.x / 8;
    const int k = (step * 8 + piece) * kPiece<T>;
    to += row * kRowBytes + piece_offset(row, piece);
    if (x.aligned) {
      const int bytes = max(0, min(16, (x.width - k) * int(sizeof(T))));
#pragma unroll
      for (int i = 0; i < kLines; ++i)
        if (row + 32 * i < count) copy16_async(to + 32 * i * kRowBytes, line[i] + (bytes ? k : 0), bytes);
    } else {
#pragma unroll
      for (int i = 0; i < kLines; ++i)
        if (row + 32 * i < count)
          *reinterpret_cast<uint4*>(to + 32 * i * kRowBytes) = gather_piece(line[i], k, x.width);
    }
  }
};

// out += products of `rows` with `cols`. All threads of the block; `pipeline` holds kPipelineBytes and is free
// again when the block next meets.
template <class T, bool FULL>
__device__ void multiply_rows(Sums<T, FULL>& out, const Matrix<T>& x, const Rows& rows, const Rows& cols,
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
    commit_copies();  // an empty group keeps the count of groups right
  };
  __syncthreads();  // whatever shared memory held is done with
  for (int step = 0; step < kStages - 1; ++step) copy(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // step has arrived for all, and all are done with the stage refilled next
    copy(step + kStages - 1);
    out.add(stage(step), stage(step) + kOperandBytes, rows.count, cols.count);
  }
  wait_copies<0>();
}

// sum + the squares of a piece's features.
template <class T>
__device__ __forceinline__ float add_squares(float sum, uint4 piece) {
  const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
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
__device__ __forceinline__ uint4 load_piece(const T* at) {
  return *reinterpret_cast<const uint4*>(at);
}

// Features [k, k + kPiece) of a row of x, zeros past its width.
template <class T>
__device__ __forceinline__ uint4 piece_at(const Matrix<T>& x, const T* row, int k) {
  return x.aligned && k + kPiece<T> <= x.width ? load_piece(row + k) : gather_piece(row, k, x.width);
}

// Sum of squares of one row, by a warp; all lanes get it.
template <class T>
__device__ float squared_norm(const Matrix<T>& x, const T* row) {
  constexpr int kBatch = 4, kStride = 32 * kPiece<T>;
  float sum = 0;
  int k = threadIdx.x % 32 * kPiece<T>;
  if (x.aligned) {
    for (; k + (kBatch - 1) * kStride + kPiece<T> <= x.width; k += kBatch * kStride) {
      uint4 pieces[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) pieces[i] = load_piece(row + k + i * kStride);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) sum = add_squares<T>(sum, pieces[i]);
    }
  }
#pragma unroll 1
  for (; k < x.width; k += kStride) sum = add_squares<T>(sum, piece_at(x, row, k));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

}  // namespace pruneops
