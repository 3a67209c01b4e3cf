// What attention_mass and attention_received share: rows of attention and their softmax sums.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/common.h"
#include "cpu/threads.h"

namespace pruneops {

constexpr int64_t kWidest = 256;  // features of a head
constexpr int64_t kMostGroups = 8;
constexpr int64_t kMostLanes = 16;  // of any instruction set
constexpr int64_t kFewQueries = 4;  // up to so many of a head meet the keys one after another, more in panels
constexpr int64_t kChunk = 512;     // keys of one task where there are not many rows

// One key head and the query heads that meet it. Row r is query positions[r / heads] of head r % heads and sees the
// first limits[r / heads] of the listed keys. Limits do not fall; the last is key_count.
struct Heads {
  const void *query, *key;
  Element type;
  int64_t width, heads, head_stride, query_stride, key_stride;  // strides in elements
  int64_t rows, key_count, groups;
  const int64_t *positions, *limits, *keys;
  const uint32_t* key_groups;  // [key_count + kMostLanes]
  float scale;
  const float* lse;  // [heads, Sq]; null: not known
  int64_t lse_head_stride, lse_stride;
  int64_t chunks;
  float* states;  // [rows, chunks, 1 + groups]: lse or the greatest logit, sum of exp(logit - that) for every group
  float* logits;  // [rows, logit_stride] where they are kept, else null
  int64_t logit_stride;

  bool few() const { return rows <= kFewQueries * heads; }
  float* state(int64_t row, int64_t chunk) const { return states + (row * chunks + chunk) * (1 + groups); }
};

// What one instruction set offers; begin..end are places in the list of keys.
struct AttentionKernels {
  int64_t panel;  // rows that are computed together
  void (*panel_sums)(const Heads&, int64_t first_row, int64_t begin, int64_t end, int64_t chunk);
  void (*few_sums)(const Heads&, int64_t begin, int64_t end, int64_t chunk, float* scratch);
  void (*panel_received)(const Heads&, int64_t begin, int64_t end, float* received);
  void (*few_received)(const Heads&, int64_t head, float* received);
};
const AttentionKernels& attention_kernels();

// Of one batch row: the queries that count and see something, and the keys that any of them sees.
struct Visible {
  std::vector<int64_t> positions, limits, keys;
  std::vector<uint32_t> key_groups;
};

// Lse of a row, and its probability on the keys of each group.
struct RowSums {
  float lse;
  double shares[kMostGroups];
};

class Attention {
 public:
  // query_groups [B, Sq], key_groups [B, Sk]: -1 for a query that does not count and for a key that nobody sees.
  Attention(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
            const std::vector<int64_t>& query_groups, const std::vector<int64_t>& key_groups, int64_t groups,
            bool causal, double scale, const std::optional<torch::stable::Tensor>& lse);

  // Has few rows keep their logits.
  void keep_logits();
  // The states of all rows, or only of those that keep their logits: one pass over the keys.
  void sum(bool all);
  // What the states of row r say; about kRowWork multiplications.
  static constexpr int64_t kRowWork = 256;
  RowSums row(const Heads& h, int64_t r) const;

  std::vector<Visible> visible;  // [B]
  std::vector<Heads> heads;      // [B, Hk]

 private:
  std::unique_ptr<Buffer> states_, logits_;
};

}  // namespace pruneops
