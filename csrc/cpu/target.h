// Functions between PRUNEOPS_TARGET_BEGIN(isa) and PRUNEOPS_TARGET_END are compiled for that instruction set.
#pragma once

#define PRUNEOPS_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define PRUNEOPS_TARGET_BEGIN(isa) \
  PRUNEOPS_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define PRUNEOPS_TARGET_END PRUNEOPS_PRAGMA(clang attribute pop)
#else
#define PRUNEOPS_TARGET_BEGIN(isa) PRUNEOPS_PRAGMA(GCC push_options) PRUNEOPS_PRAGMA(GCC target(isa))
#define PRUNEOPS_TARGET_END PRUNEOPS_PRAGMA(GCC pop_options)
#endif

#define PRUNEOPS_AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
