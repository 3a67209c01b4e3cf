// Kernel of rank assignment; assign_ranks.cu says what it computes and what it costs.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/keys.cuh"
#include "cuda/primitives.cuh"
#include "cuda/views.cuh"

namespace pruneops {

constexpr int kMostRanks = 64;
constexpr int kRankThreads = 1024, kRankWarps = kRankThreads / 32;

template <class T>
struct AssignRanks {
  const T* logits;    // [B, N, classes]
  int64_t stride[2];  // of batch entries and tokens; classes lie next to each other
  int64_t* out;       // [B, ranks]
  int tokens, classes, ranks;
  int tile;         // tokens at a time in shared memory,
  int pitch;        // floats apart: an odd number, so that threads with a token each meet in no bank
  float* scores;    // [B, ranks, N], and
  unsigned* owner;  // [B, N], or null if shared memory holds all tokens
};

template <class T>
size_t shared_bytes(const AssignRanks<T>& p) {
  return (p.tile * p.pitch + p.tile) * sizeof(float);
}

// Fills in the tile that fits in `bytes` of shared memory.
template <class T>
void plan(AssignRanks<T>& p, size_t bytes) {
  p.pitch = p.classes | 1;
  p.tile = std::min(p.tokens, static_cast<int>(bytes / sizeof(float)) / (p.pitch + 1));
}

// Fills tile[at] from entry offset(at) of logits, for all at < total.
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

// -log(probability) of the tokens of a batch entry in each rank, +inf where it is not finite.
struct RankScores {
  static constexpr int kBatch = 6;
  float* data;
  int64_t rank_step, token_step;
  int tokens;

  __device__ float* at(int rank, int token) const { return data + rank * rank_step + token * token_step; }

  __device__ void write(int token, const float* logit, int classes, int ranks) const {
    float greatest = -INFINITY, sum = 0;
    for (int c = 0; c < classes; ++c) greatest = fmaxf(greatest, logit[c]);
    for (int c = 0; c < classes; ++c) sum += expf(logit[c] - greatest);
    const float log_sum = logf(sum);
    float* to = at(0, token);
    for (int first = 0; first < ranks; first += kBatch) {
      float score[kBatch];  // read before any is written: to the same place, perhaps
#pragma unroll
      for (int i = 0; i < kBatch; ++i) score[i] = log_sum - (logit[min(first + i, ranks)] - greatest);
#pragma unroll
      for (int i = 0; i < kBatch; ++i, to += rank_step)
        if (first + i < ranks) *to = fabsf(score[i]) < INFINITY ? score[i] : INFINITY;
    }
  }

  // The token of least score that no better rank owns. All lanes of a warp.
  __device__ int best(int rank, const unsigned* owner) const {
    const int lane = threadIdx.x % 32;
    const float* from = at(rank, lane);
    unsigned least = kExcluded;
    int choice = tokens;
    for (int first = lane; first < tokens; first += 32 * kBatch) {
      float score[kBatch];
      unsigned rival[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i, from += 32 * token_step) {
        const int token = first + 32 * i;
        score[i] = token < tokens ? *from : 0;
        rival[i] = token < tokens ? owner[token] : 0;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const unsigned order = ordered_number(score[i]);
        if (rival[i] <= unsigned(rank) | order >= least) continue;
        least = order;
        choice = first + 32 * i;
      }
    }
    return static_cast<int>(index_of(warp_least(make_key(least, choice))));
  }
};

// One block per batch entry. Tile by tile, logits become scores: a thread per token. Then every rank, a warp each, asks
// for its best token, which stays with the best rank that asks; those turned down ask for their next, in rounds, until
// all have one. A token only ever passes to a better rank, so this ends as if one rank after the other had chosen.
template <class T>
__global__ void __launch_bounds__(kRankThreads, 1) assign_ranks_select(const __grid_constant__ AssignRanks<T> p) {
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

  int choice[kMostRanks / kRankWarps];  // of ranks warp, warp + kRankWarps, ...
  for (bool first = true;; first = false) {
    bool asks = false;
#pragma unroll
    for (int i = 0; i < kMostRanks / kRankWarps; ++i) {
      const int rank = tid / 32 + i * kRankWarps;
      if (rank < p.ranks && (first || owner[choice[i]] != unsigned(rank))) {
        choice[i] = scores.best(rank, owner);
        asks = true;
      }
    }
    if (__syncthreads_count(asks) == 0) break;
#pragma unroll
    for (int i = 0; i < kMostRanks / kRankWarps; ++i) {
      const int rank = tid / 32 + i * kRankWarps;
      if (rank < p.ranks && tid % 32 == 0) atomicMin(&owner[choice[i]], unsigned(rank));
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kMostRanks / kRankWarps; ++i) {
    const int rank = tid / 32 + i * kRankWarps;
    if (rank < p.ranks && tid % 32 == 0) p.out[b * p.ranks + rank] = choice[i];
  }
}

}  // namespace pruneops
