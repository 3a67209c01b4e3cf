// Gram path of greedy k-center, two launches:
//   gram    dot products of all pairs by tiles on or below the diagonal, N^2 D operations, mirrored; norm factors from
//           the diagonal. sm_90a: wgmma on tiles fed by tensor copies, a row's tiles in pairs that share its tokens by
//           multicast. Elsewhere, and for float32: tile.cuh.
//   greedy  one cluster per batch row. Lazy rounds over the matrix: every block selects the same m = 128 candidates,
//           the blocks gather their m x m similarities into block 0, one warp steps there while no other token can
//           precede the candidates, and every block updates its tokens with the rows of the chosen ones. Blocks send
//           each other what they need by asynchronous stores that complete on mbarriers.
// See docs/kernels/kcenter.md.

#pragma once

#include "cuda/hopper.cuh"
#include "cuda/kcenter.cuh"

namespace pruneops {

// ---- gram

// gram [B, N, pitch] of one batch row, norm_factors [B, N].
struct GramOutput {
  float* gram;
  float* norm_factors;
  int n, pitch;
  bool cosine;

  __device__ void offset(int64_t b) {
    gram += b * n * pitch;
    norm_factors += b * n;
  }
  // The dot product of tokens r and c; `mirror` unless another thread has that of c and r. Columns up to pitch are
  // written, so that greedy can read four at a time.
  __device__ __forceinline__ void write(int r, int c, float dot, bool mirror) const {
    if (r < n && c < pitch) gram[int64_t(r) * pitch + c] = dot;
    if (mirror && c < n && r < pitch) gram[int64_t(c) * pitch + r] = dot;
    if (r == c && r < n) norm_factors[r] = norm_factor(dot, cosine);
  }
  // Of tokens r and c, c + 1; c is even.
  __device__ __forceinline__ void write_pair(int r, int c, float dot, float next, bool mirror) const {
    if (r < n && c < pitch) *reinterpret_cast<float2*>(gram + int64_t(r) * pitch + c) = {dot, next};
    if (mirror && r < pitch) {
      if (c < n) gram[int64_t(c) * pitch + r] = dot;
      if (c + 1 < n) gram[int64_t(c + 1) * pitch + r] = next;
    }
    if (!mirror && r < n && r - c >> 1 == 0) norm_factors[r] = norm_factor(r == c ? dot : next, cosine);
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1000
constexpr int kGramBlocksPerSM = 2;  // of kPipelineBytes, in 228 KB
#else
constexpr int kGramBlocksPerSM = 1;  // in 164 or 100 KB; 9.0 takes wgmma
#endif

// A block per 128 x 128 tile on or below the diagonal. ALIGNED is x.aligned.
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, ALIGNED && sizeof(T) == 2 ? kGramBlocksPerSM : 1)
    kcenter_gram(Tokens<T> x, GramOutput to) {
  struct Shared {
    unsigned char pipeline[kPipelineBytes];
  };
  const int side = (to.n + kTile - 1) / kTile;
  const int tiles = side * (side + 1) / 2;
  const int64_t b = blockIdx.x / tiles;
  int tile_row = 0, tile_col = blockIdx.x % tiles;
  while (tile_col > tile_row) tile_col -= ++tile_row;
  const Rows rows{tile_row * kTile, min(kTile, to.n - tile_row * kTile)};
  const Rows cols{tile_col * kTile, min(kTile, to.n - tile_col * kTile)};

  Accumulators<T> dots;
  Matrix<T> matrix = x.matrix(b * x.batch_stride);
  matrix.aligned = ALIGNED;  // a compile-time constant: the unused copy path would cost registers
  dependents_launch();
  multiply_rows(dots, matrix, rows, cols, shared<Shared>().pipeline);
  to.offset(b);
#pragma unroll
  for (int j = 0; j < Accumulators<T>::kCols; ++j)
#pragma unroll
    for (int i = 0; i < Accumulators<T>::kRows; ++i)
      to.write(rows.first + dots.row(i), cols.first + dots.col(j), dots.at(i, j), tile_row != tile_col);
}

constexpr int kGramFeatures = 64;  // of a stage, 128 bytes
template <int TILE>
constexpr int kGramStages = TILE == 64 ? 8 : TILE == 128 ? 6 : 4;
template <int TILE>
struct alignas(1024) GramShared {
  unsigned char rows[kGramStages<TILE>][TILE * 128], cols[kGramStages<TILE>][TILE * 128];
  uint64_t full[kGramStages<TILE>], empty[kGramStages<TILE>];
};
template <int TILE>
constexpr int kGramThreads = 2 * TILE + 32;  // a warpgroup per 64 rows, and the warp that copies

// Pairs of tiles of all rows of tiles: tiles 2 j and 2 j + 1 of a row are one cluster of two blocks.
__host__ __device__ inline int gram_pairs(int side) { return side + side / 2 * ((side - 1) / 2); }

// A block per TILE x TILE tile; map: boxes of TILE / 2 tokens.
template <class T, int TILE>
__global__ void __launch_bounds__(kGramThreads<TILE>, 1)
    kcenter_gram_wgmma(const __grid_constant__ TensorMap map, int width, GramOutput to) {
#if !defined(__CUDA_ARCH__) || defined(PRUNEOPS_SM90A)
  using Shared = GramShared<TILE>;
  constexpr int kStages = kGramStages<TILE>, kConsumers = TILE / 64, kHalf = TILE / 2;
  Shared& sh = shared<Shared>();
  const int warp = threadIdx.x / 32, rank = blockIdx.x % 2, side = (to.n + TILE - 1) / TILE;
  const int pairs = gram_pairs(side), b = blockIdx.x / 2 / pairs;
  int tile_row = 0, pair = blockIdx.x / 2 % pairs;
  for (; pair > tile_row / 2; ++tile_row) pair -= tile_row / 2 + 1;
  const int tile_col = 2 * pair + rank, steps = (width + kGramFeatures - 1) / kGramFeatures;
  const bool paired = 2 * pair < tile_row, diagonal = tile_col == tile_row;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&sh.full[i], 1);
      mbarrier_init(&sh.empty[i], kConsumers * (paired ? 2 : 1));
    }
    mbarrier_init_fence();
  }
  cluster_arrive_relaxed();
  cluster_wait();
  dependents_launch();
  if (tile_col > tile_row) return;

  if (warp == 4 * kConsumers) {  // copies
    if (threadIdx.x % 32 == 0) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % kStages, feature = step * kGramFeatures;
        if (step >= kStages) mbarrier_wait(&sh.empty[stage], (step / kStages - 1) % 2);
        mbarrier_arrive_expect(&sh.full[stage], (diagonal ? 1 : 2) * TILE * 128);
        for (int half = 0; half < 2; ++half) {
          unsigned char* place = sh.rows[stage] + half * kHalf * 128;
          const int token = tile_row * TILE + half * kHalf;
          if (!paired)
            tensor_copy(place, map, feature, token, b, &sh.full[stage]);
          else if (half == rank)
            tensor_multicast(place, map, feature, token, b, &sh.full[stage], 3);
          if (!diagonal)
            tensor_copy(sh.cols[stage] + half * kHalf * 128, map, feature, tile_col * TILE + half * kHalf, b,
                        &sh.full[stage]);
        }
      }
    }
  } else {
    float dots[TILE / 2];
    const int group = warp / 4, lane = threadIdx.x % 32;
    const auto release = [&](int step) {  // the stage is no longer read, by either block of the cluster
      if (threadIdx.x % 128 != 0) return;
      mbarrier_arrive(&sh.empty[step % kStages]);
      if (paired) mbarrier_arrive_peer(&sh.empty[step % kStages], rank ^ 1);
    };
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages;
      mbarrier_wait(&sh.full[stage], step / kStages % 2);
      const unsigned char* cols = diagonal ? sh.rows[stage] : sh.cols[stage];
      const uint64_t a = wgmma_operand(sh.rows[stage] + group * 64 * 128), c = wgmma_operand(cols);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kGramFeatures / 16; ++k)
        wgmma<T>(dots, wgmma_next(a, k), wgmma_next(c, k), step + k > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) release(step - 1);
    }
    wgmma_wait<0>();
    if (paired) release(steps - 1);
    to.offset(b);
    const int row = tile_row * TILE + group * 64 + warp % 4 * 16 + lane / 4;
    const int col = tile_col * TILE + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < TILE / 2; i += 2)
      to.write_pair(row + i % 4 / 2 * 8, col + i / 4 * 8, dots[i], dots[i + 1], !diagonal);
  }
  if (paired) {  // the other block may still arrive at the barriers of this one
    cluster_arrive_relaxed();
    cluster_wait();
  }
#endif
}

// ---- greedy

constexpr int kGreedyThreads = 512;
constexpr int kGreedyTokens = 8 * kGreedyThreads;
constexpr int kGreedyCandidates = 128;
constexpr int kGreedyBins = 256;
constexpr int kMaxGreedyBlocks = 16;  // of a cluster

struct GreedyParams {
  const float* gram;  // [B, N, pitch] dot products
  const float* norm_factors;  // [B, N]
  int n, pitch;
  int blocks;  // of a cluster
  int64_t k;
  SeedsAndMask given;
  Output out;
};

struct GreedyShared {
  // ordered_bits of the similarity to the nearest center; that of +inf: not finite, kExcluded: not available.
  unsigned nearest[kGreedyTokens];
  float factors[kGreedyTokens];
  union {
    unsigned similarities[kGreedyCandidates * kGreedyCandidates];  // ordered_bits; 0: NaN. In block 0
    uint4 partial[kGreedyThreads];  // ordered bits: maximum similarity of four tokens to some of the chosen
  };
  unsigned candidates[kGreedyCandidates];  // ascending
  unsigned char order[kGreedyCandidates];  // of the chosen among the candidates. In block 0
  unsigned bits[kGreedyCandidates];   // of nearest of the candidates, then, in block 0, of the chosen
  unsigned chosen[kGreedyCandidates];  // in this round; -1: a seed out of range
  unsigned bins[kGreedyBins], counts[kGreedyThreads / 32];
  uint4 ranges[kMaxGreedyBlocks];  // of the tokens of each block: minimum and maximum bits of the available ones
  unsigned steps;
  uint64_t gathered, stepped, updated;  // a phase a round, if the cluster has more than one block
};

// Inclusive sum over the lanes up to this one.
__device__ __forceinline__ unsigned warp_scan(unsigned v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned other = __shfl_up_sync(~0u, v, step);
    if (lane >= step) v += other;
  }
  return v;
}

// A block of the cluster of one batch row. Tokens [first, first + share) are updated here.
struct GreedyBlock {
  const GreedyParams& p;
  GreedyShared& sh;
  int rank, share, first;
  int64_t row;

  __device__ GreedyBlock(const GreedyParams& p, GreedyShared& sh) : p(p), sh(sh) {
    rank = blockIdx.x % p.blocks;
    row = blockIdx.x / p.blocks;
    share = ((p.n - 1) / p.blocks / 4 + 1) * 4;
    first = rank * share;
  }

  __device__ const float* gram_row(int token) const { return p.gram + (row * p.n + token) * p.pitch; }

  // Waits until all of a phase has arrived here; blocks of one: until all threads have come.
  __device__ void wait(uint64_t* barrier, unsigned parity) const {
    if (p.blocks == 1) return __syncthreads();
    mbarrier_wait_cluster(barrier, parity);
  }
  template <class V>
  __device__ void send(V* to, V value, uint64_t* barrier, unsigned block) const {
    if (p.blocks == 1)
      *to = value;
    else
      store_async(to, value, barrier, block);
  }

  // Candidates, at most kGreedyCandidates: the tokens of minimum (bits of nearest, index). Returns their number, 0 if
  // no token is available. A candidate precedes all others while its bits are below `limit`. Ends with a barrier.
  //
  // The bits between minimum and maximum fall into 256 equal bins; tokens of as many bins as fit are candidates. If the
  // first does not fit, it is divided again; at the last, tokens of equal nearest are taken in order of their index.
  __device__ int select(unsigned& limit) {
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const uint4 range = sh.ranges[lane % p.blocks];
    unsigned low = warp_min(range.x), high = ~warp_min(~range.y);
    if (low == kExcluded) return 0;
    const unsigned top = high;
    unsigned bits[8];  // of tokens 4 tid + 2048 i + j
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(sh.nearest)[tid + i * kGreedyThreads];
      bits[4 * i] = four.x, bits[4 * i + 1] = four.y, bits[4 * i + 2] = four.z, bits[4 * i + 3] = four.w;
    }

    unsigned edge = low;  // bits below it are candidates
    while (edge == low && high > low) {
      const int shift = max(0, 24 - __clz(high - low));  // (high - low) >> shift < 256
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (bits[i] - low <= high - low) atomicAdd(&sh.bins[bits[i] - low >> shift], 1u);
      __syncthreads();
      unsigned counts[8], sum = 0;  // of bins 8 lane + i
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 four = reinterpret_cast<const uint4*>(sh.bins)[2 * lane + i];
        counts[4 * i] = four.x, counts[4 * i + 1] = four.y, counts[4 * i + 2] = four.z, counts[4 * i + 3] = four.w;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += counts[i];
      unsigned before = warp_scan(sum) - sum, fitting = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) fitting += (before += counts[i]) <= kGreedyCandidates;
      fitting = warp_sum(fitting);
      if (fitting == kGreedyBins)
        edge = high + 1;
      else if (fitting > 0)
        edge = low + (fitting << shift);
      else
        high = shift == 0 ? low : low + ((1u << shift) - 1);
      __syncthreads();  // before the bins are cleared for the next time
      if (tid < kGreedyBins) sh.bins[tid] = 0;
      if (fitting == 0) __syncthreads();
    }
    const bool ties = edge == low;  // more than fit, all of nearest `low`
    unsigned count = 0;  // of tokens below 2048 in the lower half, of the others in the upper half
#pragma unroll
    for (int i = 0; i < 8; ++i) count += (ties ? bits[i] == low : bits[i] < edge) << i / 4 * 16;
    const unsigned scan = warp_scan(count);
    if (lane == 31) sh.counts[warp] = scan;
    __syncthreads();
    const unsigned of_warp = lane < kGreedyThreads / 32 ? sh.counts[lane] : 0, total = warp_sum(of_warp);
    const unsigned before = warp_sum(lane < warp ? of_warp : 0) + scan - count;
    unsigned slot = before & 0xffff;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i == 4) slot = (total & 0xffff) + (before >> 16);
      if (!(ties ? bits[i] == low : bits[i] < edge)) continue;
      const int token = 4 * tid + i / 4 * 4 * kGreedyThreads + i % 4;
      if (slot < kGreedyCandidates) {
        sh.candidates[slot] = token;
        sh.bits[slot] = bits[i];
      }
      ++slot;
    }
    __syncthreads();
    const int all = (total & 0xffff) + (total >> 16);
    limit = ties ? low + 1 : edge;
    if (limit > top && all <= kGreedyCandidates) limit = kExcluded;  // there are no others
    return min(all, kGreedyCandidates);
  }

  // Similarities of the candidates to each other, to block 0; the blocks share the rows.
  __device__ void gather(int count) const {
    if (rank == 0 && threadIdx.x == 0 && p.blocks > 1) mbarrier_arrive_expect(&sh.gathered, 4 * count * count);
    constexpr int kBatch = 4, kRows = kGreedyThreads / kGreedyCandidates;  // loads in flight; rows at a time
    const int c = threadIdx.x % kGreedyCandidates;
    if (c >= count) return;
    const int other = sh.candidates[c];
    const float* column = gram_row(0) + other;
    const float other_factor = sh.factors[other];
    const int first_row = rank + threadIdx.x / kGreedyCandidates * p.blocks;
    for (int base = first_row; base < count; base += kBatch * kRows * p.blocks) {
      float dots[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int r = base + i * kRows * p.blocks;
        dots[i] = r < count ? column[sh.candidates[r] * p.pitch] : 0;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int r = base + i * kRows * p.blocks;
        if (r >= count) break;
        send(sh.similarities + r * kGreedyCandidates + c,
             similarity_bits(dots[i], sh.factors[sh.candidates[r]], other_factor), &sh.gathered, 0);
      }
    }
  }

  // Steps among the candidates while the minimum of their bits is below `limit`, by one warp of block 0. Fills sh.order
  // and sh.bits, and returns the number of steps.
  __device__ int step(int count, unsigned limit, int64_t max_steps) const {
    const unsigned lane = threadIdx.x % 32;
    const int bounded = static_cast<int>(min(max_steps, int64_t(kGreedyCandidates)));
    unsigned s[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = 4 * lane + i < count ? sh.bits[4 * lane + i] : kExcluded;
    __syncwarp();  // sh.bits is filled again
    int steps = 0;
    for (; steps < bounded; ++steps) {
      const unsigned lowest = min(min(s[0], s[1]), min(s[2], s[3]));
      const unsigned place = 4 * lane + (s[0] == lowest ? 0 : s[1] == lowest ? 1 : s[2] == lowest ? 2 : 3);
      const unsigned bits = warp_min(lowest);
      const unsigned slot = warp_min(lowest == bits ? place : ~0u);
      const uint4 row = *reinterpret_cast<const uint4*>(sh.similarities + slot * kGreedyCandidates + 4 * lane);
      if (bits >= limit) break;
      if (lane == 0) sh.order[steps] = slot, sh.bits[steps] = bits;
      s[0] = slot == 4 * lane ? kExcluded : max(s[0], row.x);
      s[1] = slot == 4 * lane + 1 ? kExcluded : max(s[1], row.y);
      s[2] = slot == 4 * lane + 2 ? kExcluded : max(s[2], row.z);
      s[3] = slot == 4 * lane + 3 ? kExcluded : max(s[3], row.w);
    }
    return steps;
  }

  // Block 0: greedy steps; all blocks receive sh.chosen and sh.steps. `position` is that of the first in the output.
  __device__ void take_steps(int count, unsigned limit, int64_t position, int64_t max_steps) const {
    const int tid = threadIdx.x;
    if (tid < 32) {
      const int steps = step(count, limit, max_steps);
      if (tid == 0) sh.counts[0] = steps;
    }
    __syncthreads();
    const int steps = sh.counts[0];
    for (int peer = tid / 32; peer < p.blocks; peer += kGreedyThreads / 32)
      for (int i = tid % 32; i < steps; i += 32)
        send(sh.chosen + i, sh.candidates[sh.order[i]], &sh.stepped, peer);
    if (tid < p.blocks) {
      send(&sh.steps, unsigned(steps), &sh.stepped, tid);
      if (p.blocks > 1) mbarrier_arrive_expect_peer(&sh.stepped, 4 * (steps + 1), tid);
    }
    if (tid < steps) p.out.write(position + tid, sh.candidates[sh.order[tid]], score_of(sh.bits[tid]));
  }

  // Brings nearest of this block's tokens up to date with sh.chosen, and sends it and its range to all blocks.
  __device__ void update(int steps) const {
    const int tid = threadIdx.x, quads = quads_of(rank), lane = tid % 32;
    if (tid < steps && sh.chosen[tid] - first < unsigned(share)) sh.nearest[sh.chosen[tid]] = kExcluded;
    if (tid == 0 && p.blocks > 1) mbarrier_arrive_expect(&sh.updated, 16 * (all_quads() - quads + p.blocks));
    const int width = min(quads, kGreedyThreads), groups = width > 0 ? kGreedyThreads / width : 0;
    const int group = width > 0 ? tid / width : 0, place = tid - group * width;
    for (int base = 0; base < quads; base += width) {  // one pass, unless the block has more than 2048 tokens
      const int quad = base + place, token = first + 4 * quad;
      uint4 best{0, 0, 0, 0};
      if (group < groups && quad < quads) update_quad(best, token, group, groups, steps);
      sh.partial[tid] = best;
      __syncthreads();
      if (tid < width && quad < quads) {
        uint4& nearest = *reinterpret_cast<uint4*>(sh.nearest + token);
        uint4 s = nearest;
#pragma unroll 4
        for (int g = 0; g < groups; ++g) {
          const uint4 part = sh.partial[g * width + tid];
          s = {max(s.x, part.x), max(s.y, part.y), max(s.z, part.z), max(s.w, part.w)};
        }
        nearest = s;
      }
      __syncthreads();
    }
    for (int peer = tid / 32; peer < p.blocks; peer += kGreedyThreads / 32) {  // a warp sends to one block at a time
      const uint4 range = range_of(rank);
      for (int quad = lane; quad < quads && peer != rank; quad += 32) {
        uint4* at = reinterpret_cast<uint4*>(sh.nearest + first) + quad;
        store_async(at, *at, &sh.updated, peer);
      }
      if (lane == 0) send(sh.ranges + rank, range, &sh.updated, peer);
    }
  }

  // Minimum and maximum bits of the available tokens of a block, by a warp.
  __device__ uint4 range_of(int block) const {
    unsigned low = kExcluded, high = 0;
    const auto* four = reinterpret_cast<const uint4*>(sh.nearest + block * share);
    for (int quad = threadIdx.x % 32; quad < quads_of(block); quad += 32) {
      const uint4 s = four[quad];
      low = min(low, min(min(s.x, s.y), min(s.z, s.w)));
      for (unsigned bits : {s.x, s.y, s.z, s.w})
        if (bits != kExcluded) high = max(high, bits);
    }
    return {warp_min(low), ~warp_min(~high), 0, 0};
  }

  // best of four tokens: maximum of the ordered bits of the similarities to chosen group, group + groups, ...
  __device__ __forceinline__ void update_quad(uint4& best, int token, int group, int groups, int steps) const {
    constexpr int kBatch = 4;  // loads in flight
    const float4 factor = *reinterpret_cast<const float4*>(sh.factors + token);
    const float* column = gram_row(0) + token;
#pragma unroll 1
    for (int i = group; i < steps; i += kBatch * groups) {
      float4 dots[kBatch];
      float center_factor[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int center = i + j * groups < steps ? static_cast<int>(sh.chosen[i + j * groups]) : -1;
        center_factor[j] = center < 0 ? NAN : sh.factors[center];
        dots[j] = *reinterpret_cast<const float4*>(column + max(center, 0) * p.pitch);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        best.x = max(best.x, similarity_bits(dots[j].x, center_factor[j], factor.x));
        best.y = max(best.y, similarity_bits(dots[j].y, center_factor[j], factor.y));
        best.z = max(best.z, similarity_bits(dots[j].z, center_factor[j], factor.z));
        best.w = max(best.w, similarity_bits(dots[j].w, center_factor[j], factor.w));
      }
    }
  }
  // ordered_bits; 0 for NaN.
  __device__ __forceinline__ unsigned similarity_bits(float dot, float a, float b) const {
    const float sim = similarity(dot, a, b, p.out.cosine);
    return sim == sim ? ordered_bits(sim) : 0;
  }
  __device__ int all_quads() const { return (p.n + 3) / 4; }
  __device__ int quads_of(int block) const { return max(0, min(share / 4, all_quads() - block * share / 4)); }

  __device__ void run() {
    const int tid = threadIdx.x;
    if (tid == 0) {
      for (uint64_t* barrier : {&sh.gathered, &sh.stepped, &sh.updated}) mbarrier_init(barrier, 1);
      mbarrier_init_fence();
    }
    if (p.blocks > 1) cluster_arrive_relaxed();
    dependency_wait();
    for (int i = tid; i < kGreedyTokens; i += kGreedyThreads) {
      const float factor = i < p.n ? p.norm_factors[row * p.n + i] : NAN;
      sh.factors[i] = factor;
      sh.nearest[i] = i >= p.n || !p.given.allows(row, i) ? kExcluded
                      : factor == factor                  ? ordered_bits(-INFINITY)
                                                          : kOrderedInfinity;
    }
    if (tid < kGreedyBins) sh.bins[tid] = 0;
    __syncthreads();
    for (int block = tid / 32; block < p.blocks; block += kGreedyThreads / 32) {
      const uint4 range = range_of(block);
      if (tid % 32 == 0) sh.ranges[block] = range;
    }
    if (p.blocks > 1) cluster_wait();  // all blocks have started
    __syncthreads();
    unsigned rounds = 0, updates = 0;
    for (int64_t done = 0; done < p.k;) {
      int steps;
      if (done < p.given.seeds_count) {
        steps = static_cast<int>(min(p.given.seeds_count - done, int64_t(kGreedyCandidates)));
        if (tid < steps) {
          const int seed = p.given.seed(row, done + tid, 0, p.n);
          sh.chosen[tid] = seed;
          if (rank == 0) p.out.write(row * p.k + done + tid, seed, seed < 0 ? NAN : -INFINITY);
        }
        __syncthreads();
      } else {
        unsigned limit;
        const int count = select(limit);
        if (count == 0) {
          if (rank == 0)
            for (int64_t i = done + tid; i < p.k; i += kGreedyThreads) p.out.write(row * p.k + i, -1, NAN);
          break;
        }
        gather(count);
        if (rank == 0) {
          wait(&sh.gathered, rounds % 2);
          take_steps(count, limit, row * p.k + done, p.k - done);
        }
        wait(&sh.stepped, rounds % 2);
        ++rounds;
        steps = sh.steps;
      }
      done += steps;
      if (done < p.k) {
        update(steps);
        wait(&sh.updated, updates++ % 2);
      }
      if (done < p.given.seeds_count && p.blocks > 1) {  // no block begins an update while another is in this one
        cluster_arrive_relaxed();
        cluster_wait();
      }
    }
  }
};

__global__ void __launch_bounds__(kGreedyThreads, 1) kcenter_greedy(const __grid_constant__ GreedyParams p) {
  GreedyBlock(p, shared<GreedyShared>()).run();
}

}  // namespace pruneops
