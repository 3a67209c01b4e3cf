// The instruction set that the CPU kernels use on this machine.
#pragma once

#include <cstdlib>
#include <cstring>

namespace pruneops {

enum class CpuCapability { kDefault, kAvx2, kAvx512 };

inline const char* name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::kAvx512: return "avx512";
    case CpuCapability::kAvx2: return "avx2";
    default: return "default";
  }
}

// The best compiled instruction set that the CPU supports. PRUNEOPS_CPU_CAPABILITY=default|avx2 (read once) lowers it.
inline CpuCapability cpu_capability() {
  static const CpuCapability capability = [] {
    CpuCapability best = CpuCapability::kDefault;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      best = CpuCapability::kAvx2;
    if (best == CpuCapability::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = CpuCapability::kAvx512;
#endif
    const char* limit = std::getenv("PRUNEOPS_CPU_CAPABILITY");
    if (limit && !std::strcmp(limit, "default")) return CpuCapability::kDefault;
    if (limit && !std::strcmp(limit, "avx2") && best == CpuCapability::kAvx512) return CpuCapability::kAvx2;
    return best;
  }();
  return capability;
}

}  // namespace pruneops
