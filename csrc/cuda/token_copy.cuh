// Token copies on CUDA: the kernel of kv_compact, kv_compact_, paged_kv_compact_ and gather_tokens.
// Layouts, copies and positions are those of csrc/token_copy_plan.h.
//
// Cost: kept bytes read once and written once; one launch for up to 128 tensors of up to 7 groups, passed by value.
// A block copies a chunk of the width of one slice's tokens; a thread copies one vector of every `rows`-th token.
//   new       a tile of tokens a block: 8 loads a thread, then 8 stores; zeros past a row's length
//   in place  all tokens of the slice, tile by tile, 4 a thread. Positions ascend, so the loads of a tile do not alias
//             the stores of earlier ones: they are issued before those stores. One barrier a tile orders a tile's own
//             loads before its stores. Threads compute token offsets a tile ahead; unmoved tokens are skipped
// Documentation: docs/kernels/token_copy.md
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/primitives.cuh"
#include "token_copy_plan.h"

namespace pruneops {

constexpr int kCopyThreads = 256;
constexpr int kCopyBlocksPerSm = 4;
constexpr int kNewTokens = 8;                    // of a thread, in flight
constexpr int kInPlaceTokens = 4;                // of a thread and tile; those of two tiles are in flight
constexpr int kMinInPlaceBlocks = 512;           // of all launches of a plan
constexpr int kSectorBytes = 32;                 // smallest memory transaction
constexpr int kMaxCopies = 128, kMaxGroups = 7;  // of a launch
constexpr int64_t kMaxKept = 1 << 30;            // tokens of a slice: their indices are ints

// Copies of the same layout and vector width.
struct CopyGroup {
  Layout layout;
  int vec_bytes;
  int chunk;                       // vectors of a token that a block copies
  unsigned chunks, tiles, blocks;  // blocks = slices * tiles * chunks
};

struct CopyParams {
  Positions positions;
  CopyGroup groups[kMaxGroups];
  const char* src[kMaxCopies];
  char* dst[kMaxCopies];
  uint8_t group[kMaxCopies];
  unsigned blocks;  // of each copy: the maximum over its groups
};
static_assert(sizeof(CopyParams) <= 4096, "kernel parameters");

// What a thread copies of a slice: one vector of tokens row, row + rows, ...
struct ThreadCopy {
  const char* src;  // its vector at position 0
  char* dst;
  const int64_t* keep;
  int64_t batch;
  int length, row, rows;
};

template <class Vec>
__device__ __forceinline__ void copy_tile(const Positions& positions, const Layout& layout, const ThreadCopy& copy,
                                          unsigned tile) {
  const int first = tile * copy.rows * kNewTokens + copy.row;
  int64_t position[kNewTokens];
  Vec vec[kNewTokens];
#pragma unroll
  for (int i = 0; i < kNewTokens; ++i) {
    const int token = first + i * copy.rows;
    position[i] = token < copy.length ? copy.keep[token * positions.keep_stride] : -1;
  }
#pragma unroll
  for (int i = 0; i < kNewTokens; ++i) {
    const char* src = copy.src + position[i] * layout.src_token_stride;
    vec[i] = position[i] >= 0 ? load_streaming(reinterpret_cast<const Vec*>(src)) : Vec{};
  }
#pragma unroll
  for (int i = 0; i < kNewTokens; ++i) {
    const int token = first + i * copy.rows;
    if (token < positions.count) *reinterpret_cast<Vec*>(copy.dst + token * layout.dst_token_stride) = vec[i];
  }
}

// Byte offsets of the tokens of a tile from position 0, in shared memory; -1 for an unmoved token.
constexpr int kOffsetStages = 3;
struct TileOffsets {
  int64_t src[kCopyThreads], dst[kCopyThreads];
};

// Positions::offset by 32-bit divisions.
__device__ __forceinline__ int64_t token_offset(const Positions& positions, const Layout& layout, int64_t batch,
                                                int64_t position) {
  if (!positions.block_table) return position * layout.src_token_stride;
  const unsigned page_size = unsigned(positions.page_size), block = unsigned(position) / page_size;
  const int64_t page =
      positions.block_table[batch * positions.table_batch_stride + block * positions.table_block_stride];
  return page * layout.page_stride + int64_t(unsigned(position) % page_size) * layout.src_token_stride;
}

template <class Vec>
__device__ __forceinline__ void copy_in_place(const Positions& positions, const Layout& layout,
                                              const ThreadCopy& copy) {
  TileOffsets* const offsets = &shared<TileOffsets>();
  const int tid = threadIdx.x, tokens = min(copy.rows * kInPlaceTokens, kCopyThreads);  // of a tile
  const auto compute_offsets = [&](TileOffsets& tile, int first) {
    const int token = first + tid;
    if (tid >= tokens || token >= copy.length) return;
    const int64_t position = copy.keep[token * positions.keep_stride];
    const bool unmoved = position == token;
    tile.src[tid] = unmoved ? -1 : token_offset(positions, layout, copy.batch, position);
    tile.dst[tid] = unmoved ? -1 : token_offset(positions, layout, copy.batch, token);
  };
  const auto for_each_token = [&](const int64_t* tile, int first, const auto& access) {
    int64_t offset[kInPlaceTokens];
#pragma unroll
    for (int i = 0; i < kInPlaceTokens; ++i) {
      const int token = copy.row + i * copy.rows;
      offset[i] = token < tokens && first + token < copy.length ? tile[token] : -1;
    }
#pragma unroll
    for (int i = 0; i < kInPlaceTokens; ++i)
      if (offset[i] >= 0) access(i, reinterpret_cast<Vec*>(copy.dst + offset[i]));
  };
  using Vecs = Vec[kInPlaceTokens];
  const auto load = [&](Vecs& vecs, int stage, int first) {
    for_each_token(offsets[stage].src, first, [&](int i, const Vec* vec) { vecs[i] = *vec; });
  };
  int current = 0, next = 1, after_next = 2;
  const auto step = [&](Vecs& vecs, Vecs& next_vecs, int first) {
    __syncthreads();  // the current tile is loaded, the offsets of the next one are computed
    load(next_vecs, next, first + tokens);
    compute_offsets(offsets[after_next], first + 2 * tokens);
    for_each_token(offsets[current].dst, first, [&](int i, Vec* vec) { *vec = vecs[i]; });
    const int free = current;
    current = next, next = after_next, after_next = free;
  };
  Vecs vecs, next_vecs;
  compute_offsets(offsets[current], 0);
  compute_offsets(offsets[next], tokens);
  __syncthreads();
  load(vecs, current, 0);
  for (int first = 0; first < copy.length; first += 2 * tokens) {
    step(vecs, next_vecs, first);
    step(next_vecs, vecs, first + tokens);
  }
}

// Block (copy, slice, tile, chunk); in place there is one tile.
template <bool IN_PLACE>
__global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerSm)
    copy_tokens(const __grid_constant__ CopyParams p) {
  const unsigned copy_index = blockIdx.x / p.blocks;
  unsigned index = blockIdx.x % p.blocks;
  const CopyGroup& group = p.groups[p.group[copy_index]];
  if (index >= group.blocks) return;
  const unsigned chunk = index % group.chunks;
  index /= group.chunks;
  const unsigned tile = index % group.tiles;
  const SliceOffsets slice = group.layout.slice(index / group.tiles);

  ThreadCopy copy;
  const int tid = threadIdx.x, column = tid % group.chunk;
  const int64_t byte = (int64_t(chunk) * group.chunk + column) * group.vec_bytes;
  copy.src = p.src[copy_index] + slice.src + byte;
  copy.dst = p.dst[copy_index] + slice.dst + byte;
  copy.keep = p.positions.keep + slice.keep;
  copy.batch = slice.batch;
  copy.length = int(min(p.positions.length(slice.batch), p.positions.count));
  copy.row = tid / group.chunk;
  copy.rows = kCopyThreads / group.chunk;
  const bool idle = copy.row >= copy.rows || byte >= group.layout.width;
  if (idle && !IN_PLACE) return;
  if (idle) copy.row = kCopyThreads;  // outside of every tile; the thread still takes part in barriers

  const auto run = [&](auto vec) {
    using Vec = decltype(vec);
    if constexpr (IN_PLACE)
      copy_in_place<Vec>(p.positions, group.layout, copy);
    else
      copy_tile<Vec>(p.positions, group.layout, copy, tile);
  };
  switch (group.vec_bytes) {
    case 16: return run(uint4{});
    case 8: return run(uint64_t{});
    case 4: return run(uint32_t{});
    case 2: return run(uint16_t{});
    default: return run(uint8_t{});
  }
}

// Divides the width of a token into about `min_chunks` chunks or more. A chunk is a whole number of sectors, at least
// two, and of a size that gives 9 of 10 threads a vector, or as many threads as possible.
inline void choose_chunk(CopyGroup& group, int64_t min_chunks) {
  const int64_t vecs = group.layout.width / group.vec_bytes, sector = std::max(1, kSectorBytes / group.vec_bytes);
  const auto parts = [&](int64_t size) { return (vecs + size - 1) / size; };
  const int64_t min_size = std::min(vecs, 2 * sector), target = (parts(min_chunks) + sector - 1) / sector * sector;
  int64_t size = std::min({vecs, std::max(min_size, target), int64_t(kCopyThreads)}), max_active = 0;
  for (; size >= min_size && max_active < kCopyThreads * 9 / 10; size -= sector) {
    const int64_t active = kCopyThreads / size * vecs / parts(size);
    if (active > max_active) max_active = active, group.chunk = int(size), group.chunks = unsigned(parts(size));
  }
}

inline CopyGroup make_group(const Plan& plan, int layout, int vec_bytes, int64_t min_chunks) {
  CopyGroup group{plan.layouts[layout], vec_bytes};
  choose_chunk(group, plan.in_place ? min_chunks : 1);
  const int64_t tile = plan.in_place ? plan.positions.count : kCopyThreads / group.chunk * kNewTokens;
  const int64_t tiles = (plan.positions.count + tile - 1) / tile, blocks = group.layout.slices() * tiles * group.chunks;
  token_copy::check(plan.positions.count <= kMaxKept && blocks <= INT32_MAX, "too many tokens for one launch");
  group.tiles = unsigned(tiles), group.blocks = unsigned(blocks);
  return group;
}

// Calls launch(params, blocks) for all copies of a plan, once if they fit the kernel parameters. In place the width of
// tokens is divided to give at least `min_blocks` blocks in all.
template <class Launch>
void for_each_launch(const Plan& plan, int64_t min_blocks, const Launch& launch) {
  int64_t slices = 0;
  for (const CopyDesc& copy : plan.copies) slices += plan.layouts[copy.layout].slices();
  CopyParams p{plan.positions};
  int layouts[kMaxGroups] = {}, groups = 0;
  int64_t copies = 0;
  const auto add = [&](const CopyDesc& copy) {  // false: the launch is full
    const int vec_bytes = max_vec_bytes(plan.layouts[copy.layout], copy);
    int group = 0;
    while (group < groups && (layouts[group] != copy.layout || p.groups[group].vec_bytes != vec_bytes)) ++group;
    if (copies == kMaxCopies || group == kMaxGroups) return false;
    if (group == groups) {
      p.groups[group] = make_group(plan, copy.layout, vec_bytes, (min_blocks + slices - 1) / slices);
      layouts[groups++] = copy.layout;
    }
    const unsigned blocks = std::max(p.blocks, p.groups[group].blocks);
    if ((copies + 1) * int64_t(blocks) > INT32_MAX) return false;
    p.src[copies] = copy.src, p.dst[copies] = copy.dst, p.group[copies] = uint8_t(group);
    p.blocks = blocks, ++copies;
    return true;
  };
  const auto flush = [&] {
    if (copies) launch(p, copies * p.blocks);
    copies = groups = 0, p.blocks = 0;
  };
  for (const CopyDesc& copy : plan.copies) {
    if (add(copy)) continue;
    flush();
    add(copy);
  }
  flush();
}

// Defined in token_copy.cu; runs on the current stream of keep's device.
void launch_plan(const Plan& plan, const torch::stable::Tensor& keep);

}  // namespace pruneops
