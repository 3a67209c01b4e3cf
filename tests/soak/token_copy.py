"""Trials of the operators that move tokens, to the bit."""

import torch

from .draws import Call, Soak, copied, memory
from .oracles import differ, first

TYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.int64,
    torch.float64, torch.complex64, torch.complex128,
)  # fmt: skip
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
WIDTHS = (1, 3, 16, 20, 33, 64, 128)
MOST_ELEMENTS = 300_000  # of about as many as all caches hold
GARBAGE = 2**60, -1, -(2**60)  # entries that nobody may use


def any_bits(random, shape, dtype):
    """Every pattern of bits: NaN payloads, -0.0, denormals; a bool has but two."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return random.integers(0, 2 if dtype == torch.bool else 256, (count,)).to(torch.uint8).view(dtype).view(shape)


def bits(tensor):
    """The same memory as elements that are copied as they are."""
    return tensor.view(INTEGERS[tensor.element_size()])


def among_others(random, tensor, step, margin=3):
    """The tensor inside a larger one of other bits, its entries `step` apart in each dimension."""
    shape = [margin + s * max(size, 1) for s, size in zip(step, tensor.shape)]
    big = any_bits(random, shape, tensor.dtype)
    own = big[tuple(slice(margin, margin + s * size, s) for s, size in zip(step, tensor.shape))]
    bits(own).copy_(bits(tensor))
    return own


def placed(random, tensor):
    """The tensor [.., S, D] somewhere in memory."""
    rank = tensor.dim()
    if rank < 2:
        return among_others(random, tensor, [random.of(1, 2)])
    return random.of(
        lambda: tensor,
        lambda: tensor.movedim(-2, min(1, rank - 2)).contiguous().movedim(min(1, rank - 2), -2),  # tokens outside
        lambda: among_others(random, tensor, [1] * rank),
        lambda: among_others(random, tensor, [1] * (rank - 2) + [2, 1], margin=0),  # every other token
        lambda: among_others(random, tensor.flatten(), [1], margin=1).view(tensor.shape),  # off by one
        lambda: among_others(random, tensor, [1] * (rank - 1) + [2]),
        lambda: tensor.mT.contiguous().mT,
    )()


def positions(random, rows, K, S, ascending):
    """keep [*rows, K] in [0, S), with perhaps none shared between rows."""
    if ascending:
        return random.rand(*rows, S).argsort(-1)[..., :K].sort(-1).values
    return random.integers(0, S, (*rows, K))


def with_lengths(random, keep):
    """(keep, lengths): garbage past the lengths."""
    lengths, K = random.integers(0, keep.shape[-1] + 1, keep.shape[:1]), keep.shape[-1]
    shape = [len(keep)] + [1] * (keep.dim() - 1)
    keep = keep.where(torch.arange(K) < lengths.view(shape), random.of(*GARBAGE))
    return random.of(keep, keep.mT.contiguous().mT), lengths.to(random.of(torch.int32, torch.int64))


def draw_caches(random, in_place):
    """Keys and values of layers of one length; sometimes two of them halves of one tensor."""
    B, Hk, S = random.between(0, 3), random.between(1, 4), random.size(100, 3000, 20) - random.of(0, 0, 0, 1)
    caches, most = [], min(4 if random.interpreted else 200, MOST_ELEMENTS // (B * Hk * S * 64 + 1) + 1)
    for _ in range(random.of(1, min(2, most), min(4, most), random.between(1, most))):
        dtype, D = random.of(*TYPES), random.of(*WIDTHS[: 5 if random.large or random.interpreted else None])
        if random.chance(0.2):
            both = any_bits(random, (B, Hk, S, 2 * D), dtype)
            caches += both.split(D, -1)
        else:
            caches.append(placed(random, any_bits(random, (B, Hk, S, D), dtype)))
    most = S if in_place else random.of(S, 2 * S)
    K = random.of(random.between(0, most), random.between(0, most), most if S else 0)
    keep, lengths = positions(random, random.of((B,), (B, Hk)), K if S else 0, S, in_place), None
    if random.chance(0.5):
        keep, lengths = with_lengths(random, keep)
    return Call({"caches": caches, "keep": keep, "lengths": lengths})


def kept(keep, lengths, B, Hk):
    """(b, h, positions) of every head."""
    for b in range(B):
        for h in range(Hk):
            own = keep[b, h] if keep.dim() == 3 else keep[b]
            yield b, h, own if lengths is None else own[: int(lengths[b])]


def verify_kv_compact(call, results, reference):
    return first(map(new_cache_problem, [call] * len(results), range(len(results)), results, reference))


def new_cache_problem(call, i, result, reference):
    cache, keep, lengths = call.arguments["caches"][i], call.arguments["keep"], call.arguments["lengths"]
    truth = torch.zeros(*cache.shape[:2], keep.shape[-1], cache.shape[3], dtype=cache.dtype)
    for b, h, own in kept(keep, lengths, *cache.shape[:2]):
        bits(truth)[b, h, : len(own)] = bits(cache)[b, h, own]
    problem = differ(result, truth, f"result {i}")
    alike = all(s == t for s, t, size in zip(result.stride(), reference.stride(), result.shape) if size > 1)
    return problem or (None if alike or not result.numel() else f"result {i} lies in memory as {result.stride()}")


def verify_kv_compact_(call, results, reference):
    truth = copied(call.arguments["caches"], "cpu")
    for cache in map(bits, truth):
        before = cache.clone()
        for b, h, own in kept(call.arguments["keep"], call.arguments["lengths"], *cache.shape[:2]):
            cache[b, h, : len(own)] = before[b, h, own]
    return wrong_memory(results, truth)


def wrong_memory(results, truth):
    """Every byte, those around the tensors too."""
    pairs = enumerate(zip(results, truth))
    return first(differ(memory(own), memory(other), f"tensor {i}'s memory") for i, (own, other) in pairs)


def draw_paged(random):
    """Garbage past the lengths and past the last kept token's page; keys and values apart, together, interleaved."""
    B, Hk = random.between(0, 3), random.between(1, 3)
    page, widths = random.of(1, 2, 3, 4, 7, 16, 64), (1, 5, 16, 24, 128)
    if random.interpreted:
        page, widths = min(page, 7), widths[:-1]
    blocks = random.between(1, 5) if not random.large else random.between(10, 100)
    layout, pages, tensors = random.of("NHD", "HND"), B * blocks + random.between(1, 3), []
    for _ in range(random.between(1, 3)):
        D, dtype = random.of(*widths), random.of(*TYPES)
        shape = pages, *((page, Hk) if layout == "NHD" else (Hk, page)), D
        form = random.of("apart", "together", "interleaved")
        if form == "apart":
            tensors.append(placed(random, any_bits(random, shape, dtype)))
        elif form == "together":
            tensors.append(placed(random, any_bits(random, (pages, 2, *shape[1:]), dtype)))
        else:
            tensors += any_bits(random, (*shape[:3], 2, D), dtype).unbind(3)
    S = blocks * page
    rows, K = random.of((B,), (B, Hk)), random.of(S, random.between(0, S))
    keep, lengths = with_lengths(random, positions(random, rows, K, S, True))
    table = random.rand(pages).argsort()[: B * blocks].view(B, blocks).int()
    for own, row, length in zip(table, keep, lengths.tolist()):
        last = int(row[..., :length].max()) if length else -1
        own[last // page + 1 :] = random.of(2**30, -(2**30))
    return Call({"pages": tensors, "block_table": table, "keep": keep, "lengths": lengths, "layout": layout})


def verify_paged(call, results, reference):
    table, keep, lengths = (call.arguments[name] for name in ("block_table", "keep", "lengths"))
    truth = copied(call.arguments["pages"], "cpu")
    for tensor in map(bits, truth):
        for part in tensor.unbind(1) if tensor.dim() == 5 else [tensor]:
            part = part if call.arguments["layout"] == "NHD" else part.transpose(1, 2)  # [pages, page, Hk, D]
            before, page = part.clone(), part.shape[1]
            for b, h, own in kept(keep, lengths, len(table), part.shape[2]):
                for r, position in enumerate(own.tolist()):
                    to, source = int(table[b, r // page]), int(table[b, position // page])
                    part[to, r % page, h] = before[source, position % page, h]
    return wrong_memory(results, truth)


def draw_gather_tokens(random):
    """Ranks 1 to 5, a batch or none, one that all rows share."""
    B, S, K = random.of(None, 0, 1, 2, 3), random.size(60, 3000, 12), random.size(100, 2000, 12)
    tensors, dims = [], []
    for _ in range(random.of(1, 2, 4, random.between(1, 150 if S < 10 and not random.interpreted else 5))):
        before = [random.between(1, 3) for _ in range(random.between(0, 2))]
        after = [
            random.of(1, 2, 3, 16, 33) for _ in range(random.between(0, 1 if random.large or random.interpreted else 2))
        ]
        batch = [] if B is None else [random.of(1, B)]
        tensors.append(placed(random, any_bits(random, (*before, *batch, S, *after), random.of(*TYPES))))
        dim = len(before) + len(batch)
        dims.append(random.of(dim, dim - tensors[-1].dim()))
    keep = random.laid_out(random.integers(0, S, (K,) if B is None else (B, K)), own=True)
    return Call({"tensors": tensors, "keep": keep, "dim": dims})


def verify_gather_tokens(call, results, reference):
    keep = call.arguments["keep"]

    def problems():
        for i, (tensor, dim, result) in enumerate(zip(call.arguments["tensors"], call.arguments["dim"], results)):
            dim %= tensor.dim()
            if keep.dim() == 1:
                truth = bits(tensor).index_select(dim, keep)
            else:
                rows = bits(tensor).movedim(dim - 1, 0).expand(len(keep), *[-1] * (tensor.dim() - 1))
                parts = [row.index_select(dim - 1, own).movedim(dim - 1, 0) for row, own in zip(rows, keep)]
                shape = len(keep), keep.shape[1], *(n for d, n in enumerate(tensor.shape) if d not in (dim - 1, dim))
                truth = torch.stack(parts) if parts else bits(tensor).new_empty(shape)
                truth = truth.movedim((0, 1), (dim - 1, dim))
            yield differ(bits(result), truth, f"result {i}")
            yield None if result.is_contiguous() else f"result {i} is not contiguous"

    return first(problems())


SOAKS = {
    "kv_compact": Soak(lambda random: draw_caches(random, False), verify_kv_compact),
    "kv_compact_": Soak(lambda random: draw_caches(random, True), verify_kv_compact_, writes="caches"),
    "paged_kv_compact_": Soak(draw_paged, verify_paged, writes="pages"),
    "gather_tokens": Soak(draw_gather_tokens, verify_gather_tokens),
}
