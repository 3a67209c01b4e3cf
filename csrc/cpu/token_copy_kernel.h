// A copy past the caches, compiled once per instruction set: a vector as long as a line spares the parts of lines that
// others leave in the processor's few write buffers.

#include "cpu/simd.h"

// `to` is aligned to 64 bytes, and bytes are a multiple of 64.
static void copy_past_caches(char* to, const char* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += sizeof(Vec))
    stream(reinterpret_cast<float*>(to + byte), load(reinterpret_cast<const float*>(from + byte)));
}
