// The host part that kv_compact, paged_kv_compact_ and gather_tokens have in common.

#pragma once

#include "cuda/host.cuh"
#include "cuda/token_copy.cuh"

namespace pruneops {

using Tensors = std::vector<Tensor>;

void run(const Plan& plan, const Tensor& keep);  // in kv_compact.cu

}  // namespace pruneops
