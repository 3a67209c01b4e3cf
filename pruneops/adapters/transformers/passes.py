"""Base class of all passes that prune, and forward passes on pruned caches.

`ACTIVE`, a context variable of the thread or task, holds the pass during the base model's `forward`, however that ends.
A pass registers hooks only on modules that it has to change, and removes them at its end; in a pass of another thread
they do nothing. Positions are never renumbered, and the attention implementation is not replaced.
"""

import contextlib
from typing import Any

import torch

from ...ops import gather_tokens
from .cache import ACTIVE, decide, remove_decided
from .models import UnsupportedError, attention_implementation
from .query_capture import check_capturable, start_capture, stop_capture


class Pass:
    """A forward pass of the base model that prunes. `layers` are the cache's, empty without one."""

    layers: Any

    def __init__(self, handle, request, inputs):
        self.handle, self.decoder, self.request, self.inputs = handle, handle.decoder, request, inputs
        self.attention = attention_implementation(self.decoder)
        self.flash = "flash" in self.attention

    def run(self, forward):
        with contextlib.ExitStack() as self.exit:
            self.exit.callback(ACTIVE.reset, ACTIVE.set(self))
            if self.has_work():
                self.hook(self.decoder.register_forward_pre_hook, self.before_decoder, with_kwargs=True)
            return forward(**self.inputs)

    def has_work(self) -> bool:
        """Whether the pass needs a hook on the decoder."""
        raise NotImplementedError

    def before_decoder(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Hook on the decoder: its new arguments."""
        raise NotImplementedError

    def hook(self, register, function, **options):
        """Register a hook that is removed when the pass ends, and does nothing in other passes."""

        def run_if_active(*args):
            return function(*args) if ACTIVE.get() is self else None

        self.exit.callback(register(run_if_active, **options).remove)

    def capture(self, module):
        """Capture the queries and keys of an attention module until the pass ends."""
        start_capture(module)
        self.exit.callback(stop_capture, module)

    @contextlib.contextmanager
    def timed(self):
        """Count the time inside as selection."""
        start = self.handle.clock()
        yield
        self.request.stats.seconds += self.handle.clock() - start


class Continuation(Pass):
    """A pass on a pruned cache for which the model would make wrong masks, or that is pruned again before it.

    A method that removes tokens while text is generated decides once for every new token. In a pass of several
    (candidates of speculation, a later turn) masks let each see what it would see in a pass of its own; flash attention
    has no such masks, so there all see what the first one sees.
    """

    def __init__(self, handle, request, inputs):
        super().__init__(handle, request, inputs)
        self.layers = inputs["past_key_values"].layers
        check_mask(inputs.get("attention_mask"))
        self.masks = {}  # group of layers -> mask
        ids = inputs.get("input_ids")
        self.new = new = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
        # a single new token is no padding, so the mask is all ones unless a later turn brought several tokens
        request.maybe_padded |= inputs.get("attention_mask") is not None and new > 1
        # without padding sdpa needs no mask for one new token, nor flash attention for any
        self.mask_free = not request.maybe_padded and (self.flash or (self.attention == "sdpa" and new == 1))
        self.removes = request.prunes_between_steps and self.layers[0].origin is not None
        self.first_removed = request.step_layer if self.removes else len(self.layers)
        self.seen = None  # bool [B, new, N]: the visual tokens that each new token sees from that layer on, if not all
        self.captures, self.captured = {}, {}  # attention module -> layer; layer -> (query, key)
        if self.removes and request.step_layer and "query" in request.method.needs:
            attention = self.decoder.layers[request.step_layer - 1].self_attn
            check_capturable(attention)
            self.captures[attention] = request.step_layer - 1

    def has_work(self):
        padded = any(layer.valid is not None for layer in self.layers)
        return padded or not self.mask_free or self.removes

    def before_decoder(self, decoder, args, kwargs):
        self.given, first = kwargs.get("attention_mask"), self.layers[0]
        if self.removes:
            self._remove(decoder, kwargs["inputs_embeds"])
        if first.valid is not None:
            flags = self._flags(first, kwargs["inputs_embeds"])
            kwargs["attention_mask"] = torch.nn.functional.pad(flags, (first.removed, 0))
        mask_free = self.mask_free and first.valid is None
        several = self.new > 1 and not self.flash
        for i, (module, layer) in enumerate(zip(decoder.layers, self.layers)):
            other = layer.group != first.group and not (mask_free and layer.valid is None)
            if other or (several and i >= self.first_removed):
                self.hook(module.register_forward_pre_hook, self._before_layer(i), with_kwargs=True)
        return args, kwargs

    def _remove(self, decoder, embeds):
        """Remove what was decided, and decide by the new tokens as soon as their attention is known."""
        with self.timed():
            remove_decided(self.request, self.layers, lambda layer: self._flags(layer, embeds)[:, : layer.size].bool())
        for module in self.captures:
            self.capture(module)
        if self.first_removed:
            hook = self._decide(embeds)
            self.hook(decoder.layers[self.first_removed].register_forward_pre_hook, hook)
        else:
            self._decide(embeds)()

    def _decide(self, embeds):
        """Hook on the first layer that loses tokens."""
        reference, first = self.layers[max(self.first_removed - 1, 0)], self.layers[self.first_removed]
        valid = self._flags(reference, embeds).bool()

        @torch.no_grad()
        def hook(*_):
            with self.timed():
                captured = self.captured.get(self.first_removed - 1)
                first.decided = decide(self.request, self.layers, valid, captured, self.new)
                if self.new > 1:
                    before = torch.ones_like(first.decided[:, :1])  # all that is in the cache
                    self.seen = torch.cat([before, first.decided[:, :-1]], 1)

        return hook

    def _before_layer(self, i):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            kwargs["attention_mask"] = self._mask(i, kwargs.get("attention_mask"), hidden)
            return args, kwargs

        return hook

    def _flags(self, layer, embeds):
        """int64 [B, size + new]: which tokens of a layer may be attended to, new ones included."""
        known = 0 if layer.valid is None else layer.valid.shape[1]
        later = layer.size + embeds.shape[1] - known
        given = embeds.new_ones(len(embeds), later) if self.given is None else self.given
        flags = given[:, given.shape[1] - later :].long()
        return flags if layer.valid is None else torch.cat([layer.valid.long(), flags], 1)

    def _mask(self, i, given, hidden):
        """From the mask that the decoder made for the first layer."""
        layer, removes = self.layers[i], self.seen is not None and not self.flash and i >= self.first_removed
        if layer.valid is None and self.layers[0].valid is None and not removes:  # only visible tokens were removed
            return None if given is None else given[..., -(layer.size + hidden.shape[1]) :]  # drop left columns
        if (layer.group, removes) not in self.masks:
            flags = self._flags(layer, hidden)
            visible = self._visible(layer, flags) if removes else flags.bool()
            self.masks[layer.group, removes] = flags if self.flash else additive_mask(visible, hidden)
        return self.masks[layer.group, removes]

    def _visible(self, layer, flags):
        """bool [B, new, S]: the tokens of a layer that each new token sees, as if it came in a pass of its own."""
        seen: Any = self.seen
        origin = layer.origins(flags.shape[1]).to(seen.device)
        held = seen.gather(2, origin.clamp(min=0)[:, None].expand(-1, seen.shape[1], -1))
        return (held | (origin < 0)[:, None]) & flags.bool().to(seen.device)[:, None]


def check_mask(mask):
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        raise UnsupportedError("pruneops: an attention mask of rank 4 cannot be pruned; pass one of rank 2")


def additive_mask(valid, hidden):
    """Mask [B, 1, n, S] to be added to the logits of the last n tokens, hidden [B, n, D]; valid: bool [B, S], or
    [B, n, S] for each of them."""
    n, length = hidden.shape[1], valid.shape[-1]
    rows, columns = (torch.arange(count, device=hidden.device) for count in (n, length))
    valid = valid[:, None] if valid.dim() == 2 else valid
    visible = valid.to(hidden.device) & (columns <= rows[:, None] + length - n)
    mask = torch.zeros(visible.shape, dtype=hidden.dtype, device=hidden.device)
    return mask.masked_fill_(~visible, torch.finfo(hidden.dtype).min)[:, None]


def gather(tensors, index, dims):
    """`gather_tokens` on the device of the tensors; `dims` may be negative."""
    dims = [dim % tensor.dim() for tensor, dim in zip(tensors, dims)]
    return gather_tokens(tensors, index.to(tensors[0].device), dims)
