"""The training loop: what it writes, interruptions at any point, several processes."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from pruneops.methods import Image, Row
from pruneops.methods.dtr import DTR
from pruneops.methods.dyrate import DyRate
from pruneops.methods.selector import Selector
from pruneops.networks import NETWORKS, load
from pruneops.training.__main__ import main
from pruneops.training.loop import Batches, LoopConfig, Task, evaluate
from pruneops.training.selector import SelectorTask
from tests.contract import ROOT
from tests.oracles import differ
from tests.training.checkpoints import FAMILIES

LOOP = dict(steps=2, batch=2, held_out=2, log_steps=1, eval_steps=2, save_steps=2)
SETTINGS = {
    "selector": dict(width=16, heads=2, layers=1, rebuild_layers=1, image_layers=1, upsample=1),
    "dyrate": dict(rates=8, keeps=[0.5, 0.25]),
    "dtr": dict(ranks=2, examples=4, base_layers=1, cross_layers=1, heads=4),
}


def arguments(what, model, data, out, **settings):
    """Of the command line."""
    config = out.with_name(f"{out.name}-{'-'.join(map(str, settings.values()))}.json")
    config.write_text(json.dumps(LOOP | SETTINGS[what] | settings))
    given = {"--model": model, "--data": data, "--config": config, "--out": out}
    return [what, *(str(part) for pair in given.items() for part in pair)]


def table(out):
    """Rows of the loss table, without the time."""
    with open(out / "loss.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def weights(out):
    return load_file(out / "weights.safetensors")


def same(state, expected):
    """To the bit."""
    return state.keys() == expected.keys() and not any(differ(x, expected[name]) for name, x in state.items())


@pytest.fixture
def steps(monkeypatch):
    """[training steps of a selector that were made in this process]"""
    count, forward = [0], SelectorTask.forward

    def counted(self, examples):
        count[0] += self.training
        return forward(self, examples)

    monkeypatch.setattr(SelectorTask, "forward", counted)
    return count


@pytest.mark.parametrize("what", SETTINGS)
@pytest.mark.parametrize("family, dtype", [*((family, "auto") for family in FAMILIES), ("qwen2_5_vl", "bfloat16")])
def test_results(folders, data, tmp_path, capsys, what, family, dtype):
    """Weights that the method can use, losses as a table and curves, a summary."""
    out = tmp_path / "out"
    assert main([*arguments(what, folders[family], data, out), "--dtype", dtype]) == 0
    assert f"{out}/weights.safetensors" in capsys.readouterr().out
    expected = {"checkpoint", "loss.csv", "loss.png", "training.json", "weights.safetensors"}
    assert {path.name for path in out.iterdir()} == expected | ({"lists"} if what == "dtr" else set())
    rows, summary = table(out), json.loads((out / "training.json").read_text())
    assert [(row["split"], row["step"]) for row in rows] == [("train", "1"), ("train", "2"), ("held out", "2")]
    assert all(torch.tensor(float(row["loss"])).isfinite() for row in rows)
    assert summary["settings"] == json.loads(json.dumps(summary["settings"])) | LOOP | SETTINGS[what]
    assert summary["network"] == what and summary["losses"]["held out"]["step"] == 2
    assert summary["parameters"] == sum(value.numel() for value in weights(out).values())
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    network = load(NETWORKS[what], out / "weights.safetensors")
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in network.parameters())
    assert network.config == summary["config"]
    path, x = out / "weights.safetensors", torch.randn(30, 32)
    rotary, visual = (torch.ones(30, 8), torch.zeros(30, 8)), torch.arange(3, 23)
    if what == "selector":
        assert Selector(weights=path, keep=0.5).select(Image(x)).shape == (15,)
    elif what == "dtr":
        row = Row(x, visual=visual, images=((0, 20),), sizes=(20,), rotary=rotary)
        assert DTR(weights=path, keep=5).at_layer(0, row, 4).shape == (5,)
    else:
        row = Row(x, torch.randn(4, 30, 8), torch.randn(2, 30, 8), None, visual, ((0, 20),), (20,))
        method = DyRate(weights=path, keep=0.25)
        assert method.layers(4) == (2,) and len(method.at_layer(2, row, 4)) < 20


def test_training_lowers_the_loss(folders, data, tmp_path):
    """Of examples that are not held out; the file of weights may be of half the size."""
    out = tmp_path / "out"
    settings = dict(steps=25, lr=0.01, batch=6, log_steps=1, eval_steps=25, save_steps=25, half=True)
    assert main(arguments("selector", folders["llava"], data, out, **settings)) == 0
    losses = [float(row["loss"]) for row in table(out) if row["split"] == "train"]
    assert losses[-1] < 0.95 * losses[0]
    assert {value.dtype for value in weights(out).values()} == {torch.float16}


# Interruptions

LONG = dict(steps=8, eval_steps=4)  # a checkpoint every second step
STOPPED = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from pruneops.training.__main__ import main

def stopped_at(function, out, call, number):
    calls = [0]
    def stopping(*args, **kwargs):
        calls[0] += out in str(args[1])  # a file of the run
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)
    return stopping

signal.signal(signal.SIGINT, signal.default_int_handler)
for out, module, name, call, number in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        place = {"os": os, "torch": torch}[module]
        setattr(place, name, stopped_at(getattr(place, name), out, call, number))
        os._exit(main([*sys.argv[2:], "--out", out]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
WHOLE, OLD, PART = "checkpoint", "checkpoint.old", "checkpoint.part"
POINTS = {  # at which call of a function that writes files; which signal; folders then; exit status; steps left
    "before the first checkpoint": ("os", "replace", 1, signal.SIGKILL, {PART}, -9, 8),
    "in the second checkpoint": ("torch", "save", 5, signal.SIGKILL, {WHOLE, PART}, -9, 6),
    "between two checkpoints": ("os", "replace", 3, signal.SIGKILL, {OLD, PART}, -9, 6),
    "before the second checkpoint": ("os", "replace", 2, signal.SIGINT, {WHOLE, PART}, 130, 6),
    "before the weights are written": ("os", "replace", 8, signal.SIGKILL, {WHOLE}, -9, 0),
}


@pytest.fixture(scope="module")
def uninterrupted(folders, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("loop") / "uninterrupted"
    assert main(arguments("selector", folders["llava"], data, out, **LONG)) == 0
    return out


@pytest.fixture(scope="module")
def interrupted(folders, data, uninterrupted):
    """{point: (folder, exit status)} of runs that were stopped."""
    outs = {name: uninterrupted.with_name(name.replace(" ", "-")) for name in POINTS}
    stops = [(str(outs[name]), *point[:3], int(point[3])) for name, point in POINTS.items()]
    command = arguments("selector", folders["llava"], data, uninterrupted, **LONG)[:-2]
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, json.dumps(stops), *command],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "interrupted; the same command goes on from the last checkpoint" in done.stderr
    return {name: (out, int(code)) for (name, out), code in zip(outs.items(), done.stdout.split(), strict=True)}


@pytest.mark.parametrize("point", POINTS)
def test_interruptions(folders, data, uninterrupted, interrupted, steps, point):
    """The same command goes on from the last whole checkpoint, to the same bits."""
    *_, there, status, left = POINTS[point]
    out, code = interrupted[point]
    assert code == status
    assert {path.name for path in out.iterdir() if path.is_dir()} == there
    assert main(arguments("selector", folders["llava"], data, out, **LONG)) == 0
    assert steps == [left]
    assert same(weights(out), weights(uninterrupted))
    assert table(out) == table(uninterrupted)
    assert not {OLD, PART} & {path.name for path in out.iterdir()}


def test_runs_that_are_complete(folders, data, tmp_path, steps, capsys):
    """Again: nothing is trained. With other settings: refused, unless it begins anew."""
    out = tmp_path / "out"
    first = arguments("selector", folders["llava"], data, out)
    assert main(first) == 0 and steps == [2]
    before = weights(out)
    (out / "weights.safetensors").unlink()
    assert main(first) == 0 and steps == [2]
    assert same(weights(out), before)
    for settings, names in (
        (dict(lr=0.5, seed=3), "lr, seed"),
        (dict(width=12), "width"),
        (dict(held_out=4), "held_out, examples"),
    ):
        other = arguments("selector", folders["llava"], data, out, **settings)
        capsys.readouterr()
        assert main(other) == 2
        expected = f"pruneops.training: the checkpoint was made with another {names}; go on with the same settings, or"
        assert expected in capsys.readouterr().err
        assert steps == [2] and same(weights(out), before)
    other = arguments("selector", folders["llava"], data, out, lr=0.5)
    assert main([*other, "--restart"]) == 0 and steps == [4]
    assert not same(weights(out), before)
    assert main([*first, "--restart"]) == 0 and steps == [6]
    assert same(weights(out), before)


def test_batches():
    """Every example once an epoch, in another order each; from any step on the same batches."""
    batches = list(Batches(10, 4, seed=1, first=0, count=15))
    assert [len(batch) for batch in batches] == [4] * 15
    numbers = [number for batch in batches for number in batch]
    epochs = [numbers[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    for first in range(16):
        later = Batches(10, 4, seed=1, first=first, count=15)
        assert list(later) == batches[first:] and len(later) == 15 - first
    assert list(Batches(10, 4, seed=2, first=0, count=15)) != batches
    assert [sorted(batch) for batch in Batches(2, 4, seed=0, first=0, count=1)] == [[0, 0, 1, 1]]  # fewer than a batch


def test_held_out_means():
    """Each example counts once, the noise is the same every time and the generator is left alone."""

    class Noisy(Task):
        def forward(self, examples):
            assert not self.training
            x = torch.tensor(examples, dtype=torch.float32)
            return x.mean(), {"noise": torch.rand(()), "square": x.square().mean()}

    state = torch.get_rng_state()
    config = LoopConfig(held_out=5, batch=2)
    values = [evaluate(Noisy(), list(range(100, 112)), config) for _ in range(2)]
    assert values[0] == values[1]
    assert values[0]["loss"] == pytest.approx(109)
    assert values[0]["square"] == pytest.approx(109**2 + 2)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("name", ["steps", "batch", "held_out", "eval_steps", "save_steps", "log_steps"])
def test_counts_that_are_refused(name):
    with pytest.raises(ValueError, match=f"config: {name} must be at least 1, got 0"):
        LoopConfig(**{name: 0})


# Several processes


def test_two_processes(folders, data, tmp_path):
    """Two with batches of one train as one process with batches of two does."""
    single, both = tmp_path / "single", tmp_path / "both"
    settings = dict(steps=3, eval_steps=3, examples=6)
    assert main(arguments("dtr", folders["llava"], data, single, **settings)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = arguments("dtr", folders["llava"], data, both, batch=1, **settings)
    done = subprocess.run(
        [*launch, "-m", "pruneops.training", *command], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (both / "checkpoint" / "random_states_1.pkl").exists()
    losses = [[float(row["loss"]) for row in table(out) if row["split"] == "held out"] for out in (single, both)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    expected, trained = weights(single), weights(both)
    changed = [(trained[name] - value).abs().flatten() for name, value in expected.items()]
    # the first steps of Adam have the size of the learning rate, 0.001, wherever a gradient has a sign
    assert torch.cat(changed).median() < 1e-6 and torch.cat(changed).quantile(0.99) < 1e-4
