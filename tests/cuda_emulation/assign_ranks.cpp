// Runs the kernel of csrc/cuda/assign_ranks.cuh on emulated threads.

#include "runtime.h"

#include "cuda/assign_ranks.cuh"

using namespace pruneops;
using emulation::GuardedBuffer;

struct Call {
  const void* logits;
  int64_t batch, tokens, classes, stride[2], ranks, shared_bytes;
  int64_t* out;
  int32_t element;  // 0 float32, 1 float16, 2 bfloat16
  int32_t backwards;
};

template <class T>
void run(const Call& c) {
  AssignRanksParams<T> p{static_cast<const T*>(c.logits), {c.stride[0], c.stride[1]}, c.out};
  p.tokens = c.tokens;
  p.classes = c.classes;
  p.ranks = c.ranks;
  plan(p, c.shared_bytes);
  const bool tiled = p.tile < p.tokens;
  GuardedBuffer scores(tiled ? 4 * c.batch * c.ranks * c.tokens : 0), owner(tiled ? 4 * c.batch * c.tokens : 0);
  if (tiled) {
    p.scores = scores;
    p.owner = owner;
  }
  emulation::run(c.batch, kRankThreads, shared_bytes(p), c.backwards, [&] { assign_ranks_select<T>(p); });
}

extern "C" void assign_ranks(const Call* call) {
  (call->element == 0 ? run<float> : call->element == 1 ? run<__half> : run<__nv_bfloat16>)(*call);
}
