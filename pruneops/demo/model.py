"""A LLaVA-shaped model with random weights: CLIP tower, projector, decoder.

The widths are those of CLIP ViT-L/14-336 and, on a GPU, of LLaVA-1.5-7B; on a CPU the depths and
the decoder's width are cut so that the demo takes seconds. Attention is scaled_dot_product_attention
throughout: [CLS] attention is computed for its one row only, D^2 (N + 1) operations for the keys.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModel, CLIPVisionConfig, LlamaConfig

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are LLaVA-1.5-7B's."""

    crop: int = 336
    patch: int = 14
    tower_width: int = 1024
    tower_layers: int = 24
    tower_heads: int = 16
    width: int = 4096
    layers: int = 32
    heads: int = 32
    inner: int = 11008
    dtype: torch.dtype = torch.bfloat16


def shape_for(device):
    """LLaVA-1.5-7B on a GPU, with as many decoder layers as its free memory holds; a small one on a CPU."""
    if device.type == "cpu":
        return Shape(tower_layers=8, width=1024, layers=8, heads=8, inner=2752, dtype=torch.float32)
    free, _ = torch.cuda.mem_get_info(device)
    layer = 0.5 * GIB  # 0.38 GiB of weights, and its share of the KV cache
    return replace(Shape(), layers=max(1, min(32, int((free - 4 * GIB) // layer))))


def build(shape, device):
    """(tower, projector, decoder) with random weights from torch's current seed."""
    tower = CLIPVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=4 * shape.tower_width,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=shape.crop,
        patch_size=shape.patch,
    )
    decoder = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
        vocab_size=32,  # inputs are embeddings: the table is not used
    )
    with torch.device(device):
        tower, decoder = (
            AutoModel.from_config(config, dtype=shape.dtype, attn_implementation="sdpa").eval()
            for config in (tower, decoder)
        )
        projector = nn.Sequential(
            nn.Linear(shape.tower_width, shape.width), nn.GELU(), nn.Linear(shape.width, shape.width)
        ).to(shape.dtype)
    return tower, projector, decoder


def see(tower, pixels):
    """What LLaVA takes from its tower, and what ToDRE's pivot is taken from.

    Returns
    -------
    features : Tensor [tiles, tokens, width]
        Output of the last layer but one, without [CLS].
    cls_attention : Tensor [tokens], float32
        Attention of [CLS] in the last layer over the tokens of tile 0, mean over heads.
    """
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    layer = _layers(tower)[-1]
    attention = layer.self_attn
    tokens = layer.layer_norm1(hidden[0])  # [1 + tokens, width]
    split = (-1, attention.num_heads, attention.head_dim)
    query = attention.q_proj(tokens[:1]).view(split).float()
    key = attention.k_proj(tokens).view(split).float()
    logits = torch.einsum("qhd,khd->hk", query, key) * attention.head_dim**-0.5
    return hidden[:, 1:], logits.softmax(-1).mean(0)[1:]


def prefill(decoder, embeddings, positions):
    """(last hidden state, KV cache) of embeddings [1, S, D] at ascending positions [1, S]."""
    # with no mask transformers would read a gap in the positions as the start of another sequence
    mask = torch.ones_like(positions)
    out = decoder(inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=True)
    return out.last_hidden_state, out.past_key_values


def cache_bytes(cache):
    """Bytes of all keys and values in a KV cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _layers(tower):
    """Layers of a CLIPVisionModel; early versions keep them one level down, in vision_model."""
    return getattr(tower, "vision_model", tower).encoder.layers
