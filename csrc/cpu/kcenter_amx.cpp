// Dot products of kcenter for bfloat16 tokens on the matrix unit (AMX): float32 sums in the order of amx.h.
// Tokens are copied to tiles A and centers to tiles B, 16 of them x 32 features (1 KB) each. 32 tokens x 256 features
// (a unit, 16 KB) stay in L1 while the centers pass by, four products for four loads, and the next unit is copied.
// Cost: 2 N C D operations for N tokens and C centers, tokens read once, centers once per 32 tokens from L2.
// See docs/kernels/kcenter.md.

#if defined(__x86_64__) && defined(__linux__)

#include "cpu/amx.h"

#include <algorithm>
#include <utility>

#include "cpu/kcenter_bf16.h"

PRUNEOPS_TARGET_BEGIN(PRUNEOPS_AVX512)
namespace pruneops::bf16 {
namespace {

using amx::kTile;
using amx::kTileBytes;

constexpr int64_t kPairRows = 2 * kTile;        // rows and columns of a product
constexpr int64_t kUnitSteps = 8;               // steps of a unit
constexpr int64_t kDepth = kUnitSteps * kStep;  // features of a unit
constexpr int64_t kUnitBytes = kPairRows * kDepth * 2;
constexpr int64_t kScratch = 2 * kUnitBytes / sizeof(float);
constexpr int64_t kMaxRows = 16 * kPairRows;    // of a call
static_assert(kSumDepth % kDepth == 0 && Columns::kGroup == kTile);

// Transposes 16 x 16 pairs of features: rows of tokens become a tile B.
void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // r[4 g + i] holds pairs i, 4 + i, 8 + i, 12 + i of tokens 4 g..4 g + 3
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Features of a token to its row of consecutive tiles, the last step padded with zeros.
void copy_row(const BFloat16* from, int64_t length, uint8_t* to) {
  for (int64_t d = 0; d < length; d += kStep, to += kTileBytes)
    _mm512_store_si512(to, load_features(from + d, length - d));
}

// Up to 32 tokens, rows `begin`.. at features d.., on their way to tiles A. Rows past the end repeat the last one.
struct Unit {
  int64_t begin, count, d, length;
  const BFloat16* from[kPairRows];
  uint8_t* tiles;
  float* squares;  // null, or per row of the unit: to be computed, of all features of the token
  int64_t width;

  void copy(int64_t first, int64_t last) const {
    for (int64_t r = first; r < last; ++r) {
      const BFloat16* const source = from[r];
      if (squares && r < count) squares[r] = squared_norm(source, width);
      uint8_t* const to = tiles + r / kTile * kUnitSteps * kTileBytes + r % kTile * 64;
      if (length < kDepth) {
        copy_row(source, length, to);
        continue;
      }
#pragma GCC unroll 8
      for (int64_t s = 0; s < kUnitSteps; ++s)
        _mm512_store_si512(to + s * kTileBytes, _mm512_loadu_si512(source + s * kStep));
    }
  }
};

// Where a sum of products goes: `partial` holds it between its first and last features, dots the total.
struct Sum {
  float *partial, *dots;
  int64_t stride;         // of both
  bool first, last, add;  // the first or last features of a sum; add it to dots, which already holds one
};

// Rows begin..end of the next unit, to be copied between the steps of a product.
struct Copy {
  const Unit* unit;
  int64_t begin, end;
};

// Loads a tile, without displacing what is in L1 if STREAM.
#define TILE_LOAD(STREAM, tile, from)                          \
  do {                                                         \
    if (STREAM) PRUNEOPS_TILE_LOAD_STREAMING(tile, from, 64);  \
    else PRUNEOPS_TILE_LOAD(tile, from, 64);                   \
  } while (false)

// Products of ROWS tiles A, a_pitch bytes apart, with COLUMNS tiles B over `steps` steps. STREAM_A: tiles B are in L1
// and A pass by, else the reverse.
template <int ROWS, int COLUMNS, bool STREAM_A>
void multiply_tiles(const uint8_t* a0, int64_t a_pitch, const uint8_t* b0, const uint8_t* b1, int64_t steps, Sum sum,
                    Copy copy) {
  const uint8_t* const a1 = a0 + a_pitch;
  const int64_t offsets[] = {0, kTile, kTile * sum.stride, kTile * sum.stride + kTile}, pitch = 4 * sum.stride;
  if (sum.first) {
    PRUNEOPS_TILE_ZERO(0);
    PRUNEOPS_TILE_ZERO(1);
    PRUNEOPS_TILE_ZERO(2);
    PRUNEOPS_TILE_ZERO(3);
  } else {
    PRUNEOPS_TILE_LOAD(0, sum.partial, pitch);
    if (COLUMNS == 2) PRUNEOPS_TILE_LOAD(1, sum.partial + offsets[1], pitch);
    if (ROWS == 2) PRUNEOPS_TILE_LOAD(2, sum.partial + offsets[2], pitch);
    if (ROWS == 2 && COLUMNS == 2) PRUNEOPS_TILE_LOAD(3, sum.partial + offsets[3], pitch);
  }
  for (int64_t step = 0, copied = copy.begin; step < steps; ++step) {
    const int64_t s = step * kTileBytes;
    TILE_LOAD(STREAM_A, 4, a0 + s);
    TILE_LOAD(!STREAM_A, 6, b0 + s);
    PRUNEOPS_TILE_MULTIPLY(0, 4, 6);
    if (COLUMNS == 2) {
      TILE_LOAD(!STREAM_A, 7, b1 + s);
      PRUNEOPS_TILE_MULTIPLY(1, 4, 7);
    }
    if (ROWS == 2) {
      TILE_LOAD(STREAM_A, 5, a1 + s);
      PRUNEOPS_TILE_MULTIPLY(2, 5, 6);
      if (COLUMNS == 2) PRUNEOPS_TILE_MULTIPLY(3, 5, 7);
    }
    const int64_t share = (copy.end - copy.begin) * (step + 1) / kUnitSteps;
    const int64_t due = step + 1 < steps ? copy.begin + share : copy.end;
    if (copied < due) copy.unit->copy(copied, due);
    copied = due;
  }
  float* const to = sum.last && !sum.add ? sum.dots : sum.partial;
  PRUNEOPS_TILE_STORE(0, to, pitch);
  if (COLUMNS == 2) PRUNEOPS_TILE_STORE(1, to + offsets[1], pitch);
  if (ROWS == 2) PRUNEOPS_TILE_STORE(2, to + offsets[2], pitch);
  if (ROWS == 2 && COLUMNS == 2) PRUNEOPS_TILE_STORE(3, to + offsets[3], pitch);
  if (!sum.last || !sum.add) return;
  for (int64_t r = 0; r < ROWS * kTile; ++r)
    for (int64_t c = 0; c < COLUMNS * kTile; c += kTile) {
      float* const total = sum.dots + r * sum.stride + c;
      _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), _mm512_loadu_ps(to + r * sum.stride + c)));
    }
}

// The same for 1 to 32 rows and the 1 to 32 columns of tiles at b0 and b1.
template <bool STREAM_A>
void multiply(int64_t rows, const uint8_t* a, int64_t a_pitch, int64_t columns, const uint8_t* b0, const uint8_t* b1,
              int64_t steps, const Sum& sum, const Copy& copy) {
  const bool two_rows = rows > kTile, two_columns = columns > kTile;
  const auto run = two_rows ? two_columns ? multiply_tiles<2, 2, STREAM_A> : multiply_tiles<2, 1, STREAM_A>
                            : two_columns ? multiply_tiles<1, 2, STREAM_A> : multiply_tiles<1, 1, STREAM_A>;
  run(a, a_pitch, b0, b1, steps, sum, copy);
}

class AmxProducts : public Bf16Products {
 public:
  AmxProducts(const Tokens& x, int64_t candidates)
      : Bf16Products({kTile, kMaxRows, kTile, steps_of(x.width) * kStep * 2, kScratch}, x, candidates),
        panel_(round_up(candidates, kTile) * steps_ * kStep / 2) {
    std::fill_n(static_cast<float*>(panel_), round_up(candidates, kTile) * steps_ * kStep / 2, 0.0f);
  }

  void center_dots(const Rows& rows, int64_t first, int64_t count, float* dots, int64_t stride, float* squares,
                   float* scratch) override {
    const amx::Tiles tiles;
    Buffer partial(kPairRows * stride);
    uint8_t* const a = reinterpret_cast<uint8_t*>(scratch);
    Unit units[2], *unit = &units[0], *next = &units[1];
    unit->tiles = a, next->tiles = a + kUnitBytes;
    set(*unit, rows, 0, 0, squares);
    unit->copy(0, round_up(unit->count, kTile));
    for (bool more = true; more; std::swap(unit, next)) {  // all features of 32 rows, then the next ones
      const bool same_rows = unit->d + kDepth < x_.width;
      const int64_t begin = unit->begin + (same_rows ? 0 : kPairRows);
      more = begin < rows.count;
      if (more) set(*next, rows, begin, same_rows ? unit->d + kDepth : 0, squares);
      multiply_unit(*unit, first, count, partial, dots + unit->begin * stride, stride, more ? next : nullptr);
    }
    centers_.unscale(first, count, rows.count, dots, stride);
  }

  void gather(int64_t slot, int64_t token) override {
    candidates_[slot] = token;
    copy_row(row(token), x_.width, candidate_tile(slot) + slot % kTile * 64);
  }

  void column_dots(int64_t begin, int64_t end, float* dots, int64_t stride) override {
    const amx::Tiles tiles;
    Buffer partial(round_up(end - begin, kPairRows) * stride);
    constexpr int64_t kSteps = kSumDepth / kStep / 2;  // of 32 columns that stay in L1
    for (int64_t s = 0; s < steps_; s += kSteps)
      for (int64_t c = 0; c < column_count_; c += kPairRows)
        for (int64_t i = begin; i < end; i += kPairRows) {
          const bool first = s % (2 * kSteps) == 0, last = !first || s + kSteps >= steps_;
          const Sum sum{partial + (i - begin) * stride + c, dots + i * stride + c, stride, first, last,
                        s >= 2 * kSteps};
          multiply<true>(end - i, candidate_tile(i) + s * kTileBytes, steps_ * kTileBytes, column_count_ - c,
                         tile_of(columns_, c, s), tile_of(columns_, c + kTile, s), std::min(kSteps, steps_ - s), sum,
                         {nullptr, 0, 0});
        }
    columns_.unscale(0, column_count_, end - begin, dots + begin * stride, stride);
  }

 protected:
  void store(Columns& columns, const int64_t* tokens, int64_t count, int64_t at) override {
    columns.resize(at, count, steps_ * kTileBytes);
    for (int64_t i = 0; i < count; i += kTile)
      store_group(columns, tokens + i, std::min(kTile, count - i), at + i);
  }

 private:
  uint8_t* candidate_tile(int64_t slot) const {
    return reinterpret_cast<uint8_t*>(static_cast<float*>(panel_)) + slot / kTile * steps_ * kTileBytes;
  }

  // The tile B of 16 columns at a step; of the last ones for columns past the end.
  const uint8_t* tile_of(const Columns& columns, int64_t column, int64_t step) const {
    return columns.group(std::min<int64_t>(column / kTile, columns.groups.size() - 1)) + step * kTileBytes;
  }

  // Finds the rows of a unit.
  void set(Unit& unit, const Rows& rows, int64_t begin, int64_t d, float* squares) const {
    unit.begin = begin, unit.count = std::min(kPairRows, rows.count - begin);
    unit.d = d, unit.length = std::min(kDepth, x_.width - d);
    for (int64_t r = 0; r < kPairRows; ++r) {
      const int64_t n = begin + std::min(r, unit.count - 1);
      unit.from[r] = row(rows[n]) + d;
    }
    unit.squares = squares && d == 0 ? squares + begin : nullptr;
    unit.width = x_.width;
  }

  // Products of a unit with all centers; each pair of tiles of centers copies a share of the next unit.
  void multiply_unit(const Unit& unit, int64_t first, int64_t count, float* partial, float* dots, int64_t stride,
                     const Unit* next) const {
    const int64_t pairs = (count + kPairRows - 1) / kPairRows, end = unit.d + kDepth, step = unit.d / kStep;
    const int64_t next_rows = next ? round_up(next->count, kTile) : 0;
    const bool is_first = unit.d % kSumDepth == 0, is_last = end % kSumDepth == 0 || end >= x_.width;
    for (int64_t j = 0; j < pairs; ++j) {
      const int64_t c = j * kPairRows;
      const Sum sum{partial + c, dots + c, stride, is_first, is_last, unit.d >= kSumDepth};
      multiply<false>(unit.count, unit.tiles, kUnitSteps * kTileBytes, count - c, tile_of(centers_, first + c, step),
                      tile_of(centers_, first + c + kTile, step), steps_of(unit.length), sum,
                      {next, j * next_rows / pairs, (j + 1) * next_rows / pairs});
    }
  }

  // Up to 16 tokens as tiles B, other columns zero.
  void store_group(Columns& columns, const int64_t* tokens, int64_t count, int64_t at) const {
    bool plain = true;
    for (int64_t c = 0; c < count; ++c) {
      columns.scales[at + c] = center_scale(squared_norm(row(tokens[c]), x_.width));
      plain &= columns.scales[at + c] == 1.0f;
    }
    uint8_t* to = columns.group(at / kTile);
    for (int64_t d = 0; d < x_.width; d += kStep, to += kTileBytes) {
      __m512i tile[kTile];
      for (int64_t c = 0; c < kTile; ++c) {
        tile[c] = c < count ? load_features(row(tokens[c]) + d, x_.width - d) : _mm512_setzero_si512();
        if (!plain && c < count) tile[c] = scaled(tile[c], columns.scales[at + c]);
      }
      transpose(tile);
      for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(to + i * 64, tile[i]);
    }
  }

  Buffer panel_;  // tiles A of the candidates
};

}  // namespace

std::unique_ptr<KcenterProducts> amx_products(const Tokens& x, int64_t candidates) {
  return std::make_unique<AmxProducts>(x, candidates);
}

}  // namespace pruneops::bf16
PRUNEOPS_TARGET_END

#endif
