"""Accuracy of the embedded model's answers by method, budget and kind of question.

There is one question of every kind per scene; all methods get the same scenes and questions, in batches, through
`pruneops.patch`. An answer is right if every word is. Intervals are at 95 %: Wilson's for one kind of question, whose
answers are independent, and the normal one of the scenes' means over all kinds.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import pruneops
from pruneops import methods
from pruneops.demo import model as embedded
from pruneops.demo import scenes
from pruneops.methods.base import Budgeted
from pruneops.training.data import Example, decoder_inputs, encode
from pruneops.training.search import ranked_list

KEEPS = 0.5, 0.25, 0.1, 0.05, 8  # shares of the visual tokens, and a count of them
SEEDS = 0, 1, 2
SCENES = 100  # of each seed
ROWS = 40  # of a batch
Z = 1.96
UNPRUNED, FOREGROUND, SEARCHED = "unpruned", "foreground", "dtr_ub"
SEARCHED_SCENES = 20  # of each seed: a search costs as much as a thousand answers
LINES = {  # styles of the baselines and the upper bound
    "random": {"color": "#111111", "ls": "--"},
    "uniform": {"color": "#777777", "ls": "--"},
    FOREGROUND: {"color": "#c99700", "ls": ":"},
    SEARCHED: {"color": "#c99700", "marker": "*", "ms": 10, "ls": ""},
}


@dataclass(frozen=True, kw_only=True)
class Foreground(Budgeted):
    """An upper bound: knows where the digits are, and keeps tokens of each in turn, then others at random.

    Parameters
    ----------
    keep : float or int
        Of every image.
    owners : sequence of array [ROW, ROW]
        `Scene.owner` of every row of the batch, in order.
    """

    owners: tuple = ()
    rows: list = field(default_factory=list)

    @property
    def after_projector(self):
        return True

    def select_each(self, images):
        owner = self.owners[len(self.rows)].ravel()
        self.rows.append(owner)
        rng = np.random.default_rng(len(self.rows))
        ranks = [rng.permutation(np.flatnonzero(owner == i)) for i in range(owner.max() + 1)]
        turns = [of[turn] for turn in range(max(map(len, ranks), default=0)) for of in ranks if turn < len(of)]
        order = np.concatenate([turns, rng.permutation(np.flatnonzero(owner < 0))]).astype(np.int64)
        return [torch.from_numpy(np.sort(order[: self.budget(len(owner))]))]


@dataclass(frozen=True, kw_only=True)
class Searched(Budgeted):
    """DTR's upper bound: the ranked lists that its search finds, which knows the answers.

    Parameters
    ----------
    keep : int
        At most the lists' length.
    lists : sequence of Tensor [J]
        Of every row of the batch, in order.
    """

    lists: tuple = ()
    rows: list = field(default_factory=list)

    @property
    def after_projector(self):
        return True

    def select_each(self, images):
        self.rows.append(len(self.rows))
        return [self.lists[self.rows[-1]][: self.keep].sort().values]


def share_of(keep):
    """A budget as a share of the visual tokens."""
    return keep / scenes.ROW**2 if isinstance(keep, int) else keep


def learned(name):
    return embedded.LEARNED / f"{name}.safetensors"


METHODS = {  # functions of the budget, the owners of a batch's rows, its number; VTW has a share of the layers instead
    "todre": lambda keep, *_: methods.ToDRE(keep=keep),
    "dart": lambda keep, *_: methods.DART(keep=keep),
    "fastv": lambda keep, *_: methods.FastV(keep=keep),
    "vtw": lambda keep, *_: methods.VTW(layer=max(1, round(share_of(keep) * embedded.LAYERS))),
    "divprune": lambda keep, *_: methods.DivPrune(keep=keep),
    "fastervlm": lambda keep, *_: methods.FasterVLM(keep=keep),
    "selector": lambda keep, *_: methods.Selector(keep=keep, weights=learned("selector")),
    "dyrate": lambda keep, *_: methods.DyRate(keep=share_of(keep), weights=learned("dyrate")),
    "dtr": lambda keep, *_: methods.DTR(keep=keep, weights=learned("dtr")),
    "random": lambda keep, _, batch: methods.Random(keep=keep, seed=batch),
    "uniform": lambda keep, *_: methods.Uniform(keep=keep),
    FOREGROUND: lambda keep, owners, _: Foreground(keep=keep, owners=owners),
    SEARCHED: None,  # needs the questions, see `answer`
}


def questions_of(seed, count):
    """(scenes, [(number of a scene, Question)]): one question of each kind per test scene."""
    seen, asked = [scenes.scene("test", seed, number) for number in range(count)], []
    for number, scene in enumerate(seen):
        rng = np.random.default_rng([seed, number, 11])
        questions = scenes.questions(scene.objects, rng)
        for kind in scenes.KINDS:
            candidates = [question for question in questions if question.kind == kind]
            asked.append((number, candidates[rng.integers(len(candidates))]))
    return seen, asked


def right(model, seen, asked, build=None, rows=ROWS):
    """(flags of the right answers, visual tokens of a question as a mean over the decoder's layers)."""
    flags, tokens = [], []
    for start in range(0, len(asked), rows):
        part = asked[start : start + rows]
        pixels = torch.from_numpy(np.stack([seen[number].pixels for number, _ in part]))
        texts = [question.text for _, question in part]
        if build is None:
            answers = embedded.ask(model, pixels, texts)
            tokens.append(scenes.ROW**2)
        else:
            owners = tuple(seen[number].owner for number, _ in part)
            with pruneops.patch(model, build(owners, start // rows)) as handle:
                answers = embedded.ask(model, pixels, texts)
            tokens.append(statistics.fmean(handle.stats[-1].totals) / len(part))
        flags += [answer == question.answer for answer, (_, question) in zip(answers, part)]
    return flags, statistics.fmean(tokens)


def measure(weights, device="cpu", *, chosen=tuple(METHODS), keeps=KEEPS, seeds=SEEDS, count=SCENES):
    """Rows of the table, pooled over the seeds.

    Parameters
    ----------
    weights : Path
        Folder of the model.
    device : str
        On "cpu" with a process per core.
    chosen : sequence of str
        Of METHODS.
    keeps : sequence of float or int
    seeds : sequence of int
    count : int
        Scenes of each seed.

    Returns
    -------
    list of dict
        method, keep, kind ("all" is the mean of the kinds), accuracy, low, high, by_seed (accuracy, low and high of
        each), asked, tokens.
    """
    settings = [(UNPRUNED, 1.0), *itertools.product([name for name in chosen if name != SEARCHED], keeps)]
    if SEARCHED in chosen:
        settings += [(SEARCHED, keep) for keep in keeps if isinstance(keep, int)]
    counts = {SEARCHED: min(SEARCHED_SCENES, count)}
    jobs = [(name, keep, seed, counts.get(name, count)) for name, keep in settings for seed in seeds]
    jobs.sort(key=lambda job: job[0] != SEARCHED)  # the longest first
    with workers(weights, device) as each:
        answers = dict(zip(jobs, tqdm(each(answer, jobs), "quality", len(jobs), unit=" runs", disable=None)))
    rows = []
    for name, keep in settings:
        of_setting = [answers[name, keep, seed, counts.get(name, count)] for seed in seeds]
        flags = np.array([flags for flags, _ in of_setting]).reshape(len(seeds), -1, len(scenes.KINDS))
        tokens = round(statistics.fmean(tokens for _, tokens in of_setting), 2)
        rows += [{"method": name, "keep": keep, **row, "tokens": tokens} for row in summary(flags)]
    return rows


@contextlib.contextmanager
def workers(weights, device):
    """A `map` whose calls have the model: over processes of one thread each on a CPU, in this process on a GPU."""
    if device != "cpu":
        start(weights, device)
        yield map
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, start, (weights, device)) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def start(weights, device):
    """Load the model, once per process; workers leave an interrupt to the parent."""
    global model
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(1)
    model = embedded.load(device, weights)


def answer(job):
    """`right` of a method's name, budget, seed and number of scenes."""
    name, keep, seed, count = job
    seen, asked = questions_of(seed, count)
    if name == SEARCHED:
        lists = searched(seen, asked, keep)
        return right(model, seen, asked, lambda _, batch: Searched(keep=keep, lists=lists[batch * ROWS :]))
    return right(model, seen, asked, None if name == UNPRUNED else lambda *batch: METHODS[name](keep, *batch))


def searched(seen, asked, ranks):
    """The ranked list of every question, found by the loss of its answer."""
    processor, lists = embedded.processor(), []
    for number, question in asked:
        example = Example(Image.fromarray(seen[number].pixels), question.text, question.answer)
        lists.append(ranked_list(model, decoder_inputs(model, encode(processor, [example])), ranks)[0])
    return tuple(lists)


def summary(flags):
    """A row for each kind and one for all of flags [seeds, scenes, kinds]."""
    rows = []
    for i, kind in enumerate((*scenes.KINDS, "all")):
        values = flags.mean(2) if kind == "all" else flags[..., i]
        interval = around if kind == "all" else wilson
        accuracy, low, high = interval(values)
        asked = int(flags.size if kind == "all" else values.size)
        by_seed = [interval(each) for each in values]
        rows.append({"kind": kind, "accuracy": accuracy, "low": low, "high": high, "by_seed": by_seed, "asked": asked})
    return rows


def wilson(flags):
    """(share, low, high) of independent flags."""
    asked, share, spread = flags.size, flags.mean(), Z * Z / flags.size
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / asked + spread / (4 * asked)) / (1 + spread)
    return rounded(share, middle - half, middle + half)


def around(means):
    """(mean, low, high) of scenes' means."""
    half = Z * means.std(ddof=1) / math.sqrt(means.size) if means.size > 1 else 1.0
    return rounded(means.mean(), means.mean() - half, means.mean() + half)


def rounded(*shares):
    return [round(min(1.0, max(0.0, float(share))), 4) for share in shares]


def text(rows, kind="all"):
    """The table of one kind: a row per method, a column per budget."""
    keeps = sorted({row["keep"] for row in rows if row["method"] != UNPRUNED}, key=share_of, reverse=True)
    cells = {(row["method"], row["keep"]): row for row in rows if row["kind"] == kind}
    unpruned = cells[UNPRUNED, 1.0]
    lines = [f"{'right answers, ' + kind:24}" + "".join(f"{named(keep):>15}" for keep in keeps)]
    for name in dict.fromkeys(name for name, _ in cells if name != UNPRUNED):
        known = (cell(cells[name, keep]) if (name, keep) in cells else "-" for keep in keeps)
        lines.append(f"{name:24}" + "".join(f"{text:>15}" for text in known))
    return "\n".join([*lines, f"{UNPRUNED:24}{cell(unpruned):>15}"])


def named(keep):
    """A budget in words."""
    return f"{keep} tokens" if isinstance(keep, int) else f"{keep:.0%}"


def cell(row):
    return f"{row['accuracy']:.1%} ±{(row['high'] - row['low']) / 2:.1%}"


def plot(rows, picture):
    """Curves of accuracy over the budget, one panel for all kinds and one for each."""
    from matplotlib.figure import Figure

    names = [name for name in dict.fromkeys(row["method"] for row in rows) if name != UNPRUNED]
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
    for axes, kind in zip(panels, ("all", *scenes.KINDS)):
        of_kind = [row for row in rows if row["kind"] == kind]
        for i, name in enumerate(names):
            line = sorted(
                (share_of(row["keep"]), row["accuracy"], row["low"], row["high"])
                for row in of_kind
                if row["method"] == name
            )
            keep, accuracy, low, high = zip(*line)
            style = LINES.get(name, {"color": f"C{i % 10}", "ls": "-" if i < 10 else "-."})
            axes.plot(keep, accuracy, label=name, **{"marker": "o", "ms": 4, **style})
            axes.fill_between(keep, low, high, alpha=0.12, color=style["color"], lw=0)
        (unpruned,) = (row for row in of_kind if row["method"] == UNPRUNED)
        axes.axhline(unpruned["accuracy"], color="k", lw=1, label=UNPRUNED)
        axes.set(title=kind, xscale="log", ylim=(0, 1.02))
        keeps = sorted({row["keep"] for row in of_kind if row["method"] != UNPRUNED}, key=share_of)
        axes.set_xticks([share_of(keep) for keep in keeps], [named(keep).removesuffix(" tokens") for keep in keeps])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.supxlabel("visual tokens kept")
    figure.supylabel("right answers")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(picture, dpi=90)
