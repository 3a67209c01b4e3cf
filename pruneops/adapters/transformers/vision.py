"""Encoding of images, with attention from [CLS] where the vision tower has one; selection of their tokens."""

import contextlib
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch

from ...methods import Image, cls_attention
from .models import UnsupportedError
from .token_layout import features_of, spans_from_counts

# ids of the dictionaries into which this context captures projections
CAPTURED: ContextVar[tuple[int, ...]] = ContextVar("pruneops_vision_capture", default=())


def check_cls_attention(model, method):
    if "cls_attention" in getattr(method, "requires", ()) and _last_attention(model) is None:
        raise UnsupportedError(
            f"pruneops: {method} chooses by cls_attention, and the vision tower of a {model.config.model_type} has no "
            "[CLS] that pruneops knows of; use another method, such as ToDRE or DivPrune"
        )


def encode(model, encoder, arguments, method):
    """The encoder's outputs; each image's tensor of `pooler_output` has `Image`'s optional fields as an attribute.

    Parameters
    ----------
    model : PreTrainedModel
        The base model.
    encoder : callable
        Its `get_image_features` or `get_video_features`.
    arguments : dict
        Of the encoder.
    method : Method
        Decides whether [CLS] attention is computed.
    """
    reads = method.after_projector and "cls_attention" in getattr(method, "reads", ())
    if not reads or (tower := _last_attention(model)) is None:
        return encoder(**arguments)
    with _capture(tower) as captured:
        encoded = encoder(**arguments)
    features = getattr(encoded, "pooler_output", None)
    if len(captured) == 2 and isinstance(features, (list, tuple)):
        heads = model.config.vision_config.num_attention_heads
        query, key = (captured[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj"))
        with torch.no_grad():
            attention = cls_attention(query, key)  # [tiles, n]
        counts = _tiles(model, arguments, len(features))
        if sum(counts) == len(attention):
            for image, (first, _) in zip(features, spans_from_counts(counts)):
                image._pruneops_fields = _fields(model, attention[first], len(image))
    return encoded


def as_merged(model, modality, arguments, encoded):
    """The encoder's outputs as the model puts them into the prompt.

    LLaVA-OneVision ends a video with a newline; transformers 5.0 adds it after the encoder.
    """
    if model.config.model_type != "llava_onevision" or modality != "video":
        return encoded
    videos = next(arguments[name] for name in ("pixel_values_videos", "pixel_values") if name in arguments)
    side = -(model.config.vision_config.image_size // model.config.vision_config.patch_size // -2)
    features = encoded.pooler_output
    if features.shape[1] == videos.shape[1] * side**2:
        newline = model.image_newline.expand(len(features), 1, -1)
        return SimpleNamespace(pooler_output=torch.cat([features, newline.to(features)], 1))
    return encoded


def image_fields(features):
    """`Image`'s optional fields of an image, as `encode` set them."""
    return getattr(features, "_pruneops_fields", {})


@torch.no_grad()
def select(method, features, rows):
    """Ranks of the chosen tokens within every image of every row.

    Beams of one prompt share its features, and so its choice.

    features: {modality: the encoder's output}; rows: see `token_layout.Layout.images`.
    """
    chosen, cached = [], {}
    for row in rows:
        images = [features_of(features[name], first, size) for name, first, size in row]
        key = tuple(image.data_ptr() for image in images)
        if key not in cached:
            cached[key] = method.select_each([Image(image, **image_fields(image)) for image in images])
        chosen.append(cached[key])
    return chosen


def _last_attention(model):
    """The attention module of the vision tower's last layer, if its first token is [CLS]."""
    if getattr(getattr(model.config, "vision_config", None), "model_type", None) != "clip_vision_model":
        return None
    return [module for module in model.vision_tower.modules() if hasattr(module, "q_proj")][-1]


@contextlib.contextmanager
def _capture(attention):
    """A dictionary of the outputs of q_proj and k_proj, of calls in this context only."""
    captured: dict[str, Any] = {}
    hooks = [
        getattr(attention, name).register_forward_hook(_CaptureHook(name, captured)) for name in ("q_proj", "k_proj")
    ]
    token = CAPTURED.set((*CAPTURED.get(), id(captured)))
    try:
        yield captured
    finally:
        CAPTURED.reset(token)
        for hook in hooks:
            hook.remove()


class _CaptureHook:
    def __init__(self, name, captured):
        self.name, self.captured = name, captured

    def __call__(self, module, args, output):
        if id(self.captured) in CAPTURED.get():  # another thread may run the tower at the same time
            self.captured[self.name] = output.detach()


def _tiles(model, arguments, images):
    """Tiles of every image: several with AnyRes, else one."""
    sizes = arguments.get("image_sizes")
    if model.config.model_type != "llava_next" or sizes is None:
        return [1] * images
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = model.config.vision_config.image_size
    return [image_size_to_num_patches(size, model.config.image_grid_pinpoints, side) for size in sizes]


def _fields(model, attention, size):
    """`Image`'s optional fields of an image of `size` tokens.

    AnyRes: the first tile is the thumbnail, whose tokens come first; the attention of other tiles is not used.
    """
    n = len(attention)
    if size == n + 1 and model.config.vision_feature_select_strategy == "full":
        return {"cls_attention": torch.nn.functional.pad(attention, (1, 0))}
    if size == n:
        return {"cls_attention": attention}
    return {"cls_attention": torch.nn.functional.pad(attention, (0, size - n)), "thumbnail": (0, n)}
