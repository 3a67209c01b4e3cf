"""Inside torch.autocast every operator answers as outside: its arithmetic is float32, whatever is on around it."""

import pytest
import torch

import pruneops
from pruneops import backends
from tests import contract
from tests.contract import assert_same_bits, every_backend, to_device
from tests.inputs import clustered

X, PIVOTS = clustered((2, 40, 24)), torch.tensor([[3, 9], [0, 39]])
QUERY, KEY = clustered((2, 4, 24, 16), seed=1), clustered((2, 2, 24, 16), seed=2)
POSITIONS = clustered((3, 2, 40, 1), seed=3)
GROUP = (torch.arange(24) // 9).expand(2, -1)
KEEP = torch.tensor([[0, 2, 5], [1, 3, 4]])
PACKED = X[0], torch.tensor([0, 20, 40]), torch.tensor([[3, 9], [20, 39]])  # tokens, where they start, pivots
PAGED = torch.tensor([[4, 0], [3, 1]], dtype=torch.int32), KEEP, torch.tensor([3, 2])

# operator -> (its arguments but for options, options)
CALLS = {
    "assign_ranks": ((X, 5), {}),
    "attention_mass": ((QUERY, KEY, GROUP, GROUP, 3), {}),
    "attention_received": ((QUERY, KEY), {}),
    "duplication": ((X, PIVOTS), {"reduce": "mean"}),
    "duplication_varlen": (PACKED, {"reduce": "sum"}),
    "exclusive_bottomk": ((X, [1] * 20 + [0] * 20), {}),
    "gather_tokens": (([X, POSITIONS], KEEP), {"dim": [1, 2]}),
    "kcenter": ((X, 12), {"metric": "euclidean"}),
    "kcenter_varlen": ((*PACKED[:2], [6, 9]), {"seeds": PACKED[2]}),
    "kv_compact": (([KEY, KEY.half()], KEEP), {}),
    "kv_compact_": (([KEY, KEY.half()], KEEP), {}),
    "paged_kv_compact_": (([clustered((5, 3, 2, 8))], *PAGED), {}),
    "pivot_bottomk": ((X, PIVOTS, [4, 5]), {}),
    "pivot_cosine": ((X, PIVOTS), {}),
    "pivot_cosine_varlen": (PACKED, {}),
}


def answer(op, device):
    """Results on the CPU: what is returned, or the tensors that are changed."""
    args, kwargs = to_device(CALLS[op], device)
    if op.endswith("_"):
        args = [tensor.clone() for tensor in args[0]], *args[1:]
    result = getattr(pruneops, op)(*args, **kwargs)
    return to_device(args[0] if result is None else result, "cpu")


def test_every_operator_is_called():
    assert CALLS.keys() == pruneops.ops.OPERATORS.keys()


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("op", CALLS)
def test_same_bits(target, op, dtype, monkeypatch):
    """And no code of a backend runs with autocast on."""
    seen, choose = [], backends.choose

    def watched(device, *rest):
        seen.append(torch.is_autocast_enabled(device))
        return choose(device, *rest)

    with pruneops.backend(target.backend):
        expected = answer(op, target.device)
        monkeypatch.setattr(backends, "choose", watched)
        with torch.autocast(target.device, dtype):
            assert_same_bits(answer(op, target.device), expected)
            assert torch.is_autocast_enabled(target.device)
    assert seen and not any(seen)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_helpers(device):
    """In CUDA's autocast a sum of float16 is float32."""
    mass = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    for helper in (
        lambda: pruneops.cross_modal_ratio(mass, text=2, vision=1),
        lambda: [pruneops.group_distribution(mass, query=2)],
    ):
        expected = helper()
        with torch.autocast(device, torch.bfloat16):
            assert_same_bits(list(helper()), list(expected))


@every_backend
def test_gradients(target):
    """Of what is gathered inside and outside."""

    def gradients():
        tensors = [t.clone().requires_grad_() for t in to_device([X, POSITIONS], target.device)]
        gathered = pruneops.gather_tokens(tensors, KEEP.to(target.device), dim=[1, 2])
        sum((own * own.cos()).sum() for own in gathered).backward()
        return [tensor.grad for tensor in tensors]

    with pruneops.backend(target.backend):
        expected = gradients()
        with torch.autocast(target.device, torch.bfloat16):
            assert_same_bits(gradients(), expected)


@every_backend
@pytest.mark.parametrize("op", ["pivot_cosine", "kcenter", "attention_mass", "gather_tokens"])
def test_opcheck(target, op):
    args, kwargs = CALLS[op]
    with torch.autocast(target.device, torch.bfloat16):
        contract.opcheck(target, op, *args, **kwargs)


def scores(x, pivots, query, key, group):
    mass = pruneops.attention_mass(query, key, group, group, 3).mass
    return pruneops.pivot_cosine(x, pivots), *pruneops.cross_modal_ratio(mass, text=2, vision=1)


@every_backend
def test_compile_without_graph_break(target):
    """With autocast on around the compiled function and inside of it."""

    def inside(*args):
        with torch.autocast(target.device, torch.bfloat16):
            return scores(*args)

    calls = [(X, PIVOTS, QUERY, KEY, GROUP)]
    contract.assert_compiles(target, inside, calls)
    with torch.autocast(target.device, torch.bfloat16):
        contract.assert_compiles(target, scores, calls)
