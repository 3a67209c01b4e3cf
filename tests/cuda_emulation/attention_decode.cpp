// Runs the kernels of csrc/cuda/attention_decode.cuh on emulated threads, with the launches of attention_decode.cu.

#include <cmath>

#include "hopper.h"

#include "cuda/attention_decode.cuh"

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
  float *mass, *lse_out, *received;  // mass null: attention_received
  float scale;
  int32_t causal, element;  // 1 float16, 2 bfloat16
  int32_t min_keys;         // of a block
  int32_t backwards;        // the last thread of the last block runs first
  int32_t supported;        // output
};

template <class T, int D>
void run(AttentionParams<T>& p, const Call& c, int warps) {
  const bool is_mass = p.mass;
  const auto launch = [&](auto kernel, int cluster) {
    emulation::run(c.batch * p.key_heads * p.splits, 32 * warps, decode::shared_bytes(p, warps, is_mass), c.backwards,
                   [&] { kernel(p); }, cluster);
  };
  if (is_mass) p.lse ? launch(decode::mass_with_lse<T, D>, p.splits) : launch(decode::mass<T, D>, p.splits);
  else p.lse ? launch(decode::received<T, D, true>, 1) : launch(decode::received<T, D, false>, p.splits);
}

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
  int warps = 0;
  c.supported = decode::supports(p, p.mass) && decode::plan(p, warps, c.min_keys);
  if (c.supported) c.head_dim == 64 ? run<T, 64>(p, c, warps) : run<T, 128>(p, c, warps);
}

extern "C" void attention_decode(Call* call) { (call->element == 1 ? run<__half> : run<__nv_bfloat16>)(*call); }
