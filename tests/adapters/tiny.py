"""Tiny models of every supported family with random weights, and prompts for them."""

import torch
import transformers

TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **VISION}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, **VISION}
IMAGE, VIDEO, START, END = 120, 121, 122, 123
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _llama(**changes):
    return {"model_type": "llama", **TEXT, **changes}


def _llava():
    config = transformers.LlavaConfig(
        text_config=_llama(), vision_config=CLIP, image_token_id=IMAGE, vision_feature_select_strategy="default"
    )
    return transformers.LlavaForConditionalGeneration, config, {"tokens": 16, "pixels": (1, 3, 32, 32)}


def _qwen_vision(**changes):
    return {
        "depth": 2, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3, "in_chans": 3, **changes,
    }  # fmt: skip


def _qwen_image():
    """4 x 6 patches, merged 2 x 2: 6 tokens."""
    return {"tokens": 6, "pixels": (24, 48), "grid": [[1, 4, 6]]}


def _qwen2_vl():
    text = {"model_type": "qwen2_vl_text", **TEXT, "rope_parameters": MROPE}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=_qwen_vision(hidden_size=32, mlp_ratio=2), **QWEN_IDS
    )
    return transformers.Qwen2VLForConditionalGeneration, config, _qwen_image()


def _qwen2_5_vl():
    text = {"model_type": "qwen2_5_vl_text", **TEXT, "rope_parameters": MROPE}
    vision = _qwen_vision(out_hidden_size=32, window_size=16, fullatt_block_indexes=[1])
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    return transformers.Qwen2_5_VLForConditionalGeneration, config, _qwen_image()


def _qwen3_vl():
    text = {"model_type": "qwen3_vl_text", **TEXT, "head_dim": 8, "rope_parameters": MROPE}
    vision = _qwen_vision(out_hidden_size=32, deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    return transformers.Qwen3VLForConditionalGeneration, config, _qwen_image()


def _llava_next():
    config = transformers.LlavaNextConfig(
        text_config=_llama(), vision_config=CLIP, image_token_id=IMAGE, image_grid_pinpoints=[[32, 32], [32, 64]],
        vision_feature_select_strategy="default",
    )  # fmt: skip
    # the thumbnail's 16, and 4 x 4 with a newline for every row
    return (
        transformers.LlavaNextForConditionalGeneration,
        config,
        {"tokens": 16 + 20, "pixels": (1, 2, 3, 32, 32), "sizes": [[32, 32]]},
    )


def _llava_onevision():
    config = transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT}, vision_config=SIGLIP, image_token_id=IMAGE, video_token_id=VIDEO,
        image_grid_pinpoints=[[32, 32], [32, 64]], vision_feature_select_strategy="full",
    )  # fmt: skip
    return (
        transformers.LlavaOnevisionForConditionalGeneration,
        config,
        {"tokens": 16 + 20, "pixels": (1, 2, 3, 32, 32), "sizes": [[32, 32]]},
    )


def _internvl():
    vision = {"model_type": "internvl_vision", "image_size": [32, 32], "patch_size": [8, 8], **VISION}
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT}, vision_config=vision, image_token_id=IMAGE, downsample_ratio=0.5
    )
    return transformers.InternVLForConditionalGeneration, config, {"tokens": 4, "pixels": (1, 3, 32, 32)}


def _idefics(kind, vision):
    config = getattr(transformers, f"{kind}Config")(
        text_config=_llama(), vision_config={"image_size": 32, "patch_size": 8, **VISION}, image_token_id=IMAGE,
        scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForConditionalGeneration")
    return model, config, {"tokens": 4, "pixels": (1, 1, 3, 32, 32)}


FAMILIES = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "idefics3": lambda: _idefics("Idefics3", None),
    "smolvlm": lambda: _idefics("SmolVLM", None),
}


def model_of(family, attention="sdpa", seed=0):
    """(model, image): `image` says how many tokens an image has and what its tensors look like."""
    torch.manual_seed(seed)
    cls, config, image = FAMILIES[family]()
    config._attn_implementation = attention
    model = cls(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # attention that is far from uniform
    model.set_attn_implementation(attention)
    return model, image


def prompts(image, texts, seed=0):
    """Inputs of a batch: each of `texts` is a list of pieces, an int for so many text tokens or "image"."""
    generator = torch.Generator().manual_seed(seed)
    rows, count = [], 0
    for pieces in texts:
        row = []
        for piece in pieces:
            if piece == "image":
                count += 1
                row += [START, *[IMAGE] * image["tokens"], END] if "grid" in image else [IMAGE] * image["tokens"]
            else:
                row += torch.randint(2, 100, (piece,), generator=generator).tolist()
        rows.append(row)
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])}
    if not count:
        return inputs
    shape = image["pixels"]
    pixels = torch.randn(count, *shape, generator=generator)
    inputs["pixel_values"] = pixels.flatten(0, 1)
    if "grid" in image:
        inputs["image_grid_thw"] = torch.tensor(image["grid"] * count)
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if "sizes" in image:
        inputs["image_sizes"] = torch.tensor(image["sizes"] * count)
    if len(shape) == 5 and "sizes" not in image:  # [batch, images of a row, ...]
        per_row = count // len(rows)
        inputs["pixel_values"] = pixels.view(len(rows), per_row, *shape[2:])
    return inputs
