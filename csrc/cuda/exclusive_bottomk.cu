// Exclusive bottom-k on CUDA: row after row of scores takes its quota of the lowest tokens that nobody took before it;
// pivot_bottomk computes the scores first (pivot_cosine.cu). pruneops/reference/exclusive_bottomk.py is the
// specification. Scores become integers that sort alike (keys.cuh) and ties go by index, so the result is exact in
// whatever order the threads run.
//
// Recorded on an H100 (benchmarks/results/nvidia-h100-2026-11-27/exclusive_bottomk.json), from a graph: N 2880, P 8
// 12 us; N 576, D 1024, scores included, 16 us. All other times below are expectations from counted instructions
// and bytes.
//
// One launch, in one of two forms, chosen by N and the quotas only:
// (i)  Lists, up to 262144 tokens, and 3072 choices or 4096 tokens. The rows before row p take quotas[0] + ... +
//      quotas[p - 1] tokens at most, so row p finds its own among its lowest quotas[0] + ... + quotas[p]. The blocks of
//      a cluster, up to 8, list those of all rows, sorted, in scratch memory; they meet; one warp of the first walks
//      list after list, 128 candidates at a time, with a bit for each token taken. Before compute capability 9.0 there
//      are no clusters, and one block lists row after row.
// (ii) One by one. A block takes for row after row, at most 3072 tokens at a time, and marks them in N / 8 bytes of
//      scratch memory.
// Both find the lowest tokens of a row in the same way, in passes over its scores (N <= 4096: in registers):
//   count  in 4096 bins of 2^20 orders each, an eighth of an octave; prefix sums say in which bin the last one needed
//          lies. If there are too many candidates up to there, that bin is divided again: by order, then by index;
//   sort   count the candidates in 4096 bins of the orders they span; deal them out; rank each within its bin.
//
// B 1, N 2880, P 8, quotas 36 on an H200, in cycles; the scores, 92 KB, come out of L2 once:
//   list   1050 instructions a warp, 16 warps on 4 schedulers 4200; start, scores and mask out of L2 1000
//   meet   fence, barrier of the cluster                      700
//   deal   first list out of L2 700; 8 rows of 150 instructions by one warp, 350 each 2800
// 9400 cycles, 4.9 us at 1.9 GHz. In one block, without clusters, 40000 cycles: 29 us on an A100.
// Versions, simple to fast:
//   1 (ii)                                                                        45000 cycles
//   2 (i) in one block, rows to groups of its warps, 48 scores a thread           11000: bound by the instructions of
//                                                                                 23040 scores on one multiprocessor
//   3 (i) over a cluster (this one)                                               9400

#include <algorithm>
#include <bit>
#include <optional>
#include <vector>

#include "cuda/exclusive_bottomk.cuh"
#include "cuda/host.cuh"

namespace pruneops {

Tensor pivot_cosine(const Tensor& x, const std::optional<Tensor>& cu_seqlens, const Tensor& pivots,
                    const std::optional<Tensor>& mask, int64_t reduce);  // in pivot_cosine.cu

namespace {

// Among the tokens whose flag is not `taken`.
Tensor select(const Tensor& scores, const std::vector<int64_t>& quotas, const std::optional<Tensor>& flags,
              bool taken) {
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const int64_t batch = scores.size(0), rows = scores.size(1), tokens = scores.size(2);
  STD_TORCH_CHECK(rows <= kMostTakers && rows == static_cast<int64_t>(quotas.size()), "pruneops: ", quotas.size(),
                  " quotas for ", rows, " rows of scores");
  STD_TORCH_CHECK(tokens <= kMostTokens, "pruneops: scores of ", tokens, " tokens");
  STD_TORCH_CHECK(scores.stride(2) == 1 || tokens == 1, "pruneops: scores of a row must lie next to each other");
  int64_t total = 0;
  for (const int64_t quota : quotas) total += quota;
  const Tensor out = torch::stable::new_empty(scores, {batch, total}, ScalarType::Long);
  if (batch == 0 || total == 0) return out;
  by_element(scores.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Bottomk<T> p{static_cast<const T*>(scores.data_ptr()), {scores.stride(0), scores.stride(1)}};
    p.flags = flags_of(flags);
    p.taken = taken;
    p.tokens = static_cast<int>(tokens);
    p.rows = static_cast<int>(rows);
    p.out = static_cast<int64_t*>(out.data_ptr());
    const bool listed = plan(p, quotas.data());
    const Tensor memory = scratch(scores, batch * (listed ? p.list[rows] : (tokens + 31) / 32));
    p.lists = static_cast<int*>(memory.data_ptr());
    p.used = static_cast<unsigned*>(memory.data_ptr());
    p.blocks = listed && has_clusters() ? std::bit_floor(std::min<unsigned>(kMostBlocks, rows)) : 1;
    launch(listed ? exclusive_bottomk_select<T, true> : exclusive_bottomk_select<T, false>,
           {batch * p.blocks, kSelectThreads, sizeof(BottomkShared), p.blocks}, current_stream(scores), p);
  });
  return out;
}

Tensor exclusive_bottomk(const Tensor& scores, std::vector<int64_t> quotas, const std::optional<Tensor>& taken) {
  return select(scores, quotas, taken, true);
}

Tensor pivot_bottomk(const Tensor& x, const Tensor& pivots, std::vector<int64_t> quotas,
                     const std::optional<Tensor>& mask) {
  return select(pivot_cosine(x, std::nullopt, pivots, std::nullopt, 0), quotas, mask, false);
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) {
  m.impl("exclusive_bottomk", TORCH_BOX(&pruneops::exclusive_bottomk));
  m.impl("pivot_bottomk", TORCH_BOX(&pruneops::pivot_bottomk));
}
