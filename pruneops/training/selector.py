"""Training of the adaptive selector: tokens are worth keeping if the others cannot be rebuilt without them.

The selector drops tokens, a feature reconstructor rebuilds them from those that are left, an image reconstructor paints
the image from the result. Source: "Adaptive vision token selection for multi-modal inference", sections 4.1 to 4.6.
"""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks import SelectorNetwork, TransformerLayer, token_rotary
from .data import Example
from .loop import LoopConfig, Task

FORMS = "straight-through", "annealed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectorConfig(LoopConfig):
    """Settings of the selector's training.

    Parameters
    ----------
    width : int
        Of all transformer layers; 0 is that of the features.
    heads, layers, rebuild_layers, image_layers : int
        Heads; layers of the selector, the feature reconstructor and the image reconstructor.
    form : {"straight-through", "annealed"}
        Of the Gumbel-Softmax mask: hard with the gradient of the soft one at temperature `tau[1]`, or soft at a
        temperature that falls from `tau[0]` to `tau[1]`, geometrically.
    tau : (float, float)
    p, q : float
        The penalty on the kept share acts above p and, inverted, below q.
    alpha : float
        Weight of the penalty.
    noise : bool
        Whether Gumbel noise is added; without it the mask is the paper's simple straight-through estimator.
    upsample : int
        Doublings from tokens to pixels of the image that is rebuilt; 0 leaves that part of the loss out.

    Notes
    -----
    The paper: width of the encoder, p 0.6, q 0.1, alpha 0.1, lr 1e-5 (LLaVA) or 5e-6 (InternVL), batch 32, 100 epochs.
    """

    batch: int = 32
    lr: float = 1e-5
    width: int = 0
    heads: int = 4
    layers: int = 4
    rebuild_layers: int = 4
    image_layers: int = 2
    form: str = "straight-through"
    tau: tuple[float, float] = (1.0, 1.0)
    p: float = 0.6
    q: float = 0.1
    alpha: float = 0.1
    noise: bool = True
    upsample: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise ValueError(f"config: form must be one of {FORMS}, got {self.form!r}")
        if not 0 <= self.q <= self.p <= 1:
            raise ValueError(f"config: 0 <= q <= p <= 1 is needed, got q = {self.q}, p = {self.p}")
        if len(self.tau) != 2 or not all(isinstance(tau, (int, float)) and tau > 0 for tau in self.tau):
            raise ValueError(f"config: tau must be two temperatures above 0, got {self.tau}")


class SelectorTask(Task):
    """Selector, embedding of dropped tokens, and both reconstructors."""

    model: Any
    processor: Any
    network: SelectorNetwork
    mean: Tensor
    scale: Tensor

    def __init__(self, model: Any, processor: Any, config: SelectorConfig) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.hold(model=model.eval().requires_grad_(False), processor=processor)
        features = model.config.get_text_config().hidden_size
        width = config.width or features
        self.settings = config
        self.network = SelectorNetwork(features=features, width=width, layers=config.layers, heads=config.heads)
        self.dropped = nn.Parameter(torch.zeros(features))
        self.rebuild = Rebuild(features, width, config.rebuild_layers, config.heads)
        self.paint = Paint(features, width, config.image_layers, config.heads, config.upsample)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(()))

    def prepare(self, dataset: Any) -> None:
        """Measure the features' mean and spread, which the loss is relative to."""
        examples = [dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // 32))][:32]
        features = torch.cat([image_features(self.model, self.processor, [example])[0][0] for example in examples])
        self.mean.copy_(features.mean(0))
        self.scale.copy_((features - self.mean).square().mean().sqrt())

    def forward(self, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        losses, parts = [], []
        features, grids = image_features(self.model, self.processor, examples)
        for group in _alike(features, grids):
            x = (torch.stack([features[i] for i in group]) - self.mean) / self.scale
            mask, share = self.mask(self.network(self.scale * x + self.mean))
            rebuilt = self.rebuild(mask[..., None] * x + (1 - mask[..., None]) * self.dropped)
            error = _distance(rebuilt, x)
            image = error.new_zeros(())
            if self.settings.upsample:
                pixels = target([examples[i].image for i in group], grids[group[0]], self.settings.upsample, x.device)
                image = _distance(self.paint(rebuilt, grids[group[0]]), pixels)
            losses.append((error + image + self.penalty(share)) * len(group))
            parts.append(torch.stack([error, image, share]).detach() * len(group))
        total = torch.stack(parts).sum(0) / len(examples)
        return torch.stack(losses).sum() / len(examples), dict(zip(("features", "image", "kept"), total))

    @torch.no_grad()
    def compare(self, examples: Sequence[Example]) -> dict[str, float]:
        """Errors of features rebuilt from the k largest logits and from k random tokens; k is the own mask's count."""
        self.eval()
        features = [tokens - self.mean for tokens in image_features(self.model, self.processor, examples)[0]]
        sums = {"kept": 0.0, "chosen": 0.0, "random": 0.0}
        for x in features:
            x = x[None] / self.scale
            scores = self.network(self.scale * x + self.mean).diff(dim=-1)[..., 0]
            count = max(1, int((scores > 0).sum()))
            sums["kept"] += count / x.shape[1]
            for name, by in (("chosen", scores), ("random", torch.rand_like(scores))):
                kept = torch.zeros_like(x[..., :1]).index_fill(1, by[0].topk(count).indices, 1)
                sums[name] += float(_distance(self.rebuild(kept * x + (1 - kept) * self.dropped), x))
        return {name: value / len(features) for name, value in sums.items()}

    def mask(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(mask [B, n] of 1 for kept tokens, kept share); evaluation takes the likelier class."""
        config = self.settings
        start, end = config.tau
        tau = start * (end / start) ** self.progress if config.form == "annealed" else end
        if not self.training:
            mask = (logits[..., 1] > logits[..., 0]).to(logits.dtype)
            return mask, mask.mean()
        if config.noise:
            logits = logits - torch.empty_like(logits).exponential_().log()
        soft = (logits / tau).softmax(-1)[..., 1]
        mask = soft if config.form == "annealed" else (soft > 0.5).to(soft.dtype) - soft.detach() + soft
        return mask, mask.mean()

    def penalty(self, share: Tensor) -> Tensor:
        """alpha (max(share, p) - min(share, q)), Eq. 8."""
        config = self.settings
        return config.alpha * (share.clamp(min=config.p) - share.clamp(max=config.q))


class Encoder(nn.Module):
    """Transformer layers over an image's tokens: [B, n, D] to [B, n, width]."""

    def __init__(self, features: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.project = nn.Linear(features, width)
        self.layers = nn.ModuleList(
            TransformerLayer(width, heads, heads, self.head_dim, 2 * width) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, rotary = self.project(tokens), token_rotary(tokens, self.head_dim)
        for layer in self.layers:
            hidden = layer(hidden, rotary, causal=False)
        return self.norm(hidden)


class Rebuild(nn.Module):
    """The feature reconstructor, over kept tokens and the embedding of dropped ones: [B, n, D] to [B, n, D]."""

    def __init__(self, features: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(features, width, layers, heads), nn.Linear(width, features)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(tokens))


class Paint(nn.Module):
    """The image reconstructor: transformer layers, then doublings of the resolution between residual blocks."""

    def __init__(self, features: int, width: int, layers: int, heads: int, upsample: int) -> None:
        super().__init__()
        widths = [max(16, width >> i) for i in range(upsample + 1)]
        self.encoder = Encoder(features, width, layers, heads)
        self.blocks = nn.ModuleList(Residual(a) for a in widths[:-1])
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.head = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, h w, D] to [B, 3, h 2^u, w 2^u]"""
        hidden = self.encoder(tokens).transpose(1, 2).unflatten(-1, grid)
        for block, narrow in zip(self.blocks, self.narrow):
            hidden = narrow(F.interpolate(block(hidden), scale_factor=2))
        return self.head(F.gelu(hidden))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.gelu(self.one(F.gelu(x))))


@torch.no_grad()
def image_features(
    model: Any, processor: Any, examples: Sequence[Example]
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Of every example, its image's tokens after the projector [n, D] and their grid (rows, columns).

    Of a LLaVA-NeXT the thumbnail's tokens: the selector works on crops, and these are a crop's.
    """
    marker = getattr(processor, "image_token", "<image>")
    inputs = processor(
        images=[example.image for example in examples], text=[marker] * len(examples), padding=True, return_tensors="pt"
    )
    base = model.base_model
    names = set(inspect.signature(base.get_image_features).parameters)
    given = {name: value.to(model.device) for name, value in inputs.items() if name in names}
    features = list(base.get_image_features(**given, return_dict=True).pooler_output)
    if "image_grid_thw" in inputs:
        merge = model.config.vision_config.spatial_merge_size
        grids = [(rows // merge, columns // merge) for _, rows, columns in inputs["image_grid_thw"].tolist()]
    else:
        vision = model.config.vision_config
        crop = (vision.image_size // vision.patch_size) ** 2
        features = [tokens[:crop] for tokens in features]
        grids = [(math.isqrt(len(tokens)),) * 2 for tokens in features]
    for tokens, (rows, columns) in zip(features, grids):
        if rows * columns != len(tokens):
            raise ValueError(
                f"the {len(tokens)} tokens of an image of a {model.config.model_type} form no grid; train on a LLaVA, "
                "LLaVA-NeXT or Qwen-VL with the same vision tower"
            )
    return features, grids


def target(images: Sequence[Any], grid: tuple[int, int], upsample: int, device: Any) -> Tensor:
    """Images [B, 3, h 2^u, w 2^u] within -1..1."""
    import numpy as np

    rows, columns = (side << upsample for side in grid)
    pixels = np.stack([np.asarray(image.convert("RGB").resize((columns, rows))) for image in images])
    return torch.from_numpy(pixels).to(device).movedim(-1, 1).float() / 127.5 - 1


def _alike(features, grids):
    """Numbers of the images, in groups of equal grids."""
    groups: dict[Any, list[int]] = {}
    for i, grid in enumerate(grids):
        groups.setdefault(grid, []).append(i)
    return list(groups.values())


def _distance(x, y):
    """Mean over images of the root mean square error."""
    return (x - y).flatten(1).square().mean(1).add(1e-8).sqrt().mean()
