"""`python -m benchmarks.quality train`, `run`, `cost`. Exit status: 0, 2: bad request, 130: interrupted."""

import argparse
import csv
import hashlib
import io
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from .. import ROOT, machine, report

RESULTS = ROOT / "benchmarks" / "results"
HELD_OUT = 100, 101  # seeds of the test scenes that follow a training
BARS = {"digit": 0.9, "colour": 0.9, "list": 0.8, "compare": 0.8, "count": 0.8}


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.partition("\n")[0])
    what = parser.add_subparsers(dest="what", required=True)
    train = what.add_parser("train", help="train the embedded model or a learned method on it, or resume that")
    train.add_argument("--method", choices=("selector", "dyrate", "dtr"), help="a learned method; default: the model")
    train.add_argument("--out", type=Path, default=ROOT / "build" / "quality", metavar="FOLDER")
    train.add_argument("--tower", type=int, metavar="STEPS", help="steps on dense labels")
    train.add_argument("--questions", type=int, metavar="STEPS", help="steps on questions")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--restart", action="store_true", help="ignore an earlier run's checkpoint")
    train.add_argument(
        "--ship", action="store_true", help="copy the weights into the package and the curve into results"
    )
    train.add_argument(
        "--workers", type=int, default=min(8, max(1, (os.cpu_count() or 1) // 2)), help="processes that make scenes"
    )
    train.add_argument("--scenes", type=int, default=2000, help="held-out scenes for the final evaluation")
    run = what.add_parser("run", help="every method x budget x kind of question")
    run.add_argument("--methods", help="comma-separated; default: all")
    run.add_argument("--keep", help="comma-separated shares and counts; default: 0.5,0.25,0.1,0.05,8")
    run.add_argument("--scenes", type=int, help="of each of three seeds")
    run.add_argument("--weights", type=Path, metavar="FOLDER", help="default: those of the package")
    run.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for quality.json, .csv and .png")
    cost = what.add_parser("cost", help="time of every method's selection beside the prefill that it saves")
    cost.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for quality-cost.json")
    for command in (train, run, cost):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser, parser.parse_args(argv)


def checksum(weights):
    """SHA-256 of the weights in a folder."""
    return hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()


def train_method(options):
    from . import learned

    load = machine.BackgroundLoad()
    out, summary = learned.train(options.method, options.out, options.restart)
    report.write(out / learned.SUMMARY, machine.facts(torch.device("cpu")) | summary | {"others_share": load.share()})
    print(f"{out}: {summary['parameters']} parameters, {summary['seconds']} s, {summary['losses']['held out']}")
    if options.ship:
        learned.ship(options.method, out, RESULTS)
    return 0


def train(options):
    from pruneops.demo import model as embedded

    from . import run as quality
    from .train import STAGES, train

    steps = {stage: getattr(options, stage) or count for stage, count in STAGES.items()}
    load = machine.BackgroundLoad()
    weights, seconds = train(
        options.out, steps=steps, seed=options.seed, device=options.device, workers=options.workers,
        restart=options.restart,
    )  # fmt: skip
    rows = quality.measure(weights, options.device, chosen=(), seeds=HELD_OUT, count=options.scenes // len(HELD_OUT))
    document = machine.facts(torch.device(options.device)) | {
        "steps": steps, "seed": options.seed, "seconds": round(seconds), "others_share": load.share(),
        "weights": checksum(weights), "rows": rows,
    }  # fmt: skip
    report.write(options.out / "training.json", document)
    print(*(f"{row['kind']:10}{quality.cell(row)}" for row in rows), sep="\n")
    if options.ship:
        for file in weights.iterdir():
            shutil.copyfile(file, embedded.WEIGHTS / file.name)
        for name in ("training.json", "loss.csv", "loss.png"):
            shutil.copyfile(options.out / name, RESULTS / f"quality-{name}")
        print(f"weights: {embedded.WEIGHTS}; records: {RESULTS}/quality-*")
    return 0


def run(options, parser):
    from pruneops.demo import model as embedded

    from . import run as quality

    chosen = options.methods.split(",") if options.methods else list(quality.METHODS)
    unknown = [name for name in chosen if name not in quality.METHODS]
    if unknown:
        parser.error(f"--methods: no {unknown[0]!r}; there is: {', '.join(quality.METHODS)}")
    try:
        texts = options.keep.split(",") if options.keep else []
        keeps = [int(text) if text.isdecimal() else float(text) for text in texts] or list(quality.KEEPS)
    except ValueError:
        parser.error(f"--keep {options.keep}: comma-separated shares and counts, such as 0.5,0.1,8")
    if not all(keep >= 1 if isinstance(keep, int) else 0 < keep <= 1 for keep in keeps):
        parser.error(f"--keep {options.keep}: shares lie in (0, 1], counts begin at 1")
    if not options.out.is_dir():
        parser.error(f"--out {options.out}: no such folder")
    weights = options.weights or embedded.WEIGHTS
    if not (weights / "model.safetensors").is_file():
        parser.error(f"--weights {weights}: no model.safetensors there")
    load, start = machine.BackgroundLoad(), time.monotonic()
    rows = quality.measure(weights, options.device, chosen=chosen, keeps=keeps, count=options.scenes or quality.SCENES)
    document = machine.facts(torch.device(options.device)) | {
        "weights": checksum(weights), "seeds": quality.SEEDS, "scenes": options.scenes or quality.SCENES,
        "seconds": round(time.monotonic() - start), "others_share": load.share(), "rows": rows,
    }  # fmt: skip
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows(row | {"by_seed": " ".join(str(seed[0]) for seed in row["by_seed"])} for row in rows)
    report.write(options.out / "quality.json", document)
    report.write_text(options.out / "quality.csv", table.getvalue())
    quality.plot(rows, options.out / "quality.png")
    for kind in ("all", *quality.scenes.KINDS):
        print(quality.text(rows, kind), end="\n\n")
    print(f"written: {options.out}/quality.json, .csv, .png")
    return 0


def cost(options):
    from . import cost

    load = machine.BackgroundLoad()
    rows = cost.measure(options.device)
    facts = machine.facts(torch.device(options.device))
    report.write(options.out / "quality-cost.json", facts | {"others_share": load.share(), "rows": rows})
    print(cost.text(rows))
    return 0


def main(argv=None):
    parser, options = parse(argv)
    try:
        if options.what == "train":
            return train_method(options) if options.method else train(options)
        return cost(options) if options.what == "cost" else run(options, parser)
    except KeyboardInterrupt:
        print("benchmarks.quality: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
