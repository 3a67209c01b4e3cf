"""Weight files for tests of the learned methods: the same paths in every process, so that they can be in test ids."""

import os
import tempfile
from pathlib import Path

import torch

from pruneops.networks import RateClassifier, save

FOLDER = Path(tempfile.gettempdir()) / f"pruneops-test-weights-{os.getuid()}"
KEEPS = (0.25, 0.5)


def rate_classifier(*, heads=4, layer=2, rates=8, slope=2.0, noise=0.0, seed=0):
    """Path of a `RateClassifier` whose rate grows with the attention to instruction and response: k is about `slope`
    times its sum over heads for keep 0.5, twice that for 0.25; `noise` is added to the weights."""
    path = FOLDER / f"dyrate-{heads}-{layer}-{rates}-{slope}-{noise}-{seed}.safetensors"
    network, k = RateClassifier(keeps=KEEPS, rates=rates, heads=heads, layer=layer), torch.arange(rates)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        network.bias.copy_(-k.square())  # the maximum of 2 k x - k^2 is at k = x
        for weight, factor in zip(network.weight, (2, 1)):
            text = torch.tensor([0.0, 0.0, 0.5, 1.0]).repeat(heads)
            weight.copy_(2 * k[:, None] * factor * slope * text)
            weight += noise * torch.randn(weight.shape, generator=generator)
    FOLDER.mkdir(exist_ok=True)
    save(network, path)
    return path
