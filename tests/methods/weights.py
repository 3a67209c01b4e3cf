"""Weight files for tests of the learned methods: the same paths in every process, so that they can be in test ids."""

import os
import tempfile
from pathlib import Path

import torch

from pruneops.networks import RankingModel, RateClassifier, SelectorNetwork, save

FOLDER = Path(tempfile.gettempdir()) / f"pruneops-test-weights-{os.getuid()}"
KEEPS = (0.25, 0.5)
SHARP = 20


def rate_classifier(*, heads=4, layer=2, rates=8, slope=2.0, noise=0.0, seed=0):
    """Path of a `RateClassifier` whose rate grows with the attention to instruction and response: k is about `slope`
    times its sum over heads for keep 0.5, twice that for 0.25; `noise` is added to the weights."""
    network, k = RateClassifier(keeps=KEEPS, rates=rates, heads=heads, layer=layer), torch.arange(rates)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        network.bias.copy_(-SHARP * k.square())  # the maximum of 2 k x - k^2 is at k = x, and its neighbours far below
        for weight, factor in zip(network.weight, (2, 1)):
            text = torch.tensor([0.0, 0.0, 0.5, 1.0]).repeat(heads)
            weight.copy_(SHARP * 2 * k[:, None] * factor * slope * text)
            weight += SHARP * noise * torch.randn(weight.shape, generator=generator)
    return _saved(network, f"dyrate-{heads}-{layer}-{rates}-{slope}-{noise}-{seed}")


def selector(width=32):
    """Path of a random selector."""
    torch.manual_seed(0)
    return _saved(SelectorNetwork(features=width, width=16, layers=2, heads=2), f"selector-{width}")


def ranking_model(width=16, head_dim=8, ranks=6):
    """Path of a random ranking model with a decoder layer."""
    torch.manual_seed(0)
    base = {"layers": 1, "heads": 4, "key_heads": 2, "head_dim": head_dim, "hidden": 24}
    network = RankingModel(width=width, classes=ranks + 1, base=base, cross=1, heads=2)
    return _saved(network, f"dtr-{width}-{head_dim}-{ranks}")


def _saved(network, name):
    path = FOLDER / f"{name}.safetensors"
    FOLDER.mkdir(exist_ok=True)
    save(network, path)
    return path
