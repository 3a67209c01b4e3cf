// The arithmetic of pivot_cosine, compiled once per instruction set.

#include "cpu/products.h"

// values[r] = +inf where the mask is false
PRUNEOPS_INLINE void hide(const Scores& to, int64_t begin, int64_t rows, float* values) {
  if (!to.mask) return;
  for (int64_t r = 0; r < rows; ++r)
    if (!to.mask[(begin + r) * to.mask_stride]) values[r] = kInfinity;
}

// Scores of tokens begin..end.
static void pivot_cosine_score(const Tokens& x, int64_t begin, int64_t end, const Packed& pivots, const Scores& to,
                               float* dots, float* scratch) {
  const int64_t stride = (pivots.count + kColumns - 1) / kColumns * kColumns;
  for (int64_t n0 = begin; n0 < end; n0 += kBlockRows) {
    const int64_t rows = n0 + kBlockRows < end ? kBlockRows : end - n0;
    float squares[kBlockRows], inverse[kBlockRows], line[kBlockRows];
    products(x, n0, rows, pivots.rows, pivots.count, dots, stride, squares, scratch);
    for (int64_t r = 0; r < rows; ++r) inverse[r] = auxiliary(squares[r], true);
    float* const total = to.out + n0;
    for (int64_t p = 0; p < pivots.count; ++p) {
      float* const scores = p == 0 || to.reduce == Reduce::kNone ? to.out + p * to.stride + n0 : line;
      for (int64_t r = 0; r < rows; ++r) scores[r] = dots[r * stride + p] * inverse[r] * pivots.aux[p];
      if (to.reduce == Reduce::kNone) hide(to, n0, rows, scores);
      if (scores != line) continue;
      for (int64_t r = 0; r < rows; ++r) {
        const float sum = total[r] + line[r], greatest = line[r] > total[r] || line[r] != line[r] ? line[r] : total[r];
        total[r] = to.reduce == Reduce::kMax ? greatest : sum;
      }
    }
    if (to.reduce == Reduce::kNone) continue;
    if (to.reduce == Reduce::kMean)
      for (int64_t r = 0; r < rows; ++r) total[r] /= float(pivots.count);
    hide(to, n0, rows, total);
  }
}

constexpr Kernels kKernels = {kRows, kBlockRows, kRows * kDepth, pack, pivot_cosine_score};
