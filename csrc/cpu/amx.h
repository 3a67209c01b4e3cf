// Tiles of the matrix unit (AMX): eight registers of 16 rows of 64 bytes. TDPBF16PS adds to tile C [16, 16] of float32
// the product of A [16, 32] of bfloat16 and B, which holds features 2 k and 2 k + 1 of its 16 columns side by side in
// row k. Each element is a sum of 16 fused multiply-adds over even features, plus the same over odd ones, plus C; it
// rounds to nearest even, and takes subnormal inputs and results as zero.
#pragma once

#include <cstdint>

namespace pruneops::amx {

constexpr int64_t kTile = 16;         // rows, and columns of float32
constexpr int64_t kDepth = 32;        // features of a step
constexpr int64_t kTileBytes = 1024;  // of A, B or C

// Sets all tile registers of this thread to their full size while it lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Config {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    };
    static constexpr Config config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
};

// Instructions as macros, since a tile register is part of the instruction. Strides are in bytes. "memory" orders them
// after stores to what they load; the compiler's own intrinsics (GCC 12) lack it.
#define PRUNEOPS_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::: "memory")
#define PRUNEOPS_TILE_LOAD(tile, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(int64_t(stride)) : "memory")
#define PRUNEOPS_TILE_LOAD_STREAMING(tile, from, stride) \
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(int64_t(stride)) : "memory")
#define PRUNEOPS_TILE_STORE(tile, to, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(int64_t(stride)) : "memory")
#define PRUNEOPS_TILE_MULTIPLY(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")

}  // namespace pruneops::amx
