"""Pruning after the projector as a pure function: the inputs of a model, with fewer tokens for its images."""

import copy
import inspect
import math

import torch

from ..methods._base import uploaded
from ..ops import gather_tokens
from .transformers.models import (
    MODALITIES,
    UnsupportedError,
    accepts_encoded_images,
    attention_implementation,
    find_model,
)
from .transformers.token_layout import features_of, keep_tokens, layout_of
from .transformers.vision import check_cls_attention, encode, select

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def prepare(model, inputs, method):
    """Inputs of `model.generate` whose images are encoded and pruned already; the model itself stays as it is.

    Chunked prefill, static caches, beams, assisted decoding and prompt lookup work as ever, because the model only sees
    a shorter prompt. Needs transformers 5.18; before that use `patch`.

    Parameters
    ----------
    model : PreTrainedModel, or a wrapper around one
        One of those that `patch` knows.
    inputs : mapping
        What the processor made: input_ids, attention_mask, pixel_values, ... Tensors of the shape of input_ids, such as
        labels, are shortened with them.
    method : pruneops.methods.Method
        One that prunes after the projector; its `layers`, if it has any, are ignored.

    Returns
    -------
    dict
        input_ids, attention_mask, position_ids, mm_encoder_outputs in place of pixels, use_cache=True, and whatever
        else `inputs` held.

    Raises
    ------
    UnsupportedError
        On an unknown architecture or an older transformers, and on a method that does not prune after the projector.
    ValueError
        If the prompts have not as many image tokens as the encoder gave features.

    Notes
    -----
    Distances between positions are the original ones, which is all that rotary embeddings see. The last token of a
    prompt has the position that follows from the shorter length, so a later turn on the same cache goes on where this
    one ended. With flash attention, which takes a position 0 for the start of another prompt, the first token has it;
    there a later turn would stand at wrong distances, so begin anew or use `patch`.

    Gradients flow to the projector and the vision tower if the model is in training mode.
    """
    real = find_model("pruneops.prepare", model)
    base = real.base_model
    if not accepts_encoded_images(real):
        raise UnsupportedError("pruneops.prepare needs transformers 5.18 or later; use pruneops.patch")
    if not method.after_projector:
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
    given = dict(inputs)
    with torch.set_grad_enabled(torch.is_grad_enabled() and real.training):
        encoded = _encode(base, inputs, present, method)
        features = {name: out.pooler_output for name, out in encoded.items()}
        layout = layout_of(real, features, ids, mask=mask)
        if layout is None:
            return given
        chosen = select(method, features, layout.images)
        for name, out in encoded.items():
            encoded[name] = _with_fewer_tokens(out, layout.images, chosen, name)
    index, _, tokens, _ = keep_tokens(layout.tokens, chosen)
    positions = inputs.get("position_ids")
    if positions is None:
        positions = real._prepare_position_ids_for_generation(ids, given)
    names = [name for name, own in inputs.items() if isinstance(own, torch.Tensor) and own.shape == ids.shape]
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
        inputs["position_ids"] = tensors[-1] - uploaded(torch.tensor(removed)[:, None], ids.device)
    # without a cache and a mask, gaps between positions would pass for packed sequences
    inputs["mm_encoder_outputs"], inputs["use_cache"] = encoded, True
    return inputs


def _encode(base, inputs, present, method):
    """{modality: the encoder's outputs}; takes what the encoders read out of `inputs`."""
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


def _with_fewer_tokens(encoded, rows, chosen, modality):
    """The encoder's outputs, kept tokens only; deepstack features (Qwen3-VL) too."""
    keep = [
        (first, size, ranks)
        for row, own in zip(rows, chosen)
        for (name, first, size), ranks in zip(row, own)
        if name == modality
    ]
    encoded = copy.copy(encoded)
    encoded.pooler_output = _kept(encoded.pooler_output, keep)
    if getattr(encoded, "deepstack_features", None) is not None:
        encoded.deepstack_features = [_kept(own, keep) for own in encoded.deepstack_features]
    return encoded


def _kept(tensors, keep):
    """One tensor an image where the encoder gave a list; where it gave one, tiles of a size that divides all images."""
    parts = [features_of(tensors, first, size).index_select(0, ranks) for first, size, ranks in keep]
    if not isinstance(tensors, torch.Tensor):
        return parts
    joined = torch.cat(parts)
    return joined if tensors.dim() == 2 else joined.unflatten(0, (-1, math.gcd(*map(len, parts))))
