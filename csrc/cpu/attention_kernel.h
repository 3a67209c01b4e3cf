// Arithmetic of attention_mass and attention_received, compiled once per instruction set.
//
// Panel path (many rows): vector lanes are rows; a panel of queries is stored transposed and keys are streamed. The
// logits of a key are vectors over rows, all lanes share its group, and no running sum crosses lanes. Decode path (few
// rows): lanes are features in the dot products, then keys in the softmax.
// A row's sums do not depend on its lane or on the other rows of its panel.
// docs/kernels/attention.md

#include "cpu/simd.h"

// Registers: kKeys x kVectors accumulators, kVectors operands and one spare. A panel 128 features wide stays in L1.
constexpr int64_t kVectors = kLanes == 4 ? 2 : 3;
constexpr int64_t kKeys = kLanes == 16 ? 8 : 4;
constexpr int64_t kPanel = kVectors * kLanes;
constexpr int64_t kKeyBlock = 64;                        // keys per update of the running max
constexpr int64_t kSmallRowTile = kLanes == 16 ? 4 : 2;  // decode path: rows of a tile of four keys
constexpr int64_t kPrefetchKeys = 12;                    // decode path: prefetch distance in keys

// exp(logit - lse); 0 where either is -inf
PRUNEOPS_INLINE Vec probability(Vec logit, Vec lse) {
  const VecBits masked = (VecBits)(logit == -kInfinity) | (VecBits)(lse == -kInfinity);
  return (Vec)((VecBits)exponential(logit - lse) & ~masked);
}

// The value subtracted from logits before exp: their max, or 0 if it is -inf (all logits are -inf or NaN).
PRUNEOPS_INLINE Vec finite_max(Vec max_logit) { return max_logit == -kInfinity ? Vec{} : max_logit; }

// One row of features as float32, padded with zeros to a multiple of kLanes.
static void widen(const void* from, Element type, int64_t head_dim, float* to) {
  switch (type) {
    case Element::kFloat: return widen(static_cast<const float*>(from), head_dim, to);
    case Element::kHalf: return widen(static_cast<const Half*>(from), head_dim, to);
    case Element::kBFloat16: return widen(static_cast<const BFloat16*>(from), head_dim, to);
  }
}

static const char* query_at(const Heads& h, int64_t row) {
  const int64_t offset = row % h.heads * h.head_stride + h.positions[row / h.heads] * h.query_stride;
  return static_cast<const char*>(h.query) + offset * size_of(h.type);
}

// Past the end, the last key.
static const char* key_at(const Heads& h, int64_t index) {
  const int64_t offset = h.keys[index < h.key_count ? index : h.key_count - 1] * h.key_stride;
  return static_cast<const char*>(h.key) + offset * size_of(h.type);
}

static float lse_of(const Heads& h, int64_t row) {
  return h.lse[row % h.heads * h.lse_head_stride + h.positions[row / h.heads] * h.lse_stride];
}

// ---- panel path: many rows

struct Panel {
  int64_t vectors, limits[kPanel];
  alignas(64) float shifts[kPanel];  // lse, or the running max
  alignas(64) float features[kMaxHeadDim * kPanel];

  // Visible keys of [begin, begin + count) for the last lane of a vector, which has the most.
  int64_t visible(int64_t vector, int64_t begin, int64_t count) const {
    const int64_t limit = limits[vector * kLanes + kLanes - 1] - begin;
    return limit < 0 ? 0 : limit < count ? limit : count;
  }
  int64_t limit() const { return limits[vectors * kLanes - 1]; }
};

// Loads rows from `first` on. Lanes past the last row repeat it with an lse of -inf: probability 0.
static void load_panel(const Heads& h, int64_t first, Panel& panel) {
  const int64_t count = h.rows - first < kPanel ? h.rows - first : kPanel;
  panel.vectors = (count + kLanes - 1) / kLanes;
  alignas(64) float row[kMaxHeadDim];
  for (int64_t lane = 0; lane < panel.vectors * kLanes; ++lane) {
    const int64_t r = first + (lane < count ? lane : count - 1);
    panel.limits[lane] = h.limits[r / h.heads];
    panel.shifts[lane] = h.lse && lane < count ? lse_of(h, r) : -kInfinity;
    widen(query_at(h, r), h.type, h.head_dim, row);
    for (int64_t d = 0; d < h.head_dim; ++d) panel.features[d * kPanel + lane] = row[d];
  }
}

// Compiles to one broadcast load. `broadcast` does not: 0 + x is not x for x = -0, so its addition stays.
PRUNEOPS_INLINE Vec load_broadcast(const float* from) { return *from - Vec{}; }

// kKeys keys as float32, and the addresses of the next ones to prefetch.
struct Keys {
  const float* rows[kKeys];
  const char* next[kKeys];
};

// Loads keys from `index` on. float32 is read in place, other types are widened into `scratch`.
static Keys load_keys(const Heads& h, int64_t index, float* scratch) {
  Keys keys;
  for (int64_t c = 0; c < kKeys; ++c) {
    const char* from = key_at(h, index + c);
    keys.rows[c] = h.type == Element::kFloat ? reinterpret_cast<const float*>(from) : scratch + c * kMaxHeadDim;
    keys.next[c] = key_at(h, index + kKeys + c);
    if (h.type != Element::kFloat) widen(from, h.type, h.head_dim, scratch + c * kMaxHeadDim);
  }
  return keys;
}

// logits[c * kPanel + lane] = scale key c . row lane, for VECTORS vectors of lanes. Prefetches the next keys.
template <int64_t VECTORS>
static void panel_tile(const Heads& h, const Keys& keys, const float* features, float* logits) {
  Vec sums[kKeys][VECTORS] = {};
  for (int64_t d = 0; d < h.head_dim;) {
    for (int64_t c = 0; c < kKeys; ++c) __builtin_prefetch(keys.next[c] + d * size_of(h.type), 0, 2);
    for (const int64_t end = d + 16 < h.head_dim ? d + 16 : h.head_dim; d < end; ++d) {
      Vec row[VECTORS];
#pragma GCC unroll 8
      for (int64_t v = 0; v < VECTORS; ++v) row[v] = load(features + d * kPanel + v * kLanes);
#pragma GCC unroll 8
      for (int64_t c = 0; c < kKeys; ++c) {
        const Vec key = load_broadcast(keys.rows[c] + d);
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

// logits[c * kPanel + lane] of `count` keys from `begin` on, all visible to the last lane. -inf where a key is hidden
// from a lane but visible to another lane of its vector; undefined where it is hidden from the whole vector. The
// buffer holds whole tiles.
static void panel_logits(const Heads& h, const Panel& panel, int64_t begin, int64_t count, float* logits) {
  alignas(64) float scratch[kKeys * kMaxHeadDim];
  int64_t v = 0;
  for (int64_t c = 0; c < count; c += kKeys) {
    while (!panel.visible(v, begin + c, 1)) ++v;
    const Keys keys = load_keys(h, begin + c, scratch);
    const float* features = panel.features + v * kLanes;
    float* to = logits + c * kPanel + v * kLanes;
    switch (panel.vectors - v) {
      case 1: panel_tile<1>(h, keys, features, to); break;
      case 2: panel_tile<2>(h, keys, features, to); break;
      default: panel_tile<kVectors>(h, keys, features, to);
    }
  }
  for (int64_t lane = 0; lane < panel.vectors * kLanes; ++lane) {
    const int64_t visible = panel.visible(lane / kLanes, begin, count), limit = panel.limits[lane] - begin;
    for (int64_t c = limit > 0 ? limit : 0; c < visible; ++c) logits[c * kPanel + lane] = -kInfinity;
  }
}

// States of a panel of rows for keys begin..end, which are chunk `chunk`.
static void panel_sums(const Heads& h, int64_t first, int64_t begin, int64_t end, int64_t chunk) {
  Panel panel;
  alignas(64) float logits[kKeyBlock * kPanel];
  Vec sums[kMaxGroups][kVectors] = {};
  load_panel(h, first, panel);
  end = panel.limit() < end ? panel.limit() : end;
  for (int64_t c0 = begin; c0 < end; c0 += kKeyBlock) {
    const int64_t count = end - c0 < kKeyBlock ? end - c0 : kKeyBlock;
    panel_logits(h, panel, c0, count, logits);
    for (int64_t v = 0; v < panel.vectors; ++v) {
      const int64_t visible = panel.visible(v, c0, count);
      const float* column = logits + v * kLanes;
      float* shifts = panel.shifts + v * kLanes;
      Vec shift = load(shifts);
      if (!h.lse) {
        Vec max_logit = shift;
        for (int64_t c = 0; c < visible; ++c) {
          const Vec logit = load(column + c * kPanel);
          max_logit = max_logit < logit ? logit : max_logit;
        }
        const Vec rescale = probability(shift, finite_max(max_logit));
        for (int64_t g = 0; g < h.groups; ++g) sums[g][v] *= rescale;
        store(shifts, max_logit);
        shift = finite_max(max_logit);
      }
      Vec part[kMaxGroups] = {};  // sums per key block, added up: less rounding than one long sum
      for (int64_t c = 0; c < visible;) {
        const uint32_t group = h.key_groups[c0 + c];
        Vec run = {};
        do run += probability(load(column + c * kPanel), shift);
        while (++c < visible && h.key_groups[c0 + c] == group);
        part[group] += run;
      }
      for (int64_t g = 0; g < h.groups; ++g) sums[g][v] += part[g];
    }
  }
  for (int64_t lane = 0; lane < kPanel && first + lane < h.rows; ++lane) {
    float* state = h.state(first + lane, chunk);
    state[0] = panel.shifts[lane];
    for (int64_t g = 0; g < h.groups; ++g) state[1 + g] = sums[g][lane / kLanes][lane % kLanes];
  }
}

// received[keys[c]] = probability of key c summed over all rows of one head, for begin <= c < end <= begin + kChunk.
static void panel_received(const Heads& h, int64_t begin, int64_t end, float* received) {
  Panel panel;
  alignas(64) float logits[kKeyBlock * kPanel];
  double totals[kChunk] = {};
  for (int64_t first = 0; first < h.rows; first += kPanel) {
    load_panel(h, first, panel);
    const int64_t last = panel.limit() < end ? panel.limit() : end;
    for (int64_t c0 = begin; c0 < last; c0 += kKeyBlock) {
      const int64_t count = last - c0 < kKeyBlock ? last - c0 : kKeyBlock;
      panel_logits(h, panel, c0, count, logits);
      int64_t v0 = 0;
      for (int64_t c = 0; c < count; ++c) {
        while (!panel.visible(v0, c0 + c, 1)) ++v0;
        Vec sum = {};
        for (int64_t v = v0; v < panel.vectors; ++v)
          sum += probability(load(logits + c * kPanel + v * kLanes), load(panel.shifts + v * kLanes));
        totals[c0 - begin + c] += reduce4(sum, sum, sum, sum)[0];
      }
    }
  }
  for (int64_t c = begin; c < end; ++c) received[h.keys[c]] = float(totals[c - begin]);
}

// ---- decode path: few rows

// logits[r * stride + c] = scale row r . key c, for ROWS rows and four keys, kMaxHeadDim floats apart, zero-padded
template <int64_t ROWS>
static void decode_tile(const Heads& h, const float* rows, const float* keys, float* logits, int64_t stride) {
  Vec sums[ROWS][4] = {};
  for (int64_t d = 0; d < h.head_dim; d += kLanes) {
    Vec key[4];
#pragma GCC unroll 8
    for (int64_t c = 0; c < 4; ++c) key[c] = load(keys + c * kMaxHeadDim + d);
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; ++r) {
      const Vec row = load(rows + r * kMaxHeadDim + d);
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

// State of row r from the logits and groups of `count` keys; logits are padded with -inf to a multiple of kLanes.
static void decode_row_state(const Heads& h, int64_t r, const float* logits, const uint32_t* groups, int64_t count,
                      float* state) {
  Vec max_logits = broadcast(-kInfinity), sums[kMaxGroups] = {};
  for (int64_t c = 0; c < count; c += kLanes) {
    const Vec logit = load(logits + c);
    max_logits = max_logits < logit ? logit : max_logits;
  }
  state[0] = h.lse ? lse_of(h, r) : reduce_max(max_logits);
  const Vec shift = h.lse ? broadcast(state[0]) : finite_max(broadcast(state[0]));
  for (int64_t c = 0; c < count; c += kLanes) {
    const Vec p = probability(load(logits + c), shift);
    VecBits group;
    __builtin_memcpy(&group, groups + c, sizeof(VecBits));
    for (uint32_t g = 0; g < h.groups; ++g) sums[g] += (Vec)((VecBits)p & (VecBits)(group == g));
  }
  for (int64_t g = 0; g < h.groups; ++g) state[1 + g] = reduce4(sums[g], sums[g], sums[g], sums[g])[0];
}

// States of all rows for keys begin..end, which are chunk `chunk`. Scratch: rows (kMaxHeadDim + kChunk) floats. Logits
// are written to h.logits if it is not null.
static void decode_sums(const Heads& h, int64_t begin, int64_t end, int64_t chunk, float* scratch) {
  const int64_t count = end - begin, stride = h.logits ? h.logit_stride : kChunk;
  float* rows = scratch;
  float* logits = h.logits ? h.logits + begin : scratch + h.rows * kMaxHeadDim;
  alignas(64) float keys[4 * kMaxHeadDim];
  for (int64_t r = 0; r < h.rows; ++r) widen(query_at(h, r), h.type, h.head_dim, rows + r * kMaxHeadDim);
  for (int64_t c = 0; c < count; c += 4) {
    for (int64_t i = 0; i < 4; ++i) {
      const char* next = key_at(h, begin + c + i + kPrefetchKeys);
      for (int64_t byte = 0; byte < h.head_dim * size_of(h.type); byte += 64) __builtin_prefetch(next + byte, 0, 2);
      widen(key_at(h, begin + c + i), h.type, h.head_dim, keys + i * kMaxHeadDim);
    }
    for (int64_t r = 0; r < h.rows; r += kSmallRowTile) {
      const float* from = rows + r * kMaxHeadDim;
      float* to = logits + r * stride + c;
      switch (h.rows - r < kSmallRowTile ? h.rows - r : kSmallRowTile) {
        case 1: decode_tile<1>(h, from, keys, to, stride); break;
        case 2: decode_tile<2>(h, from, keys, to, stride); break;
        case 3: decode_tile<3>(h, from, keys, to, stride); break;
        default: decode_tile<kSmallRowTile>(h, from, keys, to, stride);
      }
    }
  }
  for (int64_t r = 0; r < h.rows; ++r) {
    float* row_logits = logits + r * stride;
    const int64_t limit = h.limits[r / h.heads] - begin;
    for (int64_t c = limit < 0 ? 0 : limit < count ? limit : count; c % kLanes || c < count; ++c)
      row_logits[c] = -kInfinity;
    decode_row_state(h, r, row_logits, h.key_groups + begin, count, h.state(r, chunk));
  }
}

// received[keys[c]] = probability of key c summed over the rows of one head; logits and lse are known.
static void decode_received(const Heads& h, int64_t head, float* received) {
  for (int64_t c = 0; c < h.key_count; c += kLanes) {
    Vec sum = {};
    for (int64_t r = head; r < h.rows; r += h.heads)
      sum += probability(load(h.logits + r * h.logit_stride + c), broadcast(lse_of(h, r)));
    for (int64_t lane = 0; lane < kLanes && c + lane < h.key_count; ++lane) received[h.keys[c + lane]] = sum[lane];
  }
}

constexpr AttentionKernels kKernels = {kPanel, panel_sums, decode_sums, panel_received, decode_received};
