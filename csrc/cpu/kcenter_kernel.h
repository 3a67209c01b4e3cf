// The arithmetic of kcenter, compiled once per instruction set: float32 dot products of tokens with centers.
//
// Every product is summed in the same order wherever its row and column sit in a tile: lane l of a block of kDepth
// features takes features l, l + kLanes, ... in turn, the lanes are added as a tree, the blocks in order. Tails are
// padded with zeros. So equal rows get equal bits, dot(a, b) equals dot(b, a), and a squared norm equals dot(a, a).

#include "cpu/simd.h"

// Registers: kRows x kColumns accumulators, kColumns operands and one spare.
constexpr int64_t kRows = kLanes == 16 ? 6 : kLanes == 8 ? 3 : 2;
constexpr int64_t kColumns = 4;
// kRows + kColumns segments of this length stay in L1, as do the next kColumns while they arrive.
constexpr int64_t kDepth = 1024;
constexpr int64_t kBlockRows = 96;

PRUNEOPS_INLINE void add(float* to, Vec4 value, bool accumulate) {
  if (accumulate) {
    Vec4 before;
    __builtin_memcpy(&before, to, sizeof(Vec4));
    value = before + value;
  }
  __builtin_memcpy(to, &value, sizeof(Vec4));
}

// Memory that the next tile will read, asked for one line at a time while this one is multiplied.
struct Ahead {
  const char* line;
  int64_t step;
};

// dots[r * stride + c] (+)= rows[r] . columns[c] over `depth` features, a multiple of kLanes
template <int64_t COLUMNS>
static void tile(const float* const* rows, const float* const* columns, int64_t depth, float* dots, int64_t stride,
                 bool accumulate, Ahead ahead) {
  Vec sums[kRows][kColumns] = {};
  for (int64_t d = 0; d < depth; d += kLanes) {
    __builtin_prefetch(ahead.line, 0, 2);
    ahead.line += ahead.step;
    Vec column[COLUMNS];
#pragma GCC unroll 8
    for (int64_t c = 0; c < COLUMNS; ++c) column[c] = load(columns[c] + d);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const Vec row = load(rows[r] + d);
#pragma GCC unroll 8
      for (int64_t c = 0; c < COLUMNS; ++c) sums[r][c] += row * column[c];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r)
    add(dots + r * stride, reduce4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]), accumulate);
}

// squares[r] (+)= rows[r] . rows[r]
static void square(const float* const* rows, int64_t depth, float* squares, bool accumulate) {
  Vec sums[8] = {};
  for (int64_t d = 0; d < depth; d += kLanes)
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const Vec row = load(rows[r] + d);
      sums[r] += row * row;
    }
  add(squares, reduce4(sums[0], sums[1], sums[2], sums[3]), accumulate);
  if (kRows > 4) add(squares + 4, reduce4(sums[4], sums[5], sums[6], sums[7]), accumulate);
}

// dots[r * stride + c] = row (begin + r) . centers[c]; squares[r] where wanted. Both have room for a whole tile past
// the last row; stride is a multiple of kColumns.
template <class T>
static void products(const Tokens& x, int64_t begin, int64_t rows, const float* const* centers, int64_t count,
                     float* dots, int64_t stride, float* squares, float* scratch) {
  const T* data = static_cast<const T*>(x.data) + begin * x.stride;
  const int64_t groups = (count + kColumns - 1) / kColumns;
  const int64_t shares = groups > kRows ? groups / kRows : 1;  // tiles that fetch one row ahead together
  for (int64_t d = 0; d < x.width; d += kDepth) {
    const int64_t length = d + kDepth < x.width ? kDepth : x.width - d;
    const int64_t depth = (length + kLanes - 1) / kLanes * kLanes;
    const int64_t bytes = length * sizeof(T);
    const bool in_place = sizeof(T) == sizeof(float) && depth == length;
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      const float* row[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const T* source = data + (r0 + r < rows ? r0 + r : rows - 1) * x.stride + d;
        row[r] = in_place ? reinterpret_cast<const float*>(source) : scratch + r * kDepth;
        if (!in_place) widen(source, length, scratch + r * kDepth);
      }
      if (squares) square(row, depth, squares + r0, d > 0);

      // the next tile reads the next rows, after the last ones the next features
      const T* next = r0 + kRows < rows ? data + (r0 + kRows) * x.stride + d : data + d + kDepth;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t c = g * kColumns;
        const int64_t columns = count - c < kColumns ? count - c : kColumns;
        const float* column[kColumns];
        for (int64_t i = 0; i < columns; ++i) column[i] = centers[c + i] + d;
        const int64_t row_ahead = g / shares < kRows ? g / shares : kRows - 1;
        const char* from = reinterpret_cast<const char*>(next + row_ahead * x.stride);
        const Ahead ahead = {from + g % shares * bytes / shares, bytes * kLanes / depth / shares};
        float* to = dots + r0 * stride + c;
        switch (columns) {
          case 1: tile<1>(row, column, depth, to, stride, d > 0, ahead); break;
          case 2: tile<2>(row, column, depth, to, stride, d > 0, ahead); break;
          case 3: tile<3>(row, column, depth, to, stride, d > 0, ahead); break;
          default: tile<4>(row, column, depth, to, stride, d > 0, ahead);
        }
      }
    }
  }
}

static void products(const Tokens& x, int64_t begin, int64_t rows, const float* const* centers, int64_t count,
                     float* dots, int64_t stride, float* squares, float* scratch) {
  switch (x.type) {
    case Element::kFloat:
      return products<float>(x, begin, rows, centers, count, dots, stride, squares, scratch);
    case Element::kHalf:
      return products<Half>(x, begin, rows, centers, count, dots, stride, squares, scratch);
    case Element::kBFloat16:
      return products<BFloat16>(x, begin, rows, centers, count, dots, stride, squares, scratch);
  }
}

// Token `index` as float32, padded with zeros to a multiple of kPad; its squared norm is returned.
static float kcenter_pack(const Tokens& x, int64_t index, float* to, float* scratch) {
  const int64_t whole = x.width / kPad * kPad;
  for (int64_t d = whole; d < (x.width + kPad - 1) / kPad * kPad; ++d) to[d] = 0;
  const int64_t offset = index * x.stride;
  switch (x.type) {
    case Element::kFloat: widen(static_cast<const float*>(x.data) + offset, x.width, to); break;
    case Element::kHalf: widen(static_cast<const Half*>(x.data) + offset, x.width, to); break;
    case Element::kBFloat16: widen(static_cast<const BFloat16*>(x.data) + offset, x.width, to); break;
  }
  float squares[8];
  products(Tokens{to, x.width, x.width, Element::kFloat}, 0, 1, nullptr, 0, nullptr, 0, squares, scratch);
  return squares[0];
}

// Brings nearest[begin..end) up to date with `count` centers. On the first pass over x it also fills aux and marks
// non-finite tokens; nearest then holds NaN for excluded tokens and -inf for the others.
static void kcenter_update(const Tokens& x, int64_t begin, int64_t end, const Centers& centers, bool cosine, bool first,
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

constexpr Kernels kKernels = {kRows, kBlockRows, kRows * kDepth, kcenter_pack, kcenter_update, kcenter_candidates};
