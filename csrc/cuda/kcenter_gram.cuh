// Gram path of greedy k-center; kcenter.cu describes it. See docs/kernels/kcenter.md.

#pragma once

#include "cuda/kcenter.cuh"

namespace pruneops {

constexpr int kGreedyThreads = 1024;
constexpr int kGreedyTokens = 4 * kGreedyThreads;
constexpr int kGreedyBytes = 2 * 32 * sizeof(Key);

// norm_factors [B, N]; zeros in gram [B, N, pitch] past column N. A warp per token.
template <class T>
__global__ void __launch_bounds__(kThreads)
    kcenter_norm_factors(Tokens<T> x, int64_t batch, int n, float* norm_factors, float* gram, int pitch, bool cosine) {
  const int64_t warps = int64_t(gridDim.x) * kWarps;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; i < batch * n; i += warps) {
    const Matrix<T> matrix = x.matrix(i / n * x.batch_stride + i % n * x.row_stride);
    const float factor = norm_factor(squared_norm(matrix, matrix.data), cosine);
    const int lane = threadIdx.x % 32;
    if (lane == 0) norm_factors[i] = factor;
    if (lane < pitch - n) gram[i * pitch + n + lane] = 0;
  }
}

// gram [B, N, pitch]: similarities of all pairs. A block per 128 x 128 tile on or below the diagonal, which writes
// the tile and its transpose. ALIGNED is x.aligned.
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, ALIGNED && sizeof(T) == 2 ? kBlocksPerSM : 1)
    kcenter_gram(Tokens<T> x, int n, const float* norm_factors, float* gram, int pitch, bool cosine) {
  struct Shared {
    unsigned char pipeline[kPipelineBytes];
  };
  const int side = (n + kTile - 1) / kTile;
  const int tiles = side * (side + 1) / 2;
  const int64_t b = blockIdx.x / tiles;
  int tile_row = 0, tile_col = blockIdx.x % tiles;
  while (tile_col > tile_row) tile_col -= ++tile_row;
  const Rows rows{nullptr, tile_row * kTile, min(kTile, n - tile_row * kTile)};
  const Rows cols{nullptr, tile_col * kTile, min(kTile, n - tile_col * kTile)};

  Accumulators<T, true> out(rows.count);
  Matrix<T> matrix = x.matrix(b * x.batch_stride);
  matrix.aligned = ALIGNED;  // a compile-time constant: the unused copy path would cost registers
  multiply_rows(out, matrix, rows, cols, shared<Shared>().pipeline);

  norm_factors += b * n;
  gram += b * n * pitch;
  float row_factor[Accumulators<T, true>::kRows];  // of this thread's rows
#pragma unroll
  for (int i = 0; i < Accumulators<T, true>::kRows; ++i)
    row_factor[i] = norm_factors[rows.first + min(out.row(i), rows.count - 1)];
#pragma unroll
  for (int j = 0; j < Accumulators<T, true>::kCols; ++j) {
    if (out.col(j) >= cols.count) continue;
    const int c = cols.first + out.col(j);
    const float col_factor = norm_factors[c];
#pragma unroll
    for (int i = 0; i < Accumulators<T, true>::kRows; ++i) {
      if (out.row(i) >= rows.count) continue;
      const int r = rows.first + out.row(i);
      const float sim = similarity(out.at(i, j), row_factor[i], col_factor, cosine);
      gram[int64_t(r) * pitch + c] = sim;
      if (tile_row != tile_col) gram[int64_t(c) * pitch + r] = sim;
    }
  }
}

// k greedy steps over the rows of gram. One block per batch row, four tokens per thread with their running maxima in
// registers, one barrier per step.
__global__ void __launch_bounds__(kGreedyThreads)
    kcenter_greedy(const float* gram, int pitch, const float* norm_factors, int n, int64_t k, SeedsAndMask given,
                   Output out) {
  struct Shared {
    Key min_key[2][32];  // of each warp; steps alternate between the two
  };
  Shared& sh = shared<Shared>();
  const int64_t b = blockIdx.x;
  const int tid = threadIdx.x;
  gram += b * n * pitch + 4 * tid;
  norm_factors += b * n;

  float s[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = 4 * tid + i;
    s[i] = NAN;
    if (token < n && given.allows(b, token)) s[i] = norm_factors[token] == norm_factors[token] ? -INFINITY : INFINITY;
  }
  const auto update = [&](int token) {
    if (4 * tid < n) update_four(s, gram + int64_t(token) * pitch, token - 4 * tid);
  };

  int64_t step = 0;
  for (; step < given.seeds_count; ++step) {
    const int token = given.seed(b, step, 0, n);
    if (tid == 0) out.write(b * k + step, token, token < 0 ? NAN : -INFINITY);
    if (token >= 0) update(token);
  }
  for (; step < k; ++step) {
    Key best = kLastKey;
#pragma unroll
    for (int i = 0; i < 4; ++i) best = min(best, make_key(ordered_or_excluded(s[i]), 4 * tid + i));
    best = block_min_key(best, sh.min_key[step % 2]);
    const bool any_left = available(best);
    if (tid == 0)
      out.write(b * k + step, any_left ? int(index_of(best)) : -1, any_left ? score_of(bits_of(best)) : NAN);
    if (any_left) update(index_of(best));
  }
}

}  // namespace pruneops
