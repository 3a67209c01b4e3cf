"""The state of a request: its cache, whose layers know which tokens were removed, and its statistics."""

import dataclasses
import functools
from contextvars import ContextVar
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...methods import Method, Step
from ...methods.base import IMAGE, RESPONSE
from ...ops import kv_compact_
from .models import UnsupportedError

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
        How many of its first tokens the next two describe: those of the prompt, and later ones that it held when
        tokens were removed last.
    valid : Tensor [B, n], bool, or None
        Which of these n tokens may be attended to (None: all). For later ones see the attention mask.
    origin : Tensor [B, n], int64, or None
        Number of a visual token among those of its prompt; -1 - group of another (`pruneops.methods.Step`). Only for
        methods that remove tokens while text is generated, as the next two.
    decided : Tensor [B, m, N], bool, or None
        Which of a prompt's N visual tokens are left after each of the last m tokens. They go before the next pass. Only
        in the first layer that loses tokens.
    right_padded : bool
        Rows have padding at the end of the n tokens.
    """

    request: Any = None
    group: int = 0
    removed: int = 0
    prompt: int = 0
    valid: Tensor | None = None
    origin: Tensor | None = None
    decided: Tensor | None = None
    right_padded: bool = False

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
        self.request = self.valid = self.origin = self.decided = None
        self.group = self.removed = self.prompt = 0
        self.right_padded = False

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
            if self.right_padded or size < self.prompt - self.request.text_after_images:
                raise UnsupportedError("pruneops: pruned images cannot be cropped; begin anew with a shorter prompt")
            self.prompt = size
            self.valid = None if self.valid is None else self.valid[:, :size]
            self.origin = None if self.origin is None else self.origin[:, :size]
        if self.decided is not None:
            self.decided = self.decided[:, : max(self.decided.shape[1] - count, 0)]
        self.keys, self.values = self.keys[..., :size, :], self.values[..., :size, :]

    def _each_row(self, change):
        for name in ("valid", "origin", "decided"):
            state = getattr(self, name)
            setattr(self, name, None if state is None else change(state))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._each_row(lambda state: state[beam_idx.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each_row(lambda state: state.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._each_row(lambda state: state[indices])

    def origins(self, length: int) -> Tensor:
        """`origin` of its first `length` tokens, later ones included, where its keys are."""
        origin: Any = self.origin
        origin = torch.nn.functional.pad(origin, (0, length - origin.shape[1]), value=-1 - RESPONSE)
        return origin if self.keys is None else origin.to(self.keys.device)


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
    visual : int
        N, the visual tokens of a prompt before layers of the decoder removed some; in the row that has most.
    images : list
        First and last + 1 of each image among them, for every row.
    step_layer : int
        The layer from which on tokens are removed while text is generated, if `prunes_between_steps`.
    """

    def __init__(self, method: Method, layers: int) -> None:
        self.method, self.needs_masks, self.maybe_padded = method, False, False
        self.unread_padding: Tensor | None = None
        self.length = 0
        self.last_visual: list[Tensor] = []
        self.visual, self.images = 0, []
        removing: Any = method
        self.prunes_between_steps = getattr(method, "at_step", None) is not None
        self.step_layer = removing.step_layer(layers) if self.prunes_between_steps else 0
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


def decide(request, layers, valid, captured, new):
    """bool [B, new, N]: which visual tokens the layers from `step_layer` on hold after each of the new tokens.

    valid: bool [B, S + new], which tokens may be attended to in the layer before, new ones included; those that may not
    (padding) decide nothing. captured: the query and key there, or None.
    """
    first = layers[request.step_layer]
    reference = layers[max(request.step_layer - 1, 0)]
    query, key = (None, reference.keys) if captured is None else captured
    size, steps = key.shape[2], []
    later = new if request.step_layer else 0  # of the new tokens, those that are among the keys
    origin = reference.origins(size)
    valid, visual = valid.to(key.device), origin >= 0
    group = torch.where(visual, IMAGE, -1 - origin).masked_fill(~valid[:, :size], -1)
    held = held_tokens(first.origins(first.size).to(key.device), request.visual)
    for i in range(new):
        end = size - max(later - 1 - i, 0)
        alive = visual[:, :end] & held.gather(1, origin[:, :end].clamp(min=0))
        step = Step(
            query=None if query is None else query[:, :, i : i + 1],
            key=key[:, :, :end],
            group=group[:, :end],
            alive=alive,
            tokens=visual.sum(1),
            generated=first.get_seq_length() - request.length + 1 + i,
        )
        keep = (request.method.at_step(step) | ~valid[:, i - new, None]) & alive
        held = held_tokens(origin[:, :end].masked_fill(~keep, -1), request.visual)
        steps.append(held)
    return torch.stack(steps, 1)


def held_tokens(origin, count):
    """bool [B, count]: the numbers from 0 that occur in origin [B, S]; negative ones do not count."""
    index = origin.masked_fill(origin < 0, count)
    flags = torch.zeros(len(origin), count + 1, dtype=torch.bool, device=origin.device)
    return flags.scatter_(1, index, True)[:, :count]


def remove_decided(request, layers, valid_tokens):
    """Compact the caches of the layers from `step_layer` on, to what was decided after the last token.

    valid_tokens(layer): bool [B, size], which of its tokens may be attended to. Lengths depend on values, so the host
    reads them, in one copy.
    """
    decided, layers[request.step_layer].decided = layers[request.step_layer].decided, None
    if decided is None or not decided.shape[1]:
        return
    groups: dict[Any, list[int]] = {}  # layers with the same tokens
    for i, layer in enumerate(layers[request.step_layer :], request.step_layer):
        groups.setdefault((layer.group, layer.keys.device), []).append(i)
    plans = [removal(layers[members[0]], decided[:, -1], valid_tokens) for members in groups.values()]
    facts = torch.stack([facts.to(decided.device) for _, facts in plans]).cpu().numpy()
    for members, (stays, _), (before, after, *visual) in zip(groups.values(), plans, facts.transpose(0, 2, 1)):
        if (before != after).any():
            sizes = [
                [int(row[first:end].sum()) for first, end in spans]
                for row, spans in zip(numpy.stack(visual, 1), request.images)
            ]
            compact_layers(layers, members, stays, after.tolist(), request.maybe_padded)
            request.needs_masks = True
            for i in members:
                request.stats.kept[i], request.stats.kv_bytes[i] = sizes, kv_bytes(layers[i])


def removal(layer, held, valid_tokens):
    """(bool [B, size]: the tokens of a layer that stay; int64 [B, 2 + N]: how many it has, how many stay, and which of
    the prompt's visual tokens)."""
    valid, origin = valid_tokens(layer), layer.origins(layer.size)
    held = held.to(origin.device)
    stays = valid & ((origin < 0) | held.gather(1, origin.clamp(min=0)))
    visual = held_tokens(origin.masked_fill(~stays, -1), held.shape[1])
    return stays, torch.cat([valid.sum(1, keepdim=True), stays.sum(1, keepdim=True), visual.long()], 1)


def compact_layers(layers, members, stays, lengths, maybe_padded):
    """Keep the tokens `stays` [B, size] of layers that hold the same; lengths: how many of each row.

    maybe_padded: the attention mask may hide later tokens, which are gone now, so it does not fit what is left of them.
    """
    longest, first = max(lengths), layers[members[0]]
    index = (~stays).byte().argsort(dim=1, stable=True)[:, :longest]  # kept tokens first, in order
    caches = [cache for i in members for cache in (layers[i].keys, layers[i].values)]
    kv_compact_(caches, index, lengths=stays.sum(1))
    valid = stays.gather(1, index)
    origin = first.origins(first.size).gather(1, index).masked_fill(~valid, -1 - RESPONSE)
    for i in members:
        layer = layers[i]
        layer.removed += layer.size - longest
        layer.keys, layer.values = layer.keys[:, :, :longest], layer.values[:, :, :longest]
        layer.origin, layer.prompt, layer.group = origin, longest, members[0]
        layer.right_padded = min(lengths) < longest
        layer.valid = valid if layer.right_padded or maybe_padded else None


def count_in_spans(ranks, spans):
    """How many of the ranks lie in each span (first, last + 1)."""
    return [int(((ranks >= first) & (ranks < end)).sum()) for first, end in spans]


def kv_bytes(layer):
    return 0 if layer.keys is None else 2 * layer.keys.numel() * layer.keys.element_size()
