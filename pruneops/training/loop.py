"""The training loop of all networks, over accelerate: devices and ranks, checkpoints, held-out loss, curves."""

import csv
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..networks import save

CHECKPOINT, WEIGHTS, TABLE, PICTURE, SUMMARY = (
    "checkpoint",
    "weights.safetensors",
    "loss.csv",
    "loss.png",
    "training.json",
)
SMOOTHING = 0.95
FREE = "half", "workers", "save_steps", "log_steps"  # settings that a run may go on with others of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of the loop; those of a network add to them.

    Parameters
    ----------
    steps, batch : int
        Optimizer steps, and examples of a step on each device.
    lr : float
        Peak of the learning rate: linear warm-up, then half a cosine.
    warmup : float
        Share of the steps.
    weight_decay : float
    clip : float
        Norm to which gradients are clipped.
    seed : int
        Of the weights, the order of the examples and all noise.
    held_out : int
        Examples at the end of the data that are only evaluated.
    eval_steps, save_steps, log_steps : int
        Steps between evaluations, checkpoints and rows of the loss table.
    workers : int
        Processes of a device that load examples.
    half : bool
        Whether the weights are written in float16.
    """

    steps: int = 1000
    batch: int = 8
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    held_out: int = 64
    eval_steps: int = 200
    save_steps: int = 200
    log_steps: int = 20
    workers: int = 0
    half: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "held_out", "eval_steps", "save_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"config: {name} must be at least 1, got {getattr(self, name)}")


C = TypeVar("C", bound=LoopConfig)


def read_config(kind: type[C], path: Path | None, **changes: Any) -> C:
    """A configuration from a JSON object; settings that are left out take their defaults.

    Raises
    ------
    ValueError
        On a file that is no such object, an unknown setting or a value of another type.
    """
    settings: dict[str, Any] = {}
    if path is not None:
        try:
            settings = json.loads(Path(path).read_text())
            if not isinstance(settings, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as error:
            raise ValueError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None
    known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"--config {path}: no setting {name!r}; there are {', '.join(known)}")
        default = known[name]
        value = tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value
        value = float(value) if isinstance(default, float) and type(value) is int else value
        if type(value) is not type(default):
            raise ValueError(f"--config {path}: {name} must be like {default!r}, got {value!r}")
        settings[name] = value
    return kind(**settings | changes)


class Task(nn.Module):
    """What is trained, and its loss.

    A subclass holds the trained modules, `network` among them, and gives `forward(examples)`: the loss and a dictionary
    of what else is to be logged, all scalar tensors. Frozen models are kept out of its modules by `hold`.
    """

    network: Any  # a Network
    progress = 0.0  # share of the steps that are done

    def hold(self, **frozen: Any) -> None:
        """Keep models that are not trained, moved or saved as plain attributes."""
        for name, model in frozen.items():
            object.__setattr__(self, name, model)

    def prepare(self, dataset: Dataset) -> None:
        """Called once with the training data, before the first step of a new run."""


class Batches:
    """Numbers of the examples of every batch from a step on: all examples in a random order, epoch after epoch."""

    def __init__(self, examples: int, batch: int, seed: int, first: int, count: int) -> None:
        self.examples, self.batch, self.seed, self.first, self.count = examples, batch, seed, first, count

    def __len__(self) -> int:
        return self.count - self.first

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order, rows = -1, [], []
        for number in range(self.first * self.batch, self.count * self.batch):
            if number // self.examples != epoch:
                epoch = number // self.examples
                order = torch.randperm(
                    self.examples, generator=torch.Generator().manual_seed(self.seed + epoch)
                ).tolist()
            rows.append(order[number % self.examples])
            if len(rows) == self.batch:
                yield rows
                rows = []


class Progress:
    """What a checkpoint holds besides the weights and the optimizer: steps done, seconds, rows of the loss table."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.done, self.seconds, self.settings = 0, 0.0, settings
        self.rows: list[dict[str, Any]] = []
        self.recent: dict[str, float] = {}  # moving averages

    def add(self, values: dict[str, Any], seconds: float) -> None:
        """Count a step."""
        self.done, self.seconds = self.done + 1, self.seconds + seconds
        for name, value in values.items():
            self.recent[name] = SMOOTHING * self.recent.get(name, float(value)) + (1 - SMOOTHING) * float(value)

    def row(self, split: str, values: dict[str, float]) -> None:
        """Add a row to the loss table."""
        self.rows.append({"split": split, "step": self.done, "seconds": round(self.seconds, 1), **values})

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        fixed = {name: value for name, value in state["settings"].items() if name not in FREE}
        changed = [name for name, value in fixed.items() if self.settings.get(name) != value]
        if changed:
            raise ValueError(
                f"the checkpoint was made with another {', '.join(changed)}; go on with the same settings, or give "
                "another --out or --restart"
            )
        vars(self).update(state)


def fit(task: Task, dataset: Dataset, out: Path, config: LoopConfig, *, restart: bool = False) -> dict[str, Any]:
    """Train, going on from the last checkpoint in a folder.

    Parameters
    ----------
    task : Task
    dataset : Dataset
        Of whatever `task` takes lists of; the last `config.held_out` are evaluated.
    out : Path
        For checkpoint/, weights.safetensors, loss.csv, loss.png and training.json.
    config : LoopConfig
    restart : bool
        Forget the checkpoint.

    Returns
    -------
    dict
        What training.json holds: settings, seconds, parameters, the last losses.

    Raises
    ------
    ValueError
        On fewer examples than are held out, or a checkpoint of other settings.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs
    from tqdm import tqdm
    from transformers import get_cosine_schedule_with_warmup

    count = trained_on(len(dataset), config)  # type: ignore[arg-type]
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    first, world = accelerator.is_main_process, accelerator.num_processes
    progress = Progress(dataclasses.asdict(config) | {"examples": count, "processes": world})
    checkpoint = _checkpoint(out, restart, accelerator)
    if checkpoint is None:
        task.prepare(torch.utils.data.Subset(dataset, range(count)))
    optimizer = torch.optim.AdamW(
        [p for p in task.parameters() if p.requires_grad], config.lr, weight_decay=config.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, int(config.warmup * config.steps)), config.steps)
    model, optimizer = accelerator.prepare(task, optimizer)
    accelerator.register_for_checkpointing(schedule, progress)
    if checkpoint is not None:
        progress.load_state_dict(torch.load(checkpoint / "custom_checkpoint_1.pkl"))  # before weights that may not fit
        accelerator.load_state(str(checkpoint))
    batches = Batches(count, config.batch, config.seed, progress.done * world, config.steps * world)
    loader = accelerator.prepare_data_loader(
        DataLoader(dataset, batch_sampler=batches, collate_fn=list, num_workers=config.workers),  # type: ignore[arg-type]
        device_placement=False,
    )
    hidden = None if first else True  # None: where no terminal is
    bar = tqdm(loader, task.network.kind, config.steps, initial=progress.done, unit=" steps", disable=hidden)
    for examples in bar:
        start, task.progress = time.monotonic(), progress.done / config.steps
        torch.manual_seed(hash((config.seed, progress.done, accelerator.process_index)) % 2**63)
        loss, extra = model.train()(examples)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.add({"loss": loss.detach(), **extra}, time.monotonic() - start)
        last = progress.done == config.steps
        if progress.done % config.log_steps == 0 or last:
            bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in progress.recent.items()))
            progress.row("train", progress.recent)
        if progress.done % config.eval_steps == 0 or last:
            progress.row("held out", evaluate(task, dataset, config))
        if progress.done % config.save_steps == 0 or last:
            _save(accelerator, out, progress)
    if first:
        finish(task, out, config, progress)
    accelerator.wait_for_everyone()
    return summary(task, config, progress)


def trained_on(examples: int, config: LoopConfig) -> int:
    """How many examples are not held out; ValueError if none is left."""
    if examples <= config.held_out:
        raise ValueError(f"config: held_out = {config.held_out} leaves no example of {examples} to train on")
    return examples - config.held_out


@torch.no_grad()
def evaluate(task: Task, dataset: Dataset, config: LoopConfig) -> dict[str, float]:
    """Means over the held-out examples, with the same noise every time."""
    task.eval()
    total, sums = len(dataset), {}  # type: ignore[arg-type]
    numbers = range(total - config.held_out, total)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for start in range(0, len(numbers), config.batch):
            examples = [dataset[i] for i in numbers[start : start + config.batch]]
            loss, extra = task(examples)
            for name, value in {"loss": loss, **extra}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(examples)
    return {name: value / len(numbers) for name, value in sums.items()}


def finish(task: Task, out: Path, config: LoopConfig, progress: Progress) -> None:
    """Write weights, table, picture and summary."""
    save(task.network, out / WEIGHTS, torch.float16 if config.half else torch.float32)
    _write_table(progress.rows, out / TABLE)
    plot(progress.rows, out / PICTURE)
    (out / SUMMARY).write_text(json.dumps(summary(task, config, progress), indent=1) + "\n")


def summary(task: Task, config: LoopConfig, progress: Progress) -> dict[str, Any]:
    """What training.json holds."""
    latest = {row["split"]: row for row in progress.rows}
    return {
        "network": task.network.kind, "config": task.network.config, "settings": dataclasses.asdict(config),
        "parameters": sum(p.numel() for p in task.network.parameters()), "seconds": round(progress.seconds),
        "losses": latest,
    }  # fmt: skip


def plot(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    """Curves of the loss and of everything else that was logged."""
    from matplotlib.figure import Figure

    names = [
        name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("split", "step", "seconds")
    ]
    figure = Figure(figsize=(3.4 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names):
        for split in ("train", "held out"):
            line = [(row["step"], row[name]) for row in rows if row["split"] == split and name in row]
            if line:
                axes.plot(*zip(*line), label=split)
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=90)


def _write_table(rows, path):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(
            {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
        )


def _checkpoint(out, restart, accelerator):
    """The folder of the last whole checkpoint, or None."""
    folders = [out / CHECKPOINT, out / f"{CHECKPOINT}.old"]
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out / f"{CHECKPOINT}.part", ignore_errors=True)
        for folder in folders if restart else ():
            shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    return next((folder for folder in folders if folder.is_dir()), None)


def _save(accelerator, out, progress):
    """Write a checkpoint; a whole one, the last or the one before, exists at any time."""
    part, whole, old = (out / f"{CHECKPOINT}{end}" for end in (".part", "", ".old"))
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(old, ignore_errors=True)
        if whole.exists():
            os.replace(whole, old)
        os.replace(part, whole)
        shutil.rmtree(old, ignore_errors=True)
        _write_table(progress.rows, out / TABLE)
    accelerator.wait_for_everyone()
