// Kernel of exclusive bottom-k. exclusive_bottomk.cu: what it computes, its cost and its two variants.
// docs/kernels/exclusive_bottomk.md

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/hopper.cuh"
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
constexpr int kListCapacity = 6144;                    // candidates of all rows in shared memory
constexpr unsigned kNoToken = ~0u;                     // in a list
constexpr int kMaxEvenBin = 64;                        // tokens of a bin that sort_lowest takes

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
  unsigned* lists;                // [B, list_offset[rows]], with candidate lists; null: in shared memory
  unsigned* taken;                // [B, ceil(N / 32)], a bit per token, without candidate lists
  int cluster_blocks;
};

struct BottomkShared {
  union {
    Key keys[kCandidateCapacity];            // candidates of one row
    unsigned taken[2 * kCandidateCapacity];  // a bit per token
  };
  alignas(16) unsigned bins[kBins + 1];
  int first_bin, last_bin;
  int sums[kSelectThreads / 32];
  unsigned range[2][kSelectThreads / 32];  // smallest and ~largest score bits of each warp
  unsigned lists[kListCapacity];           // in the first block of a cluster
  uint64_t listed;                         // completes when they have arrived there
};
static_assert(kSelectThreads == 512 && kBinsPerThread == 8);  // two vectors of bins a thread

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
         p.tokens <= int(sizeof(BottomkShared::taken)) * 8 - 32;
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
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
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

// This thread's bins.
__device__ __forceinline__ uint4* bin_vectors(BottomkShared& sh) {
  return reinterpret_cast<uint4*>(sh.bins + kBinsPerThread * threadIdx.x);
}

__device__ __forceinline__ void clear_bins(BottomkShared& sh) {
  bin_vectors(sh)[0] = bin_vectors(sh)[1] = uint4{0, 0, 0, 0};
}

// Replaces sh.bins by their exclusive prefix sums. Sets sh.first_bin and sh.last_bin to the bins of the first and the
// need-th token, and `crowded` if a bin up to the last has more than kMaxEvenBin tokens. Returns the number of tokens.
__device__ __forceinline__ int scan_bins(BottomkShared& sh, int need, bool& crowded) {
  const int first = kBinsPerThread * threadIdx.x;
  const uint4 lower = bin_vectors(sh)[0], upper = bin_vectors(sh)[1];
  const int size[kBinsPerThread] = {int(lower.x), int(lower.y), int(lower.z), int(lower.w),
                                    int(upper.x), int(upper.y), int(upper.z), int(upper.w)};
  int sum = 0, most = 0, total;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    sum += size[i];
    most = max(most, size[i]);
  }
  const int before = block_exclusive_sum(sum, sh.sums, total);
  unsigned begin[kBinsPerThread + 1] = {unsigned(before)};
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) begin[i + 1] = begin[i] + size[i];
  bin_vectors(sh)[0] = uint4{begin[0], begin[1], begin[2], begin[3]};
  bin_vectors(sh)[1] = uint4{begin[4], begin[5], begin[6], begin[7]};
  if (first + kBinsPerThread == kBins) sh.bins[kBins] = total;
  const auto find_bin = [&](int nth, int& nth_bin) {
    if (nth <= before || nth > before + sum) return;
    int bin = first;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) bin += int(begin[i + 1]) < nth;
    nth_bin = bin;
  };
  find_bin(1, sh.first_bin);
  find_bin(min(need, total), sh.last_bin);
  crowded = __syncthreads_count(before < need && most > kMaxEvenBin) > 0;
  return total;
}

// Histogram of value(bits, token) over a row, for values in [low, high]; a bin is 2^bin_shift(high - low) values. Then
// scan_bins.
template <class Row, class Value>
__device__ int count_bins(BottomkShared& sh, Row& row, unsigned low, unsigned high, int need, const Value& value) {
  const int shift = bin_shift(high - low);
  __syncthreads();  // earlier reads of shared memory are complete
  clear_bins(sh);
  __syncthreads();
  row.for_each([&](unsigned bits, unsigned token) {
    const unsigned offset = value(bits, token) - low;
    atomicAdd(&sh.bins[offset <= high - low ? offset >> shift : kBins], 1u);  // extra bin: out of range
  });
  __syncthreads();
  bool crowded;
  return scan_bins(sh, need, crowded);
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

// The bin of a score: bins of equal width from `low`, the last with all larger scores. Increases with the score.
struct EvenBins {
  float low, scale;

  __device__ unsigned operator()(float score) const {
    constexpr float kInteger = 1 << 23;  // above it a float is an integer, in its low bits
    return __float_as_uint(fminf(fmaf(score - low, scale, kInteger), kInteger + (kBins - 1))) % (1 << 23);
  }
};

// Bit i: this thread's i-th token is excluded, or past the end.
__device__ __forceinline__ unsigned excluded_tokens(const MaskedTokens& masked, int tokens) {
  const int tid = threadIdx.x, count = (tokens - tid + kSelectThreads - 1) / kSelectThreads;
  unsigned bits = count > 0 ? ~0u << min(count, kTokensPerThread) : ~0u;
  if (!masked.mask.data || count <= 0) return bits;
  unsigned word[kTokensPerThread];
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) word[i] = masked.load(min(tid + i * kSelectThreads, tokens - 1));
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) bits |= unsigned(masked.contains(word[i], 0)) << i;
  return bits;
}

// select_lowest in one pass, for a row of at most COUNT tokens a thread whose scores spread well over bins of equal
// width. Returns -1 if they do not. sh.bins are clear, and the caller has not synchronised since.
template <int COUNT, class T, class Emit>
__device__ __forceinline__ int sort_lowest(BottomkShared& sh, const T* scores, unsigned excluded, int need,
                                           const Emit& emit) {
  constexpr int kPlaceShift = kBinBits + 1, kSelectWarps = kSelectThreads / 32;
  const unsigned tid = threadIdx.x, lane = tid % 32;
  const auto included = [&](int i) { return !(excluded >> i & 1); };
  float score[COUNT], low = INFINITY, high = -INFINITY;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    score[i] = INFINITY;
    if (included(i)) score[i] = value_at(scores + tid, i * kSelectThreads);
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (fabsf(score[i]) < INFINITY)
      high = fmaxf(high, score[i]);
    else
      score[i] = INFINITY;
    low = fminf(low, score[i]);
  }
  const unsigned warp_low = warp_min(ordered_bits(low)), warp_high = ~warp_min(~ordered_bits(high));
  if (lane == 0) {
    sh.range[0][tid / 32] = warp_low;
    sh.range[1][tid / 32] = warp_high > ordered_bits(-INFINITY) ? warp_high : kOrderedInfinity;
  }
  __syncthreads();  // bins are clear as well
  low = score_of(warp_min(sh.range[0][lane % kSelectWarps]));
  // A few scores may lie far above the others: pivots are equal to themselves. So the least of the warps' highest.
  const float range = 2 * (score_of(warp_min(sh.range[1][lane % kSelectWarps])) - low);
  if (!(range > 1e-30f && range < 1e30f)) return -1;
  const EvenBins bin_of{low, (kBins - 2) / range};

  unsigned bin[COUNT], place[COUNT] = {};  // in its bin
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    bin[i] = bin_of(score[i]);
    if (included(i))
      place[i] = atomicAdd(&sh.bins[bin[i]], 1u);
    else
      bin[i] = kBins;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) bin[i] += place[i] << kPlaceShift;
  __syncthreads();
  bool crowded;
  need = min(need, scan_bins(sh, need, crowded));
  if (need == 0 || crowded) return need == 0 ? 0 : -1;
  const unsigned last_bin = sh.last_bin;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) place[i] = sh.bins[bin[i] % (1 << kPlaceShift)] + (bin[i] >> kPlaceShift);
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (bin[i] % (1 << kPlaceShift) <= last_bin)
      sh.keys[place[i]] = make_key(ordered_bits(score[i]), tid + i * kSelectThreads);
  __syncthreads();
  const unsigned candidates = sh.bins[last_bin + 1];
  for (unsigned i = tid; i < candidates; i += kSelectThreads) {
    const Key key = sh.keys[i];
    const unsigned key_bin = bin_of(score_of(bits_of(key)));
    const int begin = sh.bins[key_bin], end = sh.bins[key_bin + 1];
    int rank = begin;
#pragma unroll 2
    for (int other = begin; other < end; ++other) rank += sh.keys[other] < key;
    if (rank < need) emit(rank, static_cast<int>(index_of(key)));
  }
  return need;
}

// Of a row of any length: -1 if it is too long.
template <class T, class Emit>
__device__ __forceinline__ int sort_lowest(BottomkShared& sh, const T* scores, int tokens, unsigned excluded, int need,
                                           const Emit& emit) {
  if (tokens <= 2 * kSelectThreads) return sort_lowest<2>(sh, scores, excluded, need, emit);
  if (tokens <= 6 * kSelectThreads) return sort_lowest<6>(sh, scores, excluded, need, emit);
  if (tokens <= 8 * kSelectThreads) return sort_lowest<8>(sh, scores, excluded, need, emit);
  return -1;
}

// Each row in turn takes the first tokens of its list that are not yet taken. Run by one warp: the taken tokens pass
// from row to row, everything else is loaded a row ahead. Token `none`, which is marked as taken, stands for no token.
template <class T>
__device__ __forceinline__ void select_from_lists(const BottomkParams<T>& p, const unsigned* lists,
                                                  const TakenTokens& taken, unsigned none, int64_t* out) {
  constexpr int kBatch = 2;
  const int lane = threadIdx.x;
  const unsigned lower_lanes = (1u << lane) - 1;
  const auto read = [&](unsigned (&token)[kBatch], int from, int end) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = from + 32 * i + lane;
      const unsigned listed = at < end ? lists[at] : kNoToken;
      token[i] = listed == kNoToken ? none : listed;
    }
  };
  unsigned token[kBatch], next[kBatch];
  int begin = 0, end = p.list_offset[1], first_out = 0, end_out = p.out_offset[1];
  read(next, begin, end);
  for (int row = 0; row < p.rows; ++row) {
    const int after = min(row + 2, p.rows), next_end = p.list_offset[after], next_end_out = p.out_offset[after];
    const int quota = end_out - first_out;
    int64_t* row_out = out + first_out;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) token[i] = next[i];
    read(next, end, next_end);
    int count = 0;
    for (int from = begin; count < quota && from < end;) {
      unsigned word[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) word[i] = taken.load(token[i]);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool available = !taken.contains(word[i], token[i]);
        const unsigned ballot = __ballot_sync(~0u, available);
        const int place = count + __popc(ballot & lower_lanes);
        if (available && place < quota) {
          taken.add(token[i]);
          row_out[place] = token[i];
        }
        count += __popc(ballot);
      }
      from += 32 * kBatch;
      if (count < quota) read(token, from, end);
    }
#pragma unroll 1
    for (int i = count + lane; i < quota; i += 32) row_out[i] = -1;
    begin = end;
    end = next_end;
    first_out = end_out;
    end_out = next_end_out;
    __syncwarp();
  }
}

// USE_LISTS: the p.cluster_blocks blocks of a cluster per batch entry list the candidates of all rows, then one warp of
// its first block selects. Otherwise one block per batch entry selects row by row, at most kMaxChunk tokens at a time.
template <class T, bool USE_LISTS>
__global__ void __launch_bounds__(kSelectThreads, sizeof(T) == 4 ? 2 : 1)
    exclusive_bottomk_select(const __grid_constant__ BottomkParams<T> p) {
  BottomkShared& sh = shared<BottomkShared>();
  const int64_t b = blockIdx.x / p.cluster_blocks;
  const int tid = threadIdx.x, words = (p.tokens + 31) / 32;
  const T* scores = p.scores + b * p.stride[0];
  const MaskedTokens masked{p.mask, b, p.excluded_value};

  if constexpr (USE_LISTS) {
    const int block = blockIdx.x % p.cluster_blocks;
    const bool remote = p.cluster_blocks > 1 && !p.lists;  // lists are sent to the first block
    if (remote && tid == 0) {
      mbarrier_init(&sh.listed, 1);
      mbarrier_init_fence();
    }
    cluster_arrive_relaxed();  // shared memory of the first block exists after the wait
    clear_bins(sh);
    unsigned excluded = excluded_tokens(masked, p.tokens);
    cluster_wait();
    if (remote && tid == 0 && block == 0) mbarrier_arrive_expect(&sh.listed, 4 * p.list_offset[p.rows]);
    dependency_wait();  // for the scores
    for (int row = block; row < p.rows; row += p.cluster_blocks) {
      const int first = p.list_offset[row], need = p.list_offset[row + 1] - first;
      if (need == 0) continue;
      unsigned* list = (p.lists ? p.lists + b * p.list_offset[p.rows] : sh.lists) + first;
      const T* row_scores = scores + row * p.stride[1];
      const auto emit = [&](int rank, unsigned token) {
        if (remote)
          store_async(sh.lists + first + rank, token, &sh.listed, 0);
        else
          list[rank] = token;
      };
      int count = sort_lowest(sh, row_scores, p.tokens, excluded, need, emit);
      if (count < 0) {
        ScoreRow score_row(row_scores, p.tokens, masked);
        count = select_lowest(sh, score_row, need, emit);
      }
#pragma unroll 1
      for (int i = count + tid; i < need; i += kSelectThreads) emit(i, kNoToken);
      if (row + p.cluster_blocks >= p.rows) break;
      __syncthreads();  // keys and bins are no longer read
      clear_bins(sh);
      excluded = excluded_tokens(masked, p.tokens);  // a constant would be kept as a register per bit
    }
    if (!remote) cluster_arrive();
    if (block > 0) return;
    __syncthreads();  // keys are no longer read
#pragma unroll 1
    for (int word = tid; word <= words; word += kSelectThreads) sh.taken[word] = word < words ? 0 : ~0u;
    if (!remote) cluster_wait();
    __syncthreads();
    if (tid >= 32) return;
    if (remote) mbarrier_wait_cluster(&sh.listed, 0);
    int64_t* out = p.out + b * p.out_offset[p.rows];
    if (p.lists)
      select_from_lists(p, p.lists + b * p.list_offset[p.rows], TakenTokens{sh.taken}, 32 * words, out);
    else
      select_from_lists(p, sh.lists, TakenTokens{sh.taken}, 32 * words, out);
  } else {
    dependency_wait();
    int64_t* out = p.out + b * p.out_offset[p.rows];
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
