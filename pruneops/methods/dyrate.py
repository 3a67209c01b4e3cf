"""DyRate: while text is generated, a classifier of attention decides how many visual tokens to drop.

A rate from one row of attention (`pruneops.attention_mass`), then the least attended tokens go
(`pruneops.attention_received`, `pruneops.kv_compact_`). There are two ways to run a step:

- Captured or compiled decoders have caches of worst-case length and the lengths on the device. The shapes of
  `dyrate_distribution`, the classifier, `dyrate_keep` and `dyrate_compact_` depend on no value, and the host never
  waits, so a whole step fits in one CUDA graph; what is past the lengths is masked out.
- The adapter for transformers takes the other way: caches that really get shorter. The new length is read once a step.
"""

import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checks import check
from ..networks import GROUPS, RateClassifier, expected_rate, load
from ..ops import attention_mass, attention_received, group_distribution, kv_compact_
from .base import IMAGE, INSTRUCTION, RESPONSE, SYSTEM, Method, Step, is_int, is_share, top_indices


@dataclass(frozen=True, kw_only=True)
class DyRate(Method):
    """DyRate at the input of a decoder layer, in the prompt and before every later token.

    Parameters
    ----------
    weights : path
        A file of `pruneops.networks.RateClassifier`, which also says before which decoder layer L tokens are dropped.
    keep : float
        Average share of the visual tokens, in (0, 1): one of those that the classifier was trained for.

    Notes
    -----
    Visual tokens leave layers L and later by the attention of layer L - 1, which keeps them all. A token that left
    never comes back, so within a request the count only falls. The last token of the prompt decides for the whole
    prompt. Each decision costs one host synchronisation, in the prompt one for every row.

    Source: arXiv:2501.14204, section III. The rate is the expected one, so that the average budget is that of the
    training, which draws rates; the paper does not say. The least attended tokens are FastV's.
    """

    name: ClassVar[str] = "dyrate"

    weights: str | os.PathLike[str]
    keep: float

    def __post_init__(self) -> None:
        self._check_path("weights")
        self._check_setting("keep", is_share(self.keep), "a share (float) in (0, 1)")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"query", "key"})

    def budget(self, tokens: int) -> int:
        """`tokens`: all of an image's tokens may be kept. How many really are depends on content."""
        check(is_int(tokens) and tokens >= 0, self._label, "tokens", repr(tokens), "an int of at least 0")
        return tokens

    def step_layer(self, count: int) -> int:
        """The decoder layer from which on `at_step` removes tokens.

        Parameters
        ----------
        count : int
            Layers of the decoder.

        Returns
        -------
        int

        Raises
        ------
        ValueError
            If the decoder has no such layer, or the weights cannot be used.
        """
        return self.layers(count)[0]

    @without_autocast
    def at_step(self, step: Step) -> Tensor:
        """Which visual tokens the layers from `step_layer` on keep after one more token.

        Parameters
        ----------
        step : Step

        Returns
        -------
        Tensor [B, S], bool
            Some of step.alive.

        Raises
        ------
        ValueError
            On shapes that do not fit, or if the weights cannot be used.
        """
        check(step.query is not None, self._label, "step.query", None, "given: this method reads it")
        assert step.query is not None
        rate, scores, rates = self._rate(step.query, step.key, step.group)
        return dyrate_keep(scores, step.alive, step.tokens, rate, rates)

    def _layers(self, count: int) -> tuple[int, ...]:
        layer = self._network("cpu").layer
        wanted = f"for one of the decoder's layers 1 to {count - 1}"
        check(1 <= layer < count, self._label, f"weights {self.weights}", f"for layer {layer}", wanted)
        return (layer,)

    def _network(self, device):
        network = load(RateClassifier, self.weights, device, torch.float32)
        known = ", ".join(map(str, network.keeps))
        check(self.keep in network.keeps, self._label, "keep", self.keep, f"one that {self.weights} has: {known}")
        return network

    def _rate(self, query, key, group):
        """(rate [..], scores [.., S], number of rates)."""
        network, heads = self._network(query.device), query.shape[-3]
        expected = network.config["heads"]
        wanted = f"for the decoder's {heads} heads"
        check(heads == expected, self._label, f"weights {self.weights}", f"for {expected}", wanted)
        distribution, scores = dyrate_distribution(query, key, group)
        logits = network(distribution, network.keeps.index(self.keep))
        return expected_rate(logits), scores, network.rates

    def _at_layer(self, row):
        positions = torch.arange(row.hidden.shape[0], device=row.visual.device)
        group = torch.where(positions > row.visual[0], INSTRUCTION, SYSTEM).index_fill(0, row.visual, IMAGE)
        rate, scores, rates = self._rate(row.query[:, -1:], row.key, group)
        tokens = len(row.visual)
        dropped = tokens * int(rate) // rates
        return top_indices(scores[row.visual], tokens - dropped) if dropped else None


@without_autocast
def dyrate_distribution(query: Tensor, key: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """How a token spreads its attention: over groups of tokens in each head (v_t), and over tokens.

    Parameters
    ----------
    query : Tensor [.., H, 1, Dh], float32, float16 or bfloat16
        Of one token, after rotary embedding; at most one batch dimension.
    key : Tensor [.., Hk, S, Dh], dtype of query
        All that the token sees, after rotary embedding.
    group : Tensor [.., S], int64
        0 system (text before the first visual token), 1 image, 2 instruction (other text of the prompt), 3 response
        (generated), -1 padding.

    Returns
    -------
    distribution : Tensor [.., 4 H], float32
        The four groups of head 0, of head 1, and so on: each four sum to 1.
    scores : Tensor [.., S], float32
        Attention to each token, the mean of the heads; 0 for padding.

    Raises
    ------
    ValueError, TypeError
        As `pruneops.attention_mass`.

    Notes
    -----
    Source: arXiv:2501.14204, section III-B.
    """
    one = query.dim() >= 3 and query.shape[-2] == 1
    check(one, "methods.dyrate_distribution", "query", f"of shape {list(query.shape)}", "of shape [.., H, 1, Dh]")
    rows = torch.full_like(group[..., :1], RESPONSE)
    mass, lse = attention_mass(query, key, rows, group, GROUPS)
    scores = attention_received(query, key, key_mask=group >= 0, lse=lse).mean(-2)
    return group_distribution(mass, query=RESPONSE).flatten(-2), scores


@without_autocast
def dyrate_keep(scores: Tensor, alive: Tensor, tokens: Tensor, rate: Tensor, rates: int) -> Tensor:
    """The visual tokens that a rate leaves: of those still there, the ones of highest score.

    Parameters
    ----------
    scores : Tensor [B, S], float
        From `dyrate_distribution`; ranked in float32.
    alive : Tensor [B, S], bool
        The visual tokens that are still there.
    tokens : Tensor [B], int64
        Visual tokens before any were removed.
    rate : Tensor [B], int64
        0 to rates - 1.
    rates : int
        K: rate k drops ``floor(tokens * k / K)`` tokens.

    Returns
    -------
    Tensor [B, S], bool
        The ``min(alive, tokens - dropped)`` tokens of highest score among those alive. Ties go to the lowest index;
        scores that are not finite come last. No token is added.

    Raises
    ------
    ValueError
        On shapes that do not fit.

    Notes
    -----
    Source: arXiv:2501.14204, Eqs. 1 and 3.
    """
    op, shape = "methods.dyrate_keep", list(scores.shape)
    check(scores.dim() == 2, op, "scores", f"of shape {shape}", "of shape [B, S]")
    check(alive.shape == scores.shape, op, "alive", f"of shape {list(alive.shape)}", f"of shape {shape}")
    for name, tensor in (("tokens", tokens), ("rate", rate)):
        check(list(tensor.shape) == shape[:1], op, name, f"of shape {list(tensor.shape)}", f"of shape {shape[:1]}")
    check(is_int(rates) and rates >= 1, op, "rates", repr(rates), "an int of at least 1")
    scores = scores.float()
    keys = torch.where(scores.isfinite(), -scores, torch.inf).where(alive, torch.nan)  # NaN sorts behind infinity
    order = keys.argsort(dim=1, stable=True)
    rank = torch.zeros_like(order).scatter(1, order, torch.arange(shape[1], device=order.device).expand_as(order))
    return alive & (rank < (tokens - tokens * rate // rates)[:, None])


@without_autocast
def dyrate_compact_(caches: list[Tensor], keep: Tensor, lengths: Tensor) -> Tensor:
    """Remove tokens from caches of worst-case length, in place, with lengths that stay on the device.

    Parameters
    ----------
    caches : list of Tensor [B, Hk, S, Dh], any dtype
        Keys and values of layers that hold the same tokens. What else belongs to their slots, such as each token's
        position, can go along as [B, 1, S, 1].
    keep : Tensor [B, S], bool
        Which slots stay: text and kept visual tokens. Slots past `lengths` are ignored.
    lengths : Tensor [B], int64
        Slots in use, at the front.

    Returns
    -------
    Tensor [B], int64
        The new lengths. Memory past them keeps its old content, which the caller must mask out.

    Raises
    ------
    ValueError, TypeError
        As `pruneops.kv_compact_`.
    """
    used = torch.arange(keep.shape[1], device=keep.device) < lengths[:, None]
    stays = keep & used
    left = stays.sum(1)
    index = stays.logical_not().byte().argsort(dim=1, stable=True)  # kept slots first, in order
    kv_compact_(caches, index, lengths=left)
    return left
