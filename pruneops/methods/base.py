"""The base class of methods: settings, JSON, budgets; the inputs of methods; helpers that select by scores."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checks import DTYPES, ArgumentValueError, check
from ..ops import exclusive_bottomk

SCHEMA = 1
METHODS: "dict[str, type[Method]]" = {}  # name -> class
M = TypeVar("M", bound="Method")
SYSTEM = 0  # groups of tokens in `Step`
IMAGE = 1
INSTRUCTION = 2
RESPONSE = 3


class Image(NamedTuple):
    """An image after the projector, or a batch of images with equally many tokens.

    Parameters
    ----------
    features : Tensor [.., n, D], float32, float16 or bfloat16
        Visual tokens as the decoder will get them; at most one batch dimension.
    cls_attention : Tensor [.., n], optional
        Attention from [CLS] to each token in the vision tower's last layer (`cls_attention`). For a tower without
        [CLS] the caller may pass a substitute, such as the mean attention received (`mean_attention`).
    thumbnail : (int, int), optional
        AnyRes: where the global thumbnail's tokens start and end.
    frames : int, optional
        Video: number of frames, n = frames * tokens per frame.
    index : int
        Number of the image in its request; row b of a batch has number index + b. Only `Random` reads it.
    """

    features: Tensor
    cls_attention: Tensor | None = None
    thumbnail: tuple[int, int] | None = None
    frames: int | None = None
    index: int = 0


class Row(NamedTuple):
    """One prompt of a batch at the input of a decoder layer, without padding.

    Parameters
    ----------
    hidden : Tensor [S, D]
        Input of the layer.
    query : Tensor [H, S, Dh], optional
        Queries of the layer before, after rotary embedding. Like the next two it is required by methods whose `needs`
        names it.
    key : Tensor [Hk, S, Dh], optional
        Keys of the layer before, after rotary embedding.
    norm : callable, optional
        The decoder's final norm, to be applied to hidden.
    visual : Tensor [n], int64
        Ascending positions of the visual tokens that are left.
    images : sequence of (int, int)
        First and last + 1 rank within `visual` of each image, one after another from 0 to n.
    sizes : sequence of int
        Tokens that each image had before any pruning.
    rotary : (Tensor [S, Dr], Tensor [S, Dr]), optional
        Cos and sin of the decoder's rotary embeddings at the row's tokens. Required by methods whose `needs` names it.
    """

    hidden: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    norm: Callable[[Tensor], Tensor] | None = None
    visual: Tensor | None = None
    images: tuple[tuple[int, int], ...] = ()
    sizes: tuple[int, ...] = ()
    rotary: tuple[Tensor, Tensor] | None = None


class Step(NamedTuple):
    """One token after the prompt, in a batch: what it attends to decides what later tokens see.

    A method that removes tokens while text is generated has ``at_step(step)``, which returns the tokens to keep as
    bool [B, S], some of `alive`, and ``step_layer(count)``: the layers from there on lose the others.

    Parameters
    ----------
    query : Tensor [B, H, 1, Dh] or None
        Of the token, in the layer before `step_layer`, after rotary embedding. None if the method's `needs` does not
        name it, or if `step_layer` is 0.
    key : Tensor [B, Hk, S, Dh]
        Keys of that layer, the token's own at the end. If `step_layer` is 0: of layer 0, before the token.
    group : Tensor [B, S], int64
        0 system (text before the first visual token), 1 image, 2 instruction (other text of the prompt), 3 response
        (all later tokens), -1 padding.
    alive : Tensor [B, S], bool
        Visual tokens that the layers from `step_layer` on still hold.
    tokens : Tensor [B], int64
        Visual tokens that the layer of `key` holds.
    generated : int
        Tokens after the prompt so far, this one included.
    """

    query: Tensor | None
    key: Tensor
    group: Tensor
    alive: Tensor
    tokens: Tensor
    generated: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A pruning method: its settings, and where and what it prunes.

    All settings are checked when the object is made (ValueError). Methods keep tokens in ascending order; the caller
    keeps track of original positions.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls

    @property
    def after_projector(self) -> bool:
        """Whether it prunes images between the projector and the decoder."""
        return False

    @property
    def reads(self) -> frozenset[str]:
        """Optional fields of `Image` that `select` uses if they are given: ``{"cls_attention"}`` or empty."""
        return self.requires

    @property
    def requires(self) -> frozenset[str]:
        """Those of `reads` without which `select` fails."""
        return frozenset()

    @property
    def needs(self) -> frozenset[str]:
        """Optional fields of `Row` that `at_layer` requires: a subset of ``{"query", "key", "norm", "rotary"}``.

        With "query" `Step` has one, too.
        """
        return frozenset()

    def budget(self, tokens: int) -> int:
        """How many tokens of an image its settings keep.

        ToDRE's stage 2, which depends on content, is not counted.

        Parameters
        ----------
        tokens : int
            Tokens of the image.

        Returns
        -------
        int
            At most `tokens`.

        Raises
        ------
        ValueError
            If `tokens` is no int of at least 0.
        """
        raise NotImplementedError

    def layers(self, count: int) -> tuple[int, ...]:
        """The decoder layers at whose input it prunes.

        Parameters
        ----------
        count : int
            Layers of the decoder.

        Returns
        -------
        tuple of int
            Numbers from 0, ascending; empty if it does not prune inside the decoder.

        Raises
        ------
        ValueError
            If the decoder has no such layer.
        """
        check(is_int(count) and count >= 1, self._label, "count", repr(count), "an int of at least 1")
        return self._layers(count)

    @without_autocast
    def select(self, image: Image) -> Tensor:
        """Choose tokens of an image after the projector; all of them if the method does not prune there.

        Parameters
        ----------
        image : Image

        Returns
        -------
        Tensor [.., k], int64
            Ascending; k is ``budget(n)``, the same for every row of a batch.

        Raises
        ------
        ValueError
            On shapes that do not fit, or if the image lacks a field that the method `requires`.
        """
        check_image(self._label, image)
        tokens = image.features.shape[-2]
        k = self.budget(tokens) if self.after_projector else tokens
        return all_indices(image.features) if k == tokens else self._select(image, k)

    @without_autocast
    def select_each(self, images: Sequence[Image]) -> list[Tensor]:
        """`select` for each image of a request, of any sizes; the i-th has number i.

        Parameters
        ----------
        images : sequence of Image
            Without a batch dimension.

        Returns
        -------
        list of Tensor [k_i], int64
            Ascending.

        Raises
        ------
        ValueError
            As in `select`.
        """
        return self._select_each([image._replace(index=i) for i, image in enumerate(images)])

    @without_autocast
    def at_layer(self, layer: int, row: Row, count: int) -> Tensor | None:
        """Choose among the visual tokens of a prompt at the input of a decoder layer.

        Parameters
        ----------
        layer : int
            From 0; where it is none of ``layers(count)``, every token is kept.
        row : Row
        count : int
            Layers of the decoder.

        Returns
        -------
        Tensor [k], int64, or None
            Ascending ranks within row.visual of the tokens to keep, k may be 0; None to keep all of them. Budgets are
            per image and count from its size before any pruning.

        Raises
        ------
        ValueError
            On shapes that do not fit, or if the row lacks a field that the method `needs`.
        """
        if layer not in self.layers(count):
            return None
        visual = self._check_row(row)
        return self._at_layer(row) if visual.shape[0] else None

    def to_json(self) -> str:
        """The settings as JSON: ``{"schema": 1, "method": its name, setting: value, ...}``."""
        return json.dumps({"schema": SCHEMA, "method": self.name, **self._settings()})

    @classmethod
    def from_json(cls: type[M], text: str) -> M:
        """The method that `to_json` wrote; of a subclass, only a method of that class.

        Parameters
        ----------
        text : str
            See the function `pruneops.methods.from_json`.

        Returns
        -------
        Method
            Of this class.

        Raises
        ------
        ValueError
            As the function `pruneops.methods.from_json`, and on a method of another class.
        """
        method = from_json(text)
        if isinstance(method, cls):
            return method
        expected = f"{cls.name!r}" if "name" in cls.__dict__ else f"a {cls.__name__}"
        op = f"pruneops.methods.{cls.__name__}.from_json"
        raise ArgumentValueError(f"{op}: method must be {expected}, got {method.name!r}")

    @property
    def _label(self) -> str:
        """In error messages."""
        return f"methods.{type(self).__name__}"

    def _settings(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _layers(self, count: int) -> tuple[int, ...]:
        return ()

    def _select(self, image: Image, k: int) -> Tensor:
        raise NotImplementedError

    def _select_each(self, images: list[Image]) -> list[Tensor]:
        return [self.select(image) for image in images]

    def _at_layer(self, row: Row) -> Tensor | None:
        raise NotImplementedError

    def _check_path(self, setting):
        """Check a setting that is a path, and make it a string."""
        value = getattr(self, setting)
        self._check_setting(setting, isinstance(value, (str, os.PathLike)) and os.fspath(value), "a path")
        object.__setattr__(self, setting, os.fspath(value))

    def _check_setting(self, setting: str, fits: object, expected: str) -> None:
        check(fits, self._label, setting, repr(getattr(self, setting)), expected)

    def _check_row(self, row):
        """Check a row; its `visual`."""
        visual = row.visual
        check(row.hidden.dim() == 2, self._label, "row.hidden", _describe(row.hidden), "of shape [S, D]")
        length = row.hidden.shape[0]
        for name in sorted(self.needs):
            check(getattr(row, name) is not None, self._label, f"row.{name}", None, "given: this method reads it")
        for name in ("query", "key"):
            tensor = getattr(row, name)
            if name in self.needs:
                fits = tensor.dim() == 3 and tensor.shape[1] == length
                check(fits, self._label, f"row.{name}", f"of shape {list(tensor.shape)}", f"of shape [H, {length}, Dh]")
        if "rotary" in self.needs:
            fits = len(row.rotary) == 2 and all(part.dim() == 2 and len(part) == length for part in row.rotary)
            shapes = [list(part.shape) for part in row.rotary]
            check(fits, self._label, "row.rotary", f"of shapes {shapes}", f"cos and sin of shape [{length}, Dr]")
        fits = isinstance(visual, Tensor) and visual.dim() == 1 and visual.dtype == torch.int64
        check(fits, self._label, "row.visual", _describe(visual), "int64 of rank 1")
        ends = [0, *(end for _, end in row.images)]
        fits = [start for start, _ in row.images] == ends[:-1] and ends == sorted(ends) and ends[-1] == len(visual)
        wanted = f"one range after another from 0 to the {len(visual)} visual tokens"
        check(fits, self._label, "row.images", list(row.images), wanted)
        fits = len(row.sizes) == len(row.images) and all(
            size >= end - start for size, (start, end) in zip(row.sizes, row.images)
        )
        check(fits, self._label, "row.sizes", list(row.sizes), "one an image, no less than the tokens still there")
        return visual


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgeted(Method):
    """A method that keeps a given part of every image.

    Parameters
    ----------
    keep : float or int
        Of every image: a float is a share in (0, 1], an int a count of at least 1. So 1.0 is all tokens, 1 is one.
    """

    keep: float | int

    def __post_init__(self) -> None:
        share = isinstance(self.keep, float) and 0 < self.keep <= 1
        count = is_int(self.keep) and self.keep >= 1
        self._check_setting("keep", share or count, "a share (float) in (0, 1] or a count (int) of at least 1")

    def budget(self, tokens: int) -> int:
        """How many of an image's tokens are kept.

        A count is capped at `tokens`. A share is taken exactly as it prints (0.1 is one tenth) and its product with
        `tokens` rounded to the nearest integer, halves up; at least 1 of an image that is not empty.

        Parameters
        ----------
        tokens : int
            Tokens of the image.

        Returns
        -------
        int

        Raises
        ------
        ValueError
            If `tokens` is no int of at least 0.
        """
        check(is_int(tokens) and tokens >= 0, self._label, "tokens", repr(tokens), "an int of at least 0")
        k = self.keep if is_int(self.keep) else math.floor(exact_share(self.keep, tokens) + Fraction(1, 2))
        return min(max(k, 1), tokens)

    def _per_image(self, row, choose):
        """Ranks to keep, image by image; None if that is all of them.

        choose(start, end, k, size) returns k ascending ranks within an image of more than k tokens.
        """
        kept, pruned = [], False
        for (start, end), size in zip(row.images, row.sizes):
            k = min(self.budget(size), end - start)
            if k == end - start:
                kept.append(torch.arange(start, end, device=row.visual.device))
            else:
                pruned = True
                kept.append(choose(start, end, k, size) + start)
        return torch.cat(kept) if pruned else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleLayer(Budgeted):
    """A method that keeps a given part of every image at the input of one decoder layer.

    Parameters
    ----------
    keep : float or int
        Of every image, as in `Budgeted`.
    layer : int
        K, at least 1: prunes the input of layer K (from 0).
    """

    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_setting("layer", is_int(self.layer) and self.layer >= 1, "an int of at least 1")

    def _layers(self, count: int) -> tuple[int, ...]:
        check(self.layer < count, self._label, "layer", self.layer, f"one of the decoder's layers, 0 to {count - 1}")
        return (self.layer,)


def from_json(text: str) -> Method:
    """The method that `Method.to_json` wrote.

    Parameters
    ----------
    text : str
        A JSON object with "schema" (1), "method" and its settings; those left out take their defaults.

    Returns
    -------
    Method
        Of the class that "method" names.

    Raises
    ------
    ValueError
        On text that is no such object, an unknown schema, method or setting, or a bad value.
    """
    op = "methods.from_json"
    try:
        settings = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"pruneops.{op}: text must be JSON: {error}") from None
    check(isinstance(settings, dict), op, "text", type(settings).__name__, "a JSON object")
    schema, name = settings.pop("schema", None), settings.pop("method", None)
    check(is_int(schema) and schema == SCHEMA, op, "schema", repr(schema), f"{SCHEMA}, the only one so far")
    check(isinstance(name, str) and name in METHODS, op, "method", repr(name), f"one of {', '.join(sorted(METHODS))}")
    fields = dataclasses.fields(METHODS[name])
    known = [field.name for field in fields]
    for setting in settings:
        check(setting in known, op, "setting", repr(setting), f"one of {name}'s: {', '.join(known)}")
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        check(not required or field.name in settings, op, field.name, "nothing", f"given for {name}")
    return METHODS[name](**settings)


def exact_share(share: float, count: int) -> Fraction:
    """share * count as an exact fraction, the share taken as it prints."""
    return Fraction(str(float(share))) * count


def is_share(value: object) -> bool:
    """Whether a setting is a float in (0, 1), 1 excluded."""
    return isinstance(value, float) and 0 < value < 1


def top_indices(scores: Tensor, k: int) -> Tensor:
    """The k tokens of highest score, ascending.

    Parameters
    ----------
    scores : Tensor [B, n] or [n], float
        Ranked in float32; ties go to the lowest index, scores that are not finite come last, in index order.
    k : int
        0 <= k <= n

    Returns
    -------
    Tensor [B, k] or [k], int64

    Raises
    ------
    ValueError
        On another rank, or if k is out of range.
    """
    check(scores.dim() in (1, 2), "methods", "scores", f"of shape {list(scores.shape)}", "of shape [.., n]")
    check(0 <= k <= scores.shape[-1], "methods", "k", k, f"0 to the {scores.shape[-1]} tokens")
    if k == 0:
        return scores.new_empty((*scores.shape[:-1], 0), dtype=torch.int64)
    return exclusive_bottomk(-scores.float().unsqueeze(-2), [k]).sort(-1).values


def finite_argmax(scores: Tensor) -> Tensor:
    """Index [..] of the highest of scores [.., n], the first of equals; of one that is not finite only if all are."""
    return torch.where(scores.isfinite(), scores.float(), -torch.inf).argmax(-1)


def all_indices(features: Tensor) -> Tensor:
    """All indices [.., n] of features [.., n, D]."""
    *batch, tokens, _ = features.shape
    return torch.arange(tokens, device=features.device).repeat(*batch, 1).view(*batch, tokens)


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without a host synchronisation: from pinned memory on CUDA."""
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


def check_features(op: str, features: Tensor, k: int | None = None) -> None:
    """features [n, D] or [B, n, D]; with k, 1 <= k <= n."""
    fits = isinstance(features, Tensor) and features.dim() in (2, 3) and features.dtype in DTYPES
    check(fits, op, "features", _describe(features), "float32, float16 or bfloat16 of shape [.., n, D]")
    if k is not None:
        tokens = features.shape[-2]
        check(is_int(k) and 1 <= k <= tokens, op, "k", k, f"1 to the {tokens} tokens")


def check_image(op: str, image: Image) -> None:
    """Dtypes and shapes of an Image, and that its fields fit together."""
    features, attention, thumbnail, frames, index = image
    check_features(op, features)
    tokens = features.shape[-2]
    if attention is not None:
        shape = list(features.shape[:-1])
        fits = isinstance(attention, Tensor) and list(attention.shape) == shape and attention.is_floating_point()
        check(fits, op, "image.cls_attention", _describe(attention), f"float of shape {shape}")
    if thumbnail is not None:
        fits = len(thumbnail) == 2 and 0 <= thumbnail[0] < thumbnail[1] <= tokens
        check(fits, op, "image.thumbnail", thumbnail, f"(start, end) of some of the {tokens} tokens")
    if frames is not None:
        fits = is_int(frames) and frames >= 1 and tokens % frames == 0
        check(fits, op, "image.frames", frames, f"a divisor of the {tokens} tokens")
    check(is_int(index) and index >= 0, op, "image.index", repr(index), "an int of at least 0")


def is_int(value: object) -> TypeGuard[int]:
    """Whether a setting is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _describe(value):
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
