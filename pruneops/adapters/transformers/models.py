"""The supported models and their parts."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# The outputs of the vision encoder, by `config.model_type`:
#   "image"  a tensor per image (or video); other tokens may stand between its tokens in the prompt
#   "run"    tiles one after another; those of an image are one run of tokens in the prompt
#   "tiles"  tiles one after another; each is a run of tokens, and `tiles_length` says which make an image
FAMILIES: dict[str, str] = {
    "llava": "image",  # Pixtral too, with break tokens between its rows
    "llava_next": "image",
    "llava_onevision": "image",
    "qwen2_vl": "image",
    "qwen2_5_vl": "image",
    "qwen3_vl": "image",
    "qwen3_vl_moe": "image",
    "glm4v": "image",
    "glm4v_moe": "image",
    "mistral3": "image",
    "internvl": "run",
    "idefics3": "tiles",
    "smolvlm": "tiles",
}
MODALITIES = "image", "video"
FRAMES_AS_IMAGES = "glm4v", "glm4v_moe"  # frames of a video are image tokens


class UnsupportedError(RuntimeError):
    """The model or the request cannot be pruned; the message says why and what to do."""


def find_model(caller: str, model: Any) -> Any:
    """The supported model inside wrappers, which are modules too: PEFT, torch.compile, DataParallel, accelerate.

    `caller` begins the error messages.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    if len(getattr(model, "device_ids", None) or ()) > 1 and isinstance(model, torch.nn.DataParallel):
        raise UnsupportedError(
            f"{caller}: DataParallel over several devices copies the model for every pass; use one process a device "
            "(torchrun, DistributedDataParallel)"
        )
    inside, matches = set(), []
    for module in modules:
        if isinstance(module, PreTrainedModel) and module.config.model_type in FAMILIES and module not in inside:
            matches.append(module)
            inside.update(module.modules())
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UnsupportedError(f"{caller}: {len(matches)} supported models inside this one; give one of them")
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    raise UnsupportedError(f"{caller}: {kind} is not supported; supported are {', '.join(FAMILIES)}")


def layout_kind(model):
    return FAMILIES[model.config.model_type]


def tile_tokens(model, counts):
    """Tokens of a tile, or None if the encoder's outputs are not tiles."""
    kind = layout_kind(model)
    if kind == "run":
        return next((sizes[0] for sizes in counts.values() if sizes), None)
    if kind == "tiles":
        vision = model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // model.config.scale_factor**2
    return None


def visual_tokens(model: Any, ids: Tensor | None, embeds: Any = None) -> dict[str, Tensor]:
    """{modality: bool [B, S]}: the placeholder tokens of images, and those of videos.

    Without ids, as transformers does: the tokens whose embedding is that of the placeholder.
    """
    visual = {}
    for name in MODALITIES:
        placeholder = "image" if model.config.model_type in FRAMES_AS_IMAGES else name
        token = getattr(model.config, f"{placeholder}_token_id", None)
        if token is None:
            continue
        if ids is not None:
            visual[name] = ids == token
        else:
            embedding = model.get_input_embeddings()(torch.full((), token, device=embeds.device))
            visual[name] = (embeds == embedding).all(-1)
    return visual


def rotary_at(caller: str, decoder: Any, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin [B, S, Dr] of a decoder's rotary embeddings.

    embeds: [B, S, D]; positions: [B or 1, S], or [P, B or 1, S] with mRoPE; `caller` begins the error message.
    """
    positions = positions[1:] if positions.dim() == 3 and len(positions) == 4 else positions  # the first is the text's
    cos, sin = decoder.rotary_emb(embeds, positions.expand(*positions.shape[:-2], *embeds.shape[:2]))
    if cos.dim() != 3:
        raise UnsupportedError(f"{caller}: this transformers keeps the axes of mRoPE apart; take 5.18 or later")
    return cos, sin


def accepts_encoded_images(model):
    """Whether images can be passed as the encoder's outputs: transformers 5.18."""
    return "mm_encoder_outputs" in inspect.signature(type(model.base_model).forward).parameters


def attention_implementation(decoder):
    return decoder.config._attn_implementation or ""
