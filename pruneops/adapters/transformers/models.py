"""Which models are supported, and where their parts are."""

import inspect

import torch
from transformers import PreTrainedModel

# What the vision encoder's outputs are cut into, by `config.model_type`:
#   "image"  one tensor an image (or video), whatever stands between its tokens in the prompt
#   "run"    tiles one after another; an image's are one run of tokens in the prompt
#   "tiles"  tiles one after another; each is a run of its own, and `tiles_length` says which make an image
FAMILIES = {
    "llava": "image",  # Pixtral too: break tokens stand between its rows
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
FRAMES_AS_IMAGES = "glm4v", "glm4v_moe"  # the frames of a video have the image token


class UnsupportedError(RuntimeError):
    """What was asked for cannot be pruned; the message says why and what to do."""


def find_model(who, model):
    """The supported model inside wrappers (PEFT, torch.compile, DataParallel, accelerate), which are modules too."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    if len(getattr(model, "device_ids", None) or ()) > 1 and isinstance(model, torch.nn.DataParallel):
        raise UnsupportedError(
            f"{who}: DataParallel over several devices copies the model for every pass; use one process a device "
            "(torchrun, DistributedDataParallel)"
        )
    inside, found = set(), []
    for module in modules:
        if isinstance(module, PreTrainedModel) and module.config.model_type in FAMILIES and module not in inside:
            found.append(module)
            inside.update(module.modules())
    if len(found) == 1:
        return found[0]
    if found:
        raise UnsupportedError(f"{who}: {len(found)} supported models inside this one; give one of them")
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    raise UnsupportedError(f"{who}: {kind} is not supported; supported are {', '.join(FAMILIES)}")


def layout_kind(model):
    return FAMILIES[model.config.model_type]


def tile_tokens(model, counts):
    """Tokens of a tile, where the encoder's outputs are tiles."""
    kind, vision = layout_kind(model), getattr(model.config, "vision_config", None)
    if kind == "run":
        return next((own[0] for own in counts.values() if own), None)
    return (vision.image_size // vision.patch_size) ** 2 // model.config.scale_factor**2 if kind == "tiles" else None


def visual_tokens(model, ids, embeds=None):
    """{modality: bool [B, S]}: which tokens stand for images, and which for videos.

    Without ids, as transformers does: the tokens whose embedding is that of the placeholder.
    """
    found = {}
    for name in MODALITIES:
        of = "image" if model.config.model_type in FRAMES_AS_IMAGES else name
        token = getattr(model.config, f"{of}_token_id", None)
        if token is None:
            continue
        if ids is not None:
            found[name] = ids == token
        else:
            placeholder = model.get_input_embeddings()(torch.full((), token, device=embeds.device))
            found[name] = (embeds == placeholder).all(-1)
    return found


def accepts_encoded_images(model):
    """Whether images may be given as the encoder's outputs: transformers 5.18."""
    return "mm_encoder_outputs" in inspect.signature(type(model.base_model).forward).parameters


def attention_implementation(decoder):
    return decoder.config._attn_implementation or ""
