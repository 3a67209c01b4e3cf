// Host side of attention_mass: attention from every query group to every key group. Kernels and cost: attention.cuh.
// docs/kernels/attention.md

#include <optional>
#include <tuple>

#include "cuda/attention_decode.cuh"
#include "cuda/attention_launch.cuh"
#include "cuda/attention_prefill.cuh"

namespace pruneops {

template <class T>
void launch_sums(const AttentionParams<T>& p, int64_t batch, cudaStream_t stream) {
  launch(attention_sums<T>,
         {batch * p.key_heads * p.tiles * p.splits, kThreads, sizeof(MassShared<T>), p.states ? 1 : p.splits}, stream,
         p);
}
template void launch_sums(const AttentionParams<float>&, int64_t, cudaStream_t);
template void launch_sums(const AttentionParams<__half>&, int64_t, cudaStream_t);
template void launch_sums(const AttentionParams<__nv_bfloat16>&, int64_t, cudaStream_t);

namespace {

std::tuple<Tensor, Tensor> attention_mass(const Tensor& query, const Tensor& key, const Tensor& query_group,
                                          const Tensor& key_group, int64_t groups, bool causal, double scale,
                                          const std::optional<Tensor>& lse) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  check_attention(query, key, groups, lse);
  const GroupView from = groups_of(query_group, query), to = groups_of(key_group, key);
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  const Tensor mass = torch::stable::new_empty(query, {batch, heads, groups, groups}, ScalarType::Float);
  const Tensor lse_out = torch::stable::new_empty(query, {batch, heads, queries}, ScalarType::Float);
  if (batch * heads == 0) return {mass, lse_out};
  const cudaStream_t stream = current_stream(query);
  if (queries == 0) {
    check(cudaMemsetAsync(mass.data_ptr(), 0, batch * heads * groups * groups * sizeof(float), stream),
          "cudaMemsetAsync");
    return {mass, lse_out};
  }
  dispatch_dtype(query.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    AttentionParams<T> p = attention_params<T>(query, key, groups, causal, scale, lse);
    p.query_group = from;
    p.key_group = to;
    p.mass = static_cast<float*>(mass.data_ptr());
    p.lse_out = static_cast<float*>(lse_out.data_ptr());
    if constexpr (sizeof(T) == 2) {
      if (launch_decode(p, batch, stream)) return;
      if (prefill_applies(p)) {
        const Tensor memory = workspace(query, prefill_floats(p, batch));
        return launch_prefill(p, batch, memory.data_ptr(), stream);
      }
    }
    if (plan_sums(p, has_clusters())) return launch_sums(p, batch, stream);
    const Tensor memory = workspace(query, p.state_floats(batch));
    p.states = static_cast<float*>(memory.data_ptr());
    launch_sums(p, batch, stream);
    launch(attention_combine<T>, {batch * heads, kThreads, sizeof(CombineShared)}, stream, p);
  });
  return {mass, lse_out};
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) { m.impl("attention_mass", TORCH_BOX(&pruneops::attention_mass)); }
