// Runs the kernels of csrc/cuda/kcenter.cuh on emulated threads.

#include "hopper.h"

#include "cuda/kcenter_gram.cuh"
#include "cuda/kcenter_rounds.cuh"

using namespace pruneops;
using emulation::GuardedBuffer;

struct Call {
  const void* x;
  int64_t batch, tokens, width, batch_stride, row_stride;
  const int64_t* seeds;
  int64_t seeds_stride[2], seeds_count;
  const bool* mask;
  int64_t mask_stride[2];
  const int64_t* cu_seqlens;  // null unless packed: `batch` sequences in `tokens`
  const int64_t* offsets;     // [batch + 1]
  int64_t k;
  int64_t* indices;
  float* radii;
  int32_t element;  // 0 float32, 1 float16, 2 bfloat16
  int32_t cosine, rounds, groups, blocks, candidates, backwards, tile, work_kb;
};

template <class T>
void run(const Call& c) {
  const int64_t strides = (c.row_stride | c.batch_stride) * sizeof(T);
  const bool aligned = (reinterpret_cast<uintptr_t>(c.x) | strides) % 16 == 0;
  const Tokens<T> x{static_cast<const T*>(c.x), c.batch_stride, c.row_stride, int(c.width), aligned};
  const SeedsAndMask given{c.seeds, {c.seeds_stride[0], c.seeds_stride[1]}, c.seeds_count,
                           c.mask,  {c.mask_stride[0], c.mask_stride[1]}};
  const Output out{c.indices, c.radii, bool(c.cosine)};
  const auto launch = [&](int blocks, int threads, size_t shared, int cluster, auto kernel, auto&&... arguments) {
    emulation::run(blocks, threads, shared, c.backwards, [&] { kernel(arguments...); }, cluster);
  };
  const size_t total_tokens = (c.cu_seqlens ? 1 : c.batch) * c.tokens;
  GuardedBuffer norm_factors(4 * total_tokens);
  if (!c.rounds) {
    const int n = c.tokens, pitch = (n + 3) / 4 * 4;
    GuardedBuffer gram(4 * total_tokens * pitch);
    const GramOutput products{gram, norm_factors, n, pitch, out.cosine};
    const auto wgmma = [&](auto kernel, int tile, int threads, size_t shared) {
      const TensorMap map{static_cast<const uint16_t*>(c.x), c.row_stride, c.batch_stride, int(c.width), n,
                          int(c.batch),              tile / 2};
      launch(2 * c.batch * gram_pairs((n + tile - 1) / tile), threads, shared, 2, kernel, map, int(c.width), products);
    };
    const int side = (n + kTile - 1) / kTile;
    if (c.tile == 0)
      launch(c.batch * side * (side + 1) / 2, kThreads, kPipelineBytes, 1,
             x.aligned ? kcenter_gram<T, true> : kcenter_gram<T, false>, x, products);
    if constexpr (sizeof(T) == 2) {
      if (c.tile == 64) wgmma(kcenter_gram_wgmma<T, 64>, 64, kGramThreads<64>, sizeof(GramShared<64>));
      if (c.tile == 128) wgmma(kcenter_gram_wgmma<T, 128>, 128, kGramThreads<128>, sizeof(GramShared<128>));
      if (c.tile == 192) wgmma(kcenter_gram_wgmma<T, 192>, 192, kGramThreads<192>, sizeof(GramShared<192>));
    }
    launch(c.batch * c.blocks, kGreedyThreads, sizeof(GreedyShared), c.blocks, kcenter_greedy,
           GreedyParams{gram, norm_factors, n, pitch, c.blocks, c.k, given, out});
    return;
  }
  const int64_t padded = padded_tokens(total_tokens, c.batch);
  GuardedBuffer nearest(4 * padded), factors(4 * padded);
  GuardedBuffer gram(size_t(4) * c.groups * RoundsParams<T>::gram_pitch(c.candidates));
  std::vector<unsigned> arrivals(c.groups * kBarrierPitch, 0);
  RoundsParams<T> p{x, given, out, c.cu_seqlens, c.tokens, c.batch, c.k};
  if (c.cu_seqlens) std::copy(c.offsets, c.offsets + c.batch + 1, p.offsets);
  p.nearest = nearest;
  p.norm_factors = factors;
  p.gram = gram;
  p.arrivals = arrivals.data();
  p.groups = c.groups;
  p.blocks = c.blocks;
  p.max_candidates = c.candidates;
  p.work_bytes = c.work_kb * 1024;
  launch(c.groups * c.blocks, kThreads, sizeof(RoundsShared) + p.work_bytes, 1, kcenter_rounds<T>, p);
}

extern "C" void kcenter(const Call* call) {
  (call->element == 0 ? run<float> : call->element == 1 ? run<__half> : run<__nv_bfloat16>)(*call);
}
