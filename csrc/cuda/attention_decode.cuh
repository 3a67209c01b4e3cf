// Kernels of attention_mass and attention_received for float16 and bfloat16 where few rows count: decode, the last row,
// [CLS], text rows. Compute capability 9.0 and later, D 64 or 128.
//
// Cost: K is read once, 2 D operations and one exp per (counted row, key). A cluster of up to 8 blocks shares a key
// head. A block copies all its keys (at most 48 per warp) to shared memory and lists the counted rows meanwhile; a warp
// multiplies its keys with 8 or 16 rows (mma.m16n8k16) and keeps the logits in registers. Softmax states and sums of
// blocks are exchanged by asynchronous stores that complete on an mbarrier, and merged in a fixed order. The split of
// the keys depends on H, Hk, Sq and Sk alone.
// Latency chain: mask -> list -> query rows, beside the copies of K -> products -> (exchange of states) -> results.
// Caches are cold, so code size counts: a path has about 1500 instructions.
// docs/kernels/attention.md

#pragma once

#include "cuda/attention.cuh"
#include "cuda/hopper.cuh"

// Bodies for GPUs without clusters, which never launch these kernels, would only take space.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PRUNEOPS_CLUSTERS 1
#endif

namespace pruneops::decode {

constexpr int kMaxRows = 16;  // of a tile
constexpr int kSteps = 3;     // of 16 keys of a warp
constexpr int kWarpKeys = 16 * kSteps;
constexpr int kMaxWarps = 16;
constexpr int kMaxSplits = kMaxClusterBlocks;
constexpr int kScan = 6;      // queries per thread whose groups are loaded at once
constexpr int kMaxQueries = 1 << 16;

// Offsets in the dynamic shared memory of a block.
struct Layout {
  int barriers, peers, warps, rows, key_groups, words, list, bytes;
};
// ratio: R; groups 0: attention_received.
__host__ __device__ inline Layout layout(int key_bytes, int warps, int keys, int queries, int ratio, int groups,
                                         bool lse) {
  const int heads = ratio * groups * groups, states = kMaxRows * (1 + groups);
  Layout at;
  at.barriers = key_bytes;
  at.peers = at.barriers + 16;
  at.warps = at.peers + 4 * kMaxSplits * (groups == 0 ? 2 * kMaxRows * 2 : lse ? heads : states);
  at.rows = at.warps + 4 * warps * (groups == 0 ? kMaxRows * 2 : lse ? heads : states);
  at.key_groups = at.rows + 4 * (groups == 0 ? 0 : lse ? warps * states : states);
  at.words = at.key_groups + (keys + 3) / 4 * 4;
  at.list = at.words + (queries + 31) / 32 * 4;
  at.bytes = at.list + 2 * queries;
  return at;
}

// Groups of tokens, loaded as words long before they are used.
template <bool MASS>
struct GroupReader {
  const unsigned char* data;
  int64_t at, jump;   // bytes
  bool given, wide;   // wide: int64

  // Of tokens `token`, `token` + `step`, ..
  __device__ __forceinline__ GroupReader(const GroupView& view, int64_t row, int token, int step)
      : data(static_cast<const unsigned char*>(view.data)), given(MASS || view.data), wide(MASS && view.bytes == 8) {
    const int bytes = MASS ? view.bytes : 1;
    at = (row * view.stride[0] + token * view.stride[1]) * bytes;
    jump = step * view.stride[1] * bytes;
  }
  // The next token, if it is inside.
  __device__ __forceinline__ void load(bool inside, int& low, int& high) {
    low = inside ? 1 - MASS : -1;
    high = 0;
    if (inside && given) {
      low = MASS ? *reinterpret_cast<const int*>(data + at) : data[at];
      if (wide) high = *reinterpret_cast<const int*>(data + at + 4);
    }
    at += jump;
  }
  // -1 for a masked token and for a group out of range.
  static __device__ __forceinline__ int group(int low, int high, int groups) {
    if (!MASS) return low > 0 ? 0 : -1;
    return high == 0 && low >= 0 && low < groups ? low : -1;
  }
};

// What a block works on, and its shared memory.
template <class T, int D, bool MASS, bool LSE>
struct Block {
  const AttentionParams<T>& p;
  unsigned char* memory;
  Layout at;
  int split, key_head, begin, keys;  // keys of this block
  int count, total;                  // counted queries; counted rows of the key head
  int64_t b;

  __device__ __forceinline__ explicit Block(const AttentionParams<T>& params)
      : p(params), memory(&shared<unsigned char>()) {
    split = blockIdx.x & (p.splits - 1);  // splits: a power of two
    const unsigned batch_head = blockIdx.x >> __popc(p.splits - 1);
    b = batch_head / unsigned(p.key_heads);
    key_head = batch_head - static_cast<unsigned>(b) * p.key_heads;
    begin = split * p.keys_per_split;
    keys = max(0, min(p.keys_per_split, p.keys - begin));
    at = layout(p.keys_per_split * D * 2, warps(), p.keys_per_split, p.queries, p.ratio, MASS ? p.groups : 0, LSE);
  }

  __device__ static int warps() { return blockDim.x / 32; }
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ uint64_t* barrier(int i) const { return reinterpret_cast<uint64_t*>(memory + at.barriers) + i; }
  __device__ float* floats(int offset) const { return reinterpret_cast<float*>(memory + offset); }
  __device__ signed char* key_groups() const { return reinterpret_cast<signed char*>(memory + at.key_groups); }
  __device__ unsigned* words() const { return reinterpret_cast<unsigned*>(memory + at.words); }
  __device__ unsigned short* list() const { return reinterpret_cast<unsigned short*>(memory + at.list); }
  __device__ int first_key(int step) const { return (step * warps() + warp()) * 16; }
  __device__ int64_t first_head() const { return (b * p.key_heads + key_head) * p.ratio; }

  // Copies the keys of this warp; the 16-byte vector v of row r lies at v ^ r % 8.
  __device__ __forceinline__ void copy_keys() const {
    constexpr int kVecs = D / 8, kRowsPerCopy = 32 / kVecs;
    const int row = lane() / kVecs, vec = lane() % kVecs;
    const T* head = p.key + b * p.key_stride[0] + key_head * p.key_stride[1] + vec * 8;
    const int64_t stride = p.key_stride[2], jump = stride * kRowsPerCopy;
#pragma unroll 1
    for (int s = 0; s < kSteps; ++s) {
      const int first = first_key(s) + row;
      const T* from = head + (begin + first) * stride;
      unsigned char* to = memory + first * D * 2;
#pragma unroll
      for (int i = 0; i < 16; i += kRowsPerCopy) {
        if (first + i < keys) cp_async_16(to + i * D * 2 + ((vec ^ row) ^ i % 8) * 16, from, 16);
        from += jump;
      }
    }
    cp_async_commit();
  }

  // Starts the copies of keys, then lists the counted queries in order. Block-wide.
  __device__ __forceinline__ void start() {
    const int threads = blockDim.x, tid = threadIdx.x;
    copy_keys();
    if (tid == 0) {
      mbarrier_init(barrier(0), 1);
      mbarrier_init(barrier(1), 1);
      mbarrier_init_fence();
    }
    cluster_arrive_relaxed();
    GroupReader<MASS> queries(p.query_group, b, tid, threads), own_keys(p.key_group, b, begin + tid, threads);
    int low[kScan], high[kScan], key_low[2], key_high[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) own_keys.load(k * threads + tid < keys, key_low[k], key_high[k]);
#pragma unroll 1
    for (int first = 0; first < p.queries; first += kScan * threads) {
#pragma unroll
      for (int k = 0; k < kScan; ++k) queries.load(first + k * threads + tid < p.queries, low[k], high[k]);
#pragma unroll
      for (int k = 0; k < kScan; ++k) {
        const unsigned word = __ballot_sync(~0u, queries.group(low[k], high[k], p.groups) >= 0);
        const int index = (first + k * threads) / 32 + warp();
        if (lane() == 0 && index * 32 < p.queries) words()[index] = word;
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int key = k * threads + tid;
      if (key < p.keys_per_split) key_groups()[key] = own_keys.group(key_low[k], key_high[k], p.groups);
    }
    __syncthreads();
    list_queries();
    __syncthreads();
    total = count * p.ratio;
  }

  __device__ __forceinline__ void list_queries() {
    const int size = (p.queries + 31) / 32;
    count = listed_before(size);
#pragma unroll 1
    for (int w = warp(); w < size; w += warps()) {
      const unsigned word = words()[w];
      if (word == 0) continue;
      const int place = listed_before(w) + __popc(word & ((1u << lane()) - 1));
      if (word >> lane() & 1) list()[place] = static_cast<unsigned short>(w * 32 + lane());
    }
  }
  __device__ __forceinline__ int listed_before(int end) const {
    unsigned sum = 0;
#pragma unroll 1
    for (int w = lane(); w < end; w += 32) sum += __popc(words()[w]);
    return static_cast<int>(warp_sum(sum));
  }
};

// This lane's keys lane / 4 and lane / 4 + 8 of every step: number in the block and group.
struct Keys {
  int key[2 * kSteps];  // masked keys: beyond all that are visible
  int group[2 * kSteps];

  template <class B>
  __device__ __forceinline__ explicit Keys(const B& block) {
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const int own = block.first_key(i / 2) + block.lane() / 4 + i % 2 * 8;
      group[i] = own < block.keys ? block.key_groups()[own] : -1;
      key[i] = group[i] >= 0 ? own : INT32_MAX;
    }
  }
};

// A tile of 8 N rows. The rows of a key head are ordered by head, then query. This lane loads features of rows
// lane / 4 + 8 j, and has logits of rows lane % 4 * 2 + e + 8 j, here numbered 2 j + e.
template <class T, int D, bool MASS, bool LSE, int N>
struct Rows {
  unsigned query[N][D / 16][2];  // mma fragments
  int own_head, own_group;       // of row `lane`; head of the key head, -1: no row
  int visible[2 * N];            // the row attends to this many first keys of the block
  int head[2 * N];
  float shift[2 * N];            // lse

  __device__ __forceinline__ void load(const Block<T, D, MASS, LSE>& block, int tile) {
    const auto& p = block.p;
    const int lane = block.lane(), row = tile * 8 * N + lane;
    int own_visible = 0;
    float own_shift = 0;
    int64_t own_query = -1;  // offset
    own_head = own_group = -1;
    if (lane < 8 * N && row < block.total) {
      own_head = unsigned(row) / unsigned(block.count);
      const int index = block.list()[row - own_head * block.count];
      const int64_t head = block.key_head * p.ratio + own_head;
      own_query = block.b * p.query_stride[0] + head * p.query_stride[1] + index * p.query_stride[2];
      own_visible = (p.causal ? index + 1 + p.keys - p.queries : p.keys) - block.begin;
      if (LSE) {
        own_shift = p.lse[block.b * p.lse_stride[0] + head * p.lse_stride[1] + index * p.lse_stride[2]];
        if (own_shift == -INFINITY) own_visible = 0;
      }
      if (MASS) own_group = p.query_group.at(block.b, index, p.groups);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int64_t from = __shfl_sync(~0u, own_query, lane / 4 + 8 * j);
      const unsigned* words = reinterpret_cast<const unsigned*>(p.query + from) + lane % 4;
#pragma unroll
      for (int k = 0; k < D / 16; ++k)
#pragma unroll
        for (int h = 0; h < 2; ++h) query[j][k][h] = from >= 0 ? words[k * 8 + h * 4] : 0;
    }
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      const int from = lane % 4 * 2 + i % 2 + i / 2 * 8;
      visible[i] = __shfl_sync(~0u, own_visible, from);
      head[i] = __shfl_sync(~0u, own_head, from);
      shift[i] = LSE ? __shfl_sync(~0u, own_shift, from) : 0;
    }
  }
  // Head of the last row of the tile.
  __device__ __forceinline__ int last_head(const Block<T, D, MASS, LSE>& block, int tile) const {
    return __shfl_sync(~0u, own_head, min(8 * N, block.total - tile * 8 * N) - 1);
  }
};

// Logits of this lane's keys and rows; -inf where a row does not see a key.
template <int N>
struct Logits {
  float value[2 * kSteps][2 * N];  // [key][row]

  template <class T, int D, bool MASS, bool LSE>
  __device__ __forceinline__ void compute(const Block<T, D, MASS, LSE>& block, const Keys& keys,
                                          const Rows<T, D, MASS, LSE, N>& rows) {
    const int lane = block.lane();
    const unsigned char* own = block.memory + lane % 16 * D * 2;
    const int vec = (lane / 16 ^ lane % 8) * 16;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) value[2 * s][i] = value[2 * s + 1][i] = -INFINITY;
      const int first = block.first_key(s);
      if (first >= block.keys) continue;
      float sum[2][N][4] = {};  // [even and odd k], for less rounding and latency
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        unsigned key[4];
        ldmatrix_x4(key, own + first * D * 2 + (vec ^ k * 32));
#pragma unroll
        for (int j = 0; j < N; ++j) mma_m16n8k16<T>(sum[k % 2][j], key, rows.query[j][k][0], rows.query[j][k][1]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 2 * N; ++i)
          if (keys.key[2 * s + h] < rows.visible[i])
            value[2 * s + h][i] = (sum[0][i / 2][2 * h + i % 2] + sum[1][i / 2][2 * h + i % 2]) * block.p.scale;
    }
  }

  // The largest logit of each row among this warp's keys.
  __device__ __forceinline__ void max_logits(float (&max_logit)[2 * N]) const {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      float most = -INFINITY;
#pragma unroll
      for (int k = 0; k < 2 * kSteps; ++k) most = fmaxf(most, value[k][i]);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
      max_logit[i] = most;
    }
  }

  // Replaces logits by exp(logit - shift), hidden ones by -1.
  __device__ __forceinline__ void exponentiate(const float (&shift)[2 * N]) {
#pragma unroll
    for (int k = 0; k < 2 * kSteps; ++k)
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) {
        const float exponential = expf(value[k][i] - shift[i]);
        value[k][i] = value[k][i] == -INFINITY ? -1 : exponential;
      }
  }

  // Sum of the exponentials of row i among this warp's keys of a group; -1: of all keys.
  __device__ __forceinline__ float row_sum(const Keys& keys, int group, int i) const {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 2 * kSteps; ++k)
      if ((group < 0 || keys.group[k] == group) && !(value[k][i] < 0)) sum += value[k][i];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
  }
};

// Largest max logit of `count` states that are `stride` floats apart.
__device__ __forceinline__ float merged_max(const float* states, int count, int stride) {
  float most = -INFINITY;
#pragma unroll 1
  for (int i = 0; i < count; ++i) most = fmaxf(most, states[i * stride]);
  return most;
}
// Element e of the merged states: the sum of a group.
__device__ __forceinline__ float merged_sum(const float* states, int count, int stride, int e, float max_logit) {
  const float shift = finite_max(max_logit);
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) sum += states[i * stride + e] * expf(states[i * stride] - shift);
  return sum;
}

// ---- attention_received

// The softmax denominators of a tile: a state (max logit, sum) per row, merged over warps, then over the cluster.
// `factor`: from exp(logit - max of the warp) to probabilities.
template <class T, int D, int N>
__device__ __forceinline__ void exchange_states(const Block<T, D, false, false>& block, const Keys& keys, int tile,
                                                const Logits<N>& logits, const float (&max_logit)[2 * N],
                                                float (&factor)[2 * N]) {
  const int lane = block.lane(), splits = block.p.splits;
  float* warps = block.floats(block.at.warps);
  float* peers = block.floats(block.at.peers) + tile % 2 * kMaxSplits * kMaxRows * 2;
  uint64_t* barrier = block.barrier(tile % 2);
  if (threadIdx.x == 0) mbarrier_arrive_expect(barrier, splits * 8 * N * 2 * 4);
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) {
    const float sum = logits.row_sum(keys, -1, i);
    float* state = warps + (block.warp() * kMaxRows + lane % 4 * 2 + i % 2 + i / 2 * 8) * 2;
    if (lane < 4) state[0] = max_logit[i], state[1] = sum;
  }
  __syncthreads();
  const int row = threadIdx.x / 8, peer = threadIdx.x % 8;
  if (row < 8 * N && peer < splits) {
    const float most = merged_max(warps + row * 2, block.warps(), kMaxRows * 2);
    const float total = merged_sum(warps + row * 2, block.warps(), kMaxRows * 2, 1, most);
    float* state = peers + (block.split * kMaxRows + row) * 2;
    store_async(reinterpret_cast<unsigned*>(state), __float_as_uint(most), barrier, peer);
    store_async(reinterpret_cast<unsigned*>(state + 1), __float_as_uint(total), barrier, peer);
  }
  mbarrier_wait_cluster(barrier, tile / 2 % 2);
  // lane: row `lane`
  const float* state = peers + lane % (8 * N) * 2;
  const float most = merged_max(state, splits, kMaxRows * 2);
  float denominator = merged_sum(state, splits, kMaxRows * 2, 1, most);
  if (most == INFINITY) denominator = 1;  // lse is infinite
  const float inverse = 1 / denominator;
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) {
    const int from = lane % 4 * 2 + i % 2 + i / 2 * 8;
    const float shift = finite_max(__shfl_sync(~0u, most, from)), scale = __shfl_sync(~0u, inverse, from);
    factor[i] = expf(max_logit[i] - shift) * scale;
  }
}

template <int N, class T, int D, bool LSE>
__device__ __forceinline__ void received_tiles(const Block<T, D, false, LSE>& block) {
  const auto& p = block.p;
  const int lane = block.lane();
  float* out = p.received + block.first_head() * p.keys + block.begin;
  Rows<T, D, false, LSE, N> rows;
  rows.load(block, 0);
  cp_async_wait<0>();
  __syncwarp();
  const Keys keys(block);
  float sums[2 * kSteps] = {};  // of head r
  int r = 0;
#pragma unroll 1
  for (int tile = 0; tile * 8 * N < block.total; ++tile) {
    Logits<N> logits;
    logits.compute(block, keys, rows);
    const int last_head = rows.last_head(block, tile);
    int head[2 * N];
    float shift[2 * N], factor[2 * N];
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) head[i] = rows.head[i], shift[i] = rows.shift[i], factor[i] = 1;
    const bool more = (tile + 1) * 8 * N < block.total;
    if constexpr (LSE) {
      if (more) rows.load(block, tile + 1);
      logits.exponentiate(shift);
    } else {
      float max_logit[2 * N];
      logits.max_logits(max_logit);
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) shift[i] = finite_max(max_logit[i]);
      logits.exponentiate(shift);
      exchange_states(block, keys, tile, logits, max_logit, factor);
    }
#pragma unroll 1
    for (;; ++r) {
#pragma unroll
      for (int k = 0; k < 2 * kSteps; ++k)
#pragma unroll
        for (int i = 0; i < 2 * N; ++i)
          if (head[i] == r && !(logits.value[k][i] < 0)) sums[k] += logits.value[k][i] * factor[i];
      if ((r + 1) * block.count > (tile + 1) * 8 * N) break;  // more rows of this head follow
#pragma unroll
      for (int k = 0; k < 2 * kSteps; ++k) {
        float sum = sums[k];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const int key = block.first_key(k / 2) + lane / 4 + k % 2 * 8;
        if (lane % 4 == 0 && key < block.keys) out[int64_t(r) * p.keys + key] = sum;
        sums[k] = 0;
      }
      if (r == last_head) {
        ++r;
        break;
      }
    }
    if (!LSE && more) rows.load(block, tile + 1);  // earlier it would not fit into registers
  }
}

// A cluster per key head, or single blocks if lse is given.
template <class T, int D, bool LSE>
__global__ void __launch_bounds__(32 * kMaxWarps) received(const __grid_constant__ AttentionParams<T> p) {
#ifdef PRUNEOPS_CLUSTERS
  Block<T, D, false, LSE> block(p);
  block.start();
  cluster_wait();  // all blocks of the cluster have started
  if (block.total > 8) return received_tiles<2>(block);
  if (block.total > 0) return received_tiles<1>(block);
  float* out = p.received + block.first_head() * p.keys + block.begin;
  for (int head = 0; head < p.ratio; ++head)
    for (int key = threadIdx.x; key < block.keys; key += blockDim.x) out[int64_t(head) * p.keys + key] = 0;
#endif
}

// ---- attention_mass

// The part of `mass` before blocks are merged: a state (max logit, sum per group) per row and warp.
template <int N, class T, int D>
__device__ __forceinline__ void mass_states(const Block<T, D, true, false>& block) {
  const auto& p = block.p;
  const int lane = block.lane(), size = 1 + p.groups;
  Rows<T, D, true, false, N> rows;
  rows.load(block, 0);
  int* row_group = reinterpret_cast<int*>(block.floats(block.at.rows) + kMaxRows * p.groups);
  if (threadIdx.x < 8 * N) row_group[lane] = rows.own_group;
  cp_async_wait<0>();
  __syncwarp();
  const Keys keys(block);
  Logits<N> logits;
  logits.compute(block, keys, rows);
  float max_logit[2 * N], shift[2 * N];
  logits.max_logits(max_logit);
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) shift[i] = finite_max(max_logit[i]);
  logits.exponentiate(shift);
  float* own = block.floats(block.at.warps) + block.warp() * kMaxRows * size;
#pragma unroll 1
  for (int g = 0; g < p.groups; ++g) {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      const float sum = logits.row_sum(keys, g, i);
      float* state = own + (lane % 4 * 2 + i % 2 + i / 2 * 8) * size;
      if (lane < 4) state[0] = max_logit[i], state[1 + g] = sum;
    }
  }
}

// All rows of a key head are one tile. Block 0 of a cluster merges the states and writes mass and lse.
template <class T, int D>
__global__ void __launch_bounds__(32 * kMaxWarps) mass(const __grid_constant__ AttentionParams<T> p) {
#ifdef PRUNEOPS_CLUSTERS
  Block<T, D, true, false> block(p);
  const int tid = threadIdx.x, size = 1 + p.groups, splits = p.splits;
  block.start();
  const int rows = block.total > 8 ? 16 : 8;
  if (block.split == 0 && tid == 0) mbarrier_arrive_expect(block.barrier(0), splits * rows * size * 4);
  cluster_wait();  // all blocks of the cluster have started
  if (block.total > 8) mass_states<2>(block);
  else mass_states<1>(block);
  __syncthreads();
  const int row = tid / 8, g = tid % 8;
  float* peers = block.floats(block.at.peers);
  if (row < rows) {
    const float* states = block.floats(block.at.warps) + row * size;
    const float most = merged_max(states, block.warps(), kMaxRows * size);
    float* to = peers + (block.split * kMaxRows + row) * size;
    if (g < p.groups) {
      const float sum = merged_sum(states, block.warps(), kMaxRows * size, 1 + g, most);
      store_async(reinterpret_cast<unsigned*>(to + 1 + g), __float_as_uint(sum), block.barrier(0), 0);
    }
    if (g == 0) store_async(reinterpret_cast<unsigned*>(to), __float_as_uint(most), block.barrier(0), 0);
  }
  if (block.split > 0) return;
  mbarrier_wait_cluster(block.barrier(0), 0);
  float* row_mass = block.floats(block.at.rows);
  const int* row_group = reinterpret_cast<const int*>(row_mass + kMaxRows * p.groups);
  if (row < rows) {
    const float* states = peers + row * size;
    const float most = merged_max(states, splits, kMaxRows * size);
    float sum = g < p.groups ? merged_sum(states, splits, kMaxRows * size, 1 + g, most) : 0, denominator = sum;
#pragma unroll
    for (int step = 1; step < 8; step *= 2) denominator += __shfl_xor_sync(~0u, denominator, step);
    if (denominator != denominator) sum = denominator;
    else if (denominator > 0) sum /= denominator;
    if (g < p.groups) row_mass[row * p.groups + g] = sum;
    if (g == 0 && row < block.total) {
      const int head = unsigned(row) / unsigned(block.count), index = block.list()[row - head * block.count];
      p.lse_out[(block.first_head() + head) * p.queries + index] =
          most == INFINITY ? INFINITY : most + logf(denominator);
    }
  }
  if (tid < p.queries * p.ratio) {  // at most 16
    if (!(block.words()[0] >> tid % p.queries & 1)) p.lse_out[block.first_head() * p.queries + tid] = -INFINITY;
  }
  __syncthreads();
#pragma unroll 1
  for (int o = tid; o < p.ratio * p.groups * p.groups; o += blockDim.x) {
    const int head = o / (p.groups * p.groups), from = o / p.groups % p.groups, to = o % p.groups;
    float sum = 0;
#pragma unroll 1
    for (int r = head * block.count; r < (head + 1) * block.count; ++r)
      if (row_group[r] == from) sum += row_mass[r * p.groups + to];
    p.mass[block.first_head() * p.groups * p.groups + o] = sum;
  }
#endif
}

// Sums of probabilities of this warp's keys by head and pair of groups, to `warp_mass` [R, G, G].
template <int N, class T, int D>
__device__ __forceinline__ void mass_tiles(const Block<T, D, true, true>& block, float* warp_mass) {
  const auto& p = block.p;
  const int lane = block.lane(), pairs = p.groups * p.groups;
  float* row_sums = block.floats(block.at.rows) + block.warp() * kMaxRows * (1 + p.groups);
  int* row_group = reinterpret_cast<int*>(row_sums + kMaxRows * p.groups);
  Rows<T, D, true, true, N> rows;
  rows.load(block, 0);
  cp_async_wait<0>();
  __syncwarp();
  const Keys keys(block);
  int first_head = 0;
#pragma unroll 1
  for (int tile = 0; tile * 8 * N < block.total; ++tile) {
    Logits<N> logits;
    logits.compute(block, keys, rows);
    const int last_head = rows.last_head(block, tile);
    if (lane < 8 * N) row_group[lane] = rows.own_head < 0 ? -1 : rows.own_head * p.groups + rows.own_group;
    float shift[2 * N];
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) shift[i] = rows.shift[i];
    if ((tile + 1) * 8 * N < block.total) rows.load(block, tile + 1);
    logits.exponentiate(shift);
#pragma unroll 1
    for (int g = 0; g < p.groups; ++g) {
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) {
        const float sum = logits.row_sum(keys, g, i);
        if (lane < 4) row_sums[(lane * 2 + i % 2 + i / 2 * 8) * p.groups + g] = sum;
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int o = first_head * pairs + lane; o < (last_head + 1) * pairs; o += 32) {
      float sum = 0;
#pragma unroll 4
      for (int row = 0; row < 8 * N; ++row)
        if (row_group[row] == o / p.groups) sum += row_sums[row * p.groups + o % p.groups];
      warp_mass[o] += sum;
    }
    first_head = last_head;
    __syncwarp();
  }
}

// mass of a pair of groups, NaN if any pair of the same query group is: a NaN probability shows in all key groups.
__device__ __forceinline__ float spread_nan(const float* from_group, int to, int groups) {
  float result = from_group[to];
#pragma unroll 1
  for (int g = 0; g < groups; ++g)
    if (from_group[g] != from_group[g]) result = from_group[g];
  return result;
}

// With lse given: block 0 of a cluster adds the sums of all warps.
template <class T, int D>
__global__ void __launch_bounds__(32 * kMaxWarps) mass_with_lse(const __grid_constant__ AttentionParams<T> p) {
#ifdef PRUNEOPS_CLUSTERS
  Block<T, D, true, true> block(p);
  const int tid = threadIdx.x, pairs = p.groups * p.groups, all_pairs = p.ratio * pairs;
  block.start();
  if (block.split == 0 && tid == 0) mbarrier_arrive_expect(block.barrier(0), p.splits * all_pairs * 4);
#pragma unroll 1
  for (int head = 0; head < p.ratio; ++head)
    for (int i = block.split * blockDim.x + tid; i < p.queries; i += p.splits * blockDim.x)
      p.lse_out[(block.first_head() + head) * p.queries + i] =
          p.lse[block.b * p.lse_stride[0] + (block.key_head * p.ratio + head) * p.lse_stride[1] + i * p.lse_stride[2]];
  cluster_wait();  // all blocks of the cluster have started
  float* warp_mass = block.floats(block.at.warps);
  float* own = warp_mass + block.warp() * all_pairs;
  for (int o = block.lane(); o < all_pairs; o += 32) own[o] = 0;
  __syncwarp();
  if (block.total > 8) mass_tiles<2>(block, own);
  else if (block.total > 0) mass_tiles<1>(block, own);
  __syncthreads();
  float* peers = block.floats(block.at.peers);
#pragma unroll 1
  for (int o = tid; o < all_pairs; o += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < block.warps(); ++w) sum += warp_mass[w * all_pairs + o];
    store_async(reinterpret_cast<unsigned*>(peers + block.split * all_pairs + o), __float_as_uint(sum),
                block.barrier(0), 0);
  }
  if (block.split > 0) return;
  mbarrier_wait_cluster(block.barrier(0), 0);
#pragma unroll 1
  for (int o = tid; o < all_pairs; o += blockDim.x) {
    float sum = 0;
    for (int s = 0; s < p.splits; ++s) sum += peers[s * all_pairs + o];
    warp_mass[o] = sum;  // the warps' sums have been read: their total has arrived
  }
  __syncthreads();
#pragma unroll 1
  for (int o = tid; o < all_pairs; o += blockDim.x)
    p.mass[block.first_head() * pairs + o] = spread_nan(warp_mass + o / p.groups * p.groups, o % p.groups, p.groups);
#endif
}

// ---- plan

// Splits the keys of a key head over a cluster, of two blocks at least if there are enough keys; `warps` of a block.
// False if the keys do not fit.
template <class T>
bool plan(AttentionParams<T>& p, int& warps, int min_keys) {
  const int fewest = p.keys > 32 ? 2 : 1;
  p.splits = std::bit_ceil(unsigned(std::clamp((p.keys + min_keys - 1) / min_keys, fewest, kMaxSplits)));
  set_keys_per_split(p);
  warps = std::max(4, (p.keys_per_split + kWarpKeys - 1) / kWarpKeys);
  return warps <= kMaxWarps;
}

template <class T>
int64_t shared_bytes(const AttentionParams<T>& p, int warps, bool is_mass) {
  return layout(p.keys_per_split * p.head_dim * 2, warps, p.keys_per_split, p.queries, p.ratio, is_mass ? p.groups : 0,
                p.lse)
      .bytes;
}

// Whether the kernels are defined for these parameters, but for the plan.
template <class T>
bool supports(const AttentionParams<T>& p, bool is_mass) {
  const bool one_tile = p.rows() <= kMaxRows;
  return (p.head_dim == 64 || p.head_dim == 128) && p.query_aligned && p.key_aligned && p.keys > 0 && p.queries > 0 &&
         p.queries <= kMaxQueries && p.ratio <= 64 && (!is_mass || p.lse || one_tile);
}

}  // namespace pruneops::decode

namespace pruneops {

// Runs attention_mass (p.mass is set) or attention_received. False if other kernels must: nothing is launched.
#ifdef __CUDACC__
template <class T>
bool launch_decode(const AttentionParams<T>& p, int64_t batch, cudaStream_t stream);
#endif

}  // namespace pruneops
