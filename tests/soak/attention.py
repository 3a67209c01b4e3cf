"""Random calls of the operators that sum attention."""

import torch

from tests import inputs, oracles
from tests.inputs import DTYPES, HEAD_LAYOUTS, counting, ranked
from tests.oracles import attention, differ, inaccurate, unequal

from .draws import Call, Soak

MAX_LOGITS = 1_500_000  # that an oracle holds


def draw_inputs(random):
    """(query, key, counted, seen, options, exact); padding and its lse are perhaps poisoned."""
    batch, Hk = random.choice(0, 1, 1, 2, 3), random.between(1, 2)
    D = random.choice(1, 16, 32, 33, 64, 72, 80, 128, 256)
    H, D = Hk * random.choice(1, 2, 7, 8), min(D, 33) if random.interpreted else D
    Sk = random.size(200, 6000, 60)
    limit = max(1, MAX_LOGITS // (max(batch, 1) * H * Sk))
    Sq = min(random.choice(1, random.between(1, 5), random.size(200, 1500, 40)), limit)
    kind, shape = random.choice(ranked, counting, None, None), (batch, H, Hk, Sq, Sk, D)
    exact = kind is not None
    query, key, *options = kind(*shape, random.generator) if exact else inputs.real(*shape, random.seed())
    query = query if exact else query * random.choice(0.25, 1)
    dtype = random.choice(*DTYPES) if kind is not ranked or Sk <= 257 else torch.float32  # of ranks
    counted, seen = mask(random, (batch, Sq)), mask(random, (batch, Sk))
    query = random.choice(*HEAD_LAYOUTS.values())(poison(random, query.to(dtype), counted[:, None, :, None]))
    key = random.choice(*HEAD_LAYOUTS.values())(poison(random, key.to(dtype), seen[:, None, :, None]))
    options = {"causal": random.chance(0.5), "lse": None, "scale": random.choice(None, 0.3, 1)} | dict(*options)
    if not exact and random.chance(0.4):
        options["lse"] = attention(query, key, counted, seen, **options)[1].float()
    if options["lse"] is not None:
        options["lse"] = random.laid_out(poison(random, options["lse"], counted[:, None]), own=True)
    return query, key, counted, seen, options, exact


def mask(random, shape):
    """bool [B, S]: all, none, some, padded on the left, on the right or in the middle."""
    edge, token, chance = random.integers(0, shape[-1] + 1, (shape[0], 1)), torch.arange(shape[-1]), random.rand(*shape)
    return random.choice(chance < 1, chance < 1, chance < 0, chance < 0.5, chance < 0.95, token >= edge, token < edge,
                     (token - edge).abs() > 2)  # fmt: skip


def poison(random, tensor, valid):
    return inputs.poison(tensor, valid, random.generator) if random.chance(0.5) else tensor


def drawn(random, arguments, exact):
    """Perhaps without the batch dimension."""
    if len(arguments["query"]) == 1 and random.chance(0.5):
        arguments = {name: t[0] if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    return Call(arguments, exact)


def draw_attention_mass(random):
    query, key, counted, seen, options, exact = draw_inputs(random)
    G = random.between(1, 8)
    sides = (groups(random, valid, random.between(1, G)) for valid in (counted, seen))
    arguments = dict(zip(("query", "key", "query_group", "key_group"), (query, key, *sides)))
    return drawn(random, {**arguments, "groups": G, **options}, exact)


def groups(random, valid, used):
    """Groups [B, S], -1 where not valid; in runs as of text and images, or in any order."""
    run = (random.rand(*valid.shape) < random.choice(0.1, 1.0)).cumsum(-1)
    group = random.integers(0, used, (*valid.shape[:-1], valid.shape[-1] + 1)).gather(-1, run)
    return random.laid_out(group.where(valid, -1).to(random.choice(torch.int32, torch.int64)), own=True)


def verify_attention_mass(call, results, reference):
    arguments = call.arguments
    mass, lse = oracles.attention_mass(**arguments)
    if call.exact:
        problem = unequal(results[0], mass.float(), reference[0])
    else:
        problem = inaccurate(results[0], mass, reference[0], max_finite(mass), 8 + steepness(call))
    if problem:
        return f"mass: {problem}"
    if arguments["lse"] is not None:
        return differ(results[1], arguments["lse"], "the lse given")
    problem = inaccurate(results[1], lse, reference[1], max_finite(lse), 4 + steepness(call) / max(max_finite(lse), 1))
    return problem and f"lse: {problem}"


def draw_attention_received(random):
    query, key, counted, seen, options, exact = draw_inputs(random)
    for name, valid in (("query_mask", counted), ("key_mask", seen)):
        options[name] = random.laid_out(valid, own=True) if not valid.all() or random.chance(0.5) else None
    return drawn(random, {"query": query, "key": key, **options}, exact)


def verify_attention_received(call, results, reference):
    arguments = call.arguments
    probability, lse = oracles.masked_attention(**arguments)
    truth = probability.sum(-2)
    if call.exact and arguments["lse"] is not None:
        return unequal(results[0], truth.float(), reference[0])
    ulps = 4 * max_finite(lse) if call.exact else 8 + steepness(call)  # exp of a logit minus a rounded lse
    return inaccurate(results[0], truth, reference[0], max_finite(truth), ulps)


def max_finite(values):
    """Maximum of the finite absolute values."""
    return float(values.abs().nan_to_num(0, 0, 0).amax()) if values.numel() else 0.0


def steepness(call):
    """Bound of a logit: its rounding is so many ulps of a probability."""
    query, key = (call.arguments[name] for name in ("query", "key"))
    scale = call.arguments["scale"]
    lengths = (max_finite(t.double().where(t.abs() < 1e6, 0).norm(dim=-1)) for t in (query, key))
    return next(lengths) * next(lengths) * (query.shape[-1] ** -0.5 if scale is None else scale)


SOAKS = {
    "attention_mass": Soak(draw_attention_mass, verify_attention_mass),
    "attention_received": Soak(draw_attention_received, verify_attention_received),
}
