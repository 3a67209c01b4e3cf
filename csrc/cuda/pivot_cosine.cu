// Pivot cosines on CUDA: cosine of every token with a few pivot tokens, or the greatest, mean or sum of them.
// pruneops/reference/pivot_cosine.py is the specification. Products and squared norms, of tokens and pivots, are
// float32 sums made in one pass over x; their order depends on the width alone, so neither strides, batch nor packing
// change a bit. The reduced forms never store [B, P, N].
//
// Recorded on an H100 (benchmarks/results/nvidia-h100-2026-11-27/pivot_cosine.json): N 576, D 1024, P 8, bfloat16
// 6.6 us from a graph. All other times below are expectations from counted instructions and bytes.
//
// A block has 16 tokens (32 if there are enough of them to fill the card, or more than 8 pivots); its 8 warps share out
// the features, 128 at a time, and add up their sums at the end. float16 and bfloat16 go through the tensor cores:
// lanes load 16 bytes of a row straight into the operand, in an order of features that tokens and pivots share. float32
// goes through fused multiply-adds. Rows that do not start at a multiple of 16 bytes are read element by element. Up to
// 64 pivots (float32: 16) a pass over x. Sequences of a packed x find their blocks by a search in cu_seqlens.
//
// N 2880, D 4096, P 8, bfloat16 on an H200 (4.3 TB/s, 132 multiprocessors):
//   bytes         x once, 23.6 MB: 5.5 us; 64 KB of pivots for each of 180 blocks, 11.8 MB out of L2
//   under way     8 loads of tokens and 4 of pivots a lane, 48 KB a block, 66 KB a multiprocessor; 20 KB are enough
//   instructions  240 a warp for 128 features (8 products, 192 for the squares): 2600 a scheduler, 1.4 us
//   latency       index, pivot, 4 loads in a row: 5 x 800 cycles, 2.1 us; sums over the warps 0.3 us
// About 7.5 us. N 23328 (191 MB, 44 us): 50 us. P 64: 47 MB of pivots out of L2 and 960 instructions a warp for 128
// features, 12 us. float32, P 8: 47 MB, 11 us, and 6 us of shuffles beneath: 13 us.

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
