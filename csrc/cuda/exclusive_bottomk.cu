// Exclusive bottom-k on CUDA: each row of scores in turn selects its quota of lowest-scoring tokens among those not yet
// taken. pivot_bottomk computes the scores first (pivot_cosine.cu). Keys (score bits, index) are unique, so the result
// does not depend on the order in which threads run.
//
// Cost: one launch; P N scores, read once if N <= 4096 (held in registers), else in several passes. Two variants:
// (i)  Candidate lists, for N <= 262112 and (K <= 3072 or N <= 4096): row p needs at most its quotas[0] + ... +
//      quotas[p] lowest tokens. A cluster of up to 8 blocks lists those of all rows, sorted; then one warp selects.
// (ii) Row by row in one block, at most 3072 tokens at a time.
// Both find the lowest tokens of a row by radix select over 4096-bin histograms, then bucket-sort the candidates; (i)
// with N <= 4096 sorts scores that spread evenly in one pass. docs/kernels/exclusive_bottomk.md: algorithm, cycle
// counts, versions.

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


// Selects among the tokens whose mask value is not `excluded_value`. `dependent`: the previous launch on the stream
// computes the scores, and may still run when this one starts.
Tensor select(const Tensor& scores, const std::vector<int64_t>& quotas, const std::optional<Tensor>& mask,
              bool excluded_value, bool dependent) {
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const int64_t batch = scores.size(0), rows = scores.size(1), tokens = scores.size(2);
  STD_TORCH_CHECK(rows <= kMaxRows && rows == static_cast<int64_t>(quotas.size()), "pruneops: ", quotas.size(),
                  " quotas for ", rows, " rows of scores");
  STD_TORCH_CHECK(tokens <= kMaxTokens, "pruneops: scores of ", tokens, " tokens");
  STD_TORCH_CHECK(scores.stride(2) == 1 || tokens == 1, "pruneops: the last dimension of scores must be contiguous");
  int64_t total = 0;
  for (const int64_t quota : quotas) total += quota;
  const Tensor out = torch::stable::new_empty(scores, {batch, total}, ScalarType::Long);
  if (batch == 0 || total == 0) return out;
  dispatch_dtype(scores.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    BottomkParams<T> p{static_cast<const T*>(scores.data_ptr()), {scores.stride(0), scores.stride(1)}};
    p.mask = mask_view(mask);
    p.excluded_value = excluded_value;
    p.tokens = static_cast<int>(tokens);
    p.rows = static_cast<int>(rows);
    p.out = static_cast<int64_t*>(out.data_ptr());
    const bool use_lists = plan(p, quotas.data());
    const bool in_shared = use_lists && p.list_offset[rows] <= kListCapacity;
    std::optional<Tensor> memory;
    if (!in_shared) memory = workspace(scores, batch * (use_lists ? p.list_offset[rows] : (tokens + 31) / 32));
    void* const data = memory ? memory->data_ptr() : nullptr;
    p.lists = p.taken = static_cast<unsigned*>(data);
    p.cluster_blocks = use_lists && has_clusters() ? std::bit_floor(std::min<unsigned>(kMaxListBlocks, rows)) : 1;
    launch(use_lists ? exclusive_bottomk_select<T, true> : exclusive_bottomk_select<T, false>,
           {batch * p.cluster_blocks, kSelectThreads, sizeof(BottomkShared), p.cluster_blocks, dependent},
           current_stream(scores), p);
  });
  return out;
}

Tensor exclusive_bottomk(const Tensor& scores, std::vector<int64_t> quotas, const std::optional<Tensor>& taken) {
  return select(scores, quotas, taken, true, false);
}

Tensor pivot_bottomk(const Tensor& x, const Tensor& pivots, std::vector<int64_t> quotas,
                     const std::optional<Tensor>& mask) {
  const Tensor scores = pivot_cosine(x, std::nullopt, pivots, std::nullopt, 0);
  return select(scores, quotas, mask, false, scores.numel() > 0);
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) {
  m.impl("exclusive_bottomk", TORCH_BOX(&pruneops::exclusive_bottomk));
  m.impl("pivot_bottomk", TORCH_BOX(&pruneops::pivot_bottomk));
}
