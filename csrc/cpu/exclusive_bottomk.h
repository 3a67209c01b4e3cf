// Declares exclusive_bottomk for operators that compute scores themselves.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace pruneops {

// pruneops_native::exclusive_bottomk
torch::stable::Tensor exclusive_bottomk(torch::stable::Tensor scores, std::vector<int64_t> quotas,
                                        std::optional<torch::stable::Tensor> taken);

}  // namespace pruneops
