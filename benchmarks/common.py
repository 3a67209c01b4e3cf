"""What the operators' benchmarks share: cases, sets of them, image-like tokens, checks, baselines in a CUDA graph."""

import dataclasses
import itertools

import torch

from .harness import capture
from .machine import dtype_name
from .registry import Case, Check

KEEP = 0.1  # share of the tokens that is kept
DTYPES = (torch.float32, torch.bfloat16)
VARLEN = (576, 1728, 2880, 2304, 1440)  # LLaVA-NeXT images of one to five 24 x 24 tiles

# Largest error of a similarity against float64, by the dtype that an implementation computes in.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}


def case(name, shape, dtype, **sizes):
    """A Case; name and shape are format strings of the sizes, the dtype is appended to both."""
    suffix = dtype_name(dtype)
    return Case(f"{name.format(**sizes)}-{suffix}", f"{shape.format(**sizes)} {suffix}", dtype, sizes)


def case_sets(cases, tiny, **sets):
    """Set -> names of its cases: "tiny" is the first so many, others are names in a string or a predicate of a case."""
    chosen = {
        name: tuple(which.split() if isinstance(which, str) else (case.name for case in cases if which(case)))
        for name, which in sets.items()
    }
    return {"tiny": tuple(case.name for case in cases[:tiny]), **chosen}


def every(case):
    """Predicate of a set of all cases."""
    return True


def features(tokens, D, generator):
    """Rows [tokens, D] distributed as image tokens are: a common offset, clusters, noise."""
    normal = dict(generator=generator, device=generator.device)
    centers = torch.randn(max(2, tokens // 20), D, **normal)
    nearest = torch.randint(len(centers), (tokens,), **normal)
    return torch.randn(D, **normal) + centers[nearest] + torch.randn(tokens, D, **normal)


def image_tokens(case, generator):
    """Features [B, N, D] of a case, or [T, D] of packed images."""
    D, packed = case.sizes["D"], "lengths" in case.sizes
    counts = case.sizes["lengths"] if packed else [case.sizes["N"]] * case.sizes["B"]
    images = [features(n, D, generator) for n in counts]
    return (torch.cat(images) if packed else torch.stack(images)).to(case.dtype)


def offsets(case):
    """Where packed images start, and the end of the last."""
    return [0, *itertools.accumulate(case.sizes["lengths"])]


def blocks(case, x, tokens):
    """(start, x [B, N, D], tokens [B, P]) of every block of equal images; tokens are counted from the start."""
    if "lengths" not in case.sizes:
        return [(0, x, tokens)]
    starts = offsets(case)
    images = zip(starts, starts[1:], tokens)
    return [(start, x[None, start:end], row[None] - start) for start, end, row in images]


def small_on_cpu(case):
    """Whether a case is float32 and of at most 23328 tokens."""
    return case.dtype == torch.float32 and case.sizes.get("N", 0) * case.sizes.get("B", 1) <= 23328


def wrong(message, **numbers):
    return Check(False, f"WRONG: {message}", numbers)


def check_error(errors, tolerance):
    """The largest error within tolerance; NaN is not."""
    error = float(errors.abs().nan_to_num(torch.inf).amax())
    numbers = {"max_diff": error, "tolerance": tolerance}
    return Check(True, f"ok, within {error:.1g}", numbers) if error <= tolerance else _off(error, numbers)


def check_choices(error, tolerance, chosen, expected, **numbers):
    """The largest error of a choice within tolerance; agreement with the reference's choices is reported only."""
    agree, count = None if expected is None else int((chosen == expected).sum()), chosen.numel()
    numbers |= {"tolerance": tolerance, "agree_with_reference": agree, "choices": count}
    if error > tolerance:
        return _off(error, numbers)
    return Check(True, "ok" if agree is None else f"ok, {agree}/{count}", numbers)


def _off(error, numbers):
    return wrong(f"off by {error:.2g}", **numbers)


def captured(baseline):
    """A baseline replayed from a CUDA graph."""

    def prepare(case, arguments):
        return capture(baseline.prepare(case, arguments))

    return dataclasses.replace(baseline, prepare=prepare, devices=("cuda",))
