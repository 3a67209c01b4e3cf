// Kernel of exclusive bottom-k; exclusive_bottomk.cu says what it computes, when each form runs and what it costs.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/keys.cuh"
#include "cuda/primitives.cuh"
#include "cuda/views.cuh"

namespace pruneops {

constexpr int kMostTakers = 64;  // rows of scores: their quotas travel by value
constexpr int kMostBlocks = 8;   // of a cluster
constexpr int kSelectThreads = 512;
constexpr int kHeld = 8;    // tokens in the registers of a thread
constexpr int kBinBits = 12;
constexpr int kBins = 1 << kBinBits;
constexpr int kOwnBins = kBins / kSelectThreads;  // of a thread
constexpr int kRoom = 4096;                                 // candidates of a row
constexpr int kHelping = kRoom / 4 * 3;                     // tokens that are sure to find room, and some to spare

template <class T>
struct Bottomk {
  const T* scores;
  int64_t stride[2];  // of batch entries and rows; scores of a row lie next to each other
  Flags flags;
  bool taken;  // the flag of a token that is not to be had
  int tokens, rows;
  int64_t* out;                // [B, first[rows]]
  int first[kMostTakers + 1];  // where the choices of each row begin
  int list[kMostTakers + 1];   // where its candidates begin
  int* lists;                  // [B, list[rows]]
  unsigned* used;              // [B, ceil(N / 32)], a bit per token, where there are no lists
  int blocks;                  // of a cluster
};

struct BottomkShared {
  union {
    Key keys[kRoom];           // candidates of one row
    unsigned used[2 * kRoom];  // a bit per token
  };
  unsigned bins[kBins + 1];
  int first_bin, last_bin;
  int sums[kSelectThreads / 32];
};

// Fills in what follows from the quotas, and says whether rows can list their candidates ahead of their turn.
template <class T>
bool plan(Bottomk<T>& p, const int64_t* quotas) {
  int64_t taken = 0, listed = 0;
  p.first[0] = p.list[0] = 0;
  for (int row = 0; row < p.rows; ++row) {
    taken += quotas[row];
    if (quotas[row] > 0) listed += taken;
    p.first[row + 1] = static_cast<int>(taken);
    p.list[row + 1] = static_cast<int>(std::min<int64_t>(listed, kMostTakers * kRoom));
  }
  return (taken <= kHelping || p.tokens <= kRoom) && p.tokens <= int(sizeof(BottomkShared::used)) * 8;
}

// Which tokens are not to be had: word(token) asks memory, says(word, token) reads the answer.
struct Flagged {
  Flags flags;
  int64_t row;
  bool taken;

  __device__ unsigned word(int token) const { return flags.at(row, token, !taken); }
  __device__ bool says(unsigned word, int) const { return word == taken; }
};
struct Used {
  unsigned* bits;

  __device__ unsigned word(unsigned token) const { return bits[token / 32]; }
  __device__ bool says(unsigned word, unsigned token) const { return word >> token % 32 & 1; }
  __device__ void add(unsigned token) const { atomicOr(&bits[token / 32], 1u << token % 32); }
};

// Scores of a row as orders: kExcluded for a token that is not to be had, kInfinite for a score that is not finite. Each
// thread has every kSelectThreads-th token; a row of up to kHeld of them is read once.
template <class T, class Gone>
struct ScoreRow {
  const T* scores;
  int tokens;
  Gone gone;
  unsigned order[kHeld];
  int begin = -1;  // of those in `order`

  __device__ ScoreRow(const T* scores, int tokens, const Gone& gone) : scores(scores), tokens(tokens), gone(gone) {}

  __device__ void load(int from) {
    begin = from;
    const int first = from + threadIdx.x;
    float score[kHeld];
    unsigned word[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int token = first + i * kSelectThreads;
      score[i] = token < tokens ? value_at(scores, token) : 0;
      word[i] = gone.word(min(token, tokens - 1));  // no branch around it: all are under way together
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int token = first + i * kSelectThreads;
      order[i] = fabsf(score[i]) < INFINITY ? ordered_number(score[i]) : kInfinite;
      if (token >= tokens | gone.says(word[i], token)) order[i] = kExcluded;
    }
  }

  // Calls use(order, token).
  template <class Use>
  __device__ __forceinline__ void each(const Use& use) {
    for (int from = 0; from < tokens; from += kHeld * kSelectThreads) {
      if (from != begin) load(from);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) use(order[i], from + i * kSelectThreads + threadIdx.x);
    }
  }
};

// Sum over the threads of the block before this one; and over all.
__device__ __forceinline__ int block_before(int v, int* sums, int& all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int up_to = v;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int lower = __shfl_up_sync(~0u, up_to, step);
    if (lane >= step) up_to += lower;
  }
  if (lane == 31) sums[warp] = up_to;
  __syncthreads();
  const int sum = lane < kSelectThreads / 32 ? sums[lane] : 0;
  all = warp_sum(sum);
  return warp_sum(lane < warp ? sum : 0) + up_to - v;
}

__device__ __forceinline__ int shift_of(unsigned range) { return max(0, 32 - kBinBits - __clz(range)); }

// Counts the tokens of a row by value(order, token) from low to high, in bins of 2^shift_of(high - low) values; a bin
// then holds how many precede it. Returns how many there are in all, and finds the bins of the first and the need-th.
template <class Row, class Value>
__device__ int count_bins(BottomkShared& sh, Row& row, unsigned low, unsigned high, int need, const Value& value) {
  const int shift = shift_of(high - low), first = kOwnBins * threadIdx.x;
  __syncthreads();  // whatever shared memory held is done with
#pragma unroll
  for (int i = 0; i < kOwnBins; ++i) sh.bins[first + i] = 0;
  __syncthreads();
  row.each([&](unsigned order, unsigned token) {
    const unsigned offset = value(order, token) - low;
    atomicAdd(&sh.bins[offset <= high - low ? offset >> shift : kBins], 1u);  // no branch
  });
  __syncthreads();
  int size[kOwnBins], sum = 0, all;
#pragma unroll
  for (int i = 0; i < kOwnBins; ++i) sum += size[i] = sh.bins[first + i];
  const int before = block_before(sum, sh.sums, all);
  int up_to[kOwnBins], end = before;
#pragma unroll
  for (int i = 0; i < kOwnBins; ++i) {
    sh.bins[first + i] = end;
    up_to[i] = end += size[i];
  }
  if (first + kOwnBins == kBins) sh.bins[kBins] = end;
  const auto find = [&](int nth, int& where) {
    if (nth <= before || nth > end) return;
    int bin = first;
#pragma unroll
    for (int i = 0; i < kOwnBins; ++i) bin += up_to[i] < nth;
    where = bin;
  };
  find(1, sh.first_bin);
  find(min(need, all), sh.last_bin);
  __syncthreads();
  return all;
}

// Gives the `need` lowest tokens of a row to emit(rank, token), and returns how many: fewer if there are not as many.
//
// Candidates are all up to the end of the bin in which the last one needed lies, of bins that divide that bin again
// for as long as there are more than kRoom; where one order alone has as many, they divide its indices. Then the
// candidates are dealt to bins of the orders that they span, and ranked within their bin.
template <class Row, class Emit>
__device__ int take_lowest(BottomkShared& sh, Row& row, int need, const Emit& emit) {
  unsigned cut = kInfinite, latest = kExcluded;  // candidates are under the cut, or at it and no later than the latest
  unsigned low = 0, high = cut, least = 0;       // the last one needed is from low to high; none is under the least
  int below = 0, candidates = 0;                 // tokens before low
  bool by_index = false, sorting = false;
  const auto is_candidate = [&](unsigned order, unsigned token) {
    return order < cut | (order == cut & token <= latest);
  };
  while (true) {
    const int all = count_bins(sh, row, low, high, need - below, [&](unsigned order, unsigned token) {
      if (by_index) return order == cut ? token : kExcluded;
      return is_candidate(order, token) ? order : kExcluded;
    });
    if (sorting) break;
    need = min(need, below + all);
    if (need == 0) return 0;
    const int shift = shift_of(high - low);
    if (below == 0 && !by_index) least = low + (unsigned(sh.first_bin) << shift);
    const unsigned bin = sh.last_bin, begin = bin << shift;
    high = low + min(high - low, begin | ((1u << shift) - 1));
    low += begin;
    (by_index ? latest : cut) = high;
    candidates = below + sh.bins[bin + 1];
    below += sh.bins[bin];
    sorting = candidates <= kRoom;
    if (sorting) {
      by_index = false;
      low = least;
      high = cut;
    } else if (low == high) {
      by_index = true;
      low = 0;
      high = row.tokens - 1;
    }
  }

  const int shift = shift_of(cut - least);
  row.each([&](unsigned order, unsigned token) {
    if (is_candidate(order, token)) sh.keys[atomicAdd(&sh.bins[(order - least) >> shift], 1u)] = make_key(order, token);
  });
  __syncthreads();  // a bin now holds where it ends
  for (int i = threadIdx.x; i < candidates; i += kSelectThreads) {
    const Key key = sh.keys[i];
    const unsigned bin = (order_of(key) - least) >> shift;
    const int begin = bin == 0 ? 0 : sh.bins[bin - 1], end = sh.bins[bin];
    int rank = begin;
    for (int other = begin; other < end; ++other) rank += sh.keys[other] < key;
    if (rank < need) emit(rank, static_cast<int>(index_of(key)));
  }
  return need;
}

// Row after row takes the first of its list that nobody has taken. One warp.
template <class T>
__device__ void deal(const Bottomk<T>& p, const int* lists, const Used& used, int64_t* out) {
  constexpr int kBatch = 4;
  const int lane = threadIdx.x;
  const auto read = [&](int (&token)[kBatch], int row, int from) {
    const int end = row < p.rows ? p.list[row + 1] : 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) token[i] = from + 32 * i + lane < end ? lists[from + 32 * i + lane] : -1;
  };
  int token[kBatch], next[kBatch];
  read(next, 0, 0);
  for (int row = 0; row < p.rows; ++row) {
    int64_t* to = out + p.first[row];
    const int quota = p.first[row + 1] - p.first[row], end = p.list[row + 1];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) token[i] = next[i];
    read(next, row + 1, end);
    int got = 0;
    for (int from = p.list[row]; got < quota && from < end;) {
      unsigned word[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) word[i] = used.word(max(token[i], 0));
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool free = token[i] >= 0 & !used.says(word[i], token[i]);
        const unsigned ballot = __ballot_sync(~0u, free);
        const int place = got + __popc(ballot & ((1u << lane) - 1));
        if (free && place < quota) {
          to[place] = token[i];
          used.add(token[i]);
        }
        got += __popc(ballot);
      }
      from += 32 * kBatch;
      if (got < quota) read(token, row, from);
    }
#pragma unroll 1
    for (int i = got + lane; i < quota; i += 32) to[i] = -1;
    __syncwarp();
  }
}

// LISTED: a cluster of p.blocks blocks per batch entry lists the candidates of all rows, then one warp deals. Otherwise
// one block takes for row after row, at most kHelping tokens at a time.
template <class T, bool LISTED>
__global__ void __launch_bounds__(kSelectThreads, 2) exclusive_bottomk_select(const __grid_constant__ Bottomk<T> p) {
  BottomkShared& sh = shared<BottomkShared>();
  const int64_t b = blockIdx.x / p.blocks;
  const int tid = threadIdx.x, words = (p.tokens + 31) / 32;
  const T* scores = p.scores + b * p.stride[0];
  int64_t* out = p.out + b * p.first[p.rows];
  const Flagged flagged{p.flags, b, p.taken};

  if constexpr (LISTED) {
    int* lists = p.lists + b * p.list[p.rows];
    for (int row = blockIdx.x % p.blocks; row < p.rows; row += p.blocks) {
      int* list = lists + p.list[row];
      const int need = p.list[row + 1] - p.list[row];
      if (need == 0) continue;
      ScoreRow pool(scores + row * p.stride[1], p.tokens, flagged);
      const int got = take_lowest(sh, pool, need, [&](int rank, int token) { list[rank] = token; });
      for (int i = got + tid; i < need; i += kSelectThreads) list[i] = -1;
    }
    cluster_arrive();
    if (blockIdx.x % p.blocks > 0) return;
    cluster_wait();
    __syncthreads();  // a cluster of one did not meet
    for (int word = tid; word < words; word += kSelectThreads) sh.used[word] = 0;
    __syncthreads();
    if (tid < 32) deal(p, lists, Used{sh.used}, out);
  } else {
    const Used used{p.used + b * words};
    for (int word = tid / 32; word < words; word += kSelectThreads / 32) {
      const int token = 32 * word + tid % 32;
      const unsigned taken = __ballot_sync(~0u, token < p.tokens && flagged.says(flagged.word(token), token));
      if (tid % 32 == 0) used.bits[word] = taken;
    }
    for (int row = 0; row < p.rows; ++row) {
      for (int at = p.first[row], end = p.first[row + 1]; at < end;) {
        ScoreRow pool(scores + row * p.stride[1], p.tokens, used);
        const int need = min(end - at, kHelping);
        const int got = take_lowest(sh, pool, need, [&](int rank, int token) {
          out[at + rank] = token;
          used.add(token);
        });
        at += got;
        for (int i = at + tid; got < need && i < end; i += kSelectThreads) out[i] = -1;
        if (got < need) break;
      }
    }
  }
}

}  // namespace pruneops
