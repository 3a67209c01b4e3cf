// Kernels of attention_mass and attention_received: softmax sums of attention rows, without the attention matrix.
//
// Cost per visible (query, key) pair: 2 D operations and one exp (received: two if the logits are kept). K is read once
// per query tile of 16 rows, so once in decode. One launch if all rows of a key head are one tile and the GPU has
// clusters (compute capability 9.0); otherwise two, and received reads K twice, or one for received with lse given.
// Split-KV with online softmax: every warp streams key tiles of 16 (mma.m16n8k16 for float16 and bfloat16, fused
// multiply-adds for float32) and updates a state (running max, sum per key group). States of lanes, warps and blocks
// are merged in a fixed order: through the distributed shared memory (DSM) of a cluster of up to 8 blocks, or through a
// workspace and a combine kernel. The split of the keys depends on H, Hk, Sq and Sk alone, so results do not depend on
// the batch or on strides.
// docs/kernels/attention.md

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda/primitives.cuh"
#include "cuda/tile.cuh"
#include "cuda/views.cuh"

namespace pruneops {

constexpr int kQueryTile = 16;  // rows
constexpr int kKeyTile = 16;    // keys per product of a warp
constexpr int kKeyChunk = 32;   // keys per softmax update of a warp
constexpr int kLogitPitch = kKeyChunk + 2;  // floats between rows; 16 rows x 2 lanes are bank-conflict-free
constexpr int kMaxHeadDim = 256;
constexpr int kMaxGroups = 8;
constexpr int kMaxClusterBlocks = 8;
constexpr int kMaxReceivedBytes = 96 * 1024;  // shared memory of an attention_received block that keeps its logits
constexpr int kSegmentBytes = 64;             // bytes of a key that four lanes load together
constexpr int kPrefetchSegments = 4;          // segments of two keys in flight per lane
template <class T>
constexpr int kQueryPitch = kMaxHeadDim * sizeof(T) + kSegmentBytes;  // bytes between rows; bank-conflict-free

// Group of a token, [B, S].
struct GroupView {
  const void* data;  // null: all tokens are of group 0
  int64_t stride[2];
  int bytes;  // 1: bool, true is group 0; 4 and 8: integers

  // -1 for a masked token and for a group out of range.
  __device__ int at(int64_t row, int64_t token, int groups) const {
    if (!data) return 0;
    const int64_t i = row * stride[0] + token * stride[1];
    if (bytes == 1) return static_cast<const unsigned char*>(data)[i] ? 0 : -1;
    const int64_t group = bytes == 4 ? static_cast<const int*>(data)[i] : static_cast<const int64_t*>(data)[i];
    return group >= 0 && group < groups ? static_cast<int>(group) : -1;
  }
};

// Row m of a key head is query m / R of its head m % R, R = H / Hk (GQA).
template <class T>
struct AttentionParams {
  const T *query, *key;  // [B, H, Sq, D], [B, Hk, Sk, D]
  int64_t query_stride[3], key_stride[3];
  const float* lse;  // [B, H, Sq]; null: not given
  int64_t lse_stride[3];
  GroupView query_group, key_group;
  float scale;
  bool causal, query_aligned, key_aligned;  // aligned: 16-byte aligned rows of whole 16-byte vectors
  int key_heads, ratio, queries, keys, head_dim, groups;  // ratio: R
  int tiles, splits, keys_per_split;
  float* states;  // [B, Hk, tiles, splits, kQueryTile, 1 + G]; null: the blocks of a tile are a cluster
  float *mass, *lse_out;  // [B, H, G, G], [B, H, Sq]
  float* received;        // [B, H, Sk]

  __host__ __device__ int rows() const { return queries * ratio; }
  __host__ __device__ int state_size() const { return 1 + groups; }
  int64_t state_floats(int64_t batch) const {
    return batch * key_heads * tiles * splits * kQueryTile * state_size();
  }
};

// A query tile in shared memory.
template <class T>
struct alignas(16) QueryTile {
  unsigned char query[kQueryTile * kQueryPitch<T>];
  int visible[kQueryTile];        // the row attends to this many first keys; 0 for a masked row
  float shift[kQueryTile];        // subtracted from logits before exp: lse or the max logit
  float denominator[kQueryTile];  // sum of exp(logit - shift); 1 if lse is given
};

template <class T>
struct MassShared {
  QueryTile<T> rows;
  float logits[kWarps][kQueryTile * kLogitPitch];
  float warp_states[kWarps * kQueryTile * (1 + kMaxGroups)];
  float states[kMaxClusterBlocks * kQueryTile * (1 + kMaxGroups)];
};
struct CombineShared {
  float row_mass[kThreads][kMaxGroups];
  int group[kThreads];
};
static_assert(sizeof(CombineShared) <= sizeof(MassShared<float>::logits));

template <class T>
struct ReceivedShared {
  QueryTile<T> rows;
  float warp_states[kWarps * kQueryTile * 2];
  float states[kMaxClusterBlocks * kQueryTile * 2];
  float logits[1];  // [warps][chunks][rows of the tile][kLogitPitch]
};
template <class T>
int64_t received_bytes(const AttentionParams<T>& p) {
  const int chunks = (p.keys_per_split + kWarps * kKeyChunk - 1) / (kWarps * kKeyChunk);
  const int rows = std::min(p.rows(), kQueryTile);
  return sizeof(ReceivedShared<T>) + sizeof(float) * kWarps * chunks * rows * kLogitPitch;
}

// ---- plans

// Splits the keys evenly.
template <class T>
void set_keys_per_split(AttentionParams<T>& p) {
  const int steps = std::max(1, (p.keys + kKeyTile - 1) / kKeyTile);
  p.keys_per_split = (steps + p.splits - 1) / p.splits * kKeyTile;
}

// Plans the split of the keys. True if one launch is enough: the splits of a tile form a cluster. Else p.states is
// needed.
template <class T>
bool plan_sums(AttentionParams<T>& p, bool clusters) {
  // clusters of eight blocks per head would not fill the GPU
  const bool low_parallelism = p.keys > 16384 && p.key_heads * kMaxClusterBlocks < 256;
  const bool use_cluster = clusters && !low_parallelism;
  p.tiles = (p.rows() + kQueryTile - 1) / kQueryTile;
  int max_splits = p.tiles > 8 ? 1 : 8, min_keys = 512;  // per split
  if (p.tiles == 1) {
    max_splits = use_cluster ? kMaxClusterBlocks : std::max(8, 256 / p.key_heads);
    min_keys = use_cluster ? 128 : 256;
  }
  p.splits = std::clamp((p.keys - 1) / min_keys + 1, 1, max_splits);
  if (p.tiles == 1 && use_cluster) p.splits = std::bit_ceil(unsigned(p.splits));
  set_keys_per_split(p);
  return p.tiles == 1 && (p.splits == 1 || use_cluster);
}

// True if one launch computes lse and probabilities: no lse is given and the logits fit. Else `plan_received` plans the
// second launch.
template <class T>
bool plan_received_fused(AttentionParams<T>& p, bool clusters) {
  return !p.lse && plan_sums(p, clusters) && received_bytes(p) <= kMaxReceivedBytes;
}

template <class T>
void plan_received(AttentionParams<T>& p) {
  p.tiles = (p.rows() + kQueryTile - 1) / kQueryTile;
  p.keys_per_split = kWarps * kKeyChunk;
  p.splits = (p.keys + p.keys_per_split - 1) / p.keys_per_split;
}

// ---- rows

// The value subtracted from logits before exp: their max, or 0 if all are -inf or NaN.
__device__ __forceinline__ float finite_max(float max_logit) { return max_logit == -INFINITY ? 0.0f : max_logit; }

// Features [k, k + kVecSize) of a row, zeros past its end.
template <class T>
__device__ __forceinline__ uint4 load_vec_padded(const T* row, int k, int head_dim, bool aligned) {
  if (!aligned) return gather_vec(row, k, head_dim);
  return k < head_dim ? load_vec(row + k) : uint4{0, 0, 0, 0};
}

// Loads a query tile and returns its number of rows; the caller synchronizes the block.
template <class T>
__device__ int load_query_tile(const AttentionParams<T>& p, QueryTile<T>& tile, int64_t b, int key_head, int first) {
  const int rows = min(kQueryTile, p.rows() - first), tid = threadIdx.x;
  const int segments = (p.head_dim * int(sizeof(T)) + kSegmentBytes - 1) / kSegmentBytes, vecs = 4 * segments;
#pragma unroll 1
  for (int i = tid; i < (rows + 7) / 8 * 8 * vecs; i += kThreads) {
    const int r = i / vecs, vec = i % vecs;
    const int m = first + r;
    const int64_t head = key_head * p.ratio + m % p.ratio;
    uint4 value{0, 0, 0, 0};
    if (r < rows) {
      const T* row = p.query + b * p.query_stride[0] + head * p.query_stride[1] + m / p.ratio * p.query_stride[2];
      value = load_vec_padded(row, vec * kVecSize<T>, p.head_dim, p.query_aligned);
    }
    *reinterpret_cast<uint4*>(tile.query + r * kQueryPitch<T> + vec * 16) = value;
  }
  if (tid < kQueryTile) {
    const int m = first + tid, i = m / p.ratio, head = key_head * p.ratio + m % p.ratio;
    int visible = 0;
    float shift = 0;
    if (tid < rows && p.query_group.at(b, i, p.groups) >= 0) {
      visible = p.causal ? max(0, i + 1 + p.keys - p.queries) : p.keys;
      if (p.lse) shift = p.lse[b * p.lse_stride[0] + head * p.lse_stride[1] + i * p.lse_stride[2]];
      if (shift == -INFINITY) visible = 0;
    }
    tile.visible[tid] = visible;
    tile.shift[tid] = shift;
    tile.denominator[tid] = 1;
  }
  return rows;
}

// The largest visible count of the tile's rows.
template <class T>
__device__ __forceinline__ int max_visible(const QueryTile<T>& tile) {
  return static_cast<int>(~warp_min(~static_cast<unsigned>(tile.visible[threadIdx.x % kQueryTile])));
}

// ---- QK^T

// QK^T of 16 keys with the rows of a query tile. Lane l holds 16-byte vector l % 4 of every segment of keys l / 4 and
// l / 4 + 8. The mma fragment layout assigns other features to these lanes; a dot product is the same under any
// permutation of the features that both operands share. Tensor cores truncate where float additions round, so each mma
// starts from zero and is added to the sum.
template <class T>
struct QkTile {
  float sum[2][4] = {};  // [8 rows][element of the mma fragment]

  // `query`: this segment of row 0.
  __device__ __forceinline__ void add(const uint4 (&key)[2], const unsigned char* query, int rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (8 * j < rows) {
        const uint4 b =
            *reinterpret_cast<const uint4*>(query + (8 * j + lane / 4) * kQueryPitch<T> + lane % 4 * 16);
        float part[2][4] = {};
        mma_m16n8k16<T>(part[0], {key[0].x, key[1].x, key[0].y, key[1].y}, b.x, b.y);
        mma_m16n8k16<T>(part[1], {key[0].z, key[1].z, key[0].w, key[1].w}, b.z, b.w);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] += part[0][e] + part[1][e];
      }
    }
  }

  // logits[row * kLogitPitch + key]
  __device__ __forceinline__ void store(float* logits, int rows, float scale) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 8 * j + lane % 4 * 2 + e % 2;
        if (row < rows) logits[row * kLogitPitch + lane / 4 + e / 2 * 8] = sum[j][e] * scale;
      }
  }
};

template <>
struct QkTile<float> {
  float sum[2][kQueryTile] = {};  // [key][row], of this lane's features

  __device__ __forceinline__ void add(const uint4 (&key)[2], const unsigned char* query, int rows) {
#pragma unroll
    for (int r = 0; r < kQueryTile; ++r) {
      if (r < rows) {
        const float4 q =
            *reinterpret_cast<const float4*>(query + r * kQueryPitch<float> + threadIdx.x % 4 * 16);
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

  __device__ __forceinline__ void store(float* logits, int rows, float scale) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < kQueryTile; ++r) {
      if (r < rows) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float s = sum[i][r];
          s += __shfl_xor_sync(~0u, s, 1);
          s += __shfl_xor_sync(~0u, s, 2);
          if (lane % 4 == r % 4) logits[r * kLogitPitch + lane / 4 + 8 * i] = s * scale;
        }
      }
    }
  }
};

// A warp's key tiles of begin..end of one key head: step t has the 16 keys from begin + 16 (warp + 8 t) on. The next
// segments are loaded while the logits of a step are stored and the softmax state is updated.
template <class T>
class KeyStream {
 public:
  int end;  // may be lowered before the first step

  __device__ KeyStream(const AttentionParams<T>& p, int64_t b, int key_head, int begin, int end)
      : end(end), keys_(p.key + b * p.key_stride[0] + key_head * p.key_stride[1]), stride_(p.key_stride[2]),
        begin_(begin), last_(p.keys - 1), head_dim_(p.head_dim), aligned_(p.key_aligned) {
    load(0, 0);
  }

  __device__ int first(int t) const { return begin_ + kKeyTile * (int(threadIdx.x) / 32 + kWarps * t); }
  // Key `index` of the chunk that step t begins.
  __device__ int key(int t, int index) const { return first(t + index / kKeyTile) + index % kKeyTile; }

  // Stores the logits of step t.
  __device__ __forceinline__ void step(int t, const unsigned char* query, int rows, float scale, float* logits) {
    QkTile<T> dots;
    const int segments = (head_dim_ * int(sizeof(T)) + kSegmentBytes - 1) / kSegmentBytes;
#pragma unroll 1
    for (int q = 0; q < segments; q += kPrefetchSegments) {
#pragma unroll
      for (int c = 0; c < kPrefetchSegments; ++c)
        if (q + c < segments) dots.add(prefetched_[c], query + (q + c) * kSegmentBytes, rows);
      const bool same = q + kPrefetchSegments < segments;
      load(same ? t : t + 1, same ? q + kPrefetchSegments : 0);
    }
    dots.store(logits, rows, scale);
  }

  // Stores the logits of a chunk: steps t and t + 1, while keys are left.
  __device__ __forceinline__ void chunk(int t, const unsigned char* query, int rows, float scale, float* logits) {
#pragma unroll 1
    for (int s = 0; s < kKeyChunk / kKeyTile && first(t + s) < end; ++s)
      step(t + s, query, rows, scale, logits + s * kKeyTile);
  }

 private:
  __device__ __forceinline__ void load(int t, int segment) {
    const int lane = threadIdx.x % 32, k = segment * (kSegmentBytes / int(sizeof(T))) + lane % 4 * kVecSize<T>;
    if (first(t) >= end) return;
    const T* row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) row[i] = keys_ + min(first(t) + lane / 4 + 8 * i, last_) * stride_;
    if (aligned_) {
#pragma unroll
      for (int c = 0; c < kPrefetchSegments; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          prefetched_[c][i] = load_vec_padded(row[i], k + c * 4 * kVecSize<T>, head_dim_, true);
    } else {
#pragma unroll
      for (int c = 0; c < kPrefetchSegments; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          prefetched_[c][i] = load_vec_padded(row[i], k + c * 4 * kVecSize<T>, head_dim_, false);
    }
  }

  const T* keys_;
  int64_t stride_;
  int begin_, last_, head_dim_;
  bool aligned_;
  uint4 prefetched_[kPrefetchSegments][2] = {};
};

// ---- online softmax

// Running max, and sum of exp(logit - max) per key group; with lse given, of exp(logit - lse), and the max stays 0.
struct SoftmaxState {
  float max_logit = -INFINITY;
  float sum[kMaxGroups] = {};

  // Merges another state into this one.
  __device__ __forceinline__ void merge(const float* other, int groups, bool has_lse) {
    const float new_max = has_lse ? 0 : fmaxf(max_logit, other[0]), shift = finite_max(new_max);
    const float rescale = has_lse ? 1 : expf(max_logit - shift), other_rescale = has_lse ? 1 : expf(other[0] - shift);
#pragma unroll
    for (int g = 0; g < kMaxGroups; ++g)
      if (g < groups) sum[g] = rescale * sum[g] + other_rescale * other[1 + g];
    max_logit = new_max;
  }

  // Merges the states of `lanes` adjacent lanes, a power of two; the whole warp takes part.
  __device__ __forceinline__ void merge_lanes(int lanes, int groups, bool has_lse) {
    float new_max = max_logit;
    for (int step = lanes / 2; step > 0; step /= 2) new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, step));
    const float rescale = has_lse ? 1 : expf(max_logit - finite_max(new_max));
#pragma unroll
    for (int g = 0; g < kMaxGroups; ++g) {
      if (g < groups) {
        sum[g] *= rescale;
        for (int step = lanes / 2; step > 0; step /= 2) sum[g] += __shfl_xor_sync(~0u, sum[g], step);
      }
    }
    max_logit = new_max;
  }

  __device__ __forceinline__ void store(float* to, int groups) const {
    to[0] = max_logit;
#pragma unroll
    for (int g = 0; g < kMaxGroups; ++g)
      if (g < groups) to[1 + g] = sum[g];
  }
};

// Merges `count` states, `stride` floats apart; `lanes` adjacent lanes share the work.
__device__ __forceinline__ SoftmaxState merge_states(const float* states, int count, int stride, int lanes, int groups,
                                                     bool has_lse) {
  SoftmaxState state;
  for (int i = threadIdx.x % lanes; i < count; i += lanes) state.merge(states + int64_t(i) * stride, groups, has_lse);
  state.merge_lanes(lanes, groups, has_lse);
  return state;
}

// Lanes of a warp that share a row in the softmax update.
__device__ __forceinline__ int lanes_per_row(int rows) {
  return rows > 8 ? 2 : rows > 4 ? 4 : rows > 2 ? 8 : rows > 1 ? 16 : 32;
}

// Adds a chunk of logits to the state. `group`: of key `lane` of the chunk; -1 if masked or past the end.
template <class T>
__device__ __forceinline__ void update_state(SoftmaxState& state, const QueryTile<T>& tile, const KeyStream<T>& stream,
                                             int t, int group, int rows, const float* logits, bool has_lse) {
  const int lane = threadIdx.x % 32, lanes = lanes_per_row(rows), row = lane / lanes;
  const int visible = tile.visible[row];
  const float* row_logits = logits + row * kLogitPitch;
  float max_logit = state.max_logit;
  float shift = tile.shift[row];
  if (!has_lse) {
    for (int k = lane % lanes; k < kKeyChunk; k += lanes) {
      const int g = __shfl_sync(~0u, group, k);
      if (g >= 0 && stream.key(t, k) < visible) max_logit = fmaxf(max_logit, row_logits[k]);
    }
    shift = finite_max(max_logit);
    const float rescale = expf(state.max_logit - shift);
#pragma unroll
    for (int g = 0; g < kMaxGroups; ++g) state.sum[g] *= rescale;
    state.max_logit = max_logit;
  }
  for (int k = lane % lanes; k < kKeyChunk; k += lanes) {
    const int key_group = __shfl_sync(~0u, group, k);
    if (key_group >= 0 && stream.key(t, k) < visible && row_logits[k] != -INFINITY) {
      const float p = expf(row_logits[k] - shift);
#pragma unroll
      for (int g = 0; g < kMaxGroups; ++g)
        if (g == key_group) state.sum[g] += p;
    }
  }
}

// Merges the states of a block's warps. The result for row tid / 8 is in the first of its 8 threads.
__device__ __forceinline__ SoftmaxState merge_warps(SoftmaxState state, float* warp_states, int rows, int groups,
                                                    bool has_lse) {
  const int lane = threadIdx.x % 32, lanes = lanes_per_row(rows), size = 1 + groups;
  state.merge_lanes(lanes, groups, has_lse);
  if (lane % lanes == 0 && lane / lanes < rows)
    state.store(warp_states + (threadIdx.x / 32 * kQueryTile + lane / lanes) * size, groups);
  __syncthreads();
  const int row = threadIdx.x / kWarps;
  return merge_states(warp_states + row * size, row < rows ? kWarps : 0, kQueryTile * size, kWarps, groups, has_lse);
}

// ---- mass

// mass and lse of `count` heads of a key head from the split states of all its rows. Run by the whole block.
template <class T>
__device__ void combine(const AttentionParams<T>& p, int64_t b, int key_head, int first, int count, const float* states,
                        CombineShared& sh) {
  const bool has_lse = p.lse;
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
    const float* row_states = states + (int64_t(m / kQueryTile) * p.splits * kQueryTile + m % kQueryTile) * size;
    const SoftmaxState state =
        merge_states(row_states, group >= 0 ? p.splits : 0, kQueryTile * size, lanes, G, has_lse);
    float denominator = 0;
#pragma unroll
    for (int g = 0; g < kMaxGroups; ++g) denominator += state.sum[g];
    if (e < n && tid % lanes == 0) {
      float lse = group < 0 ? -INFINITY : state.max_logit == INFINITY ? INFINITY : state.max_logit + logf(denominator);
      if (has_lse) lse = p.lse[b * p.lse_stride[0] + head * p.lse_stride[1] + i * p.lse_stride[2]];
      p.lse_out[(b * p.key_heads * p.ratio + head) * p.queries + i] = lse;
      sh.group[tid / lanes] = group;
#pragma unroll
      for (int g = 0; g < kMaxGroups; ++g) {
        float row_mass = state.sum[g];
        if (denominator != denominator) row_mass = denominator;
        else if (!has_lse && denominator > 0) row_mass /= denominator;
        sh.row_mass[tid / lanes][g] = row_mass;
      }
    }
    __syncthreads();
    const int batch_rows = min(batch, n - base);
    for (int o = tid; o < count * G * G; o += kThreads) {
      const int out_head = o / (G * G), from = o / G % G, to = o % G;
      float sum = 0;
      for (int r = (out_head + count - base % count) % count; r < batch_rows; r += count)
        if (sh.group[r] == from) sum += sh.row_mass[r][to];
      mass[o] = base == 0 ? sum : mass[o] + sum;
    }
    __syncthreads();
  }
}

// A block per query tile and split of the keys; the tiles with the most visible keys come first.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) attention_sums(const __grid_constant__ AttentionParams<T> p) {
  auto& sh = shared<MassShared<T>>();
  const int split = blockIdx.x % p.splits, tile = p.tiles - 1 - blockIdx.x / p.splits % p.tiles;
  const int batch_head = blockIdx.x / p.splits / p.tiles, key_head = batch_head % p.key_heads, size = p.state_size();
  const int64_t b = batch_head / p.key_heads;
  const bool has_lse = p.lse;
  if (!p.states) cluster_arrive_relaxed();
  const int begin = split * p.keys_per_split;
  KeyStream<T> stream(p, b, key_head, begin, min(begin + p.keys_per_split, p.keys));
  const int rows = load_query_tile(p, sh.rows, b, key_head, tile * kQueryTile);
  __syncthreads();
  stream.end = min(stream.end, max_visible(sh.rows));
  float* logits = sh.logits[threadIdx.x / 32];
  SoftmaxState state;
#pragma unroll 1
  for (int t = 0; stream.first(t) < stream.end; t += kKeyChunk / kKeyTile) {
    const int key = stream.key(t, threadIdx.x % 32);
    const int group = key < stream.end ? p.key_group.at(b, key, p.groups) : -1;
    stream.chunk(t, sh.rows.query, rows, p.scale, logits);
    __syncwarp();
    update_state(state, sh.rows, stream, t, group, rows, logits, has_lse);
    __syncwarp();
  }
  state = merge_warps(state, sh.warp_states, rows, p.groups, has_lse);
  const int row = threadIdx.x / kWarps;
  const bool has_row = row < rows && threadIdx.x % kWarps == 0;
  if (p.states) {
    const int64_t block = (int64_t(batch_head) * p.tiles + tile) * p.splits + split;
    if (has_row) state.store(p.states + (block * kQueryTile + row) * size, p.groups);
    return;
  }
  cluster_wait();  // all blocks of the cluster have started
  if (has_row) state.store(cluster_peer(sh.states, 0) + (split * kQueryTile + row) * size, p.groups);
  if (p.splits == 1) __syncthreads();  // no cluster
  cluster_arrive();
  if (split > 0) return;
  cluster_wait();
  combine(p, b, key_head, 0, p.ratio, sh.states, reinterpret_cast<CombineShared&>(sh.logits));
}

// Combine kernel: a block per head.
template <class T>
__global__ void __launch_bounds__(kThreads) attention_combine(const __grid_constant__ AttentionParams<T> p) {
  const int batch_head = blockIdx.x / p.ratio, key_head = batch_head % p.key_heads;
  const float* states = p.states + int64_t(batch_head) * p.tiles * p.splits * kQueryTile * p.state_size();
  combine(p, batch_head / p.key_heads, key_head, blockIdx.x % p.ratio, 1, states, shared<CombineShared>());
}

// ---- received

// A block per split of the keys of a key head. The softmax denominators come from lse, or from states of G = 1 in the
// workspace, [.., tiles, state_splits, ..]; else the cluster computes them here, for one tile whose logits are kept.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    attention_received_sums(const __grid_constant__ AttentionParams<T> p, int state_splits) {
  auto& sh = shared<ReceivedShared<T>>();
  const int split = blockIdx.x % p.splits, batch_head = blockIdx.x / p.splits, key_head = batch_head % p.key_heads;
  const int lane = threadIdx.x % 32;
  const int64_t b = batch_head / p.key_heads;
  const bool has_lse = p.lse, fused = !has_lse && !p.states;
  const int begin = split * p.keys_per_split, end = min(begin + p.keys_per_split, p.keys);
  float* received = p.received + (b * p.key_heads + key_head) * p.ratio * p.keys;
  const auto group_of = [&](int key) { return key < end ? p.key_group.at(b, key, 1) : -1; };
  if (fused) cluster_arrive_relaxed();
  if (p.tiles > 1) {  // sums accumulate in global memory, each by one thread
    const KeyStream<T> first_keys(p, b, key_head, begin, 0);
    for (int head = 0; head < p.ratio; ++head)
      if (first_keys.key(0, lane) < end) received[int64_t(head) * p.keys + first_keys.key(0, lane)] = 0;
  }
#pragma unroll 1
  for (int tile = 0; tile < p.tiles; ++tile) {
    KeyStream<T> stream(p, b, key_head, begin, end);
    const int first = tile * kQueryTile;
    __syncthreads();  // the previous tile is no longer read
    const int rows = load_query_tile(p, sh.rows, b, key_head, first);
    __syncthreads();
    const int row = threadIdx.x / kWarps, chunk_floats = rows * kLogitPitch;
    const int chunks = (p.keys_per_split + kWarps * kKeyChunk - 1) / (kWarps * kKeyChunk);
    float* logits = sh.logits + threadIdx.x / 32 * chunks * chunk_floats;
    stream.end = min(end, max_visible(sh.rows));
    if (p.tiles > 1 && stream.end <= begin) continue;
    SoftmaxState state;
#pragma unroll 1
    for (int t = 0; stream.first(t) < stream.end; t += 2) {
      float* chunk_logits = logits + t / 2 * chunk_floats;
      const int group = fused ? group_of(stream.key(t, lane)) : 0;
      stream.chunk(t, sh.rows.query, rows, p.scale, chunk_logits);
      __syncwarp();
      if (fused) update_state(state, sh.rows, stream, t, group, rows, chunk_logits, false);
    }
    if (!has_lse) {
      const float* states = sh.states;
      int count = p.splits;
      if (fused) {
        state = merge_warps(state, sh.warp_states, rows, 1, false);
        cluster_wait();  // all blocks of the cluster have started
        if (row < rows && threadIdx.x % kWarps == 0)
          for (int peer = 0; peer < p.splits; ++peer)
            state.store(cluster_peer(sh.states, peer) + (split * kQueryTile + row) * 2, 1);
        if (p.splits == 1) __syncthreads();  // no cluster
        cluster_arrive();
        cluster_wait();
      } else {
        count = state_splits;
        states = p.states + (int64_t(batch_head) * p.tiles + tile) * count * kQueryTile * 2;
      }
      state = merge_states(states + row * 2, row < rows ? count : 0, kQueryTile * 2, kWarps, 1, false);
      if (row < rows && threadIdx.x % kWarps == 0) {
        sh.rows.shift[row] = finite_max(state.max_logit);
        sh.rows.denominator[row] = state.max_logit == INFINITY ? 1 : state.sum[0];  // lse is infinite
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int t = 0; p.tiles > 1 ? t == 0 : stream.first(t) < end; t += 2) {
      const float* key_logits = logits + t / 2 * chunk_floats + lane;
      const int key = stream.key(t, lane);
      const bool attended = group_of(key) >= 0;
      for (int r0 = 0; r0 < min(p.ratio, rows); ++r0) {
        float sum = 0;
        for (int r = r0; r < rows; r += p.ratio) {
          if (!attended || key >= sh.rows.visible[r]) continue;
          const float logit = key_logits[r * kLogitPitch];
          if (logit != -INFINITY) sum += expf(logit - sh.rows.shift[r]) / sh.rows.denominator[r];
        }
        float* to = received + int64_t((first + r0) % p.ratio) * p.keys + key;
        if (key < end) *to = p.tiles > 1 ? *to + sum : sum;
      }
    }
  }
}

}  // namespace pruneops
