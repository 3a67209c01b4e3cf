// Greedy k-center selection on CUDA: the next token is the allowed one whose maximum similarity to the chosen set is
// minimal; pruneops/reference/kcenter.py is the specification. Two paths, by N, B and element type alone:
//   gram    N <= 4096 (float32: 2048) and B N (N + 3) floats <= 512 MB, two launches: dot products of all pairs, N^2 D
//           operations and 4 N^2 bytes; greedy steps by lazy rounds over that matrix, in a cluster.
//   rounds  8 N bytes and up to 132 KB a block group, one cooperative launch. A round selects up to 240 candidates,
//           computes their gram matrix, takes greedy steps among them while no other token can precede them, and
//           updates all tokens in one pass over x: 2 N c D operations for c steps. At least one step a round.
// Within a path every similarity is a float32 sum in one fixed order: equal tokens tie exactly, every prefix is the
// answer for a smaller k. Blocks decide the end of a round from the same data: no host reads, and the launches can be
// captured in a CUDA graph. Packed sequences always take rounds, up to 256 a launch.
// See docs/kernels/kcenter.md.

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/host.cuh"
#include "cuda/kcenter_gram.cuh"
#include "cuda/kcenter_rounds.cuh"
#include "cuda/tuning.h"

namespace pruneops {
namespace {

constexpr int64_t kGramBytes = int64_t(512) << 20;
inline Tuned gram_tokens{"kcenter_gram_tokens", kGreedyTokens};                // float16 and bfloat16
inline Tuned gram_tokens_float32{"kcenter_gram_tokens_float32", 2048};

bool gram_fits(int64_t batch, int64_t tokens, size_t element) {
  const int limit = (element == 2 ? gram_tokens : gram_tokens_float32).value;
  return tokens <= std::min(limit, kGreedyTokens) && batch * tokens * (tokens + 3) * 4 <= kGramBytes;
}

SeedsAndMask seeds_and_mask(const std::optional<Tensor>& seeds, const std::optional<Tensor>& mask, int64_t k) {
  SeedsAndMask given{};
  given.mask = mask_view(mask);
  if (seeds && seeds->size(1) > 0) {
    given.seeds = static_cast<const int64_t*>(seeds->data_ptr());
    given.seeds_stride[0] = seeds->stride(0);
    given.seeds_stride[1] = seeds->stride(1);
    given.seeds_count = std::min(k, seeds->size(1));
  }
  return given;
}

inline Tuned gram_tile{"kcenter_gram_tile", 0};          // 64, 128 or 192; 0: the fewest waves
inline Tuned greedy_blocks{"kcenter_greedy_blocks", 0};  // of a cluster; 0: by B and N

// Boxes of `box_rows` tokens and 64 features of x [B, N, D], zero outside. False if x cannot be described so.
bool tensor_map(TensorMap& map, const Tensor& x, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                                        &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (!encode) return false;
  const auto size = [&](int dim) { return static_cast<cuuint64_t>(x.size(dim)); };
  const int64_t row = x.stride(1) * 2, batch = x.size(0) > 1 ? x.stride(0) * 2 : x.size(1) * row;
  const cuuint64_t sizes[] = {size(2), size(1), size(0)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row), static_cast<cuuint64_t>(batch)};
  const cuuint32_t box[] = {kGramFeatures, static_cast<cuuint32_t>(box_rows), 1}, step[] = {1, 1, 1};
  const auto type = x.scalar_type() == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(&map, type, 3, x.data_ptr(), sizes, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Operations of the busiest multiprocessor, in units of 64 x 64 tiles and with the cost of a wave.
int64_t gram_cost(int64_t batch, int n, int tile) {
  const int side = (n + tile - 1) / tile;
  const int64_t tiles = batch * side * (side + 1) / 2, blocks = multiprocessor_count();
  return (tiles + blocks - 1) / blocks * (tile * tile / 4096 + 1);
}

template <class T, int TILE>
bool run_gram_wgmma(const Tensor& x, const GramOutput& to, cudaStream_t stream) {
  TensorMap map;
  if (!tensor_map(map, x, TILE / 2)) return false;
  const int side = (to.n + TILE - 1) / TILE;
  launch(kcenter_gram_wgmma<T, TILE>,
         {2 * x.size(0) * gram_pairs(side), kGramThreads<TILE>, sizeof(GramShared<TILE>), 2}, stream, map,
         static_cast<int>(x.size(2)), to);
  return true;
}

template <class T>
void run_gram_products(const Tokens<T>& x, const Tensor& tensor, const GramOutput& to, cudaStream_t stream) {
  const int64_t batch = tensor.size(0);
  if constexpr (sizeof(T) == 2) {
    if (x.aligned && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9) {
      const auto cost = [&](int tile) { return gram_tile.value == tile ? 0 : gram_cost(batch, to.n, tile); };
      const int64_t cost64 = cost(64), cost128 = cost(128), cost192 = cost(192);
      const bool done = cost192 <= cost128 && cost192 <= cost64 ? run_gram_wgmma<T, 192>(tensor, to, stream)
                        : cost128 <= cost64                     ? run_gram_wgmma<T, 128>(tensor, to, stream)
                                                                : run_gram_wgmma<T, 64>(tensor, to, stream);
      if (done) return;
    }
  }
  const int side = (to.n + kTile - 1) / kTile;
  launch(x.aligned ? kcenter_gram<T, true> : kcenter_gram<T, false>,
         {batch * (side * (side + 1) / 2), kThreads, kPipelineBytes}, stream, x, to);
}

// Blocks of a cluster that takes the greedy steps.
int greedy_cluster(int64_t batch, int64_t tokens) {
  if (!has_clusters()) return 1;
  static const bool sixteen = [] {  // more than eight blocks are not portable
    const void* kernel = reinterpret_cast<const void*>(kcenter_greedy);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {16, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = 16;
    config.blockDim = kGreedyThreads;
    config.dynamicSmemBytes = sizeof(GreedyShared);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    const bool fits =
        !cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(GreedyShared)) &&
        !cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) &&
        !cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) && clusters > 0;
    cudaGetLastError();  // a refusal is no error
    return fits;
  }();
  const int blocks = greedy_blocks.value ? greedy_blocks.value : tokens > 1024 && batch <= 4 ? 16 : 8;
  return std::min(blocks, sixteen ? 16 : 8);
}

template <class T>
void run_gram(const Tokens<T>& x, const Tensor& tensor, int64_t k, const SeedsAndMask& given, const Output& out) {
  const int64_t batch = tensor.size(0);
  const int n = static_cast<int>(tensor.size(1)), pitch = (n + 3) / 4 * 4;
  const cudaStream_t stream = current_stream(tensor);
  const Tensor memory = workspace(tensor, batch * n * (pitch + 1));  // rows of gram are 16-byte aligned
  auto* gram = static_cast<float*>(memory.data_ptr());
  const GramOutput products{gram, gram + batch * n * pitch, n, pitch, out.cosine};
  run_gram_products(x, tensor, products, stream);
  const int blocks = greedy_cluster(batch, n);
  launch(kcenter_greedy, {batch * blocks, kGreedyThreads, sizeof(GreedyShared), blocks, true}, stream,
         GreedyParams{gram, products.norm_factors, n, pitch, blocks, k, given, out});
}

inline Tuned rounds_candidates{"kcenter_candidates", 240};
inline Tuned rounds_block_tokens{"kcenter_block_tokens", 16};  // at least, of a block of a group

// Candidates of a round: 4 sqrt(N), as many as shared memory takes.
int max_candidates(int64_t tokens, int64_t work_bytes) {
  auto count = static_cast<int>(std::sqrt(static_cast<double>(tokens)) / 4) * 16;
  count = std::min({std::max(count, 64), std::max(rounds_candidates.value, 1), kMaxCandidates});
  while (4 * triangle(count) + 16 > work_bytes) --count;
  return count;
}

// One cooperative launch over p.rows batch rows or sequences of about `tokens` tokens.
template <class T>
void run_rounds(RoundsParams<T> p, const Tensor& tensor, int64_t total_tokens, int64_t tokens) {
  const cudaStream_t stream = current_stream(tensor);
  const int blocks = multiprocessor_count(), shared_bytes = max_shared_memory() / 128 * 128;
  p.groups = static_cast<int>(std::min<int64_t>(p.rows, blocks));
  p.blocks = static_cast<int>(std::clamp<int64_t>(tokens / rounds_block_tokens.value, 1, blocks / p.groups));
  p.work_bytes = shared_bytes - static_cast<int>(sizeof(RoundsShared));
  p.max_candidates = max_candidates(tokens, p.work_bytes);
  const int64_t gram = int64_t(p.groups) * p.gram_pitch(p.max_candidates), arrivals = p.groups * kBarrierPitch;
  const int64_t padded = padded_tokens(total_tokens, p.rows);
  const Tensor memory = workspace(tensor, gram + arrivals + 2 * padded);
  p.gram = static_cast<unsigned*>(memory.data_ptr());
  p.arrivals = p.gram + gram;
  p.nearest = p.arrivals + arrivals;
  p.norm_factors = reinterpret_cast<float*>(p.nearest + padded);
  check(cudaMemsetAsync(p.arrivals, 0, arrivals * sizeof(unsigned), stream), "cudaMemsetAsync");
  launch(kcenter_rounds<T>, {int64_t(p.groups) * p.blocks, kThreads, size_t(shared_bytes), kCooperative}, stream, p);
}

std::tuple<Tensor, Tensor> outputs(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  return {torch::stable::new_empty(x, shape, ScalarType::Long), torch::stable::new_empty(x, shape, ScalarType::Float)};
}

Output output_of(const std::tuple<Tensor, Tensor>& tensors, bool cosine) {
  return {static_cast<int64_t*>(std::get<0>(tensors).data_ptr()), static_cast<float*>(std::get<1>(tensors).data_ptr()),
          cosine};
}

std::tuple<Tensor, Tensor> kcenter(const Tensor& x, int64_t k, const std::optional<Tensor>& seeds,
                                   const std::optional<Tensor>& mask, bool cosine) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t batch = x.size(0), n = x.size(1);
  const auto result = outputs(x, {batch, k});
  if (batch == 0 || k == 0) return result;
  const SeedsAndMask given = seeds_and_mask(seeds, mask, k);
  const Output out = output_of(result, cosine);
  dispatch_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Tokens<T> tokens = tokens_of<T>(x);
    if (gram_fits(batch, n, sizeof(T))) return run_gram(tokens, x, k, given, out);
    run_rounds(RoundsParams<T>{tokens, given, out, nullptr, n, batch, k}, x, batch * n, n);
  });
  return result;
}

std::tuple<Tensor, Tensor> kcenter_varlen(const Tensor& x, const Tensor& cu_seqlens, std::vector<int64_t> ks,
                                          const std::optional<Tensor>& seeds, bool cosine) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t n = static_cast<int64_t>(ks.size()), total = x.size(0);
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Long && cu_seqlens.size(0) == n + 1 &&
                      cu_seqlens.stride(0) == 1, "pruneops: cu_seqlens must be contiguous int64 of ks + 1 entries");
  std::vector<int64_t> offsets(n + 1, 0);
  int64_t min_budget = INT64_MAX;
  for (int64_t i = 0; i < n; ++i) {
    offsets[i + 1] = offsets[i] + ks[i];
    min_budget = std::min(min_budget, ks[i]);
  }
  const auto result = outputs(x, {offsets[n]});
  if (offsets[n] == 0) return result;
  const SeedsAndMask given = seeds_and_mask(seeds, std::nullopt, min_budget);
  dispatch_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t first = 0; first < n; first += kMaxSequences) {
      RoundsParams<T> p{tokens_of<T>(x), given, output_of(result, cosine)};
      p.cu_seqlens = static_cast<const int64_t*>(cu_seqlens.data_ptr()) + first;
      p.given.seeds += first * given.seeds_stride[0];
      p.tokens = total;
      p.rows = std::min<int64_t>(kMaxSequences, n - first);
      std::copy_n(offsets.begin() + first, p.rows + 1, p.offsets);
      run_rounds(p, x, total, total / n);
    }
  });
  return result;
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CUDA, m) {
  m.impl("kcenter", TORCH_BOX(&pruneops::kcenter));
  m.impl("kcenter_varlen", TORCH_BOX(&pruneops::kcenter_varlen));
}
