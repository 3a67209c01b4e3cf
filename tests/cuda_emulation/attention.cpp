// Runs the kernels of csrc/cuda/attention.cuh on emulated threads, with the launches of attention_mass.cu and
// attention_received.cu.

#include "runtime.h"

#include "cuda/attention.cuh"

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
  float *mass, *lse_out, *received;  // received: null for mass
  float scale;
  int32_t causal, element;  // 0 float32, 1 float16, 2 bfloat16
  int32_t clusters;         // whether the GPU has clusters
  int32_t splits;           // of the keys; 0: as planned
  int32_t backwards;        // the last thread of the last block runs first
  int32_t launches;         // output: number of launches
};

template <class T>
void run(Call& c) {
  const auto aligned = [&](const void* data, const int64_t (&stride)[3]) {
    const int64_t all = stride[0] | stride[1] | stride[2] | c.head_dim;
    return (reinterpret_cast<uintptr_t>(data) | all * sizeof(T)) % 16 == 0;
  };
  AttentionParams<T> p{static_cast<const T*>(c.query), static_cast<const T*>(c.key)};
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
  p.mass = c.mass, p.lse_out = c.lse_out, p.received = c.received;

  const auto override_splits = [&] {
    if (c.splits) p.splits = c.splits, set_keys_per_split(p);
  };
  const auto launch = [&](int64_t blocks, size_t bytes, int cluster, auto kernel) {
    ++c.launches;
    emulation::run(blocks, kThreads, bytes, c.backwards, kernel, cluster);
  };
  const auto sums = [&] {
    launch(c.batch * p.key_heads * p.tiles * p.splits, sizeof(MassShared<T>), p.states ? 1 : p.splits,
           [&] { attention_sums<T>(p); });
  };
  int state_splits = 0;
  const auto received = [&](int cluster) {
    launch(c.batch * p.key_heads * p.splits, received_bytes(p), cluster,
           [&] { attention_received_sums<T>(p, state_splits); });
  };

  c.launches = 0;
  if (!c.received && plan_sums(p, c.clusters)) {
    if (c.clusters) override_splits();
    return sums();
  }
  if (c.received && plan_received_fused(p, c.clusters)) {
    if (c.clusters) override_splits();
    return received(p.splits);
  }
  if (c.received) plan_sums(p, false);
  override_splits();
  emulation::GuardedBuffer memory(4 * p.state_floats(c.batch));
  if (!c.received) {
    p.states = memory;
    sums();
    return launch(c.batch * c.heads, sizeof(CombineShared), 1, [&] { attention_combine<T>(p); });
  }
  if (!c.lse) {
    p.states = memory;
    state_splits = p.splits;
    sums();
  }
  plan_received(p);
  received(1);
}

extern "C" void attention(Call* call) {
  (call->element == 0 ? run<float> : call->element == 1 ? run<__half> : run<__nv_bfloat16>)(*call);
}
