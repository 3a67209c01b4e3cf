"""What selection costs beside what it saves: milliseconds of the embedded model's prefill, one prompt at a time.

Prefill is the decoder's pass over the prompt with selection in it; methods take turns on every scene; medians.
"""

import statistics
import time

import torch

import pruneops
from pruneops import networks
from pruneops.demo import model as embedded

from . import run as quality

KEEP, SCENES = 0.1, 25
WITHOUT = quality.FOREGROUND, quality.SEARCHED  # know the answers


def measure(device="cpu"):
    """Rows of the table: method, parameters, selection_ms, prefill_ms, unpruned_ms; seconds are medians."""
    model = embedded.load(device)
    seen, asked = quality.questions_of(0, SCENES)
    methods = {name: build(KEEP, (), 0) for name, build in quality.METHODS.items() if name not in WITHOUT}
    times = {name: [] for name in (quality.UNPRUNED, *methods)}
    for turn, (number, question) in enumerate(asked):
        inputs = embedded.inputs(torch.from_numpy(seen[number].pixels)[None], [question.text], device)
        for name in times:
            seconds = _seconds(model, inputs, methods.get(name))
            if turn >= len(asked) // 5:  # after a warm-up
                times[name].append(seconds)
    unpruned = 1e3 * statistics.median(prefill for prefill, _ in times[quality.UNPRUNED])
    rows = []
    for name in methods:
        prefill, selection = (1e3 * statistics.median(each) for each in zip(*times[name]))
        rows.append({
            "method": name, "parameters": _parameters(name), "selection_ms": round(selection, 3),
            "prefill_ms": round(prefill, 3), "unpruned_ms": round(unpruned, 3),
        })  # fmt: skip
    return rows


def text(rows):
    """The table, with shares of the unpruned prefill."""
    lines = [f"{'method':12}{'parameters':>12}{'selection':>12}{'share':>8}{'prefill':>12}{'saved':>8}"]
    for row in rows:
        whole = row["unpruned_ms"]
        lines.append(
            f"{row['method']:12}{row['parameters']:12,}{row['selection_ms']:9.2f} ms{row['selection_ms'] / whole:8.0%}"
            f"{row['prefill_ms']:9.2f} ms{1 - row['prefill_ms'] / whole:8.0%}"
        )
    return "\n".join([*lines, f"unpruned prefill: {rows[0]['unpruned_ms']:.2f} ms; keep {KEEP:g}"])


@torch.inference_mode()
def _seconds(model, inputs, method):
    """(prefill with selection, selection) of one prompt."""
    decoder, spent = model.get_decoder(), []
    hooks = [
        decoder.register_forward_pre_hook(lambda *_: spent.append(-time.perf_counter())),
        decoder.register_forward_hook(lambda *_: spent.append(spent.pop() + time.perf_counter())),
    ]
    try:
        if method is None:
            model(**inputs, use_cache=True, logits_to_keep=1)
            return spent[0], 0.0
        with pruneops.patch(model, method) as handle:
            model(**inputs, use_cache=True, logits_to_keep=1)
        return spent[0], handle.stats[-1].seconds
    finally:
        for hook in hooks:
            hook.remove()


def _parameters(name):
    kinds = networks.NETWORKS
    if name not in kinds:
        return 0
    return sum(p.numel() for p in networks.load(kinds[name], quality.learned(name)).parameters())
