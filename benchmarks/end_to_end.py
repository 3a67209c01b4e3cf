"""`python -m benchmarks end_to_end`: prefill, decode and memory of LLaVA-shaped models, pruned against unpruned.

Weights are random: times are those of a trained model of the shape, answers mean nothing. Pruned and unpruned runs use
the same attention implementation and take turns. Prefill is a forward pass of the prompt minus the vision tower's time,
which pruning does not change; selection is the time in the hooks that choose tokens, synchronised before and after.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

import pruneops
from pruneops import methods

from . import machine, report

KEEPS = (0.25, 0.1, 0.01)
TEXT = 32, 32  # tokens before and after the image
STEPS = 16  # of generation
IMAGE = 31999
MODELS = "llava-1.5", "llava-next"
METHODS = {
    "todre": lambda keep: methods.ToDRE(keep=keep, depths=()),
    "todre-both-stages": lambda keep: methods.ToDRE(keep=keep),
    "dart": lambda keep: methods.DART(keep=keep, layer=2),
    "fastv": lambda keep: methods.FastV(keep=keep, layer=2),
    "fastv-last-row": lambda keep: methods.FastV(keep=keep, layer=2, rows="last"),
    "divprune": lambda keep: methods.DivPrune(keep=keep),
    "fastervlm": lambda keep: methods.FasterVLM(keep=keep),
    "random": lambda keep: methods.Random(keep=keep),
    "uniform": lambda keep: methods.Uniform(keep=keep),
    "vtw": lambda keep: methods.VTW(),
}
ANYRES = ("fastervlm",)  # needs [CLS] attention of every token, which AnyRes images do not have


def build(name, device):
    """(model, inputs, visual tokens: 576 of "llava-1.5", 2928 of "llava-next"); small models on a CPU."""
    import transformers

    small = device.type == "cpu"
    width, layers, heads, inner = (1024, 8, 8, 2752) if small else (4096, 32, 32, 11008)
    text = transformers.LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        intermediate_size=inner, max_position_embeddings=4096, vocab_size=32000,
    )  # fmt: skip
    tower = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=2 if small else 24, num_attention_heads=16,
        image_size=336, patch_size=14,
    )  # fmt: skip
    options = {"text_config": text, "vision_config": tower, "image_token_id": IMAGE}
    if name == "llava-1.5":
        kind, config = "Llava", transformers.LlavaConfig(**options)
        tokens, inputs = 576, {"pixel_values": torch.randn(1, 3, 336, 336)}
    else:
        kind, config = "LlavaNext", transformers.LlavaNextConfig(**options, image_grid_pinpoints=[[672, 672]])
        tokens = 576 + 48 * 49
        inputs = {"pixel_values": torch.randn(1, 5, 3, 336, 336), "image_sizes": torch.tensor([[672, 672]])}
    dtype = torch.float32 if small else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    before, after = (torch.randint(1, 31000, (1, count)) for count in TEXT)
    inputs["input_ids"] = torch.cat([before, torch.full((1, tokens), IMAGE), after], 1)
    inputs = {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}
    return model.eval(), inputs, tokens


class Clock:
    """Seconds of a call, synchronised with the device."""

    def __init__(self, device):
        self.device = device

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, call):
        start = self.now()
        result = call()
        return self.now() - start, result


def one_run(model, inputs, clock):
    """(seconds of the prompt, seconds a generated token, bytes of the cache, peak bytes beyond the weights)."""
    device = inputs["input_ids"].device
    cuda = device.type == "cuda"
    allocated = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    prompt, out = clock(lambda: model(**inputs, logits_to_keep=1))
    peak = torch.cuda.max_memory_allocated(device) - allocated if cuda else None
    cache, steps = out.past_key_values, []
    token = out.logits[:, -1:].argmax(-1)
    for _ in range(STEPS):
        seconds, out = clock(lambda token=token: model(input_ids=token, past_key_values=cache))
        token = out.logits[:, -1:].argmax(-1)
        steps.append(seconds)
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return prompt, statistics.median(steps), size, peak


def tower_seconds(model, inputs, clock, runs):
    pixels, tower = inputs["pixel_values"].flatten(0, -4), model.base_model.vision_tower
    times = [clock(lambda: tower(pixels, output_hidden_states=True))[0] for _ in range(runs + 1)]
    return statistics.median(times[1:])


def rows_of(name, chosen, keeps):
    """Label -> method: the unpruned model, then every method and share."""
    rows = {"unpruned": None}
    for method in chosen:
        if method == "vtw":
            rows[method] = METHODS[method](None)
        elif name == "llava-1.5" or method not in ANYRES:
            rows |= {f"{method} {keep:g}": METHODS[method](keep) for keep in keeps}
    return rows


def pruned_run(model, method, inputs, clock):
    """`one_run` with a method, and the seconds of its selection."""
    if method is None:
        return *one_run(model, inputs, clock), 0.0
    with pruneops.patch(model, method) as handle:
        handle.clock = clock.now
        return *one_run(model, inputs, clock), handle.stats[-1].seconds


def measure(name, device, chosen, keeps, runs):
    """Rows of one model; all take turns `runs` times, after one to warm up."""
    model, inputs, tokens = build(name, device)
    clock, methods = Clock(device), rows_of(name, chosen, keeps)
    times, results = {row: [] for row in methods}, []
    with torch.inference_mode():
        tower = tower_seconds(model, inputs, clock, runs)
        for turn in range(runs + 1):
            for row, method in methods.items():
                print(f"{name}, run {turn}/{runs}: {row}", file=sys.stderr, flush=True)
                times[row].append(pruned_run(model, method, inputs, clock))
    for row, measured in times.items():
        prompt, step, size, peak, selection = zip(*measured[1:])
        entry = {"model": name, "visual_tokens": tokens, "row": row, "prefill_s": statistics.median(prompt) - tower}
        entry |= {"decode_s": statistics.median(step), "kv_bytes": size[0], "peak_bytes": peak[0]}
        entry |= {"selection_s": statistics.median(selection), "tower_s": tower, "runs_prompt_s": list(prompt)}
        results.append(entry)
        entry["prefill_speedup"] = results[0]["prefill_s"] / entry["prefill_s"]
        entry["decode_speedup"] = results[0]["decode_s"] / entry["decode_s"]
        entry["selection_share"] = entry["selection_s"] / entry["prefill_s"]
    return results


def table(document):
    lines = ["model       method               prefill            decode            KV cache   peak       selection"]
    for e in document["rows"]:
        peak = "" if e["peak_bytes"] is None else f"{e['peak_bytes'] / 2**20:.0f} MiB"
        lines.append(
            f"{e['model']:<11} {e['row']:<20} {1e3 * e['prefill_s']:7.1f} ms {e['prefill_speedup']:5.2f}x  "
            f"{1e3 * e['decode_s']:6.1f} ms {e['decode_speedup']:5.2f}x  {e['kv_bytes'] / 2**20:6.0f} MiB  {peak:<9}  "
            f"{1e3 * e['selection_s']:.1f} ms, {e['selection_share']:.1%} of prefill".rstrip()
        )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks end_to_end", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default=",".join(METHODS), help=f"comma-separated: {', '.join(METHODS)}")
    parser.add_argument("--keep", default=",".join(map(str, KEEPS)), help="comma-separated shares")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    chosen, models = options.methods.split(","), options.models.split(",")
    for name, known in [*((name, METHODS) for name in chosen), *((name, MODELS) for name in models)]:
        if name not in known:
            parser.error(f"no {name!r}; there is: {', '.join(known)}")
    return run(options, models, chosen)


def run(options, models, chosen):
    device = torch.device(options.device)
    document = machine.facts(device) | {"complete": False, "rows": []}
    try:
        for name in models:
            keeps = [float(keep) for keep in options.keep.split(",")]
            document["rows"] += measure(name, device, chosen, keeps, options.runs)
        document["complete"] = True
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
    print(table(document))
    if options.out:
        report.write(options.out, document)
    return 0 if document["complete"] else 130
