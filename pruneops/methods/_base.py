"""What every method shares: settings that travel as JSON, budgets, what a method is shown, choices from scores."""

import dataclasses
import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..checks import DTYPES, check
from ..ops import exclusive_bottomk

SCHEMA = 1
METHODS = {}  # name -> class


class Image(NamedTuple):
    """An image after the projector, or a batch of images with equally many tokens.

    Parameters
    ----------
    features : Tensor [.., n, D], float32, float16 or bfloat16
        Visual tokens as the decoder will get them; at most one batch dimension.
    cls_attention : Tensor [.., n], optional
        Attention from [CLS] to each token in the vision tower's last layer (`cls_attention`). For a tower without
        [CLS] the caller may put a stand-in here, such as the mean attention received (`mean_attention`).
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
        Of the layer before, after rotary embedding; read by methods whose `needs` names it, like the next two.
    key : Tensor [Hk, S, Dh], optional
    norm : callable, optional
        The decoder's final norm, to be applied to hidden.
    visual : Tensor [n], int64
        Ascending positions of the visual tokens that are still there.
    images : sequence of (int, int)
        First and last + 1 rank within `visual` of each image, one after another from 0 to n.
    sizes : sequence of int
        Tokens that each image had before any pruning.
    """

    hidden: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    norm: Callable[[Tensor], Tensor] | None = None
    visual: Tensor | None = None
    images: tuple[tuple[int, int], ...] = ()
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A pruning method: its settings, and where and what it prunes.

    All settings are checked when the object is made (ValueError). Methods keep tokens in ascending order; original
    positions are the caller's to keep.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls

    @property
    def after_projector(self):
        """Whether it prunes images between the projector and the decoder."""
        return False

    @property
    def reads(self):
        """What `select` reads of an Image beside features, where it is there: frozenset({"cls_attention"}) or empty."""
        return self.requires

    @property
    def requires(self):
        """What it cannot do without."""
        return frozenset()

    @property
    def needs(self):
        """What `at_layer` reads of a Row besides hidden: a frozenset of "query", "key" and "norm"."""
        return frozenset()

    def budget(self, tokens):
        """How many of an image's `tokens` its settings keep; ToDRE's stage 2, which looks at content, is not in it."""
        raise NotImplementedError

    def layers(self, count):
        """The layers, ascending from 0, of a decoder of `count` layers at whose input it prunes."""
        check(is_int(count) and count >= 1, self._who, "count", repr(count), "an int of at least 1")
        return self._layers(count)

    @without_autocast
    def select(self, image):
        """Choose tokens of an image after the projector; all of them if the method does not prune there.

        Parameters
        ----------
        image : Image

        Returns
        -------
        Tensor [.., k], int64
            Ascending; k is `budget(n)`, the same for every row of a batch.

        Raises
        ------
        ValueError
            On shapes that do not fit, or if the image lacks what the method looks at.
        """
        check_image(self._who, image)
        tokens = image.features.shape[-2]
        k = self.budget(tokens) if self.after_projector else tokens
        return every_token(image.features) if k == tokens else self._select(image, k)

    @without_autocast
    def select_each(self, images):
        """`select` for each image of a request, of any sizes; the i-th counts as number i.

        Parameters
        ----------
        images : sequence of Image
            Without a batch dimension.

        Returns
        -------
        list of Tensor [k_i], int64
        """
        return self._select_each([image._replace(index=i) for i, image in enumerate(images)])

    @without_autocast
    def at_layer(self, layer, row, count):
        """Choose among the visual tokens of a prompt at the input of a decoder layer.

        Parameters
        ----------
        layer : int
            From 0; where it is none of `layers(count)`, everything is kept.
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
            On shapes that do not fit, or if the row lacks what the method `needs`.
        """
        if layer not in self.layers(count):
            return None
        self._check_row(row)
        return self._at_layer(row) if row.visual.shape[0] else None

    def to_json(self):
        """The settings as JSON: {"schema": 1, "method": its name, setting: value, ...}."""
        return json.dumps({"schema": SCHEMA, "method": self.name, **self._settings()})

    @classmethod
    def from_json(cls, text):
        """The method that `to_json` wrote; on a subclass, a method of that class. See the function `from_json`."""
        method = from_json(text)
        check(isinstance(method, cls), f"methods.{cls.__name__}.from_json", "method", repr(method.name), _named(cls))
        return method

    @property
    def _who(self):
        return f"methods.{type(self).__name__}"

    def _settings(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _layers(self, count):
        return ()

    def _select(self, image, k):
        raise NotImplementedError

    def _select_each(self, images):
        return [self.select(image) for image in images]

    def _at_layer(self, row):
        raise NotImplementedError

    def _check_setting(self, setting, fits, expected):
        check(fits, self._who, setting, repr(getattr(self, setting)), expected)

    def _check_layer(self):
        self._check_setting("layer", is_int(self.layer) and self.layer >= 1, "an int of at least 1")

    def _one_layer(self, count):
        check(self.layer < count, self._who, "layer", self.layer, f"one of the decoder's layers, 0 to {count - 1}")
        return (self.layer,)

    def _check_row(self, row):
        visual = row.visual
        check(row.hidden.dim() == 2, self._who, "row.hidden", _described(row.hidden), "of shape [S, D]")
        length = row.hidden.shape[0]
        for name in sorted(self.needs):
            check(getattr(row, name) is not None, self._who, f"row.{name}", None, "given: this method reads it")
        for name in ("query", "key"):
            tensor = getattr(row, name)
            if name in self.needs:
                fits = tensor.dim() == 3 and tensor.shape[1] == length
                check(fits, self._who, f"row.{name}", f"of shape {list(tensor.shape)}", f"of shape [H, {length}, Dh]")
        fits = isinstance(visual, Tensor) and visual.dim() == 1 and visual.dtype == torch.int64
        check(fits, self._who, "row.visual", _described(visual), "int64 of rank 1")
        ends = [0, *(end for _, end in row.images)]
        fits = [start for start, _ in row.images] == ends[:-1] and ends == sorted(ends) and ends[-1] == len(visual)
        wanted = f"one range after another from 0 to the {len(visual)} visual tokens"
        check(fits, self._who, "row.images", list(row.images), wanted)
        fits = len(row.sizes) == len(row.images) and all(
            size >= end - start for size, (start, end) in zip(row.sizes, row.images)
        )
        check(fits, self._who, "row.sizes", list(row.sizes), "one an image, no less than the tokens still there")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgeted(Method):
    """A method that keeps a given part of every image.

    Parameters
    ----------
    keep : float or int
        Of every image: a float is a share in (0, 1], an int a count of at least 1. So 1.0 is all tokens, 1 is one.
    """

    keep: float | int

    def __post_init__(self):
        share = isinstance(self.keep, float) and 0 < self.keep <= 1
        count = is_int(self.keep) and self.keep >= 1
        self._check_setting("keep", share or count, "a share (float) in (0, 1] or a count (int) of at least 1")

    def budget(self, tokens):
        """How many of an image's tokens are kept.

        A count is capped at `tokens`. A share is taken exactly as it prints (0.1 is one tenth) and its product with
        `tokens` rounded to the nearest integer, halves up; at least 1 of an image that has any.
        """
        check(is_int(tokens) and tokens >= 0, self._who, "tokens", repr(tokens), "an int of at least 0")
        k = self.keep if is_int(self.keep) else math.floor(part_of(self.keep, tokens) + Fraction(1, 2))
        return min(max(k, 1), tokens)

    def _per_image(self, row, choose):
        """choose(start, end, k, size) -> ascending ranks within the image, for each image that has too many."""
        kept, all_of_it = [], True
        for (start, end), size in zip(row.images, row.sizes):
            k = min(self.budget(size), end - start)
            if k == end - start:
                kept.append(torch.arange(start, end, device=row.visual.device))
            else:
                all_of_it = False
                kept.append(choose(start, end, k, size) + start)
        return None if all_of_it else torch.cat(kept)


def from_json(text):
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
    who = "methods.from_json"
    try:
        settings = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"pruneops.{who}: text must be JSON: {error}") from None
    check(isinstance(settings, dict), who, "text", type(settings).__name__, "a JSON object")
    schema, name = settings.pop("schema", None), settings.pop("method", None)
    check(is_int(schema) and schema == SCHEMA, who, "schema", repr(schema), f"{SCHEMA}, the only one so far")
    check(isinstance(name, str) and name in METHODS, who, "method", repr(name), f"one of {', '.join(sorted(METHODS))}")
    fields = dataclasses.fields(METHODS[name])
    known = [field.name for field in fields]
    for setting in settings:
        check(setting in known, who, "setting", repr(setting), f"one of {name}'s: {', '.join(known)}")
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        check(not required or field.name in settings, who, field.name, "nothing", f"given for {name}")
    return METHODS[name](**settings)


def part_of(share, whole):
    """share * whole as an exact fraction, the share taken as it prints."""
    return Fraction(str(float(share))) * whole


def is_share(value):
    """Whether a setting is a float in (0, 1), 1 excluded."""
    return isinstance(value, float) and 0 < value < 1


def largest(scores, k):
    """The k tokens of greatest score, ascending.

    Parameters
    ----------
    scores : Tensor [B, n] or [n], float
        Ranked in float32; ties go to the lowest index, scores that are not finite come last, in index order.
    k : int
        0 <= k <= n

    Returns
    -------
    Tensor [B, k] or [k], int64
    """
    check(scores.dim() in (1, 2), "methods", "scores", f"of shape {list(scores.shape)}", "of shape [.., n]")
    check(0 <= k <= scores.shape[-1], "methods", "k", k, f"0 to the {scores.shape[-1]} tokens")
    if k == 0:
        return scores.new_empty((*scores.shape[:-1], 0), dtype=torch.int64)
    return exclusive_bottomk(-scores.float().unsqueeze(-2), [k]).sort(-1).values


def greatest(scores):
    """Index [..] of the greatest of scores [.., n], the first of equals; one that is not finite only if all are."""
    return torch.where(scores.isfinite(), scores.float(), -torch.inf).argmax(-1)


def every_token(features):
    """All indices [.., n] of features [.., n, D]."""
    *batch, tokens, _ = features.shape
    return torch.arange(tokens, device=features.device).repeat(*batch, 1).view(*batch, tokens)


def uploaded(tensor, device):
    """A tensor of the host on a device; the host does not wait for the copy, which takes pinned memory on CUDA."""
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


def check_features(who, features, k=None):
    """features [n, D] or [B, n, D]; with k, 1 <= k <= n."""
    fits = isinstance(features, Tensor) and features.dim() in (2, 3) and features.dtype in DTYPES
    check(fits, who, "features", _described(features), "float32, float16 or bfloat16 of shape [.., n, D]")
    if k is not None:
        tokens = features.shape[-2]
        check(is_int(k) and 1 <= k <= tokens, who, "k", k, f"1 to the {tokens} tokens")


def check_image(who, image):
    """An Image whose parts fit together."""
    features, attention, thumbnail, frames, index = image
    check_features(who, features)
    tokens = features.shape[-2]
    if attention is not None:
        shape = list(features.shape[:-1])
        fits = isinstance(attention, Tensor) and list(attention.shape) == shape and attention.is_floating_point()
        check(fits, who, "image.cls_attention", _described(attention), f"float of shape {shape}")
    if thumbnail is not None:
        fits = len(thumbnail) == 2 and 0 <= thumbnail[0] < thumbnail[1] <= tokens
        check(fits, who, "image.thumbnail", thumbnail, f"(start, end) of some of the {tokens} tokens")
    if frames is not None:
        fits = is_int(frames) and frames >= 1 and tokens % frames == 0
        check(fits, who, "image.frames", frames, f"a divisor of the {tokens} tokens")
    check(is_int(index) and index >= 0, who, "image.index", repr(index), "an int of at least 0")


def is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _named(cls):
    return f"{cls.name!r}" if "name" in cls.__dict__ else f"a {cls.__name__}"


def _described(value):
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
