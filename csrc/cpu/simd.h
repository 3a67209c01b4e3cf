// SIMD vectors of PRUNEOPS_LANES floats, on the compiler's vector extension. Kernel files include it once per
// instruction set, inside that set's namespace (see foreach_target.h), so it has no include guard.

constexpr int64_t kLanes = PRUNEOPS_LANES;

typedef float Vec __attribute__((vector_size(4 * PRUNEOPS_LANES)));
typedef uint32_t VecBits __attribute__((vector_size(4 * PRUNEOPS_LANES)));
typedef int32_t VecInt __attribute__((vector_size(4 * PRUNEOPS_LANES)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * PRUNEOPS_LANES)));
typedef float Vec4 __attribute__((vector_size(16)));
typedef uint32_t Vec4Bits __attribute__((vector_size(16)));

#define PRUNEOPS_INLINE static inline __attribute__((always_inline))

#if defined(__clang__)
#define PRUNEOPS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define PRUNEOPS_SHUFFLE4 PRUNEOPS_SHUFFLE
#else
#define PRUNEOPS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecBits{__VA_ARGS__})
#define PRUNEOPS_SHUFFLE4(a, b, ...) __builtin_shuffle(a, b, Vec4Bits{__VA_ARGS__})
#endif

PRUNEOPS_INLINE Vec broadcast(float value) { return Vec{} + value; }

PRUNEOPS_INLINE void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof(Vec)); }

// Non-temporal store on x86; `to` is aligned to a vector. Needs a fence before other threads read.
PRUNEOPS_INLINE void store_streaming(float* to, Vec value) {
#if PRUNEOPS_LANES == 16
  _mm512_stream_ps(to, (__m512)value);
#elif PRUNEOPS_LANES == 8
  _mm256_stream_ps(to, (__m256)value);
#elif defined(__x86_64__)
  _mm_stream_ps(to, (__m128)value);
#else
  store(to, value);
#endif
}

PRUNEOPS_INLINE Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof(Vec));
  return value;
}

PRUNEOPS_INLINE VecBits load(const uint32_t* from) {
  VecBits value;
  __builtin_memcpy(&value, from, sizeof(VecBits));
  return value;
}

// Conversions from 16-bit floats are exact, subnormals, infinities and NaN included.
PRUNEOPS_INLINE Vec load(const BFloat16* from) {
  VecHalf half;
  __builtin_memcpy(&half, from, sizeof(VecHalf));
  return (Vec)(__builtin_convertvector(half, VecBits) << 16);
}

PRUNEOPS_INLINE Vec load(const Half* from) {
#if PRUNEOPS_LANES == 16
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif PRUNEOPS_LANES == 8
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  VecHalf half;
  __builtin_memcpy(&half, from, sizeof(VecHalf));
  const VecBits bits = __builtin_convertvector(half, VecBits), magnitude = bits & 0x7fffu;
  const Vec scaled = (Vec)(magnitude << 13) * 0x1p112f;  // rebias the exponent from 15 to 127
  const VecBits special = (VecBits)(magnitude > 0x7bffu) & 0x7f800000u;
  return (Vec)((VecBits)scaled | special | ((bits & 0x8000u) << 16));
#endif
}

// Horizontal sums of four vectors; all four add in the same order.
PRUNEOPS_INLINE Vec4 reduce4(Vec a, Vec b, Vec c, Vec d) {
#if PRUNEOPS_LANES == 16
#define PRUNEOPS_QUADS(i, j, k, l) \
  i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, k + 12, l + 12
#elif PRUNEOPS_LANES == 8
#define PRUNEOPS_QUADS(i, j, k, l) i, j, k, l, i + 4, j + 4, k + 4, l + 4
#else
#define PRUNEOPS_QUADS(i, j, k, l) i, j, k, l
#endif
  constexpr int L = PRUNEOPS_LANES;
  const Vec ab = PRUNEOPS_SHUFFLE(a, b, PRUNEOPS_QUADS(0, L, 1, L + 1)) +
                 PRUNEOPS_SHUFFLE(a, b, PRUNEOPS_QUADS(2, L + 2, 3, L + 3));
  const Vec cd = PRUNEOPS_SHUFFLE(c, d, PRUNEOPS_QUADS(0, L, 1, L + 1)) +
                 PRUNEOPS_SHUFFLE(c, d, PRUNEOPS_QUADS(2, L + 2, 3, L + 3));
  const Vec abcd = PRUNEOPS_SHUFFLE(ab, cd, PRUNEOPS_QUADS(0, 1, L, L + 1)) +
                   PRUNEOPS_SHUFFLE(ab, cd, PRUNEOPS_QUADS(2, 3, L + 2, L + 3));
#undef PRUNEOPS_QUADS
  Vec4 quads[L / 4];
  __builtin_memcpy(quads, &abcd, sizeof(Vec));
#if PRUNEOPS_LANES == 16
  return (quads[0] + quads[2]) + (quads[1] + quads[3]);
#elif PRUNEOPS_LANES == 8
  return quads[0] + quads[1];
#else
  return quads[0];
#endif
}

// Horizontal maximum; NaN lanes after the first are ignored.
PRUNEOPS_INLINE float reduce_max(Vec value) {
  float lanes[kLanes], result;
  store(lanes, value);
  result = lanes[0];
  for (int64_t i = 1; i < kLanes; ++i) result = result < lanes[i] ? lanes[i] : result;
  return result;
}

// Converts `count` elements to float32 and pads with zeros to a multiple of kLanes.
template <class T>
PRUNEOPS_INLINE void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i == count) return;
  T tail[kLanes] = {};
  __builtin_memcpy(tail, from + i, (count - i) * sizeof(T));
  store(to + i, load(tail));
}

// One bit per lane; every lane is all ones or all zeros.
PRUNEOPS_INLINE uint32_t movemask(VecInt lanes) {
#if PRUNEOPS_LANES == 16
  return _mm512_movepi32_mask((__m512i)lanes);
#elif PRUNEOPS_LANES == 8
  return _mm256_movemask_ps((__m256)lanes);
#else
  uint32_t bits = 0;
  for (int64_t i = 0; i < kLanes; ++i) bits |= uint32_t(lanes[i] & 1) << i;
  return bits;
#endif
}

// e^x within 1.2 ulp; 0 for x < -87.3, where results would be subnormal.
PRUNEOPS_INLINE Vec exponential(Vec x) {
  const Vec top = broadcast(89.0f), bounded = x > top ? top : x;  // e^89 is inf; NaN stays
  const Vec magic = broadcast(0x1.8p23f + 127);                   // the low bits of n + magic hold n + 127
  const Vec sum = bounded * 0x1.715476p+0f + magic, n = sum - magic;
  const Vec r = (bounded - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // x - n ln 2, the first product exact
  Vec poly = 0x1.6a23dp-10f * r + 0x1.123a2p-7f;                     // minimax, off by 2^-28
  poly = poly * r + 0x1.5558f2p-5f;
  poly = poly * r + 0x1.555492p-3f;
  poly = poly * r + 0x1.fffffcp-2f;
  poly = poly * r + 1.0f;
  poly = poly * r + 1.0f;
  const Vec power = (Vec)((VecBits)sum << 23);
  return (Vec)((VecBits)(poly * power) & ~(VecBits)(x < -87.3f));
}
