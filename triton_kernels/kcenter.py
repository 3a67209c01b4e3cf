"""Greedy k-center selection in Triton: a gram matrix for small N, lazy rounds for large N.

nearest[n], the maximum similarity of token n to the chosen set, only grows. Two paths:
gram (N <= GRAM_TOKENS): norm factors; all similarities, N^2 D operations by tiles of the lower triangle, 4 N^2 bytes;
k greedy steps, each one row of the matrix and one arg-min on chip. Three launches.
rounds (larger N, packed sequences): norm factors, then one cooperative launch, a group of programs per row. A round
selects M candidates of minimum (nearest, index), computes their M x M gram matrix, takes greedy steps among them while
the best stays below every other token, and updates nearest in one pass over x. 2 N k D operations in all, at least one
step a round, O(N + M^2) memory a row. The programs of a group synchronise at four barriers in global memory a round;
the host reads nothing, so the launch can be captured in a CUDA graph.
See docs/kernels/kcenter.md.
"""

import itertools

import torch
import triton
import triton.language as tl

from ._launch import INTERPRETED, TYPES, Specialization, cdiv, device_guard, kernel, tuned, workspace
from ._shared import (
    INF,
    LARGEST_SQUARE,
    LAST_KEY,
    SMALLEST_SQUARE,
    alignment_class,
    multiprocessors,
    ordered_bits,
    row_sums,
)

GRAM_TOKENS = 4096  # largest N of the gram path: 64 MB a batch row
GRAM_BYTES = 1 << 29  # largest gram matrix of a batch
MANY_TOKENS = 16384  # from this N on, twice the candidates: fewer passes over x

# Tiles by alignment class: halves or floats in 16-byte vectors, or any dtype element by element; (arch, class) for the
# GPUs of one architecture. They fit the 99 KB of shared memory of sm_86, sm_89 and sm_120 and spill no registers.
NORM_FACTORS = {"BLOCK_N": 16, "BLOCK_D": 256}
GRAM = {
    "half": ({"BLOCK": 128, "BLOCK_D": 32}, {"num_warps": 8, "num_stages": 4}),
    "float": ({"BLOCK": 64, "BLOCK_D": 32}, {"num_warps": 8, "num_stages": 3}),
    "unaligned": ({"BLOCK": 64, "BLOCK_D": 16}, {"num_warps": 8, "num_stages": 2}),
}
_SCAN = {"BLOCK_S": 2048, "BLOCK_M": 32}
ROUNDS = {
    "half": ({**_SCAN, "BLOCK_N": 128, "BLOCK_C": 64, "BLOCK_D": 32}, {"num_warps": 8, "num_stages": 4}),
    "float": ({**_SCAN, "BLOCK_N": 64, "BLOCK_C": 32, "BLOCK_D": 16}, {"num_warps": 8, "num_stages": 3}),
    "unaligned": ({**_SCAN, "BLOCK_N": 64, "BLOCK_C": 32, "BLOCK_D": 16}, {"num_warps": 8, "num_stages": 2}),
}
GREEDY_TOKENS = (512, 1024, 2048, 4096)  # widths of the greedy kernel
CANDIDATES = (128, 256)  # M, below MANY_TOKENS and from there on
BUDGETS = (8, 32)  # capacities of the list of budgets, one a sequence of a launch; 128 would spill

_FLOATS = dict.fromkeys(("norm_factors", "nearest", "gram", "radii", "candidate_nearest"), "*fp32")
_INTEGERS = {**dict.fromkeys(("indices", "seeds", "bounds"), "*i64"), "candidates": "*i32", "control": "*i32"}
_STRIDES = dict.fromkeys(("stride_b", "stride_n", "mask_b", "mask_n", "seeds_b", "seeds_p"), "i64")


def _divisible(alignment):
    return () if alignment == "unaligned" else ("x", "stride_b", "stride_n", "D")


def _specialize_norm_factors(dtype, alignment, cosine, has_mask, rounds):
    types = {"x": TYPES[dtype], "mask": "*u8" if has_mask else None, "control": "*i32" if rounds else None}
    constants = {"COSINE": cosine, "HAS_MASK": has_mask, "ROUNDS": rounds, **NORM_FACTORS}
    return Specialization(types, constants, {"num_warps": 4}, _divisible(alignment))


def _specialize_gram(dtype, alignment, cosine):
    tiles, options = tuned(GRAM, alignment)
    return Specialization({"x": TYPES[dtype]}, {"COSINE": cosine, **tiles}, options, _divisible(alignment))


def _specialize_greedy(width, cosine, has_seeds):
    types = {} if has_seeds else {"seeds": None}
    return Specialization(types, {"COSINE": cosine, "HAS_SEEDS": has_seeds, "BLOCK_N": width}, {"num_warps": 8})


def _specialize_rounds(dtype, alignment, cosine, M, has_seeds, budgets):
    """budgets: capacity of the list of budgets of a packed x, 0 for a batch."""
    tiles, options = tuned(ROUNDS, alignment)
    types = {"x": TYPES[dtype], **({} if has_seeds else {"seeds": None})}
    types |= {"budgets": ("i32",) * budgets} if budgets else {"bounds": None, "budgets": None}
    constants = {"COSINE": cosine, "HAS_SEEDS": has_seeds, "BUDGETS": budgets, "M": M, **tiles}
    return Specialization(types, constants, options | {"launch_cooperative_grid": True}, _divisible(alignment))


@triton.jit
def _key(s, index):
    """int64 ordered as (s, index); NaN (not available) last."""
    key = (ordered_bits(s).to(tl.int64) << 32) | index.to(tl.int64)
    return tl.where(s == s, key, LAST_KEY)


@triton.jit
def _similarity_of(key):
    order = (key >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _radius(s, COSINE: tl.constexpr):
    """Distance of a similarity: inf to an empty set, NaN for a non-finite token."""
    distance = tl.maximum(1.0 - s, 0.0) if COSINE else tl.sqrt_rn(tl.maximum(-s, 0.0))
    return tl.where(s == INF, float("nan"), distance)


@triton.jit
def _dots(rows, row_mask, cols, col_mask, D, R: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dot products [R, C] of tokens behind the pointers rows [R] and cols [C], summed in float32."""
    dots = tl.zeros([R, C], tl.float32)
    offs = tl.arange(0, BLOCK_D)
    for d in range(0, D, BLOCK_D):
        inside = d + offs < D
        a = tl.load(rows[:, None] + (d + offs)[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(cols[None, :] + (d + offs)[:, None], mask=col_mask[None, :] & inside[:, None], other=0.0)
        dots = tl.dot(a, b, dots, input_precision="ieee")
    return dots


@triton.jit
def _similarities(dots, row_factors, col_factors, COSINE: tl.constexpr):
    """Similarities [R, C]; -inf, which changes no maximum, where one side is non-finite. Symmetric to the bit."""
    if COSINE:
        sim = dots * (row_factors[:, None] * col_factors[None, :])
    else:
        sim = 2.0 * dots - (row_factors[:, None] + col_factors[None, :])
    return tl.where(sim == sim, sim, -INF)


@kernel(_specialize_norm_factors, **_FLOATS, **_STRIDES)
def _kcenter_norm_factors_kernel(
    x, mask, norm_factors, nearest, control, stride_b, stride_n, mask_b, mask_n, N, D, control_size,
    COSINE: tl.constexpr, HAS_MASK: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """norm_factors [B, N]: 1 / |x| or |x|^2, NaN for a non-finite token. nearest [B, N]: -inf; +inf for a non-finite
    token, NaN for an excluded one. ROUNDS: also zeros the control_size integers of control."""
    if ROUNDS:
        if tl.program_id(0) == 0:
            for start in range(0, control_size, 128):
                i = start + tl.arange(0, 128)
                tl.store(control + i, tl.zeros([128], tl.int32), mask=i < control_size)
    tiles = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs = tl.arange(0, BLOCK_D)
    rows = x + b * stride_b + n.to(tl.int64) * stride_n
    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        inside = (n < N)[:, None] & (d + offs < D)[None, :]
        v = tl.load(rows[:, None] + (d + offs)[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += v * v
    square = row_sums(squares, BLOCK_N, BLOCK_D)
    finite = square <= LARGEST_SQUARE
    value = tl.where(square < SMALLEST_SQUARE, 0.0, tl.div_rn(1.0, tl.sqrt_rn(square))) if COSINE else square
    tl.store(norm_factors + b * N + n, tl.where(finite, value, float("nan")), mask=n < N)
    start = tl.where(finite, -INF, INF)
    if HAS_MASK:
        allowed = tl.load(mask + b * mask_b + n.to(tl.int64) * mask_n, mask=n < N, other=0)
        start = tl.where(allowed != 0, start, float("nan"))
    tl.store(nearest + b * N + n, start, mask=n < N)


@kernel(_specialize_gram, **_FLOATS, **_STRIDES)
def _kcenter_gram_kernel(
    x, norm_factors, gram, stride_b, stride_n, N, D,
    COSINE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gram [B, N, N]: a program computes one tile of the lower triangle and writes it and its transpose."""
    side = tl.cdiv(N, BLOCK)
    tiles = side * (side + 1) // 2
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)  # the square root may round either way
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    n = i * BLOCK + tl.arange(0, BLOCK)
    m = j * BLOCK + tl.arange(0, BLOCK)
    x += b * stride_b
    rows, cols = x + n.to(tl.int64) * stride_n, x + m.to(tl.int64) * stride_n
    dots = _dots(rows, n < N, cols, m < N, D, BLOCK, BLOCK, BLOCK_D)
    row_factors = tl.load(norm_factors + b * N + n, mask=n < N, other=float("nan"))
    col_factors = tl.load(norm_factors + b * N + m, mask=m < N, other=float("nan"))
    sim = _similarities(dots, row_factors, col_factors, COSINE)
    inside = (n < N)[:, None] & (m < N)[None, :]
    gram += b * N * N  # offsets within fit 32 bits: N <= GRAM_TOKENS
    tl.store(gram + (n[:, None] * N + m[None, :]), sim, mask=inside)
    if i != j:
        tl.store(gram + (n[:, None] + m[None, :] * N), sim, mask=inside)


@kernel(_specialize_greedy, **_FLOATS, **_INTEGERS, **_STRIDES)
def _kcenter_greedy_kernel(
    gram, nearest, seeds, indices, radii, seeds_b, seeds_p, N, P, k,
    COSINE: tl.constexpr, HAS_SEEDS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per batch row: k steps over the rows of gram, s [N] in registers."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    gram += b * N * N
    s = tl.load(nearest + b * N + n, mask=n < N, other=float("nan"))
    for step in range(k):
        key = tl.min(_key(s, n), 0)
        none_left = key == LAST_KEY
        choice = tl.where(none_left, -1, (key & 0x7FFFFFFF).to(tl.int32))
        radius = tl.where(none_left, float("nan"), _radius(_similarity_of(key), COSINE))
        if HAS_SEEDS:
            if step < P:
                choice = tl.load(seeds + b * seeds_b + step * seeds_p).to(tl.int32)
                radius = tl.full([], INF, tl.float32)
        tl.store(indices + b * k + step, choice.to(tl.int64))
        tl.store(radii + b * k + step, radius)
        valid = tl.where(n < N, choice, -1) >= 0
        sim = tl.load(gram + choice.to(tl.int64) * N + n, mask=valid, other=-INF)
        s = tl.where(s < sim, sim, s)
        s = tl.where(n == choice, float("nan"), s)


@triton.jit
def _group_barrier(counter, target):
    """Wait until the programs of a group have arrived `target` times in all; writes before it are visible after it."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acq_rel", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _select_threshold(s, N, M, BLOCK_S: tl.constexpr):
    """(T, ties): candidates are the tokens of ordered_bits(s) < T and the first `ties` of ordered_bits(s) == T, at most
    M. Radix select over the 32 bits, 8 at a time, until at least half of M is found."""
    offs = tl.arange(0, BLOCK_S)
    prefix = tl.full([], 0, tl.uint32)  # leading digits of T, ordered as unsigned numbers
    shift = tl.full([], 24, tl.uint32)
    below = tl.full([], 0, tl.int32)  # tokens of a lower prefix
    threshold = tl.full([], 0x7FFFFFFF, tl.int32)
    ties = tl.full([], 0, tl.int32)
    searching = below == 0
    while searching:
        counts = tl.zeros([256], tl.int32)
        for start in range(0, N, BLOCK_S):
            v = tl.load(s + start + offs, mask=start + offs < N, other=float("nan"), cache_modifier=".cg")
            digits = ordered_bits(v).to(tl.uint32, bitcast=True) ^ 0x80000000
            in_bin = (v == v) & (((digits >> shift) >> 8) == prefix)
            counts += tl.histogram(((digits >> shift) & 255).to(tl.int32), 256, mask=in_bin)
        cumulative = below + tl.cumsum(counts, 0)  # [256] tokens up to and including a digit
        digit = tl.sum((cumulative <= M).to(tl.int32), 0)
        below = tl.maximum(below, tl.max(tl.where(cumulative <= M, cumulative, 0), 0))
        searching = (digit < 256) & (shift > 0) & (below * 2 < M)
        if digit < 256:  # else, possible in the first pass only, all available tokens fit
            prefix = (prefix << 8) | digit.to(tl.uint32)
            threshold = ((prefix << shift) ^ 0x80000000).to(tl.int32, bitcast=True)
            ties = tl.where(shift == 0, M - below, 0)
        shift = tl.where(shift > 0, shift - 8, 0)
    return threshold, ties


@triton.jit
def _collect_candidates(s, candidates, candidate_nearest, threshold, ties, N, BLOCK_S: tl.constexpr):
    """Write the candidates in ascending index; return their number and the minimum key of the other tokens."""
    offs = tl.arange(0, BLOCK_S)
    count = tl.full([], 0, tl.int32)
    ties_seen = tl.full([], 0, tl.int32)
    bound = tl.full([], LAST_KEY, tl.int64)
    for start in range(0, N, BLOCK_S):
        v = tl.load(s + start + offs, mask=start + offs < N, other=float("nan"), cache_modifier=".cg")
        order = ordered_bits(v)
        tie = ((v == v) & (order == threshold)).to(tl.int32)
        early = ties_seen + tl.cumsum(tie, 0) <= ties
        selected = (v == v) & ((order < threshold) | ((tie != 0) & early))
        flags = selected.to(tl.int32)
        slot = count + tl.cumsum(flags, 0) - 1
        tl.store(candidates + slot, start + offs, mask=selected)
        tl.store(candidate_nearest + slot, v, mask=selected)
        bound = tl.minimum(bound, tl.min(tl.where(selected, LAST_KEY, _key(v, start + offs)), 0))
        count += tl.sum(flags, 0)
        ties_seen += tl.sum(tie, 0)
    return count, bound


@triton.jit
def _greedy_steps(
    candidates, candidate_nearest, gram, nearest, indices, radii, count, bound, done, k,
    COSINE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Steps among the candidates while the best key is below `bound`; return the number of tokens chosen so far."""
    slot = tl.arange(0, M)
    token = tl.load(candidates + slot, mask=slot < count, other=0)
    s = tl.load(candidate_nearest + slot, mask=slot < count, other=float("nan"))
    # slots ascend with the token's index, so (s, slot) orders as (s, index); convert bound to a slot as well
    before = tl.sum(((slot < count) & (token.to(tl.int64) < (bound & 0x7FFFFFFF))).to(tl.int64), 0)
    slot_bound = tl.where(bound == LAST_KEY, bound, ((bound >> 32) << 32) | before)
    key = tl.min(_key(s, slot), 0)
    while (key < slot_bound) & (done < k):
        best = (key & 0x7FFFFFFF).to(tl.int32)
        sim = tl.load(gram + best * M + slot, mask=slot < count, other=-INF, cache_modifier=".cg")
        choice = tl.sum(tl.where(slot == best, token, 0), 0)
        tl.store(indices + done, choice.to(tl.int64))
        tl.store(radii + done, _radius(_similarity_of(key), COSINE))
        tl.store(nearest + choice, float("nan"))
        s = tl.where(s < sim, sim, s)
        s = tl.where(slot == best, float("nan"), s)
        key = tl.min(_key(s, slot), 0)
        done += 1
    while (count == 0) & (done < k):  # no token is left
        tl.store(indices + done, tl.full([], -1, tl.int64))
        tl.store(radii + done, float("nan"))
        done += 1
    return done


@kernel(_specialize_rounds, **_FLOATS, **_INTEGERS, **_STRIDES)
def _kcenter_rounds_kernel(
    x, norm_factors, nearest, seeds, bounds, budgets, indices, radii, candidates, candidate_nearest, gram, control,
    stride_b, stride_n, seeds_b, seeds_p, B, N, P, k, D, C,
    COSINE: tl.constexpr, HAS_SEEDS: tl.constexpr, BUDGETS: tl.constexpr, M: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Lazy rounds; C programs a group, group g does batch rows g, g + groups, ...

    BUDGETS: row b is tokens bounds[b] : bounds[b + 1] of a packed x; budgets[b] of them are chosen and written after
    those of earlier rows. control [groups, 2] int32: barrier arrivals (zero at launch), tokens chosen.
    """
    group, rank = tl.program_id(0) // C, tl.program_id(0) % C
    groups = tl.num_programs(0) // C
    candidates += group * M
    candidate_nearest += group * M
    gram += group.to(tl.int64) * M * M
    control += group * 2
    target = 0
    for b in range(group, B, groups):
        row = tl.cast(b, tl.int64)
        if BUDGETS:
            first = tl.load(bounds + b)
            N = (tl.load(bounds + b + 1) - first).to(tl.int32)
            out = tl.full([], 0, tl.int64)
            for entry in tl.static_range(BUDGETS):
                out += tl.where(entry < b, budgets[entry], 0)
                k = tl.where(entry == b, budgets[entry], k)
            row_x, row_start = x + first * stride_n, first
        else:
            first = tl.full([], 0, tl.int64)
            out = row * k
            row_x, row_start = x + row * stride_b, row * N
        row_norm_factors, row_nearest = norm_factors + row_start, nearest + row_start
        row_indices, row_radii = indices + out, radii + out

        # seeds are chosen first; a sequence of budget 0 has none
        done = tl.minimum(P, k)
        if HAS_SEEDS:
            if rank == 0:
                for p in range(done):
                    seed = tl.load(seeds + row * seeds_b + p * seeds_p) - first
                    tl.store(row_indices + p, seed)
                    tl.store(row_radii + p, INF)
                    tl.store(row_nearest + seed, float("nan"))
        target += C
        _group_barrier(control, target)

        updated = 0  # choices before this one are in nearest
        while done < k:
            if updated < done:  # update
                for tile in range(rank, tl.cdiv(N, BLOCK_N), C):
                    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
                    rows = row_x + n.to(tl.int64) * stride_n
                    row_factors = tl.load(row_norm_factors + n, mask=n < N, other=float("nan"))
                    s = tl.load(row_nearest + n, mask=n < N, other=float("nan"), cache_modifier=".cg")
                    for c in range(updated, done, BLOCK_C):
                        col = c + tl.arange(0, BLOCK_C)
                        token = tl.load(row_indices + col, mask=col < done, other=0, cache_modifier=".cg")
                        cols = row_x + token * stride_n
                        dots = _dots(rows, n < N, cols, col < done, D, BLOCK_N, BLOCK_C, BLOCK_D)
                        col_factors = tl.load(row_norm_factors + token, mask=col < done, other=float("nan"))
                        sim = tl.max(_similarities(dots, row_factors, col_factors, COSINE), 1)
                        s = tl.where(s < sim, sim, s)
                    tl.store(row_nearest + n, s, mask=n < N)
                target += C
                _group_barrier(control, target)
            updated = done
            count = tl.full([], 0, tl.int32)
            bound = tl.full([], LAST_KEY, tl.int64)
            if rank == 0:  # select
                threshold, ties = _select_threshold(row_nearest, N, M, BLOCK_S)
                count, bound = _collect_candidates(
                    row_nearest, candidates, candidate_nearest, threshold, ties, N, BLOCK_S
                )
                tl.store(control + 1, count)
            target += C
            _group_barrier(control, target)
            count = tl.load(control + 1, volatile=True)
            TILES: tl.constexpr = M // BLOCK_M
            for tile in range(rank, TILES * TILES, C):  # gram
                i = tile // TILES * BLOCK_M + tl.arange(0, BLOCK_M)
                j = tile % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
                row_token = tl.load(candidates + i, mask=i < count, other=0, cache_modifier=".cg").to(tl.int64)
                col_token = tl.load(candidates + j, mask=j < count, other=0, cache_modifier=".cg").to(tl.int64)
                rows, cols = row_x + row_token * stride_n, row_x + col_token * stride_n
                dots = _dots(rows, i < count, cols, j < count, D, BLOCK_M, BLOCK_M, BLOCK_D)
                row_factors = tl.load(row_norm_factors + row_token, mask=i < count, other=float("nan"))
                col_factors = tl.load(row_norm_factors + col_token, mask=j < count, other=float("nan"))
                sim = _similarities(dots, row_factors, col_factors, COSINE)
                tl.store(gram + i[:, None] * M + j[None, :], sim)
            target += C
            _group_barrier(control, target)
            if rank == 0:  # greedy
                done = _greedy_steps(
                    candidates, candidate_nearest, gram, row_nearest, row_indices, row_radii, count, bound, done, k,
                    COSINE, M,
                )  # fmt: skip
                tl.store(control + 1, done)
            target += C
            _group_barrier(control, target)
            done = tl.load(control + 1, volatile=True)
        # all programs have read control[1] and the candidates of this row
        target += C
        _group_barrier(control, target)
        if BUDGETS:  # indices into the packed tensor
            for start in range(rank * BLOCK_S, k, C * BLOCK_S):
                offs = start + tl.arange(0, BLOCK_S)
                token = tl.load(row_indices + offs, mask=offs < k, cache_modifier=".cg")
                tl.store(row_indices + offs, tl.where(token < 0, token, token + first), mask=offs < k)


def kcenter(x, k, seeds, mask, metric):
    """x [B, N, D] with contiguous features; pruneops.ops checks the arguments."""
    B, N, _ = x.shape
    indices = torch.empty((B, k), dtype=torch.int64, device=x.device)
    radii = torch.empty((B, k), dtype=torch.float32, device=x.device)
    if B == 0:
        return indices, radii
    x = x.float() if INTERPRETED else x  # the interpreter's bfloat16 products are wrong
    run = _run_gram if N <= GRAM_TOKENS and 4 * B * N * N <= GRAM_BYTES else _run_rounds
    with device_guard(x):
        run(x, k, seeds, mask, metric == "cosine", indices, radii)
    return indices, radii


def kcenter_varlen(x, cu_seqlens, ks, seeds, metric):
    """x [T, D] packed; one group of programs per sequence."""
    indices = torch.empty(sum(ks), dtype=torch.int64, device=x.device)
    radii = torch.empty(sum(ks), dtype=torch.float32, device=x.device)
    if indices.numel() == 0:
        return indices, radii
    x, cosine, out = x[None].float() if INTERPRETED else x[None], metric == "cosine", 0
    with device_guard(x):
        for first in range(0, len(ks), BUDGETS[-1]):
            chunk_ks = tuple(ks[first : first + BUDGETS[-1]])
            bounds, chunk_seeds = cu_seqlens[first:], None if seeds is None else seeds[first:]
            _run_rounds(x, 0, chunk_seeds, None, cosine, indices[out:], radii[out:], bounds, chunk_ks)
            out += sum(chunk_ks)
    return indices, radii


def _norm_factors(x, alignment, mask, cosine, norm_factors, nearest, control=None, control_size=0):
    B, N, D = x.shape
    _kcenter_norm_factors_kernel(
        (x.dtype, alignment, cosine, mask is not None, control is not None),
        (B * cdiv(N, NORM_FACTORS["BLOCK_N"]), 1, 1),
        x, mask, norm_factors, nearest, control, x.stride(0), x.stride(1), *_strides(mask), N, D, control_size,
    )  # fmt: skip


def _strides(tensor):
    return (0, 0) if tensor is None else tensor.stride()


def _run_gram(x, k, seeds, mask, cosine, indices, radii):
    B, N, D = x.shape
    alignment, float32 = alignment_class(x), torch.float32
    _memory, norm_factors, nearest, gram = workspace(x.device, (float32, B * N), (float32, B * N), (float32, B * N * N))
    _norm_factors(x, alignment, mask, cosine, norm_factors, nearest)
    side = cdiv(N, tuned(GRAM, alignment)[0]["BLOCK"])
    _kcenter_gram_kernel(
        (x.dtype, alignment, cosine), (B * (side * (side + 1) // 2), 1, 1),
        x, norm_factors, gram, x.stride(0), x.stride(1), N, D,
    )  # fmt: skip
    width = next(width for width in GREEDY_TOKENS if width >= N)
    _kcenter_greedy_kernel(
        (width, cosine, seeds is not None), (B, 1, 1), gram, nearest, seeds, indices, radii,
        *_strides(seeds), N, 0 if seeds is None else seeds.shape[1], k,
    )  # fmt: skip


def _run_rounds(x, k, seeds, mask, cosine, indices, radii, bounds=None, ks=()):
    """A batch, or with bounds and ks the sequences of a packed x [1, T, D]."""
    rows, N, D = x.shape
    alignment, float32 = alignment_class(x), torch.float32
    programs = multiprocessors(x.device)
    B = len(ks) or rows
    M = CANDIDATES[N >= MANY_TOKENS and not ks]
    groups = min(B, programs)
    C = programs // groups
    _memory, norm_factors, nearest, candidates, candidate_nearest, gram, control = workspace(
        x.device, (float32, rows * N), (float32, rows * N), (torch.int32, groups * M), (float32, groups * M),
        (float32, groups * M * M), (torch.int32, groups * 2),
    )  # fmt: skip
    _norm_factors(x, alignment, mask, cosine, norm_factors, nearest, control, groups * 2)
    capacity = next(capacity for capacity in BUDGETS if capacity >= B) if ks else 0
    budgets = (*ks, *[0] * (capacity - B)) if ks else None
    _kcenter_rounds_kernel(
        (x.dtype, alignment, cosine, M, seeds is not None, capacity), (groups * C, 1, 1),
        x, norm_factors, nearest, seeds, bounds, budgets, indices, radii, candidates, candidate_nearest, gram, control,
        x.stride(0), x.stride(1), *_strides(seeds), B, N, 0 if seeds is None else seeds.shape[1], k, D, C,
    )  # fmt: skip


def specializations():
    """(kernel, spec) of the launches above, to be compiled without a GPU."""
    for dtype, alignment, cosine in (
        (torch.bfloat16, "half", True),
        (torch.float16, "half", False),
        (torch.float32, "float", True),
        (torch.bfloat16, "unaligned", False),
        (torch.float32, "unaligned", True),
    ):
        yield _kcenter_norm_factors_kernel, (dtype, alignment, cosine, cosine, not cosine)
        yield _kcenter_gram_kernel, (dtype, alignment, cosine)
        for M, seeds, budgets in ((CANDIDATES[0], True, 8), (CANDIDATES[0], False, 0), (CANDIDATES[1], True, 0)):
            yield _kcenter_rounds_kernel, (dtype, alignment, cosine, M, seeds, budgets)
    yield _kcenter_rounds_kernel, (torch.bfloat16, "half", True, CANDIDATES[0], False, BUDGETS[-1])
    for width, cosine in itertools.product(GREEDY_TOKENS, (True, False)):
        yield _kcenter_greedy_kernel, (width, cosine, cosine)
