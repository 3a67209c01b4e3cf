// Kernel of rank assignment. assign_ranks.cu: what it computes and its cost. docs/kernels/assign_ranks.md

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/keys.cuh"
#include "cuda/primitives.cuh"
#include "cuda/views.cuh"

namespace pruneops {

constexpr int kMaxRanks = 64;
constexpr int kRankThreads = 1024, kRankWarps = kRankThreads / 32;

template <class T>
struct AssignRanksParams {
  const T* logits;    // [B, N, classes]
  int64_t stride[2];  // batch, token; the classes of a token are contiguous
  int64_t* out;       // [B, ranks]
  int tokens, classes, ranks;
  int tile;         // tokens in shared memory at a time
  int pitch;        // floats per token in the tile; odd, so that a thread per token is bank-conflict-free
  float* scores;    // [B, ranks, N]; null if shared memory holds all tokens
  unsigned* owner;  // [B, N]; null if shared memory holds all tokens
};

template <class T>
size_t shared_bytes(const AssignRanksParams<T>& p) {
  return (p.tile * p.pitch + p.tile) * sizeof(float);
}

// Sets the largest tile that fits in `bytes` of shared memory.
template <class T>
void plan(AssignRanksParams<T>& p, size_t bytes) {
  p.pitch = p.classes | 1;
  p.tile = std::min(p.tokens, static_cast<int>(bytes / sizeof(float)) / (p.pitch + 1));
}

// tile[at] = logits[offset(at)] for all at < total.
template <class T, class Offset>
__device__ __forceinline__ void copy_logits(float* tile, const T* logits, int total, const Offset& offset) {
  constexpr int kBatch = 8;
  for (int first = threadIdx.x; first < total; first += kBatch * kRankThreads) {
    float logit[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * kRankThreads;
      logit[i] = at < total ? value_at(logits, offset(at)) : 0;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (first + i * kRankThreads < total) tile[first + i * kRankThreads] = logit[i];
  }
}

// Scores -log(probability) of a batch entry, by rank and token; +inf where not finite.
struct RankScores {
  static constexpr int kBatch = 6;
  float* data;
  int64_t rank_step, token_step;
  int tokens;

  __device__ float* at(int rank, int token) const { return data + rank * rank_step + token * token_step; }

  __device__ void write(int token, const float* logit, int classes, int ranks) const {
    float max_logit = -INFINITY, sum = 0;
    for (int c = 0; c < classes; ++c) max_logit = fmaxf(max_logit, logit[c]);
    for (int c = 0; c < classes; ++c) sum += expf(logit[c] - max_logit);
    const float log_sum = logf(sum);
    float* to = at(0, token);
    for (int first = 0; first < ranks; first += kBatch) {
      float score[kBatch];  // all reads before the writes: scores may overwrite the logits
#pragma unroll
      for (int i = 0; i < kBatch; ++i) score[i] = log_sum - (logit[min(first + i, ranks)] - max_logit);
#pragma unroll
      for (int i = 0; i < kBatch; ++i, to += rank_step)
        if (first + i < ranks) *to = fabsf(score[i]) < INFINITY ? score[i] : INFINITY;
    }
  }

  // The token of minimum score that no better rank owns. Called by all lanes of a warp.
  __device__ int best(int rank, const unsigned* owner) const {
    const int lane = threadIdx.x % 32;
    const float* from = at(rank, lane);
    unsigned min_bits = kExcluded;
    int best_token = tokens;
    for (int first = lane; first < tokens; first += 32 * kBatch) {
      float score[kBatch];
      unsigned owner_rank[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i, from += 32 * token_step) {
        const int token = first + 32 * i;
        score[i] = token < tokens ? *from : 0;
        owner_rank[i] = token < tokens ? owner[token] : 0;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const unsigned bits = ordered_bits(score[i]);
        if (owner_rank[i] <= unsigned(rank) | bits >= min_bits) continue;
        min_bits = bits;
        best_token = first + 32 * i;
      }
    }
    return static_cast<int>(index_of(warp_min_key(make_key(min_bits, best_token))));
  }
};

// One block per batch entry. Tile by tile, a thread per token computes scores from logits. Then deferred acceptance
// (Gale-Shapley): in each round every unmatched rank, a warp each, proposes to its best token not owned by a better
// rank; a token accepts the best rank that proposes and rejects the others. All tokens prefer lower ranks, so the
// stable matching is unique and equals the greedy assignment rank by rank.
template <class T>
__global__ void __launch_bounds__(kRankThreads, 1) assign_ranks_select(const __grid_constant__ AssignRanksParams<T> p) {
  float* tile = &shared<float>();
  const int64_t b = blockIdx.x;
  const int tid = threadIdx.x;
  unsigned* owner = p.owner ? p.owner + b * p.tokens : reinterpret_cast<unsigned*>(tile + p.tile * p.pitch);
  const RankScores scores = p.scores ? RankScores{p.scores + b * p.ranks * p.tokens, p.tokens, 1, p.tokens}
                                     : RankScores{tile, 1, p.pitch, p.tokens};
#pragma unroll 1
  for (int token = tid; token < p.tokens; token += kRankThreads) owner[token] = ~0u;
  for (int first = 0; first < p.tokens; first += p.tile) {
    const int count = min(p.tile, p.tokens - first);
    __syncthreads();
    const T* logits = p.logits + b * p.stride[0] + first * p.stride[1];
    if (p.stride[1] == p.pitch && p.pitch == p.classes)
      copy_logits(tile, logits, count * p.pitch, [](int at) { return at; });
    else
      copy_logits(tile, logits, count * p.pitch, [&](int at) {
        return at / p.pitch * p.stride[1] + min(at % p.pitch, p.classes - 1);
      });
    __syncthreads();
    for (int token = tid; token < count; token += kRankThreads)
      scores.write(first + token, tile + token * p.pitch, p.classes, p.ranks);
  }
  __syncthreads();

  int choice[kMaxRanks / kRankWarps];  // tokens of ranks warp, warp + kRankWarps, ...
  for (bool first = true;; first = false) {
    bool proposes = false;
#pragma unroll
    for (int i = 0; i < kMaxRanks / kRankWarps; ++i) {
      const int rank = tid / 32 + i * kRankWarps;
      if (rank < p.ranks && (first || owner[choice[i]] != unsigned(rank))) {
        choice[i] = scores.best(rank, owner);
        proposes = true;
      }
    }
    if (__syncthreads_count(proposes) == 0) break;
#pragma unroll
    for (int i = 0; i < kMaxRanks / kRankWarps; ++i) {
      const int rank = tid / 32 + i * kRankWarps;
      if (rank < p.ranks && tid % 32 == 0) atomicMin(&owner[choice[i]], unsigned(rank));
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kMaxRanks / kRankWarps; ++i) {
    const int rank = tid / 32 + i * kRankWarps;
    if (rank < p.ranks && tid % 32 == 0) p.out[b * p.ranks + rank] = choice[i];
  }
}

}  // namespace pruneops
