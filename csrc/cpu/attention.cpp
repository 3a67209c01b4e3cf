// Softmax sums of rows of attention, without the matrix.
//
// Queries that do not count, keys that nobody sees and pairs that causality forbids are never multiplied: what remains
// is listed first. A task takes a panel of rows (48 with AVX-512) through all keys they see, or, where a key head has
// few rows, all of them through kChunk keys; the sums of chunks are joined in order. So neither threads nor batch
// neighbours nor strides change a bit.
//
// Cost, per visible pair of a query and a key:
//   operations  2 D, and one exp of about 25 vector operations a vector
//   bytes       query once; key once per panel (from cache), or once where rows are few
//   memory      1 + G floats a row (for every chunk of keys, where rows are few), a few integers a token
//
// attention_mass, S 1088, H 32, Hk 32, D 128, causal, G 4, float32, processor time on one core of a shared EPYC (Zen 4)
// whose FMA rate is 117 Gop/s, floor 41.4 ms; scaled_dot_product_attention takes 161 ms:
//   version                                                     time       % of floor
//   keys copied tile by tile                                    60.6 ms    68
//   float32 keys where they lie                                 57.9 ms    72
//   and the next ones asked for meanwhile (this one)            57.2 ms    72; 64 rows of 3072: 24.6 -> 20.2 ms
//   the greatest logit looked for every 32 / 128 keys           0.98x / 1x as fast
// Missing from the floor: exps 10 %, transposing the panels 6 %, waiting for the keys, and 3 % of pairs that share a
// vector with visible ones. One row of 32768, H 32: 23 to 27 ms, 20 to 23 GB/s where a plain sum reads 22 to 29.

#include "cpu/attention.h"

#include <torch/headeronly/util/Exception.h>

#include <cmath>

#define PRUNEOPS_KERNEL "cpu/attention_kernel.h"
#include "cpu/foreach_target.h"

namespace pruneops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Element element_of(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.stride(last) == 1 || tensor.size(last) == 1, "attention: features must be contiguous");
  STD_TORCH_CHECK(tensor.size(last) <= kWidest, "attention: at most ", kWidest, " features a head");
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

Visible visible_of(const int64_t* query_groups, int64_t queries, const int64_t* key_groups, int64_t keys, bool causal) {
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
  visible.key_groups.resize(visible.keys.size() + kMostLanes);
  return visible;
}

}  // namespace

const AttentionKernels& attention_kernels() { return *PRUNEOPS_DISPATCH(kKernels); }

Attention::Attention(const Tensor& query, const Tensor& key, const std::vector<int64_t>& query_groups,
                     const std::vector<int64_t>& key_groups, int64_t groups, bool causal, double scale,
                     const std::optional<Tensor>& lse) {
  const int64_t batch = query.size(0), query_heads = query.size(1), queries = query.size(2), width = query.size(3);
  const int64_t key_heads = key.size(1), keys = key.size(2);
  const Element type = element_of(query);
  STD_TORCH_CHECK(element_of(key) == type && key.size(0) == batch && key.size(3) == width,
                  "attention: key does not fit query");
  STD_TORCH_CHECK(key_heads > 0 && query_heads % key_heads == 0, "attention: ", key_heads, " heads of keys for ",
                  query_heads);
  STD_TORCH_CHECK(int64_t(query_groups.size()) == batch * queries && int64_t(key_groups.size()) == batch * keys &&
                      (!lse || lse->numel() == batch * query_heads * queries),
                  "attention: groups or lse do not fit query and key");
  STD_TORCH_CHECK(1 <= groups && groups <= kMostGroups, "attention: ", groups, " groups");
  for (const auto* own : {&query_groups, &key_groups})
    for (int64_t group : *own) STD_TORCH_CHECK(group < groups, "attention: a group is out of range");

  for (int64_t b = 0; b < batch; ++b)
    visible.push_back(
        visible_of(query_groups.data() + b * queries, queries, key_groups.data() + b * keys, keys, causal));
  int64_t size = 0;
  for (int64_t i = 0; i < batch * key_heads; ++i) {
    const int64_t b = i / key_heads, first = i % key_heads * (query_heads / key_heads);
    const Visible& own = visible[b];
    Heads h{};
    h.type = type, h.width = width, h.heads = query_heads / key_heads, h.groups = groups, h.scale = float(scale);
    h.query = advance(query, type, b * query.stride(0) + first * query.stride(1));
    h.key = advance(key, type, b * key.stride(0) + i % key_heads * key.stride(1));
    h.head_stride = query.stride(1), h.query_stride = query.stride(2), h.key_stride = key.stride(2);
    h.rows = own.positions.size() * h.heads, h.key_count = own.keys.size();
    h.positions = own.positions.data(), h.limits = own.limits.data();
    h.keys = own.keys.data(), h.key_groups = own.key_groups.data();
    if (lse) {
      h.lse = static_cast<const float*>(lse->const_data_ptr()) + b * lse->stride(0) + first * lse->stride(1);
      h.lse_head_stride = lse->stride(1), h.lse_stride = lse->stride(2);
    }
    const bool split = h.few() || h.rows <= attention_kernels().panel;
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
    h.logit_stride = round_up(h.key_count, kMostLanes);
    if (h.few()) size += h.rows * h.logit_stride;
  }
  logits_ = std::make_unique<Buffer>(size);
  float* logits = *logits_;
  for (Heads& h : heads) {
    if (!h.few()) continue;
    h.logits = logits;
    logits += h.rows * h.logit_stride;
  }
}

void Attention::sum(bool all) {
  struct Task {
    const Heads* heads;
    int64_t row, chunk;
  };
  const AttentionKernels& kernels = attention_kernels();
  std::vector<Task> tasks;
  int64_t work = 0;
  for (const Heads& h : heads) {
    if (!all && !h.logits) continue;
    work += h.rows * h.key_count * h.width;
    const int64_t panels = h.few() ? 1 : (h.rows + kernels.panel - 1) / kernels.panel;
    for (int64_t panel = panels; panel-- > 0;)  // those that see most come first
      for (int64_t chunk = 0; chunk < h.chunks; ++chunk) tasks.push_back({&h, panel * kernels.panel, chunk});
  }
  each(tasks.size(), work, [&](int64_t i) {
    const Heads& h = *tasks[i].heads;
    const int64_t chunk = tasks[i].chunk, begin = chunk * kChunk;
    const int64_t end = h.chunks == 1 ? h.key_count : std::min(begin + kChunk, h.key_count);
    if (!h.few()) return kernels.panel_sums(h, tasks[i].row, begin, end, chunk);
    Buffer scratch(h.rows * (kWidest + kChunk));
    kernels.few_sums(h, begin, end, chunk, scratch);
  });
}

RowSums Attention::row(const Heads& h, int64_t r) const {
  RowSums result{0, {}};
  float greatest = -kInfinity;
  for (int64_t chunk = 0; chunk < h.chunks; ++chunk) greatest = std::max(greatest, h.state(r, chunk)[0]);
  double total = 0;
  for (int64_t chunk = 0; chunk < h.chunks; ++chunk) {
    const float* state = h.state(r, chunk);
    const double weight = h.lse || state[0] == greatest ? 1 : std::exp(double(state[0]) - greatest);
    for (int64_t g = 0; g < h.groups; ++g) result.shares[g] += weight * state[1 + g];
  }
  for (int64_t g = 0; g < h.groups; ++g) total += result.shares[g];
  result.lse = greatest == kInfinity ? kInfinity : float(greatest + std::log(total));  // total is NaN beside infinity
  for (int64_t g = 0; g < h.groups; ++g) {
    if (total != total) result.shares[g] = kNaN;
    else if (!h.lse && total > 0) result.shares[g] /= total;
  }
  return result;
}

}  // namespace pruneops
