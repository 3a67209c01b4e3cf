"""The demo: the same questions about a picture to the same model, with all visual tokens and pruned.

Every question is a separate request, first to the unpatched model, then through `pruneops.patch`, alternately. Hooks on
the model's parts measure time.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from .. import __version__, backend, backends
from ..backends import BackendName
from ..methods.base import METHODS
from . import DemoError, model, photo, scenes

KEEP = 0.1
PICTURES, SCENES, LIBRARIES = ("numpy", "PIL", "tqdm"), ("skimage", "scipy", "sklearn"), ("matplotlib", "transformers")
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
EXAMPLES = '"which digit is red ?", "what colour is the 5 ?", "which is larger , red or blue ?", "list all digits"'
WAYS = ("unpruned", "pruned")
ONCE = ("picture", "libraries", "model")  # stages that run once
STAGES = ("tower + projector", "selection", "prefill", "decode, per token", "whole answer")
MARKS = {True: " right", False: " WRONG", None: ""}
PAIRS = 100  # more comparisons than any scene has


def run(
    image: str | Path | None = None,
    *,
    question: str | None = None,
    method: str = "todre",
    keep: float | int | None = None,
    out: str | Path = "pruneops-demo.png",
    save: str | Path | None = None,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    backend_name: BackendName = "auto",
    runs: int = 3,
) -> dict[str, Any]:
    """Run the demo and write its picture.

    Parameters
    ----------
    image : path, optional
        Photograph; by default a test scene, whose answers are known.
    question : str, optional
        Of words that the model knows; by default one of every kind, or two that fit any photograph.
    method : str
        Name of a method of `pruneops.methods`; settings other than `keep` and `Random`'s seed are its defaults.
    keep : float or int, optional
        Share of the visual tokens in (0, 1], or their number; 0.1 by default.
    out : path
        Picture, or the directory to put pruneops-demo.png into.
    save : path, optional
        Where to write the returned record as JSON.
    seed : int
        Of the scene, the choice among its questions and the method `random`.
    device : {"auto", "cpu", "cuda"}
    backend_name : str
        As in `pruneops.backend`.
    runs : int
        Timed runs after one to warm up; medians are reported.

    Returns
    -------
    dict
        Questions, answers, kept tokens and measurements in seconds and bytes, JSON-serialisable.

    Raises
    ------
    DemoError, BackendUnavailable
        On bad arguments; nothing is written then.
    """
    pruning = _method(method, keep, seed)
    text = None if question is None else _normalised_question(question)
    _require(PICTURES)
    out = _picture_path(out)
    save = None if save is None else _parent_checked(save, "--save")
    torch_device = _device(device)
    with backend(backend_name):
        chosen_backend = backends.choose(torch_device.type)

    from tqdm import tqdm

    form = out.suffix[1:].lower()
    bar = tqdm(total=runs + 5, disable=None, leave=False, bar_format="{desc:20}{bar:30} {n}/{total}")
    try:
        with bar, torch.inference_mode(), backend(backend_name):
            record, picture = _measure(_Stages(torch_device, bar), image, text, pruning, seed, runs, form)
    except torch.OutOfMemoryError:
        raise DemoError("the GPU ran out of memory; try --device cpu") from None
    record = {"version": __version__, "backend": chosen_backend, "picture": str(out), **record}
    _write(out, picture)
    if save is not None:
        _write(save, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    return record


class View(NamedTuple):
    """A picture uint8 [SIDE, SIDE, 3], its origin for the record, and questions about it."""

    pixels: Any
    origin: dict[str, Any]
    questions: list[scenes.Question]


class Answer(NamedTuple):
    """Result of one request; `kept` maps each layer at which tokens were removed to the ranks left from there on."""

    text: str
    seconds: dict[str, Any]
    stats: Any = None
    kept: dict[int, Any] | None = None


class KeptRecorder:
    """A method that records what it keeps of a single picture: layer at which tokens are removed -> ranks left."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.kept: dict[int, Any] = {}

    def __getattr__(self, name):
        return getattr(self.method, name)

    def select_each(self, images):
        (chosen,) = self.method.select_each(images)
        self._record(0, torch.arange(len(images[0].features)), chosen)
        return [chosen]

    def at_layer(self, layer, row, count):
        chosen = self.method.at_layer(layer, row, count)
        if chosen is not None:
            self._record(layer, [*self.kept.values()][-1] if self.kept else torch.arange(len(row.visual)), chosen)
        return chosen

    def _record(self, layer, before, chosen):
        if len(chosen) < len(before):
            self.kept[layer] = before[chosen.cpu()]


def report(record: dict[str, Any]) -> str:
    """The tables that `pruneops demo` prints."""
    questions, seconds = record["questions"], record["seconds"]
    layers = [[_span(counts) for counts in zip(*(q[way]["visual_tokens"] for q in questions))] for way in WAYS]
    stages = [[stage, *(_duration(seconds[way][stage]) for way in WAYS)] for stage in STAGES]
    unpruned, pruned = (statistics.mean(q[way]["kv_bytes"] for q in questions) for way in WAYS)
    return "\n".join(
        [
            f"picture         {_origin(record['image'])}",
            f"model           {record['model']}",
            f"method          {_summary(record)}, backend {record['backend']}",
            f"device          {record['device']}, torch {record['torch']}, transformers {record['transformers']}",
            "",
            *_table(_answer_rows(record), str.ljust),
            "",
            *_table(
                [["visual tokens in layer", *map(str, range(len(layers[0])))]]
                + [[f"  {way}", *row] for way, row in zip(WAYS, layers)]
            ),
            f"KV cache after the prompt: {_size(unpruned)} -> {_size(pruned)}, {unpruned / pruned:.1f}x smaller",
            "",
            *_table([["time of a question", *WAYS], *stages]),
            f"Once: {', '.join(f'{name} {_duration(seconds[name])}' for name in ONCE)}.",
            "",
            "Fixed costs are most of the time in a model this small, so it says little about the speed of pruning;",
            "`python -m benchmarks end_to_end` measures that on models of real width.",
            f"Picture: {record['picture']}",
        ]
    )


class _Stages:
    """Runs the stages one by one, shows the current one, records the time of each."""

    def __init__(self, device, bar):
        self.device, self.bar, self.seconds = device, bar, {}

    def __call__(self, name, function):
        self.bar.set_description_str(name)
        start = self.now()
        result = function()
        self.seconds[name] = self.now() - start
        self.bar.update()
        return result

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _measure(stages, image, text, method, seed, runs, form):
    """(record, bytes of the picture)."""
    view = stages("picture", lambda: _scene(text, seed) if image is None else _photograph(image, text))
    stages("libraries", _import_libraries)
    import transformers

    from .. import plots

    device = stages.device
    llava = stages("model", lambda: _load(device))
    pixels = torch.tensor(view.pixels)[None]
    requests = [model.inputs(pixels, [asked.text], device) for asked in view.questions]
    turns = [
        stages(name, lambda: [_answer(llava, given, method, stages.now) for given in requests])
        for name in ["warm-up", *(f"turn {turn + 1} of {runs}" for turn in range(runs))]
    ]
    questions = [_compared(*pair) for pair in zip(view.questions, turns[0])]
    record = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": _device_name(device),
        "model": _described(llava),
        "image": view.origin,
        "method": json.loads(method.to_json()),
        "visual_tokens": scenes.ROW**2,
        "kept": _first_kept(questions),
        "questions": questions,
        "seconds": {name: stages.seconds[name] for name in ONCE} | {way: _medians(turns[1:], way) for way in WAYS},
    }
    return record, stages("drawing", lambda: plots.answers(view.pixels, record, form))


def _scene(text, seed):
    """A test scene, and one question of every kind or the given one."""
    _require(SCENES)
    import numpy as np

    scene, rng = scenes.scene("test", seed, 0), np.random.default_rng(seed)
    known = scenes.questions(scene.objects, rng, pairs=PAIRS)
    if text is None:
        kinds = [[asked for asked in known if asked.kind == kind] for kind in scenes.KINDS]
        questions = [group[rng.integers(len(group))] for group in kinds if group]
    else:
        questions = [asked for asked in known if asked.text == text] or [scenes.Question(None, text, None)]
    objects = [{"digit": o.digit, "colour": o.colour} for o in scene.objects]
    origin = {"path": None, "seed": seed, "width": scenes.SIDE, "height": scenes.SIDE, "objects": objects}
    return View(scene.pixels, origin, questions)


def _photograph(path, text):
    """A photograph, and questions with unknown answers."""
    picture = photo.load(path)
    origin = {"path": str(path), "seed": None, "width": picture.width, "height": picture.height, "objects": None}
    asked = ["list all digits", "how many digits ?"] if text is None else [text]
    return View(photo.squeezed(picture, scenes.SIDE), origin, [scenes.Question(None, text, None) for text in asked])


def _import_libraries():
    _require(LIBRARIES)
    for name in ("pruneops.plots", "pruneops.adapters.transformers.handle", "transformers.models.llava.modeling_llava"):
        importlib.import_module(name)


def _load(device):
    try:
        return model.load(device)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise DemoError(f"the model's weights cannot be read ({reason}): install pruneops again") from None


def _answer(llava, given, method, now):
    """{way: Answer} to one question."""
    from ..adapters.transformers import patch

    inner = llava.model
    parts = {"tower": inner.vision_tower, "projector": inner.multi_modal_projector, "decoder": inner.language_model}
    recorder: Any = KeptRecorder(method)
    with _clocked(parts, now) as calls:
        text, seconds = _generate(llava, given, calls, now)
        unpruned = Answer(text, seconds)
        with patch(llava, recorder) as handle:
            handle.clock = now
            text, seconds = _generate(llava, given, calls, now)
    (stats,) = handle.stats
    seconds |= {"selection": stats.seconds, "prefill": seconds["prefill"] - stats.seconds}
    return {"unpruned": unpruned, "pruned": Answer(text, seconds, stats, recorder.kept)}


def _generate(llava, given, calls, now) -> tuple[str, dict[str, Any]]:
    """(answer, seconds of the stages); the decoder's first call is the prefill, selection included."""
    for times in calls.values():
        times.clear()
    start = now()
    out = llava.generate(**given, max_new_tokens=model.ANSWER, do_sample=False)
    total = now() - start
    first, *later = calls["decoder"]
    times = sum(calls["tower"] + calls["projector"]), None, first, statistics.median(later) if later else None, total
    return model.words(out[0, given["input_ids"].shape[1] :].tolist()), dict(zip(STAGES, times))


@contextlib.contextmanager
def _clocked(modules, now):
    """{name: seconds of each call} of modules, within the block."""
    calls = {name: [] for name in modules}
    hooks = []
    for name, module in modules.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, times=calls[name]: times.append(-now())))
        hooks.append(module.register_forward_hook(lambda *_, times=calls[name]: times.append(times.pop() + now())))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _compared(asked, answers):
    """The record of one question."""
    stats, kept = answers["pruned"].stats, answers["pruned"].kept
    layers = len(stats.kv_bytes)
    held = {
        "unpruned": {"visual_tokens": [scenes.ROW**2] * layers, "kv_bytes": layers * stats.kv_bytes_unpruned},
        "pruned": {
            "visual_tokens": stats.totals,
            "kv_bytes": sum(stats.kv_bytes),
            "kept": [{"from_layer": layer, "tokens": ranks.tolist()} for layer, ranks in kept.items()],
        },
    }
    both = {}
    for way in WAYS:
        text = answers[way].text
        both[way] = {"answer": text, "right": None if asked.answer is None else text == asked.answer, **held[way]}
    return {"question": asked.text, "kind": asked.kind, "truth": asked.answer, **both}


def _first_kept(questions):
    """Where the method first removes tokens, which it keeps, and for how many of the questions it keeps these."""
    everything = {"from_layer": 0, "tokens": list(range(scenes.ROW**2))}
    first = [(asked["pruned"]["kept"] or [everything])[0] for asked in questions]
    return first[0] | {"questions": first.count(first[0])}


def _medians(turns, way):
    """Median seconds of every stage, over turns and questions."""
    times = [answers[way].seconds for turn in turns for answers in turn]
    measured = {stage: [t[stage] for t in times if t[stage] is not None] for stage in STAGES}
    return {stage: statistics.median(values) if values else None for stage, values in measured.items()}


def _device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def _described(llava):
    tower, decoder = llava.config.vision_config, llava.config.text_config
    return (
        f"LLaVA: CLIP tower {tower.num_hidden_layers} x {tower.hidden_size}, Llama decoder "
        f"{decoder.num_hidden_layers} x {decoder.hidden_size}, {llava.num_parameters() / 1e6:.1f} M parameters"
    )


def _origin(image):
    if image["path"] is None:
        return f"test scene of seed {image['seed']}, {len(image['objects'])} coloured digits on a photograph"
    size = f"{image['width']} x {image['height']}"
    return f"{image['path']} ({size}), squeezed to {scenes.SIDE} x {scenes.SIDE}; the model knows coloured digits only"


def _summary(record):
    """ "todre, keep 0.1: 26 of 256 visual tokens from layer 0 on"."""
    kept, settings = record["kept"], record["method"]
    keep = f", keep {settings['keep']}" if "keep" in settings else ""
    count = f"{len(kept['tokens'])} of {record['visual_tokens']} visual tokens"
    return f"{settings['method']}{keep}: {count} from layer {kept['from_layer']} on"


def _answer_rows(record):
    questions, count = record["questions"], record["visual_tokens"]
    rows = [["question", "truth", f"all {count} tokens", f"{len(record['kept']['tokens'])} tokens"]]
    for asked in questions:
        answers = [f"{asked[way]['answer'] or '(nothing)'}{MARKS[asked[way]['right']]}" for way in WAYS]
        rows.append([asked["question"], asked["truth"] or "unknown", *answers])
    known = [asked for asked in questions if asked["truth"] is not None]
    if known:
        right = [sum(asked[way]["right"] for asked in known) for way in WAYS]
        rows.append(["right", "", *(f"{count} of {len(known)}" for count in right)])
    return rows


def _table(rows, pad=str.rjust):
    """Lines of columns; the first on the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    pads = [str.ljust, *[pad] * (len(widths) - 1)]
    return ["  ".join(fit(cell, width) for fit, cell, width in zip(pads, row, widths)).rstrip() for row in rows]


def _span(counts):
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"


def _method(name, keep, seed):
    """The method with the settings of the options."""
    if name not in METHODS:
        raise DemoError(f"--method {name}: must be one of {', '.join(METHODS)}")
    settings = {field.name for field in dataclasses.fields(METHODS[name])}
    if keep is not None and "keep" not in settings:
        raise DemoError(f"--keep {keep}: {name} always removes all tokens of an image; leave --keep out")
    tokens = scenes.ROW**2
    if isinstance(keep, int) and keep > tokens:
        raise DemoError(f"--keep {keep}: must be a share in (0, 1] or a count of at most the {tokens} visual tokens")
    given = {"keep": KEEP if keep is None else keep, "seed": seed, "weights": model.LEARNED / f"{name}.safetensors"}
    try:
        return METHODS[name](**{setting: value for setting, value in given.items() if setting in settings})
    except ValueError as error:
        raise DemoError(f"--method {name}: {error}") from None


def _normalised_question(question):
    """The question as words and punctuation separated by single spaces."""
    plain = question.lower().translate(dict.fromkeys(map(ord, '.!:;"'), " "))
    words = plain.replace("?", " ? ").replace(",", " , ").split()
    unknown = [repr(word) for word in dict.fromkeys(words) if word not in model.WORDS]
    if unknown:
        raise DemoError(
            f"--question: the model does not know {', '.join(unknown[:5])}; "
            f"its words are {' '.join(model.WORDS)}; ask for example {EXAMPLES}"
        )
    if not words:
        raise DemoError(f"--question: is empty; ask for example {EXAMPLES}")
    return " ".join(words)


def _require(modules):
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DemoError(f'the demo needs {name} ({error}): pip install "pruneops[demo]"') from None


def _device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: PyTorch sees no GPU here (`pruneops info` says more)")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _picture_path(out):
    path = Path(out)
    if path.is_dir():
        path = path / "pruneops-demo.png"
    if path.suffix.lower() not in FORMATS:
        raise DemoError(f"--out {out}: is no directory, and a picture's name ends in {', '.join(FORMATS)}")
    return _parent_checked(path, "--out")


def _parent_checked(path, option):
    path = Path(path)
    if path.is_dir():
        raise DemoError(f"{option} {path}: is a directory")
    if not path.parent.is_dir():
        raise DemoError(f"{option} {path}: no such directory: {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise DemoError(f"{option} {path}: directory {path.parent} is not writable")
    return path


def _write(path, data):
    """Write a file atomically."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        raise DemoError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def _duration(seconds):
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _size(count):
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
