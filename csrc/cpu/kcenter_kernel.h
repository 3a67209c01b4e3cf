// The arithmetic of kcenter, compiled once per instruction set.

#include "cpu/products.h"

// Brings nearest[begin..end) up to date with `count` centers. On the first pass over x it also fills aux and marks
// non-finite tokens; nearest then holds NaN for excluded tokens and -inf for the others.
static void kcenter_update(const Tokens& x, int64_t begin, int64_t end, const Packed& centers, bool cosine, bool first,
                           float* nearest, float* aux, float* dots, float* scratch) {
  const int64_t stride = (centers.count + kLanes - 1) / kLanes * kLanes;
  float squares[kBlockRows + 8];
  for (int64_t n0 = begin; n0 < end; n0 += kBlockRows) {
    const int64_t rows = n0 + kBlockRows < end ? kBlockRows : end - n0;
    products(x, n0, rows, centers.rows, centers.count, dots, stride, first ? squares : nullptr, scratch);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = n0 + r;
      if (first) {
        aux[n] = auxiliary(squares[r], cosine);
        if (aux[n] != aux[n] && nearest[n] == nearest[n]) nearest[n] = kInfinity;
      }
      const Vec own = broadcast(aux[n]);
      Vec best = broadcast(-kInfinity);
      for (int64_t c = 0; c < stride; c += kLanes) {  // aux is NaN in the padding
        const Vec dot = load(dots + r * stride + c), other = load(centers.aux + c);
        const Vec similarity = cosine ? dot * own * other : 2.0f * dot - own - other;
        best = best < similarity ? similarity : best;
      }
      const float similarity = greatest(best);
      if (nearest[n] < similarity) nearest[n] = similarity;
    }
  }
}

// dots[i * stride + c] = candidate i . column c, for candidates begin..end of a packed panel
static void kcenter_candidates(const Tokens& panel, int64_t begin, int64_t end, const float* const* columns,
                               int64_t count, float* dots, int64_t stride) {
  products(panel, begin, end - begin, columns, count, dots + begin * stride, stride, nullptr, nullptr);
}

constexpr Kernels kKernels = {kRows, kBlockRows, kRows * kDepth, pack, kcenter_update, kcenter_candidates};
