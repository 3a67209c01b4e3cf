// Kernel of exclusive bottom-k. exclusive_bottomk.cu: what it computes, its cost and its two variants.
// docs/kernels/exclusive_bottomk.md

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/keys.cuh"
#include "cuda/primitives.cuh"
#include "cuda/views.cuh"

namespace pruneops {

constexpr int kMaxRows = 64;  // rows of scores; quotas are passed by value
constexpr int kMaxListBlocks = 8;  // of a cluster
constexpr int kSelectThreads = 512;
constexpr int kTokensPerThread = 8;  // in registers at a time
constexpr int kBinBits = 12;
constexpr int kBins = 1 << kBinBits;
constexpr int kBinsPerThread = kBins / kSelectThreads;
constexpr int kCandidateCapacity = 4096;               // of a row
constexpr int kMaxChunk = kCandidateCapacity / 4 * 3;  // tokens that a block selects in one pass

template <class T>
struct BottomkParams {
  const T* scores;
  int64_t stride[2];  // batch, row; a row is contiguous
  MaskView mask;
  bool excluded_value;  // mask value of an excluded token
  int tokens, rows;
  int64_t* out;                   // [B, out_offset[rows]]
  int out_offset[kMaxRows + 1];   // first output of each row
  int list_offset[kMaxRows + 1];  // first candidate of each row
  int* lists;                     // [B, list_offset[rows]], with candidate lists
  unsigned* taken;                // [B, ceil(N / 32)], a bit per token, without candidate lists
  int cluster_blocks;
};

struct BottomkShared {
  union {
    Key keys[kCandidateCapacity];            // candidates of one row
    unsigned taken[2 * kCandidateCapacity];  // a bit per token
  };
  unsigned bins[kBins + 1];
  int first_bin, last_bin;
  int sums[kSelectThreads / 32];
};

// Sets the offsets from the quotas; returns whether the variant with candidate lists applies.
template <class T>
bool plan(BottomkParams<T>& p, const int64_t* quotas) {
  int64_t selected = 0, listed = 0;
  p.out_offset[0] = p.list_offset[0] = 0;
  for (int row = 0; row < p.rows; ++row) {
    selected += quotas[row];
    if (quotas[row] > 0) listed += selected;
    p.out_offset[row + 1] = static_cast<int>(selected);
    p.list_offset[row + 1] = static_cast<int>(std::min<int64_t>(listed, kMaxRows * kCandidateCapacity));
  }
  return (selected <= kMaxChunk || p.tokens <= kCandidateCapacity) &&
         p.tokens <= int(sizeof(BottomkShared::taken)) * 8;
}

// Sets of excluded tokens. load(token) reads a word, contains(word, token) tests it; separate, so that loads overlap.
struct MaskedTokens {
  MaskView mask;
  int64_t row;
  bool excluded_value;

  __device__ unsigned load(int token) const { return mask.at(row, token, !excluded_value); }
  __device__ bool contains(unsigned word, int) const { return word == excluded_value; }
};
struct TakenTokens {
  unsigned* bitmap;

  __device__ unsigned load(unsigned token) const { return bitmap[token / 32]; }
  __device__ bool contains(unsigned word, unsigned token) const { return word >> token % 32 & 1; }
  __device__ void add(unsigned token) const { atomicOr(&bitmap[token / 32], 1u << token % 32); }
};

// Score bits of a row: kExcluded for an excluded token, kOrderedInfinity for a non-finite score. Each thread has every
// kSelectThreads-th token; a row of up to kTokensPerThread tokens a thread is read once.
template <class T, class Excluded>
struct ScoreRow {
  const T* scores;
  int tokens;
  Excluded excluded;
  unsigned bits[kTokensPerThread];
  int begin = -1;  // first token of the chunk in `bits`

  __device__ ScoreRow(const T* scores, int tokens, const Excluded& excluded)
      : scores(scores), tokens(tokens), excluded(excluded) {}

  __device__ void load(int from) {
    begin = from;
    const int first = from + threadIdx.x;
    float score[kTokensPerThread];
    unsigned word[kTokensPerThread];
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      const int token = first + i * kSelectThreads;
      score[i] = token < tokens ? value_at(scores, token) : 0;
      word[i] = excluded.load(min(token, tokens - 1));  // unconditional, so that all loads are in flight at once
    }
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      const int token = first + i * kSelectThreads;
      bits[i] = fabsf(score[i]) < INFINITY ? ordered_bits(score[i]) : kOrderedInfinity;
      if (token >= tokens | excluded.contains(word[i], token)) bits[i] = kExcluded;
    }
  }

  // Calls visit(bits, token) for the tokens of this thread.
  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) {
    for (int from = 0; from < tokens; from += kTokensPerThread * kSelectThreads) {
      if (from != begin) load(from);
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) visit(bits[i], from + i * kSelectThreads + threadIdx.x);
    }
  }
};

// Exclusive prefix sum over the threads of the block, and the total.
__device__ __forceinline__ int block_exclusive_sum(int v, int* sums, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = v;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int lower = __shfl_up_sync(~0u, inclusive, step);
    if (lane >= step) inclusive += lower;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  const int sum = lane < kSelectThreads / 32 ? sums[lane] : 0;
  total = warp_sum(sum);
  return warp_sum(lane < warp ? sum : 0) + inclusive - v;
}

__device__ __forceinline__ int bin_shift(unsigned range) { return max(0, 32 - kBinBits - __clz(range)); }

// Histogram of value(bits, token) over a row, for values in [low, high]; a bin is 2^bin_shift(high - low) values. Sets
// sh.bins to the exclusive prefix sums and sh.first_bin and sh.last_bin to the bins of the first and the need-th token.
// Returns the number of tokens.
template <class Row, class Value>
__device__ int count_bins(BottomkShared& sh, Row& row, unsigned low, unsigned high, int need, const Value& value) {
  const int shift = bin_shift(high - low), first = kBinsPerThread * threadIdx.x;
  __syncthreads();  // earlier reads of shared memory are complete
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) sh.bins[first + i] = 0;
  __syncthreads();
  row.for_each([&](unsigned bits, unsigned token) {
    const unsigned offset = value(bits, token) - low;
    atomicAdd(&sh.bins[offset <= high - low ? offset >> shift : kBins], 1u);  // extra bin: out of range
  });
  __syncthreads();
  int size[kBinsPerThread], sum = 0, total;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) sum += size[i] = sh.bins[first + i];
  const int before = block_exclusive_sum(sum, sh.sums, total);
  int inclusive[kBinsPerThread], end = before;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    sh.bins[first + i] = end;
    inclusive[i] = end += size[i];
  }
  if (first + kBinsPerThread == kBins) sh.bins[kBins] = end;
  const auto find_bin = [&](int nth, int& nth_bin) {
    if (nth <= before || nth > end) return;
    int bin = first;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) bin += inclusive[i] < nth;
    nth_bin = bin;
  };
  find_bin(1, sh.first_bin);
  find_bin(min(need, total), sh.last_bin);
  __syncthreads();
  return total;
}

// Calls emit(rank, token) for the `need` lowest tokens of a row and returns their number, fewer if the row has fewer.
//
// Radix select: the candidates are all tokens up to the end of the bin of the need-th token. While they are too many,
// that bin is divided again; a bin of a single score is divided by index. Then the candidates are bucket-sorted: a
// histogram over the range of their score bits gives their places, and each is ranked within its bin.
template <class Row, class Emit>
__device__ int select_lowest(BottomkShared& sh, Row& row, int need, const Emit& emit) {
  unsigned threshold = kOrderedInfinity, last_index = kExcluded;  // candidates: keys <= (threshold, last_index)
  unsigned low = 0, high = threshold, min_bits = 0;  // the need-th is in [low, high]; min_bits is a lower bound of all
  int below = 0, candidates = 0;                     // below: tokens before low
  bool by_index = false, sorting = false;
  const auto is_candidate = [&](unsigned bits, unsigned token) {
    return bits < threshold | (bits == threshold & token <= last_index);
  };
  while (true) {
    const int count = count_bins(sh, row, low, high, need - below, [&](unsigned bits, unsigned token) {
      if (by_index) return bits == threshold ? token : kExcluded;
      return is_candidate(bits, token) ? bits : kExcluded;
    });
    if (sorting) break;
    need = min(need, below + count);
    if (need == 0) return 0;
    const int shift = bin_shift(high - low);
    if (below == 0 && !by_index) min_bits = low + (unsigned(sh.first_bin) << shift);
    const unsigned bin = sh.last_bin, begin = bin << shift;
    high = low + min(high - low, begin | ((1u << shift) - 1));
    low += begin;
    (by_index ? last_index : threshold) = high;
    candidates = below + sh.bins[bin + 1];
    below += sh.bins[bin];
    sorting = candidates <= min(kCandidateCapacity, 2 * need + 512);
    if (sorting) {
      by_index = false;
      low = min_bits;
      high = threshold;
    } else if (low == high) {
      by_index = true;
      low = 0;
      high = row.tokens - 1;
    }
  }

  const int shift = bin_shift(threshold - min_bits);
  row.for_each([&](unsigned bits, unsigned token) {
    if (is_candidate(bits, token)) sh.keys[atomicAdd(&sh.bins[(bits - min_bits) >> shift], 1u)] = make_key(bits, token);
  });
  __syncthreads();  // sh.bins now holds the end of each bin
  for (int i = threadIdx.x; i < candidates; i += kSelectThreads) {
    const Key key = sh.keys[i];
    const unsigned bin = (bits_of(key) - min_bits) >> shift;
    const int begin = bin == 0 ? 0 : sh.bins[bin - 1], end = sh.bins[bin];
    int rank = begin;
    for (int other = begin; other < end; ++other) rank += sh.keys[other] < key;
    if (rank < need) emit(rank, static_cast<int>(index_of(key)));
  }
  return need;
}

// Each row in turn takes the first tokens of its list that are not yet taken. Run by one warp.
template <class T>
__device__ void select_from_lists(const BottomkParams<T>& p, const int* lists, const TakenTokens& taken, int64_t* out) {
  constexpr int kBatch = 4;
  const int lane = threadIdx.x;
  const auto read = [&](int (&token)[kBatch], int row, int from) {
    const int end = row < p.rows ? p.list_offset[row + 1] : 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) token[i] = from + 32 * i + lane < end ? lists[from + 32 * i + lane] : -1;
  };
  int token[kBatch], next[kBatch];
  read(next, 0, 0);
  for (int row = 0; row < p.rows; ++row) {
    int64_t* row_out = out + p.out_offset[row];
    const int quota = p.out_offset[row + 1] - p.out_offset[row], end = p.list_offset[row + 1];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) token[i] = next[i];
    read(next, row + 1, end);
    int count = 0;
    for (int from = p.list_offset[row]; count < quota && from < end;) {
      unsigned word[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) word[i] = taken.load(max(token[i], 0));
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool available = token[i] >= 0 & !taken.contains(word[i], token[i]);
        const unsigned ballot = __ballot_sync(~0u, available);
        const int place = count + __popc(ballot & ((1u << lane) - 1));
        if (available && place < quota) {
          row_out[place] = token[i];
          taken.add(token[i]);
        }
        count += __popc(ballot);
      }
      from += 32 * kBatch;
      if (count < quota) read(token, row, from);
    }
#pragma unroll 1
    for (int i = count + lane; i < quota; i += 32) row_out[i] = -1;
    __syncwarp();
  }
}

// USE_LISTS: the p.cluster_blocks blocks of a cluster per batch entry list the candidates of all rows, then one warp of
// its first block selects. Otherwise one block per batch entry selects row by row, at most kMaxChunk tokens at a time.
template <class T, bool USE_LISTS>
__global__ void __launch_bounds__(kSelectThreads, 2)
    exclusive_bottomk_select(const __grid_constant__ BottomkParams<T> p) {
  BottomkShared& sh = shared<BottomkShared>();
  const int64_t b = blockIdx.x / p.cluster_blocks;
  const int tid = threadIdx.x, words = (p.tokens + 31) / 32;
  const T* scores = p.scores + b * p.stride[0];
  int64_t* out = p.out + b * p.out_offset[p.rows];
  const MaskedTokens masked{p.mask, b, p.excluded_value};

  if constexpr (USE_LISTS) {
    int* lists = p.lists + b * p.list_offset[p.rows];
    for (int row = blockIdx.x % p.cluster_blocks; row < p.rows; row += p.cluster_blocks) {
      int* list = lists + p.list_offset[row];
      const int need = p.list_offset[row + 1] - p.list_offset[row];
      if (need == 0) continue;
      ScoreRow score_row(scores + row * p.stride[1], p.tokens, masked);
      const int count = select_lowest(sh, score_row, need, [&](int rank, int token) { list[rank] = token; });
      for (int i = count + tid; i < need; i += kSelectThreads) list[i] = -1;
    }
    cluster_arrive();
    if (blockIdx.x % p.cluster_blocks > 0) return;
    cluster_wait();
    __syncthreads();  // the cluster barrier is a no-op for one block
    for (int word = tid; word < words; word += kSelectThreads) sh.taken[word] = 0;
    __syncthreads();
    if (tid < 32) select_from_lists(p, lists, TakenTokens{sh.taken}, out);
  } else {
    const TakenTokens taken{p.taken + b * words};
    for (int word = tid / 32; word < words; word += kSelectThreads / 32) {
      const int token = 32 * word + tid % 32;
      const unsigned word_bits = __ballot_sync(~0u, token < p.tokens && masked.contains(masked.load(token), token));
      if (tid % 32 == 0) taken.bitmap[word] = word_bits;
    }
    for (int row = 0; row < p.rows; ++row) {
      for (int at = p.out_offset[row], end = p.out_offset[row + 1]; at < end;) {
        ScoreRow score_row(scores + row * p.stride[1], p.tokens, taken);
        const int need = min(end - at, kMaxChunk);
        const int count = select_lowest(sh, score_row, need, [&](int rank, int token) {
          out[at + rank] = token;
          taken.add(token);
        });
        at += count;
        for (int i = at + tid; count < need && i < end; i += kSelectThreads) out[i] = -1;
        if (count < need) break;
      }
    }
  }
}

}  // namespace pruneops
