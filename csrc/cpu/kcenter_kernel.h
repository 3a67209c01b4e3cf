// The arithmetic of kcenter, compiled once per instruction set. See docs/kernels/kcenter.md.

#include "cpu/products.h"

// Float32 dots[r * stride + c] = rows[r] . columns[c]; squares[r] unless null.
static void kcenter_dots(const Tokens& x, const Rows& rows, const float* const* columns, int64_t count, float* dots,
                         int64_t stride, float* squares, float* scratch) {
  products(x, rows.index, rows.begin, rows.count, columns, count, dots, stride, squares, scratch);
}

// Norm factors of `rows`, whose nearest holds NaN if excluded, else -inf; it becomes +inf for non-finite tokens.
static void kcenter_norms(const Rows& rows, const float* squares, bool cosine, float* nearest, float* norm_factors) {
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t n = rows[r];
    norm_factors[n] = norm_factor(squares[r], cosine);
    if (norm_factors[n] != norm_factors[n] && nearest[n] == nearest[n]) nearest[n] = kInfinity;
  }
}

// Raises nearest of `rows` to their similarities with centers. Rows of dots are padded to a multiple of kLanes.
static void kcenter_nearest(const Rows& rows, const float* dots, int64_t stride, const float* center_factors,
                            int64_t centers, bool cosine, const float* norm_factors, float* nearest) {
  const int64_t whole = centers / kLanes * kLanes;
  float tail[kLanes];  // factors of the last centers, then NaN
  for (int64_t i = 0; i < kLanes; ++i) tail[i] = whole + i < centers ? center_factors[whole + i] : kNaN;
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t n = rows[r];
    const Vec row_factor = broadcast(norm_factors[n]);
    Vec best = broadcast(-kInfinity);
    for (int64_t c = 0; c < centers; c += kLanes) {
      const Vec dot = load(dots + r * stride + c), center_factor = load(c < whole ? center_factors + c : tail);
      const Vec similarity = cosine ? dot * row_factor * center_factor : 2.0f * dot - row_factor - center_factor;
      best = best < similarity ? similarity : best;
    }
    const float similarity = reduce_max(best);
    if (nearest[n] < similarity) nearest[n] = similarity;
  }
}

constexpr Kernels kKernels = {kRows, kBlockRows, kRows * kDepth, pack, kcenter_dots, kcenter_norms, kcenter_nearest};
