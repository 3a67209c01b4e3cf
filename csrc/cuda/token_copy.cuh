// Moving kept tokens: the kernel and launches of kv_compact, kv_compact_, paged_kv_compact_ and gather_tokens.
// csrc/token_copy_plan.h says how tokens lie (forms), which tensors there are (jobs) and where tokens come from (positions).
//
// Right to the bit on an H100, where 64 caches 3072 -> 352 of the first case below take 135 us and their floor is 123.
// The other times are expectations from counted bytes. tests/cuda_emulation runs the kernel on emulated threads.
//
// One launch for 128 tensors of at most 7 forms, which travel by value. Nothing is computed: every kept byte is read
// once and written once, in units of 16 bytes, or of what all addresses and strides of a tensor are multiples of. A
// block of 256 threads takes a slice of the width of one lane's tokens, a thread one unit of every so-many-th token.
//   new       a block has one tile of tokens: 8 loads a thread, then 8 stores; zeros past a row's length. Sources leave
//             the caches first, results stay for whoever reads them next
//   in place  a block has all tokens, tile by tile, 4 a thread. Positions ascend, so that stores of a tile never meet
//             loads of a later one: those are issued before, and the one barrier a tile is for its own loads. Slices
//             and lanes share no bytes. A thread per token finds where it is and goes (position, page, slot), a tile
//             ahead of its loads. Tokens that stay where they are, are neither read nor written
//
// Copies at 4.3 TB/s on an H200 with 1 us of latency need 2.2 MB of loads in flight, 16 KB a multiprocessor. 4 blocks
// fit there (64 registers a thread), with 32 KB each, in place 16 to 32 KB: 4 to 8 times as much.
//   64 caches 3072 -> 352, B 1, Hk 32, D 128, bf16   185 MB in and out: floor 86 us. 6144 blocks, 12 waves; one lives
//       about 2 us if it is alone: parameters, keep and tokens one after the other
//   64 such caches 3072 -> 2765 in place             1.45 GB in and out: floor 674 us. 2048 blocks, 3.9 waves
//   64 caches 3072 -> 2765 in place, Hk 4            181 MB in and out: floor 84 us. 256 lanes would leave one block to
//       some multiprocessors and two to others; slices of 128 bytes make 512 blocks, 3 or 4 for each and 8 to 16 MB in
//       flight. 22 tiles at 1 us are 22 us: memory is the limit, not latency
//   one cache 3072 -> 2765 in place, Hk 8            6 MB in and out: floor 3 us. 32 blocks with slices of 64 bytes, 11
//       tiles at 1 us: latency is
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/primitives.cuh"
#include "token_copy_plan.h"

namespace pruneops {

constexpr int kMoveThreads = 256;
constexpr int kMoveBlocks = 4;                   // of a multiprocessor
constexpr int kNewTokens = 8;                    // of a thread, at a time
constexpr int kInPlaceTokens = 4;                // and as many of the next tile
constexpr int kEnoughBlocks = 512;               // in place
constexpr int kSector = 32;                      // bytes: the least that memory moves
constexpr int kMostJobs = 128, kMostGroups = 7;  // of a launch
constexpr int64_t kMostKept = 1 << 30;           // of a lane: counted by ints

// Jobs whose tokens lie alike and move in units of the same size.
struct Group {
  Form form;
  int unit;                        // bytes
  int slice;                       // units of a token that a block moves
  unsigned slices, tiles, blocks;  // blocks: lanes * tiles * slices
};

struct Moves {
  Positions positions;
  Group groups[kMostGroups];
  const char* from[kMostJobs];
  char* to[kMostJobs];
  uint8_t group[kMostJobs];
  unsigned blocks;  // of every job: as many as one of them needs
};
static_assert(sizeof(Moves) <= 4096, "parameters of a kernel");

// What a thread moves of a lane: one unit of tokens row, row + rows, ...
struct Share {
  const char* from;  // its unit at position 0
  char* to;
  const int64_t* keep;
  int64_t batch;
  int length, row, rows;
};

template <class Unit>
__device__ __forceinline__ void move_tile(const Positions& positions, const Form& form, const Share& share,
                                          unsigned tile) {
  const int first = tile * share.rows * kNewTokens + share.row;
  int64_t position[kNewTokens];
  Unit unit[kNewTokens];
#pragma unroll
  for (int i = 0; i < kNewTokens; ++i) {
    const int token = first + i * share.rows;
    position[i] = token < share.length ? share.keep[token * positions.keep_token] : -1;
  }
#pragma unroll
  for (int i = 0; i < kNewTokens; ++i) {
    const char* from = share.from + position[i] * form.from_token;
    unit[i] = position[i] >= 0 ? load_once(reinterpret_cast<const Unit*>(from)) : Unit{};
  }
#pragma unroll
  for (int i = 0; i < kNewTokens; ++i) {
    const int token = first + i * share.rows;
    if (token < positions.count) *reinterpret_cast<Unit*>(share.to + token * form.to_token) = unit[i];
  }
}

// Bytes from position 0 to where the tokens of a tile are and go; -1 for one that stays.
constexpr int kPlaceTiles = 3;  // in shared memory
struct Places {
  int64_t from[kMoveThreads], to[kMoveThreads];
};

// Positions::offset of a position in pages by 32-bit divisions.
__device__ __forceinline__ int64_t offset_of(const Positions& positions, const Form& form, int64_t batch,
                                             int64_t position) {
  if (!positions.table) return position * form.from_token;
  const unsigned page = unsigned(positions.page), block = unsigned(position) / page;
  const int64_t number = positions.table[batch * positions.table_batch + block * positions.table_block];
  return number * form.page_stride + int64_t(unsigned(position) % page) * form.from_token;
}

template <class Unit>
__device__ __forceinline__ void move_in_place(const Positions& positions, const Form& form, const Share& share) {
  Places* const places = &shared<Places>();
  const int tid = threadIdx.x, tokens = min(share.rows * kInPlaceTokens, kMoveThreads);  // of a tile
  const auto find = [&](Places& tile, int first) {
    const int token = first + tid;
    if (tid >= tokens || token >= share.length) return;
    const int64_t position = share.keep[token * positions.keep_token];
    const bool stays = position == token;
    tile.from[tid] = stays ? -1 : offset_of(positions, form, share.batch, position);
    tile.to[tid] = stays ? -1 : offset_of(positions, form, share.batch, token);
  };
  const auto each = [&](const int64_t* offsets, int first, const auto& move) {
    int64_t offset[kInPlaceTokens];
#pragma unroll
    for (int i = 0; i < kInPlaceTokens; ++i) {
      const int at = share.row + i * share.rows;
      offset[i] = at < tokens && first + at < share.length ? offsets[at] : -1;
    }
#pragma unroll
    for (int i = 0; i < kInPlaceTokens; ++i)
      if (offset[i] >= 0) move(i, reinterpret_cast<Unit*>(share.to + offset[i]));
  };
  using Units = Unit[kInPlaceTokens];
  const auto load = [&](Units& units, int tile, int first) {
    each(places[tile].from, first, [&](int i, const Unit* unit) { units[i] = *unit; });
  };
  int now = 0, next = 1, later = 2;
  const auto step = [&](Units& units, Units& ahead, int first) {
    __syncthreads();  // this tile is all read; where the next one goes is known
    load(ahead, next, first + tokens);
    find(places[later], first + 2 * tokens);
    each(places[now].to, first, [&](int i, Unit* unit) { *unit = units[i]; });
    const int done = now;
    now = next, next = later, later = done;
  };
  Units units, ahead;
  find(places[now], 0);
  find(places[next], tokens);
  __syncthreads();
  load(units, now, 0);
  for (int first = 0; first < share.length; first += 2 * tokens) {
    step(units, ahead, first);
    step(ahead, units, first + tokens);
  }
}

// Block (job, lane, tile, slice); in place there is one tile.
template <bool IN_PLACE>
__global__ void __launch_bounds__(kMoveThreads, kMoveBlocks) move_tokens(const __grid_constant__ Moves p) {
  const unsigned job = blockIdx.x / p.blocks;
  unsigned index = blockIdx.x % p.blocks;
  const Group& group = p.groups[p.group[job]];
  if (index >= group.blocks) return;
  const unsigned slice = index % group.slices;
  index /= group.slices;
  const unsigned tile = index % group.tiles;
  const Lane lane = group.form.lane(index / group.tiles);

  Share share;
  const int tid = threadIdx.x, column = tid % group.slice;
  const int64_t byte = (int64_t(slice) * group.slice + column) * group.unit;
  share.from = p.from[job] + lane.from + byte;
  share.to = p.to[job] + lane.to + byte;
  share.keep = p.positions.keep + lane.keep;
  share.batch = lane.batch;
  share.length = int(min(p.positions.length(lane.batch), p.positions.count));
  share.row = tid / group.slice;
  share.rows = kMoveThreads / group.slice;
  const bool idle = share.row >= share.rows || byte >= group.form.width;
  if (idle && !IN_PLACE) return;
  if (idle) share.row = kMoveThreads;  // of no tile

  const auto move = [&](auto unit) {
    using Unit = decltype(unit);
    if constexpr (IN_PLACE)
      move_in_place<Unit>(p.positions, group.form, share);
    else
      move_tile<Unit>(p.positions, group.form, share, tile);
  };
  switch (group.unit) {
    case 16: return move(uint4{});
    case 8: return move(uint64_t{});
    case 4: return move(uint32_t{});
    case 2: return move(uint16_t{});
    default: return move(uint8_t{});
  }
}

// Cuts tokens into about `least` slices or more: of whole sectors, two or more, of a size that gives 9 of 10 threads
// a unit to move, or as many as can be.
inline void cut(Group& group, int64_t least) {
  const int64_t units = group.form.width / group.unit, sector = std::max(1, kSector / group.unit);
  const auto parts = [&](int64_t size) { return (units + size - 1) / size; };
  const int64_t narrow = std::min(units, 2 * sector), about = (parts(least) + sector - 1) / sector * sector;
  int64_t size = std::min({units, std::max(narrow, about), int64_t(kMoveThreads)}), most = 0;
  for (; size >= narrow && most < kMoveThreads * 9 / 10; size -= sector) {
    const int64_t busy = kMoveThreads / size * units / parts(size);
    if (busy > most) most = busy, group.slice = int(size), group.slices = unsigned(parts(size));
  }
}

inline Group group_of(const Plan& plan, int form, int unit, int64_t least) {
  Group group{plan.forms[form], unit};
  cut(group, plan.in_place ? least : 1);
  const int64_t tile = plan.in_place ? plan.positions.count : kMoveThreads / group.slice * kNewTokens;
  const int64_t tiles = (plan.positions.count + tile - 1) / tile, blocks = group.form.lanes() * tiles * group.slices;
  token_copy::expect(plan.positions.count <= kMostKept && blocks <= INT32_MAX, "more to move than one launch can");
  group.tiles = unsigned(tiles), group.blocks = unsigned(blocks);
  return group;
}

// Calls launch(moves, blocks) for all jobs of a plan: once, if they fit in the parameters. In place there shall be
// `enough` blocks in all.
template <class Launch>
void each_launch(const Plan& plan, int64_t enough, const Launch& launch) {
  int64_t lanes = 0;
  for (const Job& job : plan.jobs) lanes += plan.forms[job.form].lanes();
  Moves p{plan.positions};
  int forms[kMostGroups] = {}, groups = 0;
  int64_t jobs = 0;
  const auto add = [&](const Job& job) {  // false: no room
    const int unit = unit_of(plan.forms[job.form], job);
    int own = 0;
    while (own < groups && (forms[own] != job.form || p.groups[own].unit != unit)) ++own;
    if (jobs == kMostJobs || own == kMostGroups) return false;
    if (own == groups) {
      p.groups[own] = group_of(plan, job.form, unit, (enough + lanes - 1) / lanes);
      forms[groups++] = job.form;
    }
    const unsigned blocks = std::max(p.blocks, p.groups[own].blocks);
    if ((jobs + 1) * int64_t(blocks) > INT32_MAX) return false;
    p.from[jobs] = job.from, p.to[jobs] = job.to, p.group[jobs] = uint8_t(own);
    p.blocks = blocks, ++jobs;
    return true;
  };
  const auto finish = [&] {
    if (jobs) launch(p, jobs * p.blocks);
    jobs = groups = 0, p.blocks = 0;
  };
  for (const Job& job : plan.jobs) {
    if (add(job)) continue;
    finish();
    add(job);
  }
  finish();
}

}  // namespace pruneops
