"""Calls of `attention_received`."""

import functools

import torch

import pruneops
from tests.inputs import HEAD_LAYOUTS, random_groups, real
from tests.invalid_calls import InvalidCall, TypeErrorCall, bools

from . import _attention
from ._small import TOLERANCE, as_reference, name_of


def small_calls():
    """One marked row, some, all; keys masked or not, lse given or not, odd widths and strides."""
    generator = torch.Generator().manual_seed(6)
    for B, H, Hk, Sq, Sk, D, dtype, causal, share, given in (
        (1, 1, 1, 1, 1, 1, torch.float32, True, None, False),
        (2, 4, 2, 150, 150, 64, torch.float32, True, 0.4, False),
        (1, 4, 4, 130, 301, 128, torch.bfloat16, False, None, False),
        (2, 3, 1, 97, 97, 33, torch.float16, True, 0.9, True),
        (1, 4, 4, 257, 257, 64, torch.bfloat16, False, 0.01, False),
        (2, 8, 2, 1, 3001, 128, torch.bfloat16, True, None, False),
        (1, 2, 2, 1, 1025, 72, torch.float16, True, 1.0, True),
    ):
        query = torch.randn(B, Sq, H, D + 1, generator=generator).to(dtype)
        key = torch.randn(B, Hk, Sk, D, generator=generator).to(dtype)
        masks = (None, None)
        if share:
            masks = (torch.rand(B, S, generator=generator) < part for S, part in ((Sq, share), (Sk, 0.8)))
        lse = torch.rand(B, H, Sq, generator=generator) + 7 if given else None

        def run(to, own=(query, key, *masks, lse), causal=causal):
            query, key, query_mask, key_mask, lse = (t if t is None else t.to(to) for t in own)
            options = {"query_mask": query_mask, "key_mask": key_mask, "causal": causal, "lse": lse}
            return pruneops.attention_received(query[..., 1:].transpose(1, 2), key, **options)

        label = f"B {B} H {H}/{Hk} S {Sq}/{Sk} D {D} {name_of(dtype)}"
        label += f"{' causal' if causal else ''}{f' masks {share:g}' if share else ''}{' lse' if given else ''}"
        yield label, as_reference(run, max(Sq, 10) * TOLERANCE)


QUERY_MASK, KEY_MASK = bools(2, 5), bools(2, 6)
VALID = {"query": _attention.QUERY, "key": _attention.KEY}
invalid, wrong_type = (functools.partial(kind, "attention_received", VALID) for kind in (InvalidCall, TypeErrorCall))
INVALID = [
    *_attention.invalid_calls("attention_received", VALID),
    invalid(TypeError, "query_mask", "torch.int64", "bool", query_mask=QUERY_MASK.long()),
    invalid(TypeError, "key_mask", "torch.uint8", "bool", key_mask=KEY_MASK.byte()),
    invalid(ValueError, "query_mask", "of shape [2, 6]", "of shape [2, 5]", query_mask=KEY_MASK),
    invalid(ValueError, "query_mask", "of shape [5]", "of shape [2, 5]", query_mask=QUERY_MASK[0]),
    invalid(ValueError, "key_mask", "of shape [2, 5]", "of shape [2, 6]", key_mask=QUERY_MASK),
    invalid(ValueError, "key_mask", "of shape [2, 4, 6]", "of shape [2, 6]", key_mask=bools(2, 4, 6)),
    invalid(ValueError, "query_mask", "on meta", "on the device of query, cpu", query_mask=QUERY_MASK.to("meta")),
]
TYPE_ERRORS = [
    *_attention.type_errors("attention_received", VALID),
    wrong_type("query_mask must be Tensor or NoneType, got list", query_mask=[True]),
    wrong_type("key_mask must be Tensor or NoneType, got int", key_mask=1),
]


def samples():
    query, key, query_mask, key_mask, lse = inputs(0, (2, 4, 2, 5, 7, 6))
    calls = [
        ((query, key), {}),
        ((query, key), {"query_mask": query_mask, "key_mask": key_mask, "lse": lse, "causal": False}),
        (
            (HEAD_LAYOUTS["tokens before heads"](query).half(), key.half()),
            {"scale": 0.1, "query_mask": query_mask},
        ),
        ((query[0].bfloat16(), key[0].mT.contiguous().mT.bfloat16()), {"key_mask": key_mask[0]}),
    ]
    return [("attention_received", *call) for call in calls]


def model(x, y, k):
    """FastV's choice of the keys that the last query attends to most."""
    query, key = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (x, y))
    last = torch.arange(x.shape[1], device=x.device).eq(x.shape[1] - 1).expand(x.shape[0], -1)
    received = pruneops.attention_received(query, key, query_mask=last, key_mask=y[..., 0] > -1)
    kept = received.mean(1).topk(k).indices.sort().values
    return y.gather(1, kept[..., None].expand(-1, -1, y.shape[2])) * 2, received


def model_inputs():
    sizes = (12, 19, 3, 2), (20, 20, 7, 4), (31, 40, 16, 6)
    return [(torch.randn(2, Sq, H * 8), torch.randn(2, Sk, H // 2 * 8), k) for Sq, Sk, k, H in sizes]


def every_form(query, key, query_mask, key_mask, lse):
    """All rows and some, with lse given, unmasked, decode, unbatched."""
    masks = {"query_mask": query_mask, "key_mask": key_mask}
    return (
        pruneops.attention_received(query, key),
        pruneops.attention_received(query, key, **masks),
        pruneops.attention_received(query, key, **masks, lse=lse),
        pruneops.attention_received(query[:, :, -1:], key, key_mask=key_mask),
        pruneops.attention_received(query[0], key[0], query_mask=query_mask[0], causal=False, scale=0.1),
    )


def inputs(seed, shape, dtype=torch.float32):
    """[query, key, query_mask, key_mask, lse] of a shape (B, H, Hk, Sq, Sk, D)."""
    lse = torch.randn(shape[:2] + shape[3:4], generator=torch.Generator().manual_seed(seed))
    query_mask, key_mask = (group >= 0 for group in random_groups(shape, seed))
    query_mask[:, -1] = True
    return [*real(*shape, seed, dtype), query_mask, key_mask, lse]


def form_inputs(seed, small=False):
    if small:
        return inputs(seed, (2, 4, 2, 100, 300, 40))
    return inputs(seed, (2, 4, 2, 300, 3000, 64), torch.bfloat16)


def triton_launches():
    from pruneops.triton_kernels import attention_received as kernels

    for Sq, Sk in ((50, 50), (51, 70), (1000, 3001), (64, 32), (1, 1), (1, 17), (1, 3000)):
        query, key = (torch.ones(3, S, h, 64, dtype=torch.bfloat16) for S, h in ((Sq, 4), (Sk, 2)))
        query_mask, key_mask = (bools(3, S) for S in (Sq, Sk))
        for batch in (1, 3):
            args = [t[:batch].transpose(1, 2) for t in (query, key)]
            for masks in ((None, None), (query_mask[:batch], key_mask[:batch])):
                kernels.attention_received(*args, *masks, Sq > 1, 0.1, None)
                kernels.attention_received(*args, *masks, Sq > 1, 0.2, torch.ones(3, 4, Sq)[:batch])


# Launches: lists in prefill; sums and the answer without lse, the answer with it. Kernels: with masks and without, in
# prefill and in decode.
LAUNCHES = 2 * 2 * (4 * (3 + 2) + 3 * (2 + 1)), 2 * (4 + 3)
