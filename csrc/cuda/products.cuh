// Dot products of tokens with listed tokens, for lazy rounds: a tile of up to 192 x 128 or 96 x 256 (float32: 32 x 64)
// by a block of 256 threads. Features stream through four stages as large as shared memory allows, three of them in
// flight, 128 to 512 bytes of every token at a time, by cp.async of 16 bytes, or element by element where rows are not
// aligned. Lines are padded by 16 bytes: no bank conflicts.
// float16, bfloat16: mma m16n8k16, float32 sums over the features in ascending order. float32: fused multiply-adds,
// never TF32; each warp has the whole tile and the features f with f / 4 % 8 == warp, and the eight sums are added in
// one order. So dot(a, b) has the same bits at every place of every tile, and those of dot(b, a).
// See docs/kernels/kcenter.md.

#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/tile.cuh"

namespace pruneops {

constexpr int kSliceBytes = 128;  // of a token: 64 half or 32 float features
constexpr int kLinePadding = 16;
constexpr int kProductStages = 4;
constexpr int kMaxStageSlices = 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 800 && __CUDA_ARCH__ != 900 && __CUDA_ARCH__ != 1000
constexpr int kRowGroups = 2;  // of 16 rows of a warp: more would not fit in 100 KB
#else
constexpr int kRowGroups = 3;
#endif

// sum + the products of two vectors' features.
template <class T>
__device__ __forceinline__ float add_products(float sum, uint4 a, uint4 b) {
  const unsigned words[4] = {a.x, a.y, a.z, a.w}, others[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int w = 0; w < 4; ++w)
#pragma unroll
    for (int e = 0; e < int(4 / sizeof(T)); ++e)
      sum = fmaf(value_of<T>(words[w] >> 16 * e), value_of<T>(others[w] >> 16 * e), sum);
  return sum;
}

// Tokens of a tile: rows, listed or consecutive, then listed columns; in shared memory both begin at multiples of 16
// lines. A negative token in the list of columns stands for any: its products are not used.
struct Lines {
  const int* row_list;  // null: consecutive
  int first, rows;
  const int* col_list;
  int cols;

  __device__ int row_lines() const { return (rows + 15) / 16 * 16; }
  __device__ int count() const { return row_lines() + (cols + 15) / 16 * 16; }
  // -1: padding.
  __device__ int token(int line) const {
    if (line < rows) return row_list ? row_list[line] : first + line;
    const int col = line - row_lines();
    return col < 0 || col >= cols ? -1 : max(0, col_list[col]);
  }
};

// Calls use with n as a compile-time constant, 1 to MAX.
template <int MAX, class Use>
__device__ __forceinline__ void with_constant(int n, const Use& use) {
  if constexpr (MAX > 1) {
    if (n < MAX) return with_constant<MAX - 1>(n, use);
  }
  use(std::integral_constant<int, MAX>{});
}

// Products in shared memory; float32: the sum of a plane of each warp.
template <class T>
struct Products {
  const float* data;
  int pitch, plane;

  __device__ float at(int row, int col) const {
    const float* p = data + row * pitch + col;
    if constexpr (sizeof(T) == 2) return *p;
    return ((p[0] + p[plane]) + (p[2 * plane] + p[3 * plane])) +
           ((p[4 * plane] + p[5 * plane]) + (p[6 * plane] + p[7 * plane]));
  }
};

// One thread's sums of a tile. The warps are 2 x 4 over at most 96 rows and 256 columns, or 4 x 2 over 192 and 128.
template <class T>
struct ProductSums {
  static constexpr int kMaxRows = 64 * kRowGroups, kMaxCols = 256;
  float sum[kRowGroups][8][4] = {};  // [16 rows][8 columns][element of the mma fragment]

  __device__ static int max_cols(int rows) { return rows > kMaxRows / 2 ? kMaxCols / 2 : kMaxCols; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }

  // Warps w and w + 4, which share a tensor core, differ in rows and columns.
  struct Place {
    int warp_rows, warp_cols, row, col;

    __device__ explicit Place(int rows) {
      warp_rows = rows > kMaxRows / 2 ? 4 : 2;
      warp_cols = kWarps / warp_rows;
      row = warp() / warp_cols * 16;
      col = (warp() + warp() / 4) % warp_cols * 16;
    }
  };

  __device__ __forceinline__ void add(const unsigned char* stage, int pitch, const Lines& lines, int slices) {
    const Place at(lines.rows);
    if (lines.rows <= at.row || lines.cols <= at.col) return;
    const int row_groups = (lines.rows - at.row - 1) / (16 * at.warp_rows) + 1;
    const int col_groups = (lines.cols - at.col - 1) / (16 * at.warp_cols) + 1;
    const unsigned char* a = stage + (at.row + lane() % 16) * pitch + lane() / 16 * 16;
    const unsigned char* b =
        stage + (lines.row_lines() + at.col + lane() / 16 * 8 + lane() % 8) * pitch + lane() / 8 % 2 * 16;
    const int next_a = 16 * at.warp_rows * pitch, next_b = 16 * at.warp_cols * pitch;
    with_constant<kRowGroups>(row_groups, [&](auto r) {
      with_constant<4>(col_groups, [&](auto c) {
        add_groups<decltype(r)::value, decltype(c)::value>(a, b, next_a, next_b, slices);
      });
    });
  }

  template <int ROWS, int COLS>
  __device__ __forceinline__ void add_groups(const unsigned char* a, const unsigned char* b, int next_a, int next_b,
                                             int slices) {
    constexpr int kSteps = kSliceBytes / 32;  // of 16 features
    constexpr bool kAhead = ROWS * COLS <= 6;  // fragments of the next step are loaded first, if registers allow
    unsigned fa[kAhead ? 2 : 1][ROWS][4], fb[2][kAhead ? COLS : 1][4];
    const auto load_rows = [&](int k, unsigned (&to)[ROWS][4]) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) ldmatrix_x4(to[i], a + 32 * k + i * next_a);
    };
    const auto add_products = [&](int j, const unsigned (&rows)[ROWS][4], const unsigned (&cols)[4]) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        mma_m16n8k16<T>(sum[i][2 * j], rows[i], cols[0], cols[1]);
        mma_m16n8k16<T>(sum[i][2 * j + 1], rows[i], cols[2], cols[3]);
      }
    };
    const auto load_step = [&](int k) {
      load_rows(k, fa[k % 2]);
#pragma unroll
      for (int j = 0; j < COLS; ++j) ldmatrix_x4(fb[k % 2][j], b + 32 * k + j * next_b);
    };
#pragma unroll 1
    for (; slices > 0; --slices, a += kSliceBytes, b += kSliceBytes) {
      if constexpr (kAhead) load_step(0);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if constexpr (kAhead) {
          if (k + 1 < kSteps) load_step(k + 1);
#pragma unroll
          for (int j = 0; j < COLS; ++j) add_products(j, fa[k % 2], fb[k % 2][j]);
        } else {
          load_rows(k, fa[0]);
          ldmatrix_x4(fb[0][0], b + 32 * k);
#pragma unroll
          for (int j = 0; j < COLS; ++j) {
            if (j + 1 < COLS) ldmatrix_x4(fb[(j + 1) % 2][0], b + 32 * k + (j + 1) * next_b);
            add_products(j, fa[0], fb[j % 2][0]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* to, int pitch, const Lines& lines) const {
    const Place at(lines.rows);
#pragma unroll
    for (int i = 0; i < kRowGroups; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = at.row + i * 16 * at.warp_rows + e / 2 * 8 + lane() / 4;
          const int c = at.col + j / 2 * 16 * at.warp_cols + j % 2 * 8 + lane() % 4 * 2 + e % 2;
          if (r < lines.rows && c < lines.cols) to[r * pitch + c] = sum[i][j][e];
        }
      }
    }
  }
};

// Lane l has rows l / 8 + 4 i and columns l % 8 + 8 j.
template <>
struct ProductSums<float> {
  static constexpr int kMaxRows = 32, kMaxCols = 64;
  float sum[8][8] = {};

  __device__ static int max_cols(int) { return kMaxCols; }

  __device__ static int row() { return threadIdx.x % 32 / 8; }
  __device__ static int col() { return threadIdx.x % 8; }

  __device__ __forceinline__ void add(const unsigned char* stage, int pitch, const Lines& lines, int slices) {
    const unsigned char* a = stage + row() * pitch + threadIdx.x / 32 * 16;
    const unsigned char* b = stage + (lines.row_lines() + col()) * pitch + threadIdx.x / 32 * 16;
    with_constant<4>((lines.rows + 7) / 8, [&](auto r) {
      with_constant<8>((lines.cols + 7) / 8, [&](auto c) {
        add_groups<2 * decltype(r)::value, decltype(c)::value>(a, b, pitch, slices);
      });
    });
  }

  template <int ROWS, int COLS>
  __device__ __forceinline__ void add_groups(const unsigned char* a, const unsigned char* b, int pitch, int slices) {
#pragma unroll 1
    for (; slices > 0; --slices, a += kSliceBytes, b += kSliceBytes) {
      float4 vb[COLS];
#pragma unroll
      for (int j = 0; j < COLS; ++j) vb[j] = *reinterpret_cast<const float4*>(b + 8 * j * pitch);
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const float4 va = *reinterpret_cast<const float4*>(a + 4 * i * pitch);
#pragma unroll
        for (int j = 0; j < COLS; ++j) {
          sum[i][j] = fmaf(va.x, vb[j].x, sum[i][j]);
          sum[i][j] = fmaf(va.y, vb[j].y, sum[i][j]);
          sum[i][j] = fmaf(va.z, vb[j].z, sum[i][j]);
          sum[i][j] = fmaf(va.w, vb[j].w, sum[i][j]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* to, int pitch, const Lines& lines) const {
    to += threadIdx.x / 32 * lines.rows * pitch;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (row() + 4 * i < lines.rows && col() + 8 * j < lines.cols)
          to[(row() + 4 * i) * pitch + col() + 8 * j] = sum[i][j];
  }
};

// Shared memory of the stages, and afterwards of the products.
struct Pipeline {
  unsigned char* memory;  // at a multiple of 16
  int bytes;

  // Lines of a tile that fit.
  __device__ int max_lines() const { return bytes / kProductStages / (kSliceBytes + kLinePadding) / 16 * 16; }
};

// Copies slices [first, first + SLICES) of all lines to a stage, a line by eight threads. All of them are inside x.
template <int SLICES, class T>
__device__ __forceinline__ void copy_whole_slices(const Matrix<T>& x, const Lines& lines, unsigned char* stage,
                                                  int pitch, int first) {
  constexpr int kLines = kThreads / 8, kSliceFeatures = kSliceBytes / sizeof(T);
  const T* data = x.data + (first * 8 + threadIdx.x % 8) * kVecSize<T>;
  const int begin = threadIdx.x / 8;
  stage += begin * pitch + threadIdx.x % 8 * 16;
  const auto copy_listed = [&](const int* list, int count, unsigned char* to) {
#pragma unroll 1
    for (int i = begin; i < count; i += kLines, to += kLines * pitch) {
      const T* source = data + max(0, list[i]) * x.stride;
#pragma unroll
      for (int s = 0; s < SLICES; ++s) cp_async_16(to + s * kSliceBytes, source + s * kSliceFeatures, 16);
    }
  };
  if (lines.row_list) {
    copy_listed(lines.row_list, lines.rows, stage);
  } else {
    const T* source = data + (int64_t(lines.first) + begin) * x.stride;
    unsigned char* to = stage;
#pragma unroll 1
    for (int i = begin; i < lines.rows; i += kLines, to += kLines * pitch, source += kLines * x.stride)
#pragma unroll
      for (int s = 0; s < SLICES; ++s) cp_async_16(to + s * kSliceBytes, source + s * kSliceFeatures, 16);
  }
  copy_listed(lines.col_list, lines.cols, stage + lines.row_lines() * pitch);
}

// The same where x may not be aligned or may end.
template <class T>
__device__ __forceinline__ void copy_lines(const Matrix<T>& x, const Lines& lines, unsigned char* stage, int pitch,
                                           int first, int slices) {
#pragma unroll 1
  for (int i = threadIdx.x; i < lines.count() * slices * 8; i += kThreads) {
    const int vec = i % 8, line = i / 8 / slices, slice = i / 8 % slices, token = lines.token(line);
    if (token < 0) continue;
    const T* source = x.data + token * x.stride;
    const int k = ((first + slice) * 8 + vec) * kVecSize<T>;
    unsigned char* to = stage + line * pitch + slice * kSliceBytes + vec * 16;
    if (x.aligned) {
      const int bytes = max(0, min(16, (x.width - k) * int(sizeof(T))));
      cp_async_16(to, source + (bytes ? k : 0), bytes);
    } else {
      *reinterpret_cast<uint4*>(to) = gather_vec(source, k, x.width);
    }
  }
}

// All products of a tile; lines.count() <= pipeline.max_lines(). Called by all threads of the block; the products are
// valid until the next call.
template <class T>
__device__ __forceinline__ Products<T> multiply(const Matrix<T> x, const Lines& lines, const Pipeline& pipeline) {
  const int slices = (x.width * int(sizeof(T)) + kSliceBytes - 1) / kSliceBytes;
  const int fitting = (pipeline.bytes / kProductStages / lines.count() - kLinePadding) / kSliceBytes;
  const int stage_slices = max(1, min(min(fitting, kMaxStageSlices), (slices + 7) / 8));
  const int steps = (slices + stage_slices - 1) / stage_slices;
  const int pitch = stage_slices * kSliceBytes + kLinePadding, stage_bytes = lines.count() * pitch;
  const auto stage = [&](int step) { return pipeline.memory + step % kProductStages * stage_bytes; };
  const auto slices_of = [&](int step) { return min(stage_slices, slices - step * stage_slices); };
  const auto copy = [&](int step) {
    if (step < steps) {
      const int first = step * stage_slices, count = slices_of(step);
      if (x.aligned && (first + count) * kSliceBytes <= x.width * int(sizeof(T))) {
        with_constant<kMaxStageSlices>(count, [&](auto n) {
          copy_whole_slices<decltype(n)::value>(x, lines, stage(step), pitch, first);
        });
      } else {
        copy_lines(x, lines, stage(step), pitch, first, count);
      }
    }
    cp_async_commit();  // maybe empty, so that the count of pending groups stays constant
  };

  ProductSums<T> sums;
  __syncthreads();  // earlier accesses of the memory are done
#pragma unroll 1
  for (int step = 0; step < kProductStages - 1; ++step) copy(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kProductStages - 2>();
    __syncthreads();  // this stage is visible, and the one refilled next is no longer read
    copy(step + kProductStages - 1);
    sums.add(stage(step), pitch, lines, slices_of(step));
  }
  cp_async_wait<0>();
  __syncthreads();
  auto* products = reinterpret_cast<float*>(pipeline.memory);
  const int columns = lines.cols | 1;
  sums.store(products, columns, lines);
  __syncthreads();
  return {products, columns, lines.rows * columns};
}

}  // namespace pruneops
