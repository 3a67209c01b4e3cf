// Kernels of greedy k-center selection; kcenter.cu says what they compute, when each runs and what it costs.

#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/keys.cuh"
#include "cuda/primitives.cuh"
#include "cuda/similarity.cuh"
#include "cuda/block_group.cuh"
#include "cuda/tile.cuh"
#include "cuda/views.cuh"

namespace pruneops {

constexpr int kMaxCandidates = kTile;
constexpr int kMaxSequences = 256;  // of one launch: their budgets travel by value
constexpr int kGreedyThreads = 1024;
constexpr int kGreedyTokens = 4 * kGreedyThreads;
constexpr int kGreedyBytes = 2 * 32 * sizeof(Key);

// seeds [B, P], may be null, and mask [B, N].
struct Companions {
  const int64_t* seeds;
  int64_t seeds_stride[2];
  int64_t seeds_count;
  Flags mask;

  // Seed `step` of a batch row as an index below `n`, or -1 if it is none.
  __device__ int seed(int64_t row, int64_t step, int64_t begin, int n) const {
    const int64_t token = seeds[row * seeds_stride[0] + step * seeds_stride[1]] - begin;
    return token >= 0 && token < n ? static_cast<int>(token) : -1;
  }
  __device__ bool allows(int64_t row, int64_t token) const { return mask.at(row, token, true); }
};

struct Output {
  int64_t* indices;
  float* radii;
  bool cosine;

  // `similarity` to the set chosen before; NaN where there was no token left.
  __device__ void write(int64_t at, int64_t token, float similarity) const {
    const float distance = cosine ? fmaxf(0.0f, 1.0f - similarity) : sqrtf(fmaxf(0.0f, -similarity));
    indices[at] = token;
    radii[at] = similarity < INFINITY ? distance : NAN;
  }
};

__device__ __forceinline__ float nearer(float s, float sim) { return s < sim ? sim : s; }  // false with NaN

// Four tokens learn of a center by their similarities to it; the one that it is, if any, leaves the pool.
__device__ __forceinline__ void take_four(float (&s)[4], const float* similarities, int center) {
  const float4 row = *reinterpret_cast<const float4*>(similarities);
  s[0] = nearer(s[0], row.x);
  s[1] = nearer(s[1], row.y);
  s[2] = nearer(s[2], row.z);
  s[3] = nearer(s[3], row.w);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i == center) s[i] = NAN;
}

// ---------------------------------------------------------------------------------------------------------------
// Form (i), Gram: three launches, memory [B, N, N].

// norms [B, N]: companion_of every token; zeros in gram [B, N, pitch] past column N. A warp per token.
template <class T>
__global__ void __launch_bounds__(kThreads)
    kcenter_norms(Tokens<T> x, int64_t batch, int n, float* norms, float* gram, int pitch, bool cosine) {
  const int64_t warps = int64_t(gridDim.x) * kWarps;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; i < batch * n; i += warps) {
    const Matrix<T> matrix = x.matrix(i / n * x.batch_stride + i % n * x.row_stride);
    const float norm = companion_of(squared_norm(matrix, matrix.data), cosine);
    const int lane = threadIdx.x % 32;
    if (lane == 0) norms[i] = norm;
    if (lane < pitch - n) gram[i * pitch + n + lane] = 0;
  }
}

// gram [B, N, pitch]: similarities of all pairs. A block per 128 x 128 tile on or below the diagonal, which writes
// the tile and its mirror image. ALIGNED is x.aligned.
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, ALIGNED && sizeof(T) == 2 ? kPipelinesPerProcessor : 1)
    kcenter_gram(Tokens<T> x, int n, const float* norms, float* gram, int pitch, bool cosine) {
  struct Shared {
    unsigned char pipeline[kPipelineBytes];
  };
  const int side = (n + kTile - 1) / kTile;
  const int tiles = side * (side + 1) / 2;
  const int64_t b = blockIdx.x / tiles;
  int down = 0, across = blockIdx.x % tiles;
  while (across > down) across -= ++down;
  const Rows rows{nullptr, down * kTile, min(kTile, n - down * kTile)};
  const Rows cols{nullptr, across * kTile, min(kTile, n - across * kTile)};

  Sums<T, true> out(rows.count);
  Matrix<T> matrix = x.matrix(b * x.batch_stride);
  matrix.aligned = ALIGNED;  // known to the compiler: the other way of copying would cost registers
  multiply_rows(out, matrix, rows, cols, shared<Shared>().pipeline);

  norms += b * n;
  gram += b * n * pitch;
  float norm[Sums<T, true>::kRows];  // of this thread's rows
#pragma unroll
  for (int i = 0; i < Sums<T, true>::kRows; ++i) norm[i] = norms[rows.first + min(out.row(i), rows.count - 1)];
#pragma unroll
  for (int j = 0; j < Sums<T, true>::kCols; ++j) {
    if (out.col(j) >= cols.count) continue;
    const int c = cols.first + out.col(j);
    const float own = norms[c];
#pragma unroll
    for (int i = 0; i < Sums<T, true>::kRows; ++i) {
      if (out.row(i) >= rows.count) continue;
      const int r = rows.first + out.row(i);
      const float sim = similarity(out.at(i, j), norm[i], own, cosine);
      gram[int64_t(r) * pitch + c] = sim;
      if (down != across) gram[int64_t(c) * pitch + r] = sim;
    }
  }
}

// One block per batch row, four tokens per thread, their running maxima in registers, one barrier per step.
__global__ void __launch_bounds__(kGreedyThreads)
    kcenter_greedy(const float* gram, int pitch, const float* norms, int n, int64_t k, Companions given, Output out) {
  struct Shared {
    Key least[2][32];  // of each warp; steps alternate between the two
  };
  Shared& sh = shared<Shared>();
  const int64_t b = blockIdx.x;
  const int tid = threadIdx.x;
  gram += b * n * pitch + 4 * tid;
  norms += b * n;

  float s[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = 4 * tid + i;
    s[i] = NAN;
    if (token < n && given.allows(b, token)) s[i] = norms[token] == norms[token] ? -INFINITY : INFINITY;
  }
  const auto take = [&](int token) {
    if (4 * tid < n) take_four(s, gram + int64_t(token) * pitch, token - 4 * tid);
  };

  int64_t step = 0;
  for (; step < given.seeds_count; ++step) {
    const int token = given.seed(b, step, 0, n);
    if (tid == 0) out.write(b * k + step, token, token < 0 ? NAN : -INFINITY);
    if (token >= 0) take(token);
  }
  for (; step < k; ++step) {
    Key best = kNoKey;
#pragma unroll
    for (int i = 0; i < 4; ++i) best = min(best, make_key(ordered(s[i]), 4 * tid + i));
    best = block_least(best, sh.least[step % 2]);
    const bool found = available(best);
    if (tid == 0) out.write(b * k + step, found ? int(index_of(best)) : -1, found ? score_of(order_of(best)) : NAN);
    if (found) take(index_of(best));
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Form (ii), lazy rounds: one cooperative launch, memory O(N) and 64 KB a team.

template <class T>
struct Lazy {
  Tokens<T> x;
  Companions given;
  Output out;
  const int64_t* cu_seqlens;  // null: batch rows of `tokens` each, `budget` from each
  int64_t tokens;             // N, or T
  int64_t rows;               // batch rows, or sequences of this launch
  int64_t budget;
  int64_t offsets[kMaxSequences + 1];  // where the choices of each sequence of this launch begin
  float* nearest;      // [B, N] or [T]: similarity to the nearest center, +inf not finite, NaN not available
  float* norms;        // [B, N] or [T]: companion_of
  float* products;     // [teams, candidates, candidates]
  unsigned* arrivals;  // [teams, kTeamPitch], zero
  int teams;
  int blocks;      // of a team
  int candidates;  // at most kMaxCandidates
};

struct LazyShared {
  union {
    unsigned char pipeline[kPipelineBytes];
    float products[kMaxCandidates * kMaxCandidates];
    float partial[32 * kTile];  // greatest similarity of each tile row, by slot
    struct {
      Key least[kThreads];  // of each class of tokens
      Key sorted[kMaxCandidates];
      Key found[kMaxCandidates];
      unsigned below[kMaxCandidates];  // tokens between two of `sorted`
      unsigned count;
    } select;
  };
  int candidate[kMaxCandidates];  // ascending
  float score[kMaxCandidates];    // nearest of each candidate
  int chosen[kMaxCandidates];     // in this round; -1: a seed out of range
  float chosen_norm[kMaxCandidates];
  float chosen_score[kMaxCandidates];
  Key warp_least[kWarps];
  int taken;
};

// One batch row or sequence as a team sees it.
template <class T>
struct Sequence {
  Matrix<T> x;
  int n;
  int64_t row;    // of seeds and mask
  int64_t begin;  // index of its first token in the tensor that choices refer to
  int64_t at;     // where its choices go
  int64_t k;
  float* nearest;
  float* norms;

  __device__ Sequence(const Lazy<T>& p, int64_t row) : row(row), begin(0), at(row * p.budget), k(p.budget) {
    int64_t first = row * p.tokens, end = p.tokens;
    if (p.cu_seqlens) {
      first = begin = max(int64_t(0), min(p.cu_seqlens[row], p.tokens));
      end = max(begin, min(p.cu_seqlens[row + 1], p.tokens));
      at = p.offsets[row];
      k = p.offsets[row + 1] - at;
    }
    n = static_cast<int>(end - begin);
    x = p.x.matrix(row * p.x.batch_stride + begin * p.x.row_stride);
    nearest = p.nearest + first;
    norms = p.norms + first;
  }
};

// Calls use(key) for every available token, those of one class by one thread. Classes mix the positions in a run of
// 256, so that no period of an image puts all its low scores into a few of them.
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
      const Key key = make_key(ordered(s[i]), token[i]);
      if (available(key)) use(key);
    }
  }
}

// Fills sh.candidate and sh.score with the tokens whose key is under a threshold, at most m, and returns how many;
// `bound` becomes the least key of the others. Every block of a team, just after a meeting, finds the same. None only
// if none is available.
//
// The least keys of 256 classes of tokens, sorted, are the possible thresholds; the greatest that lets no more than m
// tokens through is taken. Where low scores fall into the classes at random that is 97 to 100 % of m.
__device__ inline int select_candidates(LazyShared& sh, const float* nearest, int n, int m, Key& bound) {
  const int tid = threadIdx.x;
  auto& select = sh.select;
  Key least = kNoKey;
  scan_keys(nearest, n, [&](Key key) { least = min(least, key); });
  select.least[tid] = least;
  if (tid < kMaxCandidates) select.below[tid] = 0;
  if (tid == 0) select.count = 0;
  __syncthreads();
  int rank = 0, classes = 0;
#pragma unroll 8
  for (int i = 0; i < kThreads; ++i) {
    rank += select.least[i] < least;
    classes += available(select.least[i]);
  }
  if (classes == 0) return 0;
  const int thresholds = min(m, classes);
  if (available(least) && rank < thresholds) select.sorted[rank] = least;
  __syncthreads();

  const Key highest = select.sorted[thresholds - 1];
  scan_keys(nearest, n, [&](Key key) {
    if (key > highest) return;
    int low = 0, high = thresholds - 1;  // first threshold not below key
    while (low < high) {
      const int middle = (low + high) / 2;
      if (select.sorted[middle] < key)
        low = middle + 1;
      else
        high = middle;
    }
    atomicAdd(&select.below[low], 1u);
  });
  __syncthreads();
  unsigned through = 0;
  if (tid < thresholds) {
#pragma unroll 8
    for (int i = 0; i <= tid; ++i) through += select.below[i];
  }
  const int fitting = __syncthreads_count(tid < thresholds && through <= unsigned(m));  // the first always does
  const Key threshold = select.sorted[fitting - 1];

  least = kNoKey;
  scan_keys(nearest, n, [&](Key key) {
    if (key <= threshold)
      select.found[atomicAdd(&select.count, 1u)] = key;
    else
      least = min(least, key);
  });
  least = warp_least(least);
  if (tid % 32 == 0) sh.warp_least[tid / 32] = least;
  __syncthreads();
  const int count = select.count;
  bound = warp_least(tid % 32 < kWarps ? sh.warp_least[tid % 32] : kNoKey);
  if (tid < count) {
    const Key key = select.found[tid];
    int place = 0;
    for (int i = 0; i < count; ++i) place += index_of(select.found[i]) < index_of(key);
    sh.candidate[place] = static_cast<int>(index_of(key));
    sh.score[place] = score_of(order_of(key));
  }
  __syncthreads();
  return count;
}

// products [count, m] of the candidates with each other, as similarities; tiles spread over the team.
template <class T>
__device__ void multiply_candidates(LazyShared& sh, const Sequence<T>& q, const Team& team, float* products, int count,
                                    int m, bool cosine) {
  const int size = team.blocks >= 16 ? 32 : team.blocks >= 4 ? 64 : kTile;
  const int side = (count + size - 1) / size;
  for (int tile = team.rank; tile < side * side; tile += team.blocks) {
    const int r0 = tile / side * size, c0 = tile % side * size;
    const Rows rows{sh.candidate + r0, 0, min(size, count - r0)}, cols{sh.candidate + c0, 0, min(size, count - c0)};
    Sums<T, false> out(rows.count);
    multiply_rows(out, q.x, rows, cols, sh.pipeline);
#pragma unroll
    for (int i = 0; i < Sums<T, false>::kRows; ++i) {
      if (out.row(i) >= rows.count) continue;
      const int r = r0 + out.row(i);
      const float own = q.norms[sh.candidate[r]];
#pragma unroll
      for (int j = 0; j < Sums<T, false>::kCols; ++j) {
        if (out.col(j) >= cols.count) continue;
        const int c = c0 + out.col(j);
        products[r * m + c] = similarity(out.at(i, j), own, q.norms[sh.candidate[c]], cosine);
      }
    }
  }
}

// Greedy steps among the candidates for as long as no other token can be before them. Every block of a team takes the
// same ones, just after a meeting. Returns how many, in sh.chosen and sh.chosen_score.
__device__ inline int take_candidates(LazyShared& sh, const float* products, int count, int m, Key bound,
                                      int64_t most) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int r = warp; r < count; r += kWarps)
    for (int c = lane; c < count; c += 32) sh.products[r * kMaxCandidates + c] = products[r * m + c];
  __syncthreads();
  if (warp == 0) {
    float s[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = 4 * lane + i < count ? sh.score[4 * lane + i] : NAN;
    int taken = 0;
    for (; taken < most; ++taken) {
      unsigned order = ordered(s[0]);
      int place = 4 * lane;
#pragma unroll
      for (int i = 1; i < 4; ++i) {
        if (ordered(s[i]) < order) {
          order = ordered(s[i]);
          place = 4 * lane + i;
        }
      }
      const unsigned least = warp_min(order);
      place = __shfl_sync(~0u, place, __ffs(__ballot_sync(~0u, order == least)) - 1);
      const int token = sh.candidate[place];
      if (least == kExcluded || make_key(least, token) > bound) break;
      if (lane == 0) {
        sh.chosen[taken] = token;
        sh.chosen_score[taken] = score_of(least);
      }
      take_four(s, sh.products + place * kMaxCandidates + 4 * lane, place - 4 * lane);
    }
    if (lane == 0) sh.taken = taken;
  }
  __syncthreads();
  return sh.taken;
}

// Brings `nearest` of all tokens up to date with sh.chosen, and takes the chosen out of the pool. One pass over x,
// its rows shared out evenly over the team.
template <class T>
__device__ void update_tokens(LazyShared& sh, const Sequence<T>& q, const Team& team, int taken, bool cosine) {
  const int tid = threadIdx.x;
  if (tid < taken) sh.chosen_norm[tid] = sh.chosen[tid] < 0 ? NAN : q.norms[sh.chosen[tid]];
  const int share = (q.n - 1) / team.blocks + 1;             // rows of a block,
  const int tiles = team.blocks * ((share - 1) / kTile + 1);  // in as few tiles as hold them
  const int height = (q.n - 1) / tiles + 1;
  for (int tile = team.rank; int64_t(tile) * height < q.n; tile += team.blocks) {
    const int first = tile * height;
    const Rows rows{nullptr, first, min(height, q.n - first)}, cols{sh.chosen, 0, taken};
    Sums<T, false> out(rows.count);
    multiply_rows(out, q.x, rows, cols, sh.pipeline);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Sums<T, false>::kRows; ++i) {
      if (out.row(i) >= rows.count) continue;
      const float own = q.norms[first + out.row(i)];
      float best = -INFINITY;
#pragma unroll
      for (int j = 0; j < Sums<T, false>::kCols; ++j)
        if (out.col(j) < taken) best = nearer(best, similarity(out.at(i, j), own, sh.chosen_norm[out.col(j)], cosine));
      sh.partial[out.slot() * kTile + out.row(i)] = best;
    }
    __syncthreads();
    if (tid < rows.count) {
      float s = q.nearest[first + tid];
      for (int slot = 0; slot < out.slots(); ++slot) s = nearer(s, sh.partial[slot * kTile + tid]);
      q.nearest[first + tid] = s;
    }
    __syncthreads();
    if (tid < taken && sh.chosen[tid] >= first && sh.chosen[tid] < first + rows.count) q.nearest[sh.chosen[tid]] = NAN;
  }
}

// A team of p.blocks blocks per batch row or sequence. Two meetings a round.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) kcenter_lazy(const __grid_constant__ Lazy<T> p) {
  LazyShared& sh = shared<LazyShared>();
  const int tid = threadIdx.x, own_team = blockIdx.x / p.blocks, m = p.candidates;
  Team team{p.arrivals + own_team * kTeamPitch, p.blocks, int(blockIdx.x % p.blocks)};
  float* products = p.products + int64_t(own_team) * m * m;

  for (int64_t row = own_team; row < p.rows; row += p.teams) {
    const Sequence<T> q(p, row);
    if (q.k == 0) continue;

    for (int64_t i = int64_t(team.rank) * kWarps + tid / 32; i < q.n; i += team.blocks * kWarps) {
      const float norm = companion_of(squared_norm(q.x, q.x.data + i * q.x.stride), p.out.cosine);
      if (tid % 32 == 0) {
        q.norms[i] = norm;
        q.nearest[i] = !p.given.allows(row, i) ? NAN : norm == norm ? -INFINITY : INFINITY;
      }
    }
    team.meet();

    for (int64_t step = 0; step < q.k;) {
      int taken;
      if (step < p.given.seeds_count) {
        taken = static_cast<int>(min(p.given.seeds_count - step, int64_t(m)));
        if (tid < taken) {
          const int seed = p.given.seed(row, step + tid, q.begin, q.n);
          sh.chosen[tid] = seed;
          if (team.rank == 0)
            p.out.write(q.at + step + tid, seed < 0 ? -1 : q.begin + seed, seed < 0 ? NAN : -INFINITY);
        }
        __syncthreads();
      } else {
        Key bound;
        const int count = select_candidates(sh, q.nearest, q.n, m, bound);
        if (count == 0) {
          if (team.rank == 0)
            for (int64_t i = step + tid; i < q.k; i += kThreads) p.out.write(q.at + i, -1, NAN);
          break;
        }
        multiply_candidates(sh, q, team, products, count, m, p.out.cosine);
        team.meet();
        taken = take_candidates(sh, products, count, m, bound, q.k - step);
        if (team.rank == 0 && tid < taken)
          p.out.write(q.at + step + tid, q.begin + sh.chosen[tid], sh.chosen_score[tid]);
      }
      step += taken;
      if (step < q.k) {
        if (q.n > 0) update_tokens(sh, q, team, taken, p.out.cosine);
        team.meet();
      }
    }
  }
}

}  // namespace pruneops
