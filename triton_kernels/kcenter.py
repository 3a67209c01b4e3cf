"""Greedy k-center selection in Triton: a Gram form for small N, lazy rounds for large N.

The running similarity s[n] of a token to the chosen set only grows. Both forms rest on that.

Gram form (N <= GRAM_TOKENS): all similarities by one symmetric product, N^2 D operations, then
one program per batch row takes k steps, each one row of the matrix and one arg-min on chip.
    N 2880, D 4096, k 288, bf16 on an H200: 34 GFLOP of tiles = 43 us at 790 TFLOP/s, 24 MB of x
    (5 us), 33 MB of similarities that stay in L2, then 288 steps bound by latency.

Lazy rounds (larger N, and packed sequences): one persistent launch, a team of programs per row.
    A  the team's first program takes the M tokens of least s as candidates (radix select);
       tau is the least (s, index) of all other tokens;
    B  the team computes the M x M similarities of the candidates;
    C  the first program takes greedy steps among the candidates for as long as the best of them
       stays below tau: s only grows, so nobody outside can be better;
    D  the team brings s of all N tokens up to date with the tokens chosen in this round.
    Every round takes at least one step. All rounds together do 2 N k D operations, as the plain
    loop, but pass over x once per round: N 23328, k 2333 takes 23 rounds at M = 256 on random and
    on image-like features, N 9216, k 921 takes 18 to 20 at M = 128. The worst data (k tight groups of
    more than M tokens) takes one step a round, which is the plain loop.
    Memory O(N + M^2) a row.

The number of rounds depends on the data and is decided on the device: the programs of a team meet
at barriers in global memory (four a round, about 2 us each), so the host reads nothing and the
launch can be captured in a CUDA graph. The launch is cooperative: all programs are resident.
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

GRAM_TOKENS = 4096  # largest N whose N x N similarities are stored: 64 MB a row of the batch
GRAM_BYTES = 1 << 29  # largest such matrix of a whole batch
MANY_TOKENS = 16384  # from this N on, twice the candidates pay: fewer passes over x

# Tiles by how x can be read: halves or floats in 16-byte pieces, or anything element by element; (arch, how) for the
# cards of one architecture. Shared memory stays below the 99 KB of sm_86, sm_89 and sm_120, registers below a spill.
NORMS = {"BLOCK_N": 16, "BLOCK_D": 256}
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
GREEDY_TOKENS = (512, 1024, 2048, 4096)  # widths that the greedy kernel is compiled for
CANDIDATES = (128, 256)
BUDGETS = (8, 32)  # sequences of a launch: lengths that a list of budgets is filled up to; 128 would spill

_FLOATS = dict.fromkeys(("aux", "nearest", "gram", "radii", "candidate_s", "pairs"), "*fp32")
_INTEGERS = {**dict.fromkeys(("indices", "seeds", "bounds"), "*i64"), "candidates": "*i32", "control": "*i32"}
_STRIDES = dict.fromkeys(("stride_b", "stride_n", "mask_b", "mask_n", "seeds_b", "seeds_p"), "i64")


def _aligned(kind):
    return () if kind == "unaligned" else ("x", "stride_b", "stride_n", "D")


def _norms_form(dtype, kind, cosine, has_mask, rounds):
    types = {"x": TYPES[dtype], "mask": "*u8" if has_mask else None, "control": "*i32" if rounds else None}
    constants = {"COSINE": cosine, "HAS_MASK": has_mask, "ROUNDS": rounds, **NORMS}
    return Specialization(types, constants, {"num_warps": 4}, _aligned(kind))


def _gram_form(dtype, kind, cosine):
    tiles, options = tuned(GRAM, kind)
    return Specialization({"x": TYPES[dtype]}, {"COSINE": cosine, **tiles}, options, _aligned(kind))


def _greedy_form(width, cosine, has_seeds):
    types = {} if has_seeds else {"seeds": None}
    return Specialization(types, {"COSINE": cosine, "HAS_SEEDS": has_seeds, "BLOCK_N": width}, {"num_warps": 8})


def _rounds_form(dtype, kind, cosine, M, has_seeds, budgets):
    """budgets: how many a packed x has room for, 0 for a batch."""
    tiles, options = tuned(ROUNDS, kind)
    types = {"x": TYPES[dtype], **({} if has_seeds else {"seeds": None})}
    types |= {"budgets": ("i32",) * budgets} if budgets else {"bounds": None, "budgets": None}
    constants = {"COSINE": cosine, "HAS_SEEDS": has_seeds, "BUDGETS": budgets, "M": M, **tiles}
    return Specialization(types, constants, options | {"launch_cooperative_grid": True}, _aligned(kind))


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
    """Distance that belongs to a similarity: inf to an empty set, NaN for a non-finite token."""
    distance = tl.maximum(1.0 - s, 0.0) if COSINE else tl.sqrt_rn(tl.maximum(-s, 0.0))
    return tl.where(s == INF, float("nan"), distance)


@triton.jit
def _products(rows, row_ok, cols, col_ok, D, R: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dot products [R, C] of tokens behind the pointers rows [R] and cols [C], summed in float32."""
    dots = tl.zeros([R, C], tl.float32)
    lane = tl.arange(0, BLOCK_D)
    for d in range(0, D, BLOCK_D):
        inside = d + lane < D
        a = tl.load(rows[:, None] + (d + lane)[None, :], mask=row_ok[:, None] & inside[None, :], other=0.0)
        b = tl.load(cols[None, :] + (d + lane)[:, None], mask=col_ok[None, :] & inside[:, None], other=0.0)
        dots = tl.dot(a, b, dots, input_precision="ieee")
    return dots


@triton.jit
def _similarities(dots, row_aux, col_aux, COSINE: tl.constexpr):
    """Similarities [R, C]; -inf, which changes nobody's maximum, where one side is non-finite."""
    if COSINE:  # the same for a pair both ways round, to the bit
        sim = dots * (row_aux[:, None] * col_aux[None, :])
    else:
        sim = 2.0 * dots - (row_aux[:, None] + col_aux[None, :])
    return tl.where(sim == sim, sim, -INF)


@kernel(_norms_form, **_FLOATS, **_STRIDES)
def _kcenter_norms_kernel(
    x, mask, aux, nearest, control, stride_b, stride_n, mask_b, mask_n, N, D, controls,
    COSINE: tl.constexpr, HAS_MASK: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """aux [B, N]: 1 / |x| or |x|^2, NaN for a non-finite token; nearest [B, N]: s before any choice.

    ROUNDS: control becomes so many zeros.
    """
    if ROUNDS:
        if tl.program_id(0) == 0:
            for start in range(0, controls, 128):
                i = start + tl.arange(0, 128)
                tl.store(control + i, tl.zeros([128], tl.int32), mask=i < controls)
    tiles = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_D)
    rows = x + b * stride_b + n.to(tl.int64) * stride_n
    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        inside = (n < N)[:, None] & (d + lane < D)[None, :]
        v = tl.load(rows[:, None] + (d + lane)[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += v * v
    square = row_sums(squares, BLOCK_N, BLOCK_D)
    finite = square <= LARGEST_SQUARE
    value = tl.where(square < SMALLEST_SQUARE, 0.0, tl.div_rn(1.0, tl.sqrt_rn(square))) if COSINE else square
    tl.store(aux + b * N + n, tl.where(finite, value, float("nan")), mask=n < N)
    start = tl.where(finite, -INF, INF)
    if HAS_MASK:
        allowed = tl.load(mask + b * mask_b + n.to(tl.int64) * mask_n, mask=n < N, other=0)
        start = tl.where(allowed != 0, start, float("nan"))
    tl.store(nearest + b * N + n, start, mask=n < N)


@kernel(_gram_form, **_FLOATS, **_STRIDES)
def _kcenter_gram_kernel(
    x, aux, gram, stride_b, stride_n, N, D,
    COSINE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """gram [B, N, N]: a program computes one tile of the lower triangle and writes it twice."""
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
    dots = _products(rows, n < N, cols, m < N, D, BLOCK, BLOCK, BLOCK_D)
    row_aux = tl.load(aux + b * N + n, mask=n < N, other=float("nan"))
    col_aux = tl.load(aux + b * N + m, mask=m < N, other=float("nan"))
    sim = _similarities(dots, row_aux, col_aux, COSINE)
    inside = (n < N)[:, None] & (m < N)[None, :]
    gram += b * N * N  # from here on 32 bits will do: N <= GRAM_TOKENS
    tl.store(gram + (n[:, None] * N + m[None, :]), sim, mask=inside)
    if i != j:
        tl.store(gram + (n[:, None] + m[None, :] * N), sim, mask=inside)


@kernel(_greedy_form, **_FLOATS, **_INTEGERS, **_STRIDES)
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
        known = tl.where(n < N, choice, -1) >= 0
        sim = tl.load(gram + choice.to(tl.int64) * N + n, mask=known, other=-INF)
        s = tl.where(s < sim, sim, s)
        s = tl.where(n == choice, float("nan"), s)


@triton.jit
def _team_barrier(counter, target):
    """Wait until the team has arrived `target` times in all; writes before are visible after."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acq_rel", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _select_threshold(s, N, M, BLOCK_S: tl.constexpr):
    """Largest prefix of tokens by s that fits M: (T, ties) = take order(s) < T and `ties` of order(s) == T.

    Radix select over the 32 bits of the order, 8 at a time, stopped as soon as half of M is found.
    """
    lane = tl.arange(0, BLOCK_S)
    prefix = tl.full([], 0, tl.uint32)  # leading digits of T, ordered as unsigned numbers
    shift = tl.full([], 24, tl.uint32)
    taken = tl.full([], 0, tl.int32)  # tokens of smaller prefix
    threshold = tl.full([], 0x7FFFFFFF, tl.int32)
    ties = tl.full([], 0, tl.int32)
    going = taken == 0
    while going:
        counts = tl.zeros([256], tl.int32)
        for start in range(0, N, BLOCK_S):
            v = tl.load(s + start + lane, mask=start + lane < N, other=float("nan"), cache_modifier=".cg")
            digits = ordered_bits(v).to(tl.uint32, bitcast=True) ^ 0x80000000
            here = (v == v) & (((digits >> shift) >> 8) == prefix)
            counts += tl.histogram(((digits >> shift) & 255).to(tl.int32), 256, mask=here)
        upto = taken + tl.cumsum(counts, 0)  # [256] tokens up to and including a digit
        digit = tl.sum((upto <= M).to(tl.int32), 0)
        taken = tl.maximum(taken, tl.max(tl.where(upto <= M, upto, 0), 0))
        going = (digit < 256) & (shift > 0) & (taken * 2 < M)
        if digit < 256:  # else, in the first pass only, all available tokens fit
            prefix = (prefix << 8) | digit.to(tl.uint32)
            threshold = ((prefix << shift) ^ 0x80000000).to(tl.int32, bitcast=True)
            ties = tl.where(shift == 0, M - taken, 0)
        shift = tl.where(shift > 0, shift - 8, 0)
    return threshold, ties


@triton.jit
def _take_candidates(s, candidates, candidate_s, threshold, ties, N, BLOCK_S: tl.constexpr):
    """Write the candidates in ascending index; return how many, and the least (s, index) left out."""
    lane = tl.arange(0, BLOCK_S)
    count = tl.full([], 0, tl.int32)
    ties_seen = tl.full([], 0, tl.int32)
    tau = tl.full([], LAST_KEY, tl.int64)
    for start in range(0, N, BLOCK_S):
        v = tl.load(s + start + lane, mask=start + lane < N, other=float("nan"), cache_modifier=".cg")
        order = ordered_bits(v)
        tie = ((v == v) & (order == threshold)).to(tl.int32)
        early = ties_seen + tl.cumsum(tie, 0) <= ties
        take = (v == v) & ((order < threshold) | ((tie != 0) & early))
        taken = take.to(tl.int32)
        slot = count + tl.cumsum(taken, 0) - 1
        tl.store(candidates + slot, start + lane, mask=take)
        tl.store(candidate_s + slot, v, mask=take)
        tau = tl.minimum(tau, tl.min(tl.where(take, LAST_KEY, _key(v, start + lane)), 0))
        count += tl.sum(taken, 0)
        ties_seen += tl.sum(tie, 0)
    return count, tau


@triton.jit
def _greedy_steps(
    candidates, candidate_s, pairs, nearest, indices, radii, found, tau, done, k,
    COSINE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Take steps among the candidates until one outside could be better; return the tokens chosen in all."""
    slot = tl.arange(0, M)
    token = tl.load(candidates + slot, mask=slot < found, other=0)
    s = tl.load(candidate_s + slot, mask=slot < found, other=float("nan"))
    # slots ascend with the token's index, so a key of (s, slot) orders as (s, index); tau in the same terms:
    before = tl.sum(((slot < found) & (token.to(tl.int64) < (tau & 0x7FFFFFFF))).to(tl.int64), 0)
    bound = tl.where(tau == LAST_KEY, tau, ((tau >> 32) << 32) | before)
    key = tl.min(_key(s, slot), 0)
    while (key < bound) & (done < k):
        best = (key & 0x7FFFFFFF).to(tl.int32)
        sim = tl.load(pairs + best * M + slot, mask=slot < found, other=-INF, cache_modifier=".cg")
        choice = tl.sum(tl.where(slot == best, token, 0), 0)
        tl.store(indices + done, choice.to(tl.int64))
        tl.store(radii + done, _radius(_similarity_of(key), COSINE))
        tl.store(nearest + choice, float("nan"))
        s = tl.where(s < sim, sim, s)
        s = tl.where(slot == best, float("nan"), s)
        key = tl.min(_key(s, slot), 0)
        done += 1
    while (found == 0) & (done < k):  # nobody is left
        tl.store(indices + done, tl.full([], -1, tl.int64))
        tl.store(radii + done, float("nan"))
        done += 1
    return done


@kernel(_rounds_form, **_FLOATS, **_INTEGERS, **_STRIDES)
def _kcenter_rounds_kernel(
    x, aux, nearest, seeds, bounds, budgets, indices, radii, candidates, candidate_s, pairs, control,
    stride_b, stride_n, seeds_b, seeds_p, B, N, P, k, D, C,
    COSINE: tl.constexpr, HAS_SEEDS: tl.constexpr, BUDGETS: tl.constexpr, M: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Lazy rounds; C programs a team, team t serves the batch rows t, t + teams, ...

    BUDGETS: row b is tokens bounds[b] : bounds[b + 1] of a packed x, budgets[b] of them are chosen, after those of the
    rows before it. control [teams, 2] int32: barrier arrivals (zero at launch), tokens chosen.
    """
    team, rank = tl.program_id(0) // C, tl.program_id(0) % C
    teams = tl.num_programs(0) // C
    candidates += team * M
    candidate_s += team * M
    pairs += team.to(tl.int64) * M * M
    control += team * 2
    target = 0
    for b in range(team, B, teams):
        row = tl.cast(b, tl.int64)
        if BUDGETS:
            first = tl.load(bounds + b)
            N = (tl.load(bounds + b + 1) - first).to(tl.int32)
            out = tl.full([], 0, tl.int64)
            for one in tl.static_range(BUDGETS):
                out += tl.where(one < b, budgets[one], 0)
                k = tl.where(one == b, budgets[one], k)
            row_x, row_start = x + first * stride_n, first
        else:
            first = tl.full([], 0, tl.int64)
            out = row * k
            row_x, row_start = x + row * stride_b, row * N
        row_aux, row_s = aux + row_start, nearest + row_start
        row_indices, row_radii = indices + out, radii + out

        # seeds are the first tokens chosen; a sequence of budget 0 has none
        done = tl.minimum(P, k)
        if HAS_SEEDS:
            if rank == 0:
                for p in range(done):
                    seed = tl.load(seeds + row * seeds_b + p * seeds_p) - first
                    tl.store(row_indices + p, seed)
                    tl.store(row_radii + p, INF)
                    tl.store(row_s + seed, float("nan"))
        target += C
        _team_barrier(control, target)

        fresh = 0  # choices before this one are in s already
        while done < k:
            if fresh < done:  # D
                for tile in range(rank, tl.cdiv(N, BLOCK_N), C):
                    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
                    rows = row_x + n.to(tl.int64) * stride_n
                    own_aux = tl.load(row_aux + n, mask=n < N, other=float("nan"))
                    s = tl.load(row_s + n, mask=n < N, other=float("nan"), cache_modifier=".cg")
                    for c in range(fresh, done, BLOCK_C):
                        col = c + tl.arange(0, BLOCK_C)
                        token = tl.load(row_indices + col, mask=col < done, other=0, cache_modifier=".cg")
                        cols = row_x + token * stride_n
                        dots = _products(rows, n < N, cols, col < done, D, BLOCK_N, BLOCK_C, BLOCK_D)
                        col_aux = tl.load(row_aux + token, mask=col < done, other=float("nan"))
                        sim = tl.max(_similarities(dots, own_aux, col_aux, COSINE), 1)
                        s = tl.where(s < sim, sim, s)
                    tl.store(row_s + n, s, mask=n < N)
                target += C
                _team_barrier(control, target)
            fresh = done
            found = tl.full([], 0, tl.int32)
            tau = tl.full([], LAST_KEY, tl.int64)
            if rank == 0:  # A
                threshold, ties = _select_threshold(row_s, N, M, BLOCK_S)
                found, tau = _take_candidates(row_s, candidates, candidate_s, threshold, ties, N, BLOCK_S)
                tl.store(control + 1, found)
            target += C
            _team_barrier(control, target)
            found = tl.load(control + 1, volatile=True)
            TILES: tl.constexpr = M // BLOCK_M
            for tile in range(rank, TILES * TILES, C):  # B
                i = tile // TILES * BLOCK_M + tl.arange(0, BLOCK_M)
                j = tile % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
                row_token = tl.load(candidates + i, mask=i < found, other=0, cache_modifier=".cg").to(tl.int64)
                col_token = tl.load(candidates + j, mask=j < found, other=0, cache_modifier=".cg").to(tl.int64)
                rows, cols = row_x + row_token * stride_n, row_x + col_token * stride_n
                dots = _products(rows, i < found, cols, j < found, D, BLOCK_M, BLOCK_M, BLOCK_D)
                aux_i = tl.load(row_aux + row_token, mask=i < found, other=float("nan"))
                aux_j = tl.load(row_aux + col_token, mask=j < found, other=float("nan"))
                sim = _similarities(dots, aux_i, aux_j, COSINE)
                tl.store(pairs + i[:, None] * M + j[None, :], sim)
            target += C
            _team_barrier(control, target)
            if rank == 0:  # C
                done = _greedy_steps(
                    candidates, candidate_s, pairs, row_s, row_indices, row_radii, found, tau, done, k, COSINE, M
                )  # fmt: skip
                tl.store(control + 1, done)
            target += C
            _team_barrier(control, target)
            done = tl.load(control + 1, volatile=True)
        # nobody may still read control[1] or the candidates of this row
        target += C
        _team_barrier(control, target)
        if BUDGETS:  # indices of the packed tensor
            for start in range(rank * BLOCK_S, k, C * BLOCK_S):
                lane = start + tl.arange(0, BLOCK_S)
                token = tl.load(row_indices + lane, mask=lane < k, cache_modifier=".cg")
                tl.store(row_indices + lane, tl.where(token < 0, token, token + first), mask=lane < k)


def kcenter(x, k, seeds, mask, metric):
    """x [B, N, D] with features side by side; the arguments are checked by pruneops.ops."""
    B, N, _ = x.shape
    indices = torch.empty((B, k), dtype=torch.int64, device=x.device)
    radii = torch.empty((B, k), dtype=torch.float32, device=x.device)
    if B == 0:
        return indices, radii
    x = x.float() if INTERPRETED else x  # the interpreter's bfloat16 products are wrong
    run = _gram if N <= GRAM_TOKENS and 4 * B * N * N <= GRAM_BYTES else _rounds
    with device_guard(x):
        run(x, k, seeds, mask, metric == "cosine", indices, radii)
    return indices, radii


def kcenter_varlen(x, cu_seqlens, ks, seeds, metric):
    """x [T, D] packed; one team of programs per sequence."""
    indices = torch.empty(sum(ks), dtype=torch.int64, device=x.device)
    radii = torch.empty(sum(ks), dtype=torch.float32, device=x.device)
    if indices.numel() == 0:
        return indices, radii
    x, cosine, out = x[None].float() if INTERPRETED else x[None], metric == "cosine", 0
    with device_guard(x):
        for first in range(0, len(ks), BUDGETS[-1]):
            own = tuple(ks[first : first + BUDGETS[-1]])
            bounds, own_seeds = cu_seqlens[first:], None if seeds is None else seeds[first:]
            _rounds(x, 0, own_seeds, None, cosine, indices[out:], radii[out:], bounds, own)
            out += sum(own)
    return indices, radii


def _norms(x, kind, mask, cosine, aux, nearest, control=None, controls=0):
    B, N, D = x.shape
    _kcenter_norms_kernel(
        (x.dtype, kind, cosine, mask is not None, control is not None), (B * cdiv(N, NORMS["BLOCK_N"]), 1, 1),
        x, mask, aux, nearest, control, x.stride(0), x.stride(1), *_strides(mask), N, D, controls,
    )  # fmt: skip


def _strides(companion):
    return (0, 0) if companion is None else companion.stride()


def _gram(x, k, seeds, mask, cosine, indices, radii):
    B, N, D = x.shape
    kind, float32 = alignment_class(x), torch.float32
    _memory, aux, nearest, gram = workspace(x.device, (float32, B * N), (float32, B * N), (float32, B * N * N))
    _norms(x, kind, mask, cosine, aux, nearest)
    side = cdiv(N, tuned(GRAM, kind)[0]["BLOCK"])
    _kcenter_gram_kernel(
        (x.dtype, kind, cosine), (B * (side * (side + 1) // 2), 1, 1), x, aux, gram, x.stride(0), x.stride(1), N, D
    )
    width = next(width for width in GREEDY_TOKENS if width >= N)
    _kcenter_greedy_kernel(
        (width, cosine, seeds is not None), (B, 1, 1), gram, nearest, seeds, indices, radii,
        *_strides(seeds), N, 0 if seeds is None else seeds.shape[1], k,
    )  # fmt: skip


def _rounds(x, k, seeds, mask, cosine, indices, radii, bounds=None, ks=()):
    """A batch, or with bounds and ks the sequences of a packed x [1, T, D]."""
    rows, N, D = x.shape
    kind, float32 = alignment_class(x), torch.float32
    programs = multiprocessors(x.device)
    B = len(ks) or rows
    M = CANDIDATES[N >= MANY_TOKENS and not ks]
    teams = min(B, programs)
    C = programs // teams
    _memory, aux, nearest, candidates, candidate_s, pairs, control = workspace(
        x.device, (float32, rows * N), (float32, rows * N), (torch.int32, teams * M), (float32, teams * M),
        (float32, teams * M * M), (torch.int32, teams * 2),
    )  # fmt: skip
    _norms(x, kind, mask, cosine, aux, nearest, control, teams * 2)
    room = next(room for room in BUDGETS if room >= B) if ks else 0
    budgets = (*ks, *[0] * (room - B)) if ks else None
    _kcenter_rounds_kernel(
        (x.dtype, kind, cosine, M, seeds is not None, room), (teams * C, 1, 1),
        x, aux, nearest, seeds, bounds, budgets, indices, radii, candidates, candidate_s, pairs, control,
        x.stride(0), x.stride(1), *_strides(seeds), B, N, 0 if seeds is None else seeds.shape[1], k, D, C,
    )  # fmt: skip


def specializations():
    """(kernel, form) of what the launchers above can ask for, to be compiled without a GPU."""
    for dtype, kind, cosine in (
        (torch.bfloat16, "half", True),
        (torch.float16, "half", False),
        (torch.float32, "float", True),
        (torch.bfloat16, "unaligned", False),
        (torch.float32, "unaligned", True),
    ):
        yield _kcenter_norms_kernel, (dtype, kind, cosine, cosine, not cosine)
        yield _kcenter_gram_kernel, (dtype, kind, cosine)
        for M, seeds, budgets in ((CANDIDATES[0], True, 8), (CANDIDATES[0], False, 0), (CANDIDATES[1], True, 0)):
            yield _kcenter_rounds_kernel, (dtype, kind, cosine, M, seeds, budgets)
    yield _kcenter_rounds_kernel, (torch.bfloat16, "half", True, CANDIDATES[0], False, BUDGETS[-1])
    for width, cosine in itertools.product(GREEDY_TOKENS, (True, False)):
        yield _kcenter_greedy_kernel, (width, cosine, cosine)
