"""The state of a request: its cache, whose layers know which tokens were removed, and its statistics."""

import dataclasses
import functools
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...methods import Method
from ...ops import kv_compact_
from .models import UnsupportedError
from .token_layout import spans_from_counts

ACTIVE: ContextVar[Any] = ContextVar("pruneops_pass", default=None)  # the `Pass` of this thread or task, or None


class PrunedLayer(DynamicLayer):
    """Keys and values of one layer, some of whose tokens were removed.

    Attributes
    ----------
    request : Request
        The request that the cache belongs to.
    group : int
        Layers of one group hold the same tokens.
    removed : int
        Tokens that were removed: length of the text minus length of the cache.
    prompt : int
        How many of its tokens belong to the prompt.
    valid : Tensor [B, n], bool, or None
        Which of its first n tokens may be attended to (None: all). For later ones see the attention mask.
    visual : Tensor [B, n], bool, or None
        Which of these tokens belong to an image; only for methods that remove tokens between decode steps.
    """

    request: Any = None
    group: int = 0
    removed: int = 0
    prompt: int = 0
    valid: Tensor | None = None
    visual: Tensor | None = None

    @property
    def size(self) -> int:
        """Tokens that the layer holds."""
        return super().get_seq_length()

    def get_seq_length(self, *_: Any) -> int:
        """Length of the text, removed tokens included."""
        return self.size + self.removed

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        self._check_patched()
        length = query_length if isinstance(query_length, int) else len(query_length)  # positions before 5.5
        return self.size + length, self.removed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._check_patched()
        return super().update(key_states, value_states, *args, **kwargs)

    def _check_patched(self):
        request = self.request
        if request is not None and getattr(ACTIVE.get(), "request", None) is not request and not request.is_plain():
            raise UnsupportedError(
                "pruneops: this cache was pruned so that only a patched model knows its masks; call pruneops.patch "
                "again to go on with it, or begin anew with the whole conversation"
            )

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.request = self.valid = self.visual = None
        self.group = self.removed = self.prompt = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as many as the absolute value; never tokens of an image.

        Before 5.15 a positive argument is the length that remains.
        """
        length = tokens_to_remove
        count = -length if length <= 0 else max(self.get_seq_length() - length, 0)
        if not count or not self.size or self.keys is None or self.values is None:
            return
        size = self.size - count
        if size < self.prompt:
            if size < self.prompt - self.request.text_after_images:
                raise UnsupportedError("pruneops: pruned images cannot be cropped; begin anew with a shorter prompt")
            self.prompt = size
            self._each_flag(lambda flags: flags[:, :size])
        self.keys, self.values = self.keys[..., :size, :], self.values[..., :size, :]

    def _each_flag(self, change):
        self.valid, self.visual = (None if flags is None else change(flags) for flags in (self.valid, self.visual))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._each_flag(lambda flags: flags[beam_idx.to(flags.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each_flag(lambda flags: flags.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._each_flag(lambda flags: flags[indices])


class Request:
    """The state of one prompt and what is generated from it.

    Attributes
    ----------
    needs_masks : bool
        Whether later passes need masks that the model would not make: rows are padded, or layers differ in length.
    unread_padding : Tensor or None
        Flags of valid tokens that the first pass did not have to read.
    maybe_padded : bool
        A later pass brought several tokens and a mask.
    length : int
        Of the prompt.
    last_visual : list of Tensor
        Position of the last visual token of every row.
    """

    def __init__(self, method: Method, layers: int) -> None:
        self.method, self.step, self.needs_masks, self.maybe_padded = method, 0, False, False
        self.unread_padding: Tensor | None = None
        self.length = 0
        self.last_visual: list[Tensor] = []
        self.prunes_between_steps = getattr(method, "at_step", None) is not None
        self.stats = Stats([], [[]] * layers, [0] * layers)

    @functools.cached_property
    def text_after_images(self) -> int:
        """Tokens of the prompt after all images, in the row that has fewest. Read once, where a cache is cropped."""
        return self.length - 1 - int(torch.cat(self.last_visual).max().cpu().numpy())

    def is_plain(self) -> bool:
        """Whether the unpatched model could continue. Reads the padding, once."""
        if self.unread_padding is not None:
            self.needs_masks, self.unread_padding = not self.unread_padding.cpu().numpy().all(), None
        return not self.needs_masks and not self.prunes_between_steps


def request_of(cache):
    """The request that a cache belongs to; None after `reset`."""
    layers = getattr(cache, "layers", None)
    return getattr(layers[0], "request", None) if layers else None


@dataclasses.dataclass
class Stats:
    """Statistics of one request.

    Attributes
    ----------
    images : list
        Tokens of each image before pruning, for every row of the batch.
    kept : list
        Tokens left of each image, for every layer of the decoder and every row.
    kv_bytes : list
        Bytes of keys and values of each layer after the prompt, or after tokens were removed later.
    kv_bytes_unpruned : int
        Bytes that a layer would hold of the prompt without pruning.
    seconds : float
        Time spent on selection; see `Handle.clock`.
    """

    images: list[list[int]]
    kept: list[list[list[int]]]
    kv_bytes: list[int]
    kv_bytes_unpruned: int = 0
    seconds: float = 0.0

    @property
    def totals(self) -> list[int]:
        """Visual tokens that each layer holds."""
        return [sum(map(sum, rows)) for rows in self.kept]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-serialisable dictionary."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        heads = f"visual tokens of {sum(map(sum, self.images))}", f"KV bytes of {self.kv_bytes_unpruned}"
        lines = ["layer  " + "  ".join(heads)]
        for i, row in enumerate(zip(self.totals, self.kv_bytes)):
            lines.append(f"{i:5}  " + "  ".join(f"{value:{len(head)}}" for value, head in zip(row, heads)))
        return "\n".join([*lines, f"selection: {1e3 * self.seconds:.1f} ms"])


def check_windows(decoder):
    if any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=decoder.config).layers):
        raise UnsupportedError(
            "pruneops: a decoder with sliding-window layers cannot be pruned inside; use pruneops.prepare with a "
            "method that prunes after the projector"
        )


def prunable_cache(cache, decoder):
    """The cache that a new request fills: the given one, or a new one."""
    cache = DynamicCache(config=decoder.config) if cache is None else cache
    kinds = [type(layer) for layer in getattr(cache, "layers", ())] or [
        getattr(cache, "layer_class_to_replicate", None)
    ]
    unfit = [kind for kind in kinds if kind not in (DynamicLayer, PrunedLayer)]
    if unfit or not hasattr(cache, "layers") or getattr(cache, "offloading", False):
        what = type(cache).__name__
        raise UnsupportedError(
            f"pruneops: a {'offloaded ' * bool(getattr(cache, 'offloading', False))}{what} cannot be pruned; generate "
            "with the default DynamicCache, or use pruneops.prepare"
        )
    return cache


def remove_between_steps(request, layers):
    """Compact the caches of the layers to the tokens that the method's `at_step` keeps.

    Counts may depend on values here, so the host reads them.
    """
    for i, layer in enumerate(layers):
        visual, valid = layer.visual, layer.valid
        more = layer.size - visual.shape[1]
        visual = torch.nn.functional.pad(visual, (0, more), value=False)
        valid = torch.ones_like(visual) if valid is None else torch.nn.functional.pad(valid, (0, more), value=True)
        counts = visual.sum(1).tolist()
        ranks = [request.method.at_step(request.step, i, count) for count in counts]
        if all(chosen is None or len(chosen) == count for chosen, count in zip(ranks, counts)):
            continue
        stays = valid & ~visual
        for row, flags, chosen in zip(stays, visual, ranks):
            places = flags.nonzero()[:, 0]
            row.index_fill_(0, places if chosen is None else places[chosen.to(places.device)], True)
        lengths = stays.sum(1)
        longest = int(lengths.max())
        index = (~stays).byte().argsort(dim=1, stable=True)[:, :longest]  # kept tokens first, in order
        kv_compact_([layer.keys, layer.values], index, lengths=lengths)
        layer.removed += layer.size - longest
        layer.keys, layer.values = layer.keys[:, :, :longest], layer.values[:, :, :longest]
        layer.visual, layer.prompt = visual.gather(1, index) & stays.gather(1, index), longest
        layer.valid, layer.group = stays.gather(1, index), i
        request.needs_masks = True
        request.stats.kept[i] = [
            sizes if chosen is None else count_in_spans(chosen, spans_from_counts(sizes))
            for sizes, chosen in zip(request.stats.kept[i], ranks)
        ]
        request.stats.kv_bytes[i] = kv_bytes(layer)


def count_in_spans(ranks, spans):
    """How many of the ranks lie in each span (first, last + 1)."""
    return [int(((ranks >= first) & (ranks < end)).sum()) for first, end in spans]


def kv_bytes(layer):
    return 0 if layer.keys is None else 2 * layer.keys.numel() * layer.keys.element_size()
