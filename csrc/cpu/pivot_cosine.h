// pivot_cosine for C++ callers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace pruneops {

enum class Reduce : int64_t { kNone, kMax, kMean, kSum };

// pruneops_native::pivot_cosine
torch::stable::Tensor pivot_cosine(torch::stable::Tensor x, std::optional<torch::stable::Tensor> cu_seqlens,
                                   torch::stable::Tensor pivots, std::optional<torch::stable::Tensor> mask,
                                   int64_t reduce);

}  // namespace pruneops
