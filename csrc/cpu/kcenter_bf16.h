// What the bfloat16 implementations of KcenterProducts share. For x86-64 with AVX-512.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/kcenter_products.h"
#include "cpu/target.h"

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the intrinsics of GCC 12
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

PRUNEOPS_TARGET_BEGIN(PRUNEOPS_AVX512)
namespace pruneops::bf16 {

constexpr int64_t kStep = 32;        // features of a vector
constexpr int64_t kSumDepth = 1024;  // features summed together; such sums are added in order

inline int64_t steps_of(int64_t features) { return (features + kStep - 1) / kStep; }

inline const BFloat16* features_of(const Tokens& x, int64_t token) {
  return static_cast<const BFloat16*>(x.data) + token * x.stride;
}

// Up to 32 features, the rest zero.
inline __m512i load_features(const BFloat16* from, int64_t count) {
  if (count >= kStep) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi16(__mmask32((uint64_t{1} << count) - 1), from);
}

// Even or odd features as float32.
inline __m512 even(__m512i features) { return _mm512_castsi512_ps(_mm512_slli_epi32(features, 16)); }
inline __m512 odd(__m512i features) {
  return _mm512_castsi512_ps(_mm512_and_si512(features, _mm512_set1_epi32(int(0xffff0000u))));
}

// Sum of squares in float32, where each square is exact.
inline float squared_norm(const BFloat16* token, int64_t width) {
  float square = 0;
  for (int64_t block = 0; block < width; block += kSumDepth) {
    const int64_t end = width < block + kSumDepth ? width : block + kSumDepth;
    __m512 sums[4] = {};
    for (int64_t d = block; d < end; d += 2 * kStep) {
      const __m512i left = load_features(token + d, end - d);
      const __m512i right = end - d > kStep ? load_features(token + d + kStep, end - d - kStep) : __m512i{};
      sums[0] = _mm512_fmadd_ps(even(left), even(left), sums[0]);
      sums[1] = _mm512_fmadd_ps(odd(left), odd(left), sums[1]);
      sums[2] = _mm512_fmadd_ps(even(right), even(right), sums[2]);
      sums[3] = _mm512_fmadd_ps(odd(right), odd(right), sums[3]);
    }
    square += _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
  }
  return square;
}

// The bfloat16 instructions take subnormal products as zero. A center whose products could be that small is scaled up
// by a power of two, which is exact, and its dot products are scaled down. What products with tokens of norm 2^-63 and
// more (all smaller ones are zero vectors) still lose is below the rounding of a float32 sum.
inline float center_scale(float square) {
  if (!(square < 0x1p-40f)) return 1.0f;
  return square == 0 ? 0x1p63f : std::ldexp(1.0f, -std::ilogb(square) / 2);
}

inline __m512i scaled(__m512i features, float scale) {
  const __m512i low = _mm512_castps_si512(_mm512_mul_ps(even(features), _mm512_set1_ps(scale)));
  const __m512i high = _mm512_castps_si512(_mm512_mul_ps(odd(features), _mm512_set1_ps(scale)));
  return _mm512_or_si512(_mm512_srli_epi32(low, 16), _mm512_and_si512(high, _mm512_set1_epi32(int(0xffff0000u))));
}

// Centers or columns of a gram matrix in the layout of the implementation, in buffers of 16.
struct Columns {
  static constexpr int64_t kGroup = 16;

  std::vector<std::unique_ptr<Buffer>> groups;
  std::vector<float> scales;  // of each column

  uint8_t* group(int64_t g) const { return reinterpret_cast<uint8_t*>(static_cast<float*>(*groups[g])); }

  // Makes room for columns at..at + count.
  void resize(int64_t at, int64_t count, int64_t group_bytes) {
    while (int64_t(groups.size()) * kGroup < at + count)
      groups.push_back(std::make_unique<Buffer>(group_bytes / int64_t(sizeof(float))));
    scales.resize(groups.size() * kGroup, 1.0f);
  }

  // Undoes the scales of columns first..first + count in their dot products.
  void unscale(int64_t first, int64_t count, int64_t rows, float* dots, int64_t stride) const {
    for (int64_t c = 0; c < count; ++c)
      for (int64_t r = 0; scales[first + c] != 1.0f && r < rows; ++r) dots[r * stride + c] /= scales[first + c];
  }
};

class Bf16Products : public KcenterProducts {
 public:
  Bf16Products(Sizes sizes, const Tokens& x, int64_t candidates)
      : KcenterProducts(sizes), x_(x), steps_(steps_of(x.width)), candidates_(candidates) {}

  float square(int64_t token) override { return squared_norm(row(token), x_.width); }

  void store_centers(const int64_t* tokens, int64_t count, int64_t at) override { store(centers_, tokens, count, at); }

  void set_columns(const int64_t* slots, int64_t count) override {
    std::vector<int64_t> tokens(count);
    for (int64_t c = 0; c < count; ++c) tokens[c] = candidates_[slots[c]];
    store(columns_, tokens.data(), count, 0);
    column_count_ = count;
  }

 protected:
  const BFloat16* row(int64_t token) const { return features_of(x_, token); }

  virtual void store(Columns& columns, const int64_t* tokens, int64_t count, int64_t at) = 0;

  const Tokens x_;
  const int64_t steps_;
  std::vector<int64_t> candidates_;
  Columns centers_, columns_;
  int64_t column_count_ = 0;
};

std::unique_ptr<KcenterProducts> amx_products(const Tokens& x, int64_t candidates);

}  // namespace pruneops::bf16
PRUNEOPS_TARGET_END
