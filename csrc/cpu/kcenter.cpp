// Greedy k-center on the CPU, in lazy rounds: exact, never N x N.
//
// nearest[n], the greatest similarity of token n to the chosen set, only grows. So a round takes the m tokens of least
// (nearest, index) as candidates and steps among them for as long as the best of them precedes every other token,
// whose nearest may be out of date but can only be too low. Then one pass over x brings nearest up to date with all
// centers of the round. A round makes at least one step. Similarities have the same bits in a round and in a pass
// (see products.h), so neither m, the tiles, the threads nor k change the choice.
//
// Cost per batch row, R rounds:
//   operations  2 N k D for the passes + 2 m D per column computed among candidates (about 1.9 k columns) + 2 N D for
//               the norms, which ride on the first pass
//   bytes       R + 1 passes over x, m D gathered per round
//   memory      8 N (nearest, norms) + 8 N (keys) + 4 m D (candidates as float32) + a tile per thread: 2.6 MB measured
//               at N 23328, D 1024, k 2333
// m = 3 sqrt(N). Rounds at k = N / 10, random / image-like features: N 2880, m 128: 9 / 11, m 256: 7 / 8; N 9216,
// m 128: 19 / 20, m 256: 13 / 14, m 512: 10 / 11. Times at N 2880, D 1024, m 64, 96, 128, 192, 256, 384: 12.8, 11.2,
// 10.5, 9.2, 11.5, 12.3 ms (one core, random); from N 9216 on the differences between m 192 and 512 are noise.
//
// Measured with m 128 on one core of a shared Xeon whose FMA rate is 245 Gop/s (AVX-512), N 2880, D 4096, k 288,
// float32, floor 28 ms; ratios are those of the pass over x alone, with 64 or 128 centers:
//   version                                                    random          image-like      % of floor
//   rows of the next tile fetched ahead in bursts              50.7 ms         59.8 ms         55 / 47
//   one line fetched ahead per step of the tile (this one)     41.9 ms         51.9 ms         66 / 54
//   the next columns fetched ahead into L1 as well             0.8x to 0.95x as fast
//   blocks of 512 / 256 features instead of 1024               0.97x / 0.83x as fast
// Missing from the floor: the first rounds, of 1 to 9 steps, wait for memory (1.8 ms each, 26 GB/s), and by count of
// instructions the sums across lanes take about 15 % of a tile. Two cores, N 23328, D 1024, k 2333: 307 to 352 ms for
// m 192 to 512, 65 to 74 % of the floor.

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

// What one instruction set offers: its tile, and the scratch (floats) a call needs.
struct Kernels {
  int64_t rows, block_rows, scratch;
  float (*pack)(const Tokens&, int64_t, float*);
  void (*update)(const Tokens&, int64_t, int64_t, const Packed&, bool, bool, float*, float*, float*, float*);
  void (*candidates)(const Tokens&, int64_t, int64_t, const float* const*, int64_t, float*, int64_t);
};

}  // namespace
}  // namespace pruneops

#define PRUNEOPS_KERNEL "cpu/kcenter_kernel.h"
#include "cpu/foreach_target.h"

namespace pruneops {
namespace {

// Candidates per round. A round costs a pass over x, its candidates m more products per step: balanced near sqrt(N).
int64_t candidates_of(int64_t tokens) {
  return std::min(tokens, std::clamp<int64_t>(3 * std::sqrt(double(tokens)), 32, 512));
}

struct Problem {
  Tokens x;
  int64_t tokens, k, offset;  // offset is added to every index
  const int64_t* seeds;
  int64_t seed_stride, seed_count;
  const bool* mask;  // null: all allowed
  int64_t mask_stride;
  bool cosine;
  int64_t* indices;
  float* radii;
};

class Greedy {
 public:
  explicit Greedy(const Problem& problem)
      : p_(problem),
        kernels_(*PRUNEOPS_DISPATCH(kKernels)),
        cap_(candidates_of(problem.tokens)),
        panel_stride_(round_up(problem.x.width, kPad) + kPad),
        panel_(cap_ * panel_stride_),
        nearest_(problem.tokens),
        aux_(problem.tokens),
        center_aux_(round_up(cap_, kPad)),
        rows_(cap_) {}

  void run() {
    if (p_.k == 0) return;
    for (int64_t n = 0; n < p_.tokens; ++n)
      nearest_[n] = p_.mask && !p_.mask[n * p_.mask_stride] ? kNaN : -kInfinity;
    if (p_.seed_count) take_seeds(); else take_first();
    while (done_ < p_.k) {
      round();
      if (done_ < p_.k) pass(false);
    }
  }

 private:
  void take(int64_t index, float radius) {
    nearest_[index] = kNaN;
    p_.indices[done_] = index + p_.offset;
    p_.radii[done_++] = radius;
  }

  void add_center(const float* row, float aux) {
    rows_[count_] = row;
    center_aux_[count_++] = aux;
  }

  void take_seeds() {
    for (int64_t i = 0; i < p_.seed_count; ++i) take(p_.seeds[i * p_.seed_stride] - p_.offset, kInfinity);
    if (done_ == p_.k) return;
    for (int64_t i = 0; i < done_; ++i) {
      float* row = panel_ + count_ * panel_stride_;
      add_center(row, auxiliary(kernels_.pack(p_.x, p_.indices[i] - p_.offset, row), p_.cosine));
      if (count_ == cap_ || i + 1 == done_) pass(i < cap_);
    }
  }

  // The first allowed finite token, then the first pass.
  void take_first() {
    for (int64_t n = 0; n < p_.tokens && !count_; ++n) {
      if (nearest_[n] != nearest_[n]) continue;
      const float aux = auxiliary(kernels_.pack(p_.x, n, panel_), p_.cosine);
      if (aux != aux) continue;
      take(n, kInfinity);
      add_center(panel_, aux);
    }
    if (done_ < p_.k) pass(true);
  }

  // One pass over x: nearest_ learns of the centers collected since the last one.
  void pass(bool first) {
    const int64_t padded = round_up(count_, kPad);
    std::fill(center_aux_ + count_, center_aux_ + padded, kNaN);
    const Packed centers{rows_.data(), center_aux_, count_};
    const int64_t tiles = (p_.tokens + kernels_.rows - 1) / kernels_.rows;
    torch::stable::parallel_for(0, tiles, grain(count_), [&](int64_t begin, int64_t end) {
      Buffer dots((kernels_.block_rows + kernels_.rows) * padded), scratch(kernels_.scratch);
      kernels_.update(p_.x, begin * kernels_.rows, std::min(end * kernels_.rows, p_.tokens), centers, p_.cosine, first,
                      nearest_, aux_, dots, scratch);
    });
    count_ = 0;
  }

  // Tiles of rows that are worth a thread.
  int64_t grain(int64_t columns) const {
    return std::max<int64_t>(1, (int64_t{1} << 18) / (kernels_.rows * p_.x.width * (columns + 4)));
  }

  // Steps among the candidates, the tokens of least key, for as long as the best of them precedes all other tokens.
  void round() {
    keys_.clear();
    for (int64_t n = 0; n < p_.tokens; ++n)
      if (nearest_[n] == nearest_[n]) keys_.push_back(make_key(ordered(nearest_[n]), n));
    if (keys_.empty()) {
      for (; done_ < p_.k; ++done_) p_.indices[done_] = -1, p_.radii[done_] = kNaN;
      return;
    }
    const int64_t count = std::min<int64_t>(cap_, keys_.size());
    Key others = kLastKey;
    if (count < int64_t(keys_.size())) {
      std::nth_element(keys_.begin(), keys_.begin() + count, keys_.end());
      others = keys_[count];
    }
    load_candidates(count);
    int64_t group = std::max<int64_t>(4, last_steps_);  // a guess that keeps the number of parallel regions low
    const int64_t before = done_;
    while (done_ < p_.k) {
      const int64_t best = std::min_element(keys_.begin(), keys_.begin() + count) - keys_.begin();
      if (keys_[best] > others || keys_[best] == kLastKey) break;
      const int64_t index = candidates_[best];
      const float similarity = candidate_nearest_[best];
      take(index, radius(similarity));
      add_center(panel_ + best * panel_stride_, candidate_aux_[best]);
      if (done_ == p_.k) break;
      if (!dots_of_[best]) {
        compute_dots(count, group, best);
        group = std::max<int64_t>(16, group / 2);
      }
      candidate_nearest_[best] = kNaN;
      keys_[best] = kLastKey;
      const float* dots = dots_of_[best];
      const float aux = candidate_aux_[best];
      for (int64_t i = 0; i < count; ++i) {
        const float dot = dots[i * dots_stride_of_[best]];
        const float sim = p_.cosine ? dot * candidate_aux_[i] * aux : 2.0f * dot - candidate_aux_[i] - aux;
        if (candidate_nearest_[i] < sim) {
          candidate_nearest_[i] = sim;
          keys_[i] = make_key(ordered(sim), candidates_[i]);
        }
      }
    }
    dots_.clear();
    last_steps_ = done_ - before;
  }

  void load_candidates(int64_t count) {
    candidates_.resize(count);
    candidate_nearest_.resize(count);
    candidate_aux_.resize(count);
    dots_of_.assign(count, nullptr);
    dots_stride_of_.assign(count, 0);
    torch::stable::parallel_for(0, count, grain(0) * kernels_.rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t index = uint32_t(keys_[i]);
        candidates_[i] = index;
        candidate_nearest_[i] = nearest_[index];
        candidate_aux_[i] = aux_[index];
        kernels_.pack(p_.x, index, panel_ + i * panel_stride_);
      }
    });
  }

  // Products of all candidates with the `group` of them most likely to be chosen next, `best` among them.
  void compute_dots(int64_t count, int64_t group, int64_t best) {
    std::vector<std::pair<Key, int64_t>> next;
    for (int64_t i = 0; i < count; ++i)
      if (!dots_of_[i] && i != best && keys_[i] != kLastKey) next.emplace_back(keys_[i], i);
    group = std::min<int64_t>(group, next.size() + 1);
    std::partial_sort(next.begin(), next.begin() + (group - 1), next.end());
    const int64_t stride = round_up(group, 4);
    dots_.push_back(std::make_unique<Buffer>((count + kernels_.rows) * stride));
    float* dots = *dots_.back();
    std::vector<const float*> columns;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t i = g ? next[g - 1].second : best;
      columns.push_back(panel_ + i * panel_stride_);
      dots_of_[i] = dots + g;
      dots_stride_of_[i] = stride;
    }
    const Tokens panel{panel_, panel_stride_, panel_stride_ - kPad, Element::kFloat};
    const int64_t tiles = (count + kernels_.rows - 1) / kernels_.rows;
    torch::stable::parallel_for(0, tiles, grain(group), [&](int64_t begin, int64_t end) {
      kernels_.candidates(panel, begin * kernels_.rows, std::min(end * kernels_.rows, count), columns.data(), group,
                          dots, stride);
    });
  }

  float radius(float nearest) const {
    if (nearest == kInfinity) return kNaN;
    return p_.cosine ? std::max(0.0f, 1.0f - nearest) : std::sqrt(std::max(0.0f, -nearest));
  }

  const Problem& p_;
  const Kernels& kernels_;
  const int64_t cap_, panel_stride_;
  Buffer panel_, nearest_, aux_, center_aux_;
  std::vector<const float*> rows_;
  std::vector<Key> keys_;
  std::vector<int64_t> candidates_, dots_stride_of_;
  std::vector<float> candidate_nearest_, candidate_aux_;
  std::vector<const float*> dots_of_;
  std::vector<std::unique_ptr<Buffer>> dots_;
  int64_t done_ = 0, count_ = 0, last_steps_ = 0;
};

// One problem per thread where there are enough of them, else all threads on each.
void solve(const std::vector<Problem>& problems) {
  const int64_t threads = torch::stable::get_num_threads(), count = problems.size();
  if (count % threads && count < 4 * threads) {
    for (const Problem& problem : problems) Greedy(problem).run();
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) Greedy(problems[i]).run();
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
