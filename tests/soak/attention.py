"""Trials of the operators that sum attention."""

import torch

from .draws import DTYPES, LAYOUTS, Call, Soak
from .oracles import differ, inaccurate, unequal

MOST_LOGITS = 1_500_000  # that an oracle holds
ANYTHING = (torch.nan, torch.inf, -torch.inf, 3e38, -3e38)
HEADS = (
    lambda t: t.transpose(-3, -2).contiguous().transpose(-3, -2),  # tokens before heads
    lambda t: t[..., :1, :, :].expand(t.shape),  # one head for all
)


def draw_inputs(random):
    """(query, key, counted, seen, options, exact): padding holds anything, and so does its lse."""
    batch, Hk, D = random.of(0, 1, 1, 2, 3), random.between(1, 2), random.of(1, 16, 32, 33, 64, 72, 80, 128, 256)
    H, D = Hk * random.of(1, 2, 7, 8), min(D, 33) if random.interpreted else D
    Sk = random.size(200, 6000, 60)
    most = max(1, MOST_LOGITS // (max(batch, 1) * H * Sk))
    Sq = min(random.of(1, random.between(1, 5), random.size(200, 1500, 40)), most)
    query, key, options = random.of(ranked, counting, real, real)(random, batch, H, Hk, Sq, Sk, D)
    exact, dtype = options.pop("exact", False), random.of(*options.pop("dtypes", DTYPES))
    counted, seen = live(random, (batch, Sq)), live(random, (batch, Sk))
    query = random.of(*LAYOUTS, *HEADS)(spoiled(random, query.to(dtype), counted[:, None, :, None]))
    key = random.of(*LAYOUTS, *HEADS)(spoiled(random, key.to(dtype), seen[:, None, :, None]))
    options = {"causal": random.chance(0.5), "lse": None, "scale": random.of(None, 0.3, 1)} | options
    if not exact and random.chance(0.4):
        alike = {**options, "lse": None}
        options["lse"] = attention(query, key, counted, seen, **alike)[1].float()
    if options["lse"] is not None:
        options["lse"] = random.laid_out(spoiled(random, options["lse"], counted[:, None]), own=True)
    return query, key, counted, seen, options, exact


def real(random, B, H, Hk, Sq, Sk, D):
    """Some rows attend to few keys, some to many."""
    return random.randn(B, H, Sq, D) * random.rand(B, H, Sq, 1) * random.of(1, 4), random.randn(B, Hk, Sk, D), {}


def ranked(random, B, H, Hk, Sq, Sk, D):
    """To every query one key outdoes the others by 256 (2 D scale), so its probability is exactly 1."""
    signs = random.integers(0, 2, (D,)) * 2.0 - 1
    query = signs * (random.integers(0, 2, (B, H, Sq, 1)) * 2.0 - 1)
    key = signs * random.rand(B, Hk, Sk).argsort(-1)[..., None]
    return query, key, {"scale": 256 / D, "exact": True, "dtypes": DTYPES if Sk <= 257 else DTYPES[:1]}  # of ranks


def counting(random, B, H, Hk, Sq, Sk, D):
    """Logits are 0 or at most -256, lse is 0 or -inf, so probabilities are exactly 0 or 1."""
    query, key = 16.0 * (random.rand(B, H, Sq, D) < 2 / D), -16.0 * (random.rand(B, Hk, Sk, D) < 0.5)
    lse = torch.tensor([0.0, 0.0, -torch.inf])[random.integers(0, 3, (B, H, Sq))]
    return query, key, {"scale": 1, "lse": lse, "exact": True}


def live(random, shape):
    """bool [B, S]: all, none, some, padded on the left, on the right or in the middle."""
    edge, token, chance = random.integers(0, shape[-1] + 1, (shape[0], 1)), torch.arange(shape[-1]), random.rand(*shape)
    return random.of(chance < 1, chance < 1, chance < 0, chance < 0.5, chance < 0.95, token >= edge, token < edge,
                     (token - edge).abs() > 2)  # fmt: skip


def spoiled(random, tensor, alive):
    """The tensor with anything in it where it must not matter."""
    anything = torch.tensor(ANYTHING).to(tensor.dtype)[random.integers(0, len(ANYTHING), tensor.shape)]
    return tensor.where(alive, anything) if random.chance(0.5) else tensor


def attention(query, key, counted, seen, causal=True, scale=None, lse=None):
    """(probabilities [.., H, Sq, Sk], lse [.., H, Sq]) in float64; 0 and -inf where nothing is counted or seen."""
    (heads, queries, width), keys = query.shape[-3:], key.shape[-2]
    key = key.double().repeat_interleave(heads // key.shape[-3], -3)
    logits = query.double() @ key.mT * (width**-0.5 if scale is None else scale)
    visible = counted[..., None, :, None] & seen[..., None, None, :]
    if causal:
        visible = visible & (torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries)
    logits = logits.where(visible, -torch.inf)
    lse = logits.logsumexp(-1) if lse is None else lse.double()
    return (logits - lse[..., None]).exp().where(visible & (lse != -torch.inf)[..., None], 0.0), lse


def drawn(random, arguments, exact):
    """Perhaps without the batch dimension."""
    if len(arguments["query"]) == 1 and random.chance(0.5):
        arguments = {name: t[0] if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    return Call(arguments, exact)


def draw_attention_mass(random):
    query, key, counted, seen, options, exact = draw_inputs(random)
    G = random.between(1, 8)
    sides = (groups(random, mask, random.between(1, G)) for mask in (counted, seen))
    arguments = dict(zip(("query", "key", "query_group", "key_group"), (query, key, *sides)))
    return drawn(random, {**arguments, "groups": G, **options}, exact)


def groups(random, mask, used):
    """Groups [B, S], -1 where the mask is not; in runs as of text and images, or in any order."""
    run = (random.rand(*mask.shape) < random.of(0.1, 1.0)).cumsum(-1)
    group = random.integers(0, used, (*mask.shape[:-1], mask.shape[-1] + 1)).gather(-1, run)
    return random.laid_out(group.where(mask, -1).to(random.of(torch.int32, torch.int64)), own=True)


def verify_attention_mass(call, results, reference):
    arguments = dict(call.arguments)
    query_group, key_group, G = (arguments.pop(name) for name in ("query_group", "key_group", "groups"))
    probability, lse = attention(counted=query_group >= 0, seen=key_group >= 0, **arguments)
    own, other = ((group[..., None, :, None] == torch.arange(G)).double() for group in (query_group, key_group))
    mass = own.mT @ probability @ other
    if call.exact:
        problem = unequal(results[0], mass.float(), reference[0])
    else:
        problem = inaccurate(results[0], mass, reference[0], greatest(mass), 8 + steepness(call))
    if problem:
        return f"mass: {problem}"
    if arguments["lse"] is not None:
        return differ(results[1], arguments["lse"], "the lse given")
    problem = inaccurate(results[1], lse, reference[1], greatest(lse), 4 + steepness(call) / max(greatest(lse), 1))
    return problem and f"lse: {problem}"


def draw_attention_received(random):
    query, key, counted, seen, options, exact = draw_inputs(random)
    for name, mask in (("query_mask", counted), ("key_mask", seen)):
        options[name] = random.laid_out(mask, own=True) if not mask.all() or random.chance(0.5) else None
    return drawn(random, {"query": query, "key": key, **options}, exact)


def verify_attention_received(call, results, reference):
    arguments = dict(call.arguments)
    masks = ((arguments.pop(f"{name}_mask"), arguments[name]) for name in ("query", "key"))
    counted, seen = (torch.ones(*t.shape[:-3], t.shape[-2], dtype=torch.bool) if m is None else m for m, t in masks)
    probability, lse = attention(counted=counted, seen=seen, **arguments)
    truth = probability.sum(-2)
    if call.exact and arguments["lse"] is not None:
        return unequal(results[0], truth.float(), reference[0])
    ulps = 4 * greatest(lse) if call.exact else 8 + steepness(call)  # exp of a logit less a rounded lse
    return inaccurate(results[0], truth, reference[0], greatest(truth), ulps)


def greatest(values):
    """Of the finite ones."""
    return float(values.abs().nan_to_num(0, 0, 0).amax()) if values.numel() else 0.0


def steepness(call):
    """Most that the terms of a logit can sum to: so many ulps its rounding is of a probability."""
    query, key = (call.arguments[name] for name in ("query", "key"))
    scale = call.arguments["scale"]
    lengths = (greatest(t.double().where(t.abs() < 1e6, 0).norm(dim=-1)) for t in (query, key))
    return next(lengths) * next(lengths) * (query.shape[-1] ** -0.5 if scale is None else scale)


SOAKS = {
    "attention_mass": Soak(draw_attention_mass, verify_attention_mass),
    "attention_received": Soak(draw_attention_received, verify_attention_received),
}
