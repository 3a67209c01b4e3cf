"""Calls of `assign_ranks`."""

import functools

import torch

import pruneops
from tests.inputs import LAYOUTS, logits
from tests.invalid_calls import DTYPE_NAMES, InvalidCall, TypeErrorCall

from ._small import as_reference, name_of


def small_calls():
    """One token, all tokens ranked, odd widths and strides, half precision, ties, NaN.

    A token's logits are multiples of 32, all different: its softmax's denominator is the largest term alone, so that
    logarithms are exact and ties are ties on every backend.
    """
    generator = torch.Generator().manual_seed(4)
    for B, N, J, j, dtype in (
        (1, 1, 1, 1, torch.float32),
        (2, 31, 31, 31, torch.float32),
        (3, 577, 32, 32, torch.bfloat16),
        (1, 2880, 64, 64, torch.float16),
        (1, 65536, 64, 3, torch.float32),
    ):
        order = torch.rand(B, N, J + 1, generator=generator).argsort(-1)
        wide = 32 * torch.cat([order, order[..., :2]], -1).to(dtype)
        wide[:, N // 2 + 1 :: 7] = torch.nan

        def run(to, wide=wide, J=J, j=j):
            return pruneops.assign_ranks(wide.to(to)[..., 1 : J + 2], j)

        yield f"B {B} N {N} J {J} j {j} {name_of(dtype)}", as_reference(run)


LOGITS = torch.ones(2, 6, 4)
VALID = {"logits": LOGITS, "j": 3}
RANKS = "ranks of logits (the last class is 'not ranked')"
invalid, wrong_type = (functools.partial(kind, "assign_ranks", VALID) for kind in (InvalidCall, TypeErrorCall))
INVALID = [
    invalid(ValueError, "logits", "of shape [4]", "of rank 2 or 3", logits=LOGITS[0, 0]),
    invalid(ValueError, "logits", "of shape [1, 2, 6, 4]", "of rank 2 or 3", logits=LOGITS[None]),
    invalid(ValueError, "logits", "of shape [2, 6, 0]", "at least one class wide", logits=LOGITS[..., :0]),
    invalid(TypeError, "logits", "torch.int64", DTYPE_NAMES, logits=LOGITS.long()),
    invalid(TypeError, "logits", "torch.float64", DTYPE_NAMES, logits=LOGITS.double()),
    invalid(ValueError, "logits", "66 classes wide", "at most 65 classes wide", logits=torch.ones(6, 66)),
    invalid(ValueError, "j", "0", "at least 1", j=0),
    invalid(ValueError, "j", "-1", "at least 1", j=-1),
    invalid(ValueError, "j", "4", f"at most the 3 {RANKS}", j=4),
    invalid(ValueError, "j", "3", "at most the 2 tokens of logits", logits=LOGITS[:, :2]),
    invalid(ValueError, "j", "1", f"at most the 0 {RANKS}", logits=LOGITS[..., :1], j=1),
    invalid(ValueError, "j", "1", "at most the 0 tokens of logits", logits=LOGITS[:, :0], j=1),
]
TYPE_ERRORS = [
    wrong_type("logits must be Tensor, got list", logits=[[1.0]]),
    wrong_type("j must be int or SymInt, got float", j=2.0),
    wrong_type("j must be int or SymInt, got NoneType", j=None),
]


def samples():
    x = logits((2, 9, 5))
    return [("assign_ranks", (own, 3), {}) for own in (x, x[0], x.half(), LAYOUTS["transposed"](x))]


def model(x, weight, j):
    """Rank tokens, gather the best."""
    kept = pruneops.assign_ranks(x @ weight, j)
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) * 2, kept


def model_inputs():
    sizes = (12, 8, 5, 3), (20, 5, 9, 8), (31, 16, 7, 2)
    return [(torch.randn(2, N, D), torch.randn(D, C), j) for N, D, C, j in sizes]


def every_form(logits):
    return pruneops.assign_ranks(logits, 32), pruneops.assign_ranks(logits[0], 32), pruneops.assign_ranks(logits, 7)


def form_inputs(seed, small=False):
    return [logits((3, 400 if small else 9000, 33), seed, torch.bfloat16)]


def triton_launches():
    from pruneops.triton_kernels import assign_ranks as kernels

    for tokens in (50, 64, 1025):
        for classes in (2, 3, 16, 17, 32, 48, 65):
            x = torch.ones(2, tokens, classes)
            for j in (1, min(tokens, classes - 1)):
                kernels.assign_ranks(x, j)
                kernels.assign_ranks(x.bfloat16(), j)
            for own in (x[:1], x[:, ::2], x[:1].expand(5, -1, -1)):
                kernels.assign_ranks(own, 1)


LAUNCHES = 3 * 7 * (2 + 5), 4 * 2  # widths of the tile, dtypes
