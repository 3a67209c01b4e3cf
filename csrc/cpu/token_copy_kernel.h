// A copy by non-temporal stores, compiled once per instruction set. A full cache line per store leaves no partial lines
// in the processor's few write-combining buffers.
// Documentation: docs/kernels/token_copy.md

#include "cpu/simd.h"

// `dst` is aligned to 64 bytes, and `bytes` is a multiple of 64.
static void copy_non_temporal(char* dst, const char* src, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += sizeof(Vec))
    store_streaming(reinterpret_cast<float*>(dst + byte), load(reinterpret_cast<const float*>(src + byte)));
}
