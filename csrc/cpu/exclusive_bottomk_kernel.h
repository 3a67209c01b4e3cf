// The scan of exclusive_bottomk, compiled once per instruction set.

#include "cpu/simd.h"

// As ordered_bits(float) of common.h, with kOrderedInfinity for all non-finite scores.
PRUNEOPS_INLINE VecBits ordered_bits(Vec score) {
  const VecBits bits = (VecBits)(score + 0.0f);  // -0 becomes +0
  const VecBits ordered = bits ^ ((VecBits)((VecInt)bits >> 31) | 0x80000000u);
  return (bits & 0x7f800000u) == 0x7f800000u ? VecBits{} + kOrderedInfinity : ordered;
}

// Adds the tokens of a row that may be among its k smallest. `taken` is kTaken for taken tokens and 0 for free ones,
// padded with kTaken to a multiple of kPad.
template <class T>
static void scan(const T* scores, int64_t tokens, const uint32_t* taken, BottomK& bottomk) {
  for (int64_t n = 0; n < tokens; n += kLanes) {
    float tail[kLanes];
    if (tokens - n < kLanes) widen(scores + n, tokens - n, tail);
    const VecBits bits = ordered_bits(tokens - n < kLanes ? load(tail) : load(scores + n)) | load(taken + n);
    uint32_t hits = movemask(bits < bottomk.bound());
    if (!hits) continue;
    uint32_t lane_bits[kLanes];
    __builtin_memcpy(lane_bits, &bits, sizeof(VecBits));
    for (; hits; hits &= hits - 1) {
      const int64_t lane = __builtin_ctz(hits);
      bottomk.add(make_key(lane_bits[lane], n + lane));
    }
  }
}

static void exclusive_bottomk_scan(Element type, const void* scores, int64_t tokens, const uint32_t* taken,
                                   BottomK& bottomk) {
  switch (type) {
    case Element::kFloat: return scan(static_cast<const float*>(scores), tokens, taken, bottomk);
    case Element::kHalf: return scan(static_cast<const Half*>(scores), tokens, taken, bottomk);
    case Element::kBFloat16: return scan(static_cast<const BFloat16*>(scores), tokens, taken, bottomk);
  }
}
