// Shared by attention_mass and attention_received: rows of attention and their softmax sums per key group.
// docs/kernels/attention.md
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/common.h"
#include "cpu/threads.h"

namespace pruneops {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxGroups = 8;
constexpr int64_t kMaxLanes = 16;      // of any instruction set
constexpr int64_t kDecodeQueries = 4;  // up to this many queries per head take the decode path, more the panel path
constexpr int64_t kChunk = 512;        // keys of one split-KV task

// One key head and its query heads (GQA). Row r is query positions[r / heads] of head r % heads. It attends to the
// first limits[r / heads] of the listed keys. Limits are non-decreasing; the last is key_count.
struct Heads {
  const void *query, *key;
  Element type;
  int64_t head_dim, heads, head_stride, query_stride, key_stride;  // strides in elements
  int64_t rows, key_count, groups;
  const int64_t *positions, *limits, *keys;
  const uint32_t* key_groups;  // [key_count + kMaxLanes]
  float scale;
  const float* lse;  // [heads, Sq]; null: not given
  int64_t lse_head_stride, lse_stride;
  int64_t chunks;
  float* states;  // [rows, chunks, 1 + groups]: shift (lse or the max logit), sum of exp(logit - shift) per key group
  float* logits;  // [rows, logit_stride] if kept, else null
  int64_t logit_stride;

  bool is_decode() const { return rows <= kDecodeQueries * heads; }
  float* state(int64_t row, int64_t chunk) const { return states + (row * chunks + chunk) * (1 + groups); }
};

// Functions of one instruction set; begin..end index the list of keys.
struct AttentionKernels {
  int64_t panel;  // rows of a panel
  void (*panel_sums)(const Heads&, int64_t first_row, int64_t begin, int64_t end, int64_t chunk);
  void (*decode_sums)(const Heads&, int64_t begin, int64_t end, int64_t chunk, float* scratch);
  void (*panel_received)(const Heads&, int64_t begin, int64_t end, float* received);
  void (*decode_received)(const Heads&, int64_t head, float* received);
};
const AttentionKernels& attention_kernels();

// Of one batch row: the counted queries that attend to at least one key, and the keys that any of them attends to.
struct Visible {
  std::vector<int64_t> positions, limits, keys;
  std::vector<uint32_t> key_groups;
};

// Lse of a row and its total probability per key group.
struct RowSums {
  float lse;
  double group_mass[kMaxGroups];
};

class Attention {
 public:
  // query_groups [B, Sq], key_groups [B, Sk]: -1 for a query that is not counted and for a masked key.
  Attention(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
            const std::vector<int64_t>& query_groups, const std::vector<int64_t>& key_groups, int64_t groups,
            bool causal, double scale, const std::optional<torch::stable::Tensor>& lse);

  // Allocates logits for the key heads on the decode path.
  void keep_logits();
  // Computes the states of all rows, or only of those that keep their logits, in one pass over the keys.
  void compute_states(bool all);
  // Merges the states of the chunks of row r; costs about kMergeWork multiplications.
  static constexpr int64_t kMergeWork = 256;
  RowSums merge_states(const Heads& h, int64_t r) const;

  std::vector<Visible> visible;  // [B]
  std::vector<Heads> heads;      // [B, Hk]

 private:
  std::unique_ptr<Buffer> states_, logits_;
};

}  // namespace pruneops
