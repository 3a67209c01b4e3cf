"""kcenter of bfloat16 tokens on the CPU: on the matrix unit (AMX), by AVX512-BF16 and by float32 instructions.

The tests run with the instruction set of this process; `test_instruction_set` repeats them and those of kcenter with
each of the others that this processor has.
"""

import os
import subprocess
import sys

import pytest
import torch

import pruneops
from pruneops import reference
from tests import contract, inputs, oracles
from tests.contract import EPS, NATIVE, ROOT, assert_same_bits, run_python

INSTRUCTION_SETS = ("amx_bf16", "avx512_bf16", "avx512")

pytestmark = pytest.mark.skipif(bool(NATIVE.problem), reason=f"{NATIVE}: {NATIVE.problem}")


def native_capability():
    from pruneops import _C

    return _C.cpu_capability()


def kcenter(x, k, **options):
    return contract.call(NATIVE, "kcenter", x, k, **options)


def assert_reference(x, k, **options):
    """The same bits as the reference, on inputs whose arithmetic is exact."""
    expected = reference.kcenter(x, k, **options)
    result = kcenter(x, k, **options)
    assert torch.equal(result.indices, expected[0])
    torch.testing.assert_close(result.radii, expected[1], rtol=EPS, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_instruction_set(name):
    chosen = {"PRUNEOPS_CPU_CAPABILITY": name}
    if run_python("import pruneops._C as c; print(c.cpu_capability())", **chosen).strip() != name:
        pytest.skip(f"this processor lacks {name}")
    if native_capability() == name:
        pytest.skip("what the other tests run with")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-k", "not instruction_set", __file__]
    done = subprocess.run(command, env={**os.environ, **chosen}, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("width", [1, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 2305])
@pytest.mark.parametrize("tokens", [1, 2, 15, 17, 33, 100])
def test_exact_integers(tokens, width):
    """Widths around steps, units and sums of features; tokens around tiles; all are chosen, with many ties."""
    x = inputs.small_integers((tokens, width), torch.Generator().manual_seed(width), limit=2).bfloat16()
    assert_reference(x, tokens, metric="euclidean")


@pytest.mark.parametrize("count", [1, 16, 17, 32, 33, 100])
def test_exact_seeds(count):
    """Numbers of centers around tiles, more than a call takes in one block."""
    x = inputs.small_integers((700, 300), torch.Generator().manual_seed(count), limit=1).bfloat16()
    seeds = torch.randperm(700, generator=torch.Generator().manual_seed(1))[:count]
    assert_reference(x, count + 50, seeds=seeds, metric="euclidean")


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_special_tokens(metric):
    generator = torch.Generator().manual_seed(0)
    x = inputs.signs((2, 120, 70), generator) if metric == "cosine" else inputs.small_integers((2, 120, 70), generator)
    x = inputs.with_special_tokens(x, generator, list(inputs.SPECIAL), share=0.5).bfloat16()
    assert_reference(x, 120, metric=metric)


@pytest.mark.parametrize("layout", [name for name in inputs.LAYOUTS if name != "expanded"])
def test_layouts(layout):
    """Rows that start at odd addresses, strides; the same bits."""
    x = inputs.clustered((2, 90, 301), dtype=torch.bfloat16)
    assert_same_bits(kcenter(inputs.LAYOUTS[layout](x), 40), kcenter(x, 40))


@pytest.mark.parametrize("width", [300, 4096])
def test_copies_and_threads(width):
    """Equal tokens tie exactly; the number of threads and the budget change no bit."""
    x = inputs.with_copies(inputs.clustered((900, width)), torch.Generator().manual_seed(1), share=0.3).bfloat16()
    contract.assert_threads_change_no_bit(lambda: kcenter(x, 300))
    result = kcenter(x, 300)
    assert_same_bits([part[:77] for part in result], kcenter(x, 77))
    step = torch.full((len(x),), 300)
    step[result.indices] = torch.arange(300)
    token_of = x.float().unique(dim=0, return_inverse=True)[1]
    for token in token_of.bincount().gt(1).nonzero()[:, 0]:
        steps = step[token_of == token]
        assert (steps[1:] >= steps[:-1]).all(), f"copies are chosen in the order {steps.tolist()}"


def pairs(count, width, kind):
    """Pairs of tokens [count, 2, width]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, width, generator=generator)
    if kind == "positive":
        x = x.abs()
    if kind == "similar":
        x += 3 * torch.randn(count, 1, width, generator=generator)
    return x.bfloat16()


def cosine_errors(x, radii):
    return (1 - radii.double() - oracles.cosines(x, torch.zeros(len(x), 1, dtype=torch.int64))[:, 0, 1]).abs()


@pytest.mark.parametrize("kind", ["normal", "positive", "similar"])
@pytest.mark.parametrize("width", [100, 4096, 16384])
def test_error(width, kind):
    """Of long sums, whose terms cancel or not: at most twice the reference's."""
    x = pairs(2**20 // width, width, kind)
    seeds = torch.zeros(len(x), 1, dtype=torch.int64)
    errors = [cosine_errors(x, answer(x, 2, seeds=seeds)[1][:, 1]) for answer in (kcenter, reference.kcenter)]
    contract.assert_no_worse(errors[0].max(), errors[1].max(), 1.0)
    assert errors[0].square().mean() <= 4 * errors[1].square().mean()


@pytest.mark.parametrize("powers", [(-60, -60), (-60, 0), (0, -60), (-30, -25), (55, -60), (55, 55)])
def test_tiny_and_huge_tokens(powers):
    """Instructions that take subnormal products as zero lose none of a token's direction."""
    x = pairs(200, 64, "similar")
    scaled = (x.float() * torch.tensor([2.0**power for power in powers])[:, None]).bfloat16()
    seeds = torch.zeros(len(x), 1, dtype=torch.int64)
    error = cosine_errors(scaled, kcenter(scaled, 2, seeds=seeds).radii[:, 1]).max()
    assert error <= 8 * EPS


def test_more_centers_than_are_stored():
    """Zero features change no bit, but make centers so long that the store is emptied on the way."""
    x = inputs.small_integers((2300, 40), torch.Generator().manual_seed(0), limit=1).bfloat16()
    wide = torch.zeros(2300, 16384, dtype=torch.bfloat16)
    wide[:, 8000:8040] = x
    with pruneops.backend("cpu"):
        narrow, result = (pruneops.kcenter(tokens, 2300, metric="euclidean") for tokens in (x, wide))
    assert_same_bits(result, narrow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_many_panels(dtype):
    """The same with few centers at a time."""
    x = inputs.small_integers((300, 40), torch.Generator().manual_seed(0), limit=1).to(dtype)
    wide = torch.zeros(300, 16384, dtype=dtype)
    wide[:, 8000:8040] = x
    for seeds in (None, torch.arange(200, 280)):
        narrow, result = (kcenter(tokens, 200, seeds=seeds, metric="euclidean") for tokens in (x, wide))
        assert_same_bits(result, narrow)
