"""Attention that every key receives from marked queries: cases, inputs, cost model, check of a result, peers.

Least cost of a case: the marked queries and the keys read once, a number a head and key written once; a dot product,
2 D operations, for every head and pair of a marked query and a key that it sees.
"""

import itertools

import torch

import pruneops

from ..baselines import attention as baselines
from ..common import NAMES, TOLERANCE, as_reference
from ..harness import capture
from ..registry import Check, Operator, Peer
from .attention_mass import (
    TEXT,
    attention_case,
    blocks,
    forward_seconds,
    heads_cost,
    heads_of_tokens,
    live_rows,
    materialised_seconds,
    prepare_forward,
    reference_seconds,
    sampled,
    verdict,
)


def _cases(dtype):
    """FastV's last row, the [CLS] row of a vision tower, SparseVLM's text rows, all rows."""
    for lse in (False, True):
        end = "-lse" if lse else ""
        yield attention_case(f"last-s3072{end}", 32, 32, 3072, 3072, dtype, rows=1, lse=lse)
        yield attention_case(f"cls-s577{end}", 16, 16, 577, 577, dtype, D=64, rows=1, causal=False, lse=lse)
        yield attention_case(f"text-s3072{end}", 32, 32, 3072, 3072, dtype, rows=TEXT, lse=lse)
        yield attention_case(f"all-s1088{end}", 32, 32, 1088, 1088, dtype, lse=lse)


CASES = (
    attention_case("last-s130", 4, 2, 130, 130, torch.float32, D=32, rows=1),
    attention_case("all-s130-lse", 4, 2, 130, 130, torch.float32, D=32, lse=True),
    *itertools.chain.from_iterable(map(_cases, NAMES)),
)
TINY = tuple(case.name for case in CASES[:2])
SETS = {
    "cpu": {
        "tiny": TINY,
        "quick": (
            "last-s3072-float32",
            "cls-s577-float32",
            "text-s3072-float32",
            "text-s3072-lse-float32",
            "all-s1088-float32",
        ),
        "full": tuple(case.name for case in CASES if case.dtype == torch.float32),
    },
    "cuda": {
        "tiny": TINY,
        "quick": ("last-s3072-bfloat16", "text-s3072-lse-bfloat16"),
        "goals": ("last-s3072-bfloat16", "cls-s577-bfloat16", "text-s3072-bfloat16", "text-s3072-lse-bfloat16"),
        "full": tuple(case.name for case in CASES),
    },
}


def arguments(case, device):
    """A mask of the queries only where some are not marked."""
    options, marked = heads_of_tokens(case, device)
    return options if case.sizes["rows"] == case.sizes["Sq"] else options | {"query_mask": marked}


def call(arguments):
    """The documented Python face."""
    return pruneops.attention_received(**arguments)


def check(case, arguments, result, expected, precision):
    """Sampled heads within tolerance of float64 beside the most that a key receives; sums of all heads."""
    if result is None:
        return Check(True, "a yardstick")
    sizes = case.sizes
    if result.shape != (sizes["B"], sizes["H"], sizes["Sk"]):
        return Check(False, f"WRONG: of shape {list(result.shape)}")
    errors = [(result.double().sum(-1) / sizes["rows"] - 1).flatten()]
    for b, h in sampled(sizes):
        truth = sum(logits.softmax(-1).sum(0) for _, logits in blocks(case, arguments, b, h))
        errors.append((result[b, h] - truth) / truth.amax())
    return verdict(errors, 2 * TOLERANCE[precision])  # beside one probability, a rounded logit weighs in full


def cost(case):
    return heads_cost(case, case.sizes["Sk"])


def _prepare_column_sum(case, arguments):
    rows = live_rows(case, arguments)
    return lambda: baselines.column_sum(*rows)


def _prepare_graph(case, arguments):
    return capture(_prepare_column_sum(case, arguments))


def sanitize(device):
    """Small shapes: one marked row, some, all; keys masked or not, lse given or not, odd widths and strides."""
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

        words = f"B {B} H {H}/{Hk} S {Sq}/{Sk} D {D} {str(dtype).removeprefix('torch.')}"
        words += f"{' causal' if causal else ''}{f' masks {share:g}' if share else ''}{' lse' if given else ''}"
        yield words, as_reference(run, device, max(Sq, 10) * TOLERANCE[torch.float32])


OPERATOR = Operator(
    name="attention_received",
    cases=CASES,
    sets=SETS,
    arguments=arguments,
    call=call,
    check=check,
    cost=cost,
    reference_seconds=reference_seconds,
    peers={
        "materialised": Peer(_prepare_column_sum, materialised_seconds),
        "graph": Peer(_prepare_graph, materialised_seconds, devices=("cuda",)),
        "sdpa forward": Peer(prepare_forward, forward_seconds),
    },
    sanitize=sanitize,
)
