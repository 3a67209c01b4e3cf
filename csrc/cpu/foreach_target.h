// Function multiversioning: includes PRUNEOPS_KERNEL once per instruction set, each time in its own namespace and with
// the matching target attribute. PRUNEOPS_DISPATCH(f) is the address of f for the best set that this machine supports.
//
//   #define PRUNEOPS_KERNEL "cpu/<op>_kernel.h"
//   #include "cpu/foreach_target.h"
//
// The kernel file includes only "cpu/simd.h", or products.h which includes it, and has no lambdas (they do not inherit
// the target pragma). Include its other dependencies before this file.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/common.h"
#include "cpu/cpu_features.h"
#include "cpu/target.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed only between inlined functions
#endif

#if defined(__x86_64__)

PRUNEOPS_TARGET_BEGIN(PRUNEOPS_AVX512)
#define PRUNEOPS_LANES 16
namespace pruneops::avx512 {
#include PRUNEOPS_KERNEL
}
#undef PRUNEOPS_LANES
PRUNEOPS_TARGET_END

PRUNEOPS_TARGET_BEGIN("avx2,fma,f16c")
#define PRUNEOPS_LANES 8
namespace pruneops::avx2 {
#include PRUNEOPS_KERNEL
}
#undef PRUNEOPS_LANES
PRUNEOPS_TARGET_END

#define PRUNEOPS_DISPATCH(function)                                               \
  (::pruneops::cpu_capability() >= ::pruneops::CpuCapability::kAvx512             \
       ? &::pruneops::avx512::function                                            \
       : ::pruneops::cpu_capability() == ::pruneops::CpuCapability::kAvx2         \
             ? &::pruneops::avx2::function                                        \
             : &::pruneops::portable::function)

#else

#define PRUNEOPS_DISPATCH(function) (&::pruneops::portable::function)

#endif

#define PRUNEOPS_LANES 4
namespace pruneops::portable {
#include PRUNEOPS_KERNEL
}
#undef PRUNEOPS_LANES
