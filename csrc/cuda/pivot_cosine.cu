// (header to come)

#include <optional>

#include "cuda/host.cuh"
#include "cuda/pivot_cosine.cuh"

namespace pruneops {
namespace {

template <int TILES, int GROUPS, class T>
void run(const PivotCosine<T>& p, int64_t batch, cudaStream_t stream) {
  using Shared = PivotShared<TILES, GROUPS>;
  launch(pivot_cosine_pass<T, TILES, GROUPS>, {block_count(p, batch, Shared::kRows), kThreads, sizeof(Shared)}, stream,
         p);
}

}  // namespace

Tensor pivot_cosine(const Tensor& x, const std::optional<Tensor>& cu_seqlens, const Tensor& pivots,
                    const std::optional<Tensor>& mask, int64_t reduce) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t batch = x.size(0), tokens = x.size(1), count = pivots.size(1);
  const Tensor out = reduce ? torch::stable::new_empty(x, {batch, tokens}, ScalarType::Float)
                            : torch::stable::new_empty(x, {batch, count, tokens}, ScalarType::Float);
  if (batch == 0 || tokens == 0 || count == 0) return out;
  by_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    PivotCosine<T> p{tokens_of<T>(x), static_cast<const int64_t*>(pivots.data_ptr())};
    p.pivots_stride[0] = pivots.stride(0);
    p.pivots_stride[1] = pivots.stride(1);
    p.mask = flags_of(mask);
    if (cu_seqlens) {
      p.cu_seqlens = static_cast<const int64_t*>(cu_seqlens->data_ptr());
      p.sequences = static_cast<int>(pivots.size(0));
    }
    p.tokens = static_cast<int>(tokens);
    p.pivots_count = static_cast<int>(count);
    p.reduce = static_cast<Reduce>(reduce);
    p.out = static_cast<float*>(out.data_ptr());
    const cudaStream_t stream = current_stream(x);
    if (count > kGroup) return run<2, kMostGroups<T>>(p, batch, stream);
    if (batch * tokens < 32 * multiprocessors()) return run<1, 1>(p, batch, stream);
    run<2, 1>(p, batch, stream);
  });
  return out;
}

}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) { m.impl("pivot_cosine", TORCH_BOX(&pruneops::pivot_cosine)); }
