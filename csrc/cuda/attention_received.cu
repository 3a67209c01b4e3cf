// Host side of attention_received: attention that every key receives from the queries of a mask. Kernels and cost:
// attention.cuh.
// docs/kernels/attention.md

#include <optional>

#include "cuda/attention_decode.cuh"
#include "cuda/attention_launch.cuh"

namespace pruneops {
namespace {

Tensor attention_received(const Tensor& query, const Tensor& key, const std::optional<Tensor>& query_mask,
                          const std::optional<Tensor>& key_mask, bool causal, double scale,
                          const std::optional<Tensor>& lse) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  check_attention(query, key, 1, lse);
  const GroupView from = mask_of(query_mask, query), to = mask_of(key_mask, key);
  const int64_t batch = query.size(0), heads = query.size(1), keys = key.size(2);
  const Tensor received = torch::stable::new_empty(query, {batch, heads, keys}, ScalarType::Float);
  if (batch * heads * keys == 0) return received;
  const cudaStream_t stream = current_stream(query);
  if (query.size(2) == 0) {
    check(cudaMemsetAsync(received.data_ptr(), 0, batch * heads * keys * sizeof(float), stream), "cudaMemsetAsync");
    return received;
  }
  dispatch_dtype(query.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    AttentionParams<T> p = attention_params<T>(query, key, 1, causal, scale, lse);
    p.query_group = from;
    p.key_group = to;
    p.received = static_cast<float*>(received.data_ptr());
    if constexpr (sizeof(T) == 2)
      if (launch_decode(p, batch, stream)) return;
    const auto run = [&](int state_splits, int cluster) {
      launch(attention_received_sums<T>,
             {batch * p.key_heads * p.splits, kThreads, size_t(received_bytes(p)), cluster}, stream, p, state_splits);
    };
    if (plan_received_fused(p, has_clusters())) return run(0, p.splits);
    std::optional<Tensor> memory;
    int state_splits = 0;
    if (!lse) {
      plan_sums(p, false);
      memory = workspace(query, p.state_floats(batch));
      p.states = static_cast<float*>(memory->data_ptr());
      launch_sums(p, batch, stream);
      state_splits = p.splits;
    }
    plan_received(p);
    run(state_splits, 1);
  });
  return received;
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) {
  m.impl("attention_received", TORCH_BOX(&pruneops::attention_received));
}
