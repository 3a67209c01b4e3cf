// The arithmetic of attention statistics, compiled once per instruction set.
//
// Many rows: a panel of them lies transposed along the lanes of vectors, and the keys come one after another. So the
// logits of a key are vectors over rows, its group is the same for all lanes, and no running sum crosses lanes. Few
// rows: the lanes run along the features, then along the keys.
// A row's sums depend neither on its lane nor on what shares its panel.

#include "cpu/simd.h"

// Registers: kKeys x kVectors accumulators, kVectors operands and one spare. A panel 128 features wide stays in L1.
constexpr int64_t kVectors = kLanes == 4 ? 2 : 3;
constexpr int64_t kKeys = kLanes == 16 ? 8 : 4;
constexpr int64_t kPanel = kVectors * kLanes;
constexpr int64_t kBlock = 64;                  // keys between two looks at the greatest logit
constexpr int64_t kFew = kLanes == 16 ? 4 : 2;  // few rows: those that meet four keys at a time
constexpr int64_t kAhead = 12;                  // keys, asked for before few rows meet them

// exp(logit - lse); 0 where either is -inf
PRUNEOPS_INLINE Vec probability(Vec logit, Vec lse) {
  const VecBits dead = (VecBits)(logit == -kInfinity) | (VecBits)(lse == -kInfinity);
  return (Vec)((VecBits)exponential(logit - lse) & ~dead);
}

// What logits are measured from: the greatest of them, or 0 if that is -inf, where all are -inf or NaN.
PRUNEOPS_INLINE Vec finite(Vec greatest) { return greatest == -kInfinity ? Vec{} : greatest; }

// One row of features as float32, padded with zeros to a multiple of kLanes.
static void widen(const void* from, Element type, int64_t width, float* to) {
  switch (type) {
    case Element::kFloat: return widen(static_cast<const float*>(from), width, to);
    case Element::kHalf: return widen(static_cast<const Half*>(from), width, to);
    case Element::kBFloat16: return widen(static_cast<const BFloat16*>(from), width, to);
  }
}

static const char* query_at(const Heads& h, int64_t row) {
  const int64_t offset = row % h.heads * h.head_stride + h.positions[row / h.heads] * h.query_stride;
  return static_cast<const char*>(h.query) + offset * size_of(h.type);
}

// Past the end, the last key.
static const char* key_at(const Heads& h, int64_t place) {
  const int64_t offset = h.keys[place < h.key_count ? place : h.key_count - 1] * h.key_stride;
  return static_cast<const char*>(h.key) + offset * size_of(h.type);
}

static float lse_of(const Heads& h, int64_t row) {
  return h.lse[row % h.heads * h.lse_head_stride + h.positions[row / h.heads] * h.lse_stride];
}

// ---- many rows

struct Panel {
  int64_t vectors, limits[kPanel];
  alignas(64) float bounds[kPanel];  // lse, or the greatest logit so far
  alignas(64) float features[kWidest * kPanel];

  // How many of `count` keys from `begin` on the last lane of a vector sees, which sees most.
  int64_t seen(int64_t vector, int64_t begin, int64_t count) const {
    const int64_t limit = limits[vector * kLanes + kLanes - 1] - begin;
    return limit < 0 ? 0 : limit < count ? limit : count;
  }
  int64_t limit() const { return limits[vectors * kLanes - 1]; }
};

// Rows from `first` on. Lanes past the last row repeat it with an lse of -inf, which makes their probabilities 0.
static void load_panel(const Heads& h, int64_t first, Panel& panel) {
  const int64_t count = h.rows - first < kPanel ? h.rows - first : kPanel;
  panel.vectors = (count + kLanes - 1) / kLanes;
  alignas(64) float row[kWidest];
  for (int64_t lane = 0; lane < panel.vectors * kLanes; ++lane) {
    const int64_t r = first + (lane < count ? lane : count - 1);
    panel.limits[lane] = h.limits[r / h.heads];
    panel.bounds[lane] = h.lse && lane < count ? lse_of(h, r) : -kInfinity;
    widen(query_at(h, r), h.type, h.width, row);
    for (int64_t d = 0; d < h.width; ++d) panel.features[d * kPanel + lane] = row[d];
  }
}

// One load instruction, which `broadcast` is not: 0 + x is no x where x is -0.
PRUNEOPS_INLINE Vec load_all(const float* from) { return *from - Vec{}; }

// kKeys keys as float32, and the next ones where they lie.
struct Keys {
  const float* rows[kKeys];
  const char* next[kKeys];
};

// Keys from `place` on. Only other types than float32 are copied, into `scratch`.
static Keys load_keys(const Heads& h, int64_t place, float* scratch) {
  Keys keys;
  for (int64_t c = 0; c < kKeys; ++c) {
    const char* from = key_at(h, place + c);
    keys.rows[c] = h.type == Element::kFloat ? reinterpret_cast<const float*>(from) : scratch + c * kWidest;
    keys.next[c] = key_at(h, place + kKeys + c);
    if (h.type != Element::kFloat) widen(from, h.type, h.width, scratch + c * kWidest);
  }
  return keys;
}

// logits[c * kPanel + lane] = scale key c . row lane, for VECTORS vectors of lanes; asks for the next keys meanwhile.
template <int64_t VECTORS>
static void tile(const Heads& h, const Keys& keys, const float* features, float* logits) {
  Vec sums[kKeys][VECTORS] = {};
  for (int64_t d = 0; d < h.width;) {
    for (int64_t c = 0; c < kKeys; ++c) __builtin_prefetch(keys.next[c] + d * size_of(h.type), 0, 2);
    for (const int64_t end = d + 16 < h.width ? d + 16 : h.width; d < end; ++d) {
      Vec row[VECTORS];
#pragma GCC unroll 8
      for (int64_t v = 0; v < VECTORS; ++v) row[v] = load(features + d * kPanel + v * kLanes);
#pragma GCC unroll 8
      for (int64_t c = 0; c < kKeys; ++c) {
        const Vec key = load_all(keys.rows[c] + d);
#pragma GCC unroll 8
        for (int64_t v = 0; v < VECTORS; ++v) sums[c][v] += key * row[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t c = 0; c < kKeys; ++c)
#pragma GCC unroll 8
    for (int64_t v = 0; v < VECTORS; ++v) store(logits + c * kPanel + v * kLanes, sums[c][v] * h.scale);
}

// logits[c * kPanel + lane] of `count` keys from `begin` on, all of which the last lane sees: -inf where a lane does
// not see a key that some lane of its vector sees, undefined where none does. There is room for whole tiles.
static void panel_logits(const Heads& h, const Panel& panel, int64_t begin, int64_t count, float* logits) {
  alignas(64) float scratch[kKeys * kWidest];
  int64_t v = 0;
  for (int64_t c = 0; c < count; c += kKeys) {
    while (!panel.seen(v, begin + c, 1)) ++v;
    const Keys keys = load_keys(h, begin + c, scratch);
    const float* features = panel.features + v * kLanes;
    float* to = logits + c * kPanel + v * kLanes;
    switch (panel.vectors - v) {
      case 1: tile<1>(h, keys, features, to); break;
      case 2: tile<2>(h, keys, features, to); break;
      default: tile<kVectors>(h, keys, features, to);
    }
  }
  for (int64_t lane = 0; lane < panel.vectors * kLanes; ++lane) {
    const int64_t seen = panel.seen(lane / kLanes, begin, count), own = panel.limits[lane] - begin;
    for (int64_t c = own > 0 ? own : 0; c < seen; ++c) logits[c * kPanel + lane] = -kInfinity;
  }
}

// States of the rows of a panel over keys begin..end, which are chunk `chunk`.
static void panel_sums(const Heads& h, int64_t first, int64_t begin, int64_t end, int64_t chunk) {
  Panel panel;
  alignas(64) float logits[kBlock * kPanel];
  Vec sums[kMostGroups][kVectors] = {};
  load_panel(h, first, panel);
  end = panel.limit() < end ? panel.limit() : end;
  for (int64_t c0 = begin; c0 < end; c0 += kBlock) {
    const int64_t count = end - c0 < kBlock ? end - c0 : kBlock;
    panel_logits(h, panel, c0, count, logits);
    for (int64_t v = 0; v < panel.vectors; ++v) {
      const int64_t seen = panel.seen(v, c0, count);
      const float* own = logits + v * kLanes;
      float* bounds = panel.bounds + v * kLanes;
      Vec bound = load(bounds);
      if (!h.lse) {
        Vec greatest = bound;
        for (int64_t c = 0; c < seen; ++c) {
          const Vec logit = load(own + c * kPanel);
          greatest = greatest < logit ? logit : greatest;
        }
        const Vec kept = probability(bound, finite(greatest));
        for (int64_t g = 0; g < h.groups; ++g) sums[g][v] *= kept;
        store(bounds, greatest);
        bound = finite(greatest);
      }
      Vec part[kMostGroups] = {};  // a sum of a block's sums loses less than one long sum
      for (int64_t c = 0; c < seen;) {
        const uint32_t group = h.key_groups[c0 + c];
        Vec run = {};
        do run += probability(load(own + c * kPanel), bound);
        while (++c < seen && h.key_groups[c0 + c] == group);
        part[group] += run;
      }
      for (int64_t g = 0; g < h.groups; ++g) sums[g][v] += part[g];
    }
  }
  for (int64_t lane = 0; lane < kPanel && first + lane < h.rows; ++lane) {
    float* state = h.state(first + lane, chunk);
    state[0] = panel.bounds[lane];
    for (int64_t g = 0; g < h.groups; ++g) state[1 + g] = sums[g][lane / kLanes][lane % kLanes];
  }
}

// received[keys[c]] = sum over all rows of the probability of key c, for begin <= c < end <= begin + kChunk; one head.
static void panel_received(const Heads& h, int64_t begin, int64_t end, float* received) {
  Panel panel;
  alignas(64) float logits[kBlock * kPanel];
  double totals[kChunk] = {};
  for (int64_t first = 0; first < h.rows; first += kPanel) {
    load_panel(h, first, panel);
    const int64_t last = panel.limit() < end ? panel.limit() : end;
    for (int64_t c0 = begin; c0 < last; c0 += kBlock) {
      const int64_t count = last - c0 < kBlock ? last - c0 : kBlock;
      panel_logits(h, panel, c0, count, logits);
      int64_t v0 = 0;
      for (int64_t c = 0; c < count; ++c) {
        while (!panel.seen(v0, c0 + c, 1)) ++v0;
        Vec sum = {};
        for (int64_t v = v0; v < panel.vectors; ++v)
          sum += probability(load(logits + c * kPanel + v * kLanes), load(panel.bounds + v * kLanes));
        totals[c0 - begin + c] += reduce4(sum, sum, sum, sum)[0];
      }
    }
  }
  for (int64_t c = begin; c < end; ++c) received[h.keys[c]] = float(totals[c - begin]);
}

// ---- few rows

// logits[r * stride + c] = scale row r . key c, for ROWS rows and four keys, all kWidest apart and padded with zeros
template <int64_t ROWS>
static void quad(const Heads& h, const float* rows, const float* keys, float* logits, int64_t stride) {
  Vec sums[ROWS][4] = {};
  for (int64_t d = 0; d < h.width; d += kLanes) {
    Vec key[4];
#pragma GCC unroll 8
    for (int64_t c = 0; c < 4; ++c) key[c] = load(keys + c * kWidest + d);
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; ++r) {
      const Vec row = load(rows + r * kWidest + d);
#pragma GCC unroll 8
      for (int64_t c = 0; c < 4; ++c) sums[r][c] += row * key[c];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < ROWS; ++r) {
    const Vec4 dots = reduce4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]) * h.scale;
    __builtin_memcpy(logits + r * stride, &dots, sizeof(Vec4));
  }
}

// State of row r from `count` logits and groups of keys; logits are -inf up to a multiple of kLanes.
static void few_state(const Heads& h, int64_t r, const float* logits, const uint32_t* groups, int64_t count,
                      float* state) {
  Vec best = broadcast(-kInfinity), sums[kMostGroups] = {};
  for (int64_t c = 0; c < count; c += kLanes) {
    const Vec logit = load(logits + c);
    best = best < logit ? logit : best;
  }
  state[0] = h.lse ? lse_of(h, r) : greatest(best);
  const Vec bound = h.lse ? broadcast(state[0]) : finite(broadcast(state[0]));
  for (int64_t c = 0; c < count; c += kLanes) {
    const Vec p = probability(load(logits + c), bound);
    VecBits group;
    __builtin_memcpy(&group, groups + c, sizeof(VecBits));
    for (uint32_t g = 0; g < h.groups; ++g) sums[g] += (Vec)((VecBits)p & (VecBits)(group == g));
  }
  for (int64_t g = 0; g < h.groups; ++g) state[1 + g] = reduce4(sums[g], sums[g], sums[g], sums[g])[0];
}

// States of all rows over keys begin..end, which are chunk `chunk`. Scratch: rows (kWidest + kChunk); the logits stay
// in h.logits if there is room.
static void few_sums(const Heads& h, int64_t begin, int64_t end, int64_t chunk, float* scratch) {
  const int64_t count = end - begin, stride = h.logits ? h.logit_stride : kChunk;
  float* rows = scratch;
  float* logits = h.logits ? h.logits + begin : scratch + h.rows * kWidest;
  alignas(64) float keys[4 * kWidest];
  for (int64_t r = 0; r < h.rows; ++r) widen(query_at(h, r), h.type, h.width, rows + r * kWidest);
  for (int64_t c = 0; c < count; c += 4) {
    for (int64_t i = 0; i < 4; ++i) {
      const char* ahead = key_at(h, begin + c + i + kAhead);
      for (int64_t byte = 0; byte < h.width * size_of(h.type); byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
      widen(key_at(h, begin + c + i), h.type, h.width, keys + i * kWidest);
    }
    for (int64_t r = 0; r < h.rows; r += kFew) {
      const float* from = rows + r * kWidest;
      float* to = logits + r * stride + c;
      switch (h.rows - r < kFew ? h.rows - r : kFew) {
        case 1: quad<1>(h, from, keys, to, stride); break;
        case 2: quad<2>(h, from, keys, to, stride); break;
        case 3: quad<3>(h, from, keys, to, stride); break;
        default: quad<kFew>(h, from, keys, to, stride);
      }
    }
  }
  for (int64_t r = 0; r < h.rows; ++r) {
    float* own = logits + r * stride;
    const int64_t limit = h.limits[r / h.heads] - begin;
    for (int64_t c = limit < 0 ? 0 : limit < count ? limit : count; c % kLanes || c < count; ++c) own[c] = -kInfinity;
    few_state(h, r, own, h.key_groups + begin, count, h.state(r, chunk));
  }
}

// received[keys[c]] = sum over the rows of one head, whose logits and lse are known, of the probability of key c
static void few_received(const Heads& h, int64_t head, float* received) {
  for (int64_t c = 0; c < h.key_count; c += kLanes) {
    Vec sum = {};
    for (int64_t r = head; r < h.rows; r += h.heads)
      sum += probability(load(h.logits + r * h.logit_stride + c), broadcast(lse_of(h, r)));
    for (int64_t lane = 0; lane < kLanes && c + lane < h.key_count; ++lane) received[h.keys[c + lane]] = sum[lane];
  }
}

constexpr AttentionKernels kKernels = {kPanel, panel_sums, few_sums, panel_received, few_received};
