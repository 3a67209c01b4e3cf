"""Random calls of the token-copy operators, checked to the bit."""

import torch

from tests import oracles
from tests.inputs import GARBAGE, PLACES, among_others, any_bits, ascending, copied, storage
from tests.oracles import differ, first

from .draws import Call, Soak

TYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.int64,
    torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip
WIDTHS = (1, 3, 16, 20, 33, 64, 128)
MAX_ELEMENTS = 300_000  # of all caches, about


def placed(random, tensor):
    """The tensor [.., S, D] in some memory layout."""
    if tensor.dim() < 2:
        return among_others(tensor, [random.choice(1, 2)])
    return random.choice(*PLACES.values())(tensor)


def positions(random, rows, K, S, in_place):
    """keep [*rows, K] in [0, S); in place ascending."""
    return ascending(rows, K, S, random.generator) if in_place else random.integers(0, S, (*rows, K))


def with_lengths(random, keep):
    """(keep, lengths): garbage past the lengths."""
    lengths, K = random.integers(0, keep.shape[-1] + 1, keep.shape[:1]), keep.shape[-1]
    shape = [len(keep)] + [1] * (keep.dim() - 1)
    keep = keep.where(torch.arange(K) < lengths.view(shape), random.choice(*GARBAGE))
    return random.choice(keep, keep.mT.contiguous().mT), lengths.to(random.choice(torch.int32, torch.int64))


def draw_caches(random, in_place):
    """Keys and values of layers of one length; sometimes two of them halves of one tensor."""
    B, Hk, S = random.between(0, 3), random.between(1, 4), random.size(100, 3000, 20) - random.choice(0, 0, 0, 1)
    caches, limit = [], min(4 if random.interpreted else 200, MAX_ELEMENTS // (B * Hk * S * 64 + 1) + 1)
    for _ in range(random.choice(1, min(2, limit), min(4, limit), random.between(1, limit))):
        dtype, D = random.choice(*TYPES), random.choice(*WIDTHS[: 5 if random.large or random.interpreted else None])
        if random.chance(0.2):
            both = any_bits((B, Hk, S, 2 * D), dtype, random.generator)
            caches += both.split(D, -1)
        else:
            caches.append(placed(random, any_bits((B, Hk, S, D), dtype, random.generator)))
    limit = S if in_place else random.choice(S, 2 * S)
    K = random.choice(random.between(0, limit), random.between(0, limit), limit if S else 0)
    keep, lengths = positions(random, random.choice((B,), (B, Hk)), K if S else 0, S, in_place), None
    if random.chance(0.5):
        keep, lengths = with_lengths(random, keep)
    return Call({"caches": caches, "keep": keep, "lengths": lengths})


def verify_kv_compact(call, results, reference):
    return first(map(new_cache_problem, [call] * len(results), range(len(results)), results, reference))


def new_cache_problem(call, i, result, reference):
    problem = differ(result, oracles.kv_compact(call.arguments["caches"][i], *keep_of(call)), f"result {i}")
    same = all(s == t for s, t, size in zip(result.stride(), reference.stride(), result.shape) if size > 1)
    return problem or (None if same or not result.numel() else f"result {i} has strides {result.stride()}")


def keep_of(call):
    return call.arguments["keep"], call.arguments["lengths"]


def verify_kv_compact_(call, results, reference):
    truth = copied(call.arguments["caches"])
    for cache in truth:  # two may be halves of one tensor
        cache.copy_(oracles.kv_compact_(cache, *keep_of(call)))
    return wrong_memory(results, truth)


def wrong_memory(results, truth):
    """Every byte, those around the tensors too."""
    pairs = enumerate(zip(results, truth))
    return first(differ(storage(own), storage(other), f"tensor {i}'s memory") for i, (own, other) in pairs)


def draw_paged(random):
    """Garbage past the lengths and past the last kept token's page; keys and values apart, together, interleaved."""
    B, Hk = random.between(0, 3), random.between(1, 3)
    page, widths = random.choice(1, 2, 3, 4, 7, 16, 64), (1, 5, 16, 24, 128)
    if random.interpreted:
        page, widths = min(page, 7), widths[:-1]
    blocks = random.between(1, 5) if not random.large else random.between(10, 100)
    layout, pages, tensors = random.choice("NHD", "HND"), B * blocks + random.between(1, 3), []
    for _ in range(random.between(1, 3)):
        D, dtype = random.choice(*widths), random.choice(*TYPES)
        shape = pages, *((page, Hk) if layout == "NHD" else (Hk, page)), D
        kind = random.choice("apart", "together", "interleaved")
        if kind == "apart":
            tensors.append(placed(random, any_bits(shape, dtype, random.generator)))
        elif kind == "together":
            tensors.append(placed(random, any_bits((pages, 2, *shape[1:]), dtype, random.generator)))
        else:
            tensors += any_bits((*shape[:3], 2, D), dtype, random.generator).unbind(3)
    S = blocks * page
    rows, K = random.choice((B,), (B, Hk)), random.choice(S, random.between(0, S))
    keep, lengths = with_lengths(random, positions(random, rows, K, S, True))
    table = random.rand(pages).argsort()[: B * blocks].view(B, blocks).int()
    for own, row, length in zip(table, keep, lengths.tolist()):
        last = int(row[..., :length].max()) if length else -1
        own[last // page + 1 :] = random.choice(2**30, -(2**30))
    return Call({"pages": tensors, "block_table": table, "keep": keep, "lengths": lengths, "layout": layout})


def verify_paged(call, results, reference):
    pages, table, keep, lengths, layout = call.arguments.values()
    return wrong_memory(results, oracles.paged_kv_compact_(pages, table, keep, lengths, layout))


def draw_gather_tokens(random):
    """Ranks 1 to 5, a batch or none, one that all rows share."""
    B, S, K = random.choice(None, 0, 1, 2, 3), random.size(60, 3000, 12), random.size(100, 2000, 12)
    tensors, dims = [], []
    for _ in range(random.choice(1, 2, 4, random.between(1, 150 if S < 10 and not random.interpreted else 5))):
        before = [random.between(1, 3) for _ in range(random.between(0, 2))]
        ranks = 1 if random.large or random.interpreted else 2
        after = [random.choice(1, 2, 3, 16, 33) for _ in range(random.between(0, ranks))]
        batch = [] if B is None else [random.choice(1, B)]
        tensors.append(placed(random, any_bits((*before, *batch, S, *after), random.choice(*TYPES), random.generator)))
        dim = len(before) + len(batch)
        dims.append(random.choice(dim, dim - tensors[-1].dim()))
    keep = random.laid_out(random.integers(0, S, (K,) if B is None else (B, K)), own=True)
    return Call({"tensors": tensors, "keep": keep, "dim": dims})


def verify_gather_tokens(call, results, reference):
    tensors, keep, dims = call.arguments.values()

    def problems():
        for i, (tensor, dim, result) in enumerate(zip(tensors, dims, results)):
            yield differ(result, oracles.gather_tokens(tensor, keep, dim), f"result {i}")
            yield None if result.is_contiguous() else f"result {i} is not contiguous"

    return first(problems())


SOAKS = {
    "kv_compact": Soak(lambda random: draw_caches(random, False), verify_kv_compact),
    "kv_compact_": Soak(lambda random: draw_caches(random, True), verify_kv_compact_, writes="caches"),
    "paged_kv_compact_": Soak(draw_paged, verify_paged, writes="pages"),
    "gather_tokens": Soak(draw_gather_tokens, verify_gather_tokens),
}
