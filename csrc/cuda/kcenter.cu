// Greedy k-center selection on CUDA: the next token is the allowed one whose greatest similarity to the chosen set is
// least. pruneops/reference/kcenter.py is the specification; similarities are float32 sums of exact products, and every
// kernel adds them up in the same order, so both forms choose alike to the bit, equal tokens tie exactly, and every
// prefix is the answer for a smaller k.
//
// Recorded on an H100 (benchmarks/results/nvidia-h100-2026-11-27/kcenter.json), D 4096, bfloat16, from a graph: N 2880
// 0.42 ms, N 9216 2.9 ms, N 23328 9.1 ms. All other times below are expectations from counted operations and bytes.
//
// Two forms, chosen by N, B and element type only:
// (i)  Gram, up to 4096 tokens (float32: 2048) and 512 MB: norms; all similarities by 128 x 128 tiles of the lower
//      triangle, N^2 D operations and 4 N^2 bytes; then one block per batch row takes k steps, each a row of 4 N bytes
//      and one barrier. About 700 cycles a step at N = 2880: 480 for the row out of L2, 40 to update and compare, 110
//      for four warp reductions, 70 for the barrier and its shared memory.
// (ii) Lazy rounds, memory 8 N bytes and 64 KB a team, in one cooperative launch. Similarity to the set only grows, so
//      take as candidates up to 128 tokens that are under a threshold: for as long as the best of them stays under it,
//      no other token can come first, and the next choices need the candidates' products alone. Then one pass over x
//      brings all tokens up to date. Each round
//        select   candidates and threshold from 4 N bytes, by every block for itself;
//        multiply candidates with each other, 128 x 128 x D in tiles over the team; the team meets;
//        take     choices among the candidates, by one warp of every block for itself, about 130 cycles each;
//        update   2 N c D operations for the c tokens taken, x read once; the team meets.
//      Every block decides the end of a round and of the loop from the same data, so nothing is read back to the host
//      and a CUDA graph replays the launch whatever the number of rounds: at least one choice a round, k at worst; for
//      image features 11 rounds at N = 2880, k = 288 and 34 at N = 23328, k = 2333. A meeting of 132 blocks costs about
//      2 us, two a round. Batch rows (and packed sequences, always in this form since their lengths are known on the
//      device only) are dealt to teams of blocks; a launch serves up to 256 sequences, budgets passed by value.
//
// Floors on an H200 (4.3 TB/s, 790 TFLOP/s bfloat16), D = 4096, bfloat16:
//                                      N = 2880, k = 288        N = 23328, k = 2333
//   x once / 2 N k D operations        24 MB, 6.8 GFLOP: 9 us   191 MB, 446 GFLOP: 0.56 ms
// Versions, simple to fast:
//   1 a pass over x per step           3 ms                     105 ms (44 us of reading a step)
//   2 Gram by tensor cores, then k     0.25 ms: norms 6 us,     does not fit
//     steps in one block (i)           34 GFLOP at 400 TFLOP/s
//                                      0.1, 288 steps 0.11
//   3 lazy rounds (ii)                 0.6 ms: 11 rounds of     3 ms: 34 rounds of 90 us: update 60 (44 of reading),
//                                      short kernels' latency   multiply 10, select 10, take 5, meet 4
//   4 wgmma and bulk copies for the tiles, steps of (i) over a cluster: not written; about 0.12 ms and 2.3 ms

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/host.cuh"
#include "cuda/kcenter.cuh"

namespace pruneops {
namespace {

constexpr int64_t kGramBytes = int64_t(512) << 20;
constexpr int64_t kGramTokens[2] = {2048, kGreedyTokens};  // float32; float16 and bfloat16

bool gram_fits(int64_t batch, int64_t tokens, size_t element) {
  return tokens <= kGramTokens[element == 2] && batch * tokens * (tokens + 3) * 4 <= kGramBytes;
}

Companions companions_of(const std::optional<Tensor>& seeds, const std::optional<Tensor>& mask, int64_t k) {
  Companions given{};
  given.mask = flags_of(mask);
  if (seeds && seeds->size(1) > 0) {
    given.seeds = static_cast<const int64_t*>(seeds->data_ptr());
    given.seeds_stride[0] = seeds->stride(0);
    given.seeds_stride[1] = seeds->stride(1);
    given.seeds_count = std::min(k, seeds->size(1));
  }
  return given;
}

template <class T>
void run_gram(const Tokens<T>& x, const Tensor& tensor, int64_t k, const Companions& given, const Output& out) {
  const int64_t batch = tensor.size(0);
  const int n = static_cast<int>(tensor.size(1)), pitch = (n + 3) / 4 * 4, side = (n + kTile - 1) / kTile;
  const cudaStream_t stream = current_stream(tensor);
  const Tensor memory = scratch(tensor, batch * n * (pitch + 1));  // rows of gram on 16 bytes
  auto* gram = static_cast<float*>(memory.data_ptr());
  float* norms = gram + batch * n * pitch;

  const int64_t norm_blocks = std::min<int64_t>((batch * n + kWarps - 1) / kWarps, 8 * multiprocessors());
  launch(kcenter_norms<T>, {norm_blocks, kThreads}, stream, x, batch, n, norms, gram, pitch, out.cosine);
  launch(x.aligned ? kcenter_gram<T, true> : kcenter_gram<T, false>,
         {batch * (side * (side + 1) / 2), kThreads, kPipelineBytes}, stream, x, n, norms, gram, pitch, out.cosine);
  launch(kcenter_greedy, {batch, (n + 127) / 128 * 32, kGreedyBytes}, stream, gram, pitch, norms, n, k, given, out);
}

// One cooperative launch over p.rows batch rows or sequences of about `tokens` tokens, `all` in x.
template <class T>
void run_lazy(Lazy<T> p, const Tensor& tensor, int64_t all, int64_t tokens) {
  const cudaStream_t stream = current_stream(tensor);
  const int blocks = multiprocessors();
  p.teams = static_cast<int>(std::min<int64_t>(p.rows, blocks));
  p.blocks = static_cast<int>(std::clamp<int64_t>((tokens + 31) / 32, 1, blocks / p.teams));
  p.candidates = kMaxCandidates;
  const int64_t products = int64_t(p.teams) * p.candidates * p.candidates, arrivals = p.teams * kTeamPitch;
  const Tensor memory = scratch(tensor, products + arrivals + 2 * all);
  p.products = static_cast<float*>(memory.data_ptr());
  p.arrivals = reinterpret_cast<unsigned*>(p.products + products);
  p.nearest = p.products + products + arrivals;
  p.norms = p.nearest + all;
  check(cudaMemsetAsync(p.arrivals, 0, p.teams * kTeamPitch * sizeof(unsigned), stream), "cudaMemsetAsync");
  launch(kcenter_lazy<T>, {int64_t(p.teams) * p.blocks, kThreads, sizeof(LazyShared), kCooperative}, stream, p);
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
  const Companions given = companions_of(seeds, mask, k);
  const Output out = output_of(result, cosine);
  by_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Tokens<T> tokens = tokens_of<T>(x);
    if (gram_fits(batch, n, sizeof(T))) return run_gram(tokens, x, k, given, out);
    run_lazy(Lazy<T>{tokens, given, out, nullptr, n, batch, k}, x, batch * n, n);
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
  int64_t least = INT64_MAX;
  for (int64_t i = 0; i < n; ++i) {
    offsets[i + 1] = offsets[i] + ks[i];
    least = std::min(least, ks[i]);
  }
  const auto result = outputs(x, {offsets[n]});
  if (offsets[n] == 0) return result;
  const Companions given = companions_of(seeds, std::nullopt, least);
  by_element(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t first = 0; first < n; first += kMaxSequences) {
      Lazy<T> p{tokens_of<T>(x), given, output_of(result, cosine)};
      p.cu_seqlens = static_cast<const int64_t*>(cu_seqlens.data_ptr()) + first;
      p.given.seeds += first * given.seeds_stride[0];
      p.tokens = total;
      p.rows = std::min<int64_t>(kMaxSequences, n - first);
      std::copy_n(offsets.begin() + first, p.rows + 1, p.offsets);
      run_lazy(p, x, total, total / n);
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
