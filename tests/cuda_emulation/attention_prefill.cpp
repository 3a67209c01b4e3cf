// Runs the kernels of csrc/cuda/attention_prefill.cuh on emulated threads, with the launches of attention_prefill.cu.

#include "hopper.h"

#include "cuda/attention_prefill.cuh"

using namespace pruneops;

struct GroupArg {
  const void* data;
  int64_t stride[2], bytes;
};
struct Call {
  const void *query, *key;
  int64_t query_stride[3], key_stride[3];
  const float* lse;
  int64_t lse_stride[3];
  GroupArg query_group, key_group;
  int64_t batch, heads, key_heads, queries, keys, head_dim, groups;
  float *mass, *lse_out;
  float scale;
  int32_t causal, element;  // 1 float16, 2 bfloat16
  int32_t backwards;  // the last thread of the last block runs first
};

template <class T, int D, bool LSE>
void sums(prefill::Params<T>& p, const Call& c) {
  constexpr int W = 4;  // as in attention_prefill.cu
  p.tiles = (p.rows() + W * prefill::kRows - 1) / (W * prefill::kRows);
  emulation::run(p.tiles * c.batch * p.key_heads, prefill::kSumsThreads<W>, sizeof(prefill::SumsShared<W, D>),
                 c.backwards, [&] { prefill::sums<T, W, D, LSE>(p); });
}

template <class T>
void run(const Call& c) {
  const auto aligned = [&](const void* data, const int64_t (&stride)[3]) {
    const int64_t all = stride[0] | stride[1] | stride[2] | c.head_dim;
    return (reinterpret_cast<uintptr_t>(data) | all * sizeof(T)) % 16 == 0;
  };
  prefill::Params<T> p{};
  p.query = static_cast<const T*>(c.query), p.key = static_cast<const T*>(c.key);
  p.query_aligned = aligned(c.query, c.query_stride);
  p.key_aligned = aligned(c.key, c.key_stride);
  p.lse = c.lse;
  for (int i = 0; i < 3; ++i) {
    p.query_stride[i] = c.query_stride[i];
    p.key_stride[i] = c.key_stride[i];
    p.lse_stride[i] = c.lse_stride[i];
  }
  p.query_group = {c.query_group.data, {c.query_group.stride[0], c.query_group.stride[1]}, int(c.query_group.bytes)};
  p.key_group = {c.key_group.data, {c.key_group.stride[0], c.key_group.stride[1]}, int(c.key_group.bytes)};
  p.scale = c.scale, p.causal = c.causal;
  p.key_heads = c.key_heads, p.ratio = c.heads / c.key_heads, p.queries = c.queries, p.keys = c.keys;
  p.head_dim = c.head_dim, p.groups = c.groups;
  p.mass = c.mass, p.lse_out = c.lse_out;
  emulation::GuardedBuffer memory(prefill::set_workspace(p, c.batch, nullptr));
  prefill::set_workspace(p, c.batch, memory);

  emulation::run(2 * c.batch, prefill::kListThreads, sizeof(prefill::ListShared), c.backwards,
                 [&] { prefill::lists<T>(p); });
  if (c.head_dim == 64) c.lse ? sums<T, 64, true>(p, c) : sums<T, 64, false>(p, c);
  else c.lse ? sums<T, 128, true>(p, c) : sums<T, 128, false>(p, c);
  emulation::run(c.batch * c.heads, prefill::kListThreads, sizeof(prefill::ReduceShared), c.backwards,
                 [&] { prefill::reduce<T>(p); });
}

extern "C" void attention_prefill(const Call* call) {
  (call->element == 1 ? run<__half> : run<__nv_bfloat16>)(*call);
}
