"""DART: a few pivot tokens, and the tokens that duplicate them least.

Runs once in prefill. One pass over the hidden states of an image (`pruneops.pivot_bottomk`); norms of the keys take
one pass over those.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..autocast import without_autocast
from ..checks import check
from ..ops import pivot_bottomk
from ._base import Budgeted, check_features, is_int, part_of

COMPAT = ("paper", "official")
MOST_PIVOTS = 64


@dataclass(frozen=True, kw_only=True)
class DART(Budgeted):
    """DART before a decoder layer.

    Parameters
    ----------
    keep : float or int
        Of every image.
    layer : int
        K, at least 1: prunes the input of layer K (from 0), with the keys of layer K - 1.
    image_pivots, text_pivots : int
        Tokens of greatest key norm among the image's, which are kept, and among the text after the image, which are
        there in any case. The paper's Table 6: four of each.
    compat : {"paper", "official"}
        "paper": cosines of the hidden states, exactly `budget` tokens an image. "official", as the public code: cosines
        after the decoder's final norm, and each pivot takes keep // pivots tokens (a share rounded down only here, at
        the end) beside the image pivots, which makes 196, 132 and 68 of 192, 128 and 64.

    Notes
    -----
    Source: arXiv:2502.11494, section 3.3; see `dart_select`.
    """

    name: ClassVar[str] = "dart"

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    compat: str = "paper"

    def __post_init__(self):
        super().__post_init__()
        self._check_layer()
        for setting in ("image_pivots", "text_pivots"):
            value = getattr(self, setting)
            self._check_setting(setting, is_int(value) and value >= 0, "an int of at least 0")
        pivots = self.image_pivots + self.text_pivots
        fits = 1 <= pivots <= MOST_PIVOTS
        check(fits, self._who, "image_pivots + text_pivots", pivots, f"1 to {MOST_PIVOTS}")
        self._check_setting("compat", self.compat in COMPAT, f"one of {COMPAT}")

    @property
    def needs(self):
        return frozenset({"key", "norm"} if self.compat == "official" else {"key"})

    def budget(self, tokens):
        """How many of an image's tokens are kept: as in `Budgeted.budget`, and with
        compat="official" the public code's count, at most `tokens`."""
        return dart_budget(self._asked(tokens), tokens, self.image_pivots, self.text_pivots, self.compat)

    def _asked(self, tokens):
        """k of an image; the public code does not round a share before it divides."""
        k = super().budget(tokens)
        return k if is_int(self.keep) or self.compat == "paper" else int(part_of(self.keep, tokens))

    def _layers(self, count):
        return self._one_layer(count)

    def _at_layer(self, row):
        hidden = row.norm(row.hidden) if self.compat == "official" else row.hidden
        norms = torch.linalg.vector_norm(row.key, 1, dim=(0, 2), dtype=torch.float32)  # [S]
        positions = torch.arange(len(norms), device=norms.device)
        text = torch.ones_like(norms, dtype=torch.bool).index_fill(0, row.visual, False)

        def choose(start, end, k, size):
            own = row.visual[start:end]
            after = torch.where(text & (positions > own[-1]), norms, -torch.inf)
            said = _ranked(after, self.text_pivots)
            x = hidden.index_select(0, torch.cat([own, said]))
            return _keep(
                x, norms[own], after[said], self._asked(size), self.image_pivots, self.text_pivots, self.compat
            )

        return self._per_image(row, choose)


def dart_budget(k, tokens, image_pivots=4, text_pivots=4, compat="paper"):
    """How many of `tokens` DART keeps when asked for k.

    Exactly k after the paper, image_pivots + pivots * (k // pivots) after the public code, both at most `tokens`.
    """
    if compat == "official":
        pivots = image_pivots + text_pivots
        k = image_pivots + pivots * (k // pivots)
    return min(k, tokens)


@without_autocast
def dart_select(features, norms, k, *, text=None, text_norms=None, image_pivots=4, text_pivots=4, compat="paper"):
    """The image pivots, and the tokens that each pivot in turn finds least like itself.

    Parameters
    ----------
    features : Tensor [.., n, D], float32, float16 or bfloat16
        Hidden states of an image's tokens.
    norms : Tensor [.., n], float
        What its pivots are chosen by: the L1 norm of their keys, all heads together.
    k : int
        Tokens to keep, 1 <= k <= n.
    text : Tensor [.., m, D], optional
        Hidden states of the text after the image.
    text_norms : Tensor [.., m], float
        -inf where there is no token (padding).
    image_pivots, text_pivots, compat
        As in `DART`.

    Returns
    -------
    Tensor [.., dart_budget(k, n, ...)], int64
        Ascending.

    Raises
    ------
    ValueError, TypeError
        On arguments that do not fit.

    Notes
    -----
    Pivots take their turn in descending norm, equals in the order of the prompt, norms that are not finite last; the
    public code's order is that of a Python set. Each takes its quota of tokens of least cosine among those nobody has
    taken: Eqs. 9 and 10 with the epsilon that brings just so many new tokens into the union. After the paper the
    quotas share out what the image pivots leave of k, the first pivots one more where it does not divide; after the
    public code they are all k // pivots, cut short when the image runs out, where that code crashes. With fewer text
    tokens than text pivots the image token of greatest norm takes further turns at the end for those missing, so
    that counts depend on nothing but sizes.

    Source: arXiv:2502.11494, Eqs. 7 to 10, Table 6, and the public code.
    """
    who = "methods.dart_select"
    check_features(who, features, k)
    check(compat in COMPAT, who, "compat", repr(compat), f"one of {COMPAT}")
    counts = image_pivots, text_pivots
    fits = all(is_int(count) and count >= 0 for count in counts) and 1 <= sum(counts) <= MOST_PIVOTS
    check(fits, who, "image_pivots, text_pivots", counts, f"at least 0, together 1 to {MOST_PIVOTS}")
    _check_norms(who, "norms", norms, features)
    check((text is None) == (text_norms is None), who, "text_norms", "alone", "given with text")
    batch, width = features.shape[:-2], features.shape[-1]
    if text is None:
        text, text_norms = features.new_empty(*batch, 0, width), norms.new_empty(*batch, 0)
    fits = text.dim() == features.dim() and text.shape[:-2] == batch and text.shape[-1] == width
    check(fits, who, "text", f"of shape {list(text.shape)}", f"of shape {[*batch, 'm', width]}")
    _check_norms(who, "text_norms", text_norms, text)

    said = _ranked(text_norms, text_pivots)
    rows = text.gather(-2, said.unsqueeze(-1).expand(*said.shape, width)).to(features.dtype)
    x = torch.cat([features, rows], -2)
    return _keep(x, norms, text_norms.gather(-1, said), k, image_pivots, text_pivots, compat)


def _keep(x, norms, said_norms, k, image_pivots, text_pivots, compat):
    """x [.., n + t, D]: the image's tokens, then the text pivots; norms [.., n] and said_norms [.., t]."""
    n, kept = norms.shape[-1], dart_budget(k, norms.shape[-1], image_pivots, text_pivots, compat)
    own = _ranked(norms, min(image_pivots, kept))  # [.., p]
    rest, pivots = kept - own.shape[-1], own.shape[-1] + text_pivots
    if rest == 0:
        return own.sort(-1).values
    if compat == "official":
        share = k // pivots
        quotas = [min(share, max(rest - share * turn, 0)) for turn in range(pivots)]
    else:
        quotas = [rest // pivots + (turn < rest % pivots) for turn in range(pivots)]

    said = torch.arange(n, x.shape[-2], device=x.device).expand(said_norms.shape)
    slots = torch.cat([own, said], -1)
    ranks = _ranked(torch.cat([norms.gather(-1, own).float(), said_norms.float()], -1), slots.shape[-1])
    stand_in = _ranked(norms, 1)
    missing = torch.cat([torch.zeros_like(own, dtype=torch.bool), said_norms == -torch.inf], -1)
    slots = torch.where(missing, stand_in, slots).gather(-1, ranks)
    slots = torch.cat([slots, stand_in.expand(*stand_in.shape[:-1], pivots - slots.shape[-1])], -1)

    pool = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    pool[..., :n] = True
    pool = pool.scatter(-1, own, False)
    chosen = pivot_bottomk(x, slots, quotas, mask=pool)
    return torch.cat([own, chosen], -1).sort(-1).values


def _ranked(norms, count):
    """The first of norms [.., n] in descending order, at most `count`: stable, NaN and inf last, -inf after them."""
    norms = norms.float()
    norms = torch.where(norms.isfinite() | (norms == -torch.inf), norms, -1.0)
    return norms.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _check_norms(who, argument, norms, features):
    shape = list(features.shape[:-1])
    fits = list(norms.shape) == shape and norms.is_floating_point()
    check(fits, who, argument, f"{norms.dtype} of shape {list(norms.shape)}", f"float of shape {shape}")
