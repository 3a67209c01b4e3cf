"""VTW: no visual tokens in the deeper layers. Costs only the compaction."""

from dataclasses import dataclass
from typing import ClassVar

from ..checks import check
from .base import Method, exact_share, is_int, is_share


@dataclass(frozen=True, kw_only=True)
class VTW(Method):
    """Visual tokens withdrawal: from one decoder layer on, no visual token is left.

    Parameters
    ----------
    layer : int or float
        The first layer (from 0) without them; a float in (0, 1) is a share of the decoder's layers, rounded down. The
        default is layer 15 of 32.

    Notes
    -----
    Source: arXiv:2405.05803.
    """

    name: ClassVar[str] = "vtw"

    layer: int | float = 15 / 32

    def __post_init__(self) -> None:
        fits = is_share(self.layer) or (is_int(self.layer) and self.layer >= 0)
        self._check_setting("layer", fits, "an int of at least 0 or a float in (0, 1)")

    def budget(self, tokens: int) -> int:
        """0: from that layer on no token of an image is left."""
        check(is_int(tokens) and tokens >= 0, self._label, "tokens", repr(tokens), "an int of at least 0")
        return 0

    def _layers(self, count: int) -> tuple[int, ...]:
        layer = vtw_layer(count, self.layer)
        check(layer < count, self._label, "layer", layer, f"one of the decoder's layers, 0 to {count - 1}")
        return (layer,)

    def _at_layer(self, row):
        return row.visual[:0]


def vtw_layer(count: int, layer: int | float = 15 / 32) -> int:
    """The first layer without visual tokens.

    Parameters
    ----------
    count : int
        Layers of the decoder.
    layer : int or float
        A float is a share of the layers, rounded down.

    Returns
    -------
    int
        From 0.

    Notes
    -----
    Source: arXiv:2405.05803.
    """
    return layer if is_int(layer) else int(exact_share(layer, count))
