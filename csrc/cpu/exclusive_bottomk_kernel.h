// The scan of exclusive_bottomk, compiled once per instruction set.

#include "cpu/simd.h"

// Scores as integers that sort alike; those that are not finite all share one place, after the others.
PRUNEOPS_INLINE VecBits ordered(Vec score) {
  const VecBits bits = (VecBits)(score + 0.0f);  // -0 becomes +0
  const VecBits order = bits ^ ((VecBits)((VecInt)bits >> 31) | 0x80000000u);
  return (bits & 0x7f800000u) == 0x7f800000u ? VecBits{} + kOrderedInfinity : order;
}

// Adds the tokens of a row that may be among its lowest. `taken` holds kTaken for those not to be had, 0 for the
// others, and is padded with kTaken to kPad.
template <class T>
static void scan(const T* scores, int64_t tokens, const uint32_t* taken, Lowest& lowest) {
  for (int64_t n = 0; n < tokens; n += kLanes) {
    float tail[kLanes];
    if (tokens - n < kLanes) widen(scores + n, tokens - n, tail);
    const VecBits order = ordered(tokens - n < kLanes ? load(tail) : load(scores + n)) | load(taken + n);
    uint32_t hits = bits_of(order < lowest.bound());
    if (!hits) continue;
    uint32_t orders[kLanes];
    __builtin_memcpy(orders, &order, sizeof(VecBits));
    for (; hits; hits &= hits - 1) {
      const int64_t lane = __builtin_ctz(hits);
      lowest.add(make_key(orders[lane], n + lane));
    }
  }
}

static void exclusive_bottomk_scan(Element type, const void* scores, int64_t tokens, const uint32_t* taken,
                                   Lowest& lowest) {
  switch (type) {
    case Element::kFloat: return scan(static_cast<const float*>(scores), tokens, taken, lowest);
    case Element::kHalf: return scan(static_cast<const Half*>(scores), tokens, taken, lowest);
    case Element::kBFloat16: return scan(static_cast<const BFloat16*>(scores), tokens, taken, lowest);
  }
}
