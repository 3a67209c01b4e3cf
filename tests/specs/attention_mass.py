"""Calls of `attention_mass`."""

import functools

import torch

import pruneops
from tests.inputs import HEAD_LAYOUTS, random_groups, real
from tests.invalid_calls import InvalidCall, TypeErrorCall

from . import _attention
from ._small import TOLERANCE, as_reference, name_of


def small_calls():
    """Prefill with rows and keys left out, few rows over split keys, lse given, odd widths, strides."""
    generator = torch.Generator().manual_seed(5)
    for B, H, Hk, Sq, Sk, D, G, dtype, causal, given in (
        (1, 1, 1, 1, 1, 1, 1, torch.float32, True, False),
        (2, 4, 2, 150, 150, 64, 3, torch.float32, True, False),
        (1, 4, 4, 130, 301, 128, 8, torch.bfloat16, False, False),
        (2, 3, 1, 97, 97, 33, 5, torch.float16, True, False),
        (1, 4, 2, 200, 200, 80, 3, torch.float32, True, True),
        (2, 8, 2, 1, 3001, 128, 3, torch.bfloat16, True, False),
        (1, 2, 2, 1, 1025, 72, 2, torch.float16, True, True),
        (1, 7, 1, 3, 700, 256, 4, torch.float32, False, False),
    ):
        query = torch.randn(B, Sq, H, D + 1, generator=generator).to(dtype)
        key = torch.randn(B, Hk, Sk, D, generator=generator).to(dtype)
        query_group, key_group = (torch.randint(-1, G, (B, S), generator=generator).sort(-1).values for S in (Sq, Sk))
        lse = torch.rand(B, H, Sq, generator=generator) + 7 if given else None

        def run(to, own=(query, key, query_group, key_group, lse), G=G, causal=causal):
            query, key, query_group, key_group, lse = (t if t is None else t.to(to) for t in own)
            query = query[..., 1:].transpose(1, 2)
            mass, lse = pruneops.attention_mass(query, key, query_group, key_group, G, causal=causal, lse=lse)
            return torch.cat([mass.flatten(), lse.flatten()])

        label = f"B {B} H {H}/{Hk} S {Sq}/{Sk} D {D} G {G} {name_of(dtype)}"
        label += f"{' causal' if causal else ''}{' lse' if given else ''}"
        yield label, as_reference(run, max(Sq, 10) * TOLERANCE)


QUERY, KEY = _attention.QUERY, _attention.KEY
QUERY_GROUP, KEY_GROUP = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)
VALID = {"query": QUERY, "key": KEY, "query_group": QUERY_GROUP, "key_group": KEY_GROUP, "groups": 3}
invalid, wrong_type = (functools.partial(kind, "attention_mass", VALID) for kind in (InvalidCall, TypeErrorCall))
INVALID = [
    *_attention.invalid_calls("attention_mass", VALID),
    invalid(ValueError, "groups", "0", "1 to 8", groups=0),
    invalid(ValueError, "groups", "9", "1 to 8", groups=9),
    invalid(TypeError, "query_group", "torch.float32", "int64 or int32", query_group=QUERY_GROUP.float()),
    invalid(TypeError, "key_group", "torch.bool", "int64 or int32", key_group=KEY_GROUP.bool()),
    invalid(ValueError, "query_group", "of shape [5]", "of shape [2, 5]", query_group=QUERY_GROUP[0]),
    invalid(ValueError, "query_group", "of shape [2, 6]", "of shape [2, 5]", query_group=KEY_GROUP),
    invalid(ValueError, "key_group", "of shape [2, 5]", "of shape [2, 6]", key_group=QUERY_GROUP),
    invalid(ValueError, "key_group", "of shape [1, 6]", "of shape [2, 6]", key_group=KEY_GROUP[:1]),
    invalid(ValueError, "query_group", "on meta", "on the device of query, cpu", query_group=QUERY_GROUP.to("meta")),
    invalid(ValueError, "query_group", "3 at one place", "in [-1, 3)", query_group=QUERY_GROUP + 3, values=True),
    invalid(ValueError, "key_group", "-2 at one place", "in [-1, 3)", key_group=KEY_GROUP - 2, values=True),
]
TYPE_ERRORS = [
    *_attention.type_errors("attention_mass", VALID),
    wrong_type("query_group must be Tensor, got list", query_group=[0]),
    wrong_type("key_group must be Tensor, got int", key_group=0),
    wrong_type("groups must be int or SymInt, got float", groups=3.0),
]


def samples():
    query, key, query_group, key_group, lse = inputs(0, (2, 4, 2, 5, 7, 6))
    calls = [
        ((query, key, query_group, key_group, 3), {}),
        ((query[:, :, -1:], key, query_group[:, -1:], key_group.int(), 3), {"lse": lse[:, :, -1:], "causal": False}),
        ((HEAD_LAYOUTS["tokens before heads"](query).half(), key.half(), query_group, key_group, 8), {"scale": 0.1}),
        ((query[0].bfloat16(), key[0].mT.contiguous().mT.bfloat16(), query_group[0], key_group[0], 3), {}),
    ]
    return [("attention_mass", *call) for call in calls]


def model(x, y, tokens):
    """Project, sum the attention of the text to the image, use it."""
    query, key = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (x, y))
    query_group, key_group = (torch.arange(t.shape[1], device=t.device).ge(tokens).long() for t in (x, y))
    query_group, key_group = (g.expand(x.shape[0], -1) for g in (query_group, key_group))
    mass, lse = pruneops.attention_mass(query, key, query_group, key_group, 2)
    again = pruneops.attention_mass(query, key, query_group, key_group, 2, lse=lse).mass
    ratios = pruneops.cross_modal_ratio(mass, text=1, vision=0)
    return x * ratios[0][:, None, None], *ratios, pruneops.group_distribution(again, query=1), lse


def model_inputs():
    sizes = (12, 19, 3, 2), (20, 20, 7, 4), (31, 40, 16, 6)
    return [(torch.randn(2, Sq, H * 8), torch.randn(2, Sk, H // 2 * 8), tokens) for Sq, Sk, tokens, H in sizes]


def every_form(query, key, query_group, key_group, lse):
    """Prefill, with lse given, unmasked, decode, unbatched."""
    last = query[:, :, -1:], key, query_group[:, -1:], key_group
    return (
        *pruneops.attention_mass(query, key, query_group, key_group, 3),
        *pruneops.attention_mass(query, key, query_group, key_group, 3, lse=lse),
        *pruneops.attention_mass(*last, 3),
        *pruneops.attention_mass(*last, 3, lse=lse[..., -1:], scale=0.1),
        *pruneops.attention_mass(query[0], key[0], query_group[0], key_group[0], 3, causal=False),
    )


def inputs(seed, shape, dtype=torch.float32):
    """[query, key, query_group, key_group, lse] of a shape (B, H, Hk, Sq, Sk, D)."""
    lse = torch.randn(shape[:2] + shape[3:4], generator=torch.Generator().manual_seed(seed))
    query_group, key_group = random_groups(shape, seed)
    query_group[:, -1] = 0
    return [*real(*shape, seed, dtype), query_group, key_group, lse]


def form_inputs(seed, small=False):
    if small:
        return inputs(seed, (2, 4, 2, 100, 300, 40))
    return inputs(seed, (2, 4, 2, 300, 3000, 64), torch.bfloat16)


def triton_launches():
    from pruneops.triton_kernels import attention_mass as kernels

    for Sq, Sk in ((50, 50), (51, 70), (1000, 3001), (64, 32), (1, 1), (1, 17), (1, 3000)):
        query, key = (torch.ones(3, S, h, 64, dtype=torch.bfloat16) for S, h in ((Sq, 4), (Sk, 2)))
        groups = [torch.zeros(3, S, dtype=torch.int64) for S in (Sq, Sk)]
        for batch in (1, 3):
            args = [*(t[:batch].transpose(1, 2) for t in (query, key)), *(group[:batch] for group in groups), 3]
            for causal in (True, False):
                kernels.attention_mass(*args, causal, 0.1, None)
                kernels.attention_mass(*args, causal, 0.2, torch.ones(3, 4, Sq)[:batch])


# Launches: lists in prefill; sums and their end. Kernels: prefill or decode, with lse and without; causal and not for
# the sums.
LAUNCHES = 2 * 4 * (4 * 3 + 3 * 2), 2 + 8 + 4
