// Runs the kernel of csrc/cuda/pivot_cosine.cuh on emulated threads.

#include "runtime.h"

#include "cuda/pivot_cosine.cuh"

using namespace pruneops;

struct Call {
  const void* x;
  int64_t batch, tokens, width, batch_stride, row_stride;
  const int64_t* pivots;
  int64_t pivots_stride[2], count;
  const bool* mask;
  int64_t mask_stride[2];
  const int64_t* cu_seqlens;  // null unless packed: `sequences` in `tokens`
  int64_t sequences;
  float* out;
  int32_t element;  // 0 float32, 1 float16, 2 bfloat16
  int32_t reduce, tiles, groups, backwards;
};

template <class T, int TILES, int GROUPS>
void run(const Call& c) {
  const int64_t strides = (c.row_stride | c.batch_stride) * sizeof(T);
  const bool aligned = (reinterpret_cast<uintptr_t>(c.x) | strides) % 16 == 0;
  PivotCosine<T> p{{static_cast<const T*>(c.x), c.batch_stride, c.row_stride, int(c.width), aligned}, c.pivots};
  p.pivots_stride[0] = c.pivots_stride[0];
  p.pivots_stride[1] = c.pivots_stride[1];
  p.mask = {c.mask, {c.mask_stride[0], c.mask_stride[1]}};
  p.cu_seqlens = c.cu_seqlens;
  p.tokens = c.tokens;
  p.sequences = c.sequences;
  p.pivots_count = c.count;
  p.reduce = static_cast<Reduce>(c.reduce);
  p.out = c.out;
  using Shared = PivotShared<TILES, GROUPS>;
  emulation::run(block_count(p, c.batch, Shared::kRows), kThreads, sizeof(Shared), c.backwards,
                 [&] { pivot_cosine_pass<T, TILES, GROUPS>(p); });
}

template <class T>
void run(const Call& c) {
  (c.tiles == 1 ? run<T, 1, 1> : c.groups == 1 ? run<T, 2, 1> : run<T, 2, kMaxPivotGroups<T>>)(c);
}

extern "C" void pivot_cosine(const Call* call) {
  (call->element == 0 ? run<float> : call->element == 1 ? run<__half> : run<__nv_bfloat16>)(*call);
}
