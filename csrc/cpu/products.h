// Float32 dot products of tokens with packed ones, and squared norms. Included by kernel files, once per instruction
// set, inside that set's namespace (see foreach_target.h): hence no include guard.
//
// Every product is summed in the same order wherever its row and column sit in a tile: lane l of a block of kDepth
// features takes features l, l + kLanes, ... in turn, the lanes are added as a tree, the blocks in order. Tails are
// padded with zeros. So equal rows get equal bits, dot(a, b) equals dot(b, a), and a squared norm equals dot(a, a).

#include "cpu/simd.h"

// Registers: kRows x kColumns accumulators, kHalf more for squares, kColumns operands and one spare.
constexpr int64_t kRows = kLanes == 16 ? 6 : kLanes == 8 ? 3 : 2;
constexpr int64_t kHalf = (kRows + 1) / 2;
constexpr int64_t kColumns = 4;
// kRows + kColumns segments of this length stay in L1, as do the next kColumns while they arrive.
constexpr int64_t kDepth = 1024;
constexpr int64_t kBlockRows = 96;  // whole tiles
constexpr int64_t kNone = -1;

// to[0..COUNT) (+)= value
template <int64_t COUNT>
PRUNEOPS_INLINE void add(float* to, Vec4 value, bool accumulate) {
  Vec4 before = {};
  if (accumulate) __builtin_memcpy(&before, to, COUNT * sizeof(float));
  if (accumulate) value = before + value;
  __builtin_memcpy(to, &value, COUNT * sizeof(float));
}

// Memory that the next tile will read, asked for while this one is multiplied: at each step a line of one row, or of as
// many rows, `pitch` bytes apart, as the tile squares.
struct Ahead {
  const char* line;
  int64_t step, pitch;
};

// dots[r * stride + c] (+)= rows[r] . columns[c] over `depth` features, a multiple of kLanes; and for half of the rows,
// the first (HALF 0) or the other (HALF 1), squares[r] (+)= rows[r] . rows[r]. HALF kNone: no squares.
template <int64_t COLUMNS, int64_t HALF>
static void tile(const float* const* rows, const float* const* columns, int64_t depth, float* dots, int64_t stride,
                 float* squares, bool accumulate, Ahead ahead) {
  Vec sums[kRows][kColumns] = {}, own[4] = {};
  for (int64_t d = 0; d < depth; d += kLanes) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < (HALF == kNone ? 1 : kHalf); ++r) __builtin_prefetch(ahead.line + r * ahead.pitch, 0, 2);
    ahead.line += ahead.step;
    Vec column[kColumns];
#pragma GCC unroll 8
    for (int64_t c = 0; c < COLUMNS; ++c) column[c] = load(columns[c] + d);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const Vec row = load(rows[r] + d);
      if (r / kHalf == HALF) own[r % kHalf] += row * row;
#pragma GCC unroll 8
      for (int64_t c = 0; c < COLUMNS; ++c) sums[r][c] += row * column[c];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r)
    add<COLUMNS>(dots + r * stride, reduce4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]), accumulate);
  if (HALF == kNone) return;
  constexpr int64_t count = HALF == 0 ? kHalf : kRows - kHalf;
  add<count>(squares + HALF * kHalf, reduce4(own[0], own[1], own[2], own[3]), accumulate);
}

template <int64_t HALF>
static void tile_of(int64_t count, const float* const* rows, const float* const* columns, int64_t depth,
                    float* dots, int64_t stride, float* squares, bool accumulate, Ahead ahead) {
  switch (count) {
    case 0: return tile<0, HALF>(rows, columns, depth, dots, stride, squares, accumulate, ahead);
    case 1: return tile<1, HALF>(rows, columns, depth, dots, stride, squares, accumulate, ahead);
    case 2: return tile<2, HALF>(rows, columns, depth, dots, stride, squares, accumulate, ahead);
    case 3: return tile<3, HALF>(rows, columns, depth, dots, stride, squares, accumulate, ahead);
    default: return tile<4, HALF>(rows, columns, depth, dots, stride, squares, accumulate, ahead);
  }
}

// dots[r * stride + c] = row (begin + r) . others[c]; squares[r] where wanted. Both have room for whole tiles of rows.
template <class T>
static void products(const Tokens& x, int64_t begin, int64_t rows, const float* const* others, int64_t count,
                     float* dots, int64_t stride, float* squares, float* scratch) {
  const T* data = static_cast<const T*>(x.data) + begin * x.stride;
  // squares ride on the first two groups of columns, half the rows on each
  const int64_t group = squares && count < 2 * kColumns ? (count + 1) / 2 : kColumns;
  const int64_t groups = squares && count < 2 * kColumns ? 2 : (count + kColumns - 1) / kColumns;
  const int64_t shares = groups > kRows ? groups / kRows : 1;  // tiles that fetch one row ahead together
  for (int64_t d = 0; d < x.width; d += kDepth) {
    const int64_t length = d + kDepth < x.width ? kDepth : x.width - d;
    const int64_t depth = (length + kLanes - 1) / kLanes * kLanes;
    const int64_t bytes = length * sizeof(T), step = bytes * kLanes / depth, pitch = x.stride * int64_t(sizeof(T));
    const bool in_place = sizeof(T) == sizeof(float) && depth == length;
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      const float* row[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const T* source = data + (r0 + r < rows ? r0 + r : rows - 1) * x.stride + d;
        row[r] = in_place ? reinterpret_cast<const float*>(source) : scratch + r * kDepth;
        if (!in_place) widen(source, length, scratch + r * kDepth);
      }
      // the next tile reads the next rows, after the last ones the next features
      const char* next = reinterpret_cast<const char*>(r0 + kRows < rows ? data + (r0 + kRows) * x.stride + d
                                                                         : data + d + kDepth);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t c = g * group, columns = count - c < group ? count - c : group;
        const float* column[kColumns];
        for (int64_t i = 0; i < columns; ++i) column[i] = others[c + i] + d;
        float* to = dots + r0 * stride + c;
        if (squares && g < 2) {
          const Ahead ahead = {next + g * kHalf * pitch, step, pitch};
          if (g == 0) tile_of<0>(columns, row, column, depth, to, stride, squares + r0, d > 0, ahead);
          else tile_of<1>(columns, row, column, depth, to, stride, squares + r0, d > 0, ahead);
        } else {
          const int64_t row_ahead = g / shares < kRows ? g / shares : kRows - 1;
          const Ahead ahead = {next + row_ahead * pitch + g % shares * bytes / shares, step / shares, pitch};
          tile_of<kNone>(columns, row, column, depth, to, stride, nullptr, d > 0, ahead);
        }
      }
    }
  }
}

static void products(const Tokens& x, int64_t begin, int64_t rows, const float* const* others, int64_t count,
                     float* dots, int64_t stride, float* squares, float* scratch) {
  switch (x.type) {
    case Element::kFloat:
      return products<float>(x, begin, rows, others, count, dots, stride, squares, scratch);
    case Element::kHalf:
      return products<Half>(x, begin, rows, others, count, dots, stride, squares, scratch);
    case Element::kBFloat16:
      return products<BFloat16>(x, begin, rows, others, count, dots, stride, squares, scratch);
  }
}

// Token `index` as float32, padded with zeros to a multiple of kPad; its squared norm is returned.
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
