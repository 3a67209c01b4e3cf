"""What the trials of several operators draw: sizes, tokens, masks, places in memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Tokens that are no vector of ordinary numbers: (value, how many features hold it; None = all, the rest 0).
SPECIAL = (
    (torch.nan, None), (torch.nan, 1), (torch.inf, 1), (-torch.inf, None),
    (3e38, 1), (1e-30, None), (0.0, None),  # squares that float32 cannot hold, nothing
)  # fmt: skip


class Call(NamedTuple):
    """Arguments of a call by name, and whether its arithmetic is exact in float32, so that one answer is right."""

    arguments: dict[str, Any]
    exact: bool = True


class Soak(NamedTuple):
    """How an operator is drawn and judged.

    Attributes
    ----------
    draw : callable (Random) -> Call
        CPU tensors.
    verify : callable (Call, results, reference_results) -> None or str
        What is wrong. Results are lists of CPU tensors; those of an operator that works in place are what it
        wrote to.
    writes : str, optional
        The argument that the operator writes to.
    """

    draw: Callable
    verify: Callable
    writes: str | None = None


class Random:
    """All that a trial draws, from one seed; small sizes under Triton's interpreter, now and then large ones else."""

    def __init__(self, seed, interpreted=False):
        self.generator = torch.Generator().manual_seed(seed)
        self.interpreted = interpreted
        self.large = self.chance(0.04) and not interpreted

    def between(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def of(self, *options):
        return options[self.between(0, len(options) - 1)]

    def chance(self, probability):
        return float(torch.rand((), generator=self.generator)) < probability

    def rand(self, *shape):
        return torch.rand(shape, generator=self.generator)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def integers(self, low, high, shape):
        """int64 in [low, high)."""
        return torch.randint(low, max(high, low + 1), tuple(shape), generator=self.generator)

    def size(self, usual, large, interpreted):
        """At least 1, mostly small; one in four is next to a power of two, where tiles end."""
        most = interpreted if self.interpreted else large if self.large else usual
        if self.large:
            return self.between(most // 2, most)
        size = int((most + 1) ** float(self.rand()))
        return min(max(1, 2 ** size.bit_length() + self.between(-1, 1)), most) if self.chance(0.25) else size

    def batch(self):
        """Shape in front of the tokens."""
        return self.of((), (), (0,), (1,), (2,), (3,))

    def tokens(self, shape, exact, integers=False):
        """[.., N, D] of any dtype and layout, many tokens equal, some of them special; scaled by a power of two."""
        *rows, N, D = shape
        if exact and integers:
            x = self.integers(-3, 4, shape).float()
        elif exact:  # 4^j entries +-1, the rest 0: norms and cosines are exact
            ones = self.rand(*shape).argsort(-1) < 4 ** ((D.bit_length() - 1) // 2)
            x = (self.integers(0, 2, shape) * 2.0 - 1) * ones * torch.exp2(self.integers(-5, 6, (*rows, N, 1)))
        else:  # clusters, lengths over two orders of magnitude
            x = self.randn(*rows, 7, D)[..., self.integers(0, 7, (N,)), :] + 0.3 * self.randn(*shape)
            x = x * torch.exp(1.5 * self.randn(*rows, N, 1))
        if self.chance(0.5):
            x = x[..., torch.where(self.rand(N) < 0.5, self.integers(0, N, (N,)), torch.arange(N)), :]
        x = (x * 2.0 ** self.of(0, 0, 0, self.between(-40, 40))).to(self.of(*DTYPES))
        for value, count in SPECIAL if self.chance(0.4) else ():
            token = x.new_zeros(D)
            token[:count] = torch.tensor(value).to(x.dtype)
            x[self.rand(*rows, N) < self.of(0, 0, 0.05, 0.2)] = token
        return self.laid_out(x)

    def distinct(self, shape, count):
        """int64 [.., count] different tokens of [.., N]."""
        return self.rand(*shape).argsort(-1)[..., :count]

    def bounds(self, lengths):
        """cu_seqlens of sequences of these lengths."""
        return self.laid_out(torch.tensor([0, *lengths]).cumsum(0).to(self.of(torch.int32, torch.int64)), own=True)

    def laid_out(self, tensor, own=False):
        """The tensor in some layout; `own`: every element keeps a memory of its own, and so its value."""
        return self.of(*LAYOUTS, *([] if own else [_expanded]))(tensor)


def rows_of(call, results, names):
    """The tensors of each batch entry: of the arguments named, the first of which is of rank 2 or 3, then results."""
    tensors = [*(call.arguments.get(name) for name in names), *results]
    if tensors[0].dim() == 2:
        return [tensors]
    return [[None if t is None else t[b] for t in tensors] for b in range(len(tensors[0]))]


def memory(tensor):
    """All bytes of the storage that a tensor is part of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def copied(value, device, copies=None):
    """Arguments with their tensors in the same places of other storages, those of one storage in one."""
    copies = {} if copies is None else copies
    if isinstance(value, dict):
        return {name: copied(own, device, copies) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [copied(own, device, copies) for own in value]
    if not isinstance(value, torch.Tensor):
        return value
    key = value.untyped_storage()._cdata
    if key not in copies:
        copies[key] = memory(value).to(device, copy=True).untyped_storage()
    own = torch.empty(0, dtype=value.dtype, device=device)
    return own.set_(copies[key], value.storage_offset(), value.shape, value.stride())


def among_others(tensor, step, margin=3):
    """The tensor inside a larger one of NaN or greatest integers, its entries `step` apart in each dimension."""
    poison = torch.nan if tensor.is_floating_point() or tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
    big = torch.full([margin + s * size for s, size in zip(step, tensor.shape)], poison, dtype=tensor.dtype)
    return big[tuple(slice(margin, None, s) for s in step)].copy_(tensor)


def _expanded(tensor):
    return tensor[:1].expand(tensor.shape)


LAYOUTS = (
    lambda t: t.contiguous(),
    lambda t: t.contiguous(),
    lambda t: among_others(t.flatten(), [1]).view(t.shape),  # at an odd address
    lambda t: among_others(t, [2] * (t.dim() - 1) + [1]),
    lambda t: among_others(t, [1] * (t.dim() - 1) + [2]),  # features apart
    lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
)
