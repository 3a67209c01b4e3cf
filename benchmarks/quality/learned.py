"""Recipes of the learned methods on the embedded model: `python -m benchmarks.quality train --method dtr`.

The code is `pruneops.training`, as for any other model; here are the data and the settings.
"""

import shutil
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from pruneops.demo import model as embedded
from pruneops.training.__main__ import train as train_method
from pruneops.training.dtr import RankingConfig
from pruneops.training.dyrate import DyRateConfig
from pruneops.training.loop import CHECKPOINT, PICTURE, SUMMARY, TABLE, WEIGHTS, LoopConfig
from pruneops.training.selector import SelectorConfig, SelectorTask

from .examples import Questions


class Recipe(NamedTuple):
    """Settings, and how many questions they are used on."""

    config: LoopConfig
    examples: int


RECIPES = {
    "selector": Recipe(
        SelectorConfig(
            steps=1000, batch=4, lr=1e-3, p=0.2, q=0.05, alpha=2.0, upsample=2, held_out=64, eval_steps=250,
            save_steps=250, half=True,
        ),
        12000,
    ),
    "dyrate": Recipe(
        DyRateConfig(
            steps=300, batch=8, lr=0.03, flops=30.0, keeps=(0.5, 0.25, 0.1, 0.05, 0.03125), held_out=40, eval_steps=75,
            save_steps=75, half=True,
        ),
        4000,
    ),
    "dtr": Recipe(
        RankingConfig(
            steps=1500, batch=8, lr=1e-3, ranks=8, shard=32, min_drop=0.01, base_layers=2, heads=4, held_out=160,
            eval_steps=250, save_steps=250, half=True,
        ),
        1280,
    ),
}  # fmt: skip


def train(method, folder, restart=False):
    """Train a method in a folder of its own; returns that folder and the summary."""
    recipe, out = RECIPES[method], folder / method
    examples = Questions(recipe.examples)
    summary = train_method(method, embedded.load(), embedded.processor(), examples, out, recipe.config, restart=restart)
    return out, summary | ({"rebuilt": rebuilt(out, examples)} if method == "selector" else {})


def rebuilt(out, examples):
    """The held-out examples' errors of features rebuilt from the selector's tokens, and from random ones."""
    config = RECIPES["selector"].config
    task = SelectorTask(embedded.load(), embedded.processor(), config)
    task.load_state_dict(load_file(out / CHECKPOINT / "model.safetensors"))
    torch.manual_seed(0)
    count = len(examples)
    errors = task.compare([examples[i] for i in range(count - config.held_out, count)])
    return {name: round(value, 4) for name, value in errors.items()}


def ship(method, out, results):
    """Copy the weights into the package and the records into the results."""
    embedded.LEARNED.mkdir(exist_ok=True)
    shutil.copyfile(out / WEIGHTS, embedded.LEARNED / f"{method}.safetensors")
    for name in (PICTURE, TABLE, SUMMARY):
        shutil.copyfile(out / name, results / f"quality-{method}-{name}")
