"""Calls of `gather_tokens`."""

import functools

import torch

import pruneops
from tests.inputs import model_state
from tests.invalid_calls import InvalidCall, TypeErrorCall, ints

from ._small import as_bytes, as_reference, laid_out, name_of


def small_calls():
    """One list of tokens and one a row, shared by rows, widths and addresses of all kinds."""
    generator = torch.Generator().manual_seed(8)
    half, full, byte, long = torch.bfloat16, torch.float32, torch.uint8, torch.int64
    for rows, S, K, layouts in (
        (None, 1, 1, [((1,), 0, full, "plain")]),
        (
            None,
            130,
            60,
            [((130, 64), 0, half, "plain"), ((3, 130, 5), 1, byte, "odd address"), ((130,), 0, long, "plain")],
        ),
        (
            2,
            97,
            150,
            [((2, 97, 33), 1, half, "odd address"), ((3, 1, 97), 2, long, "plain"), ((2, 97), 1, byte, "plain")],
        ),
        (
            3,
            300,
            40,
            [
                ((3, 300, 520), 1, half, "plain"),
                ((1, 300, 16), 1, full, "strided"),
                ((2, 3, 300, 2, 7), 2, full, "plain"),
            ],
        ),
        (
            1,
            700,
            70,
            [((1, 700, 2048), 1, half, "plain"), ((4, 1, 700), 2, long, "plain"), ((1, 700), 1, byte, "plain")],
        ),
    ):
        tensors = [laid_out(how, shape, dtype, generator) for shape, _, dtype, how in layouts]
        dims = [dim for _, dim, _, _ in layouts]
        keep = torch.randint(S, (K,) if rows is None else (rows, K), generator=generator)

        def run(to, tensors=tensors, keep=keep, dims=dims):
            return as_bytes(pruneops.gather_tokens([tensor(to)[1] for tensor in tensors], keep.to(to), dims))

        kinds = ", ".join(f"{list(shape)} {name_of(dtype)} {how}" for shape, _, dtype, how in layouts)
        yield f"keep {list(keep.shape)}: {kinds}", as_reference(run)


HIDDEN, KEEP = torch.ones(2, 5, 3), ints([0, 2], [4, 4])
VALID = {"tensors": [HIDDEN], "keep": KEEP}
invalid, wrong_type = (functools.partial(kind, "gather_tokens", VALID) for kind in (InvalidCall, TypeErrorCall))
INVALID = [
    invalid(ValueError, "tensors", "an empty list", "at least one tensor", tensors=[]),
    invalid(TypeError, "keep", "torch.int32", "int64", keep=KEEP.int()),
    invalid(ValueError, "keep", "of shape [1, 2, 2]", "[K] or [B, K]", keep=KEEP[None]),
    invalid(ValueError, "dim", "2 of them", "one, or one for each of 1 tensors", dim=[1, 1]),
    invalid(ValueError, "dim", "0 for tensors[0] of shape [2, 5, 3]", "1 (the batch stands before it) to 2", dim=0),
    invalid(ValueError, "dim", "3 for tensors[0] of shape [2, 5, 3]", "1 (the batch stands before it) to 2", dim=3),
    invalid(ValueError, "dim", "-1 for tensors[0] of shape [2, 5, 3]", "0 to 2", dim=-4, keep=ints(0, 1)),
    invalid(
        ValueError, "tensors[0]", "of shape [3, 5, 3]", "with 2 rows, as keep, or 1, in dimension 0",
        tensors=[torch.ones(3, 5, 3)],
    ),
    invalid(ValueError, "keep", "5 at one place", "in [0, 5)", values=True, keep=ints([0, 2], [5, 4])),
    invalid(ValueError, "keep", "-1 at one place", "in [0, 5)", values=True, keep=ints([0, -1], [4, 4])),
]  # fmt: skip
TYPE_ERRORS = [
    wrong_type("tensors must be list or tuple, got Tensor", tensors=HIDDEN),
    wrong_type("keep must be Tensor, got list", keep=[0]),
    wrong_type("dim must be int or list or tuple, got float", dim=1.0),
    wrong_type("dim[0] must be int or SymInt, got NoneType", dim=[None]),
]


def samples():
    """Batched, of one row, with a gradient, with mRoPE positions."""
    keep, hidden, positions = torch.tensor([[0, 2, 5], [1, 2, 2]]), torch.randn(2, 6, 4), torch.arange(12).view(2, 6)
    return [
        ("gather_tokens", ([hidden, positions], keep, 1), {}),
        ("gather_tokens", ([hidden[0], positions[0]], keep[0], 0), {}),
        ("gather_tokens", ([hidden.clone().requires_grad_(), positions], keep, 1), {}),
        ("gather_tokens", ([hidden, torch.arange(6).expand(3, 1, 6)], keep, [1, 2]), {}),
    ]


def model(hidden, positions, keep):
    hidden, positions = pruneops.gather_tokens([hidden, positions], keep, dim=[1, 2])
    return hidden * 2, positions + 1


def model_inputs():
    """The last with a gradient."""
    return [
        (
            torch.randn(B, S, D, requires_grad=gradient),
            torch.arange(S).expand(3, B, S),
            torch.arange(K).expand(B, -1) * 2,
        )
        for B, S, D, K, gradient in ((2, 12, 8, 5, False), (3, 20, 4, 7, False), (2, 14, 6, 6, True))
    ]


def every_form(keep, *tensors):
    return pruneops.gather_tokens(list(tensors), keep, dim=[1, 2, 1, 1, 1])


def form_inputs(seed, small=False):
    S, D, K = (300, 64, 50) if small else (2000, 512, 500)
    keep = torch.randint(0, S, (2, K), generator=torch.Generator().manual_seed(seed))
    return [keep, *(tensor.clone() for tensor in model_state(2, S, D, seed=seed)[0])]


def triton_launches():
    from pruneops.triton_kernels import gather_tokens as kernels

    for B in (1, 2):
        for S in (40, 300):
            tensors, dims = model_state(B, S, 256)
            for K in (3, 32):
                kernels.gather_tokens(tensors, torch.arange(K).expand(B, -1), dims)


# Launches for hidden states, positions, mask, cos and sin; kernels of 16 bytes at a time in slices of two widths, 8, 1.
LAUNCHES = 2 * 2 * 2 * 4, 4
