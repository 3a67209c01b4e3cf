// Token copies on the CPU: kv_compact, kv_compact_, paged_kv_compact_ and gather_tokens.
// Documentation: docs/kernels/token_copy.md
#pragma once

#include "token_copy_plan.h"

namespace pruneops {

// Checks that positions are in [0, limit) and lengths in [0, K]; in place also that positions ascend.
void check_values(const Plan& plan, const torch::stable::Tensor& keep, int64_t limit);

void run_plan(const Plan& plan);

}  // namespace pruneops
