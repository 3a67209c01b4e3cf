// Runs the kernel of csrc/cuda/exclusive_bottomk.cuh on emulated threads.

#include "runtime.h"

#include "hopper.h"

#include "cuda/exclusive_bottomk.cuh"

using namespace pruneops;
using emulation::GuardedBuffer;

struct Call {
  const void* scores;
  int64_t batch, rows, tokens, stride[2];
  const bool* mask;
  int64_t mask_stride[2];
  const int64_t* quotas;
  int64_t* out;
  int32_t element;  // 0 float32, 1 float16, 2 bfloat16
  int32_t excluded_value, cluster_blocks, backwards;
};

template <class T>
void run(const Call& c) {
  BottomkParams<T> p{static_cast<const T*>(c.scores), {c.stride[0], c.stride[1]}};
  p.mask = {c.mask, {c.mask_stride[0], c.mask_stride[1]}};
  p.excluded_value = c.excluded_value;
  p.tokens = c.tokens;
  p.rows = c.rows;
  p.out = c.out;
  const bool use_lists = plan(p, c.quotas) && c.cluster_blocks > 0;
  p.cluster_blocks = use_lists ? c.cluster_blocks : 1;
  const bool in_memory = use_lists && p.list_offset[p.rows] > kListCapacity;
  GuardedBuffer lists(in_memory ? 4 * c.batch * p.list_offset[p.rows] : 0);
  GuardedBuffer taken(use_lists ? 0 : 4 * c.batch * ((c.tokens + 31) / 32));
  p.lists = in_memory ? static_cast<unsigned*>(lists) : nullptr;
  p.taken = taken;
  const auto kernel = use_lists ? exclusive_bottomk_select<T, true> : exclusive_bottomk_select<T, false>;
  emulation::run(c.batch * p.cluster_blocks, kSelectThreads, sizeof(BottomkShared), c.backwards, [&] { kernel(p); },
                 p.cluster_blocks);
}

extern "C" void exclusive_bottomk(const Call* call) {
  (call->element == 0 ? run<float> : call->element == 1 ? run<__half> : run<__nv_bfloat16>)(*call);
}
