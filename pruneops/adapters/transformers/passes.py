"""Base class of all passes that prune, and forward passes on pruned caches.

`ACTIVE`, a context variable of the thread or task, holds the pass during the base model's `forward`, however that ends.
A pass registers hooks only on modules that it has to change, and removes them at its end; in a pass of another thread
they do nothing. Positions are never renumbered, and the attention implementation is not replaced.
"""

import contextlib
from typing import Any

import torch

from ...ops import gather_tokens
from .cache import ACTIVE, remove_between_steps
from .models import UnsupportedError, attention_implementation


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


class Continuation(Pass):
    """A pass on a pruned cache for which the model would make wrong masks, or that is pruned again before it."""

    def __init__(self, handle, request, inputs):
        super().__init__(handle, request, inputs)
        self.layers = inputs["past_key_values"].layers
        check_mask(inputs.get("attention_mask"))
        self.masks = {}  # group of layers -> mask
        request.step += 1
        ids = inputs.get("input_ids")
        new = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
        # a single new token is no padding, so the mask is all ones unless a later turn brought several tokens
        request.maybe_padded |= inputs.get("attention_mask") is not None and new > 1
        # without padding sdpa needs no mask for one new token, nor flash attention for any
        self.mask_free = not request.maybe_padded and (self.flash or (self.attention == "sdpa" and new == 1))

    def has_work(self):
        padded = any(layer.valid is not None for layer in self.layers)
        return padded or not self.mask_free or self.request.prunes_between_steps

    def before_decoder(self, decoder, args, kwargs):
        if self.request.prunes_between_steps:
            remove_between_steps(self.request, self.layers)
        self.given, first = kwargs.get("attention_mask"), self.layers[0]
        if first.valid is not None:
            flags = self._flags(first, kwargs["inputs_embeds"])
            kwargs["attention_mask"] = torch.nn.functional.pad(flags, (first.removed, 0))
        mask_free = self.mask_free and first.valid is None
        for module, layer in zip(decoder.layers, self.layers):
            if layer.group != first.group and not (mask_free and layer.valid is None):
                self.hook(module.register_forward_pre_hook, self._before_layer(layer), with_kwargs=True)
        return args, kwargs

    def _before_layer(self, layer):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            kwargs["attention_mask"] = self._mask(layer, kwargs.get("attention_mask"), hidden)
            return args, kwargs

        return hook

    def _flags(self, layer, embeds):
        """int64 [B, size + new]: which tokens of a layer may be attended to, new ones included."""
        known = 0 if layer.valid is None else layer.valid.shape[1]
        later = layer.size + embeds.shape[1] - known
        given = embeds.new_ones(len(embeds), later) if self.given is None else self.given
        flags = given[:, given.shape[1] - later :].long()
        return flags if layer.valid is None else torch.cat([layer.valid.long(), flags], 1)

    def _mask(self, layer, given, hidden):
        """From the mask that the decoder made for the first layer."""
        if layer.valid is None and self.layers[0].valid is None:  # only visible tokens were removed: drop left columns
            return None if given is None else given[..., -(layer.size + hidden.shape[1]) :]
        if layer.group not in self.masks:
            flags = self._flags(layer, hidden)
            self.masks[layer.group] = flags if self.flash else additive_mask(flags.bool(), hidden)
        return self.masks[layer.group]


def check_mask(mask):
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        raise UnsupportedError("pruneops: an attention mask of rank 4 cannot be pruned; pass one of rank 2")


def additive_mask(valid, hidden):
    """Mask [B, 1, n, S] to be added to the logits of the last n tokens, hidden [B, n, D]; valid: bool [B, S]."""
    n, length = hidden.shape[1], valid.shape[1]
    rows, columns = (torch.arange(count, device=hidden.device) for count in (n, length))
    visible = valid.to(hidden.device)[:, None] & (columns <= rows[:, None] + length - n)
    mask = torch.zeros(visible.shape, dtype=hidden.dtype, device=hidden.device)
    return mask.masked_fill_(~visible, torch.finfo(hidden.dtype).min)[:, None]


def gather(tensors, index, dims):
    """`gather_tokens` on the device of the tensors; `dims` may be negative."""
    dims = [dim % tensor.dim() for tensor, dim in zip(tensors, dims)]
    return gather_tokens(tensors, index.to(tensors[0].device), dims)
