// Pivot cosines on CUDA: cosine of every token with P pivot tokens, or their maximum, mean or sum.
// pruneops/reference/pivot_cosine.py is the specification. One launch; 2 P N D operations; x is read once per 64 pivots
// (float32: 32), and each block reads the pivots from L2. Reductions never store [B, P, N].
// A block takes up to 24 tokens: as many as share them evenly over the multiprocessors. Its 8 warps split the features,
// 128 bytes of a row at a time, and add up their sums at the end; each has its own ring of asynchronous copies, so that
// no block barrier interrupts the loads. float16 and bfloat16 use tensor cores, float32 fused multiply-adds. Rows that
// are not 16-byte aligned are read element by element. Products and squared norms are float32 sums from one pass over
// x, in an order that depends on D alone: strides, batch, packing and P change no bit. A block of a packed x finds its
// sequence by a search in cu_seqlens. See docs/kernels/pivot_cosine.md.

#include <optional>

#include "cuda/host.cuh"
#include "cuda/pivot_cosine.cuh"

namespace pruneops {
namespace {

constexpr int kStages = 4;  // 8, all of D 4096 in flight, were 5 % slower on an H200; two blocks an SM 4 %

template <int GROUPS, class T>
void run(PivotCosine<T> p, int64_t batch, cudaStream_t stream) {
  const int64_t grid = share_tokens(p, batch, GROUPS, multiprocessor_count());
  launch(pivot_cosine_pass<T, GROUPS, kStages>, {grid, kThreads, sizeof(PivotShared<GROUPS, kStages>)}, stream, p);
}

}  // namespace

Tensor pivot_cosine(const Tensor& x, const std::optional<Tensor>& cu_seqlens, const Tensor& pivots,
                    const std::optional<Tensor>& mask, int64_t reduce) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t batch = x.size(0), tokens = x.size(1), count = pivots.size(1);
  const Tensor out = reduce ? torch::stable::new_empty(x, {batch, tokens}, ScalarType::Float)
                            : torch::stable::new_empty(x, {batch, count, tokens}, ScalarType::Float);
  if (batch == 0 || tokens == 0 || count == 0) return out;
  dispatch_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    PivotCosine<T> p{tokens_of<T>(x), static_cast<const int64_t*>(pivots.data_ptr())};
    p.pivots_stride[0] = pivots.stride(0);
    p.pivots_stride[1] = pivots.stride(1);
    p.mask = mask_view(mask);
    if (cu_seqlens) {
      p.cu_seqlens = static_cast<const int64_t*>(cu_seqlens->data_ptr());
      p.sequences = static_cast<int>(pivots.size(0));
    }
    p.tokens = static_cast<int>(tokens);
    p.pivots_count = static_cast<int>(count);
    p.reduce = static_cast<Reduce>(reduce);
    p.out = static_cast<float*>(out.data_ptr());
    const cudaStream_t stream = current_stream(x);
    count > kGroupSize ? run<kMaxPivotGroups<T>>(p, batch, stream) : run<1>(p, batch, stream);
  });
  return out;
}

}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) { m.impl("pivot_cosine", TORCH_BOX(&pruneops::pivot_cosine)); }
