"""VTW: no visual tokens in the deeper layers. Costs nothing but the compaction."""

from dataclasses import dataclass
from typing import ClassVar

from ..checks import check
from ._base import Method, is_int, is_share, part_of


@dataclass(frozen=True, kw_only=True)
class VTW(Method):
    """Visual tokens withdrawal: from one decoder layer on, no visual token is left.

    Parameters
    ----------
    layer : int or float
        The first layer (from 0) without them; a float in (0, 1) is a part of the decoder, rounded down. The default
        is layer 15 of 32.

    Notes
    -----
    Source: arXiv:2405.05803.
    """

    name: ClassVar[str] = "vtw"

    layer: int | float = 15 / 32

    def __post_init__(self):
        fits = is_share(self.layer) or (is_int(self.layer) and self.layer >= 0)
        self._check_setting("layer", fits, "an int of at least 0 or a float in (0, 1)")

    def budget(self, tokens):
        """0: what is left of an image from that layer on."""
        check(is_int(tokens) and tokens >= 0, self._who, "tokens", repr(tokens), "an int of at least 0")
        return 0

    def _layers(self, count):
        layer = vtw_layer(count, self.layer)
        check(layer < count, self._who, "layer", layer, f"one of the decoder's layers, 0 to {count - 1}")
        return (layer,)

    def _at_layer(self, row):
        return row.visual[:0]


def vtw_layer(count, layer=15 / 32):
    """The first layer without visual tokens of a decoder of `count` layers; a float is a part of them, rounded down."""
    return layer if is_int(layer) else int(part_of(layer, count))
