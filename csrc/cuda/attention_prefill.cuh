// attention_mass for many rows on compute capability 9.0: float16 and bfloat16, 64 or 128 features.
//
// Cost per visible pair: 2 D operations (wgmma) and one exp2; K is read from L2 once per block of 64 W rows.
// Three launches: lists (counted queries; key blocks of 128 and their groups), sums, reduction over rows.
// sums: a block has W consumer warpgroups of 64 rows each and four producer warps, each of which fills one stage of
// key blocks. The softmax of one warpgroup overlaps the products of the others. A key block of one group adds to one
// running sum per row; where the group changes it is merged into the row's total of that group in shared memory. Blocks
// with several groups, masked keys or the causal diagonal take masks of 128 bits. Every sum has a fixed order.
// docs/kernels/attention.md

#pragma once

#include <climits>
#include <cmath>
#include <cstdint>

#include "cuda/attention.cuh"
#include "cuda/hopper.cuh"
#include "cuda/primitives.cuh"
#include "cuda/tile.cuh"

namespace pruneops {

namespace prefill {

constexpr int kRows = 64;            // of a warpgroup
constexpr int kKeys = 128;           // of a key block
constexpr int kSums = kKeys / 2;     // accumulators per thread: 64 x 128 of a warpgroup
constexpr int kStages = 4;           // of key blocks, one per producer warp
constexpr int kListEnd = kStages;    // entries after a list of key blocks, which are read in advance
constexpr int kListThreads = 1024;   // of the kernels lists and reduce
constexpr int kMixed = -1;           // group of a key block with several groups or masked keys
constexpr float kLog2e = 1.4426950408889634f, kLog2eLow = 1.925963033500e-8f, kLn2 = 0.6931471805599453f;

struct alignas(8) KeyBlock {
  int first;  // key
  int group;
};
// Bit k: key k of a block.
struct alignas(16) KeyMask {
  unsigned word[4];
};

// Only blocks with unmasked keys are listed.
template <class T>
struct Params : AttentionParams<T> {
  KeyMask* masks;    // [B, key blocks, G + 1]: of each group, then of all unmasked keys
  KeyBlock* blocks;  // [B, key blocks + kListEnd]
  int* ranks;        // [B, key blocks + 1]: how many blocks before this one are listed
  int* counts;       // [B]: of counted queries
  int* positions;    // [B, Sq]: counted queries, ascending
  float* row_mass;   // [B, H, Sq, G], of counted queries

  __host__ __device__ int key_blocks() const { return (this->keys + kKeys - 1) / kKeys; }
  __host__ __device__ int heads() const { return this->key_heads * this->ratio; }
  __device__ const KeyBlock* blocks_of(int64_t b) const { return blocks + b * (key_blocks() + kListEnd); }
  // How many listed blocks lie before a block.
  __device__ int rank(int64_t b, int block) const {
    return ranks[b * (key_blocks() + 1) + min(block, key_blocks())];
  }
  // How many listed blocks begin before key `end`.
  __device__ int blocks_before(int64_t b, int end) const { return rank(b, (min(end, this->keys) + kKeys - 1) / kKeys); }
  __device__ const KeyMask* masks_of(int64_t b) const { return masks + b * key_blocks() * (this->groups + 1); }
  // Query `position` attends to this many first keys; INT_MAX: all.
  __device__ int visible(int position) const {
    return this->causal ? max(0, position + 1 + this->keys - this->queries) : INT_MAX;
  }
};

// Bytes of the workspace, which is aligned to 16 bytes, and its parts.
template <class T>
int64_t set_workspace(Params<T>& p, int64_t batch, void* memory) {
  int64_t bytes = 0;
  const auto take = [&](auto*& part, int64_t count) {
    part = reinterpret_cast<std::decay_t<decltype(part)>>(static_cast<char*>(memory) + bytes);
    bytes += count * sizeof(*part);
  };
  take(p.masks, batch * p.key_blocks() * (p.groups + 1));
  take(p.blocks, batch * (p.key_blocks() + kListEnd));
  take(p.ranks, batch * (p.key_blocks() + 1));
  take(p.counts, batch);
  take(p.positions, batch * p.queries);
  take(p.row_mass, batch * p.heads() * p.queries * p.groups);
  return bytes;
}

// ---- lists

struct ListShared {
  int counts[4][32];
};

// rank[k]: number of flags set before flag k of this thread, in the order [k][thread]; total: of all.
__device__ __forceinline__ void rank_flags(ListShared& sh, const bool (&flag)[4], int (&rank)[4], int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const unsigned set = __ballot_sync(~0u, flag[k]);
    rank[k] = __popc(set & ((1u << lane) - 1));
    if (lane == 0) sh.counts[k][warp] = __popc(set);
  }
  __syncthreads();
  total = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    int sum = sh.counts[k][lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += left;
    }
    const int before = __shfl_sync(~0u, sum, max(0, warp - 1));
    rank[k] += total + (warp > 0 ? before : 0);
    total += __shfl_sync(~0u, sum, 31);
  }
  __syncthreads();
}

template <class T>
__device__ void list_queries(const Params<T>& p, ListShared& sh, int64_t b) {
  int* positions = p.positions + b * p.queries;
  int count = 0;
#pragma unroll 1
  for (int base = threadIdx.x; base < p.queries + int(threadIdx.x); base += 4 * kListThreads) {
    bool counted[4];
    int rank[4], total;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = base + k * kListThreads;
      counted[k] = i < p.queries && p.query_group.at(b, i, p.groups) >= 0;
    }
    rank_flags(sh, counted, rank, total);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (counted[k]) positions[count + rank[k]] = base + k * kListThreads;
    count += total;
  }
  if (threadIdx.x == 0) p.counts[b] = count;
}

// A warp per key block.
template <class T>
__device__ void list_blocks(const Params<T>& p, ListShared& sh, int64_t b) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = p.key_blocks(), G = p.groups;
  KeyBlock* blocks = const_cast<KeyBlock*>(p.blocks_of(b));
  KeyMask* masks = const_cast<KeyMask*>(p.masks_of(b));
  int* ranks = p.ranks + b * (count + 1);
  int listed = 0;
#pragma unroll 1
  for (int base = 0; base < count; base += 32) {
    const int first = (base + warp) * kKeys;
    int group[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int key = first + 32 * k + lane;
      group[k] = key < p.keys ? p.key_group.at(b, key, G) : -1;
    }
    KeyMask mask;  // of group `lane`
    int single = kMixed;
    bool any = false;
    for (int g = 0; g <= G; ++g) {
      bool all = true;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const unsigned set = __ballot_sync(~0u, g < G ? group[k] == g : group[k] >= 0);
        if (lane == g) mask.word[k] = set;
        all = all && set == ~0u;
        any = any || set != 0;
      }
      if (all && g < G) single = g;
    }
    if (lane == 0) sh.counts[0][warp] = any;
    __syncthreads();
    const unsigned list = __ballot_sync(~0u, sh.counts[0][lane] != 0);
    const int place = listed + __popc(list & ((1u << warp) - 1));
    if (lane == 0 && base + warp < count) ranks[base + warp] = place;
    if (lane == 0 && any) blocks[place] = {first, single};
    if (any && lane <= G) masks[int64_t(place) * (G + 1) + lane] = mask;
    listed += __popc(list);
    __syncthreads();
  }
  if (threadIdx.x == 0) ranks[count] = listed;
  if (threadIdx.x < kListEnd) blocks[listed + threadIdx.x] = {};
}

// Two blocks per batch row.
template <class T>
__global__ void __launch_bounds__(kListThreads) lists(const __grid_constant__ Params<T> p) {
  auto& sh = shared<ListShared>();
  dependents_launch();
  if (blockIdx.x % 2 == 0) list_queries(p, sh, blockIdx.x / 2);
  else list_blocks(p, sh, blockIdx.x / 2);
}

// ---- sums

struct alignas(8) Total {
  float sum, max;  // of exp2(logit - max)
};

// W: consumer warpgroups.
template <int W, int D>
struct alignas(1024) SumsShared {
  static constexpr int kAllRows = W * kRows, kHalves = D / 64;
  unsigned char query[kHalves][kAllRows * 128];  // operands of wgmma
  unsigned char key[kStages][kHalves][kKeys * 128];
  Total totals[kAllRows][kMaxGroups];
  int64_t offset[kAllRows];  // of the row in query
  int position[kAllRows];    // of the row's query
  uint64_t query_full, full[kStages], empty[kStages];
};
template <int W>
constexpr int kSumsThreads = 128 * (W + 1);
template <int W>
constexpr int kProducerRegisters = 40;
template <int W>
constexpr int kConsumerRegisters = W == 2 ? 232 : W == 3 ? 152 : 104;

// Copies rows of D features into operands of wgmma; a warp takes kRowsPerStep rows at a time.
template <class T, int D>
struct RowCopy {
  static constexpr int kVecs = D / 8, kRowsPerStep = 32 / kVecs;
  int row = threadIdx.x % 32 / kVecs, vec = threadIdx.x % kVecs;  // of this lane

  // Zeros if not `inside`.
  template <int BYTES>
  __device__ __forceinline__ void copy(unsigned char (&operand)[D / 64][BYTES], int at, const T* source, bool inside,
                                       bool aligned) const {
    unsigned char* to = operand[vec / 8] + at * 128 + swizzled_offset(at, vec % 8);
    if (aligned) cp_async_16(to, source + vec * 8, inside ? 16 : 0);
    else *reinterpret_cast<uint4*>(to) = inside ? gather_vec(source, vec * 8, D) : uint4{0, 0, 0, 0};
  }
};

// A producer warp's share of the query rows.
template <class T, int W, int D>
__device__ __forceinline__ void copy_query(const Params<T>& p, SumsShared<W, D>& sh, int rows) {
  const RowCopy<T, D> lane;
  const int begin = threadIdx.x / 32 % 4 * (W * kRows / 4) + lane.row;
#pragma unroll 4
  for (int i = 0; i < W * kRows / 4; i += lane.kRowsPerStep) {
    const int row = begin + i;
    lane.copy(sh.query, row, p.query + sh.offset[row], row < rows, p.query_aligned);
  }
}

// keys: key 0 of the head.
template <class T, int D>
__device__ __forceinline__ void copy_keys(const Params<T>& p, unsigned char (&stage)[D / 64][kKeys * 128],
                                          const T* keys, int first) {
  const RowCopy<T, D> lane;
  const T* source = keys + int64_t(first + lane.row) * p.key_stride[2];
  const int64_t step = lane.kRowsPerStep * p.key_stride[2];
  if (p.key_aligned && first + kKeys <= p.keys) {
#pragma unroll 16
    for (int i = 0; i < kKeys; i += lane.kRowsPerStep, source += step)
      lane.copy(stage, i + lane.row, source, true, true);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kKeys; i += lane.kRowsPerStep, source += step) {
    const bool inside = first + i + lane.row < p.keys;
    lane.copy(stage, i + lane.row, inside ? source : keys, inside, p.key_aligned);
  }
}

// This warp's copies become visible to wgmma of the warps that wait for the barrier.
__device__ __forceinline__ void publish(uint64_t* barrier) {
  fence_proxy_async();
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

// A producer warp: its share of the query rows, then every fourth key block that a row attends to.
template <class T, int W, int D>
__device__ __forceinline__ void produce(const Params<T>& p, SumsShared<W, D>& sh, int64_t b, int key_head, int rows) {
  const int warp = threadIdx.x / 32 % 4;
  const KeyBlock* block = p.blocks_of(b) + warp;
  const T* keys = p.key + b * p.key_stride[0] + key_head * p.key_stride[1];
  copy_query(p, sh, rows);
  int first = block->first;
  const int blocks = p.blocks_before(b, p.visible(sh.position[rows - 1]));
  cp_async_commit();
#pragma unroll 1
  for (int i = 0;; ++i, block += kStages) {
    const bool has_block = warp + kStages * i < blocks;
    if (has_block) {
      mbarrier_wait(&sh.empty[warp], (i + 1) % 2);
      copy_keys<T, D>(p, sh.key[warp], keys, first);
      first = block[kStages].first;
    }
    cp_async_commit();
    if (i == 0) {
      cp_async_wait<1>();
      publish(&sh.query_full);
    }
    if (!has_block) return;
    cp_async_wait<0>();
    publish(&sh.full[warp]);
  }
}

// The mask of the first `count` of 32 keys.
__device__ __forceinline__ unsigned first_keys(int count) {
  return count <= 0 ? 0 : count >= 32 ? ~0u : (1u << count) - 1;
}

// A thread's two rows of the 64 x 128 logits of its warpgroup: `row` and row + 8; columns 8 j + l % 4 * 2 + {0, 1} of
// lane l. s[4 j + 2 r + e] is row r and column e of these.
template <bool LSE>
struct SoftmaxRows {
  int row, visible[2];  // the row attends to this many first keys
  float max[2];         // running maximum of the logits in base 2; LSE: lse in base 2
  float sum[2] = {};    // of exp2(logit - max) over this thread's columns of the current key group
  int group = -1;       // the current key group
  Total (*totals)[kMaxGroups];

  // Hides masked keys and those that the rows do not attend to. `mask`: of unmasked keys; null: all are.
  __device__ __forceinline__ void hide(float (&s)[kSums], const KeyMask* mask, int first) const {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const unsigned unmasked = mask ? mask->word[w] : ~0u;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const unsigned seen = (unmasked & first_keys(visible[r] - first - 32 * w)) >> column;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (!(seen >> (i / 2 * 8 + i % 2) & 1)) s[16 * w + i / 2 * 4 + 2 * r + i % 2] = -INFINITY;
      }
    }
  }

  // Turns the logits of a block into exp2(logit * scale - max), after updating the maximum.
  __device__ __forceinline__ void exponentials(float (&s)[kSums], float scale) {
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shift[r] = max[r];
      if (LSE) continue;
      float most[2] = {s[2 * r], s[2 * r + 1]};
#pragma unroll
      for (int i = 4; i < kSums; i += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e) most[e] = fmaxf(most[e], s[i + 2 * r + e]);
      float block_max = fmaxf(most[0], most[1]);
      block_max = fmaxf(block_max, __shfl_xor_sync(~0u, block_max, 1));
      block_max = fmaxf(block_max, __shfl_xor_sync(~0u, block_max, 2));
      const float new_max = fmaxf(max[r], block_max * scale);
      shift[r] = finite_max(new_max);
      sum[r] *= exp2_approx(max[r] - shift[r]);
      max[r] = new_max;
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) s[i] = exp2_approx(fmaf(s[i], scale, -shift[i / 2 % 2]));
  }

  // Adds the block's sums to the current group's.
  __device__ __forceinline__ void add(const float (&s)[kSums]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float part[2] = {s[2 * r], s[2 * r + 1]};
#pragma unroll
      for (int i = 4; i < kSums; i += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e) part[e] += s[i + 2 * r + e];
      sum[r] += part[0] + part[1];
    }
  }

  // Adds the block's sums of each group to the totals.
  __device__ __forceinline__ void add_groups(const float (&s)[kSums], const KeyMask* masks, int groups) const {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll 1
    for (int g = 0; g < groups; ++g) {
      const KeyMask mask = masks[g];
      if (!(mask.word[0] | mask.word[1] | mask.word[2] | mask.word[3])) continue;
      float part[2] = {};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const unsigned in_group = mask.word[w] >> column;
#pragma unroll
        for (int i = 0; i < 16; ++i)
          if (in_group >> (i / 4 * 8 + i % 2) & 1) part[i / 2 % 2] += s[16 * w + i];
      }
      merge(g, part);
    }
  }

  // Merges sums, relative to `max`, into the rows' totals of a group.
  __device__ __forceinline__ void merge(int g, const float (&part)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float row_sum = part[r] + __shfl_xor_sync(~0u, part[r], 1);
      row_sum += __shfl_xor_sync(~0u, row_sum, 2);
      if (threadIdx.x % 4 != 0) continue;
      Total& total = totals[row + 8 * r][g];
      total.sum = (LSE ? total.sum : total.sum * exp2_approx(total.max - finite_max(max[r]))) + row_sum;
      total.max = max[r];
    }
  }

  __device__ __forceinline__ void change_group(int new_group) {
    if (group >= 0) merge(group, sum);
    sum[0] = sum[1] = 0;
    group = new_group;
  }

  // The logits of a key block; `masks` of that block are read if its group is kMixed.
  __device__ __forceinline__ void update(float (&s)[kSums], KeyBlock block, const KeyMask* masks, int groups,
                                         bool fully_visible, float scale) {
    const bool mixed = block.group == kMixed;
    if (mixed || !fully_visible) hide(s, mixed ? masks + groups : nullptr, block.first);
    if (!mixed && block.group != group) change_group(block.group);
    exponentials(s, scale);
    if (mixed) add_groups(s, masks, groups);
    else add(s);
  }
};

// What the row of a given lse has to be multiplied by, since lse in base 2 was rounded.
__device__ __forceinline__ float lse_correction(float lse) {
  if (lse == -INFINITY) return 0;
  const float high = lse * kLog2e, low = fmaf(lse, kLog2eLow, fmaf(lse, kLog2e, -high));
  return fabsf(low) < 1 ? fmaf(-low, kLn2, 1) : 1;
}

// Ends a row (one thread): writes its mass and, unless given, its lse. `index`: of the row in [B, H, Sq].
template <class T, bool LSE>
__device__ __forceinline__ void finish_row(const Params<T>& p, const Total (&totals)[kMaxGroups], float max, float lse,
                                           int64_t index) {
  float mass[kMaxGroups], denominator = 0;
#pragma unroll
  for (int g = 0; g < kMaxGroups; ++g) {
    if (g >= p.groups) break;
    mass[g] = LSE ? totals[g].sum : totals[g].sum * exp2_approx(totals[g].max - finite_max(max));
    denominator += mass[g];
  }
  if (!LSE) p.lse_out[index] = max == INFINITY ? max : (max + log2f(denominator)) * kLn2;
  const float correction = LSE ? lse_correction(lse) : 1;
  float* row_mass = p.row_mass + index * p.groups;
#pragma unroll
  for (int g = 0; g < kMaxGroups; ++g) {
    if (g >= p.groups) break;
    if (LSE) mass[g] = correction == 0 ? 0 : mass[g] * correction;
    else if (denominator != denominator) mass[g] = denominator;
    else if (denominator > 0) mass[g] /= denominator;
    row_mass[g] = mass[g];
  }
}

// Starts the products of 64 rows with a stage, in two groups: three quarters and the rest.
template <class T, int D, int BYTES>
__device__ __forceinline__ void multiply(float (&s)[kSums], const unsigned char (&query)[D / 64][BYTES],
                                         const unsigned char (&key)[D / 64][kKeys * 128], int first_row) {
  wgmma_fence();
#pragma unroll
  for (int h = 0; h < D / 64; ++h) {
    const uint64_t a = wgmma_operand(query[h] + first_row * 128), c = wgmma_operand(key[h]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma<T>(s, wgmma_next(a, k), wgmma_next(c, k), h + k > 0);
      if (4 * h + k == D / 16 * 3 / 4 - 1) wgmma_commit();
    }
  }
  wgmma_commit();
}

// The value of the first lane, which the compiler then knows to be uniform.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

// This thread's rows, lse of these if given, and their totals. first_row: of the block of threads.
template <bool LSE, class T, int W, int D>
__device__ __forceinline__ SoftmaxRows<LSE> begin_rows(const Params<T>& p, SumsShared<W, D>& sh, int64_t b,
                                                       int key_head, int first_row, int rows, float (&lse)[2]) {
  const int lane = threadIdx.x % 32;
  SoftmaxRows<LSE> softmax;
  softmax.row = threadIdx.x / 32 * 16 + lane / 4;
  softmax.totals = sh.totals;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = softmax.row + 8 * r, head = key_head * p.ratio + (first_row + row) % p.ratio;
    const int position = sh.position[row];
    softmax.visible[r] = row < rows ? p.visible(position) : INT_MAX;
    softmax.max[r] = LSE ? 0 : -INFINITY;
    lse[r] = 0;
    if (LSE && row < rows) {
      lse[r] = p.lse[b * p.lse_stride[0] + head * p.lse_stride[1] + position * p.lse_stride[2]];
      softmax.max[r] = lse[r] == -INFINITY ? INFINITY : lse[r] * kLog2e;
    }
    if (lane % 4 == 0)
      for (int g = 0; g < p.groups; ++g) sh.totals[row][g] = {0, -INFINITY};
  }
  return softmax;
}

// A consumer warpgroup: 64 rows. first_row: of the block of threads.
template <class T, int W, int D, bool LSE>
__device__ __forceinline__ void consume(const Params<T>& p, SumsShared<W, D>& sh, int64_t b, int key_head,
                                        int first_row, int rows) {
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32, warpgroup = warp / 4, own = warpgroup * kRows;
  int own_blocks = 0, fully_visible = 0;  // blocks that some rows attend to, or all rows to all their keys
  if (own < rows) {
    own_blocks = p.blocks_before(b, p.visible(sh.position[min(own + kRows, rows) - 1]));
    fully_visible = p.rank(b, p.visible(sh.position[own]) / kKeys);
  }
  own_blocks = uniform(own_blocks), fully_visible = uniform(fully_visible);
  const int blocks = uniform(p.blocks_before(b, p.visible(sh.position[rows - 1])));
  const float scale = p.scale * kLog2e;
  float lse[2];
  auto softmax = begin_rows<LSE>(p, sh, b, key_head, first_row, rows, lse);
  const KeyBlock* list = p.blocks_of(b);
  const KeyMask* masks = p.masks_of(b);
  KeyBlock next = list[0];
  mbarrier_wait(&sh.query_full, 0);
#pragma unroll 1
  for (int i = 0; i < blocks; ++i) {
    const int stage = uniform(i % kStages);
    const KeyBlock block = next;
    next = list[i + 1];
    mbarrier_wait(&sh.full[stage], i / kStages % 2);  // even if unused: then stages are released in order
    if (i >= own_blocks) {
      if (lane == 0) mbarrier_arrive(&sh.empty[stage]);
      continue;
    }
    float s[kSums];
    multiply<T, D>(s, sh.query, sh.key[stage], own);
    wgmma_wait<0>();
    settle(s);
    if (lane == 0) mbarrier_arrive(&sh.empty[stage]);
    softmax.update(s, block, masks + int64_t(i) * (p.groups + 1), p.groups, i < fully_visible, scale);
  }
  softmax.change_group(-1);
  if (lane % 4 != 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = softmax.row + 8 * r;
    const int64_t head = (b * p.key_heads + key_head) * p.ratio + (first_row + row) % p.ratio;  // of all [B, H]
    if (row < rows)
      finish_row<T, LSE>(p, sh.totals[row], softmax.max[r], lse[r], head * p.queries + sh.position[row]);
  }
}

// A block per 64 W rows of a key head; the rows with the most visible keys come first.
template <class T, int W, int D, bool LSE>
__global__ void __launch_bounds__(kSumsThreads<W>, 1) sums(const __grid_constant__ Params<T> p) {
#if !defined(__CUDA_ARCH__) || defined(PRUNEOPS_SM90A)
  auto& sh = shared<SumsShared<W, D>>();
  const int batch_heads = gridDim.x / p.tiles, batch_head = blockIdx.x % batch_heads, tid = threadIdx.x;
  const int key_head = batch_head % p.key_heads, first_row = (p.tiles - 1 - blockIdx.x / batch_heads) * W * kRows;
  const int64_t b = batch_head / p.key_heads;
  dependents_launch();
  if (tid == kSumsThreads<W> - 1) {
    mbarrier_init(&sh.query_full, 4);
    for (int i = 0; i < kStages; ++i) mbarrier_init(&sh.full[i], 1), mbarrier_init(&sh.empty[i], 4 * W);
    mbarrier_init_fence();
  }
  dependency_wait();
  const int rows = min(W * kRows, p.counts[b] * p.ratio - first_row);
  if (rows <= 0) return;
  if (tid < W * kRows) {
    const int m = first_row + (tid < rows ? tid : 0), position = p.positions[b * p.queries + m / p.ratio];
    const int64_t head = key_head * p.ratio + m % p.ratio;
    sh.offset[tid] = b * p.query_stride[0] + head * p.query_stride[1] + position * p.query_stride[2];
    sh.position[tid] = position;
  }
  __syncthreads();
  if (tid >= W * 128) {
    release_registers<kProducerRegisters<W>>();
    produce(p, sh, b, key_head, rows);
  } else {
    acquire_registers<kConsumerRegisters<W>>();
    consume<T, W, D, LSE>(p, sh, b, key_head, first_row, rows);
  }
#endif
}

// ---- reduction

struct ReduceShared {
  float sums[kListThreads / 32][kMaxGroups][kMaxGroups];
};

constexpr int kReduceBatch = 6, kReduceStep = kListThreads / kMaxGroups;  // rows of a thread and between them

// Groups of this thread's next rows, and their lse_out if sums does not write it: not counted, or lse is given.
template <class T>
__device__ __forceinline__ void load_groups(const Params<T>& p, int64_t b, int head, int row,
                                            int (&group)[kReduceBatch]) {
  const GroupView& view = p.query_group;
  const auto* at = static_cast<const char*>(view.data) + (b * view.stride[0] + row * view.stride[1]) * view.bytes;
  const int64_t step = kReduceStep * view.stride[1] * view.bytes;
#pragma unroll
  for (int j = 0; j < kReduceBatch; ++j) {
    group[j] = -1;
    if (row + j * kReduceStep >= p.queries) continue;
    const int64_t id = view.bytes == 8 ? *reinterpret_cast<const int64_t*>(at + j * step)
                                       : *reinterpret_cast<const int*>(at + j * step);
    if (id >= 0 && id < p.groups) group[j] = static_cast<int>(id);
  }
  if (threadIdx.x % kMaxGroups > 0) return;
#pragma unroll
  for (int j = 0; j < kReduceBatch; ++j) {
    const int i = row + j * kReduceStep;
    float* lse = p.lse_out + (b * p.heads() + head) * p.queries + i;
    if (i >= p.queries) break;
    if (p.lse) *lse = p.lse[b * p.lse_stride[0] + head * p.lse_stride[1] + i * p.lse_stride[2]];
    else if (group[j] < 0) *lse = -INFINITY;
  }
}

// A block per head: mass, and lse_out of rows that are not counted (all rows if lse is given). Eight threads per row;
// the groups of the next rows are loaded with the mass of these. Rows of one group mostly lie together: their sum is
// added to the group's when the group changes.
template <class T>
__global__ void __launch_bounds__(kListThreads) reduce(const __grid_constant__ Params<T> p) {
  auto& sh = shared<ReduceShared>();
  const int tid = threadIdx.x, g = tid % kMaxGroups, head = blockIdx.x % p.heads();
  const int64_t b = blockIdx.x / p.heads(), first = int64_t(blockIdx.x) * p.queries;
  float sum[kMaxGroups] = {}, pending = 0;
  int group[kReduceBatch], current = 0;
  const auto flush = [&](int next) {
#pragma unroll
    for (int f = 0; f < kMaxGroups; ++f) sum[f] += f == current ? pending : 0;
    pending = 0;
    current = next;
  };
  load_groups(p, b, head, tid / kMaxGroups, group);
  dependency_wait();
#pragma unroll 1
  for (int row = tid / kMaxGroups; row < p.queries; row += kReduceBatch * kReduceStep) {
    const float* row_mass = p.row_mass + (first + row) * p.groups + g;
    float mass[kReduceBatch];
    int from[kReduceBatch];
#pragma unroll
    for (int j = 0; j < kReduceBatch; ++j) {
      from[j] = group[j];
      mass[j] = from[j] >= 0 && g < p.groups ? row_mass[j * kReduceStep * p.groups] : 0;
    }
    load_groups(p, b, head, row + kReduceBatch * kReduceStep, group);
#pragma unroll
    for (int j = 0; j < kReduceBatch; ++j) {
      if (from[j] >= 0 && from[j] != current) flush(from[j]);
      pending += mass[j];
    }
  }
  flush(0);
#pragma unroll
  for (int from = 0; from < kMaxGroups; ++from) {
    float part = sum[from];
    part += __shfl_xor_sync(~0u, part, 8);
    part += __shfl_xor_sync(~0u, part, 16);
    if (tid % 32 < kMaxGroups) sh.sums[tid / 32][from][g] = part;
  }
  __syncthreads();
  const int from = tid / kMaxGroups;
  if (from >= p.groups || g >= p.groups) return;
  float total = 0;
  for (int w = 0; w < kListThreads / 32; ++w) total += sh.sums[w][from][g];
  p.mass[int64_t(blockIdx.x) * p.groups * p.groups + from * p.groups + g] = total;
}

}  // namespace prefill

// ---- launches, defined in attention_prefill.cu for float16 and bfloat16

#ifdef __CUDACC__
// Whether this path takes a call; then its workspace, 16-byte aligned, and its launches.
template <class T>
bool prefill_applies(const AttentionParams<T>& p);
template <class T>
int64_t prefill_floats(const AttentionParams<T>& p, int64_t batch);
template <class T>
void launch_prefill(const AttentionParams<T>& p, int64_t batch, void* memory, cudaStream_t stream);
#endif

}  // namespace pruneops
