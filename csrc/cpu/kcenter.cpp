// Greedy k-center on the CPU by lazy rounds: the exact choice of the plain greedy loop, without an N x N matrix.
// nearest[n], the maximum similarity of token n to the chosen set, only grows: a stale one is too low. A round
//   refreshes the r tokens of minimum (nearest, index) with the centers chosen since they were last seen;
//   selects   the m of them of minimum (nearest, index) as candidates;
//   gram      computes dot products among the candidates, a group of columns at a time;
//   greedy    steps among them while the best precedes every other token, whose nearest can only be too low.
// Dot products have the same bits everywhere (kcenter_products.h), so m, r, tiles, threads and k do not change the
// choice. Most tokens soon lie above all that is chosen later and are seldom refreshed: together 4 passes over x and
// 0.4 to 0.5 of the 2 N k D operations of the plain loop. See docs/kernels/kcenter.md.

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

#include "cpu/kcenter_products.h"
#include "cpu/tokens.h"

namespace pruneops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tile sizes, scratch size (floats) and functions of one instruction set.
struct Kernels {
  int64_t rows, block_rows, scratch;
  float (*pack)(const Tokens&, int64_t, float*);
  void (*dots)(const Tokens&, const Rows&, const float* const*, int64_t, float*, int64_t, float*, float*);
  void (*norms)(const Rows&, const float*, bool, float*, float*);
  void (*nearest)(const Rows&, const float*, int64_t, const float*, int64_t, bool, const float*, float*);
};

}  // namespace
}  // namespace pruneops

#define PRUNEOPS_KERNEL "cpu/kcenter_kernel.h"
#include "cpu/foreach_target.h"

namespace pruneops {
namespace {

// Candidates m of a round. More of them take more steps a round, and a gram matrix of m dot products a step.
int64_t max_candidates(int64_t tokens) {
  return std::min(tokens, std::clamp<int64_t>(3 * std::sqrt(double(tokens)), 32, 512));
}

// Tokens r that a round refreshes: enough to take most steps that m candidates allow, and few rounds for large N.
int64_t refreshed_tokens(int64_t tokens) { return std::max(4 * max_candidates(tokens), tokens / 8); }

// Centers, in bytes: stored at most (then all tokens are refreshed and the store is emptied), and in L2 at a time.
constexpr int64_t kStoreBytes = int64_t{64} << 20;
constexpr int64_t kPanelBytes = int64_t{2} << 20;
constexpr int64_t kPanelCenters = 16;  // a multiple of every center_group

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

// Float32 dot products of tokens of any type, converted as they are read.
class FloatProducts : public KcenterProducts {
 public:
  FloatProducts(const Kernels& kernels, const Tokens& x, int64_t candidates)
      : KcenterProducts({kernels.rows, kernels.block_rows, 1, round_up(x.width, kPad) * 4, kernels.scratch}),
        kernels_(kernels),
        x_(x),
        pitch_(round_up(x.width, kPad) + kPad),
        panel_(candidates * pitch_),
        row_(pitch_) {}

  float square(int64_t token) override { return kernels_.pack(x_, token, row_); }

  void store_centers(const int64_t* tokens, int64_t count, int64_t at) override {
    for (int64_t i = 0; i < count; ++i) {
      if (at + i == int64_t(centers_.size())) {
        if (centers_.size() % kCentersPerBuffer == 0)
          buffers_.push_back(std::make_unique<Buffer>(kCentersPerBuffer * pitch_));
        centers_.push_back(*buffers_.back() + centers_.size() % kCentersPerBuffer * pitch_);
      }
      kernels_.pack(x_, tokens[i], centers_[at + i]);
    }
  }

  void center_dots(const Rows& rows, int64_t first, int64_t count, float* dots, int64_t stride, float* squares,
                   float* scratch) override {
    kernels_.dots(x_, rows, centers_.data() + first, count, dots, stride, squares, scratch);
  }

  void gather(int64_t slot, int64_t token) override { kernels_.pack(x_, token, panel_ + slot * pitch_); }

  void set_columns(const int64_t* slots, int64_t count) override {
    columns_.clear();
    for (int64_t c = 0; c < count; ++c) columns_.push_back(panel_ + slots[c] * pitch_);
  }

  void column_dots(int64_t begin, int64_t end, float* dots, int64_t stride) override {
    const Tokens panel{panel_, pitch_, pitch_ - kPad, Element::kFloat};
    kernels_.dots(panel, {nullptr, begin, end - begin}, columns_.data(), columns_.size(), dots + begin * stride, stride,
                  nullptr, nullptr);
  }

 private:
  static constexpr size_t kCentersPerBuffer = 16;

  const Kernels& kernels_;
  const Tokens x_;
  const int64_t pitch_;
  Buffer panel_, row_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<float*> centers_;
  std::vector<const float*> columns_;
};

std::unique_ptr<KcenterProducts> products_of(const Tokens& x, int64_t candidates) {
  if (x.type == Element::kBFloat16)
    if (auto products = bf16_products(x, candidates)) return products;
  return std::make_unique<FloatProducts>(*PRUNEOPS_DISPATCH(kKernels), x, candidates);
}

class LazyGreedy {
 public:
  explicit LazyGreedy(const Problem& problem)
      : p_(problem),
        kernels_(*PRUNEOPS_DISPATCH(kKernels)),
        max_candidates_(max_candidates(problem.tokens)),
        products_(products_of(problem.x, max_candidates_)),
        sizes_(products_->sizes),
        max_centers_(std::max(2 * max_candidates_, kStoreBytes / products_->sizes.center_bytes)),
        panel_(round_up(std::max<int64_t>(kPanelBytes / products_->sizes.center_bytes, 1), kPanelCenters)),
        nearest_(problem.tokens),
        norm_factors_(problem.tokens) {}

  void run() {
    if (p_.k == 0) return;
    for (int64_t n = 0; n < p_.tokens; ++n)
      nearest_[n] = p_.mask && !p_.mask[n * p_.mask_stride] ? kNaN : -kInfinity;
    if (p_.seed_count) choose_seeds(); else choose_first();
    while (done_ < p_.k) round();
  }

 private:
  // Tokens and the centers that they are compared with together.
  struct Block {
    Rows rows;
    int64_t first, count;
  };

  void choose(int64_t index, float radius) {
    nearest_[index] = kNaN;
    p_.indices[done_] = index + p_.offset;
    p_.radii[done_++] = radius;
  }

  void choose_seeds() {
    for (int64_t i = 0; i < p_.seed_count; ++i) choose(p_.seeds[i * p_.seed_stride] - p_.offset, kInfinity);
    if (done_ == p_.k) return;
    for (int64_t i = 0; i < done_; ++i) {
      const int64_t token = p_.indices[i] - p_.offset;
      add_center(token, norm_factor(products_->square(token), p_.cosine));
      if (int64_t(pending_.size()) < max_candidates_ && i + 1 < done_) continue;
      store_pending();
      if (i < max_candidates_) first_pass();
    }
  }

  // Chooses the first allowed finite token.
  void choose_first() {
    for (int64_t n = 0; n < p_.tokens && !done_; ++n) {
      if (nearest_[n] != nearest_[n]) continue;
      const float factor = norm_factor(products_->square(n), p_.cosine);
      if (factor != factor) continue;
      choose(n, kInfinity);
      add_center(n, factor);
    }
    if (done_ == p_.k) return;
    store_pending();
    first_pass();
  }

  void add_center(int64_t token, float factor) {
    pending_.push_back(token);
    pending_factors_.push_back(factor);
  }

  // Stores the new centers, with the others of their group if that has some already.
  void store_pending() {
    if (pending_.empty()) return;
    if (center_count_ && center_count_ + int64_t(pending_.size()) > max_centers_) refresh_all();
    const int64_t group = center_count_ / sizes_.center_group * sizes_.center_group;
    centers_.resize(center_count_);
    centers_.insert(centers_.end(), pending_.begin(), pending_.end());
    center_factors_.resize(center_count_);
    center_factors_.insert(center_factors_.end(), pending_factors_.begin(), pending_factors_.end());
    center_count_ = centers_.size();
    products_->store_centers(centers_.data() + group, center_count_ - group, group);
    pending_.clear();
    pending_factors_.clear();
  }

  // One pass over x: norm factors, and similarities to the first panel of centers.
  void first_pass() {
    const int64_t count = std::min(center_count_, panel_), rows = block_rows(p_.tokens);
    seen_.assign(p_.tokens, count);
    std::vector<Block> blocks;
    for (int64_t begin = 0; begin < p_.tokens; begin += rows)
      blocks.push_back({{nullptr, begin, std::min(rows, p_.tokens - begin)}, 0, count});
    run_blocks(blocks, true);
  }

  // Brings nearest_ of the listed tokens up to date, a panel of centers after the other. A block of tokens shares the
  // centers not seen by its first one, from a whole group on: those seen before change nothing.
  void refresh(std::vector<int64_t>& tokens) {
    std::sort(tokens.begin(), tokens.end(),
              [&](int64_t a, int64_t b) { return std::pair(seen_[a], a) < std::pair(seen_[b], b); });
    int64_t stale = 0;  // tokens that have not seen all centers up to `end`
    for (int64_t panel = 0, end; panel < center_count_; panel = end) {
      end = std::min(panel + panel_, center_count_);
      while (stale < int64_t(tokens.size()) && seen_[tokens[stale]] < end) ++stale;
      std::vector<Block> blocks;
      for (int64_t begin = 0, last; begin < stale; begin = last) {
        const int64_t seen = std::max(seen_[tokens[begin]], panel), rows = std::min(block_rows(stale), stale - begin);
        for (last = begin; last < begin + rows; ++last)
          if (std::max(seen_[tokens[last]], panel) != seen && last - begin >= sizes_.tile_rows) break;
        const int64_t first = seen / sizes_.center_group * sizes_.center_group;
        blocks.push_back({{tokens.data() + begin, 0, last - begin}, first, end - first});
      }
      run_blocks(blocks, false);
    }
    for (int64_t token : tokens) seen_[token] = center_count_;
  }

  // Whole tiles, a share for every thread.
  int64_t block_rows(int64_t tokens) const {
    const int64_t threads = torch::stable::get_num_threads();
    return round_up(std::min(sizes_.block_rows, (tokens + threads - 1) / threads), sizes_.tile_rows);
  }

  void refresh_all() {
    std::vector<int64_t> stale;
    for (int64_t n = 0; n < p_.tokens; ++n)
      if (nearest_[n] == nearest_[n] && seen_[n] < center_count_) stale.push_back(n);
    refresh(stale);
    center_count_ = 0;
    seen_.assign(p_.tokens, 0);
  }

  void run_blocks(const std::vector<Block>& blocks, bool first) {
    int64_t work = 0, size = 0, rows = 0;
    for (const Block& block : blocks) {
      work += block.rows.count * p_.x.width * (block.count + 4);
      rows = std::max(rows, round_up(block.rows.count, sizes_.tile_rows));
      size = std::max(size, round_up(block.count, kPad));
    }
    const int64_t count = blocks.size();
    const int64_t threads = std::min<int64_t>({count, torch::stable::get_num_threads(), 1 + (work >> 18)});
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      Buffer dots(rows * size), squares(rows), scratch(sizes_.scratch);
      for (int64_t i; (i = next.fetch_add(1)) < count;)
        run_block(blocks[i], dots, first ? static_cast<float*>(squares) : nullptr, scratch);
    });
  }

  void run_block(const Block& block, float* dots, float* squares, float* scratch) {
    const int64_t stride = round_up(block.count, kPad);
    products_->center_dots(block.rows, block.first, block.count, dots, stride, squares, scratch);
    if (squares) kernels_.norms(block.rows, squares, p_.cosine, nearest_, norm_factors_);
    kernels_.nearest(block.rows, dots, stride, center_factors_.data() + block.first, block.count, p_.cosine,
                     norm_factors_, nearest_);
  }

  void round() {
    store_pending();
    Key bound;
    const int64_t count = select(bound);
    if (keys_.empty()) {
      for (; done_ < p_.k; ++done_) p_.indices[done_] = -1, p_.radii[done_] = kNaN;
      return;
    }
    if (count == 0) return;
    gather_candidates(count);
    step(count, bound);
  }

  Key key_of(int64_t token) const { return make_key(ordered_bits(nearest_[token]), token); }

  // Moves the keys of the candidates to the front of keys_ and returns their number; `bound` is below all other keys.
  // Without candidates, a token that was not refreshed this time precedes all that were.
  int64_t select(Key& bound) {
    keys_.clear();
    for (int64_t n = 0; n < p_.tokens; ++n)
      if (nearest_[n] == nearest_[n]) keys_.push_back(key_of(n));
    const int64_t refreshed = std::min<int64_t>(refreshed_tokens(p_.tokens), keys_.size());
    bound = split_keys(refreshed, keys_.size());
    std::vector<int64_t> stale;
    for (int64_t i = 0; i < refreshed; ++i)
      if (const int64_t token = uint32_t(keys_[i]); seen_[token] < center_count_) stale.push_back(token);
    if (!stale.empty()) refresh(stale);
    for (int64_t i = 0; i < refreshed; ++i) keys_[i] = key_of(uint32_t(keys_[i]));
    const int64_t count = std::min(max_candidates_, refreshed);
    bound = std::min(bound, split_keys(count, refreshed));
    return std::partition(keys_.begin(), keys_.begin() + count, [&](Key key) { return key < bound; }) - keys_.begin();
  }

  // Moves the `count` lowest of the first `total` keys to the front; returns the lowest of the others.
  Key split_keys(int64_t count, int64_t total) {
    if (count >= total) return kLastKey;
    std::nth_element(keys_.begin(), keys_.begin() + count, keys_.begin() + total);
    return keys_[count];
  }

  void gather_candidates(int64_t count) {
    candidates_.resize(count);
    candidate_nearest_.resize(count);
    candidate_factors_.resize(count);
    gram_columns_.assign(count, nullptr);
    gram_strides_.assign(count, 0);
    torch::stable::parallel_for(0, count, grain(0), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t index = uint32_t(keys_[i]);
        candidates_[i] = index;
        candidate_nearest_[i] = nearest_[index];
        candidate_factors_[i] = norm_factors_[index];
        products_->gather(i, index);
      }
    });
  }

  // Minimum number of rows per thread.
  int64_t grain(int64_t columns) const {
    return std::max<int64_t>(1, (int64_t{1} << 18) / (p_.x.width * (columns + 4)));
  }

  // Greedy steps among the candidates until one of the others may precede the best.
  void step(int64_t count, Key bound) {
    int64_t width = std::max<int64_t>(4, last_steps_);  // expected steps, to keep the number of parallel regions low
    const int64_t first_step = done_;
    while (done_ < p_.k) {
      const int64_t best = std::min_element(keys_.begin(), keys_.begin() + count) - keys_.begin();
      if (keys_[best] > bound || keys_[best] == kLastKey) break;
      const float similarity = candidate_nearest_[best], factor = candidate_factors_[best];
      choose(candidates_[best], radius(similarity));
      add_center(candidates_[best], factor);
      if (done_ == p_.k) break;
      if (!gram_columns_[best]) {
        compute_gram(count, width, best);
        width = std::max<int64_t>(16, width / 2);
      }
      candidate_nearest_[best] = kNaN;
      keys_[best] = kLastKey;
      const float* dots = gram_columns_[best];
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

  // Gram columns, dot products with all candidates, of `best` and of the width - 1 candidates of next lowest key.
  void compute_gram(int64_t count, int64_t width, int64_t best) {
    std::vector<std::pair<Key, int64_t>> next;
    for (int64_t i = 0; i < count; ++i)
      if (!gram_columns_[i] && i != best && keys_[i] != kLastKey) next.emplace_back(keys_[i], i);
    width = std::min<int64_t>(round_up(width, sizes_.center_group), next.size() + 1);
    std::partial_sort(next.begin(), next.begin() + (width - 1), next.end());
    const int64_t stride = round_up(width, std::max<int64_t>(sizes_.center_group, 4));
    gram_buffers_.push_back(std::make_unique<Buffer>((count + sizes_.tile_rows) * stride));
    float* dots = *gram_buffers_.back();
    std::vector<int64_t> slots;
    for (int64_t g = 0; g < width; ++g) {
      const int64_t i = g ? next[g - 1].second : best;
      slots.push_back(i);
      gram_columns_[i] = dots + g;
      gram_strides_[i] = stride;
    }
    products_->set_columns(slots.data(), width);
    const int64_t tiles = (count + sizes_.tile_rows - 1) / sizes_.tile_rows;
    const int64_t tile_grain = std::max<int64_t>(1, grain(width) / sizes_.tile_rows);
    torch::stable::parallel_for(0, tiles, tile_grain, [&](int64_t begin, int64_t end) {
      products_->column_dots(begin * sizes_.tile_rows, std::min(end * sizes_.tile_rows, count), dots, stride);
    });
  }

  float radius(float nearest) const {
    if (nearest == kInfinity) return kNaN;
    return p_.cosine ? std::max(0.0f, 1.0f - nearest) : std::sqrt(std::max(0.0f, -nearest));
  }

  const Problem& p_;
  const Kernels& kernels_;
  const int64_t max_candidates_;
  const std::unique_ptr<KcenterProducts> products_;
  const KcenterProducts::Sizes sizes_;
  const int64_t max_centers_, panel_;  // stored centers at most, those in L2 at a time
  Buffer nearest_, norm_factors_;
  std::vector<int64_t> seen_;  // per token, the number of stored centers that nearest_ accounts for
  std::vector<int64_t> centers_, pending_;  // stored, not stored yet
  std::vector<float> pending_factors_, center_factors_;
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
