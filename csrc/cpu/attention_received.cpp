// attention_received: attention that every key receives from the queries of a mask.
// Decode path (at most kDecodeQueries queries per head): one pass over the keys, logits kept, at most kDecodeQueries
// floats per key and head. Otherwise two passes, each with the cost of attention_mass: one for the lse, unless given,
// and one for the probabilities, whose tasks are all rows of a head times kChunk keys, summed over panels in double.
// docs/kernels/attention.md

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/attention.h"

namespace pruneops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// [B, S]: 0 where the mask is true, else -1
std::vector<int64_t> groups_of(const std::optional<Tensor>& mask, int64_t batch, int64_t length) {
  std::vector<int64_t> groups(batch * length, 0);
  if (!mask) return groups;
  STD_TORCH_CHECK(mask->numel() == batch * length, "attention_received: the shape of a mask");
  const bool* from = static_cast<const bool*>(mask->const_data_ptr());
  for (int64_t i = 0; i < batch * length; ++i)
    if (!from[i / length * mask->stride(0) + i % length * mask->stride(1)]) groups[i] = -1;
  return groups;
}

Tensor attention_received(Tensor query, Tensor key, std::optional<Tensor> query_mask, std::optional<Tensor> key_mask,
                          bool causal, double scale, std::optional<Tensor> lse) {
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), keys = key.size(2);
  Attention attention(query, key, groups_of(query_mask, batch, queries), groups_of(key_mask, batch, keys), 1, causal,
                      scale, lse);
  attention.keep_logits();
  attention.compute_states(!lse);

  Buffer computed_lse(lse ? 0 : batch * heads * queries);
  if (!lse)
    dynamic_parallel_for(attention.heads.size(), batch * heads * queries * Attention::kMergeWork, [&](int64_t i) {
      Heads& h = attention.heads[i];
      float* to = computed_lse + i * h.heads * queries;
      for (int64_t r = 0; r < h.rows; ++r)
        to[r % h.heads * queries + h.positions[r / h.heads]] = attention.merge_states(h, r).lse;
      h.lse = to, h.lse_head_stride = queries, h.lse_stride = 1;
    });

  Tensor result = torch::stable::new_empty(query, {batch, heads, keys}, ScalarType::Float);
  float* received = static_cast<float*>(result.mutable_data_ptr());
  std::fill(received, received + batch * heads * keys, 0.0f);
  struct Task {
    const Heads* heads;
    int64_t head, begin;
    float* received;
  };
  std::vector<Task> tasks;
  int64_t work = 0;
  for (const Heads& h : attention.heads) {
    work += h.rows * h.key_count * (h.is_decode() ? 32 : h.head_dim);
    for (int64_t head = 0; head < h.heads; ++head, received += keys)
      for (int64_t begin = 0; begin < h.key_count; begin += h.is_decode() ? h.key_count : kChunk)
        tasks.push_back({&h, head, begin, received});
  }
  const AttentionKernels& kernels = attention_kernels();
  dynamic_parallel_for(tasks.size(), work, [&](int64_t i) {
    const auto& [all, head, begin, to] = tasks[i];
    if (all->is_decode()) return kernels.decode_received(*all, head, to);
    Heads h = *all;
    h.query = static_cast<const char*>(h.query) + head * h.head_stride * size_of(h.type);
    h.lse += head * h.lse_head_stride;
    h.rows /= h.heads, h.heads = 1;
    kernels.panel_received(h, begin, std::min(begin + kChunk, h.key_count), to);
  });
  return result;
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CPU, m) {
  m.impl("attention_received", TORCH_BOX(&pruneops::attention_received));
}
