// The arithmetic of kcenter, compiled once per instruction set. See docs/kernels/kcenter.md.

#include "cpu/products.h"

// Updates nearest[begin..end) with the centers. The first pass also writes norm_factors and sets nearest of non-finite
// tokens to +inf; before it nearest holds NaN for excluded tokens and -inf for the others.
static void kcenter_update(const Tokens& x, int64_t begin, int64_t end, const Packed& centers, bool cosine, bool first,
                           float* nearest, float* norm_factors, float* dots, float* scratch) {
  const int64_t stride = (centers.count + kLanes - 1) / kLanes * kLanes;
  float squares[kBlockRows + 8];
  for (int64_t n0 = begin; n0 < end; n0 += kBlockRows) {
    const int64_t rows = n0 + kBlockRows < end ? kBlockRows : end - n0;
    products(x, n0, rows, centers.rows, centers.count, dots, stride, first ? squares : nullptr, scratch);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = n0 + r;
      if (first) {
        norm_factors[n] = norm_factor(squares[r], cosine);
        if (norm_factors[n] != norm_factors[n] && nearest[n] == nearest[n]) nearest[n] = kInfinity;
      }
      const Vec row_factor = broadcast(norm_factors[n]);
      Vec best = broadcast(-kInfinity);
      for (int64_t c = 0; c < stride; c += kLanes) {  // norm_factors are NaN in the padding
        const Vec dot = load(dots + r * stride + c), column_factor = load(centers.norm_factors + c);
        const Vec similarity = cosine ? dot * row_factor * column_factor : 2.0f * dot - row_factor - column_factor;
        best = best < similarity ? similarity : best;
      }
      const float similarity = reduce_max(best);
      if (nearest[n] < similarity) nearest[n] = similarity;
    }
  }
}

// Gram matrix: dots[i * stride + c] = candidate i . column c, for candidates begin..end of a packed panel.
static void kcenter_gram(const Tokens& panel, int64_t begin, int64_t end, const float* const* columns,
                         int64_t count, float* dots, int64_t stride) {
  products(panel, begin, end - begin, columns, count, dots + begin * stride, stride, nullptr, nullptr);
}

constexpr Kernels kKernels = {kRows, kBlockRows, kRows * kDepth, pack, kcenter_update, kcenter_gram};
