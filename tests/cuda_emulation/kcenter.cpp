// Runs the kernels of csrc/cuda/kcenter.cuh on emulated threads.

#include "runtime.h"

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
  int32_t cosine, rounds, groups, blocks, candidates, backwards;
};

template <class T>
void run(const Call& c) {
  const int64_t strides = (c.row_stride | c.batch_stride) * sizeof(T);
  const bool aligned = (reinterpret_cast<uintptr_t>(c.x) | strides) % 16 == 0;
  const Tokens<T> x{static_cast<const T*>(c.x), c.batch_stride, c.row_stride, int(c.width), aligned};
  const SeedsAndMask given{c.seeds, {c.seeds_stride[0], c.seeds_stride[1]}, c.seeds_count,
                           c.mask,  {c.mask_stride[0], c.mask_stride[1]}};
  const Output out{c.indices, c.radii, bool(c.cosine)};
  const auto launch = [&](int blocks, int threads, size_t shared, auto kernel, auto&&... arguments) {
    emulation::run(blocks, threads, shared, c.backwards, [&] { kernel(arguments...); });
  };
  const size_t total_tokens = (c.cu_seqlens ? 1 : c.batch) * c.tokens;
  GuardedBuffer norm_factors(4 * total_tokens);
  if (!c.rounds) {
    const int n = c.tokens, pitch = (n + 3) / 4 * 4, side = (n + kTile - 1) / kTile;
    GuardedBuffer gram(4 * total_tokens * pitch);
    launch(2, kThreads, 0, kcenter_norm_factors<T>, x, c.batch, n, norm_factors, gram, pitch, out.cosine);
    launch(c.batch * side * (side + 1) / 2, kThreads, kPipelineBytes,
           x.aligned ? kcenter_gram<T, true> : kcenter_gram<T, false>, x, n, norm_factors, gram, pitch, out.cosine);
    launch(c.batch, (n + 127) / 128 * 32, kGreedyBytes, kcenter_greedy, gram, pitch, norm_factors, n, c.k, given, out);
    return;
  }
  GuardedBuffer nearest(4 * total_tokens), gram(size_t(4) * c.groups * c.candidates * c.candidates);
  std::vector<unsigned> arrivals(c.groups * kBarrierPitch, 0);
  RoundsParams<T> p{x, given, out, c.cu_seqlens, c.tokens, c.batch, c.k};
  if (c.cu_seqlens) std::copy(c.offsets, c.offsets + c.batch + 1, p.offsets);
  p.nearest = nearest;
  p.norm_factors = norm_factors;
  p.gram = gram;
  p.arrivals = arrivals.data();
  p.groups = c.groups;
  p.blocks = c.blocks;
  p.max_candidates = c.candidates;
  launch(c.groups * c.blocks, kThreads, sizeof(RoundsShared), kcenter_rounds<T>, p);
}

extern "C" void kcenter(const Call* call) {
  (call->element == 0 ? run<float> : call->element == 1 ? run<__half> : run<__nv_bfloat16>)(*call);
}
