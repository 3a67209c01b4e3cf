// Kernels of attention_mass and attention_received: softmax sums of rows of attention, without the matrix.
// pruneops/reference/attention_mass.py and attention_received.py are the specification.
//
// NOT YET RUN ON A GPU. The kernels run on emulated threads in tests/cuda_emulation; all times below are expectations
// from counted instructions and bytes.
//
// Made for few rows: up to 16 of them, the queries times R = H / Hk, share a key head in decode, and K is read once
// for all. Any other shape is right, in tiles of 16 rows that each read the keys they see.
//   multiply  a warp meets 16 keys at a time, every eighth 16 of its block's: float16 and bfloat16 by tensor cores,
//             keys straight into the operand, 4 lanes a key, 8 loads of 16 bytes under way a lane; float32 by fused
//             multiply-adds. The rows lie in shared memory. Keys that do not start at a multiple of 16 bytes are read
//             element by element.
//   absorb    32 keys at a time, logits in shared memory, 2 to 32 lanes a row: greatest logit, a sum per group
//   join      states (greatest logit, sums) of lanes, warps, blocks, in a fixed order
// The split of the keys depends on H, Hk, Sq and Sk alone, so neither neighbours in the batch nor strides change a bit.
//
// mass: one launch where the rows of a key head are one tile. Up to 8 blocks share its keys and form a cluster; the
// first is sent the states of all and ends their sums. Before compute capability 9.0, for more rows, or for more than
// 16384 keys of few heads: states in memory, (1 + G) floats a row and split, and a second launch that combines them.
// received: one launch likewise; blocks keep their logits and send each other their states, so K is read once. Else
// lse given: one launch, 256 keys a block; not given: states of the rows first, then that, and K is read twice.
//
// Cost, per visible pair: 2 D operations, one exp (received: two where the logits are kept).
// mass, decode, H 32 = Hk, Sk 3072, D 128, bfloat16, B 1, on an H100 (3 TB/s, 132 multiprocessors, 1.7 GHz):
//   bytes         K once, 25.2 MB: 8.4 us
//   blocks        256 of 384 keys, 3 x 16 a warp; 32 KB under way a block, 64 KB a multiprocessor; 23 KB are enough
//   instructions  16 keys: 8 loads, 8 products, about 350 in all (SASS): 4100 a scheduler, 2.4 us, beside the loads
//   latency       start 1 us, states and end 3 x 700 cycles, 1.2 us
//   blocks at once  2 a multiprocessor (92 to 120 registers a thread): 4 clusters of 8 in every 16 multiprocessors
// About 10.5 us. R 7, Hk 4, B 16: 50 MB, 17 us; absorbing 7 rows of 32 keys: 400 instructions, 6 us beside the loads.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda/primitives.cuh"
#include "cuda/tile.cuh"
#include "cuda/views.cuh"

namespace pruneops {

constexpr int kQueryRows = 16;  // of a tile
constexpr int kKeyStep = 16;    // keys that a warp multiplies at a time
constexpr int kKeyChunk = 32;   // keys that it absorbs at a time
constexpr int kLogitLine = kKeyChunk + 2;  // floats from row to row: 16 rows x 2 lanes meet in no bank
constexpr int kWidestHead = 256;
constexpr int kMostKeyGroups = 8;
constexpr int kMostSharers = 8;  // blocks of a cluster
constexpr int kMostKeptBytes = 96 * 1024;  // of shared memory, in blocks of attention_received that keep their logits
constexpr int kQuad = 64;        // bytes of a key that four lanes load together
constexpr int kQuadsAhead = 4;   // of two keys, under way in every lane
template <class T>
constexpr int kQueryLine = kWidestHead * sizeof(T) + kQuad;  // bytes from row to row: eight lanes meet in no bank

// Group of a token, [B, S].
struct GroupView {
  const void* data;  // null: all are of group 0
  int64_t stride[2];
  int bytes;  // 1: bool, true is group 0; 4 and 8: integers

  // -1 for one that does not count; so for one that is no group.
  __device__ int at(int64_t row, int64_t token, int groups) const {
    if (!data) return 0;
    const int64_t i = row * stride[0] + token * stride[1];
    if (bytes == 1) return static_cast<const unsigned char*>(data)[i] ? 0 : -1;
    const int64_t group = bytes == 4 ? static_cast<const int*>(data)[i] : static_cast<const int64_t*>(data)[i];
    return group >= 0 && group < groups ? static_cast<int>(group) : -1;
  }
};

// Row m of a key head is query m / R of its head m % R.
template <class T>
struct Attention {
  const T *query, *key;  // [B, H, Sq, D], [B, Hk, Sk, D]
  int64_t query_stride[3], key_stride[3];
  const float* lse;  // [B, H, Sq]; null: not known
  int64_t lse_stride[3];
  GroupView query_group, key_group;
  float scale;
  bool causal, query_aligned, key_aligned;  // aligned: every row starts at a multiple of 16 bytes and is whole pieces
  int key_heads, ratio, queries, keys, width, groups;
  int tiles, splits, split_keys;
  float* states;  // [B, Hk, tiles, splits, kQueryRows, 1 + G]; null: the blocks of a tile are a cluster
  float *mass, *found;  // [B, H, G, G], [B, H, Sq]
  float* received;      // [B, H, Sk]

  __host__ __device__ int rows() const { return queries * ratio; }
  __host__ __device__ int state_size() const { return 1 + groups; }
  int64_t state_floats(int64_t batch) const {
    return batch * key_heads * tiles * splits * kQueryRows * state_size();
  }
};

// Rows of one tile.
template <class T>
struct alignas(16) RowTile {
  unsigned char query[kQueryRows * kQueryLine<T>];
  int seen[kQueryRows];     // the first so many keys; 0 for a row that does not count
  float bound[kQueryRows];  // lse, or the greatest logit
  float total[kQueryRows];  // sum of exp(logit - bound); 1 if lse is given
};

template <class T>
struct MassShared {
  RowTile<T> rows;
  float logits[kWarps][kQueryRows * kLogitLine];
  float warp_states[kWarps * kQueryRows * (1 + kMostKeyGroups)];
  float states[kMostSharers * kQueryRows * (1 + kMostKeyGroups)];
};
struct CombineShared {
  float share[kThreads][kMostKeyGroups];
  int group[kThreads];
};
static_assert(sizeof(CombineShared) <= sizeof(MassShared<float>::logits));

template <class T>
struct ReceivedShared {
  RowTile<T> rows;
  float warp_states[kWarps * kQueryRows * 2];
  float states[kMostSharers * kQueryRows * 2];
  float logits[1];  // [warps][chunks][rows of the tile][kLogitLine]
};
template <class T>
int64_t received_bytes(const Attention<T>& p) {
  const int chunks = (p.split_keys + kWarps * kKeyChunk - 1) / (kWarps * kKeyChunk);
  const int rows = std::min(p.rows(), kQueryRows);
  return sizeof(ReceivedShared<T>) + sizeof(float) * kWarps * chunks * rows * kLogitLine;
}

// ---- plans

// Gives every split of the keys as many.
template <class T>
void share_keys(Attention<T>& p) {
  const int steps = std::max(1, (p.keys + kKeyStep - 1) / kKeyStep);
  p.split_keys = (steps + p.splits - 1) / p.splits * kKeyStep;
}

// Whether one launch is enough: the blocks of a tile then form clusters of `splits`, else p.states is needed.
template <class T>
bool plan_sums(Attention<T>& p, bool clusters) {
  const bool thin = p.keys > 16384 && p.key_heads * kMostSharers < 256;  // eight blocks a head would not fill a card
  const bool share = clusters && !thin;
  p.tiles = (p.rows() + kQueryRows - 1) / kQueryRows;
  int most = p.tiles > 8 ? 1 : 8, worth = 512;  // keys that a block of its own is worth
  if (p.tiles == 1) {
    most = share ? kMostSharers : std::max(8, 256 / p.key_heads);
    worth = share ? 128 : 256;
  }
  p.splits = std::clamp((p.keys - 1) / worth + 1, 1, most);
  if (p.tiles == 1 && share) p.splits = std::bit_ceil(unsigned(p.splits));
  share_keys(p);
  return p.tiles == 1 && (p.splits == 1 || share);
}

// Whether one launch is enough although lse is not given. Else `plan_received` is for the second.
template <class T>
bool plan_received_alone(Attention<T>& p, bool clusters) {
  return !p.lse && plan_sums(p, clusters) && received_bytes(p) <= kMostKeptBytes;
}

template <class T>
void plan_received(Attention<T>& p) {
  p.tiles = (p.rows() + kQueryRows - 1) / kQueryRows;
  p.split_keys = kWarps * kKeyChunk;
  p.splits = (p.keys + p.split_keys - 1) / p.split_keys;
}

// ---- rows

// What exp is taken relative to: 0 if all logits are -inf or NaN.
__device__ __forceinline__ float finite_bound(float top) { return top == -INFINITY ? 0.0f : top; }

// Features [k, k + kPiece) of a row, zeros past its width.
template <class T>
__device__ __forceinline__ uint4 whole_piece(const T* row, int k, int width, bool aligned) {
  if (!aligned) return gather_piece(row, k, width);
  return k < width ? load_piece(row + k) : uint4{0, 0, 0, 0};
}

// Fills in a tile's rows and says how many they are; the block meets afterwards.
template <class T>
__device__ int stage_rows(const Attention<T>& p, RowTile<T>& tile, int64_t b, int key_head, int first) {
  const int rows = min(kQueryRows, p.rows() - first), tid = threadIdx.x;
  const int quads = (p.width * int(sizeof(T)) + kQuad - 1) / kQuad, pieces = 4 * quads;
#pragma unroll 1
  for (int i = tid; i < (rows + 7) / 8 * 8 * pieces; i += kThreads) {
    const int r = i / pieces, piece = i % pieces;
    const int m = first + r;
    const int64_t head = key_head * p.ratio + m % p.ratio;
    uint4 value{0, 0, 0, 0};
    if (r < rows) {
      const T* row = p.query + b * p.query_stride[0] + head * p.query_stride[1] + m / p.ratio * p.query_stride[2];
      value = whole_piece(row, piece * kPiece<T>, p.width, p.query_aligned);
    }
    *reinterpret_cast<uint4*>(tile.query + r * kQueryLine<T> + piece * 16) = value;
  }
  if (tid < kQueryRows) {
    const int m = first + tid, i = m / p.ratio, head = key_head * p.ratio + m % p.ratio;
    int seen = 0;
    float bound = 0;
    if (tid < rows && p.query_group.at(b, i, p.groups) >= 0) {
      seen = p.causal ? max(0, i + 1 + p.keys - p.queries) : p.keys;
      if (p.lse) bound = p.lse[b * p.lse_stride[0] + head * p.lse_stride[1] + i * p.lse_stride[2]];
      if (bound == -INFINITY) seen = 0;
    }
    tile.seen[tid] = seen;
    tile.bound[tid] = bound;
    tile.total[tid] = 1;
  }
  return rows;
}

// The first so many keys hold all that any row of the tile sees.
template <class T>
__device__ __forceinline__ int most_seen(const RowTile<T>& tile) {
  return static_cast<int>(~warp_min(~static_cast<unsigned>(tile.seen[threadIdx.x % kQueryRows])));
}

// ---- multiply

// Products of 16 keys with the rows of a tile. Lane l holds piece l % 4 of every quad of keys l / 4 and l / 4 + 8.
// Tensor cores want other features in other lanes, but a sum of products does not care which is which as long as both
// factors agree. They cut sums off where additions round: so a product is begun with zeros, and added to the sum.
template <class T>
struct KeyDots {
  float sum[2][4] = {};  // [8 rows][element of the mma fragment]

  // `query`: this quad of row 0.
  __device__ __forceinline__ void add(const uint4 (&key)[2], const unsigned char* query, int rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (8 * j < rows) {
        const uint4 b =
            *reinterpret_cast<const uint4*>(query + (8 * j + lane / 4) * kQueryLine<T> + lane % 4 * 16);
        float part[2][4] = {};
        multiply_add<T>(part[0], {key[0].x, key[1].x, key[0].y, key[1].y}, b.x, b.y);
        multiply_add<T>(part[1], {key[0].z, key[1].z, key[0].w, key[1].w}, b.z, b.w);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] += part[0][e] + part[1][e];
      }
    }
  }

  // logits[row * kLogitLine + key]
  __device__ __forceinline__ void put(float* logits, int rows, float scale) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 8 * j + lane % 4 * 2 + e % 2;
        if (row < rows) logits[row * kLogitLine + lane / 4 + e / 2 * 8] = sum[j][e] * scale;
      }
  }
};

template <>
struct KeyDots<float> {
  float sum[2][kQueryRows] = {};  // [key][row], of this lane's features

  __device__ __forceinline__ void add(const uint4 (&key)[2], const unsigned char* query, int rows) {
#pragma unroll
    for (int r = 0; r < kQueryRows; ++r) {
      if (r < rows) {
        const float4 q =
            *reinterpret_cast<const float4*>(query + r * kQueryLine<float> + threadIdx.x % 4 * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& s = sum[i][r];
          s = fmaf(__uint_as_float(key[i].x), q.x, s);
          s = fmaf(__uint_as_float(key[i].y), q.y, s);
          s = fmaf(__uint_as_float(key[i].z), q.z, s);
          s = fmaf(__uint_as_float(key[i].w), q.w, s);
        }
      }
    }
  }

  __device__ __forceinline__ void put(float* logits, int rows, float scale) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < kQueryRows; ++r) {
      if (r < rows) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float s = sum[i][r];
          s += __shfl_xor_sync(~0u, s, 1);
          s += __shfl_xor_sync(~0u, s, 2);
          if (lane % 4 == r % 4) logits[r * kLogitLine + lane / 4 + 8 * i] = s * scale;
        }
      }
    }
  }
};

// A warp's keys among begin..end of one key head, 16 at a time: step t has keys begin + 16 (warp + 8 t) on. What comes
// next is loaded while the sums of a step are put away and absorbed.
template <class T>
class KeyStream {
 public:
  int end;  // may become less before the first step

  __device__ KeyStream(const Attention<T>& p, int64_t b, int key_head, int begin, int end)
      : end(end), keys_(p.key + b * p.key_stride[0] + key_head * p.key_stride[1]), stride_(p.key_stride[2]),
        begin_(begin), last_(p.keys - 1), width_(p.width), aligned_(p.key_aligned) {
    load(0, 0);
  }

  __device__ int first(int t) const { return begin_ + kKeyStep * (int(threadIdx.x) / 32 + kWarps * t); }
  // Key `place` of the chunk that step t begins.
  __device__ int key(int t, int place) const { return first(t + place / kKeyStep) + place % kKeyStep; }

  // Puts logits of step t.
  __device__ __forceinline__ void step(int t, const unsigned char* query, int rows, float scale, float* logits) {
    KeyDots<T> dots;
    const int quads = (width_ * int(sizeof(T)) + kQuad - 1) / kQuad;
#pragma unroll 1
    for (int q = 0; q < quads; q += kQuadsAhead) {
#pragma unroll
      for (int c = 0; c < kQuadsAhead; ++c)
        if (q + c < quads) dots.add(ahead_[c], query + (q + c) * kQuad, rows);
      const bool same = q + kQuadsAhead < quads;
      load(same ? t : t + 1, same ? q + kQuadsAhead : 0);
    }
    dots.put(logits, rows, scale);
  }

  // Puts logits of a chunk, steps t and t + 1, as far as there are keys.
  __device__ __forceinline__ void chunk(int t, const unsigned char* query, int rows, float scale, float* logits) {
#pragma unroll 1
    for (int s = 0; s < kKeyChunk / kKeyStep && first(t + s) < end; ++s)
      step(t + s, query, rows, scale, logits + s * kKeyStep);
  }

 private:
  __device__ __forceinline__ void load(int t, int quad) {
    const int lane = threadIdx.x % 32, k = quad * (kQuad / int(sizeof(T))) + lane % 4 * kPiece<T>;
    if (first(t) >= end) return;
    const T* row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) row[i] = keys_ + min(first(t) + lane / 4 + 8 * i, last_) * stride_;
    if (aligned_) {
#pragma unroll
      for (int c = 0; c < kQuadsAhead; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i) ahead_[c][i] = whole_piece(row[i], k + c * 4 * kPiece<T>, width_, true);
    } else {
#pragma unroll
      for (int c = 0; c < kQuadsAhead; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i) ahead_[c][i] = whole_piece(row[i], k + c * 4 * kPiece<T>, width_, false);
    }
  }

  const T* keys_;
  int64_t stride_;
  int begin_, last_, width_;
  bool aligned_;
  uint4 ahead_[kQuadsAhead][2] = {};
};

// ---- absorb and join

// Greatest logit, and sums of exp(logit - that) by group; if lse is given, of exp(logit - lse), and top is 0.
struct SoftmaxState {
  float top = -INFINITY;
  float sum[kMostKeyGroups] = {};

  // Takes in what another state holds.
  __device__ __forceinline__ void add(const float* other, int groups, bool given) {
    const float higher = given ? 0 : fmaxf(top, other[0]), bound = finite_bound(higher);
    const float own = given ? 1 : expf(top - bound), its = given ? 1 : expf(other[0] - bound);
#pragma unroll
    for (int g = 0; g < kMostKeyGroups; ++g)
      if (g < groups) sum[g] = own * sum[g] + its * other[1 + g];
    top = higher;
  }

  // Of `lanes` lanes next to each other, a power of two; all of the warp take part.
  __device__ __forceinline__ void join(int lanes, int groups, bool given) {
    float higher = top;
    for (int step = lanes / 2; step > 0; step /= 2) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, step));
    const float own = given ? 1 : expf(top - finite_bound(higher));
#pragma unroll
    for (int g = 0; g < kMostKeyGroups; ++g) {
      if (g < groups) {
        sum[g] *= own;
        for (int step = lanes / 2; step > 0; step /= 2) sum[g] += __shfl_xor_sync(~0u, sum[g], step);
      }
    }
    top = higher;
  }

  __device__ __forceinline__ void store(float* to, int groups) const {
    to[0] = top;
#pragma unroll
    for (int g = 0; g < kMostKeyGroups; ++g)
      if (g < groups) to[1 + g] = sum[g];
  }
};

// The state that `count` states, `stride` floats apart, make together; `lanes` lanes next to each other share them.
__device__ __forceinline__ SoftmaxState join_states(const float* states, int count, int stride, int lanes, int groups,
                                                    bool given) {
  SoftmaxState state;
  for (int i = threadIdx.x % lanes; i < count; i += lanes) state.add(states + int64_t(i) * stride, groups, given);
  state.join(lanes, groups, given);
  return state;
}

// Lanes of a warp that share a row.
__device__ __forceinline__ int lanes_of_row(int rows) {
  return rows > 8 ? 2 : rows > 4 ? 4 : rows > 2 ? 8 : rows > 1 ? 16 : 32;
}

// Takes in a chunk of logits; `group` is that of key `lane` of the chunk, -1 also past the end.
template <class T>
__device__ __forceinline__ void absorb(SoftmaxState& state, const RowTile<T>& tile, const KeyStream<T>& stream, int t,
                                       int group, int rows, const float* logits, bool given) {
  const int lane = threadIdx.x % 32, lanes = lanes_of_row(rows), row = lane / lanes;
  const int seen = tile.seen[row];
  const float* own = logits + row * kLogitLine;
  float top = state.top;
  float bound = tile.bound[row];
  if (!given) {
    for (int k = lane % lanes; k < kKeyChunk; k += lanes) {
      const int g = __shfl_sync(~0u, group, k);
      if (g >= 0 && stream.key(t, k) < seen) top = fmaxf(top, own[k]);
    }
    bound = finite_bound(top);
    const float kept = expf(state.top - bound);
#pragma unroll
    for (int g = 0; g < kMostKeyGroups; ++g) state.sum[g] *= kept;
    state.top = top;
  }
  for (int k = lane % lanes; k < kKeyChunk; k += lanes) {
    const int found = __shfl_sync(~0u, group, k);
    if (found >= 0 && stream.key(t, k) < seen && own[k] != -INFINITY) {
      const float p = expf(own[k] - bound);
#pragma unroll
      for (int g = 0; g < kMostKeyGroups; ++g)
        if (g == found) state.sum[g] += p;
    }
  }
}

// Brings a block's warps together; `state` of the thread that is first of the 8 of a row, tid / 8, is then the block's.
__device__ __forceinline__ SoftmaxState join_warps(SoftmaxState state, float* warp_states, int rows, int groups,
                                                   bool given) {
  const int lane = threadIdx.x % 32, lanes = lanes_of_row(rows), size = 1 + groups;
  state.join(lanes, groups, given);
  if (lane % lanes == 0 && lane / lanes < rows)
    state.store(warp_states + (threadIdx.x / 32 * kQueryRows + lane / lanes) * size, groups);
  __syncthreads();
  const int row = threadIdx.x / kWarps;
  return join_states(warp_states + row * size, row < rows ? kWarps : 0, kQueryRows * size, kWarps, groups, given);
}

// ---- mass

// mass and lse of `count` heads of a key head from the states of all its rows. The whole block.
template <class T>
__device__ void combine(const Attention<T>& p, int64_t b, int key_head, int first, int count, const float* states,
                        CombineShared& sh) {
  const bool given = p.lse;
  const int G = p.groups, tid = threadIdx.x, size = p.state_size();
  const int n = p.queries * count;
  int lanes = 1;
  while (lanes < 32 && lanes < p.splits && 2 * lanes * n <= kThreads) lanes *= 2;
  const int batch = kThreads / lanes;
  float* mass = p.mass + (b * p.key_heads * p.ratio + key_head * p.ratio + first) * G * G;
#pragma unroll 1
  for (int base = 0; base < n; base += batch) {
    const int e = base + tid / lanes, i = e / count, head = key_head * p.ratio + first + e % count;
    const int m = i * p.ratio + first + e % count;
    const int group = e < n ? p.query_group.at(b, i, G) : -1;
    const float* own = states + (int64_t(m / kQueryRows) * p.splits * kQueryRows + m % kQueryRows) * size;
    const SoftmaxState state = join_states(own, group >= 0 ? p.splits : 0, kQueryRows * size, lanes, G, given);
    float total = 0;
#pragma unroll
    for (int g = 0; g < kMostKeyGroups; ++g) total += state.sum[g];
    if (e < n && tid % lanes == 0) {
      float lse = group < 0 ? -INFINITY : state.top == INFINITY ? INFINITY : state.top + logf(total);
      if (given) lse = p.lse[b * p.lse_stride[0] + head * p.lse_stride[1] + i * p.lse_stride[2]];
      p.found[(b * p.key_heads * p.ratio + head) * p.queries + i] = lse;
      sh.group[tid / lanes] = group;
#pragma unroll
      for (int g = 0; g < kMostKeyGroups; ++g) {
        float share = state.sum[g];
        if (total != total) share = total;
        else if (!given && total > 0) share /= total;
        sh.share[tid / lanes][g] = share;
      }
    }
    __syncthreads();
    const int here = min(batch, n - base);
    for (int o = tid; o < count * G * G; o += kThreads) {
      const int own_head = o / (G * G), from = o / G % G, to = o % G;
      float sum = 0;
      for (int r = (own_head + count - base % count) % count; r < here; r += count)
        if (sh.group[r] == from) sum += sh.share[r][to];
      mass[o] = base == 0 ? sum : mass[o] + sum;
    }
    __syncthreads();
  }
}

// A block per tile and split of the keys; the tiles that see most come first.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) attention_sums(const __grid_constant__ Attention<T> p) {
  auto& sh = shared<MassShared<T>>();
  const int split = blockIdx.x % p.splits, tile = p.tiles - 1 - blockIdx.x / p.splits % p.tiles;
  const int place = blockIdx.x / p.splits / p.tiles, key_head = place % p.key_heads, size = p.state_size();
  const int64_t b = place / p.key_heads;
  const bool given = p.lse;
  if (!p.states) cluster_arrive_first();
  const int begin = split * p.split_keys;
  KeyStream<T> stream(p, b, key_head, begin, min(begin + p.split_keys, p.keys));
  const int rows = stage_rows(p, sh.rows, b, key_head, tile * kQueryRows);
  __syncthreads();
  stream.end = min(stream.end, most_seen(sh.rows));
  float* logits = sh.logits[threadIdx.x / 32];
  SoftmaxState state;
#pragma unroll 1
  for (int t = 0; stream.first(t) < stream.end; t += kKeyChunk / kKeyStep) {
    const int key = stream.key(t, threadIdx.x % 32);
    const int group = key < stream.end ? p.key_group.at(b, key, p.groups) : -1;
    stream.chunk(t, sh.rows.query, rows, p.scale, logits);
    __syncwarp();
    absorb(state, sh.rows, stream, t, group, rows, logits, given);
    __syncwarp();
  }
  state = join_warps(state, sh.warp_states, rows, p.groups, given);
  const int row = threadIdx.x / kWarps;
  const bool has_row = row < rows && threadIdx.x % kWarps == 0;
  if (p.states) {
    const int64_t block = (int64_t(place) * p.tiles + tile) * p.splits + split;
    if (has_row) state.store(p.states + (block * kQueryRows + row) * size, p.groups);
    return;
  }
  cluster_wait();  // all have begun
  if (has_row) state.store(cluster_peer(sh.states, 0) + (split * kQueryRows + row) * size, p.groups);
  if (p.splits == 1) __syncthreads();  // no cluster
  cluster_arrive();
  if (split > 0) return;
  cluster_wait();
  combine(p, b, key_head, 0, p.ratio, sh.states, reinterpret_cast<CombineShared&>(sh.logits));
}

// A block per head.
template <class T>
__global__ void __launch_bounds__(kThreads) attention_combine(const __grid_constant__ Attention<T> p) {
  const int place = blockIdx.x / p.ratio, key_head = place % p.key_heads;
  const float* states = p.states + int64_t(place) * p.tiles * p.splits * kQueryRows * p.state_size();
  combine(p, place / p.key_heads, key_head, blockIdx.x % p.ratio, 1, states, shared<CombineShared>());
}

// ---- received

// A block per split of the keys of a key head. The softmax sums of its rows are given as lse, or as states of G = 1 in
// memory, [.., tiles, state_splits, ..], or else found here by a cluster: of one tile, whose logits are kept.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    attention_received_sums(const __grid_constant__ Attention<T> p, int state_splits) {
  auto& sh = shared<ReceivedShared<T>>();
  const int split = blockIdx.x % p.splits, place = blockIdx.x / p.splits, key_head = place % p.key_heads;
  const int lane = threadIdx.x % 32;
  const int64_t b = place / p.key_heads;
  const bool given = p.lse, alone = !given && !p.states;
  const int begin = split * p.split_keys, end = min(begin + p.split_keys, p.keys);
  float* received = p.received + (b * p.key_heads + key_head) * p.ratio * p.keys;
  const auto group_of = [&](int key) { return key < end ? p.key_group.at(b, key, 1) : -1; };
  if (alone) cluster_arrive_first();
  if (p.tiles > 1) {  // sums grow in memory, by one thread each
    const KeyStream<T> own(p, b, key_head, begin, 0);
    for (int head = 0; head < p.ratio; ++head)
      if (own.key(0, lane) < end) received[int64_t(head) * p.keys + own.key(0, lane)] = 0;
  }
#pragma unroll 1
  for (int tile = 0; tile < p.tiles; ++tile) {
    KeyStream<T> stream(p, b, key_head, begin, end);
    const int first = tile * kQueryRows;
    __syncthreads();  // all are done with the tile before
    const int rows = stage_rows(p, sh.rows, b, key_head, first);
    __syncthreads();
    const int row = threadIdx.x / kWarps, chunk_floats = rows * kLogitLine;
    const int chunks = (p.split_keys + kWarps * kKeyChunk - 1) / (kWarps * kKeyChunk);
    float* logits = sh.logits + threadIdx.x / 32 * chunks * chunk_floats;
    stream.end = min(end, most_seen(sh.rows));
    if (p.tiles > 1 && stream.end <= begin) continue;
    SoftmaxState state;
#pragma unroll 1
    for (int t = 0; stream.first(t) < stream.end; t += 2) {
      float* own = logits + t / 2 * chunk_floats;
      const int group = alone ? group_of(stream.key(t, lane)) : 0;
      stream.chunk(t, sh.rows.query, rows, p.scale, own);
      __syncwarp();
      if (alone) absorb(state, sh.rows, stream, t, group, rows, own, false);
    }
    if (!given) {
      const float* states = sh.states;
      int count = p.splits;
      if (alone) {
        state = join_warps(state, sh.warp_states, rows, 1, false);
        cluster_wait();  // all have begun
        if (row < rows && threadIdx.x % kWarps == 0)
          for (int peer = 0; peer < p.splits; ++peer)
            state.store(cluster_peer(sh.states, peer) + (split * kQueryRows + row) * 2, 1);
        if (p.splits == 1) __syncthreads();  // no cluster
        cluster_arrive();
        cluster_wait();
      } else {
        count = state_splits;
        states = p.states + (int64_t(place) * p.tiles + tile) * count * kQueryRows * 2;
      }
      state = join_states(states + row * 2, row < rows ? count : 0, kQueryRows * 2, kWarps, 1, false);
      if (row < rows && threadIdx.x % kWarps == 0) {
        sh.rows.bound[row] = finite_bound(state.top);
        sh.rows.total[row] = state.top == INFINITY ? 1 : state.sum[0];  // lse is infinite
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int t = 0; p.tiles > 1 ? t == 0 : stream.first(t) < end; t += 2) {
      const float* own = logits + t / 2 * chunk_floats + lane;
      const int key = stream.key(t, lane);
      const bool attended = group_of(key) >= 0;
      for (int r0 = 0; r0 < min(p.ratio, rows); ++r0) {
        float sum = 0;
        for (int r = r0; r < rows; r += p.ratio) {
          if (!attended || key >= sh.rows.seen[r]) continue;
          const float logit = own[r * kLogitLine];
          if (logit != -INFINITY) sum += expf(logit - sh.rows.bound[r]) / sh.rows.total[r];
        }
        float* to = received + int64_t((first + r0) % p.ratio) * p.keys + key;
        if (key < end) *to = p.tiles > 1 ? *to + sum : sum;
      }
    }
  }
}

}  // namespace pruneops
