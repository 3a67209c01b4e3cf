"""What the small calls of several operators share: comparison with the reference, tokens, tensors in memory."""

import math

import torch

import pruneops

TOLERANCE = 2e-5  # of a similarity or a probability in float32


def as_reference(run, tolerance=0.0):
    """A function of a device: whether run(device) gives what the reference does on the CPU; NaN equals NaN."""

    def check(device):
        result = run(device).cpu()
        with pruneops.backend("reference"):
            expected = run(torch.device("cpu"))
        same = result.shape == expected.shape and result.dtype == expected.dtype
        return same and torch.allclose(result, expected, rtol=0, atol=tolerance, equal_nan=True)

    return check


def plus_minus_one(shape, generator):
    """Entries 1 or -1: products are exact, and cosines too where the width is a power of four."""
    return torch.randint(2, shape, generator=generator) * 2.0 - 1


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def laid_out(how, shape, dtype, generator):
    """A function of a device: memory of random bytes there, new on every call, and a tensor laid out in it."""
    count = math.prod(shape)
    memory = torch.randint(256, (2 * (count + 1) * dtype.itemsize,), generator=generator, dtype=torch.uint8)

    def on(device):
        own = memory.to(device, copy=True)
        elements = own.view(dtype)[int(how == "odd address") :]
        if how == "heads inside":
            return own, elements[:count].view(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
        if how == "strided":
            return own, elements[: 2 * count].view(*shape, 2)[..., 1]
        return own, elements[:count].view(shape)

    return on


def as_bytes(tensors):
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])
