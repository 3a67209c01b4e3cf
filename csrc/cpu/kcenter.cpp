// Greedy k-center on the CPU by lazy rounds: the exact choice of the plain greedy loop, without an N x N matrix.
// nearest[n], the maximum similarity of token n to the chosen set, only grows. A round
//   selects  the m tokens of minimum (nearest, index) as candidates, m = 3 sqrt(N);
//   gram     computes dot products among the candidates, a group of columns at a time;
//   greedy   steps among them while the best precedes every other token, whose nearest can only be too low;
//   updates  nearest of all tokens with the centers of the round, in one pass over x.
// Each round takes at least one step. Dot products have the same bits everywhere (see products.h), so m, tiles, threads
// and k do not change the choice. Cost per batch row, R rounds: 2 N k D operations for updates, 2 m D per gram column
// (about 1.9 k columns), 2 N D for norms; R + 1 passes over x, m D gathered per round; 16 N + 4 m D bytes of memory.
// See docs/kernels/kcenter.md.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/tokens.h"

namespace pruneops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tile sizes, scratch size (floats) and functions of one instruction set.
struct Kernels {
  int64_t rows, block_rows, scratch;
  float (*pack)(const Tokens&, int64_t, float*);
  void (*update)(const Tokens&, int64_t, int64_t, const Packed&, bool, bool, float*, float*, float*, float*);
  void (*gram)(const Tokens&, int64_t, int64_t, const float* const*, int64_t, float*, int64_t);
};

}  // namespace
}  // namespace pruneops

#define PRUNEOPS_KERNEL "cpu/kcenter_kernel.h"
#include "cpu/foreach_target.h"

namespace pruneops {
namespace {

// Candidates m of a round. A round costs a pass over x, a step m dot products: balanced near sqrt(N).
int64_t max_candidates(int64_t tokens) {
  return std::min(tokens, std::clamp<int64_t>(3 * std::sqrt(double(tokens)), 32, 512));
}

struct Problem {
  Tokens x;
  int64_t tokens, k, offset;  // offset: added to every index
  const int64_t* seeds;
  int64_t seed_stride, seed_count;
  const bool* mask;  // null: all allowed
  int64_t mask_stride;
  bool cosine;
  int64_t* indices;
  float* radii;
};

class LazyGreedy {
 public:
  explicit LazyGreedy(const Problem& problem)
      : p_(problem),
        kernels_(*PRUNEOPS_DISPATCH(kKernels)),
        max_candidates_(max_candidates(problem.tokens)),
        panel_stride_(round_up(problem.x.width, kPad) + kPad),
        panel_(max_candidates_ * panel_stride_),
        nearest_(problem.tokens),
        norm_factors_(problem.tokens),
        center_factors_(round_up(max_candidates_, kPad)),
        center_rows_(max_candidates_) {}

  void run() {
    if (p_.k == 0) return;
    for (int64_t n = 0; n < p_.tokens; ++n)
      nearest_[n] = p_.mask && !p_.mask[n * p_.mask_stride] ? kNaN : -kInfinity;
    if (p_.seed_count) choose_seeds(); else choose_first();
    while (done_ < p_.k) {
      round();
      if (done_ < p_.k) update(false);
    }
  }

 private:
  void choose(int64_t index, float radius) {
    nearest_[index] = kNaN;
    p_.indices[done_] = index + p_.offset;
    p_.radii[done_++] = radius;
  }

  void add_center(const float* row, float factor) {
    center_rows_[center_count_] = row;
    center_factors_[center_count_++] = factor;
  }

  void choose_seeds() {
    for (int64_t i = 0; i < p_.seed_count; ++i) choose(p_.seeds[i * p_.seed_stride] - p_.offset, kInfinity);
    if (done_ == p_.k) return;
    for (int64_t i = 0; i < done_; ++i) {
      float* row = panel_ + center_count_ * panel_stride_;
      add_center(row, norm_factor(kernels_.pack(p_.x, p_.indices[i] - p_.offset, row), p_.cosine));
      if (center_count_ == max_candidates_ || i + 1 == done_) update(i < max_candidates_);
    }
  }

  // Chooses the first allowed finite token, then does the first update.
  void choose_first() {
    for (int64_t n = 0; n < p_.tokens && !center_count_; ++n) {
      if (nearest_[n] != nearest_[n]) continue;
      const float factor = norm_factor(kernels_.pack(p_.x, n, panel_), p_.cosine);
      if (factor != factor) continue;
      choose(n, kInfinity);
      add_center(panel_, factor);
    }
    if (done_ < p_.k) update(true);
  }

  // Update: one pass over x brings nearest_ up to date with the centers added since the last one.
  void update(bool first) {
    const int64_t padded = round_up(center_count_, kPad);
    std::fill(center_factors_ + center_count_, center_factors_ + padded, kNaN);
    const Packed centers{center_rows_.data(), center_factors_, center_count_};
    const int64_t tiles = (p_.tokens + kernels_.rows - 1) / kernels_.rows;
    torch::stable::parallel_for(0, tiles, grain(center_count_), [&](int64_t begin, int64_t end) {
      Buffer dots((kernels_.block_rows + kernels_.rows) * padded), scratch(kernels_.scratch);
      kernels_.update(p_.x, begin * kernels_.rows, std::min(end * kernels_.rows, p_.tokens), centers, p_.cosine, first,
                      nearest_, norm_factors_, dots, scratch);
    });
    center_count_ = 0;
  }

  // Minimum number of row tiles per thread.
  int64_t grain(int64_t columns) const {
    return std::max<int64_t>(1, (int64_t{1} << 18) / (kernels_.rows * p_.x.width * (columns + 4)));
  }

  // Select, gram and greedy of one round.
  void round() {
    keys_.clear();
    for (int64_t n = 0; n < p_.tokens; ++n)
      if (nearest_[n] == nearest_[n]) keys_.push_back(make_key(ordered_bits(nearest_[n]), n));
    if (keys_.empty()) {
      for (; done_ < p_.k; ++done_) p_.indices[done_] = -1, p_.radii[done_] = kNaN;
      return;
    }
    const int64_t count = std::min<int64_t>(max_candidates_, keys_.size());
    Key bound = kLastKey;
    if (count < int64_t(keys_.size())) {
      std::nth_element(keys_.begin(), keys_.begin() + count, keys_.end());
      bound = keys_[count];
    }
    gather_candidates(count);
    int64_t width = std::max<int64_t>(4, last_steps_);  // expected steps, to keep the number of parallel regions low
    const int64_t first_step = done_;
    while (done_ < p_.k) {
      const int64_t best = std::min_element(keys_.begin(), keys_.begin() + count) - keys_.begin();
      if (keys_[best] > bound || keys_[best] == kLastKey) break;
      const int64_t index = candidates_[best];
      const float similarity = candidate_nearest_[best];
      choose(index, radius(similarity));
      add_center(panel_ + best * panel_stride_, candidate_factors_[best]);
      if (done_ == p_.k) break;
      if (!gram_columns_[best]) {
        compute_gram(count, width, best);
        width = std::max<int64_t>(16, width / 2);
      }
      candidate_nearest_[best] = kNaN;
      keys_[best] = kLastKey;
      const float* dots = gram_columns_[best];
      const float factor = candidate_factors_[best];
      for (int64_t i = 0; i < count; ++i) {
        const float dot = dots[i * gram_strides_[best]];
        const float sim =
            p_.cosine ? dot * candidate_factors_[i] * factor : 2.0f * dot - candidate_factors_[i] - factor;
        if (candidate_nearest_[i] < sim) {
          candidate_nearest_[i] = sim;
          keys_[i] = make_key(ordered_bits(sim), candidates_[i]);
        }
      }
    }
    gram_buffers_.clear();
    last_steps_ = done_ - first_step;
  }

  void gather_candidates(int64_t count) {
    candidates_.resize(count);
    candidate_nearest_.resize(count);
    candidate_factors_.resize(count);
    gram_columns_.assign(count, nullptr);
    gram_strides_.assign(count, 0);
    torch::stable::parallel_for(0, count, grain(0) * kernels_.rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t index = uint32_t(keys_[i]);
        candidates_[i] = index;
        candidate_nearest_[i] = nearest_[index];
        candidate_factors_[i] = norm_factors_[index];
        kernels_.pack(p_.x, index, panel_ + i * panel_stride_);
      }
    });
  }

  // Gram columns, dot products with all candidates, of `best` and of the width - 1 candidates of next lowest key.
  void compute_gram(int64_t count, int64_t width, int64_t best) {
    std::vector<std::pair<Key, int64_t>> next;
    for (int64_t i = 0; i < count; ++i)
      if (!gram_columns_[i] && i != best && keys_[i] != kLastKey) next.emplace_back(keys_[i], i);
    width = std::min<int64_t>(width, next.size() + 1);
    std::partial_sort(next.begin(), next.begin() + (width - 1), next.end());
    const int64_t stride = round_up(width, 4);
    gram_buffers_.push_back(std::make_unique<Buffer>((count + kernels_.rows) * stride));
    float* dots = *gram_buffers_.back();
    std::vector<const float*> columns;
    for (int64_t g = 0; g < width; ++g) {
      const int64_t i = g ? next[g - 1].second : best;
      columns.push_back(panel_ + i * panel_stride_);
      gram_columns_[i] = dots + g;
      gram_strides_[i] = stride;
    }
    const Tokens panel{panel_, panel_stride_, panel_stride_ - kPad, Element::kFloat};
    const int64_t tiles = (count + kernels_.rows - 1) / kernels_.rows;
    torch::stable::parallel_for(0, tiles, grain(width), [&](int64_t begin, int64_t end) {
      kernels_.gram(panel, begin * kernels_.rows, std::min(end * kernels_.rows, count), columns.data(), width, dots,
                    stride);
    });
  }

  float radius(float nearest) const {
    if (nearest == kInfinity) return kNaN;
    return p_.cosine ? std::max(0.0f, 1.0f - nearest) : std::sqrt(std::max(0.0f, -nearest));
  }

  const Problem& p_;
  const Kernels& kernels_;
  const int64_t max_candidates_, panel_stride_;
  Buffer panel_, nearest_, norm_factors_, center_factors_;
  std::vector<const float*> center_rows_;
  std::vector<Key> keys_;
  std::vector<int64_t> candidates_, gram_strides_;
  std::vector<float> candidate_nearest_, candidate_factors_;
  std::vector<const float*> gram_columns_;
  std::vector<std::unique_ptr<Buffer>> gram_buffers_;
  int64_t done_ = 0, center_count_ = 0, last_steps_ = 0;
};

// One problem per thread if there are enough of them, else all threads on each in turn.
void solve(const std::vector<Problem>& problems) {
  const int64_t threads = torch::stable::get_num_threads(), count = problems.size();
  if (count % threads && count < 4 * threads) {
    for (const Problem& problem : problems) LazyGreedy(problem).run();
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) LazyGreedy(problems[i]).run();
  });
}

void check(const Problem& p) {
  STD_TORCH_CHECK(0 <= p.k && p.seed_count <= p.k && p.k <= p.tokens, "kcenter: k is ", p.k, " of ", p.tokens,
                  " tokens");
  for (int64_t i = 0; i < p.seed_count; ++i) {
    const int64_t seed = p.seeds[i * p.seed_stride] - p.offset;
    STD_TORCH_CHECK(0 <= seed && seed < p.tokens, "kcenter: a seed is out of range");
  }
}

std::tuple<Tensor, Tensor> outputs(const Tensor& x, std::vector<int64_t> shape) {
  return {torch::stable::new_empty(x, shape, ScalarType::Long), torch::stable::new_empty(x, shape, ScalarType::Float)};
}

std::tuple<Tensor, Tensor> kcenter(Tensor x, int64_t k, std::optional<Tensor> seeds, std::optional<Tensor> mask,
                                   bool cosine) {
  const Tokens tokens = tokens_of("kcenter", x);
  auto result = outputs(x, {x.size(0), k});
  std::vector<Problem> problems;
  for (int64_t b = 0; b < x.size(0); ++b) {
    Problem p{tokens.from(b * x.stride(0)), x.size(1), k, 0, nullptr, 0, 0, nullptr, 0, cosine, nullptr, nullptr};
    if (seeds) {
      p.seeds = static_cast<const int64_t*>(seeds->const_data_ptr()) + b * seeds->stride(0);
      p.seed_stride = seeds->stride(1), p.seed_count = seeds->size(1);
    }
    if (mask) {
      p.mask = static_cast<const bool*>(mask->const_data_ptr()) + b * mask->stride(0);
      p.mask_stride = mask->stride(1);
    }
    p.indices = static_cast<int64_t*>(std::get<0>(result).mutable_data_ptr()) + b * k;
    p.radii = static_cast<float*>(std::get<1>(result).mutable_data_ptr()) + b * k;
    check(p);
    problems.push_back(p);
  }
  solve(problems);
  return result;
}

std::tuple<Tensor, Tensor> kcenter_varlen(Tensor x, Tensor cu_seqlens, std::vector<int64_t> ks,
                                          std::optional<Tensor> seeds, bool cosine) {
  const Tokens tokens = tokens_of("kcenter", x);
  STD_TORCH_CHECK(cu_seqlens.size(0) == int64_t(ks.size()) + 1, "kcenter_varlen: cu_seqlens must hold len(ks) + 1");
  const int64_t* bounds = static_cast<const int64_t*>(cu_seqlens.const_data_ptr());
  int64_t total = 0;
  for (int64_t k : ks) total += k;
  auto result = outputs(x, {total});
  int64_t* indices = static_cast<int64_t*>(std::get<0>(result).mutable_data_ptr());
  float* radii = static_cast<float*>(std::get<1>(result).mutable_data_ptr());
  std::vector<Problem> problems;
  for (int64_t i = 0; i < int64_t(ks.size()); ++i) {
    const int64_t start = bounds[i * cu_seqlens.stride(0)], end = bounds[(i + 1) * cu_seqlens.stride(0)];
    STD_TORCH_CHECK(0 <= start && start <= end && end <= x.size(0), "kcenter_varlen: cu_seqlens must rise from 0 to T");
    Problem p{tokens.from(start * x.stride(0)), end - start, ks[i], start, nullptr, 0, 0, nullptr, 0, cosine,
              indices, radii};
    if (seeds) {
      p.seeds = static_cast<const int64_t*>(seeds->const_data_ptr()) + i * seeds->stride(0);
      p.seed_stride = seeds->stride(1), p.seed_count = seeds->size(1);
    }
    check(p);
    indices += p.k, radii += p.k;
    problems.push_back(p);
  }
  solve(problems);
  return result;
}

}  // namespace
}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CPU, m) {
  m.impl("kcenter", TORCH_BOX(&pruneops::kcenter));
  m.impl("kcenter_varlen", TORCH_BOX(&pruneops::kcenter_varlen));
}
