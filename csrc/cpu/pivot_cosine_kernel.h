// The arithmetic of pivot_cosine, compiled once per instruction set. See docs/kernels/pivot_cosine.md.

#include "cpu/products.h"

// values[r] = +inf where the mask is false.
PRUNEOPS_INLINE void apply_mask(const Scores& to, int64_t begin, int64_t rows, float* values) {
  if (!to.mask) return;
  for (int64_t r = 0; r < rows; ++r)
    if (!to.mask[(begin + r) * to.mask_stride]) values[r] = kInfinity;
}

// Scores of tokens begin..end. dots: kBlockRows rows; scratch: kRows * kDepth floats.
static void pivot_cosine_score(const Tokens& x, int64_t begin, int64_t end, const Packed& pivots, const Scores& to,
                               float* dots, float* scratch) {
  const int64_t stride = (pivots.count + kColumns - 1) / kColumns * kColumns;
  for (int64_t n0 = begin; n0 < end; n0 += kBlockRows) {
    const int64_t rows = n0 + kBlockRows < end ? kBlockRows : end - n0;
    float squares[kBlockRows], row_factors[kBlockRows], row[kBlockRows];
    products(x, nullptr, n0, rows, pivots.rows, pivots.count, dots, stride, squares, scratch);
    for (int64_t r = 0; r < rows; ++r) row_factors[r] = norm_factor(squares[r], true);
    float* const total = to.out + n0;
    for (int64_t p = 0; p < pivots.count; ++p) {
      float* const scores = p == 0 || to.reduce == Reduce::kNone ? to.out + p * to.stride + n0 : row;
      for (int64_t r = 0; r < rows; ++r) scores[r] = dots[r * stride + p] * row_factors[r] * pivots.norm_factors[p];
      if (to.reduce == Reduce::kNone) apply_mask(to, n0, rows, scores);
      if (scores != row) continue;
      for (int64_t r = 0; r < rows; ++r) {
        const float sum = total[r] + row[r], maximum = row[r] > total[r] || row[r] != row[r] ? row[r] : total[r];
        total[r] = to.reduce == Reduce::kMax ? maximum : sum;
      }
    }
    if (to.reduce == Reduce::kNone) continue;
    if (to.reduce == Reduce::kMean)
      for (int64_t r = 0; r < rows; ++r) total[r] /= float(pivots.count);
    apply_mask(to, n0, rows, total);
  }
}

constexpr Kernels kKernels = {kRows, kBlockRows, kRows * kDepth, pack, pivot_cosine_score};
