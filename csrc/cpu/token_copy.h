// Moving tokens on the CPU.
#pragma once

#include "token_copy_plan.h"

namespace pruneops {

// Refuses positions outside [0, limit), lengths that keep does not have, and, in place, positions that do not ascend.
void expect_values(const Plan& plan, const torch::stable::Tensor& keep, int64_t limit);

// Carries a plan out.
void run(const Plan& plan);

}  // namespace pruneops
