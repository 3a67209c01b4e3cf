"""Pruning inside transformers models, release 5.0 and later: hooks, and caches that remember what they no longer hold.

A request begins when a forward pass meets visual tokens and an empty cache. Its state is the cache: every layer becomes
a `PrunedLayer`, which knows which of its tokens are visual or padding and how many were removed. Tokens are removed
after the projector (before the decoder), before chosen layers, and between steps of generation. Positions are
never renumbered, and the model's attention implementation stays as it is: where a method needs queries, one attention
module is watched in prefill. While nothing has been removed the model computes what it always did, to the bit.
"""

import contextlib
import dataclasses
import inspect
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..methods import Image, Row
from ..ops import gather_tokens, kv_compact_
from .tower import Tower

FAMILIES = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm",
)  # fmt: skip
WATCHED = "pruneops_watched"  # name of an attention implementation, `watched_attention`


class UnsupportedError(RuntimeError):
    """What was asked for cannot be pruned; the message says why and what to do."""


class PrunedLayer(DynamicLayer):
    """Keys and values of one layer, some of whose tokens were removed.

    Attributes
    ----------
    removed : int
        How many tokens shorter it is than the text.
    valid, visual : Tensor [B, S], bool, or None
        Which of its first S tokens may be attended to (None: all), and which are an image's. Later ones are text.
    """

    removed, valid, visual = 0, None, None

    def get_seq_length(self, *_):
        return super().get_seq_length() + self.removed

    def get_mask_sizes(self, query_length):
        length = query_length if isinstance(query_length, int) else len(query_length)  # positions, before 5.5
        return self.size + length, self.removed

    @property
    def size(self):
        return super().get_seq_length()

    def flags(self):
        """(valid, visual) of all its tokens, [B, size] each."""
        visual = extended(self.visual, self.size, False)
        return (torch.ones_like(visual) if self.valid is None else extended(self.valid, self.size, True)), visual

    def crop(self, tokens_to_remove):
        raise UnsupportedError("pruneops: a pruned cache cannot be cropped (assisted decoding); generate without it")

    def reset(self):
        super().reset()
        self.removed, self.valid, self.visual = 0, None, None

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


class Tokens(NamedTuple):
    """The tokens of a forward pass that are still there, [B, S] each.

    images: of each row's, (first, last + 1) among its visual tokens.
    """

    index: torch.Tensor  # in the text
    valid: torch.Tensor
    visual: torch.Tensor
    images: list
    complete: bool  # all valid


def patch(model, method):
    """Prune inside a model, in place or as a context manager.

    Parameters
    ----------
    model : PreTrainedModel
        Llava, LlavaNext, LlavaOnevision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL, Idefics3 or SmolVLM.
    method : pruneops.methods.Method
        Images are told apart by the tokens between them and, where the model's `get_image_features` gives one tensor
        an image (all but InternVL, Idefics3 and SmolVLM), by the lengths of those.

    Returns
    -------
    Handle
        `remove()`, `disabled()`, `override(keep=...)`, `stats`; also a context manager that removes itself.

    Raises
    ------
    UnsupportedError
        On an unknown architecture, or a model that is patched already. In forward passes: on caches that cannot be
        pruned (static, offloaded, quantised, sliding) and on `use_cache=False`.
    """
    expect_family("pruneops.patch", model)
    if getattr(model, "_pruneops", None) is not None:
        raise UnsupportedError("pruneops.patch: this model is patched already; call remove() of its handle first")
    AttentionInterface.register(WATCHED, watched_attention)
    return Handle(model, method)


def expect_family(who, model):
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise UnsupportedError(f"{who}: {kind} is not supported; supported are {', '.join(FAMILIES)}")


def is_visual(model, ids):
    """bool, of the shape of ids: which tokens stand for images or videos."""
    tokens = [getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
    return torch.isin(ids, torch.tensor([token for token in tokens if token is not None], device=ids.device))


class Handle:
    """A patched model. `method` may be exchanged between requests.

    `clock` measures selection: the host's seconds unless it is replaced by one that awaits the device.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, model, method):
        self.model, self.method, self.stats = model, method, []
        self.decoder = model.get_decoder()
        self._enabled, self._pass, self._ids = True, None, None
        self.tower = Tower(model)
        hooks = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_decoder, always_call=True),
        ]
        for i, layer in enumerate(self.decoder.layers):
            hooks.append(layer.register_forward_pre_hook(self._before_layer(i), with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._after_layer(i)))
        self._hooks = hooks
        model._pruneops = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()

    def remove(self):
        """Take all hooks away; the model is what it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.tower.forget()
        if getattr(self.model, "_pruneops", None) is self:
            del self.model._pruneops

    @contextlib.contextmanager
    def disabled(self):
        """Requests that begin inside are not pruned."""
        was, self._enabled = self._enabled, False
        try:
            yield self
        finally:
            self._enabled = was

    @contextlib.contextmanager
    def override(self, **settings):
        """Requests that begin inside are pruned with other settings of the method."""
        was, self.method = self.method, dataclasses.replace(self.method, **settings)
        try:
            yield self
        finally:
            self.method = was

    # Hooks

    def _before_model(self, module, args, kwargs):
        self._ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if self._enabled and cache is not None and cache.get_seq_length() > 0 and self._brings_images(kwargs):
            raise UnsupportedError(
                "pruneops: images on a cache that holds tokens already (chunked prefill, or a new image in a later "
                "turn) cannot be pruned; give all images with the first forward pass, or use handle.disabled()"
            )

    def _brings_images(self, kwargs):
        """Whether a pass has visual tokens of its own; an image-token id that was generated brings no image."""
        names = "pixel_values", "pixel_values_videos", "mm_encoder_outputs"
        given = any(kwargs.get(name) is not None for name in names)
        return given and self._ids is not None and self._ids.shape[1] > 1 and is_visual(self.model, self._ids).any()

    def _before_decoder(self, module, args, kwargs):
        self._pass = None
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        if embeds is None:
            return None
        request = getattr(cache, "_pruneops", None)
        if request is None:
            if not self._enabled or (cache is not None and cache.get_seq_length() > 0):
                return None
            visual = self._visual(embeds)
            if visual is None:
                return None
            kwargs["past_key_values"] = cache = self._own_cache(module, cache, kwargs)
            cache._pruneops = request = Request(self.method, module)
            self.stats.append(request.stats)
            self._pass = Prefill(self, request, cache, embeds, visual, kwargs)
        else:
            self._pass = Continuation(request, cache, embeds, kwargs)
        return args, self._pass.kwargs

    def _after_decoder(self, module, args, output):
        if self._pass is not None:
            self._pass.close()
        self._pass = None

    def _before_layer(self, i):
        def hook(module, args, kwargs):
            return None if self._pass is None else self._pass.before_layer(i, args, kwargs)

        return hook

    def _after_layer(self, i):
        def hook(module, args, output):
            return None if self._pass is None else self._pass.after_layer(i, output)

        return hook

    def _visual(self, embeds):
        """bool [B, S], or None if no token is an image's."""
        if self._ids is None or self._ids.shape != embeds.shape[:2]:
            return None
        visual = is_visual(self.model, self._ids)
        return visual if visual.any() else None

    def _own_cache(self, decoder, cache, kwargs):
        use_cache = kwargs.get("use_cache")
        if (decoder.config._attn_implementation or "").startswith("paged"):
            raise UnsupportedError("pruneops: continuous batching cannot be pruned; use generate")
        if cache is None and not (decoder.config.use_cache if use_cache is None else use_cache):
            raise UnsupportedError("pruneops: use_cache=False cannot be pruned; leave use_cache at True")
        if cache is None:
            cache = DynamicCache(config=decoder.config)
        plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
        if not plain or getattr(cache, "offloading", False):
            what = type(cache).__name__ if type(cache) is not DynamicCache else type(cache.layers[0]).__name__
            raise UnsupportedError(f"pruneops: a {what} cannot be pruned; generate with the default DynamicCache")
        cache.layers = [PrunedLayer() for _ in decoder.layers]
        return cache


class Request:
    """What one prompt, and what is generated from it, knows about itself; it lives on its cache."""

    def __init__(self, method, decoder):
        self.method, self.length, self.touched, self.step = method, 0, False, 0
        self.flash = "flash" in (decoder.config._attn_implementation or "")
        count = len(decoder.layers)
        self.stats = Stats([], [[]] * count, [0] * count)


@dataclasses.dataclass
class Stats:
    """Of one request.

    Attributes
    ----------
    images : list
        Tokens that each image came with, for every row of the batch.
    kept : list
        The same for every layer of the decoder: what its cache holds of each image.
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


class Continuation:
    """A forward pass on a cache that was pruned."""

    def __init__(self, request, cache, embeds, kwargs):
        self.request, self.cache, self.kwargs, self.embeds = request, cache, dict(kwargs), embeds
        mask, new = kwargs.get("attention_mask"), embeds.shape[1]
        given = isinstance(mask, torch.Tensor) and mask.dim() == 2
        valid = mask[:, -new:].bool() if given else None
        self.padding = None if valid is None or bool(valid.all()) else valid
        self.masks = {}  # layers that hold the same tokens share one
        request.step += 1
        remove_between_steps(request, cache)
        if request.touched:
            self.kwargs["attention_mask"] = None
        request.length += new

    def before_layer(self, i, args, kwargs):
        layer, new = self.cache.layers[i], self.embeds.shape[1]
        before, length = layer.valid, layer.size + new
        if self.padding is not None:
            layer.valid = torch.cat([layer.flags()[0], self.padding], 1)
        if not self.request.touched:
            return None
        key = id(before), length
        if key not in self.masks:
            valid = None if layer.valid is None else extended(layer.valid, length, True)
            self.masks[key] = attention_mask(valid, new, length, self.embeds, self.request.flash)
        kwargs["attention_mask"] = self.masks[key]
        return args, kwargs

    def after_layer(self, i, output):
        return None

    def close(self):
        pass


class Prefill:
    """The forward pass that meets the images."""

    def __init__(self, handle, request, cache, embeds, visual, kwargs):
        self.handle, self.request, self.cache, self.kwargs = handle, request, cache, dict(kwargs)
        self.method, self.changed = request.method, False
        B, S = embeds.shape[:2]
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            raise UnsupportedError("pruneops: an attention mask of rank 4 cannot be pruned; pass one of rank 2")
        valid = torch.ones_like(visual) if mask is None else mask.bool()
        index = torch.arange(S, device=embeds.device).expand(B, S)
        self.spans = handle.tower.cut([runs(row) for row in (visual & valid).tolist()])  # of images, in the text
        self.sizes = [[end - first for first, end in row] for row in self.spans]
        images = [side_by_side(row) for row in self.sizes]
        self.tokens = Tokens(index, valid, visual & valid, images, bool(valid.all()))
        request.length, request.stats.images = S, self.sizes
        self.rotary = None  # what is left of the decoder's input, once layers have removed something
        self.deepstack = self.kwargs.pop("deepstack_visual_embeds", None), self.kwargs.pop("visual_pos_masks", None)
        self.watch = {layer - 1 for layer in self.method.layers(len(cache.layers)) if "query" in self.method.needs}
        self.queries, self.watching = {}, []
        if self.method.after_projector:
            self._after_projector(embeds)

    def _after_projector(self, embeds):
        start = self.handle.clock()
        rows = []
        towers = self.handle.tower.images(self.sizes)
        for b, (spans, seen) in enumerate(zip(self.spans, towers)):
            images = [Image(embeds[b, slice(*span)], **own) for span, own in zip(spans, seen)]
            rows.append(self.method.select_each(images))
        kept = self._keep(rows)
        if kept is not None:
            positions = self.kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
            self.kwargs["inputs_embeds"], self.kwargs["position_ids"] = gather([embeds, positions], kept, [1, -1])
            # the layers get masks of their own
            self.kwargs["attention_mask"] = None
        self.request.stats.seconds += self.handle.clock() - start

    def _keep(self, rows):
        """Drop visual tokens but those of `rows`: for every row and image, ranks within it. [B, S'] or None: all."""
        tokens, kept = self.tokens, []
        counts = [[len(own) for own in row] for row in rows]
        if counts == [[end - first for first, end in row] for row in tokens.images]:
            return None
        for b, images in enumerate(tokens.images):
            stays = tokens.valid[b] & ~tokens.visual[b]
            places = tokens.visual[b].nonzero()[:, 0]
            for own, (first, end) in zip(rows[b], images):
                stays[places[first:end][own.to(places.device)]] = True
            kept.append(stays.nonzero()[:, 0])
        index, valid = left_padded(kept)
        take = lambda flags: flags.gather(1, index)  # noqa: E731
        visual = take(tokens.visual) & valid
        complete = len(set(map(len, kept))) == 1
        self.tokens = Tokens(take(tokens.index), valid, visual, [side_by_side(row) for row in counts], complete)
        self.changed = self.request.touched = True
        return index

    def before_layer(self, i, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if i in self.method.layers(len(self.cache.layers)):
            hidden = self._before_method_layer(i, hidden)
        if i in self.watch:
            self._watch(self.handle.decoder.layers[i].self_attn, i)
        tokens, layer = self.tokens, self.cache.layers[i]
        layer.removed = self.request.length - tokens.index.shape[1]
        layer.valid, layer.visual = (None if tokens.complete else tokens.valid), tokens.visual
        if not self.changed:
            return None
        kwargs["attention_mask"] = attention_mask(layer.valid, *[hidden.shape[1]] * 2, hidden, self.request.flash)
        if self.rotary is not None:  # pruned inside the decoder
            kwargs["position_embeddings"], kwargs["position_ids"] = self._placed(kwargs)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    def _placed(self, kwargs):
        """Rotary embeddings and position ids of the tokens that are left, of those the decoder made."""
        cos, sin = kwargs["position_embeddings"]
        positions = kwargs.get("position_ids")
        tensors = [cos, sin] + ([] if positions is None else [positions])
        cos, sin, *positions = gather(tensors, self.rotary, [-2, -2, -1][: len(tensors)])
        return (cos, sin), positions[0] if positions else None

    def _before_method_layer(self, i, hidden):
        start = self.handle.clock()
        rows = [self._chosen(i, b, hidden) for b in range(len(hidden))]
        kept = self._keep(rows)
        if kept is not None:
            (hidden,) = gather([hidden], kept, [1])
            self.rotary = kept if self.rotary is None else self.rotary.gather(1, kept)
        self.request.stats.seconds += self.handle.clock() - start
        return hidden

    def _chosen(self, i, b, hidden):
        """For every image of row b the ranks that stay."""
        valid = self.tokens.valid[b]
        first = int(valid.int().argmax())  # padding is on the left
        visual = self.tokens.visual[b, first:].nonzero()[:, 0]
        images = self.tokens.images[b]
        query, key = self.queries.get(i - 1), self.cache.layers[i - 1].keys if i else None
        row = Row(
            hidden=hidden[b, first:],
            query=None if query is None else query[b, :, first:],
            key=None if key is None else key[b, :, first:],
            norm=getattr(self.handle.decoder, "norm", None),
            visual=visual,
            images=images,
            sizes=self.sizes[b],
        )
        every = [torch.arange(end - start) for start, end in images]
        if not len(visual):
            return every
        chosen = self.method.at_layer(i, row, len(self.cache.layers))
        if chosen is None:
            return every
        return [chosen[(chosen >= start) & (chosen < end)] - start for start, end in images]

    def _watch(self, attention, i):
        """Have an attention module remember its queries, this once; it computes what it always does."""
        config = attention.config
        eager = getattr(inspect.getmodule(type(attention)), "eager_attention_forward", None)
        attend = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation, eager)
        attention._pruneops_watch = Watch(self.queries, i, config, attend)
        attention.config = Renamed(config, WATCHED)
        self.watching.append(attention)

    def close(self):
        """Modules that were not reached, because something failed, are not watched any longer."""
        for attention in self.watching:
            unwatch(attention)

    def after_layer(self, i, output):
        self._count(i)
        embeds, mask = self.deepstack
        if embeds is None or i >= len(embeds):
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        full = torch.zeros(*mask.shape, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        full[mask] = embeds[i].to(hidden)
        hidden = hidden + torch.where(
            self.tokens.visual[..., None], full.gather(1, self.tokens.index[..., None].expand_as(hidden)), 0
        )
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _count(self, i):
        stats, keys = self.request.stats, self.cache.layers[i].keys
        stats.kept[i] = [[end - first for first, end in row] for row in self.tokens.images]
        stats.kv_bytes[i] = 2 * keys.numel() * keys.element_size()
        stats.kv_bytes_unpruned = stats.kv_bytes[i] // keys.shape[2] * self.request.length


class Watch(NamedTuple):
    """What a watched attention module does with its queries, and what it was before."""

    queries: dict
    layer: int
    config: object
    attend: Callable


class Renamed:
    """A configuration under another attention implementation."""

    def __init__(self, config, name):
        self.__dict__.update(_config=config, _attn_implementation=name)

    def __getattr__(self, name):
        return getattr(self._config, name)


def watched_attention(module, query, *args, **kwargs):
    """The attention implementation of a watched module: its own, after a look at the queries."""
    watch = unwatch(module)
    watch.queries[watch.layer] = query
    return watch.attend(module, query, *args, **kwargs)


def unwatch(module):
    watch = vars(module).pop("_pruneops_watch", None)
    if watch is not None:
        module.config = watch.config
    return watch


def remove_between_steps(request, cache):
    """Ask the method, where it has a say between steps, and compact the caches of the layers."""
    at_step = getattr(request.method, "at_step", None)
    if at_step is None:
        return
    for i, layer in enumerate(cache.layers):
        valid, visual = layer.flags()
        counts = visual.sum(1).tolist()
        ranks = [at_step(request.step, i, count) for count in counts]
        if all(own is None or len(own) == count for own, count in zip(ranks, counts)):
            continue
        kept = []
        for b, own in enumerate(ranks):
            places = visual[b].nonzero()[:, 0]
            stays = valid[b] & ~visual[b]
            stays[places if own is None else places[own.to(places.device)]] = True
            kept.append(stays.nonzero()[:, 0])
        lengths = torch.tensor([len(own) for own in kept], device=layer.keys.device)
        longest = int(lengths.max())
        if longest == layer.size and bool((lengths == longest).all()):
            continue
        index = torch.stack([torch.nn.functional.pad(own, (0, longest - len(own))) for own in kept])
        kv_compact_([layer.keys, layer.values], index, lengths=lengths)
        layer.keys, layer.values = layer.keys[:, :, :longest], layer.values[:, :, :longest]
        inside = torch.arange(longest, device=index.device) < lengths[:, None]
        layer.visual = visual.gather(1, index) & inside
        layer.valid = None if bool(inside.all()) else inside
        layer.removed = request.length - longest
        request.touched = True
        request.stats.kept[i] = [
            row if own is None else [int(((own >= first) & (own < end)).sum()) for first, end in side_by_side(row)]
            for row, own in zip(request.stats.kept[i], ranks)
        ]
        request.stats.kv_bytes[i] = 2 * layer.keys.numel() * layer.keys.element_size()


def attention_mask(valid, new, length, like, flash):
    """[B, 1, new, length] to be added to logits, or None where every new token sees all before it and itself.

    valid: bool [B, length] or None. flash: flash attention is causal by itself and takes the flags of padding.
    """
    if flash:
        return None if valid is None else valid.long()
    if valid is None and new in (1, length):
        return None if new == 1 else _causal(new, length, like)
    mask = _causal(new, length, like)
    if valid is None:
        return mask
    return mask.masked_fill(~valid[:, None, None], torch.finfo(like.dtype).min)


def _causal(new, length, like):
    rows, columns = (torch.arange(n, device=like.device) for n in (new, length))
    unseen = columns > rows[:, None] + length - new
    return torch.zeros(new, length, dtype=like.dtype, device=like.device).masked_fill(
        unseen, torch.finfo(like.dtype).min
    )[None, None]


def gather(tensors, keep, dims):
    """Tokens keep [B, K] of tensors whose batch, perhaps of 1, stands before the tokens or, at `dim` -1, too."""
    dims = [dim % tensor.dim() for tensor, dim in zip(tensors, dims)]
    return gather_tokens(tensors, keep, dims)


def left_padded(rows):
    """(index, valid) [B, S] of rows of different lengths; padding is index 0."""
    longest = max(map(len, rows))
    index = torch.stack([torch.nn.functional.pad(own, (longest - len(own), 0)) for own in rows])
    lengths = torch.tensor([len(own) for own in rows], device=index.device)
    return index, torch.arange(longest, device=index.device) >= longest - lengths[:, None]


def extended(flags, length, fill):
    """Flags [B, S] with so many more of one value."""
    return torch.nn.functional.pad(flags, (0, length - flags.shape[1]), value=fill)


def side_by_side(counts):
    """(first, last + 1) of groups of so many."""
    ends = list(itertools.accumulate(counts))
    return [(end - count, end) for count, end in zip(counts, ends)]


def runs(flags):
    """(first, last + 1) of each run of true flags."""
    edges = [0, *map(int, flags), 0]
    starts = [i for i in range(len(flags)) if edges[i + 1] and not edges[i]]
    ends = [i + 1 for i in range(len(flags)) if edges[i + 1] and not edges[i + 2]]
    return list(zip(starts, ends))


__all__ = ["Handle", "PrunedLayer", "Stats", "UnsupportedError", "patch"]
