"""Networks of the learned methods, and their weight files: safetensors that say which network they hold.

They need torch and safetensors; `pruneops.training` trains them. A network is small beside the model it prunes for, and
runs in the dtype of what it reads.
"""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import ArgumentValueError, check

SCHEMA = "1"
GROUPS = 4  # system, image, instruction, response
Rotary = tuple[Tensor, Tensor]  # cos and sin [.., S, Dr], as decoder layers get them


class Network(nn.Module):
    """A network that is made from a configuration of JSON values, `config`, and saved with it."""

    kind: ClassVar[str]

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config


N = TypeVar("N", bound=Network)


class TransformerLayer(nn.Module):
    """Pre-norm attention and SwiGLU, with grouped queries and rotary embeddings: a Llama layer, causal or not.

    Parameters
    ----------
    width : int
        D
    heads, key_heads, head_dim : int
        H, Hk and Dh.
    hidden : int
        Width inside the MLP.
    bias : bool
        Of the projections of queries, keys and values (Qwen2).
    eps : float
        Of the norms.
    """

    def __init__(
        self, width: int, heads: int, key_heads: int, head_dim: int, hidden: int, bias: bool = False, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
        self.q_proj = nn.Linear(width, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, key_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, key_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, hidden: Tensor, rotary: Rotary, causal: bool) -> Tensor:
        """[B, S, D] to [B, S, D]; rotary [B or 1, S, Dr]."""
        x = self.input_layernorm(hidden)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotated(query, rotary), rotated(key, rotary)
        x = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
        hidden = hidden + self.o_proj(x.transpose(1, 2).flatten(2))
        x = self.post_attention_layernorm(hidden)
        return hidden + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class CrossAttentionLayer(nn.Module):
    """Pre-norm attention from visual tokens to text tokens, with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.visual_norm, self.text_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, visual: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """visual [B, n, D], text [B, S, D], mask bool [B, S] to [B, n, D]; a row without text is unchanged."""
        source = self.text_norm(text)
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.q_proj(self.visual_norm(visual)), self.k_proj(source), self.v_proj(source))
        )
        some = mask.any(1, keepdim=True)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=(mask | ~some)[:, None, None])
        return visual + self.o_proj(out.transpose(1, 2).flatten(2)) * some[..., None]


class SelectorNetwork(Network):
    """The feature selector of adaptive token selection: transformer layers over an image's tokens, two classes each.

    Parameters
    ----------
    features : int
        D of the tokens.
    width, layers, heads : int
        Of its transformer layers; tokens are projected if `width` is not `features`.

    Notes
    -----
    Source: "Adaptive vision token selection for multi-modal inference", section 4.1.1.
    """

    kind = "selector"

    def __init__(self, *, features: int, width: int, layers: int = 4, heads: int = 4) -> None:
        super().__init__(features=features, width=width, layers=layers, heads=heads)
        self.head_dim = width // heads
        self.project = nn.Identity() if width == features else nn.Linear(features, width)
        self.layers = nn.ModuleList(
            TransformerLayer(width, heads, heads, self.head_dim, 2 * width) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 2)

    def forward(self, features: Tensor) -> Tensor:
        """[B, n, D] to logits [B, n, 2] of dropping and keeping a token."""
        hidden, rotary = self.project(features), token_rotary(features, self.head_dim)
        for layer in self.layers:
            hidden = layer(hidden, rotary, causal=False)
        return self.head(self.norm(hidden))


class RateClassifier(Network):
    """DyRate's linear classifier from attention distributions to pruning rates, one for each average budget.

    Parameters
    ----------
    keeps : sequence of float
        Average shares of the visual tokens that it was trained to keep.
    rates : int
        K: rate k of 0 .. K - 1 drops k / K of an image's tokens.
    heads : int
        H of the decoder.
    layer : int
        The decoder layer from which on tokens are dropped, by the attention of the layer before.

    Notes
    -----
    Source: arXiv:2501.14204, section III-C, Eqs. 1 and 2.
    """

    kind = "dyrate"

    def __init__(self, *, keeps: Sequence[float], rates: int, heads: int, layer: int) -> None:
        super().__init__(keeps=list(keeps), rates=rates, heads=heads, layer=layer)
        self.keeps, self.rates, self.layer = tuple(keeps), rates, layer
        self.weight = nn.Parameter(torch.zeros(len(self.keeps), rates, heads * GROUPS))
        self.bias = nn.Parameter(torch.zeros(len(self.keeps), rates))

    def forward(self, distribution: Tensor, keep: int) -> Tensor:
        """Distributions v_t [.., 4 H] to logits [.., K] of the rates, for the budget of index `keep`."""
        return F.linear(distribution, self.weight[keep], self.bias[keep])


class RankingModel(Network):
    """DTR's token-ranking model: B decoder layers, C cross-attention layers from image to text, an M-layer MLP.

    Parameters
    ----------
    width : int
        D of the decoder.
    classes : int
        J + 1 (ranks 0 .. J - 1, then "not ranked"), or 2 (ranked, not ranked).
    base : dict, optional
        Settings of `TransformerLayer` for the B layers, and their number as "layers"; None for B = 0.
    cross, heads : int
        C and the heads of its layers.
    mlp : int
        M

    Notes
    -----
    Source: DTR, section 3.3.
    """

    kind = "dtr"

    def __init__(
        self, *, width: int, classes: int, base: dict[str, Any] | None = None, cross: int = 2, heads: int = 8,
        mlp: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(width=width, classes=classes, base=base, cross=cross, heads=heads, mlp=mlp)
        settings = dict(base or {})
        self.layers = nn.ModuleList(TransformerLayer(width, **settings) for _ in range(settings.pop("layers", 0)))
        self.cross = nn.ModuleList(CrossAttentionLayer(width, heads) for _ in range(cross))
        self.norm = nn.RMSNorm(width)
        inner = [module for _ in range(mlp - 1) for module in (nn.Linear(width, width), nn.GELU())]
        self.mlp = nn.Sequential(*inner, nn.Linear(width, classes))

    def forward(self, hidden: Tensor, visual: Tensor, text: Tensor, rotary: Rotary | None) -> Tensor:
        """Rank logits of visual tokens.

        Parameters
        ----------
        hidden : Tensor [B, S, D]
            Input of the decoder, without the answer; padding only at the end.
        visual : Tensor [B, n], int64
            Positions of the visual tokens.
        text : Tensor [B, S], bool
            Which tokens are text.
        rotary : tuple of Tensor [B, S, Dr], optional
            Cos and sin of the decoder's rotary embeddings; not read if B is 0.

        Returns
        -------
        Tensor [B, n, J + 1]
        """
        if len(self.layers):
            check(rotary is not None, "networks.RankingModel", "rotary", None, "given: it has decoder layers")
        for layer in self.layers:
            hidden = layer(hidden, cast(Rotary, rotary), causal=True)
        tokens = hidden.gather(1, visual[..., None].expand(-1, -1, hidden.shape[-1]))
        for layer in self.cross:
            tokens = layer(tokens, hidden, text)
        return self.mlp(self.norm(tokens))


def expected_rate(logits: Tensor) -> Tensor:
    """The mean of the rates 0 .. K - 1 under the softmax of logits [.., K], to the nearest: int64 [..].

    In training rates are drawn; their mean is what the FLOPs are held to.
    """
    rates = torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)
    return (logits.softmax(-1) * rates).sum(-1).round().long()


NETWORKS: dict[str, type[Network]] = {kind.kind: kind for kind in (SelectorNetwork, RateClassifier, RankingModel)}


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of x [B, H, S, Dh] in its first Dr features, halves paired."""
    cos, sin = (part.unsqueeze(1).to(x.dtype) for part in rotary)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-high, low], -1) * sin, rest], -1)


def token_rotary(features: Tensor, head_dim: int) -> Rotary:
    """Rotary embeddings [1, n, Dh] of the tokens' numbers, for features [.., n, D]."""
    frequency = 100.0 ** -torch.linspace(0, 1, head_dim // 2, device=features.device)
    angle = torch.arange(features.shape[-2], device=features.device)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


def save(network: Network, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
    """Write a network's configuration and weights, whole or not at all.

    Parameters
    ----------
    network : Network
    path : path
        A .safetensors file, in a folder that exists.
    dtype : torch.dtype
        Of the weights in the file.
    """
    from safetensors.torch import save as serialised

    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in network.state_dict().items()}
    about = {"pruneops": network.kind, "schema": SCHEMA, "config": json.dumps(network.config)}
    path, part = Path(path), Path(f"{path}.{os.getpid()}.part")
    try:
        part.write_bytes(serialised(state, about))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(expected: type[N], path: str | os.PathLike[str], device: Any = "cpu", dtype: torch.dtype = torch.float32) -> N:
    """The network in a file that `save` wrote; kept for the next call until the file changes.

    Parameters
    ----------
    expected : type
        `SelectorNetwork`, `RateClassifier` or `RankingModel`.
    path : path
    device : torch.device or str
    dtype : torch.dtype

    Returns
    -------
    Network
        In evaluation mode.

    Raises
    ------
    ValueError
        If there is no such file, or it holds no network of this kind, or one whose weights do not fit.
    """
    path = Path(path)
    try:
        stat = path.stat()
    except OSError as error:
        raise ArgumentValueError(f"pruneops: weights {path} cannot be read: {error.strerror}") from None
    return cast(N, _load(expected, path, (stat.st_mtime_ns, stat.st_size), str(device), dtype))


@functools.lru_cache(maxsize=16)
def _load(expected, path, version, device, dtype):
    from safetensors import SafetensorError, safe_open

    def refuse(reason):
        raise ArgumentValueError(
            f"pruneops: weights {path}: {reason}; expected a {expected.kind!r} file that `python -m pruneops.training "
            f"{expected.kind}` wrote"
        ) from None

    try:
        with torch.inference_mode(False), safe_open(path, "pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        refuse(f"no safetensors file ({error})")
    if "pruneops" not in about:
        refuse("not written by pruneops")
    if about["pruneops"] != expected.kind or about.get("schema") != SCHEMA:
        refuse(f"holds {about['pruneops']!r} of schema {about.get('schema')}")
    with torch.inference_mode(False), torch.no_grad():
        try:
            with torch.device("meta"):
                network = expected(**json.loads(about["config"]))
            network.load_state_dict(state, strict=True, assign=True)
        except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, ArithmeticError) as error:
            refuse(f"its weights do not fit its configuration ({str(error).strip().splitlines()[-1].strip()})")
        return network.to(device, dtype).eval().requires_grad_(False)
