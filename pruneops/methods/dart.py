"""DART: a few pivot tokens, and the tokens that duplicate them least.

Runs once in prefill. One pass over the hidden states of an image (`pruneops.pivot_bottomk`) and one over the keys, for
their norms.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checks import check
from ..ops import pivot_bottomk
from .base import SingleLayer, check_features, exact_share, is_int

COMPAT = ("paper", "official")
MAX_PIVOTS = 64


@dataclass(frozen=True, kw_only=True)
class DART(SingleLayer):
    """DART before a decoder layer.

    Parameters
    ----------
    keep : float or int
        Of every image: a share (float) in (0, 1] or a count (int).
    layer : int
        K, at least 1: prunes the input of layer K (from 0), with the keys of layer K - 1.
    image_pivots : int
        How many image tokens, those of largest key norm, are pivots. They are kept.
    text_pivots : int
        How many tokens of the text after the image, those of largest key norm, are pivots. The paper's Table 6: four
        of each.
    compat : {"paper", "official"}
        "paper": cosines of the hidden states, exactly `budget` tokens an image. "official", as the public code: cosines
        after the decoder's final norm, and each pivot takes ``keep // pivots`` tokens (a share is rounded down only
        here, at the end) beside the image pivots, which makes 196, 132 and 68 of 192, 128 and 64.

    Notes
    -----
    Source: arXiv:2502.11494, section 3.3; see `dart_select`.
    """

    name: ClassVar[str] = "dart"

    image_pivots: int = 4
    text_pivots: int = 4
    compat: Literal["paper", "official"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting in ("image_pivots", "text_pivots"):
            value = getattr(self, setting)
            self._check_setting(setting, is_int(value) and value >= 0, "an int of at least 0")
        pivots = self.image_pivots + self.text_pivots
        fits = 1 <= pivots <= MAX_PIVOTS
        check(fits, self._label, "image_pivots + text_pivots", pivots, f"1 to {MAX_PIVOTS}")
        self._check_setting("compat", self.compat in COMPAT, f"one of {COMPAT}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"key", "norm"} if self.compat == "official" else {"key"})

    def budget(self, tokens: int) -> int:
        """How many of an image's tokens are kept: a share or count as for the other methods; with
        compat="official" the public code's count, at most `tokens`."""
        return dart_budget(self._requested(tokens), tokens, self.image_pivots, self.text_pivots, self.compat)

    def _requested(self, tokens: int) -> int:
        """k of an image; the public code does not round a share before it divides."""
        k = super().budget(tokens)
        return k if is_int(self.keep) or self.compat == "paper" else int(exact_share(self.keep, tokens))

    def _at_layer(self, row):
        hidden = row.norm(row.hidden) if self.compat == "official" else row.hidden
        norms = torch.linalg.vector_norm(row.key, 1, dim=(0, 2), dtype=torch.float32)  # [S]
        positions = torch.arange(len(norms), device=norms.device)
        text = torch.ones_like(norms, dtype=torch.bool).index_fill(0, row.visual, False)

        def choose(start, end, k, size):
            image = row.visual[start:end]
            text_norms = torch.where(text & (positions > image[-1]), norms, -torch.inf)
            pivots = _by_norm(text_norms, self.text_pivots)
            x = hidden.index_select(0, torch.cat([image, pivots]))
            k = self._requested(size)
            return _select(x, norms[image], text_norms[pivots], k, self.image_pivots, self.text_pivots, self.compat)

        return self._per_image(row, choose)


def dart_budget(
    k: int,
    tokens: int,
    image_pivots: int = 4,
    text_pivots: int = 4,
    compat: Literal["paper", "official"] = "paper",
) -> int:
    """How many of `tokens` DART keeps if k are requested.

    Parameters
    ----------
    k : int
        Tokens requested.
    tokens : int
        Tokens of the image.
    image_pivots, text_pivots, compat
        As in `DART`.

    Returns
    -------
    int
        k after the paper, ``image_pivots + pivots * (k // pivots)`` after the public code, both at most `tokens`.
    """
    if compat == "official":
        pivots = image_pivots + text_pivots
        k = image_pivots + pivots * (k // pivots)
    return min(k, tokens)


@without_autocast
def dart_select(
    features: Tensor,
    norms: Tensor,
    k: int,
    *,
    text: Tensor | None = None,
    text_norms: Tensor | None = None,
    image_pivots: int = 4,
    text_pivots: int = 4,
    compat: Literal["paper", "official"] = "paper",
) -> Tensor:
    """The image pivots, and the tokens least similar to each pivot in turn.

    Parameters
    ----------
    features : Tensor [.., n, D], float32, float16 or bfloat16
        Hidden states of an image's tokens.
    norms : Tensor [.., n], float
        Scores that select the image pivots: the L1 norm of the tokens' keys, over all heads.
    k : int
        Tokens to keep, 1 <= k <= n.
    text : Tensor [.., m, D], optional
        Hidden states of the text after the image.
    text_norms : Tensor [.., m], float
        Scores that select the text pivots; -inf where there is no token (padding). Required with `text`.
    image_pivots, text_pivots, compat
        As in `DART`.

    Returns
    -------
    Tensor [.., dart_budget(k, n, ...)], int64
        Ascending.

    Raises
    ------
    ValueError
        On shapes and values that do not fit.
    TypeError
        As `pruneops.pivot_bottomk`.

    Notes
    -----
    Pivots take their turn in descending norm, equals in the order of the prompt, norms that are not finite last; the
    public code's order is that of a Python set. Each takes its quota of tokens of smallest cosine among those that no
    pivot before it has taken: Eqs. 9 and 10 with the epsilon that adds exactly so many new tokens to the union. After
    the paper the quotas divide what the image pivots leave of k, the first pivots one more where it does not divide;
    after the public code all are ``k // pivots``, cut short when the image runs out, where that code crashes. With
    fewer text tokens than text pivots the image token of largest norm takes further turns at the end for those
    missing, so that counts depend on nothing but sizes.

    Source: arXiv:2502.11494, Eqs. 7 to 10, Table 6, and the public code.
    """
    op = "methods.dart_select"
    check_features(op, features, k)
    check(compat in COMPAT, op, "compat", repr(compat), f"one of {COMPAT}")
    counts = image_pivots, text_pivots
    fits = all(is_int(count) and count >= 0 for count in counts) and 1 <= sum(counts) <= MAX_PIVOTS
    check(fits, op, "image_pivots, text_pivots", counts, f"at least 0, together 1 to {MAX_PIVOTS}")
    _check_norms(op, "norms", norms, features)
    check((text is None) == (text_norms is None), op, "text_norms", "alone", "given with text")
    batch, width = features.shape[:-2], features.shape[-1]
    if text is None or text_norms is None:
        text, text_norms = features.new_empty(*batch, 0, width), norms.new_empty(*batch, 0)
    fits = text.dim() == features.dim() and text.shape[:-2] == batch and text.shape[-1] == width
    check(fits, op, "text", f"of shape {list(text.shape)}", f"of shape {[*batch, 'm', width]}")
    _check_norms(op, "text_norms", text_norms, text)

    pivots = _by_norm(text_norms, text_pivots)
    rows = text.gather(-2, pivots.unsqueeze(-1).expand(*pivots.shape, width)).to(features.dtype)
    x = torch.cat([features, rows], -2)
    return _select(x, norms, text_norms.gather(-1, pivots), k, image_pivots, text_pivots, compat)


def _select(x, norms, pivot_norms, k, image_pivots, text_pivots, compat):
    """x [.., n + t, D]: the image's tokens, then t text pivots; norms [.., n] and pivot_norms [.., t]."""
    n, kept = norms.shape[-1], dart_budget(k, norms.shape[-1], image_pivots, text_pivots, compat)
    from_image = _by_norm(norms, min(image_pivots, kept))  # [.., p]
    rest, pivots = kept - from_image.shape[-1], from_image.shape[-1] + text_pivots
    if rest == 0:
        return from_image.sort(-1).values
    if compat == "official":
        share = k // pivots
        quotas = [min(share, max(rest - share * turn, 0)) for turn in range(pivots)]
    else:
        quotas = [rest // pivots + (turn < rest % pivots) for turn in range(pivots)]

    from_text = torch.arange(n, x.shape[-2], device=x.device).expand(pivot_norms.shape)
    turns = torch.cat([from_image, from_text], -1)
    order = _by_norm(torch.cat([norms.gather(-1, from_image).float(), pivot_norms.float()], -1), turns.shape[-1])
    substitute = _by_norm(norms, 1)
    missing = torch.cat([torch.zeros_like(from_image, dtype=torch.bool), pivot_norms == -torch.inf], -1)
    turns = torch.where(missing, substitute, turns).gather(-1, order)
    turns = torch.cat([turns, substitute.expand(*substitute.shape[:-1], pivots - turns.shape[-1])], -1)

    allowed = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    allowed[..., :n] = True
    allowed = allowed.scatter(-1, from_image, False)
    chosen = pivot_bottomk(x, turns, quotas, mask=allowed)
    return torch.cat([from_image, chosen], -1).sort(-1).values


def _by_norm(norms, count):
    """Indices of norms [.., n] in descending order, at most `count`: stable, NaN and inf last, -inf after them."""
    norms = norms.float()
    norms = torch.where(norms.isfinite() | (norms == -torch.inf), norms, -1.0)
    return norms.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _check_norms(op, argument, norms, features):
    shape = list(features.shape[:-1])
    fits = list(norms.shape) == shape and norms.is_floating_point()
    check(fits, op, argument, f"{norms.dtype} of shape {list(norms.shape)}", f"float of shape {shape}")
