// Dot products of kcenter for bfloat16 tokens by AVX512-BF16 (VDPBF16PS), two features a lane, and the choice between
// it, the matrix unit (kcenter_amx.cpp) and neither. Lane l of a sum adds features 2 l + 1 and 2 l of every vector in
// turn, lanes are added as a tree, sums of kSumDepth features in order.
// Cost: 2 N C D operations for N tokens and C centers; 6 x 4 dot products at a time, ten loads for 24 instructions.
// See docs/kernels/kcenter.md.

#include "cpu/cpu_features.h"
#include "cpu/kcenter_products.h"

#if defined(__x86_64__)

#include <algorithm>

#include "cpu/kcenter_bf16.h"

PRUNEOPS_TARGET_BEGIN(PRUNEOPS_AVX512 ",avx512bf16")
namespace pruneops::bf16 {
namespace {

#define PRUNEOPS_LANES 16
#include "cpu/simd.h"
#undef PRUNEOPS_LANES

constexpr int64_t kTileRows = 6, kTileColumns = 4, kBlockRows = 96;

// dots[r * stride + c] = or += rows[r] . columns[c] over `length` features, for up to 4 columns.
void multiply_tile(const BFloat16* const* rows, const BFloat16* const* columns, int64_t count, int64_t length,
                   float* dots, int64_t stride, bool accumulate) {
  __m512 sums[kTileRows][kTileColumns] = {};
  for (int64_t d = 0; d < length; d += kStep) {
    __m512bh column[kTileColumns];
#pragma GCC unroll 4
    for (int64_t c = 0; c < kTileColumns; ++c) column[c] = (__m512bh)_mm512_loadu_si512(columns[c] + d);
#pragma GCC unroll 6
    for (int64_t r = 0; r < kTileRows; ++r) {
      const __m512bh row = (__m512bh)load_features(rows[r] + d, length - d);
#pragma GCC unroll 4
      for (int64_t c = 0; c < kTileColumns; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], row, column[c]);
    }
  }
  for (int64_t r = 0; r < kTileRows; ++r) {
    const Vec4 sum = reduce4((Vec)sums[r][0], (Vec)sums[r][1], (Vec)sums[r][2], (Vec)sums[r][3]);
    for (int64_t c = 0; c < count; ++c)
      dots[r * stride + c] = accumulate ? dots[r * stride + c] + sum[c] : sum[c];
  }
}

class DotProducts : public Bf16Products {
 public:
  DotProducts(const Tokens& x, int64_t candidates)
      : Bf16Products({kTileRows, kBlockRows, kTileColumns, steps_of(x.width) * kStep * 2, 0}, x, candidates),
        pitch_(steps_ * kStep),
        panel_(candidates * pitch_ / 2) {}

  void center_dots(const Rows& rows, int64_t first, int64_t count, float* dots, int64_t stride, float* squares,
                   float*) override {
    for (int64_t r = 0; squares && r < rows.count; ++r) squares[r] = square(rows[r]);
    multiply(x_, rows, centers_, first, count, dots, stride);
  }

  void gather(int64_t slot, int64_t token) override {
    candidates_[slot] = token;
    copy(row(token), 1.0f, panel() + slot * pitch_);
  }

  void column_dots(int64_t begin, int64_t end, float* dots, int64_t stride) override {
    const Tokens candidates{panel(), pitch_, pitch_, Element::kBFloat16};
    multiply(candidates, {nullptr, begin, end - begin}, columns_, 0, column_count_, dots + begin * stride, stride);
  }

 protected:
  void store(Columns& columns, const int64_t* tokens, int64_t count, int64_t at) override {
    columns.resize(at, count, Columns::kGroup * pitch_ * 2);
    for (int64_t c = at; c < at + count; ++c) {
      columns.scales[c] = center_scale(square(tokens[c - at]));
      copy(row(tokens[c - at]), columns.scales[c], const_cast<BFloat16*>(column(columns, c)));
    }
  }

 private:
  BFloat16* panel() const { return reinterpret_cast<BFloat16*>(static_cast<float*>(panel_)); }

  const BFloat16* column(const Columns& columns, int64_t c) const {
    return reinterpret_cast<const BFloat16*>(columns.group(c / Columns::kGroup)) + c % Columns::kGroup * pitch_;
  }

  // A token times a power of two, padded with zeros to whole vectors.
  void copy(const BFloat16* from, float scale, BFloat16* to) const {
    for (int64_t d = 0; d < x_.width; d += kStep) {
      const __m512i features = load_features(from + d, x_.width - d);
      _mm512_storeu_si512(to + d, scale == 1.0f ? features : scaled(features, scale));
    }
  }

  void multiply(const Tokens& tokens, const Rows& rows, const Columns& columns, int64_t first, int64_t count,
                float* dots, int64_t stride) const {
    for (int64_t d = 0; d < tokens.width; d += kSumDepth)
      for (int64_t r0 = 0; r0 < rows.count; r0 += kTileRows) {
        const BFloat16* row[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r)
          row[r] = features_of(tokens, rows[std::min(r0 + r, rows.count - 1)]) + d;
        for (int64_t c = 0; c < count; c += kTileColumns) {
          const BFloat16* columns_at[kTileColumns];
          for (int64_t i = 0; i < kTileColumns; ++i)
            columns_at[i] = column(columns, first + std::min(c + i, count - 1)) + d;
          multiply_tile(row, columns_at, std::min(kTileColumns, count - c), std::min(kSumDepth, tokens.width - d),
                        dots + r0 * stride + c, stride, d > 0);
        }
      }
    columns.unscale(first, count, rows.count, dots, stride);
  }

  const int64_t pitch_;
  Buffer panel_;
};

}  // namespace
}  // namespace pruneops::bf16
PRUNEOPS_TARGET_END

namespace pruneops {

std::unique_ptr<KcenterProducts> bf16_products(const Tokens& x, int64_t candidates) {
  switch (cpu_capability()) {
#if defined(__linux__)
    case CpuCapability::kAmx: return bf16::amx_products(x, candidates);
#endif
    case CpuCapability::kAvx512Bf16: return std::make_unique<bf16::DotProducts>(x, candidates);
    default: return nullptr;
  }
}

}  // namespace pruneops

#else

namespace pruneops {
std::unique_ptr<KcenterProducts> bf16_products(const Tokens&, int64_t) { return nullptr; }
}  // namespace pruneops

#endif
