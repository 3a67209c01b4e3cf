"""ToDRE: a diverse set of visual tokens after the projector, none once text hardly attends to them.

Stage 1 is greedy k-center from one pivot: k steps over n tokens (`pruneops.kcenter`). Stage 2 sums the attention
between text and vision in a few layers (`pruneops.attention_mass`) and never forms the attention matrix.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checks import check
from ..ops import attention_mass, cross_modal_ratio, kcenter, kcenter_varlen
from .base import (
    Budgeted,
    Image,
    all_indices,
    check_features,
    check_image,
    exact_share,
    finite_argmax,
    is_share,
    to_device_async,
)

PIVOTS = ("auto", "attention", "norm")
SYSTEM = 0  # groups of tokens
VISION = 1
TEXT = 2


@dataclass(frozen=True, kw_only=True)
class ToDRE(Budgeted):
    """Both stages of ToDRE.

    Parameters
    ----------
    keep : float or int
        Stage 1, of every image: a share (float) in (0, 1] or a count (int); 1.0 disables the stage. The paper: 0.25
        and 0.1.
    pivot : {"auto", "attention", "norm"}
        The first token: highest `cls_attention`, as in the paper, or largest L2 norm of the features, a substitute for
        towers without [CLS]. "auto" uses the attention where an image has it. The other substitute, the mean attention
        received, is passed as `Image.cls_attention`.
    depths : sequence of float
        Stage 2: shares of the decoder's layers, each in (0, 1), at which the ratios are evaluated; () disables the
        stage. Depth d of L layers is the input of layer floor(d L), with the attention of the layer before; layer 0 has
        none and is left out.
    tau : float
        All visual tokens are removed when both ratios are below it; at least 0.

    Notes
    -----
    Source: arXiv:2505.18757, section 4, Algorithm 1, Eqs. 4 to 7: the version with greedy k-center, not a later one
    with max-sum diversification. A token is never chosen twice. A prompt without text after its images keeps them: the
    ratio is undefined there. The decision of stage 2 costs one host synchronisation a layer, since shapes depend on it.
    """

    name: ClassVar[str] = "todre"

    pivot: Literal["auto", "attention", "norm"] = "auto"
    depths: tuple[float, ...] = (0.5, 0.625, 0.75, 0.875)
    tau: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_setting("pivot", self.pivot in PIVOTS, f"one of {PIVOTS}")
        fits = isinstance(self.depths, (tuple, list)) and all(map(is_share, self.depths))
        self._check_setting("depths", fits, "a sequence of floats in (0, 1)")
        object.__setattr__(self, "depths", tuple(self.depths))
        number = isinstance(self.tau, (int, float)) and not isinstance(self.tau, bool)
        self._check_setting("tau", number and 0 <= self.tau < torch.inf, "a finite number of at least 0")

    @property
    def after_projector(self) -> bool:
        return self.keep != 1.0 or isinstance(self.keep, int)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(() if self.pivot == "norm" else {"cls_attention"})

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"cls_attention"} if self.pivot == "attention" and self.after_projector else ())

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"query", "key"} if self.depths else ())

    def _pivot(self, image):
        given = image.cls_attention is not None
        missing = self.pivot == "attention" and not given
        check(not missing, self._label, "image.cls_attention", None, 'given, or pivot "norm" or "auto"')
        attention = image.cls_attention if given and self.pivot != "norm" else None
        return todre_pivot(image.features, attention, thumbnail=image.thumbnail, frames=image.frames)

    def _select(self, image, k):
        return todre_select(image.features, k, pivot=self._pivot(image))

    def _select_each(self, images):
        """One call for all images that lose tokens: of `kcenter` if they have one shape, else of `kcenter_varlen`."""
        for image in images:
            check_image(self._label, image)
            check(image.features.dim() == 2, self._label, "image.features", "a batch", "of shape [n, D]")
        sizes = [image.features.shape[0] for image in images]
        ks = [self.budget(size) for size in sizes]
        pruned = [i for i, (k, size) in enumerate(zip(ks, sizes)) if k < size]
        kept = {}
        if len(pruned) == 1:
            kept[pruned[0]] = self._select(images[pruned[0]], ks[pruned[0]])
        elif pruned:
            kept = dict(zip(pruned, self._select_together([images[i] for i in pruned], [ks[i] for i in pruned])))
        return [kept[i] if i in kept else all_indices(image.features) for i, image in enumerate(images)]

    def _select_together(self, images, ks):
        """`_select` of several images in one call."""
        features, pivots = [image.features for image in images], [self._pivot(image) for image in images]
        if len({(x.shape, x.dtype) for x in features}) == 1:  # then so are their budgets
            return todre_select(torch.stack(features), ks[0], pivot=torch.stack(pivots)).unbind()
        starts = list(itertools.accumulate((len(x) for x in features), initial=0))
        packed, bounds = torch.cat(features), to_device_async(torch.tensor(starts), features[0].device)
        pivots = torch.stack([pivot + start for pivot, start in zip(pivots, starts)])
        chosen = todre_select_varlen(packed, bounds, ks, pivots=pivots).split(ks)
        return [indices - start for indices, start in zip(chosen, starts)]

    def _layers(self, count: int) -> tuple[int, ...]:
        layers = {int(exact_share(depth, count)) for depth in self.depths}
        return tuple(sorted(layers - {0}))

    def _at_layer(self, row):
        positions = torch.arange(row.hidden.shape[0], device=row.visual.device)
        group = torch.where(positions > row.visual[0], TEXT, SYSTEM).index_fill(0, row.visual, VISION)
        to_vision, to_text = todre_ratios(row.query, row.key, group)
        irrelevant = (to_vision < self.tau) & (to_text < self.tau) & (group == TEXT).any()
        return row.visual[:0] if bool(irrelevant) else None


@without_autocast
def todre_pivot(
    features: Tensor,
    attention: Tensor | None = None,
    *,
    thumbnail: tuple[int, int] | None = None,
    frames: int | None = None,
) -> Tensor:
    """The first token of ToDRE's set.

    Parameters
    ----------
    features : Tensor [.., n, D], float32, float16 or bfloat16
        Tokens; at most one batch dimension.
    attention : Tensor [.., n], optional
        [CLS] attention, or a substitute. Without it: the L2 norm of the features.
    thumbnail : (int, int), optional
        AnyRes: only tokens start .. end - 1 are candidates.
    frames : int, optional
        Video: number of frames. The paper takes the best token of each frame, then the best of those; that is the best
        of all, the first of equals, so `frames` is only checked.

    Returns
    -------
    Tensor [..], int64
        Ties go to the lowest index; scores that are not finite come last.

    Raises
    ------
    ValueError
        On shapes that do not fit.

    Notes
    -----
    Source: arXiv:2505.18757, section 4.1 and lines 1 to 6 of Algorithm 1.
    """
    check_image("methods.todre_pivot", Image(features, attention, thumbnail, frames))
    check(features.shape[-2] > 0, "methods.todre_pivot", "features", "empty", "of at least one token")
    scores = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32) if attention is None else attention
    start, end = (0, features.shape[-2]) if thumbnail is None else thumbnail
    return finite_argmax(scores[..., start:end]) + start


@without_autocast
def todre_select(features: Tensor, k: int, *, pivot: Tensor) -> Tensor:
    """Stage 1: the pivot, then at each step the token whose largest cosine with the set is smallest.

    Parameters
    ----------
    features : Tensor [.., n, D], float32, float16 or bfloat16
        Tokens; at most one batch dimension.
    k : int
        1 <= k <= n
    pivot : Tensor [..], int64
        From `todre_pivot`.

    Returns
    -------
    Tensor [.., k], int64
        Ascending.

    Raises
    ------
    ValueError, TypeError
        As `pruneops.kcenter`.

    Notes
    -----
    Source: arXiv:2505.18757, Eqs. 4 to 6. Eq. 4 takes chosen tokens out of the pool; Algorithm 1 omits it.
    """
    check_features("methods.todre_select", features, k)
    return kcenter(features, k, seeds=pivot.unsqueeze(-1)).indices.sort(-1).values


@without_autocast
def todre_select_varlen(features: Tensor, cu_seqlens: Tensor, ks: Sequence[int], *, pivots: Tensor) -> Tensor:
    """`todre_select` for images of different sizes packed into one tensor.

    Parameters
    ----------
    features : Tensor [T, D], float32, float16 or bfloat16
        Tokens of all images, one after another.
    cu_seqlens : Tensor [images + 1], int32 or int64
        Where each image starts; last entry T.
    ks : sequence of int
        Budget of each image, at least 1.
    pivots : Tensor [images], int64
        From `todre_pivot`, as indices into the packed tensor.

    Returns
    -------
    Tensor [sum(ks)], int64
        Ascending indices into the packed tensor, that is, image after image.

    Raises
    ------
    ValueError, TypeError
        As `pruneops.kcenter_varlen`.
    """
    return kcenter_varlen(features, cu_seqlens, list(ks), seeds=pivots.unsqueeze(-1)).indices.sort().values


@without_autocast
def todre_ratios(query: Tensor, key: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Stage 2: how much text attends to vision, and vision to text, in one decoder layer.

    Parameters
    ----------
    query : Tensor [.., H, S, Dh], float32, float16 or bfloat16
        After rotary embedding; at most one batch dimension.
    key : Tensor [.., Hk, S, Dh], dtype of query
        After rotary embedding.
    group : Tensor [.., S], int64
        0 system prompt, 1 vision, 2 text, -1 padding.

    Returns
    -------
    tuple of Tensor [..], float32
        (alpha text -> vision, alpha vision -> text); 0 where there is no such query.

    Raises
    ------
    ValueError, TypeError
        As `pruneops.attention_mass`.

    Notes
    -----
    Attention is causal, so a vision token before all text has no attention to it: its row is counted, not computed.
    With the text after the image only the text's rows are computed.

    Source: arXiv:2505.18757, Eq. 7.
    """
    vision = group == VISION
    blind = vision & ((group == TEXT).cumsum(-1) == 0)
    rows = torch.where(blind | (group == SYSTEM), -1, group)
    mass = attention_mass(query, key, rows, group, 3).mass
    to_vision, to_text = cross_modal_ratio(mass, text=TEXT, vision=VISION)
    return to_vision, to_text * (1 - blind.sum(-1) / vision.sum(-1).clamp(min=1))
