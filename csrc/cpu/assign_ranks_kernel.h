// The log-softmax of assign_ranks, compiled once per instruction set; kLanes tokens at a time, one per lane.

#include "cpu/simd.h"

// ln x for normal x, relative error below 2e-7; NaN propagates.
PRUNEOPS_INLINE Vec logarithm(Vec x) {
  const VecInt n = ((VecInt)x - 0x3f3504f3) >> 23;  // x = m 2^n, m in [sqrt(1/2), sqrt(2))
  const Vec m = (Vec)((VecInt)x - (n << 23));
  const Vec s = (m - 1.0f) / (m + 1.0f), s2 = s * s;  // ln m = 2 (s + s^3 / 3 + s^5 / 5 + ...)
  Vec y = broadcast(2.0f / 9);
  y = y * s2 + 2.0f / 7;
  y = y * s2 + 2.0f / 5;
  y = y * s2 + 2.0f / 3;
  y = y * s2 * s + 2.0f * s;
  y = y + __builtin_convertvector(n, Vec) * 0x1.62e43p-1f;
  return x == x ? y : x;
}

// Interleave the low or high halves of two vectors, as SSE's unpcklps and unpckhps.
PRUNEOPS_INLINE Vec4 unpacklo(Vec4 a, Vec4 b) { return PRUNEOPS_SHUFFLE4(a, b, 0, 4, 1, 5); }
PRUNEOPS_INLINE Vec4 unpackhi(Vec4 a, Vec4 b) { return PRUNEOPS_SHUFFLE4(a, b, 2, 6, 3, 7); }

// block[c * kLanes + l] = rows[l][c]
static void transpose(const float* const* rows, int64_t width, float* block) {
  int64_t c = 0;
  for (; c + 4 <= width; c += 4)
    for (int64_t l = 0; l < kLanes; l += 4) {
      Vec4 row[4];
      for (int64_t i = 0; i < 4; ++i) __builtin_memcpy(&row[i], rows[l + i] + c, sizeof(Vec4));
      const Vec4 even[2] = {unpacklo(row[0], row[2]), unpackhi(row[0], row[2])};
      const Vec4 odd[2] = {unpacklo(row[1], row[3]), unpackhi(row[1], row[3])};
      const Vec4 column[4] = {unpacklo(even[0], odd[0]), unpackhi(even[0], odd[0]), unpacklo(even[1], odd[1]),
                              unpackhi(even[1], odd[1])};
      for (int64_t i = 0; i < 4; ++i) __builtin_memcpy(block + (c + i) * kLanes + l, &column[i], sizeof(Vec4));
    }
  for (; c < width; ++c)
    for (int64_t l = 0; l < kLanes; ++l) block[c * kLanes + l] = rows[l][c];
}

// costs[p * stride + n] = -log(probability of rank p) for tokens n in [begin, end). Also writes up to kLanes - 1 tokens
// past the end.
template <class T>
static void softmax(const Tokens& logits, int64_t begin, int64_t end, int64_t ranks, float* costs, int64_t stride,
                    float* scratch) {
  const int64_t classes = logits.width, pitch = (classes + kLanes - 1) / kLanes * kLanes;
  float* const block = scratch + kLanes * pitch;
  for (int64_t n0 = begin; n0 < end; n0 += kLanes) {
    const int64_t tokens = n0 + kLanes < end ? kLanes : end - n0;
    const float* rows[kLanes];  // lanes past the end repeat the last token
    for (int64_t l = 0; l < kLanes; ++l) {
      const T* source = static_cast<const T*>(logits.data) + (n0 + (l < tokens ? l : tokens - 1)) * logits.stride;
      rows[l] = sizeof(T) == sizeof(float) ? reinterpret_cast<const float*>(source) : scratch + l * pitch;
      if (sizeof(T) != sizeof(float)) widen(source, classes, scratch + l * pitch);
    }
    transpose(rows, classes, block);
    Vec max_logit = load(block);
    for (int64_t c = 1; c < classes; ++c) {
      const Vec logit = load(block + c * kLanes);
      max_logit = max_logit < logit ? logit : max_logit;
    }
    Vec sums[4] = {};
    for (int64_t c = 0; c < classes; ++c) {
      const Vec logit = load(block + c * kLanes) - max_logit;
      store(block + c * kLanes, logit);
      sums[c % 4] += exponential(logit);
    }
    const Vec total = logarithm((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (int64_t p = 0; p < ranks; ++p) store(costs + p * stride + n0, total - load(block + p * kLanes));
  }
}

static void assign_ranks_softmax(const Tokens& logits, int64_t begin, int64_t end, int64_t ranks, float* costs,
                                 int64_t stride, float* scratch) {
  switch (logits.type) {
    case Element::kFloat: return softmax<float>(logits, begin, end, ranks, costs, stride, scratch);
    case Element::kHalf: return softmax<Half>(logits, begin, end, ranks, costs, stride, scratch);
    case Element::kBFloat16: return softmax<BFloat16>(logits, begin, end, ranks, costs, stride, scratch);
  }
}
