"""The demo: tile a photograph, keep some of its visual tokens, time the prefill with and without.

A method of methods.py chooses among the projected tokens. Kept tokens enter the decoder in ascending
order, at the positions they had among all of them.
"""

import importlib
import json
import os
import statistics
import time
from pathlib import Path

import torch

from .. import __version__, backend, backends, ops, reference
from . import DemoError, photo
from .methods import METHODS

EXTRAS = ("numpy", "PIL", "tqdm", "matplotlib", "transformers")
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
TEXT = (32, 32)  # text tokens before and after the image
STAGES = 10


def run(
    image=None,
    *,
    method="todre",
    keep=0.1,
    metric="cosine",
    out="pruneops-demo.png",
    save=None,
    seed=0,
    device="auto",
    backend_name="auto",
    shape=None,
    runs=3,
):
    """Run the demo and write its picture.

    Parameters
    ----------
    image : path, optional
        Photograph; by default one that scikit-image brings along.
    method : {"todre", "dart"}
        What chooses the tokens.
    keep : float or int
        Fraction of the visual tokens in (0, 1], or their number.
    metric : {"cosine", "euclidean"}
        Distance between tokens; "dart" knows the cosine only.
    out : path
        Picture, or the directory to put pruneops-demo.png into.
    save : path, optional
        Where to write the returned record as JSON.
    seed : int
        Of all random weights and draws.
    device : {"auto", "cpu", "cuda"}
    backend_name : str
        As in `pruneops.backend`.
    shape : model.Shape, optional
        Sizes of the model, by default `model.shape_for(device)`.
    runs : int
        Timed runs of selection and prefill after one to warm up; their median counts.

    Returns
    -------
    dict
        What was chosen and measured, fit for JSON; seconds and bytes.

    Raises
    ------
    DemoError, BackendUnavailable
        When it cannot run as asked; nothing is written then.
    """
    _check_method(method, metric)
    _require((*EXTRAS, "skimage") if image is None else EXTRAS)
    out = _picture_path(out)
    save = None if save is None else _parent_checked(save, "--save")
    device = _device(device)
    with backend(backend_name):
        served_by = backends.choose(device.type)

    from tqdm import tqdm

    bar = tqdm(total=STAGES, disable=None, leave=False, bar_format="{desc:30}{bar:30} {n}/{total}")
    try:
        with bar, torch.inference_mode(), backend(backend_name):
            record, picture = _measure(
                _Stages(device, bar), image, method, keep, metric, seed, device, shape, runs, out
            )
    except torch.OutOfMemoryError:
        raise DemoError("the GPU ran out of memory; try --device cpu") from None
    record = {"version": __version__, "backend": served_by, "picture": str(out), **record}
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    _write(out, picture)
    if save is not None:
        _write(save, text.encode())
    return record


def _measure(stages, image, method, keep, metric, seed, device, shape, runs, out):
    """(record, bytes of the picture)."""
    picture = stages("photo", lambda: photo.load(image))
    import transformers

    from .. import plots
    from . import model

    shape = shape or model.shape_for(device)
    tiling = photo.Tiling(*picture.size, shape.crop, shape.patch)
    k = _budget(keep, tiling.tokens)

    torch.manual_seed(seed)
    tower, projector, decoder = stages("random weights", lambda: model.build(shape, device))
    text = torch.randn(1, sum(TEXT), shape.width, device=device, dtype=shape.dtype)

    tiles = stages("tiles", lambda: photo.tile(picture, tiling))
    pixels = photo.normalise(tiles, device, shape.dtype)
    features, attention = stages("tower", lambda: model.see(tower, pixels), warmup=1)
    tokens = stages("projector", lambda: projector(features).flatten(0, 1), warmup=1)  # [N, D]
    way = METHODS[method]
    pivots = way.pivots(tokens, attention, k, seed)

    def choose(operators):
        return way.choose(operators, tokens, pivots, k, metric)

    chosen = stages("selection", lambda: choose(ops), warmup=1, runs=runs)
    stages("selection, PyTorch loop", lambda: choose(reference), warmup=1, runs=runs)

    def prefill(kept):
        embeddings = torch.cat([text[:, : TEXT[0]], tokens[None, kept], text[:, TEXT[0] :]], dim=1)
        head = torch.arange(TEXT[0], device=device)
        tail = torch.arange(TEXT[1], device=device) + TEXT[0] + tiling.tokens
        positions = torch.cat([head, kept + TEXT[0], tail])[None]
        return model.cache_bytes(model.prefill(decoder, embeddings, positions)[1])

    everything = torch.arange(tiling.tokens, device=device)
    ascending = chosen[0].sort().values
    bytes_all = stages("prefill, all tokens", lambda: prefill(everything), warmup=1, runs=runs)
    bytes_kept = stages("prefill, kept tokens", lambda: prefill(ascending), warmup=1, runs=runs)

    outcome, shown = way.outcome(tokens, pivots, chosen)
    shown |= {"caption": f"vision tower: random\nweights, seed {seed}", "form": out.suffix[1:].lower()}
    drawn = stages("picture", lambda: getattr(plots, way.picture)(tiles, tiling, **shown))
    seconds = stages.seconds
    pruned = seconds["selection"] + seconds["prefill, kept tokens"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    record = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": name,
        "weights": f"random, seed {seed}",
        "model": {
            "tower": f"CLIP ViT, {shape.tower_layers} layers x {shape.tower_width}",
            "decoder": f"Llama, {shape.layers} layers x {shape.width}",
            "dtype": str(shape.dtype).removeprefix("torch."),
        },
        "image": {"path": None if image is None else str(image), "width": picture.width, "height": picture.height},
        "method": method,
        "metric": metric,
        "tokens": {"visual": tiling.tokens, "per_tile": tiling.side**2, "text": sum(TEXT), "kept": k},
        **outcome,
        "seconds": seconds,
        "kv_bytes": {"all": bytes_all, "kept": bytes_kept},
        "speedup": {
            "prefill": seconds["prefill, all tokens"] / seconds["prefill, kept tokens"],
            "prefill_with_selection": seconds["prefill, all tokens"] / pruned,
            "selection_over_loop": seconds["selection, PyTorch loop"] / seconds["selection"],
        },
        "selection_share": seconds["selection"] / pruned,
    }
    return record, drawn


def report(record):
    """The table that `pruneops demo` prints."""
    tokens, seconds, speedup, kv = (record[key] for key in ("tokens", "seconds", "speedup", "kv_bytes"))
    per_tile, row = tokens["per_tile"], round(tokens["per_tile"] ** 0.5)
    way = METHODS[record["method"]]
    start, words = way.start(record, row)
    photograph = record["image"]["path"] or "astronaut, from scikit-image"
    share = f"{record['selection_share']:.1%} of selection + prefill"
    notes = {
        "tower": record["model"]["tower"],
        "selection": f"{share}; {speedup['selection_over_loop']:.1f}x the PyTorch loop",
        "prefill, all tokens": f"{tokens['visual'] + tokens['text']} tokens, KV cache {_size(kv['all'])}",
        "prefill, kept tokens": f"{tokens['kept'] + tokens['text']} tokens, KV cache {_size(kv['kept'])}",
    }
    lines = [
        f"photograph      {photograph} ({record['image']['width']} x {record['image']['height']})",
        f"visual tokens   {tokens['visual']} = thumbnail {per_tile} + 4 crops x {per_tile}",
        f"kept            {tokens['kept']} ({tokens['kept'] / tokens['visual']:.1%}) by {way.summary}, "
        f"{record['metric']}, backend {record['backend']}",
        f"{start:<16}{words}",
        f"model           {record['model']['tower']}; {record['model']['decoder']}; {record['model']['dtype']}",
        f"weights         {record['weights']}: the times are real, the tower is untrained",
        f"device          {record['device']}, torch {record['torch']}",
        "",
        f"{'stage':<26}{'time':>10}",
        *(f"{name:<26}{_duration(value):>10}   {notes.get(name, '')}".rstrip() for name, value in seconds.items()),
        "",
        f"Prefill is {speedup['prefill']:.1f}x faster, {speedup['prefill_with_selection']:.1f}x with selection "
        f"counted; the KV cache is {kv['all'] / kv['kept']:.1f}x smaller.",
        f"Picture: {record['picture']}",
    ]
    return "\n".join(lines)


class _Stages:
    """Runs the stages one by one, shows which, keeps the median time of each."""

    def __init__(self, device, bar):
        self.device, self.bar, self.seconds = device, bar, {}

    def __call__(self, name, function, warmup=0, runs=1):
        self.bar.set_description_str(name)
        times = []
        for _ in range(warmup + runs):
            start = self._now()
            result = function()
            times.append(self._now() - start)
        self.seconds[name] = statistics.median(times[warmup:])
        self.bar.update()
        return result

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _require(modules):
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DemoError(f'the demo needs {name} ({error}): pip install "pruneops[demo]"') from None


def _check_method(method, metric):
    if method not in METHODS:
        raise DemoError(f"--method {method}: must be one of {', '.join(METHODS)}")
    if metric not in METHODS[method].metrics:
        raise DemoError(f"--metric {metric}: method {method} knows {', '.join(METHODS[method].metrics)} only")


def _device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: PyTorch sees no GPU here (`pruneops info` says more)")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _budget(keep, tokens):
    k = keep if isinstance(keep, int) else max(1, round(keep * tokens))
    if not 1 <= k <= tokens:
        raise DemoError(f"--keep {keep}: must be between 1 and the {tokens} visual tokens, or a fraction of them")
    return k


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
    """All of the file or nothing: readers never see half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        raise DemoError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def _duration(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _size(count):
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
