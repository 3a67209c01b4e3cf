"""Trains a learned method of pruneops for a LLaVA-family model.

A data file has lines {"image": path, "question": text, "answer": text}; a config file is a JSON object of settings,
shown by --settings. A run goes on from its last checkpoint. On several devices: accelerate launch -m pruneops.training
Exit status: 0, 2 for a bad request, 130 after an interruption.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from .data import JsonLines
from .dtr import Ranked, RankingConfig, RankingTask, without_tail
from .dyrate import DyRateConfig, DyRateTask
from .loop import SUMMARY, WEIGHTS, LoopConfig, Task, fit, read_config, trained_on
from .search import load_lists, search
from .selector import SelectorConfig, SelectorTask

CONFIGS: dict[str, type[LoopConfig]] = {
    "selector": SelectorConfig,
    "dyrate": DyRateConfig,
    "dtr": RankingConfig,
    "search": RankingConfig,
}
LISTS = "lists"


def train(
    what: str, model: Any, processor: Any, dataset: Dataset, out: Path, config: LoopConfig, *,
    folder: Path | None = None, restart: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train a network, or find the ranked lists of DTR.

    Parameters
    ----------
    what : {"selector", "dyrate", "dtr", "search"}
        "dtr" searches whatever ranked lists are missing, and then trains on them.
    model : PreTrainedModel
        One that `pruneops.patch` supports; it is frozen, and moved to this process's device.
    processor : ProcessorMixin
        The model's.
    dataset : Dataset of Example
    out : Path
        Folder for all results; an interrupted run goes on from what is there.
    config : LoopConfig
        Of the network.
    folder : Path, optional
        Of the ranked lists; ``out / "lists"`` by default.
    restart : bool
        Forget the checkpoint; ranked lists are kept.

    Returns
    -------
    dict
        Summary of the training.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())  # else processes on CPUs do not find each other
    model = model.to(state.device).eval()
    if isinstance(config, SelectorConfig):
        return fit(SelectorTask(model, processor, config), dataset, out, config, restart=restart)
    if isinstance(config, DyRateConfig):
        return fit(DyRateTask(model, processor, config), dataset, out, config, restart=restart)
    assert isinstance(config, RankingConfig)
    folder, total = folder or out / LISTS, len(dataset)  # type: ignore[arg-type]
    count = min(config.examples or total, total)
    if what == "dtr":
        trained_on(count, config)  # before hours of search
    search(
        model, processor, dataset, folder, ranks=config.ranks, rows=config.rows, shard=config.shard,
        numbers=range(count),
    )  # fmt: skip
    state.wait_for_everyone()
    if what == "search":
        return {"examples": count, "folder": str(folder)}
    found = load_lists(folder)
    lists = without_tail(found.ranked.long(), found.loss, config.min_drop)
    ranked = Ranked(dataset, dict(zip(found.number.tolist(), lists)))
    task: Task = RankingTask(model, processor, config)
    return fit(task, ranked, out, config, restart=restart)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pruneops.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=CONFIGS, help="search: only the ranked lists that dtr is trained on")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="checkpoint as transformers saves it")
    parser.add_argument("--data", type=Path, metavar="FILE", help="JSON lines")
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON object of settings; default: the paper's")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for checkpoint, weights, loss table and curves")
    parser.add_argument(
        "--lists", type=Path, metavar="FOLDER", help="ranked lists of an earlier search; default: OUT/lists"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of the model"
    )
    parser.add_argument("--restart", action="store_true", help="forget the checkpoint in OUT")
    parser.add_argument(
        "--settings", action="store_true", help="print the settings and their defaults as JSON, and end"
    )
    options = parser.parse_args(argv)
    for name in ("model", "data", "out"):
        if getattr(options, name) is None and not options.settings:
            parser.error(f"--{name} is required")
    return options


def load_model(folder: Path, dtype: str = "auto") -> tuple[Any, Any]:
    """(model, processor) of a folder, checked to be supported."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..adapters.transformers.models import find_model

    if not folder.is_dir():
        raise ValueError(f"--model {folder}: no such folder")
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:  # the processor of a Qwen-VL needs torchvision
        raise ValueError(f"--model {folder}: {str(error).strip().splitlines()[0]}") from None
    return find_model("pruneops.training", model), processor


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parse(argv)
    try:
        config = read_config(CONFIGS[options.what], options.config)
        if options.settings:
            print(json.dumps(dataclasses.asdict(config), indent=1))
            return 0
        dataset = JsonLines(options.data)
        model, processor = load_model(options.model, options.dtype)
        result = train(
            options.what, model, processor, dataset, options.out, config, folder=options.lists, restart=options.restart
        )
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        print(f"pruneops.training: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pruneops.training: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if options.what != "search":
        written = ", ".join(str(options.out / name) for name in (WEIGHTS, SUMMARY))
        print(f"{result['parameters']} parameters in {result['seconds']} s: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
