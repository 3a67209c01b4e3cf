// Token copies on the CPU: result[slice, r] = source[slice, keep[r]], as bytes.
//
// Cost: kept bytes read once and written once; no arithmetic. A task copies a range of tokens of one slice. Tokens are
// prefetched a group ahead, and the first line of each 64 tokens ahead to warm the TLB. Large results are written by
// non-temporal stores.
//
// In place a task owns a slice, or a range of bytes of each of its tokens, and copies tokens in ascending order:
// positions ascend, so no token is overwritten before it is read. Tasks share no bytes, so the result does not depend
// on the number of threads.
// Documentation: docs/kernels/token_copy.md

#include "cpu/token_copy.h"

#include <cstring>

#include "cpu/threads.h"

#define PRUNEOPS_KERNEL "cpu/token_copy_kernel.h"
#include "cpu/foreach_target.h"

namespace pruneops {
namespace {

using torch::stable::Tensor;

constexpr int64_t kTaskBytes = 1 << 18;         // of a task that can be divided by tokens
constexpr int64_t kPrefetchTokens = 16;         // tokens prefetched together, one group before they are copied
constexpr int64_t kTlbPrefetchTokens = 64;      // further distance, of a token's first line: its page is looked up
constexpr int64_t kNonTemporalBytes = 1 << 24;  // results of this size would evict more useful data from the caches
constexpr int64_t kCacheLine = 64;
constexpr int64_t kPrefetchBytes = 16 * kCacheLine;  // of a token; the hardware prefetches the rest

// Bytes begin..end of tokens first..last of one slice.
struct Task {
  const CopyDesc* copy;
  int64_t slice, first, last, begin, end;
};

std::vector<Task> make_tasks(const Plan& plan) {
  int64_t all_slices = 0;
  for (const CopyDesc& copy : plan.copies) all_slices += plan.layouts[copy.layout].slices();
  // in place the tokens of a slice are copied in order: where slices are few, only the bytes of a token can be divided
  const int64_t parts = 1 + 4 * torch::stable::get_num_threads() / std::max<int64_t>(1, all_slices);
  std::vector<Task> tasks;
  for (const CopyDesc& copy : plan.copies) {
    const Layout& layout = plan.layouts[copy.layout];
    const int64_t slices = layout.slices(), count = plan.positions.count, width = layout.width;
    const int64_t tokens = plan.in_place ? count : std::max<int64_t>(1, kTaskBytes / width);
    const int64_t bytes = plan.in_place ? std::max(kPrefetchBytes, width / parts / kCacheLine * kCacheLine) : width;
    for (int64_t slice = 0; slice < slices; ++slice)
      for (int64_t first = 0; first < count; first += tokens)
        for (int64_t begin = 0; begin < width; begin += bytes)
          tasks.push_back(
              {&copy, slice, first, std::min(first + tokens, count), begin, std::min(begin + bytes, width)});
  }
  return tasks;
}

// Addresses of the tokens of a task.
class TokenAddresses {
 public:
  TokenAddresses(const Plan& plan, const Task& task)
      : layout_(plan.layouts[task.copy->layout]), positions_(plan.positions), slice_(layout_.slice(task.slice)),
        src_(task.copy->src + slice_.src + task.begin), dst_(task.copy->dst + slice_.dst + task.begin),
        bytes_(task.end - task.begin) {}

  int64_t bytes() const { return bytes_; }
  int64_t length() const { return positions_.length(slice_.batch); }
  int64_t position(int64_t r) const { return positions_.keep[slice_.keep + r * positions_.keep_stride]; }
  const char* src(int64_t r) const {
    return src_ + positions_.offset(layout_, slice_.batch, position(r), layout_.src_token_stride);
  }
  char* dst(int64_t r) const { return dst_ + positions_.offset(layout_, slice_.batch, r, layout_.dst_token_stride); }

 private:
  const Layout& layout_;
  const Positions& positions_;
  SliceOffsets slice_;
  const char* src_;
  char* dst_;
  int64_t bytes_;
};

// Whether every token of the result starts at a cache line and is a whole number of them.
bool is_line_aligned(const Layout& layout, const CopyDesc& copy) {
  uint64_t bits =
      uint64_t(layout.width) | uint64_t(layout.dst_token_stride) | reinterpret_cast<uintptr_t>(copy.dst);
  for (int i = 0; i < layout.rank; ++i) bits |= uint64_t(layout.dims[i].dst_stride);
  return bits % kCacheLine == 0;
}

// Copies of one token; source and destination do not overlap.
template <int64_t kBytes>
struct FixedSizeCopy {
  void operator()(char* dst, const char* src) const { std::memcpy(dst, src, kBytes); }
};

struct AnySizeCopy {
  int64_t bytes;
  void operator()(char* dst, const char* src) const { std::memcpy(dst, src, bytes); }
};

struct NonTemporalCopy {
  int64_t bytes;
  void (*copy)(char*, const char*, int64_t) = PRUNEOPS_DISPATCH(copy_non_temporal);
  void operator()(char* dst, const char* src) const { copy(dst, src, bytes); }
  ~NonTemporalCopy() {
#if defined(__x86_64__)
    _mm_sfence();  // before other threads read
#endif
  }
};

// Copies tokens first..last by groups; the next group is prefetched before one is copied.
template <class Copy>
void copy_tokens(const TokenAddresses& tokens, int64_t first, int64_t last, const Copy& copy) {
  const char* sources[2 * kPrefetchTokens];
  const int64_t bytes = std::min(tokens.bytes(), kPrefetchBytes);
  const auto prefetch = [&](int64_t begin) {
    for (int64_t r = begin; r < std::min(begin + kPrefetchTokens, last); ++r) {
      const char* src = sources[r % (2 * kPrefetchTokens)] = tokens.src(r);
      for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(src + byte, 0, 2);
      if (r + kTlbPrefetchTokens < last) __builtin_prefetch(tokens.src(r + kTlbPrefetchTokens), 0, 2);
    }
  };
  prefetch(first);
  for (int64_t begin = first; begin < last; begin += kPrefetchTokens) {
    prefetch(begin + kPrefetchTokens);
    for (int64_t r = begin; r < std::min(begin + kPrefetchTokens, last); ++r) {
      const char* src = sources[r % (2 * kPrefetchTokens)];
      char* dst = tokens.dst(r);
      if (src != dst) copy(dst, src);
    }
  }
}

void run_task(const Plan& plan, const Task& task, bool non_temporal) {
  const TokenAddresses tokens(plan, task);
  const int64_t bytes = tokens.bytes(), first = task.first;
  const int64_t last = std::min(task.last, std::max(first, tokens.length()));
  switch (bytes) {
    case 1: copy_tokens(tokens, first, last, FixedSizeCopy<1>{}); break;
    case 2: copy_tokens(tokens, first, last, FixedSizeCopy<2>{}); break;
    case 4: copy_tokens(tokens, first, last, FixedSizeCopy<4>{}); break;
    case 8: copy_tokens(tokens, first, last, FixedSizeCopy<8>{}); break;
    case 16: copy_tokens(tokens, first, last, FixedSizeCopy<16>{}); break;
    case 32: copy_tokens(tokens, first, last, FixedSizeCopy<32>{}); break;
    default:
      if (non_temporal && is_line_aligned(plan.layouts[task.copy->layout], *task.copy))
        copy_tokens(tokens, first, last, NonTemporalCopy{bytes});
      else
        copy_tokens(tokens, first, last, AnySizeCopy{bytes});
  }
  if (plan.in_place) return;
  for (int64_t r = last; r < task.last; ++r) std::memset(tokens.dst(r), 0, bytes);
}

}  // namespace

void check_values(const Plan& plan, const Tensor& keep, int64_t limit) {
  const Positions& positions = plan.positions;
  const int64_t heads = keep.dim() == 3 ? keep.size(1) : 1, rows = keep.dim() == 1 ? 1 : keep.size(0) * heads;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t b = row / heads, length = positions.length(b);
    token_copy::check(0 <= length && length <= positions.count, "a length is out of range");
    const int64_t* row_keep = positions.keep;
    if (keep.dim() > 1) row_keep += b * keep.stride(0);
    if (keep.dim() == 3) row_keep += row % heads * keep.stride(1);
    for (int64_t r = 0; r < length; ++r) {
      const int64_t position = row_keep[r * positions.keep_stride];
      token_copy::check(0 <= position && position < limit, "a position is out of range");
      token_copy::check(!plan.in_place || r == 0 || row_keep[(r - 1) * positions.keep_stride] < position,
                        "positions do not ascend");
    }
  }
}

void run_plan(const Plan& plan) {
  const std::vector<Task> tasks = make_tasks(plan);
  int64_t bytes = 0;
  for (const Task& task : tasks) bytes += (task.last - task.first) * (task.end - task.begin);
  const bool non_temporal = !plan.in_place && bytes >= kNonTemporalBytes;
  dynamic_parallel_for(tasks.size(), 4 * bytes, [&](int64_t i) { run_task(plan, tasks[i], non_temporal); });
}

}  // namespace pruneops
