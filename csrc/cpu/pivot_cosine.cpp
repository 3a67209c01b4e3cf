// Cosine of every token with a few pivots, in one pass over x; reduced over the pivots on the fly where asked.
//
// Threads share tiles of tokens, from all batch rows or sequences together. A thread packs the pivots as float32 where
// their tokens begin; each block of tokens then meets all of them, norms in the same pass (see products.h). A score's
// bits depend on its token and its pivot alone.
//
// Cost:
//   operations  2 (P + 1) N D per batch row: the products and the norms
//   bytes       x read once, 4 P N written (4 N reduced), 4 P D of pivots per thread and sequence
//   memory      per thread the pivots, P D floats, products of a block of tokens, 96 P, and a tile, 6 x 1024
//
// Measured on a shared two-core AMD EPYC (Zen 4, AVX-512, FMA rate 117 Gop/s a core), N 2880, D 4096, P 8, float32,
// processor time of one core, 3 neighbours at work; the floor of 212 Mop is 1.81 ms, that of 47 MB is 1.3 to 2.3 ms at
// the 20 to 37 GB/s that a core could read:
//   version                                                         from memory    from cache, x 10
//   squares in a pass of their own, one line fetched ahead a step   3.8 ms         2.28 ms
//   as many lines fetched ahead as the next tile needs              3.6 ms         2.25 ms
//   and squares within the first two groups of columns (this one)   3.0 ms         1.98 ms, 91 % of the floor
//   the same with blocks of 512 features                            3.3 ms         2.07 ms
//   tiles of 3 x 8 / 3 x 4, squares within the first group          3.6 / 3.8 ms   2.65 / 2.66 ms
//   lines fetched to L1 / every second line                         1.15x / 1.1x
// Two cores: 1.24 ms at best, the selection of pivot_bottomk included (38 GB/s; a plain sum reads 35 to 59), and 1.4 ms
// in bfloat16, where widening takes a fifth. F.normalize and a matmul: 19 ms, in bfloat16 33 ms.

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

// Where scores go: out[p * stride + n], reduced over the pivots out[n]; +inf where mask, unless null, is false.
struct Scores {
  float* out;
  int64_t stride;
  const bool* mask;
  int64_t mask_stride;
  Reduce reduce;
};

// What one instruction set offers: its tile, and the scratch (floats) a call needs.
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

// Tokens that share their pivots: a batch row or a sequence of a packed tensor.
struct Sequence {
  Tokens x;
  int64_t tokens, first_tile, tiles;
  const int64_t* pivots;
  int64_t pivot_stride, offset;  // offset is to be taken off every pivot
  Scores to;
};

// Scores of all sequences, `pivots` pivots each.
void score(const Kernels& kernels, const std::vector<Sequence>& sequences, int64_t pivots) {
  const int64_t width = sequences[0].x.width, tiles = sequences.back().first_tile + sequences.back().tiles;
  const int64_t pitch = round_up(width, kPad) + kPad;
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 18) / (kernels.rows * width * (pivots + 4)));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    Buffer panel(pivots * pitch), dots(kernels.block_rows * round_up(pivots, kPad)), scratch(kernels.scratch);
    std::vector<const float*> rows(pivots);
    std::vector<float> aux(pivots);
    auto s = std::upper_bound(sequences.begin(), sequences.end(), begin,
                              [](int64_t tile, const Sequence& sequence) { return tile < sequence.first_tile; });
    for (--s; begin < end; begin = s->first_tile + s->tiles, ++s) {
      for (int64_t p = 0; p < pivots; ++p) {
        float* const row = panel + p * pitch;
        aux[p] = auxiliary(kernels.pack(s->x, s->pivots[p * s->pivot_stride] - s->offset, row), true);
        rows[p] = row;
      }
      const int64_t first = (begin - s->first_tile) * kernels.rows, last = (end - s->first_tile) * kernels.rows;
      kernels.score(s->x, first, std::min(last, s->tokens), Packed{rows.data(), aux.data(), pivots}, s->to, dots,
                    scratch);
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
    const int64_t* own = static_cast<const int64_t*>(pivots.const_data_ptr()) + i * pivots.stride(0);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t pivot = own[p * pivots.stride(1)];
      STD_TORCH_CHECK(start <= pivot && pivot < end, "pivot_cosine: a pivot is out of range");
    }
    Scores to{static_cast<float*>(result.mutable_data_ptr()) + b * result.stride(0) + start, length, nullptr, 0,
              Reduce(reduce)};
    if (mask) {
      to.mask = static_cast<const bool*>(mask->const_data_ptr()) + b * mask->stride(0) + start * mask->stride(1);
      to.mask_stride = mask->stride(1);
    }
    const int64_t own_tiles = (end - start + kernels.rows - 1) / kernels.rows;
    work.push_back({tokens.from(b * x.stride(0) + start * x.stride(1)), end - start, tiles, own_tiles, own,
                    pivots.stride(1), start, to});
    tiles += own_tiles;
    covered += end - start;
  }
  STD_TORCH_CHECK(covered == batch * length, "pivot_cosine: cu_seqlens must rise from 0 to T");
  score(kernels, work, count);
  return result;
}

}  // namespace pruneops

STABLE_TORCH_LIBRARY_IMPL(pruneops_native, CPU, m) { m.impl("pivot_cosine", TORCH_BOX(&pruneops::pivot_cosine)); }
