"""What the benchmarks of several operators share: image-like tokens, tolerances, a comparison with the reference."""

import torch

import pruneops

SHARE = 0.1  # of the tokens is kept
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # every dtype that is timed
VARLEN = (576, 1728, 2880, 2304, 1440)  # LLaVA-NeXT images of one to five 24 x 24 tiles

# How far from float64 a similarity may be, by the dtype that an implementation computes in.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def features(tokens, D, generator):
    """Rows [tokens, D] that lie together as image tokens do: a common offset, clusters, noise."""
    normal = dict(generator=generator, device=generator.device)
    centers = torch.randn(max(2, tokens // 20), D, **normal)
    nearest = torch.randint(len(centers), (tokens,), **normal)
    return torch.randn(D, **normal) + centers[nearest] + torch.randn(tokens, D, **normal)


def signs(shape, generator):
    """Entries 1 or -1: products are exact, and cosines too where the width is a power of four."""
    return torch.randint(2, shape, generator=generator) * 2.0 - 1


def as_reference(run, device, tolerance=0.0):
    """Whether run(device) is what the reference gives on the CPU; NaN equals NaN."""
    result = run(device).cpu()
    with pruneops.backend("reference"):
        expected = run(torch.device("cpu"))
    close = result.shape == expected.shape and result.dtype == expected.dtype
    return close and torch.allclose(result, expected, rtol=0, atol=tolerance, equal_nan=True)
