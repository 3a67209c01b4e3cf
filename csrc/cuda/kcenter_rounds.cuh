// Lazy rounds of greedy k-center; kcenter.cu describes them. See docs/kernels/kcenter.md.

#pragma once

#include "cuda/block_group.cuh"
#include "cuda/kcenter.cuh"

namespace pruneops {

constexpr int kMaxCandidates = kTile;
constexpr int kMaxSequences = 256;  // of one launch: their budgets are passed by value

template <class T>
struct RoundsParams {
  Tokens<T> x;
  SeedsAndMask given;
  Output out;
  const int64_t* cu_seqlens;  // null for a batch
  int64_t tokens;             // N, or T
  int64_t rows;               // batch rows, or sequences of this launch
  int64_t budget;             // k, for a batch
  int64_t offsets[kMaxSequences + 1];  // of each sequence's choices in the output
  float* nearest;       // [B, N] or [T]: similarity to the nearest center; +inf: not finite, NaN: not available
  float* norm_factors;  // [B, N] or [T]
  float* gram;          // [groups, max_candidates, max_candidates]
  unsigned* arrivals;   // [groups, kBarrierPitch], zero at launch
  int groups;
  int blocks;          // of a group
  int max_candidates;  // at most kMaxCandidates
};

struct RoundsShared {
  union {
    unsigned char pipeline[kPipelineBytes];
    float gram[kMaxCandidates * kMaxCandidates];
    float partial[32 * kTile];  // maximum similarity of each tile row, by slot
    struct {
      Key class_min[kThreads];  // minimum key of each class of tokens
      Key thresholds[kMaxCandidates];  // ascending
      Key keys[kMaxCandidates];
      unsigned histogram[kMaxCandidates];  // tokens between two thresholds
      unsigned count;
    } select;
  };
  int candidates[kMaxCandidates];  // ascending
  float candidate_nearest[kMaxCandidates];
  int chosen[kMaxCandidates];  // in this round; -1: a seed out of range
  float chosen_factor[kMaxCandidates];
  float chosen_nearest[kMaxCandidates];
  Key warp_min_key[kWarps];
  int steps;
};

// One batch row or sequence.
template <class T>
struct Sequence {
  Matrix<T> x;
  int n;
  int64_t row;    // of seeds and mask
  int64_t begin;  // added to every index in the output
  int64_t out_offset;
  int64_t k;
  float* nearest;
  float* norm_factors;

  __device__ Sequence(const RoundsParams<T>& p, int64_t row)
      : row(row), begin(0), out_offset(row * p.budget), k(p.budget) {
    int64_t first = row * p.tokens, end = p.tokens;
    if (p.cu_seqlens) {
      first = begin = max(int64_t(0), min(p.cu_seqlens[row], p.tokens));
      end = max(begin, min(p.cu_seqlens[row + 1], p.tokens));
      out_offset = p.offsets[row];
      k = p.offsets[row + 1] - out_offset;
    }
    n = static_cast<int>(end - begin);
    x = p.x.matrix(row * p.x.batch_stride + begin * p.x.row_stride);
    nearest = p.nearest + first;
    norm_factors = p.norm_factors + first;
  }
};

// Calls use(key) for every available token. A class of tokens belongs to one thread. Each run of 256 tokens is dealt to
// the classes in another order, so that a period in an image does not put its low scores into a few classes.
template <class Use>
__device__ __forceinline__ void scan_keys(const float* nearest, int n, const Use& use) {
  constexpr int kBatch = 8;
  for (unsigned run = 0; run * kThreads < unsigned(n); run += kBatch) {
    float s[kBatch];
    unsigned token[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      token[i] = (run + i) * kThreads + (threadIdx.x ^ ((run + i) * 0x9e3779b1u >> 24));
      s[i] = token[i] < unsigned(n) ? nearest[token[i]] : NAN;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const Key key = make_key(ordered_or_excluded(s[i]), token[i]);
      if (available(key)) use(key);
    }
  }
}

// Select: fills sh.candidates and sh.candidate_nearest with the tokens whose key is at most a threshold, up to m, and
// returns their number, 0 only if no token is available. `bound` becomes the minimum key of the others. Called after a
// sync; every block of a group computes the same.
//
// The sorted minimum keys of 256 classes of tokens are the possible thresholds; the highest that lets at most m tokens
// through is taken. If low scores fall into the classes at random, that is 97 to 100 % of m.
__device__ inline int select_candidates(RoundsShared& sh, const float* nearest, int n, int m, Key& bound) {
  const int tid = threadIdx.x;
  auto& select = sh.select;
  Key min_key = kLastKey;
  scan_keys(nearest, n, [&](Key key) { min_key = min(min_key, key); });
  select.class_min[tid] = min_key;
  if (tid < kMaxCandidates) select.histogram[tid] = 0;
  if (tid == 0) select.count = 0;
  __syncthreads();
  int rank = 0, classes = 0;
#pragma unroll 8
  for (int i = 0; i < kThreads; ++i) {
    rank += select.class_min[i] < min_key;
    classes += available(select.class_min[i]);
  }
  if (classes == 0) return 0;
  const int threshold_count = min(m, classes);
  if (available(min_key) && rank < threshold_count) select.thresholds[rank] = min_key;
  __syncthreads();

  const Key highest = select.thresholds[threshold_count - 1];
  scan_keys(nearest, n, [&](Key key) {
    if (key > highest) return;
    int low = 0, high = threshold_count - 1;  // first threshold not below key
    while (low < high) {
      const int middle = (low + high) / 2;
      if (select.thresholds[middle] < key)
        low = middle + 1;
      else
        high = middle;
    }
    atomicAdd(&select.histogram[low], 1u);
  });
  __syncthreads();
  unsigned passing = 0;
  if (tid < threshold_count) {
#pragma unroll 8
    for (int i = 0; i <= tid; ++i) passing += select.histogram[i];
  }
  const int fitting = __syncthreads_count(tid < threshold_count && passing <= unsigned(m));  // at least 1
  const Key threshold = select.thresholds[fitting - 1];

  min_key = kLastKey;
  scan_keys(nearest, n, [&](Key key) {
    if (key <= threshold)
      select.keys[atomicAdd(&select.count, 1u)] = key;
    else
      min_key = min(min_key, key);
  });
  min_key = warp_min_key(min_key);
  if (tid % 32 == 0) sh.warp_min_key[tid / 32] = min_key;
  __syncthreads();
  const int count = select.count;
  bound = warp_min_key(tid % 32 < kWarps ? sh.warp_min_key[tid % 32] : kLastKey);
  if (tid < count) {
    const Key key = select.keys[tid];
    int slot = 0;
    for (int i = 0; i < count; ++i) slot += index_of(select.keys[i]) < index_of(key);
    sh.candidates[slot] = static_cast<int>(index_of(key));
    sh.candidate_nearest[slot] = score_of(bits_of(key));
  }
  __syncthreads();
  return count;
}

// Gram: gram [count, m], similarities of the candidates to each other; the group's blocks share the tiles.
template <class T>
__device__ void compute_gram(RoundsShared& sh, const Sequence<T>& q, const BlockGroup& group, float* gram, int count,
                             int m, bool cosine) {
  const int size = group.blocks >= 16 ? 32 : group.blocks >= 4 ? 64 : kTile;
  const int side = (count + size - 1) / size;
  for (int tile = group.rank; tile < side * side; tile += group.blocks) {
    const int r0 = tile / side * size, c0 = tile % side * size;
    const Rows rows{sh.candidates + r0, 0, min(size, count - r0)}, cols{sh.candidates + c0, 0, min(size, count - c0)};
    Accumulators<T, false> out(rows.count);
    multiply_rows(out, q.x, rows, cols, sh.pipeline);
#pragma unroll
    for (int i = 0; i < Accumulators<T, false>::kRows; ++i) {
      if (out.row(i) >= rows.count) continue;
      const int r = r0 + out.row(i);
      const float row_factor = q.norm_factors[sh.candidates[r]];
#pragma unroll
      for (int j = 0; j < Accumulators<T, false>::kCols; ++j) {
        if (out.col(j) >= cols.count) continue;
        const int c = c0 + out.col(j);
        gram[r * m + c] = similarity(out.at(i, j), row_factor, q.norm_factors[sh.candidates[c]], cosine);
      }
    }
  }
}

// Greedy: steps among the candidates while their minimum key is at most `bound`. Fills sh.chosen and sh.chosen_nearest
// and returns the number of steps. Called after a sync; every block of a group takes the same steps.
__device__ inline int greedy_steps(RoundsShared& sh, const float* gram, int count, int m, Key bound,
                                   int64_t max_steps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int r = warp; r < count; r += kWarps)
    for (int c = lane; c < count; c += 32) sh.gram[r * kMaxCandidates + c] = gram[r * m + c];
  __syncthreads();
  if (warp == 0) {
    float s[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = 4 * lane + i < count ? sh.candidate_nearest[4 * lane + i] : NAN;
    int steps = 0;
    for (; steps < max_steps; ++steps) {
      unsigned bits = ordered_or_excluded(s[0]);
      int slot = 4 * lane;
#pragma unroll
      for (int i = 1; i < 4; ++i) {
        if (ordered_or_excluded(s[i]) < bits) {
          bits = ordered_or_excluded(s[i]);
          slot = 4 * lane + i;
        }
      }
      const unsigned min_bits = warp_min(bits);
      slot = __shfl_sync(~0u, slot, __ffs(__ballot_sync(~0u, bits == min_bits)) - 1);
      const int token = sh.candidates[slot];
      if (min_bits == kExcluded || make_key(min_bits, token) > bound) break;
      if (lane == 0) {
        sh.chosen[steps] = token;
        sh.chosen_nearest[steps] = score_of(min_bits);
      }
      update_four(s, sh.gram + slot * kMaxCandidates + 4 * lane, slot - 4 * lane);
    }
    if (lane == 0) sh.steps = steps;
  }
  __syncthreads();
  return sh.steps;
}

// Update: `nearest` of all tokens with sh.chosen; chosen tokens become NaN. One pass over x, its rows split evenly over
// the blocks of the group.
template <class T>
__device__ void update_nearest(RoundsShared& sh, const Sequence<T>& q, const BlockGroup& group, int steps,
                               bool cosine) {
  const int tid = threadIdx.x;
  if (tid < steps) sh.chosen_factor[tid] = sh.chosen[tid] < 0 ? NAN : q.norm_factors[sh.chosen[tid]];
  const int block_rows = (q.n - 1) / group.blocks + 1;
  const int tiles = group.blocks * ((block_rows - 1) / kTile + 1);  // the fewest per block, all of equal height
  const int tile_rows = (q.n - 1) / tiles + 1;
  for (int tile = group.rank; int64_t(tile) * tile_rows < q.n; tile += group.blocks) {
    const int first = tile * tile_rows;
    const Rows rows{nullptr, first, min(tile_rows, q.n - first)}, cols{sh.chosen, 0, steps};
    Accumulators<T, false> out(rows.count);
    multiply_rows(out, q.x, rows, cols, sh.pipeline);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Accumulators<T, false>::kRows; ++i) {
      if (out.row(i) >= rows.count) continue;
      const float row_factor = q.norm_factors[first + out.row(i)];
      float best = -INFINITY;
#pragma unroll
      for (int j = 0; j < Accumulators<T, false>::kCols; ++j)
        if (out.col(j) < steps)
          best = update_max(best, similarity(out.at(i, j), row_factor, sh.chosen_factor[out.col(j)], cosine));
      sh.partial[out.slot() * kTile + out.row(i)] = best;
    }
    __syncthreads();
    if (tid < rows.count) {
      float s = q.nearest[first + tid];
      for (int slot = 0; slot < out.slots(); ++slot) s = update_max(s, sh.partial[slot * kTile + tid]);
      q.nearest[first + tid] = s;
    }
    __syncthreads();
    if (tid < steps && sh.chosen[tid] >= first && sh.chosen[tid] < first + rows.count) q.nearest[sh.chosen[tid]] = NAN;
  }
}

// A group of p.blocks blocks per batch row or sequence. Two syncs a round.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) kcenter_rounds(const __grid_constant__ RoundsParams<T> p) {
  RoundsShared& sh = shared<RoundsShared>();
  const int tid = threadIdx.x, group_index = blockIdx.x / p.blocks, m = p.max_candidates;
  BlockGroup group{p.arrivals + group_index * kBarrierPitch, p.blocks, int(blockIdx.x % p.blocks)};
  float* gram = p.gram + int64_t(group_index) * m * m;

  for (int64_t row = group_index; row < p.rows; row += p.groups) {
    const Sequence<T> q(p, row);
    if (q.k == 0) continue;

    for (int64_t i = int64_t(group.rank) * kWarps + tid / 32; i < q.n; i += group.blocks * kWarps) {
      const float factor = norm_factor(squared_norm(q.x, q.x.data + i * q.x.stride), p.out.cosine);
      if (tid % 32 == 0) {
        q.norm_factors[i] = factor;
        q.nearest[i] = !p.given.allows(row, i) ? NAN : factor == factor ? -INFINITY : INFINITY;
      }
    }
    group.sync();

    for (int64_t done = 0; done < q.k;) {
      int steps;
      if (done < p.given.seeds_count) {
        steps = static_cast<int>(min(p.given.seeds_count - done, int64_t(m)));
        if (tid < steps) {
          const int seed = p.given.seed(row, done + tid, q.begin, q.n);
          sh.chosen[tid] = seed;
          if (group.rank == 0)
            p.out.write(q.out_offset + done + tid, seed < 0 ? -1 : q.begin + seed, seed < 0 ? NAN : -INFINITY);
        }
        __syncthreads();
      } else {
        Key bound;
        const int count = select_candidates(sh, q.nearest, q.n, m, bound);
        if (count == 0) {
          if (group.rank == 0)
            for (int64_t i = done + tid; i < q.k; i += kThreads) p.out.write(q.out_offset + i, -1, NAN);
          break;
        }
        compute_gram(sh, q, group, gram, count, m, p.out.cosine);
        group.sync();
        steps = greedy_steps(sh, gram, count, m, bound, q.k - done);
        if (group.rank == 0 && tid < steps)
          p.out.write(q.out_offset + done + tid, q.begin + sh.chosen[tid], sh.chosen_nearest[tid]);
      }
      done += steps;
      if (done < q.k) {
        if (q.n > 0) update_nearest(sh, q, group, steps, p.out.cosine);
        group.sync();
      }
    }
  }
}

}  // namespace pruneops
