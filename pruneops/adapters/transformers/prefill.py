"""The forward pass with the images of a request."""

from types import SimpleNamespace
from typing import Any

import torch

from ...methods import Row
from ...methods.base import INSTRUCTION, SYSTEM, Budgeted
from .cache import PrunedLayer, Request, check_windows, count_in_spans, kv_bytes, prunable_cache
from .models import MODALITIES, UnsupportedError
from .passes import Pass, additive_mask, check_mask, gather
from .query_capture import check_capturable
from .token_layout import keep_ranks, keep_tokens, layout_of, spans_from_counts
from .vision import check_cls_attention, select


def has_images(inputs):
    """Whether a pass has images, as pixels or encoded."""
    pixels = any(inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
    return pixels or bool(encoded_images(inputs))


def encoded_images(inputs):
    """{modality: the encoder's outputs} that a pass was given instead of pixels."""
    encoded = inputs.get("mm_encoder_outputs")
    if isinstance(encoded, torch.Tensor) or inputs.get("image_hidden_states") is not None:  # Idefics3, SmolVLM
        encoded = {"image": SimpleNamespace(pooler_output=inputs.get("image_hidden_states", encoded))}
    return {name: output for name, output in (encoded or {}).items() if name in MODALITIES and output is not None}


class Prefill(Pass):
    """The pass with the images of a request: prunes after the projector and before layers of the decoder."""

    def __init__(self, handle, model, method, inputs):
        decoder = handle.decoder
        check_windows(decoder)
        super().__init__(handle, Request(method, len(decoder.layers)), dict(inputs))
        self.model, self.method = model, method
        self.method_layers = tuple(method.layers(len(decoder.layers)))
        self.checkpointed = decoder.training and getattr(decoder.layers[0], "gradient_checkpointing", False)
        self.cache, self.layers = self._cache(), []
        reads = {"query"} if self.cache is not None else {"query", "key"}
        queried = {layer - 1 for layer in self.method_layers if layer} if reads & set(method.needs) else set()
        self.captures = {decoder.layers[i].self_attn: i for i in sorted(queried)}
        self.captured = {}  # layer -> (query, key)
        self.encoded = encoded_images(inputs)
        self.length = self.remaining = 0  # of the text, before and after pruning
        self.numbers = []  # of the visual tokens of every row, for methods that remove more of them later
        self._check()

    def _cache(self):
        """The cache that the pass will fill, or None."""
        use, cache = self.inputs.get("use_cache"), self.inputs.get("past_key_values")
        use = getattr(self.decoder.config, "use_cache", True) if use is None else use
        if self.checkpointed or (cache is None and not use):
            return None
        return prunable_cache(cache, self.decoder)

    def _check(self):
        """Refuse what cannot be pruned, before anything is computed or changed."""
        check_mask(self.inputs.get("attention_mask"))
        check_cls_attention(self.model, self.method)
        if self.attention.startswith("paged"):
            raise UnsupportedError("pruneops: continuous batching cannot be pruned; use generate")
        if "flex" in self.attention:
            raise UnsupportedError(f"pruneops: {self.attention} cannot be pruned; set_attn_implementation('sdpa')")
        if hasattr(self.decoder, "_orig_mod") or self.decoder._compiled_call_impl is not None:
            raise UnsupportedError(
                "pruneops: a decoder that was compiled by itself cannot be pruned; compile the model"
            )
        between_steps = self.request.prunes_between_steps
        if not self.method_layers and not between_steps:
            return
        if self.cache is None and (between_steps or not self.decoder.training):
            raise UnsupportedError(
                "pruneops: use_cache=False cannot be pruned inside the decoder, where every step would choose anew; "
                "leave use_cache at True, or use a method that prunes after the projector"
            )
        layers = self.decoder.layers
        if any(getattr(layer, "_compiled_call_impl", None) is not None for layer in layers):
            raise UnsupportedError("pruneops: layers that were compiled one by one cannot be pruned; compile the model")
        if self.checkpointed and type(layers[0]).__call__ is not torch.nn.Module.__call__:
            raise UnsupportedError(
                "pruneops: gradient checkpointing of this transformers recomputes layers with their hooks; use a "
                "method that prunes after the projector, train without checkpointing, or take a newer release"
            )
        for module in self.captures:
            check_capturable(module)

    def run(self, forward):
        cache: Any = self.cache
        if cache is None:
            self.inputs |= {"use_cache": False, "past_key_values": None}
            out = super().run(forward)
        else:
            before, self.layers = cache.layers, [PrunedLayer() for _ in self.decoder.layers]
            for layer in self.layers:
                layer.request = self.request
            cache.layers, self.inputs["past_key_values"] = self.layers, cache
            try:
                out = super().run(forward)
            except BaseException:
                cache.layers = before
                raise
        self._count()
        self.handle.stats.append(self.request.stats)
        images = self.request.stats.images
        if not self.length or not self.encoded:
            reason = "decoder did not run" if self.encoded else "get_image_features was replaced; patch() again"
            self.handle.warn_unpruned(f"its {reason}")
        elif images and self.remaining == self.length and not self.request.prunes_between_steps:
            self.handle.warn_unpruned(f"{self.method} kept all tokens of images of {images}")
        return out

    def has_work(self):
        return True

    # In the decoder

    def before_decoder(self, decoder, args, kwargs):
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        features = {name: out.pooler_output for name, out in self.encoded.items()}
        self.length = self.remaining = embeds.shape[1]
        self.entry_index = None  # of each remaining token, its index in the decoder's input
        self.source = None  # of each token of the text, the index of its `Kept.source` among the remaining
        ids, given = self.inputs.get("input_ids"), self.inputs.get("inputs_embeds")
        read = bool(self.method_layers) or self.request.prunes_between_steps
        layout = layout_of(self.model, features, ids, given, mask, read)
        if layout is None:
            return args, kwargs
        self.tokens, self.sizes = layout.tokens, layout.tokens.sizes
        self.request.stats.images = self.sizes
        self.request.length, self.request.last_visual = self.length, [places[-1:] for places in self.tokens.places]
        self._record(0)
        with self.timed():
            after_projector = self.method.after_projector
            chosen = select(self.method, features, layout.images) if after_projector else None
            if not layout.left_padded or (chosen is not None and sizes_of(chosen) != self.sizes):
                self._prune_input(kwargs, all_ranks(self.tokens) if chosen is None else chosen)
        self.entry_valid = self.tokens.valid
        if self.request.prunes_between_steps and any(map(len, self.tokens.places)):
            self.numbers = [torch.arange(len(places), device=places.device) for places in self.tokens.places]
            self.request.visual, self.request.images = max(map(len, self.numbers)), self.tokens.images
        self._set_layers(0)
        self._hook_layers(kwargs)
        return args, kwargs

    def _prune_input(self, kwargs, chosen):
        before, again = self.tokens, bool(self.method_layers) or self.request.prunes_between_steps
        index, self.source, self.tokens, ranks = keep_tokens(before, chosen, again)
        self.remaining = index.shape[1]
        self._record(0)
        positions, embeds = kwargs.get("position_ids"), kwargs["inputs_embeds"]
        if positions is None:
            positions = torch.arange(self.length, device=embeds.device)[None]
        kwargs["inputs_embeds"], kwargs["position_ids"] = gather([embeds, positions], index, [1, -1])
        if kwargs.get("visual_pos_masks") is not None:
            (kwargs["visual_pos_masks"],) = gather([kwargs["visual_pos_masks"]], index, [1])
            if self.tokens.valid is not None:
                kwargs["visual_pos_masks"] = kwargs["visual_pos_masks"] & self.tokens.valid
            kwargs["deepstack_visual_embeds"] = keep_features(kwargs["deepstack_visual_embeds"], before, ranks)
        if kwargs.get("cache_position") is not None:  # before 5.4; made anew from the cache
            kwargs["cache_position"] = None
        kwargs["attention_mask"] = self._input_mask(embeds)

    def _input_mask(self, embeds):
        """[B, tokens of the text], with zeros for removed tokens, as the cache counts them; None if all are valid."""
        valid = self.tokens.valid
        if self.cache is None:  # without cache and mask, gaps between positions pass for packed sequences
            return embeds.new_ones(len(embeds), self.remaining).long() if valid is None else valid.long()
        return None if valid is None else torch.nn.functional.pad(valid.long(), (self.length - self.remaining, 0))

    def _hook_layers(self, kwargs):
        layers, first = self.decoder.layers, min(self.method_layers, default=len(self.decoder.layers))
        self.deepstack = kwargs.get("deepstack_visual_embeds")
        if self.deepstack is not None and first < len(self.deepstack):
            kwargs["deepstack_visual_embeds"] = None
            kwargs["visual_pos_masks"] = None
            for i in range(len(self.deepstack)):
                self.hook(layers[i].register_forward_hook, self._add_deepstack(i))
        # flash attention takes gaps between positions for packed sequences
        start = 0 if self.flash and self.source is not None else first
        for i in range(start, len(layers)):
            self.hook(layers[i].register_forward_pre_hook, self._before_layer(i), with_kwargs=True)
        for module in self.captures:
            self.capture(module)
        if self.source is not None or self.method_layers:
            self.hook(self.decoder.register_forward_hook, self._after_decoder)

    def _before_layer(self, i):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if i in self.method_layers:
                with self.timed():
                    hidden = self._prune_layer(i, hidden, kwargs)
            if self.entry_index is not None:
                kwargs |= self._arguments_of_layer(kwargs, hidden)
            if self.flash and self.source is not None:
                kwargs["position_ids"] = None
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return hook

    def _prune_layer(self, i, hidden, kwargs):
        before = self.tokens
        rotary = self._rotary(kwargs, len(hidden)) if "rotary" in self.method.needs else None
        ranks, sizes = zip(*(self._choose(i, b, hidden, rotary) for b in range(len(hidden))))
        if list(sizes) == before.sizes:
            return hidden
        index, source, self.tokens, ranks = keep_ranks(before, list(ranks), list(sizes), again=True)
        self.remaining = index.shape[1]
        self.source = source if self.source is None else source.gather(1, self.source)
        self.entry_index = index if self.entry_index is None else self.entry_index.gather(1, index)
        if self.deepstack is not None:
            self.deepstack = keep_features(self.deepstack, before, ranks)
        if self.numbers:
            self.numbers = [row.index_select(0, rank.to(row.device)) for row, rank in zip(self.numbers, ranks)]
        self.layer_arguments = None
        self._set_layers(i)
        self._record(i)
        return gather([hidden], index, [1])[0]

    def _rotary(self, kwargs, batch):
        """Cos and sin [B, S, Dr] at the remaining tokens, from those of the decoder's input."""
        parts = kwargs.get("position_embeddings")
        if parts is None or any(part.dim() != 3 for part in parts):
            raise UnsupportedError(
                f"pruneops: {self.method} reads rotary embeddings [B, S, Dr], which this transformers does not pass to "
                "the decoder's layers for this model; take a newer release, or a method that does not read them"
            )
        parts = [part.expand(batch, -1, -1) for part in parts]
        return parts if self.entry_index is None else gather(parts, self.entry_index, [1, 1])

    @torch.no_grad()
    def _choose(self, i, b, hidden, rotary):
        """Ranks of the visual tokens of row b that are kept, and how many of each image."""
        tokens, count = self.tokens, len(self.decoder.layers)
        first, places = hidden.shape[1] - tokens.lengths[b], tokens.places[b]
        query, key = self.captured.get(i - 1, (None, None))
        if key is None and self.layers and i:
            key = self.layers[i - 1].keys
        row = Row(
            hidden=hidden[b, first:],
            query=None if query is None else query[b, :, first:],
            key=None if key is None else key[b, :, first:],
            norm=getattr(self.decoder, "norm", None),
            visual=places.to(hidden.device) - first,
            images=tokens.images[b],
            sizes=self.sizes[b],
            rotary=None if rotary is None else (rotary[0][b, first:], rotary[1][b, first:]),
        )
        chosen = self.method.at_layer(i, row, count) if len(places) else None
        if chosen is None:
            return torch.arange(len(places), device=places.device), tokens.sizes[b]
        return chosen, kept_of_images(chosen, row, self.method)

    def _arguments_of_layer(self, kwargs, hidden):
        """Mask, rotary embeddings and positions of the remaining tokens, from those that the decoder made."""
        if self.layer_arguments is None:
            names = [name for name in ("position_embeddings", "position_ids") if kwargs.get(name) is not None]
            self.layer_arguments = {}
            for name in names:
                tensors, dim = (kwargs[name], -2) if name == "position_embeddings" else ([kwargs[name]], -1)
                tensors = gather(list(tensors), self.entry_index, [dim] * len(tensors))
                self.layer_arguments[name] = tuple(tensors) if dim == -2 else tensors[0]
            self.layer_arguments["attention_mask"] = self._layer_mask(kwargs.get("attention_mask"), hidden)
        return self.layer_arguments

    def _layer_mask(self, given, hidden):
        valid = self.tokens.valid
        if self.flash:
            return None if valid is None else valid.long()
        if valid is None and self.entry_valid is None:
            return None if given is None else given[..., : self.remaining, : self.remaining]
        return additive_mask(torch.ones_like(self.tokens.text) if valid is None else valid, hidden)

    def _add_deepstack(self, i):
        """Hook that adds deepstack features to the visual tokens after a layer, as the decoder does (Qwen3-VL)."""

        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            index = torch.cat([places + b * hidden.shape[1] for b, places in enumerate(self.tokens.places)])
            features = self.deepstack[i].to(hidden)
            hidden = hidden.flatten(0, 1).index_add(0, index.to(hidden.device), features).view_as(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def _after_decoder(self, module, args, output):
        """Restore the length of the text: a removed token gets the output of the last kept token before it.

        So logits have their usual positions, labels and losses fit, and the token before an answer predicts it.
        """
        if self.source is None:
            return None
        (hidden,) = gather([output[0]], self.source, [1])
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    # Records

    def _set_layers(self, group):
        """Layers from number `group` on hold the remaining tokens."""
        origin = origins(self.tokens, self.numbers) if self.numbers else None
        for layer in self.layers[group:]:
            layer.group, layer.removed = group, self.length - self.remaining
            layer.prompt, layer.valid = self.remaining, self.tokens.valid
            layer.origin = origin
        request, valid = self.request, self.tokens.valid
        if self.tokens.padding_unknown:
            request.unread_padding = valid
        else:
            request.needs_masks |= valid is not None or self.entry_index is not None

    def _record(self, start):
        kept = self.request.stats.kept
        kept[start:] = [self.tokens.sizes] * (len(kept) - start)

    def _count(self):
        stats = self.request.stats
        stats.kv_bytes = [kv_bytes(layer) for layer in self.layers] or stats.kv_bytes
        if self.layers and self.layers[0].size:
            stats.kv_bytes_unpruned = stats.kv_bytes[0] // self.layers[0].size * self.length


def all_ranks(tokens):
    """`chosen` of `keep_tokens` that keeps every token."""
    return [[torch.arange(size, device=tokens.text.device) for size in row] for row in tokens.sizes]


def sizes_of(chosen):
    """Kept tokens of each image."""
    return [[len(ranks) for ranks in row] for row in chosen]


def origins(tokens, numbers):
    """`PrunedLayer.origin` of tokens whose visual ones have these numbers, for every row."""
    origin = torch.full(tokens.text.shape, -1 - SYSTEM, device=tokens.text.device)
    for row, places, own in zip(origin, tokens.places, numbers):
        row.index_copy_(0, places, own)
    after = (origin >= 0).cumsum(1) > 0
    return origin.masked_fill(after & (origin < 0), -1 - INSTRUCTION)


def keep_features(features, tokens, ranks):
    """For each tensor [visual tokens of all rows, D], the entries of ranks [k] of every row."""
    starts = [first for first, _ in spans_from_counts([len(places) for places in tokens.places])]
    index = torch.cat([chosen + start for chosen, start in zip(ranks, starts)])
    return [tensor.index_select(0, index.to(tensor.device)) for tensor in features]


def kept_of_images(chosen, row, method):
    """How many of a row's chosen ranks belong to each image: by the method's budget, else read."""
    if len(row.images) == 1 or not len(chosen):
        return [len(chosen)] + [0] * (len(row.images) - 1)
    if isinstance(method, Budgeted):
        return [min(method.budget(size), end - start) for size, (start, end) in zip(row.sizes, row.images)]
    return count_in_spans(chosen.cpu().numpy(), row.images)
