// Softmax sums of attention rows per key group, without the attention matrix.
//
// Cost per visible (query, key) pair: 2 D operations and one exp, about 25 vector operations per vector. Bytes: query
// once; key once per panel (from cache), or once on the decode path. Memory: 1 + G floats per row (per row and chunk of
// keys on the decode path), a few integers per token.
// Counted queries and unmasked keys are compacted into lists first; masked and causally hidden pairs are not computed.
// A task is a panel of rows (48 with AVX-512) times all keys they attend to (online softmax), or, for a key head with
// few rows (decode), all its rows times kChunk keys (split-KV). Partial states are merged in chunk order, so results do
// not depend on threads, batch neighbours or strides.
// docs/kernels/attention.md

#include "cpu/attention.h"

#include <torch/headeronly/util/Exception.h>

#include <cmath>

#define PRUNEOPS_KERNEL "cpu/attention_kernel.h"
#include "cpu/foreach_target.h"

namespace pruneops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Element element_type(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.stride(last) == 1 || tensor.size(last) == 1, "attention: features must be contiguous");
  STD_TORCH_CHECK(tensor.size(last) <= kMaxHeadDim, "attention: at most ", kMaxHeadDim, " features a head");
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::kFloat;
    case ScalarType::Half: return Element::kHalf;
    case ScalarType::BFloat16: return Element::kBFloat16;
    default: STD_TORCH_CHECK(false, "attention: query and key must be float32, float16 or bfloat16");
  }
}

const void* advance(const Tensor& tensor, Element type, int64_t elements) {
  return static_cast<const char*>(tensor.const_data_ptr()) + elements * size_of(type);
}

Visible list_visible(const int64_t* query_groups, int64_t queries, const int64_t* key_groups, int64_t keys,
                     bool causal) {
  Visible visible;
  for (int64_t j = 0; j < keys; ++j)
    if (key_groups[j] >= 0) visible.keys.push_back(j);
  const int64_t all = visible.keys.size();
  int64_t limit = causal ? 0 : all;
  for (int64_t i = 0; i < queries; ++i) {
    while (limit < all && visible.keys[limit] <= i + keys - queries) ++limit;
    if (query_groups[i] < 0 || limit == 0) continue;
    visible.positions.push_back(i);
    visible.limits.push_back(limit);
  }
  visible.keys.resize(visible.limits.empty() ? 0 : visible.limits.back());
  for (int64_t j : visible.keys) visible.key_groups.push_back(uint32_t(key_groups[j]));
  visible.key_groups.resize(visible.keys.size() + kMaxLanes);
  return visible;
}

}  // namespace

const AttentionKernels& attention_kernels() { return *PRUNEOPS_DISPATCH(kKernels); }

Attention::Attention(const Tensor& query, const Tensor& key, const std::vector<int64_t>& query_groups,
                     const std::vector<int64_t>& key_groups, int64_t groups, bool causal, double scale,
                     const std::optional<Tensor>& lse) {
  const int64_t batch = query.size(0), query_heads = query.size(1), queries = query.size(2), head_dim = query.size(3);
  const int64_t key_heads = key.size(1), keys = key.size(2);
  const Element type = element_type(query);
  STD_TORCH_CHECK(element_type(key) == type && key.size(0) == batch && key.size(3) == head_dim,
                  "attention: key does not fit query");
  STD_TORCH_CHECK(key_heads > 0 && query_heads % key_heads == 0, "attention: ", key_heads, " heads of keys for ",
                  query_heads);
  STD_TORCH_CHECK(int64_t(query_groups.size()) == batch * queries && int64_t(key_groups.size()) == batch * keys &&
                      (!lse || lse->numel() == batch * query_heads * queries),
                  "attention: groups or lse do not fit query and key");
  STD_TORCH_CHECK(1 <= groups && groups <= kMaxGroups, "attention: ", groups, " groups");
  for (const auto* ids : {&query_groups, &key_groups})
    for (int64_t group : *ids) STD_TORCH_CHECK(group < groups, "attention: a group is out of range");

  for (int64_t b = 0; b < batch; ++b)
    visible.push_back(
        list_visible(query_groups.data() + b * queries, queries, key_groups.data() + b * keys, keys, causal));
  int64_t size = 0;
  for (int64_t i = 0; i < batch * key_heads; ++i) {
    const int64_t b = i / key_heads, first = i % key_heads * (query_heads / key_heads);
    const Visible& tokens = visible[b];
    Heads h{};
    h.type = type, h.head_dim = head_dim, h.heads = query_heads / key_heads, h.groups = groups, h.scale = float(scale);
    h.query = advance(query, type, b * query.stride(0) + first * query.stride(1));
    h.key = advance(key, type, b * key.stride(0) + i % key_heads * key.stride(1));
    h.head_stride = query.stride(1), h.query_stride = query.stride(2), h.key_stride = key.stride(2);
    h.rows = tokens.positions.size() * h.heads, h.key_count = tokens.keys.size();
    h.positions = tokens.positions.data(), h.limits = tokens.limits.data();
    h.keys = tokens.keys.data(), h.key_groups = tokens.key_groups.data();
    if (lse) {
      h.lse = static_cast<const float*>(lse->const_data_ptr()) + b * lse->stride(0) + first * lse->stride(1);
      h.lse_head_stride = lse->stride(1), h.lse_stride = lse->stride(2);
    }
    const bool split = h.is_decode() || h.rows <= attention_kernels().panel;
    h.chunks = split ? (h.key_count + kChunk - 1) / kChunk : 1;
    size += h.rows * h.chunks * (1 + groups);
    heads.push_back(h);
  }
  states_ = std::make_unique<Buffer>(size);
  float* states = *states_;
  for (Heads& h : heads) {
    h.states = states;
    states += h.rows * h.chunks * (1 + groups);
  }
}

void Attention::keep_logits() {
  int64_t size = 0;
  for (Heads& h : heads) {
    h.logit_stride = round_up(h.key_count, kMaxLanes);
    if (h.is_decode()) size += h.rows * h.logit_stride;
  }
  logits_ = std::make_unique<Buffer>(size);
  float* logits = *logits_;
  for (Heads& h : heads) {
    if (!h.is_decode()) continue;
    h.logits = logits;
    logits += h.rows * h.logit_stride;
  }
}

void Attention::compute_states(bool all) {
  struct Task {
    const Heads* heads;
    int64_t row, chunk;
  };
  const AttentionKernels& kernels = attention_kernels();
  std::vector<Task> tasks;
  int64_t work = 0;
  for (const Heads& h : heads) {
    if (!all && !h.logits) continue;
    work += h.rows * h.key_count * h.head_dim;
    const int64_t panels = h.is_decode() ? 1 : (h.rows + kernels.panel - 1) / kernels.panel;
    for (int64_t panel = panels; panel-- > 0;)  // longest rows first
      for (int64_t chunk = 0; chunk < h.chunks; ++chunk) tasks.push_back({&h, panel * kernels.panel, chunk});
  }
  dynamic_parallel_for(tasks.size(), work, [&](int64_t i) {
    const Heads& h = *tasks[i].heads;
    const int64_t chunk = tasks[i].chunk, begin = chunk * kChunk;
    const int64_t end = h.chunks == 1 ? h.key_count : std::min(begin + kChunk, h.key_count);
    if (!h.is_decode()) return kernels.panel_sums(h, tasks[i].row, begin, end, chunk);
    Buffer scratch(h.rows * (kMaxHeadDim + kChunk));
    kernels.decode_sums(h, begin, end, chunk, scratch);
  });
}

RowSums Attention::merge_states(const Heads& h, int64_t r) const {
  RowSums result{0, {}};
  float max_logit = -kInfinity;
  for (int64_t chunk = 0; chunk < h.chunks; ++chunk) max_logit = std::max(max_logit, h.state(r, chunk)[0]);
  double total = 0;
  for (int64_t chunk = 0; chunk < h.chunks; ++chunk) {
    const float* state = h.state(r, chunk);
    const double weight = h.lse || state[0] == max_logit ? 1 : std::exp(double(state[0]) - max_logit);
    for (int64_t g = 0; g < h.groups; ++g) result.group_mass[g] += weight * state[1 + g];
  }
  for (int64_t g = 0; g < h.groups; ++g) total += result.group_mass[g];
  result.lse = max_logit == kInfinity ? kInfinity : float(max_logit + std::log(total));  // total is NaN beside infinity
  for (int64_t g = 0; g < h.groups; ++g) {
    if (total != total) result.group_mass[g] = kNaN;
    else if (!h.lse && total > 0) result.group_mass[g] /= total;
  }
  return result;
}

}  // namespace pruneops
