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
  unsigned* nearest;    // [padded_tokens]: ordered_bits of the similarity to the nearest center; that of +inf: the
                        // token is not finite; kExcluded: not available
  float* norm_factors;  // [padded_tokens]
  unsigned* gram;       // [groups, triangle(max_candidates) rounded up to 4]
  unsigned* arrivals;   // [groups, kBarrierPitch], zero at launch
  int groups;
  int blocks;          // of a group
  int max_candidates;  // at most kMaxCandidates, triangle(max_candidates) floats at most work_bytes
  int work_bytes;      // of shared memory after RoundsShared

  __host__ __device__ static constexpr int gram_pitch(int max_candidates) {
    return (triangle(max_candidates) + 3) / 4 * 4;
  }
};

// One batch row or sequence.
struct Sequence {
  int n;
  int64_t row;     // of seeds and mask
  int64_t begin;   // added to every index in the output
  int64_t offset;  // of its first token in x
  int64_t place;   // in nearest and norm_factors
  int64_t out_offset;
  int64_t k;

  template <class T>
  __device__ Sequence(const RoundsParams<T>& p, int64_t row)
      : row(row), begin(0), out_offset(row * p.budget), k(p.budget) {
    int64_t end = p.tokens;
    place = row * p.tokens;
    if (p.cu_seqlens) {
      place = begin = max(int64_t(0), min(p.cu_seqlens[row], p.tokens));
      end = max(begin, min(p.cu_seqlens[row + 1], p.tokens));
      out_offset = p.offsets[row];
      k = p.offsets[row + 1] - out_offset;
    }
    n = static_cast<int>(end - begin);
    offset = row * p.x.batch_stride + begin * p.x.row_stride;
    place = (place + 4 * row + 3) / 4 * 4;
  }
};

struct alignas(128) RoundsShared {
  Sequence q;
  int candidates[kMaxCandidates];  // ascending
  unsigned candidate_bits[kMaxCandidates];  // ordered_bits of nearest
  float candidate_factors[kMaxCandidates];
  int chosen[kMaxCandidates];  // in this round; -1: a seed out of range
  unsigned chosen_bits[kMaxCandidates];
  float chosen_factors[kMaxCandidates];
  unsigned warp_low[kWarps], warp_high[kWarps], warp_sums[kWarps];
  unsigned count;
  int steps;
  int crossing;
  unsigned before_crossing;
};
// In the memory after RoundsShared, between the tiles; followed by a copy of `nearest` if that fits.
struct SelectShared {
  unsigned bins[kSelectBins];
  unsigned index[kMaxCandidates], bits[kMaxCandidates];
};

// Calls use(four, first) for all tokens, four at a time. Runs of 1024 tokens are dealt to the threads in different
// orders, so that a period in an image does not put its low scores into a few threads.
template <class Use>
__device__ __forceinline__ void scan_tokens(const unsigned* nearest, int n, const Use& use) {
  constexpr int kBatch = 6;
  const int vecs = (n + 3) / 4;
#pragma unroll 1
  for (int run = 0; run * kThreads < vecs; run += kBatch) {
    uint4 four[kBatch];
    int vec[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      vec[i] = (run + i) * kThreads + (threadIdx.x ^ ((run + i) * 0x9e3779b1u >> 24));
      if (vec[i] < vecs) four[i] = reinterpret_cast<const uint4*>(nearest)[vec[i]];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (vec[i] < vecs) use(four[i], 4 * vec[i]);
  }
}
template <class Use>
__device__ __forceinline__ void scan_each(const unsigned* nearest, int n, const Use& use) {
  scan_tokens(nearest, n, [&](const uint4& four, int first) {
    use(four.x, first);
    use(four.y, first + 1);
    use(four.z, first + 2);
    use(four.w, first + 3);
  });
}

// What a block does for one batch row or sequence at a time. Blocks of a group take every decision alike.
template <class T>
struct RoundsBlock {
  const RoundsParams<T>& p;
  RoundsShared& sh;
  const Sequence& q;  // in shared memory: registers are scarce
  const BlockGroup& group;
  const Pipeline& pipeline;
  unsigned* gram;  // of the group: lower triangle, row by row

  __device__ Matrix<T> x() const { return p.x.matrix(q.offset); }
  __device__ const T* token_row(int64_t token) const { return p.x.data + q.offset + token * p.x.row_stride; }
  __device__ unsigned* nearest() const { return p.nearest + q.place; }
  __device__ float* norm_factors() const { return p.norm_factors + q.place; }

  // Sums over the features of a row's squares and of its products with `center` (null: the row itself), by a warp.
  __device__ __forceinline__ float2 square_and_dot(const T* row, const uint4* center) const {
    constexpr int kBatch = 8, kStride = 32 * kVecSize<T>;
    float2 sums{0, 0};
    const auto add = [&](uint4 vec, int k) {
      sums.x = add_squares<T>(sums.x, vec);
      sums.y = add_products<T>(sums.y, vec, center ? center[k / kVecSize<T>] : vec);
    };
    int k = threadIdx.x % 32 * kVecSize<T>;
    if (p.x.aligned) {
      for (; k + (kBatch - 1) * kStride + kVecSize<T> <= p.x.width; k += kBatch * kStride) {
        uint4 vecs[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) vecs[i] = load_vec(row + k + i * kStride);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) add(vecs[i], k + i * kStride);
      }
    }
#pragma unroll 1
    for (; k < p.x.width; k += kStride) add(load_vec_padded(x(), row, k), k);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      sums.x += __shfl_xor_sync(~0u, sums.x, step);
      sums.y += __shfl_xor_sync(~0u, sums.y, step);
    }
    return sums;
  }

  // The first allowed token, n if there is none.
  __device__ int first_allowed() const {
    if (!p.given.mask.data) return 0;
    __syncthreads();
    if (threadIdx.x == 0) sh.count = q.n;
    __syncthreads();
    for (int i = threadIdx.x; i < q.n; i += kThreads) {
      if (!p.given.allows(q.row, i)) continue;
      atomicMin(&sh.count, unsigned(i));
      break;
    }
    __syncthreads();
    return sh.count;
  }

  // norm_factors and nearest of all tokens. Without seeds the first choice is the first allowed token, unless it is not
  // finite: it is taken in the same pass over x. Returns the number of choices, 0 or 1.
  __device__ int start() const {
    const int vecs = (p.x.width + kVecSize<T> - 1) / kVecSize<T>;
    auto* center_row = reinterpret_cast<uint4*>(pipeline.memory);
    int center = p.given.seeds_count > 0 || vecs * 16 > pipeline.bytes ? q.n : first_allowed();
    float center_factor = NAN;
    if (center < q.n) {
      const T* row = token_row(center);
      for (int i = threadIdx.x; i < vecs; i += kThreads) center_row[i] = load_vec_padded(x(), row, i * kVecSize<T>);
      center_factor = norm_factor(square_and_dot(row, nullptr).x, p.out.cosine);
      __syncthreads();
    }
    if (!(center_factor == center_factor)) center = -1;
    const int64_t warps = int64_t(group.blocks) * kWarps;
    for (int64_t i = int64_t(group.rank) * kWarps + threadIdx.x / 32; i < q.n; i += warps) {
      const float2 sums = square_and_dot(token_row(i), center < 0 ? nullptr : center_row);
      const float factor = norm_factor(sums.x, p.out.cosine);
      if (threadIdx.x % 32 != 0) continue;
      const float sim = center < 0 ? -INFINITY : similarity(sums.y, factor, center_factor, p.out.cosine);
      norm_factors()[i] = factor;
      nearest()[i] = i == center || !p.given.allows(q.row, i) ? kExcluded
                     : factor == factor                       ? ordered_bits(sim)
                                                              : kOrderedInfinity;
    }
    if (group.rank == 0 && threadIdx.x < 3 && q.n + threadIdx.x < (q.n + 3) / 4 * 4)
      nearest()[q.n + threadIdx.x] = kExcluded;  // read in vectors of four
    if (center >= 0 && group.rank == 0 && threadIdx.x == 0) p.out.write(q.out_offset, q.begin + center, -INFINITY);
    return center >= 0;
  }

  // Select: the tokens whose key is below a threshold become candidates, at most m of them and at least 3 m / 4 if
  // there are so many. Returns their number, 0 only if no token is available; `bound` becomes the threshold.
  //
  // The tokens of lowest bits of all threads are in the range [low, high], so that it holds m tokens or all. Its bits
  // fall into equal bins, and the threshold is the upper edge of as many bins as fit; if these hold too few tokens, the
  // next bin is divided again, and at the last tokens of equal bits by their index.
  __device__ int select(int m, Key& bound) const {
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    auto& select = *reinterpret_cast<SelectShared*>(pipeline.memory);
    auto* copy = reinterpret_cast<uint4*>(&select + 1);
    const bool copied = sizeof(SelectShared) + 4 * (int64_t(q.n) + 3) <= pipeline.bytes;
    const unsigned* bits_of_all = copied ? reinterpret_cast<unsigned*>(copy) : nearest();
    unsigned low = kExcluded;
    scan_tokens(nearest(), q.n, [&](const uint4& four, int first) {
      if (copied) copy[first / 4] = four;  // read by the same thread
      low = min(low, min(min(four.x, four.y), min(four.z, four.w)));
    });
    unsigned high = ~warp_min(~low);
    low = warp_min(low);
    if (lane == 0) sh.warp_low[warp] = low, sh.warp_high[warp] = high;
    clear_bins(select);
    low = warp_min(sh.warp_low[lane % kWarps]);
    high = ~warp_min(~sh.warp_high[lane % kWarps]);
    if (low == kExcluded) return 0;
    if (high == kExcluded) high = kOrderedInfinity;  // a thread has no available token

    unsigned below = 0;  // tokens below the range
    unsigned tie = kExcluded;  // else the range is of indices of tokens with these bits
    while (true) {
      const int shift = max(0, 22 - __clz(high - low));  // (high - low) >> shift < kSelectBins
      scan_each(bits_of_all, q.n, [&](unsigned bits, int token) {
        const unsigned place = (tie == kExcluded ? bits : unsigned(token)) - low;
        if (place <= high - low && (tie == kExcluded || tie == bits)) atomicAdd(&select.bins[place >> shift], 1u);
      });
      __syncthreads();
      find_crossing(select, below, m);
      const int crossing = sh.crossing;
      if (crossing == kSelectBins) {  // all fit
        low = high + 1;
        break;
      }
      low += unsigned(crossing) << shift;
      below = sh.before_crossing;
      if (4 * below >= 3 * unsigned(m) || (shift == 0 && tie != kExcluded)) break;
      if (shift > 0) {
        high = min(high, low + (1u << shift) - 1);
      } else {
        tie = low;
        low = 0;
        high = q.n - 1;
      }
      __syncthreads();  // before the shared variables are set again
      clear_bins(select);
    }
    bound = tie == kExcluded ? make_key(low, 0) : make_key(tie, low);
    scan_each(bits_of_all, q.n, [&](unsigned bits, int token) {
      if (bits > bits_of(bound) || make_key(bits, token) >= bound) return;
      const unsigned place = atomicAdd(&sh.count, 1u);
      select.index[place] = token;
      select.bits[place] = bits;
    });
    __syncthreads();
    const int count = sh.count;
    if (tid < count) {  // in order of their index
      const unsigned index = select.index[tid];
      int slot = 0;
#pragma unroll 4
      for (int i = 0; i < (count + 3) / 4; ++i) {
        const uint4 four = reinterpret_cast<const uint4*>(select.index)[i];
        slot += (four.x < index) + (four.y < index) + (four.z < index) + (four.w < index);
      }
      sh.candidates[slot] = static_cast<int>(index);
      sh.candidate_bits[slot] = select.bits[tid];
      sh.candidate_factors[slot] = norm_factors()[index];
    }
    __syncthreads();
    return count;
  }

  __device__ void clear_bins(SelectShared& select) const {
    const int tid = threadIdx.x;
    reinterpret_cast<uint4*>(select.bins)[tid] = {0, 0, 0, 0};
    select.index[tid] = ~0u;
    if (tid == 0) sh.count = 0, sh.crossing = kSelectBins;
    __syncthreads();
  }

  // sh.crossing: the first bin up to which there are more than m tokens; sh.before_crossing: tokens before it.
  __device__ void find_crossing(const SelectShared& select, unsigned below, unsigned m) const {
    const uint4 bins = reinterpret_cast<const uint4*>(select.bins)[threadIdx.x];
    unsigned sums[5];  // tokens before each bin
    sums[4] = below + scan_block(bins.x + bins.y + bins.z + bins.w);
    sums[3] = sums[4] - bins.w;
    sums[2] = sums[3] - bins.z;
    sums[1] = sums[2] - bins.y;
    sums[0] = sums[1] - bins.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (sums[i] <= m && sums[i + 1] > m) {  // of one thread at most
        sh.crossing = 4 * threadIdx.x + i;
        sh.before_crossing = sums[i];
      }
    }
    __syncthreads();
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
  // Update: `nearest` of all tokens with sh.chosen; chosen tokens become kExcluded. One pass over x, its rows split
  // evenly over the blocks.
  __device__ void multiply_tiles(bool is_gram, int count) const {
    using Sums = ProductSums<T>;
    const int max_lines = pipeline.max_lines();
    // gram: `size` x `size`, as small as it takes for a tile per block
    const auto tiles_of = [&](int size) { return triangle((count + size - 1) / size); };
    const int max_size = min(min(Sums::kMaxRows, Sums::kMaxCols / 2), max_lines / 32 * 16);
    int size = 16;
    while (size < max_size && tiles_of(size) > group.blocks) size += 16;
    // update: all columns at once, so that x is read once
    const int block_rows = (q.n - 1) / group.blocks + 1, first = group.rank * block_rows;
    const int last = min(first + block_rows, q.n);
    int max_rows = min(Sums::kMaxRows, max_lines * 5 / 8 / 16 * 16);
    if (count > Sums::max_cols(max_rows)) max_rows = min(max_rows, Sums::kMaxRows / 2);
    const int row_tiles = first < last ? (last - first - 1) / max_rows + 1 : 0;
    const int tile_rows = row_tiles ? (last - first - 1) / row_tiles + 1 : 1;
    const int max_cols = min(Sums::max_cols(tile_rows), max_lines - (tile_rows + 15) / 16 * 16);
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
      const Products<T> products = multiply(x(), lines, pipeline);
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
      const float factor = norm_factors()[token];
#pragma unroll 4
      for (int c = tid % threads; c < lines.cols; c += threads)
        best = update_max(best, similarity(products.at(row, c), factor, sh.chosen_factors[col + c], p.out.cosine));
    }
    for (int step = 1; step < threads; step *= 2) best = update_max(best, __shfl_xor_sync(~0u, best, step));
    if (row < lines.rows && tid % threads == 0) nearest()[token] = max(nearest()[token], ordered_bits(best));
    __syncthreads();
    for (int c = tid; c < lines.cols; c += kThreads) {
      const int center = sh.chosen[col + c];
      if (center >= lines.first && center < lines.first + lines.rows) nearest()[center] = kExcluded;
    }
  }

  // Greedy: steps among the candidates while their minimum key is below `bound`, by one warp. Fills sh.chosen and
  // returns the number of steps. Called after a sync.
  __device__ int greedy(int count, Key bound, int64_t max_steps) const {
    auto* sims = reinterpret_cast<unsigned*>(pipeline.memory);
    const int all = count > 1 ? triangle(count) : 0;
    for (int i = 4 * threadIdx.x; i < all; i += 4 * kThreads) cp_async_16(sims + i, gram + i, min(16, 4 * (all - i)));
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (threadIdx.x < 32) greedy_steps(sims, count, bound, static_cast<int>(min(max_steps, int64_t(count))));
    __syncthreads();
    if (int(threadIdx.x) < sh.steps) {
      const int slot = sh.chosen[threadIdx.x];
      sh.chosen[threadIdx.x] = sh.candidates[slot];
      sh.chosen_factors[threadIdx.x] = sh.candidate_factors[slot];
    }
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
      if (bits >= bits_of(bound) && (bits == kExcluded || make_key(bits, sh.candidates[slot]) >= bound)) break;
      if (lane == 0) sh.chosen[steps] = slot, sh.chosen_bits[steps] = bits;
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
      sh.chosen_factors[tid] = seed < 0 ? NAN : norm_factors()[seed];
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
  const Pipeline pipeline{reinterpret_cast<unsigned char*>(&sh + 1), p.work_bytes};
  const Sequence& q = sh.q;

  for (int64_t row = group_index; row < p.rows; row = q.row + p.groups) {
    __syncthreads();
    if (tid == 0) sh.q = Sequence(p, row);
    __syncthreads();
    if (q.k == 0) continue;
    const RoundsBlock<T> block{p, sh, q, group, pipeline, gram};
    const int first = block.start();
    group.sync();

    int count = 0;  // candidates whose gram has been computed
    Key bound;
    for (int64_t done = first; done < q.k;) {  // gram or update
      int steps = 0;
      if (count > 0) {
        steps = block.greedy(count, bound, q.k - done);
        count = 0;
      } else if (done < p.given.seeds_count) {
        steps = block.take_seeds(done);
      } else {
        count = block.select(done == 0 ? 1 : p.max_candidates, bound);
        if (count == 0) {
          if (group.rank == 0)
            for (int64_t i = done + tid; i < q.k; i += kThreads) p.out.write(q.out_offset + i, -1, NAN);
          break;
        }
        if (count == 1) {  // needs no similarities
          group.sync();    // before nearest is updated
          steps = block.greedy(count, bound, 1);
        }
      }
      if (steps > 0) {
        if (group.rank == 0 && tid < steps && done >= p.given.seeds_count)
          p.out.write(q.out_offset + done + tid, q.begin + sh.chosen[tid], score_of(sh.chosen_bits[tid]));
        done += steps;
        count = 0;
        if (done == q.k || q.n == 0) continue;
      }
      block.multiply_tiles(count > 0, count > 0 ? count : steps);
      group.sync();
    }
  }
}

}  // namespace pruneops
