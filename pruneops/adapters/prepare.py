"""Pruning after the projector as a pure function: the inputs of a model, with fewer tokens for its images."""

import copy
import inspect
import itertools

import torch

from ..methods import Image
from ..ops import gather_tokens
from .tower import Tower
from .transformers import UnsupportedError, expect_family, is_visual, left_padded


@torch.no_grad()
def prepare(model, inputs, method):
    """Inputs of `model.generate` whose images are encoded and pruned already; the model itself stays as it is.

    Chunked prefill, static caches, beams, assisted decoding and prompt lookup work as ever, because the model only sees
    a shorter prompt. Needs transformers 5.18; before that use `patch`.

    Parameters
    ----------
    model : PreTrainedModel
        One of those that `patch` knows.
    inputs : mapping
        What the processor made: input_ids, attention_mask, pixel_values, ...
    method : pruneops.methods.Method
        One that prunes after the projector; its `layers`, if it has any, are not looked at.

    Returns
    -------
    dict
        input_ids, attention_mask, position_ids (the original ones) and mm_encoder_outputs in place of pixels, and
        whatever else `inputs` held.

    Raises
    ------
    UnsupportedError
        On an unknown architecture or an older transformers, on videos, and on a method that does not prune
        after the projector.
    """
    expect_family("pruneops.prepare", model)
    base = model.base_model
    if "mm_encoder_outputs" not in inspect.signature(type(base).forward).parameters:
        raise UnsupportedError("pruneops.prepare needs transformers 5.18 or later; use pruneops.patch")
    if inputs.get("pixel_values_videos") is not None:
        raise UnsupportedError("pruneops.prepare: videos are not supported; use pruneops.patch")
    if not method.after_projector:
        raise UnsupportedError(f"pruneops.prepare: {method} does not prune after the projector; use pruneops.patch")
    inputs = dict(inputs)
    ids = inputs["input_ids"]
    if inputs.get("pixel_values") is None:
        return inputs
    mask = inputs.get("attention_mask")
    positions = model._prepare_position_ids_for_generation(ids, dict(inputs))

    tower = Tower(model)
    names = [name for name in inspect.signature(base.get_image_features).parameters if name in inputs]
    try:
        encoded = base.get_image_features(**{name: inputs.pop(name) for name in names}, return_dict=True)
        features = list(encoded.pooler_output)
        rows = images_of_rows(is_visual(model, ids).sum(1).tolist(), [len(own) for own in features])
        seen = tower.images([[len(features[i]) for i in row] for row in rows])
    finally:
        tower.forget()
    chosen = {}
    for row, fields in zip(rows, seen):
        images = [Image(features[i], **own) for i, own in zip(row, fields)]
        chosen |= dict(zip(row, method.select_each(images)))
    chosen = [chosen[i].to(ids.device) for i in range(len(features))]

    keep, valid = shortened(
        ids, mask, is_visual(model, ids), [[(len(features[i]), chosen[i]) for i in row] for row in rows]
    )
    names = [name for name in ("input_ids", "mm_token_type_ids", "token_type_ids") if inputs.get(name) is not None]
    tensors = gather_tokens([*(inputs[name] for name in names), positions], keep, dim=[-1] * (len(names) + 1))
    inputs |= dict(zip(names, tensors))
    inputs["position_ids"], inputs["attention_mask"] = tensors[-1], valid.to(ids.dtype)
    filler = model.config.get_text_config().pad_token_id or 0
    inputs["input_ids"] = inputs["input_ids"].masked_fill(~valid, filler)
    inputs["mm_encoder_outputs"] = {"image": with_images(encoded, features, chosen)}
    for name in ("image_grid_thw", "image_sizes"):
        inputs.pop(name, None)
    return inputs


def images_of_rows(tokens, sizes):
    """Numbers of the images of every row, whose visual tokens are `tokens`, in order."""
    rows, image = [], 0
    for total in tokens:
        row = []
        while total > 0 and image < len(sizes):
            row.append(image)
            total -= sizes[image]
            image += 1
        rows.append(row)
    if image != len(sizes) or sum(tokens) != sum(sizes):
        raise ValueError(f"pruneops.prepare: {sum(tokens)} image tokens in the prompts for {sum(sizes)} image features")
    return rows


def shortened(ids, mask, visual, images):
    """(keep [B, S'], valid [B, S']): tokens that stay, padded on the left.

    images: of every row, (size, ranks that stay) of each image.
    """
    kept = []
    for row in range(len(ids)):
        stays = ~visual[row] if mask is None else mask[row].bool() & ~visual[row]
        places, ends = visual[row].nonzero()[:, 0], itertools.accumulate(size for size, _ in images[row])
        for end, (size, ranks) in zip(ends, images[row]):
            stays[places[end - size : end][ranks]] = True
        kept.append(stays.nonzero()[:, 0])
    return left_padded(kept)


def with_images(encoded, features, chosen):
    """The encoder's outputs with fewer tokens of every image, deepstack features (Qwen3-VL) too."""
    encoded = copy.copy(encoded)
    pruned = [own[ranks] for own, ranks in zip(features, chosen)]
    encoded.pooler_output = torch.stack(pruned) if isinstance(encoded.pooler_output, torch.Tensor) else pruned
    deepstack = getattr(encoded, "deepstack_features", None)  # for every layer, of every image or joined
    if deepstack is not None:
        sizes = [len(own) for own in features]
        split = [own.split(sizes) if isinstance(own, torch.Tensor) else own for own in deepstack]
        pruned = [[own[ranks] for own, ranks in zip(layer, chosen)] for layer in split]
        joined = isinstance(deepstack[0], torch.Tensor)
        encoded.deepstack_features = [torch.cat(layer) if joined else layer for layer in pruned]
    return encoded
