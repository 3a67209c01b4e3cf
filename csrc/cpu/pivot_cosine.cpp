// Cosine of every token with P pivots in one pass over x, or the maximum, mean or sum over the pivots.
// Threads share tiles of tokens of all batch rows or sequences. At the start of a row or sequence a thread packs its
// pivots as float32; dot products of a block of tokens with all pivots and the squared norms are computed together (see
// products.h). A score's bits depend on its token and its pivot alone.
// Cost: 2 (P + 1) N D operations per batch row; x read once, 4 P N bytes written (4 N reduced), 4 P D bytes of pivots
// per thread and sequence. Memory per thread: the pivots, P D floats; dot products of a block of tokens, 96 P; a tile,
// 6 x 1024.
// See docs/kernels/pivot_cosine.md.

#include "cpu/pivot_cosine.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/tokens.h"

namespace pruneops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Destination of scores: out[p * stride + n], or out[n] if reduced over pivots; +inf where mask, unless null, is false.
struct Scores {
  float* out;
  int64_t stride;
  const bool* mask;
  int64_t mask_stride;
  Reduce reduce;
};

// Tile sizes, scratch size (floats) and functions of one instruction set.
struct Kernels {
  int64_t rows, block_rows, scratch;
  float (*pack)(const Tokens&, int64_t, float*);
  void (*score)(const Tokens&, int64_t, int64_t, const Packed&, const Scores&, float*, float*);
};

}  // namespace
}  // namespace pruneops

#define PRUNEOPS_KERNEL "cpu/pivot_cosine_kernel.h"
#include "cpu/foreach_target.h"

namespace pruneops {
namespace {

// A batch row, or a sequence of a packed tensor.
struct Sequence {
  Tokens x;
  int64_t tokens, first_tile, tiles;
  const int64_t* pivots;
  int64_t pivot_stride, offset;  // offset: subtracted from every pivot
  Scores output;
};

// Scores of all sequences, each with `pivots` pivots.
void score(const Kernels& kernels, const std::vector<Sequence>& sequences, int64_t pivots) {
  const int64_t width = sequences[0].x.width, tiles = sequences.back().first_tile + sequences.back().tiles;
  const int64_t pitch = round_up(width, kPad) + kPad;
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 18) / (kernels.rows * width * (pivots + 4)));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    Buffer panel(pivots * pitch), dots(kernels.block_rows * round_up(pivots, kPad)), scratch(kernels.scratch);
    std::vector<const float*> rows(pivots);
    std::vector<float> norm_factors(pivots);
    auto s = std::upper_bound(sequences.begin(), sequences.end(), begin,
                              [](int64_t tile, const Sequence& sequence) { return tile < sequence.first_tile; });
    for (--s; begin < end; begin = s->first_tile + s->tiles, ++s) {
      for (int64_t p = 0; p < pivots; ++p) {
        float* const row = panel + p * pitch;
        norm_factors[p] = norm_factor(kernels.pack(s->x, s->pivots[p * s->pivot_stride] - s->offset, row), true);
        rows[p] = row;
      }
      const int64_t first = (begin - s->first_tile) * kernels.rows, last = (end - s->first_tile) * kernels.rows;
      kernels.score(s->x, first, std::min(last, s->tokens), Packed{rows.data(), norm_factors.data(), pivots}, s->output,
                    dots, scratch);
    }
  });
}

}  // namespace

Tensor pivot_cosine(Tensor x, std::optional<Tensor> cu_seqlens, Tensor pivots, std::optional<Tensor> mask,
                    int64_t reduce) {
  const Kernels& kernels = *PRUNEOPS_DISPATCH(kKernels);
  const Tokens tokens = tokens_of("pivot_cosine", x);
  const bool reduced = Reduce(reduce) != Reduce::kNone;
  const int64_t batch = x.size(0), length = x.size(1), count = pivots.size(1);
  const int64_t sequences = cu_seqlens ? cu_seqlens->size(0) - 1 : batch;
  STD_TORCH_CHECK(pivots.size(0) == sequences, "pivot_cosine: a row of pivots for each row or sequence of x");
  STD_TORCH_CHECK(!mask || (mask->size(0) == batch && mask->size(1) == length), "pivot_cosine: shape of mask");
  STD_TORCH_CHECK(!reduced || count > 0, "pivot_cosine: no pivots to reduce over");
  Tensor result = torch::stable::new_empty(
      x, reduced ? std::vector{batch, length} : std::vector{batch, count, length}, ScalarType::Float);
  if (result.numel() == 0) return result;

  const int64_t* bounds = cu_seqlens ? static_cast<const int64_t*>(cu_seqlens->const_data_ptr()) : nullptr;
  std::vector<Sequence> work;
  int64_t tiles = 0, covered = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t b = bounds ? 0 : i, start = bounds ? bounds[i] : 0, end = bounds ? bounds[i + 1] : length;
    STD_TORCH_CHECK(0 <= start && start <= end && end <= length, "pivot_cosine: cu_seqlens must rise from 0 to T");
    if (start == end) continue;
    const int64_t* sequence_pivots = static_cast<const int64_t*>(pivots.const_data_ptr()) + i * pivots.stride(0);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t pivot = sequence_pivots[p * pivots.stride(1)];
      STD_TORCH_CHECK(start <= pivot && pivot < end, "pivot_cosine: a pivot is out of range");
    }
    Scores output{static_cast<float*>(result.mutable_data_ptr()) + b * result.stride(0) + start, length, nullptr, 0,
              Reduce(reduce)};
    if (mask) {
      output.mask = static_cast<const bool*>(mask->const_data_ptr()) + b * mask->stride(0) + start * mask->stride(1);
      output.mask_stride = mask->stride(1);
    }
    const int64_t sequence_tiles = (end - start + kernels.rows - 1) / kernels.rows;
    work.push_back({tokens.from(b * x.stride(0) + start * x.stride(1)), end - start, tiles, sequence_tiles,
                    sequence_pivots, pivots.stride(1), start, output});
    tiles += sequence_tiles;
    covered += end - start;
  }
  STD_TORCH_CHECK(covered == batch * length, "pivot_cosine: cu_seqlens must rise from 0 to T");
  score(kernels, work, count);
  return result;
}

}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CPU, m) { m.impl("pivot_cosine", TORCH_BOX(&pruneops::pivot_cosine)); }
