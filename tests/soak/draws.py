"""Random inputs of several operators: sizes, tokens, masks, memory layouts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tests import inputs
from tests.inputs import DTYPES, LAYOUTS, SPECIAL


class Call(NamedTuple):
    """Arguments of a call by name, and whether its arithmetic is exact in float32, so that one answer is right."""

    arguments: dict[str, Any]
    exact: bool = True


class Soak(NamedTuple):
    """How calls of an operator are drawn and checked.

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
    """A trial's random choices, from one seed; small sizes under Triton's interpreter, a few large ones otherwise."""

    def __init__(self, seed, interpreted=False, large=True):
        self.generator = torch.Generator().manual_seed(seed)
        self.interpreted = interpreted
        self.large = self.chance(0.04) and large and not interpreted

    def between(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, *options):
        return options[self.between(0, len(options) - 1)]

    def chance(self, probability):
        return float(torch.rand((), generator=self.generator)) < probability

    def seed(self):
        return self.between(0, 2**31)

    def rand(self, *shape):
        return torch.rand(shape, generator=self.generator)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def integers(self, low, high, shape):
        """int64 in [low, high)."""
        return torch.randint(low, max(high, low + 1), tuple(shape), generator=self.generator)

    def size(self, usual, large, interpreted):
        """At least 1, mostly small; one in four is next to a power of two, where tiles end."""
        limit = interpreted if self.interpreted else large if self.large else usual
        if self.large:
            return self.between(limit // 2, limit)
        size = int((limit + 1) ** float(self.rand()))
        return min(max(1, 2 ** size.bit_length() + self.between(-1, 1)), limit) if self.chance(0.25) else size

    def batch(self):
        """Shape in front of the tokens."""
        return self.choice((), (), (0,), (1,), (2,), (3,))

    def tokens(self, shape, exact, integers=False):
        """[.., N, D] of any dtype and layout, many tokens equal, some of them special; scaled by a power of two."""
        if exact:
            x = (inputs.small_integers if integers else inputs.signs)(shape, self.generator)
        else:
            x = inputs.clustered(shape, self.seed())
        if self.chance(0.5):
            x = inputs.with_copies(x, self.generator)
        x = (x * 2.0 ** self.choice(0, 0, 0, self.between(-40, 40))).to(self.choice(*DTYPES))
        for name in SPECIAL if self.chance(0.4) else ():
            x[self.rand(*shape[:-1]) < self.choice(0, 0, 0.05, 0.2)] = inputs.special_token(name, x)
        return self.laid_out(x)

    def distinct(self, shape, count):
        """int64 [.., count] different tokens of [.., N]."""
        return self.rand(*shape).argsort(-1)[..., :count]

    def bounds(self, lengths):
        """cu_seqlens of sequences of these lengths."""
        return self.laid_out(torch.tensor([0, *lengths]).cumsum(0).to(self.choice(torch.int32, torch.int64)), own=True)

    def laid_out(self, tensor, own=False):
        """The tensor in some layout; `own`: every element has its own memory, and so keeps its value."""
        names = [name for name in LAYOUTS if not own or name != "expanded"]
        return LAYOUTS[self.choice(*names)](tensor)


def rows_of(call, results, names):
    """The tensors of each batch entry: of the arguments named, the first of which is of rank 2 or 3, then results."""
    tensors = [*(call.arguments.get(name) for name in names), *results]
    if tensors[0].dim() == 2:
        return [tensors]
    return [[None if t is None else t[b] for t in tensors] for b in range(len(tensors[0]))]
