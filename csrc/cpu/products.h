// Float32 dot products of tokens with packed tokens, and squared norms. Kernel files include it once per instruction
// set, inside that set's namespace (see foreach_target.h), so it has no include guard.
//
// Every dot product is summed in the same order at any place in a tile: lane l of a block of kDepth features adds
// features l, l + kLanes, ... in turn, lanes are added as a tree, blocks in order. Tails are padded with zeros. Equal
// rows give equal bits, dot(a, b) equals dot(b, a), and a squared norm equals dot(a, a).
// See docs/kernels/kcenter.md.

#include "cpu/simd.h"

// Registers: kRows x kColumns accumulators, kHalf for squares, kColumns operands and one more.
constexpr int64_t kRows = kLanes == 16 ? 6 : kLanes == 8 ? 3 : 2;
constexpr int64_t kHalf = (kRows + 1) / 2;
constexpr int64_t kColumns = 4;
// kRows + kColumns segments of this length fit in L1, with the next kColumns being loaded.
constexpr int64_t kDepth = 1024;
constexpr int64_t kBlockRows = 96;  // a multiple of kRows
constexpr int64_t kNoSquares = -1;

// to[0..COUNT) = value, or += value if accumulate.
template <int64_t COUNT>
PRUNEOPS_INLINE void add(float* to, Vec4 value, bool accumulate) {
  Vec4 before = {};
  if (accumulate) __builtin_memcpy(&before, to, COUNT * sizeof(float));
  if (accumulate) value = before + value;
  __builtin_memcpy(to, &value, COUNT * sizeof(float));
}

// Software prefetch of memory that the next tile reads. Each step of a tile fetches one cache line of one row, or of
// kHalf rows, `pitch` bytes apart, where the tile computes squares.
struct Prefetch {
  const char* line;
  int64_t step, pitch;
};

// dots[r * stride + c] = or += rows[r] . columns[c] over `depth` features, a multiple of kLanes. HALF 0 or 1: also
// squares[r] = or += rows[r] . rows[r] for the first or second half of the rows.
template <int64_t COLUMNS, int64_t HALF>
static void tile(const float* const* rows, const float* const* columns, int64_t depth, float* dots, int64_t stride,
                 float* squares, bool accumulate, Prefetch prefetch) {
  Vec sums[kRows][kColumns] = {}, square_sums[4] = {};
  for (int64_t d = 0; d < depth; d += kLanes) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < (HALF == kNoSquares ? 1 : kHalf); ++r)
      __builtin_prefetch(prefetch.line + r * prefetch.pitch, 0, 2);
    prefetch.line += prefetch.step;
    Vec column[kColumns];
#pragma GCC unroll 8
    for (int64_t c = 0; c < COLUMNS; ++c) column[c] = load(columns[c] + d);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const Vec row = load(rows[r] + d);
      if (r / kHalf == HALF) square_sums[r % kHalf] += row * row;
#pragma GCC unroll 8
      for (int64_t c = 0; c < COLUMNS; ++c) sums[r][c] += row * column[c];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r)
    add<COLUMNS>(dots + r * stride, reduce4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]), accumulate);
  if (HALF == kNoSquares) return;
  constexpr int64_t count = HALF == 0 ? kHalf : kRows - kHalf;
  const Vec4 sum = reduce4(square_sums[0], square_sums[1], square_sums[2], square_sums[3]);
  add<count>(squares + HALF * kHalf, sum, accumulate);
}

template <int64_t HALF>
static void tile_of(int64_t count, const float* const* rows, const float* const* columns, int64_t depth,
                    float* dots, int64_t stride, float* squares, bool accumulate, Prefetch prefetch) {
  switch (count) {
    case 0: return tile<0, HALF>(rows, columns, depth, dots, stride, squares, accumulate, prefetch);
    case 1: return tile<1, HALF>(rows, columns, depth, dots, stride, squares, accumulate, prefetch);
    case 2: return tile<2, HALF>(rows, columns, depth, dots, stride, squares, accumulate, prefetch);
    case 3: return tile<3, HALF>(rows, columns, depth, dots, stride, squares, accumulate, prefetch);
    default: return tile<4, HALF>(rows, columns, depth, dots, stride, squares, accumulate, prefetch);
  }
}

// Token r of index[0..rows), or of begin..begin + rows if index is null; the last one for r past the end.
template <class T>
PRUNEOPS_INLINE const T* token_row(const Tokens& x, const int64_t* index, int64_t begin, int64_t rows, int64_t r) {
  r = r < rows ? r : rows - 1;
  return static_cast<const T*>(x.data) + (index ? index[r] : begin + r) * x.stride;
}

// dots[r * stride + c] = row r . columns[c]; squares[r] unless null, which needs a null index. The rows are those of
// token_row; dots and squares hold a multiple of kRows of them.
template <class T>
static void products(const Tokens& x, const int64_t* index, int64_t begin, int64_t rows, const float* const* columns,
                     int64_t count, float* dots, int64_t stride, float* squares, float* scratch) {
  // the first two groups of columns also compute squares, of half the rows each
  const int64_t group = squares && count < 2 * kColumns ? (count + 1) / 2 : kColumns;
  const int64_t groups = squares && count < 2 * kColumns ? 2 : (count + kColumns - 1) / kColumns;
  const int64_t tiles_per_row = groups > kRows ? groups / kRows : 1;  // tiles that prefetch one row together
  for (int64_t d = 0; d < x.width; d += kDepth) {
    const int64_t length = d + kDepth < x.width ? kDepth : x.width - d;
    const int64_t depth = (length + kLanes - 1) / kLanes * kLanes;
    const int64_t bytes = length * sizeof(T), step = bytes * kLanes / depth, pitch = x.stride * int64_t(sizeof(T));
    const bool in_place = sizeof(T) == sizeof(float) && depth == length;
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      const float* row[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const T* source = token_row<T>(x, index, begin, rows, r0 + r) + d;
        row[r] = in_place ? reinterpret_cast<const float*>(source) : scratch + r * kDepth;
        if (!in_place) widen(source, length, scratch + r * kDepth);
      }
      // the next tile reads the next rows, after the last rows the next features
      const int64_t next_row = r0 + kRows < rows ? r0 + kRows : 0, next_feature = next_row ? d : d + kDepth;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t c = g * group, width = count - c < group ? count - c : group;
        const float* column[kColumns];
        for (int64_t i = 0; i < width; ++i) column[i] = columns[c + i] + d;
        float* to = dots + r0 * stride + c;
        if (squares && g < 2) {
          const T* next = token_row<T>(x, index, begin, rows, next_row + g * kHalf) + next_feature;
          const Prefetch prefetch = {reinterpret_cast<const char*>(next), step, pitch};
          if (g == 0) tile_of<0>(width, row, column, depth, to, stride, squares + r0, d > 0, prefetch);
          else tile_of<1>(width, row, column, depth, to, stride, squares + r0, d > 0, prefetch);
        } else {
          const int64_t r = g / tiles_per_row < kRows ? g / tiles_per_row : kRows - 1;
          const T* next = token_row<T>(x, index, begin, rows, next_row + r) + next_feature;
          const Prefetch prefetch = {reinterpret_cast<const char*>(next) + g % tiles_per_row * bytes / tiles_per_row,
                                     step / tiles_per_row, pitch};
          tile_of<kNoSquares>(width, row, column, depth, to, stride, nullptr, d > 0, prefetch);
        }
      }
    }
  }
}

static void products(const Tokens& x, const int64_t* index, int64_t begin, int64_t rows, const float* const* columns,
                     int64_t count, float* dots, int64_t stride, float* squares, float* scratch) {
  switch (x.type) {
    case Element::kFloat:
      return products<float>(x, index, begin, rows, columns, count, dots, stride, squares, scratch);
    case Element::kHalf:
      return products<Half>(x, index, begin, rows, columns, count, dots, stride, squares, scratch);
    case Element::kBFloat16:
      return products<BFloat16>(x, index, begin, rows, columns, count, dots, stride, squares, scratch);
  }
}

// Converts token `index` to float32, padded with zeros to a multiple of kPad. Returns its squared norm.
static float pack(const Tokens& x, int64_t index, float* to) {
  const int64_t padded = (x.width + kPad - 1) / kPad * kPad, offset = index * x.stride;
  for (int64_t d = x.width / kPad * kPad; d < padded; ++d) to[d] = 0;
  switch (x.type) {
    case Element::kFloat: widen(static_cast<const float*>(x.data) + offset, x.width, to); break;
    case Element::kHalf: widen(static_cast<const Half*>(x.data) + offset, x.width, to); break;
    case Element::kBFloat16: widen(static_cast<const BFloat16*>(x.data) + offset, x.width, to); break;
  }
  float square;
  for (int64_t block = 0; block < x.width; block += kDepth) {
    Vec sum = {};
    for (int64_t d = block; d < padded && d < block + kDepth; d += kLanes) sum += load(to + d) * load(to + d);
    add<1>(&square, reduce4(sum, sum, sum, sum), block > 0);
  }
  return square;
}
