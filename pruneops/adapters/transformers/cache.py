"""The state of a request: its cache, whose layers remember what they no longer hold, and its statistics."""

import dataclasses
import functools
from contextvars import ContextVar

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...ops import kv_compact_
from .models import UnsupportedError
from .token_layout import spans_from_counts

ACTIVE = ContextVar("pruneops_pass", default=None)  # the pass that this thread or task is in


class PrunedLayer(DynamicLayer):
    """Keys and values of one layer, some of whose tokens were removed.

    Attributes
    ----------
    request : Request
    group : int
        Layers of one group hold the same tokens.
    removed : int
        How many tokens shorter it is than the text.
    prompt : int
        How many of its tokens are the prompt's.
    valid : Tensor [B, n], bool, or None
        Which of its first n tokens may be attended to (None: all). Of later ones the attention mask says it.
    visual : Tensor [B, n], bool, or None
        Which of them are an image's, where the method removes tokens between steps.
    """

    request, group, removed, prompt, valid, visual = None, 0, 0, 0, None, None

    @property
    def size(self):
        return super().get_seq_length()

    def get_seq_length(self, *_):
        return self.size + self.removed

    def get_mask_sizes(self, query_length):
        self._check_patched()
        length = query_length if isinstance(query_length, int) else len(query_length)  # positions, before 5.5
        return self.size + length, self.removed

    def update(self, key_states, value_states, *args, **kwargs):
        self._check_patched()
        return super().update(key_states, value_states, *args, **kwargs)

    def _check_patched(self):
        request = self.request
        if request is not None and getattr(ACTIVE.get(), "request", None) is not request and not request.is_plain():
            raise UnsupportedError(
                "pruneops: this cache was pruned so that only a patched model knows its masks; call pruneops.patch "
                "again to go on with it, or begin anew with the whole conversation"
            )

    def reset(self):
        self.keys = self.values = None
        self.is_initialized = False
        self.request = self.valid = self.visual = None
        self.group = self.removed = self.prompt = 0

    def crop(self, length):
        """Remove the last -length tokens or, before 5.15, those from position `length` on; none of an image's."""
        count = -length if length <= 0 else max(self.get_seq_length() - length, 0)
        if not count or not self.size:
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

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._each_flag(lambda flags: flags[beam_idx.to(flags.device)])

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._each_flag(lambda flags: flags.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._each_flag(lambda flags: flags[indices])


class Request:
    """What one prompt, and what is generated from it, knows about itself.

    needs_masks: whether later passes need masks that the model would not make: rows are padded, or layers differ in
    length. unread: flags of padding that the first pass had no need to read. maybe_padded: a later pass brought several
    tokens and a mask.
    """

    def __init__(self, method, layers):
        self.method, self.step, self.needs_masks, self.unread = method, 0, False, None
        self.maybe_padded = False
        self.length, self.last_visual = 0, []  # of the prompt; of every row, position of the last visual token
        self.asks_between_steps = getattr(method, "at_step", None) is not None
        self.stats = Stats([], [[]] * layers, [0] * layers)

    @functools.cached_property
    def text_after_images(self):
        """Tokens of the prompt after all images, in the row that has fewest. Read once, where a cache is cropped."""
        return self.length - 1 - int(torch.cat(self.last_visual).max().cpu().numpy())

    def is_plain(self):
        """Whether the model goes on from here without help. Reads the padding, once."""
        if self.unread is not None:
            self.needs_masks, self.unread = not self.unread.cpu().numpy().all(), None
        return not self.needs_masks and not self.asks_between_steps


def request_of(cache):
    """The request that a cache belongs to; none after `reset`."""
    layers = getattr(cache, "layers", None)
    return getattr(layers[0], "request", None) if layers else None


@dataclasses.dataclass
class Stats:
    """Of one request.

    Attributes
    ----------
    images : list
        Tokens that each image came with, for every row of the batch.
    kept : list
        The same for every layer of the decoder: what is left of each image.
    kv_bytes : list
        Keys and values that each layer holds after the prompt, or after tokens were removed later.
    kv_bytes_unpruned : int
        What a layer would hold of the prompt.
    seconds : float
        Spent on selection; see `Handle.clock`.
    """

    images: list
    kept: list
    kv_bytes: list
    kv_bytes_unpruned: int = 0
    seconds: float = 0.0

    @property
    def totals(self):
        """Visual tokens that each layer holds."""
        return [sum(map(sum, rows)) for rows in self.kept]

    def to_dict(self):
        """Fit for JSON."""
        return dataclasses.asdict(self)

    def __str__(self):
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
    """The cache of a request that begins, or a new one."""
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
    """Ask the method, where it has a say between steps, and compact the caches of the layers.

    Counts may depend on values there, so they are read.
    """
    for i, layer in enumerate(layers):
        visual, valid = layer.visual, layer.valid
        more = layer.size - visual.shape[1]
        visual = torch.nn.functional.pad(visual, (0, more), value=False)
        valid = torch.ones_like(visual) if valid is None else torch.nn.functional.pad(valid, (0, more), value=True)
        counts = visual.sum(1).tolist()
        ranks = [request.method.at_step(request.step, i, count) for count in counts]
        if all(own is None or len(own) == count for own, count in zip(ranks, counts)):
            continue
        stays = valid & ~visual
        for row, places, own in zip(stays, visual, ranks):
            kept = places.nonzero()[:, 0]
            row.index_fill_(0, kept if own is None else kept[own.to(kept.device)], True)
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
            row if own is None else [int(((own >= first) & (own < end)).sum()) for first, end in spans_from_counts(row)]
            for row, own in zip(request.stats.kept[i], ranks)
        ]
        request.stats.kv_bytes[i] = kv_bytes(layer)


def kv_bytes(layer):
    return 0 if layer.keys is None else 2 * layer.keys.numel() * layer.keys.element_size()
