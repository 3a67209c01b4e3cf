// Lazy rounds of greedy k-center; kcenter.cu describes them. See docs/kernels/kcenter.md.

#pragma once

#include "cuda/block_group.cuh"
#include "cuda/kcenter.cuh"
#include "cuda/products.cuh"

namespace pruneops {

constexpr int kMaxCandidates = kThreads;
constexpr int kMaxSequences = 256;  // of one launch: their budgets are passed by value
constexpr int kSelectBins = 4 * kThreads;

// Elements of a lower triangle above row r.
__host__ __device__ constexpr int triangle(int r) { return r * (r + 1) / 2; }

// `nearest` and the norm factors of a batch row or sequence begin at multiples of four floats: room for that.
__host__ __device__ constexpr int64_t padded_tokens(int64_t tokens, int64_t rows) { return tokens + 4 * rows + 4; }

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
  float* nearest;       // [padded_tokens]: similarity to the nearest center; +inf: not finite, NaN: not available
  float* norm_factors;  // [padded_tokens]
  unsigned* gram;       // [groups, triangle(max_candidates) rounded up to 4]
  unsigned* arrivals;   // [groups, kBarrierPitch], zero at launch
  int groups;
  int blocks;          // of a group
  int max_candidates;  // at most kMaxCandidates, triangle(max_candidates) floats at most work_bytes
  int work_bytes;      // of shared memory after RoundsShared
  bool bulk;           // bulk copies where rows allow them

  __host__ __device__ static constexpr int gram_pitch(int max_candidates) {
    return (triangle(max_candidates) + 3) / 4 * 4;
  }
};

struct alignas(128) RoundsShared {
  int candidates[kMaxCandidates];  // ascending
  unsigned candidate_bits[kMaxCandidates];  // ordered_bits of nearest
  float candidate_factors[kMaxCandidates];
  int chosen[kMaxCandidates];  // in this round; -1: a seed out of range
  unsigned chosen_bits[kMaxCandidates];
  float chosen_factors[kMaxCandidates];
  Key slots[2][32];
  unsigned warp_sums[32];
  uint64_t full[kProductStages];
  unsigned count;
  int steps;
};
// In the memory after RoundsShared, between the tiles.
struct SelectShared {
  unsigned bins[kSelectBins];
  unsigned index[kMaxCandidates], bits[kMaxCandidates];
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
    first = (first + 4 * row + 3) / 4 * 4;
    nearest = p.nearest + first;
    norm_factors = p.norm_factors + first;
  }
};

// Calls use(key) for every available token. Neighbours and runs of 1024 tokens are dealt to the threads in different
// orders, so that a period in an image does not put its low scores into a few threads.
template <class Use>
__device__ __forceinline__ void scan_keys(const float* nearest, int n, const Use& use) {
  constexpr int kBatch = 4;
  const int vecs = (n + 3) / 4;
#pragma unroll 1
  for (int run = 0; run * kThreads < vecs; run += kBatch) {
    float4 s[kBatch];
    int vec[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      vec[i] = (run + i) * kThreads + (threadIdx.x ^ ((run + i) * 0x9e3779b1u >> 24));
      s[i] = vec[i] < vecs ? reinterpret_cast<const float4*>(nearest)[vec[i]] : float4{NAN, NAN, NAN, NAN};
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float four[4] = {s[i].x, s[i].y, s[i].z, s[i].w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Key key = make_key(ordered_or_excluded(four[e]), 4 * vec[i] + e);
        if (available(key)) use(key);
      }
    }
  }
}

// What a block does for one batch row or sequence at a time. Blocks of a group take every decision alike.
template <class T>
struct RoundsBlock {
  const RoundsParams<T>& p;
  RoundsShared& sh;
  const Sequence<T>& q;
  const BlockGroup& group;
  Pipeline& pipeline;
  unsigned* gram;  // of the group: lower triangle, row by row

  // norm_factors and nearest of all tokens; nearest is padded with NaN to a multiple of four.
  __device__ void start() const {
    const int64_t warps = int64_t(group.blocks) * kWarps;
    for (int64_t i = int64_t(group.rank) * kWarps + threadIdx.x / 32; i < (q.n + 3) / 4 * 4; i += warps) {
      const bool inside = i < q.n;
      const float factor = inside ? norm_factor(squared_norm(q.x, q.x.data + i * q.x.stride), p.out.cosine) : NAN;
      if (threadIdx.x % 32 == 0) {
        if (inside) q.norm_factors[i] = factor;
        q.nearest[i] = !inside || !p.given.allows(q.row, i) ? NAN : factor == factor ? -INFINITY : INFINITY;
      }
    }
  }

  // Select: the tokens whose key is below a threshold become candidates, at most m of them and at least 3 m / 4 if
  // there are so many. Returns their number, 0 only if no token is available; `bound` becomes the minimum key of the
  // others. Three scans of nearest: the range of keys that holds m tokens for sure, a histogram of it, the candidates.
  // A bin that holds too many tokens is divided again; a bin of width 1 holds one token.
  __device__ int select(int m, Key& bound) const {
    const int tid = threadIdx.x;
    auto& select = *reinterpret_cast<SelectShared*>(pipeline.memory);
    Key min_key = kLastKey;
    scan_keys(q.nearest, q.n, [&](Key key) { min_key = min(min_key, key); });
    Key low = block_min_key(min_key, sh.slots[0]);
    if (!available(low)) return 0;
    Key high = ~block_min_key(~min_key, sh.slots[1]);  // a token of every thread is in the range
    if (!available(high)) high = make_key(kOrderedInfinity, ~0u);

    unsigned below = 0;  // tokens below `low`
    while (true) {
      const Key range = high - low;
      const int digits = 64 - (bits_of(range) ? __clz(bits_of(range)) : 32 + __clz(index_of(range)));
      const int shift = max(0, digits - 10);  // range >> shift < kSelectBins
      for (int bin = tid; bin < kSelectBins; bin += kThreads) select.bins[bin] = 0;
      select.index[tid] = ~0u;
      if (tid == 0) sh.count = 0, sh.steps = kSelectBins;
      __syncthreads();
      scan_keys(q.nearest, q.n, [&](Key key) {
        if (key >= low && key <= high) atomicAdd(&select.bins[(key - low) >> shift], 1u);
      });
      __syncthreads();
      const uint4 bins = reinterpret_cast<const uint4*>(select.bins)[tid];
      const unsigned after = below + scan_block(bins.x + bins.y + bins.z + bins.w);
      unsigned sums[5] = {0, 0, 0, 0, after};  // tokens below each bin
      sums[3] = after - bins.w, sums[2] = sums[3] - bins.z, sums[1] = sums[2] - bins.y, sums[0] = sums[1] - bins.x;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (sums[i] <= unsigned(m) && sums[i + 1] > unsigned(m)) {  // of one thread at most
          sh.steps = 4 * tid + i;
          sh.warp_sums[kWarps] = sums[i];
        }
      }
      __syncthreads();
      if (sh.steps == kSelectBins) {  // all fit
        low = high + 1;
        break;
      }
      low += Key(sh.steps) << shift;
      below = sh.warp_sums[kWarps];
      if (4 * below >= 3 * unsigned(m) || shift == 0) break;
      high = min(high, low + (Key(1) << shift) - 1);
      __syncthreads();  // before the shared variables are set again
    }

    min_key = kLastKey;
    scan_keys(q.nearest, q.n, [&](Key key) {
      if (key < low) {
        const unsigned place = atomicAdd(&sh.count, 1u);
        select.index[place] = index_of(key);
        select.bits[place] = bits_of(key);
      } else {
        min_key = min(min_key, key);
      }
    });
    bound = block_min_key(min_key, sh.slots[0]);
    const int count = sh.count;
    if (tid < count) {
      const unsigned index = select.index[tid];
      int slot = 0;
#pragma unroll 4
      for (int i = 0; i < (count + 3) / 4; ++i) {
        const uint4 four = reinterpret_cast<const uint4*>(select.index)[i];
        slot += (four.x < index) + (four.y < index) + (four.z < index) + (four.w < index);
      }
      sh.candidates[slot] = static_cast<int>(index);
      sh.candidate_bits[slot] = select.bits[tid];
      sh.candidate_factors[slot] = q.norm_factors[index];
    }
    __syncthreads();
    return count;
  }

  // Inclusive sum over the threads of the block.
  __device__ unsigned scan_block(unsigned value) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned other = __shfl_up_sync(~0u, value, step);
      if (lane >= step) value += other;
    }
    if (lane == 31) sh.warp_sums[warp] = value;
    __syncthreads();
    return value + warp_sum(lane < warp ? sh.warp_sums[lane] : 0);
  }

  // Gram: ordered bits of the similarities of the candidates to each other, 0 for NaN; the diagonal is kExcluded. The
  // group's blocks share the tiles of the lower triangle.
  // Update: `nearest` of all tokens with sh.chosen; chosen tokens become NaN. One pass over x, its rows split evenly
  // over the blocks.
  __device__ void multiply_tiles(bool is_gram, int count) const {
    using Sums = ProductSums<T>;
    const int max_lines = pipeline.max_lines();
    // gram: `size` x `size`, as small as it takes for a tile per block
    const auto tiles_of = [&](int size) { return triangle((count + size - 1) / size); };
    int size = 16;
    while (size < min(Sums::kMaxRows, Sums::kMaxCols) && 2 * size + 32 <= max_lines && tiles_of(size) > group.blocks)
      size += 16;
    // update
    const int block_rows = (q.n - 1) / group.blocks + 1, first = group.rank * block_rows;
    const int last = min(first + block_rows, q.n);
    const int max_rows = min(Sums::kMaxRows, max_lines * 5 / 8 / 16 * 16);
    const int row_tiles = first < last ? (last - first - 1) / max_rows + 1 : 0;
    const int tile_rows = row_tiles ? (last - first - 1) / row_tiles + 1 : 1;
    const int max_cols = min(Sums::kMaxCols, max_lines - (tile_rows + 15) / 16 * 16);
    const int col_tiles = (count - 1) / max_cols + 1, tile_cols = (count - 1) / col_tiles + 1;

    const int tiles = is_gram ? tiles_of(size) : row_tiles * col_tiles, stride = is_gram ? group.blocks : 1;
#pragma unroll 1
    for (int tile = is_gram ? group.rank : 0; tile < tiles; tile += stride) {
      Lines lines;
      int row, col;  // of the tile
      if (is_gram) {
        for (row = 0, col = tile; col > row; col -= ++row) {}
        row *= size, col *= size;
        lines = {sh.candidates + row, 0, min(size, count - row), sh.candidates + col, min(size, count - col)};
      } else {
        row = first + tile / col_tiles * tile_rows, col = tile % col_tiles * tile_cols;
        lines = {nullptr, row, min(tile_rows, last - row), sh.chosen + col, min(tile_cols, count - col)};
      }
      const Products<T> products = multiply(q.x, lines, pipeline);
      if (is_gram)
        write_gram(products, lines, row, col);
      else
        update_rows(products, lines, col);
    }
  }

  __device__ __forceinline__ void write_gram(const Products<T>& products, const Lines& lines, int row, int col) const {
    for (int i = threadIdx.x; i < lines.rows * lines.cols; i += kThreads) {
      const int r = i / lines.cols, c = i % lines.cols, at = row + r, other = col + c;
      if (other > at) continue;
      const float sim = similarity(products.at(r, c), sh.candidate_factors[at], sh.candidate_factors[other],
                                   p.out.cosine);
      gram[triangle(at) + other] = at == other ? kExcluded : sim == sim ? ordered_bits(sim) : 0;
    }
  }

  __device__ __forceinline__ void update_rows(const Products<T>& products, const Lines& lines, int col) const {
    const int tid = threadIdx.x, threads = lines.rows > 128 ? 1 : lines.rows > 64 ? 2 : lines.rows > 32 ? 4 : 8;
    const int row = tid / threads, token = lines.first + row;
    float best = -INFINITY;
    if (row < lines.rows) {
      const float factor = q.norm_factors[token];
#pragma unroll 4
      for (int c = tid % threads; c < lines.cols; c += threads)
        best = update_max(best, similarity(products.at(row, c), factor, sh.chosen_factors[col + c], p.out.cosine));
    }
    for (int step = 1; step < threads; step *= 2) best = update_max(best, __shfl_xor_sync(~0u, best, step));
    if (row < lines.rows && tid % threads == 0) q.nearest[token] = update_max(q.nearest[token], best);
    __syncthreads();
    for (int c = tid; c < lines.cols; c += kThreads) {
      const int center = sh.chosen[col + c];
      if (center >= lines.first && center < lines.first + lines.rows) q.nearest[center] = NAN;
    }
  }

  // Greedy: steps among the candidates while their minimum key is below `bound`, by one warp. Fills sh.chosen and
  // returns the number of steps. Called after a sync.
  __device__ int greedy(int count, Key bound, int64_t max_steps) const {
    auto* sims = reinterpret_cast<unsigned*>(pipeline.memory);
    for (int i = 4 * threadIdx.x; i < triangle(count); i += 4 * kThreads) cp_async_16(sims + i, gram + i, 16);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (threadIdx.x < 32) greedy_steps(sims, count, bound, static_cast<int>(min(max_steps, int64_t(count))));
    __syncthreads();
    return sh.steps;
  }

  // Lane l has the candidates l + 32 i. An element of the triangle is read along its row or its column: at most two
  // lanes meet in a bank.
  __device__ __forceinline__ void greedy_steps(const unsigned* sims, int count, Key bound, int max_steps) const {
    constexpr int kPerLane = kMaxCandidates / 32;
    const int lane = threadIdx.x % 32;
    unsigned s[kPerLane];  // ordered bits of nearest
    int row[kPerLane];     // of the triangle
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int slot = lane + 32 * i;
      s[i] = slot < count ? sh.candidate_bits[slot] : kExcluded;
      row[i] = triangle(min(slot, count - 1));
    }
    int steps = 0;
    for (; steps < max_steps; ++steps) {
      unsigned lowest = s[0];
#pragma unroll
      for (int i = 1; i < kPerLane; ++i) lowest = min(lowest, s[i]);
      const unsigned bits = warp_min(lowest);
      int place = lane + 32 * (kPerLane - 1);
#pragma unroll
      for (int i = kPerLane - 2; i >= 0; --i)
        if (s[i] == lowest) place = lane + 32 * i;
      const int slot = warp_min(lowest == bits ? place : ~0u);
      const int token = sh.candidates[slot];
      if (bits == kExcluded || make_key(bits, token) >= bound) break;
      if (lane == 0) {
        sh.chosen[steps] = token;
        sh.chosen_bits[steps] = bits;
        sh.chosen_factors[steps] = sh.candidate_factors[slot];
      }
      const unsigned* along = sims + triangle(slot) + lane;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (32 * i < count) s[i] = max(s[i], lane + 32 * i <= slot ? along[32 * i] : sims[row[i] + slot]);
    }
    if (lane == 0) sh.steps = steps;
  }

  // Takes the seeds from `done` on. Returns their number.
  __device__ int take_seeds(int64_t done) const {
    const int tid = threadIdx.x, steps = static_cast<int>(min(p.given.seeds_count - done, int64_t(kMaxCandidates)));
    if (tid < steps) {
      const int seed = p.given.seed(q.row, done + tid, q.begin, q.n);
      sh.chosen[tid] = seed;
      sh.chosen_factors[tid] = seed < 0 ? NAN : q.norm_factors[seed];
      if (group.rank == 0)
        p.out.write(q.out_offset + done + tid, seed < 0 ? -1 : q.begin + seed, seed < 0 ? NAN : -INFINITY);
    }
    __syncthreads();
    return steps;
  }
};

// A group of p.blocks blocks per batch row or sequence. Two syncs a round.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) kcenter_rounds(const __grid_constant__ RoundsParams<T> p) {
  RoundsShared& sh = shared<RoundsShared>();
  const int tid = threadIdx.x, group_index = blockIdx.x / p.blocks;
  BlockGroup group{p.arrivals + group_index * kBarrierPitch, p.blocks, int(blockIdx.x % p.blocks)};
  unsigned* gram = p.gram + int64_t(group_index) * p.gram_pitch(p.max_candidates);
  Pipeline pipeline{reinterpret_cast<unsigned char*>(&sh + 1), p.work_bytes, p.bulk ? sh.full : nullptr};
  if (tid == 0) pipeline.init();

  for (int64_t row = group_index; row < p.rows; row += p.groups) {
    const Sequence<T> q(p, row);
    if (q.k == 0) continue;
    const RoundsBlock<T> block{p, sh, q, group, pipeline, gram};
    block.start();
    group.sync();

    // Lazy rounds. The gram and the update of a round are one loop around the only call of multiply_tiles.
    bool is_gram = false;
    int count = 0;
    Key bound = kLastKey;
    for (int64_t done = 0; done < q.k;) {
      int steps = 0;
      if (is_gram) {
        steps = block.greedy(count, bound, q.k - done);
        is_gram = false;
      } else if (done < p.given.seeds_count) {
        steps = block.take_seeds(done);
        done += steps;
      } else {
        count = block.select(done == 0 ? 1 : p.max_candidates, bound);
        if (count == 0) {
          if (group.rank == 0)
            for (int64_t i = done + tid; i < q.k; i += kThreads) p.out.write(q.out_offset + i, -1, NAN);
          break;
        }
        is_gram = true;
      }
    }
  }
}

}  // namespace pruneops
