// The instruction set that the CPU kernels use on this machine.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pruneops {

// Each one includes those before it. kAvx512Bf16 and kAmx matter to kcenter of bfloat16 tokens only.
enum class CpuCapability { kDefault, kAvx2, kAvx512, kAvx512Bf16, kAmx };

constexpr const char* kCapabilityNames[] = {"default", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

inline const char* name(CpuCapability capability) { return kCapabilityNames[int(capability)]; }

#if defined(__x86_64__)

inline bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// Whether tiles of bfloat16 can be used. Linux gives a process their 8 KB of state on request.
inline bool has_amx_bf16() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (kBf16 | kTile)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline CpuCapability best_capability() {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return CpuCapability::kDefault;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
    return CpuCapability::kAvx2;
  if (!has_avx512_bf16()) return CpuCapability::kAvx512;
  return has_amx_bf16() ? CpuCapability::kAmx : CpuCapability::kAvx512Bf16;
}

// Intel's VDPBF16PS is half as fast as the float32 multiply-adds it replaces, AMD's twice.
inline bool prefers_avx512_bf16() { return !__builtin_cpu_is("intel"); }

#else

inline CpuCapability best_capability() { return CpuCapability::kDefault; }
inline bool prefers_avx512_bf16() { return false; }

#endif

// The best instruction set that the CPU supports and that is worth using. PRUNEOPS_CPU_CAPABILITY (read once), one of
// kCapabilityNames, lowers it.
inline CpuCapability cpu_capability() {
  static const CpuCapability capability = [] {
    const CpuCapability best = best_capability();
    const char* limit = std::getenv("PRUNEOPS_CPU_CAPABILITY");
    for (int i = 0; limit && i <= int(best); ++i)
      if (!std::strcmp(limit, kCapabilityNames[i])) return CpuCapability(i);
    return best == CpuCapability::kAvx512Bf16 && !prefers_avx512_bf16() ? CpuCapability::kAvx512 : best;
  }();
  return capability;
}

}  // namespace pruneops
