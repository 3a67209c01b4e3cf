// Runs the kernel of csrc/cuda/exclusive_bottomk.cuh on emulated threads.

#include "runtime.h"

#include "cuda/exclusive_bottomk.cuh"

using namespace pruneops;
using emulation::Scratch;

struct Call {
  const void* scores;
  int64_t batch, rows, tokens, stride[2];
  const bool* flags;
  int64_t flags_stride[2];
  const int64_t* quotas;
  int64_t* out;
  int32_t element;  // 0 float32, 1 float16, 2 bfloat16
  int32_t taken, blocks, backwards;
};

template <class T>
void run(const Call& c) {
  Bottomk<T> p{static_cast<const T*>(c.scores), {c.stride[0], c.stride[1]}};
  p.flags = {c.flags, {c.flags_stride[0], c.flags_stride[1]}};
  p.taken = c.taken;
  p.tokens = c.tokens;
  p.rows = c.rows;
  p.out = c.out;
  const bool listed = plan(p, c.quotas) && c.blocks > 0;
  p.blocks = listed ? c.blocks : 1;
  Scratch lists(listed ? 4 * c.batch * p.list[p.rows] : 0), used(listed ? 0 : 4 * c.batch * ((c.tokens + 31) / 32));
  p.lists = lists;
  p.used = used;
  const auto kernel = listed ? exclusive_bottomk_select<T, true> : exclusive_bottomk_select<T, false>;
  emulation::run(c.batch * p.blocks, kSelectThreads, sizeof(BottomkShared), c.backwards, [&] { kernel(p); }, p.blocks);
}

extern "C" void exclusive_bottomk(const Call* call) {
  (call->element == 0 ? run<float> : call->element == 1 ? run<__half> : run<__nv_bfloat16>)(*call);
}
