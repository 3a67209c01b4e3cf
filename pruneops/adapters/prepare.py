"""Pruning after the projector as a pure function: the inputs of a model, with fewer tokens for its images."""

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..methods import Method, Row
from ..methods.base import to_device_async
from ..ops import gather_tokens
from .transformers.models import (
    MODALITIES,
    UnsupportedError,
    accepts_encoded_images,
    attention_implementation,
    find_model,
    rotary_at,
)
from .transformers.token_layout import features_of, keep_tokens, layout_of
from .transformers.vision import check_cls_attention, encode, select

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def prepare(model: nn.Module, inputs: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """Inputs of ``model.generate`` whose images are already encoded and pruned; the model is not changed.

    Chunked prefill, static caches, beams, assisted decoding and prompt lookup work as usual, because the model only
    gets a shorter prompt. Needs transformers 5.18; before that use `patch`.

    Parameters
    ----------
    model : PreTrainedModel, or a wrapper around one
        One of those that `patch` supports.
    inputs : mapping
        The processor's output: input_ids, attention_mask, pixel_values, ... Tensors of the shape of input_ids, such as
        labels, are shortened with them.
    method : pruneops.methods.Method
        One that prunes after the projector, whose `layers`, if it has any, are ignored; or one that prunes nowhere but
        at the decoder's input (`DTR`).

    Returns
    -------
    dict
        input_ids, attention_mask, position_ids, mm_encoder_outputs instead of pixels, ``use_cache=True``, and the
        other entries of `inputs`.

    Raises
    ------
    UnsupportedError
        On an unknown architecture or an older transformers, and on a method that prunes inside the decoder only.
    ValueError
        If the prompts have not as many image tokens as the encoder gave features.

    Notes
    -----
    Distances between positions are the original ones, and rotary embeddings depend on nothing else. The last token of a
    prompt has the position that follows from the shorter length, so a later turn on the same cache continues from it.
    Flash attention takes a position 0 for the start of another prompt; there the first token has it instead, and a
    later turn would have wrong distances: start a new cache or use `patch`.

    Gradients flow to the projector and the vision tower if the model is in training mode.

    Examples
    --------
    ::

        inputs = processor(images=image, text=prompt, return_tensors="pt")
        inputs = pruneops.prepare(model, inputs, pruneops.methods.ToDRE(keep=0.1))
        output = model.generate(**inputs)
    """
    real = find_model("pruneops.prepare", model)
    base = real.base_model
    if not accepts_encoded_images(real):
        raise UnsupportedError("pruneops.prepare needs transformers 5.18 or later; use pruneops.patch")
    at_input = not method.after_projector and method.layers(len(real.get_decoder().layers)) == (0,)
    if not method.after_projector and not at_input:
        raise UnsupportedError(f"pruneops.prepare: {method} does not prune after the projector; use pruneops.patch")
    check_cls_attention(base, method)
    if inputs.get("use_cache") is False:
        raise UnsupportedError("pruneops.prepare: use_cache=False cannot be pruned so; use pruneops.patch, or a cache")
    inputs = dict(inputs)
    present = [name for name in MODALITIES if inputs.get(PIXELS[name]) is not None]
    if not present:
        return inputs
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        raise UnsupportedError("pruneops.prepare: inputs_embeds cannot be shortened; give input_ids")
    original = dict(inputs)
    with torch.set_grad_enabled(torch.is_grad_enabled() and real.training):
        encoded = _encode(base, inputs, present, method)
        features = {name: out.pooler_output for name, out in encoded.items()}
        layout = layout_of(real, features, ids, mask=mask, read=at_input)
        if layout is None:
            return original
        positions = inputs.get("position_ids")
        if positions is None:
            positions = real._prepare_position_ids_for_generation(ids, original)
        if at_input:
            chosen = _select_at_input(real, method, features, layout, ids, positions)
        else:
            chosen = select(method, features, layout.images)
        for name, out in encoded.items():
            encoded[name] = _with_fewer_tokens(out, layout.images, chosen, name)
    index, _, tokens, _ = keep_tokens(layout.tokens, chosen)
    names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.shape == ids.shape]
    names = [name for name in names if name not in ("attention_mask", "position_ids")]
    tensors = gather_tokens([*(inputs[name] for name in names), positions], index, dim=[-1] * (len(names) + 1))
    inputs |= dict(zip(names, tensors))
    valid = torch.ones_like(index, dtype=torch.bool) if tokens.valid is None else tokens.valid
    filler = real.config.get_text_config().pad_token_id or 0
    for name in names:
        if name in ("input_ids", "labels"):
            inputs[name] = inputs[name].masked_fill(~valid, filler if name == "input_ids" else -100)
    inputs["attention_mask"] = valid.to(ids.dtype)
    if "flash" in attention_implementation(real.get_decoder()):
        inputs["position_ids"] = tensors[-1] - tensors[-1][..., :1]
    else:
        removed = [sum(before) - sum(after) for before, after in zip(layout.tokens.sizes, tokens.sizes)]
        inputs["position_ids"] = tensors[-1] - to_device_async(torch.tensor(removed)[:, None], ids.device)
    # without a cache and a mask, gaps between positions would be taken for packed sequences
    inputs["mm_encoder_outputs"], inputs["use_cache"] = encoded, True
    return inputs


def _encode(base, inputs, present, method):
    """{modality: the encoder's outputs}; removes the encoders' arguments from `inputs`."""
    encoded, read = {}, set()
    for modality in present:
        encoder = getattr(base, f"get_{modality}_features")
        names = [name for name in inspect.signature(encoder).parameters if inputs.get(name) is not None]
        arguments = {name: inputs[name] for name in names if name not in PIXELS.values() or name == PIXELS[modality]}
        encoded[modality] = encode(base, encoder, arguments | {"return_dict": True}, method)
        read.update(arguments)
    for name in (*read, "image_grid_thw", "video_grid_thw", "image_sizes", "second_per_grid_ts"):
        inputs.pop(name, None)
    return encoded


@torch.no_grad()
def _select_at_input(model, method, features, layout, ids, positions):
    """What `select` returns, of a method that prunes at the decoder's input."""
    decoder, tokens, chosen = model.get_decoder(), layout.tokens, []
    embeds = model.get_input_embeddings()(ids)
    cos, sin = rotary_at("pruneops.prepare", decoder, embeds, positions)
    for b, (images, places) in enumerate(zip(layout.images, tokens.places)):
        merged = [features_of(features[name], first, size).to(embeds) for name, first, size in images]
        hidden = embeds[b].index_copy(0, places, torch.cat(merged)) if merged else embeds[b]
        visible = torch.ones_like(ids[b], dtype=torch.bool) if tokens.valid is None else tokens.valid[b]
        kept, rank = visible.nonzero()[:, 0], visible.cumsum(0) - 1
        row = Row(
            hidden=hidden[kept], visual=rank[places], images=tuple(tokens.images[b]), sizes=tuple(tokens.sizes[b]),
            rotary=(cos[b, kept], sin[b, kept]),
        )  # fmt: skip
        ranks = method.at_layer(0, row, len(decoder.layers))
        ranks = torch.arange(len(places), device=places.device) if ranks is None else ranks
        chosen.append([ranks[(ranks >= first) & (ranks < end)] - first for first, end in tokens.images[b]])
    return chosen


def _with_fewer_tokens(encoded, rows, chosen, modality):
    """The encoder's outputs, kept tokens only; deepstack features (Qwen3-VL) too."""
    keep = [
        (first, size, ranks)
        for row, images in zip(rows, chosen)
        for (name, first, size), ranks in zip(row, images)
        if name == modality
    ]
    encoded = copy.copy(encoded)
    encoded.pooler_output = _kept(encoded.pooler_output, keep)
    if getattr(encoded, "deepstack_features", None) is not None:
        encoded.deepstack_features = [_kept(tensors, keep) for tensors in encoded.deepstack_features]
    return encoded


def _kept(tensors, keep):
    """A tensor per image if the encoder gave a list, else one tensor of tiles of a size that divides all images."""
    parts = [features_of(tensors, first, size).index_select(0, ranks) for first, size, ranks in keep]
    if not isinstance(tensors, torch.Tensor):
        return parts
    joined = torch.cat(parts)
    return joined if tensors.dim() == 2 else joined.unflatten(0, (-1, math.gcd(*map(len, parts))))
