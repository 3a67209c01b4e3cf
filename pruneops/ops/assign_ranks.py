"""Conflict-free rank assignment: schema, argument checks, fake kernel, backends."""

import torch
from torch import Tensor

from .. import reference
from ..checks import INT, check, check_float_tensor, check_types
from ._library import define, last_dim_contiguous

MAX_RANKS = 64


def assign_ranks(logits: Tensor, j: int) -> Tensor:
    """A ranked list of tokens from per-token rank logits, each token at most once.

    Rank p = 0 .. j-1 takes the token of greatest probability in column p that no earlier rank
    took. Every prefix of the result is the result for a smaller j.

    Parameters
    ----------
    logits : Tensor [B, N, J + 1] or [N, J + 1], float32, float16 or bfloat16
        Any strides. A token's distribution is the softmax over its J + 1 classes: the ranks
        0 .. J-1, then "not ranked". J is at most 64.
    j : int
        Ranks to assign, 1 <= j <= min(J, N).

    Returns
    -------
    Tensor [B, j] or [j], int64
        The token of each rank. Probabilities are compared by their logarithms, in float32. Ties go to
        the lowest index; tokens whose logarithm is not finite (a NaN or inf among the logits, a
        logit of -inf in the column) come last, in index order.

    Raises
    ------
    ValueError
        On bad shapes and a bad j, before anything is launched.
    TypeError
        On arguments of a wrong type or dtype.

    Notes
    -----
    Not differentiable.

    Source: DTR (data-driven token ranking), the run-time filter on its ranking model's logits.

    Examples
    --------
    >>> import torch, pruneops
    >>> logits = torch.tensor([[5.0, 4.0, 0.0], [3.0, 3.0, 0.0], [0.0, 0.0, 9.0]])
    >>> pruneops.assign_ranks(logits, 2)
    tensor([0, 1])
    """
    check_types("assign_ranks", logits=(logits, Tensor), j=(j, INT))
    return torch.ops.pruneops.assign_ranks(logits, j)


def _check(logits, j):
    op = "assign_ranks"
    check_float_tensor(op, "logits", logits, ranks=(2, 3), last="class")
    ranks, tokens = logits.shape[-1] - 1, logits.shape[-2]
    check(ranks <= MAX_RANKS, op, "logits", f"{ranks + 1} classes wide", f"at most {MAX_RANKS + 1} classes wide")
    check(j >= 1, op, "j", j, "at least 1")
    check(j <= ranks, op, "j", j, f"at most the {ranks} ranks of logits (the last class is 'not ranked')")
    check(j <= tokens, op, "j", j, f"at most the {tokens} tokens of logits")


def _fake(logits, j):
    return logits.new_empty((*logits.shape[:-2], j), dtype=torch.int64)


def _batched(run):
    def call(logits, j):
        logits = last_dim_contiguous(logits)
        return run(logits, j) if logits.dim() == 3 else run(logits[None], j)[0]

    return call


def _native(logits, j):
    return torch.ops.pruneops_native.assign_ranks(logits, j)


def _triton(logits, j):
    from ..triton_kernels import assign_ranks as kernels

    return kernels.assign_ranks(logits, j)


define(
    "assign_ranks(Tensor logits, int j) -> Tensor",
    _check,
    _fake,
    {
        "reference": reference.assign_ranks,
        "cpu": _batched(_native),
        "triton": _batched(_triton),
        "cuda": _batched(_native),
    },
)
