// Runs the kernel of csrc/cuda/pivot_cosine.cuh on emulated threads.

#include "runtime.h"

#include "hopper.h"

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
  int32_t reduce, block_tokens, many, stages, backwards;
};

template <class T, int GROUPS, int STAGES>
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
  const int least = c.block_tokens ? c.block_tokens : 1;  // given: enough slots for it
  emulation::run(share_tokens(p, c.batch, least, c.block_tokens ? 1 << 20 : 4), kThreads, sizeof(PivotShared<GROUPS, STAGES>), c.backwards,
                 [&] { pivot_cosine_pass<T, GROUPS, STAGES>(p); });
}

template <class T>
void run(const Call& c) {
  constexpr int kMany = kMaxPivotGroups<T>;
  if (c.many)
    (c.stages == 4 ? run<T, kMany, 4> : run<T, kMany, 8>)(c);
  else
    (c.stages == 4 ? run<T, 1, 4> : run<T, 1, 8>)(c);
}

extern "C" void pivot_cosine(const Call* call) {
  (call->element == 0 ? run<float> : call->element == 1 ? run<__half> : run<__nv_bfloat16>)(*call);
}
