"""The public API as a user calls it, for the type checker: `pyrefly check` verifies every `assert_type`. Never run."""

from collections import deque
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import pruneops
from pruneops import methods
from pruneops.adapters.transformers import Handle, PrunedLayer, Stats
from pruneops.ops.attention_mass import AttentionMass
from pruneops.ops.kcenter import KCenter


def operators(x: Tensor, query: Tensor, key: Tensor, index: Tensor, mask: Tensor) -> None:
    chosen = pruneops.kcenter(x, 8, seeds=index, mask=mask, metric="euclidean")
    assert_type(chosen, KCenter)
    assert_type(chosen.indices, Tensor)
    indices, radii = pruneops.kcenter_varlen(x, index, [1, 2])
    assert_type((indices, radii), tuple[Tensor, Tensor])
    assert_type(pruneops.assign_ranks(x, 3), Tensor)
    assert_type(pruneops.pivot_cosine(x, index, mask=mask), Tensor)
    assert_type(pruneops.duplication(x, index, reduce="mean"), Tensor)
    assert_type(pruneops.pivot_cosine_varlen(x, index, index), Tensor)
    assert_type(pruneops.duplication_varlen(x, index, index, mask=None), Tensor)
    assert_type(pruneops.exclusive_bottomk(x, (2, 1), taken=mask), Tensor)
    assert_type(pruneops.pivot_bottomk(x, index, [2, 1]), Tensor)
    attention = pruneops.attention_mass(query, key, index, index, 3, causal=False, scale=0.1)
    assert_type(attention, AttentionMass)
    assert_type(attention.lse, Tensor)
    assert_type(pruneops.cross_modal_ratio(attention.mass, text=2, vision=1), tuple[Tensor, Tensor])
    assert_type(pruneops.group_distribution(attention.mass, query=2), Tensor)
    assert_type(pruneops.attention_received(query, key, query_mask=mask), Tensor)
    assert_type(pruneops.kv_compact([key, query], index, lengths=None), list[Tensor])
    assert_type(pruneops.kv_compact_((key,), index), None)
    assert_type(pruneops.paged_kv_compact_([key], index, index, index, layout="HND"), None)
    assert_type(pruneops.pages_in_use(index, 16), Tensor)
    assert_type(pruneops.gather_tokens([x, mask], index, dim=[1, -1]), list[Tensor])


def wrong_arguments(x: Tensor) -> None:
    """Every line is an error: an unused suppression fails the check."""
    pruneops.kcenter(x, "8")  # pyrefly: ignore[bad-argument-type]
    pruneops.kcenter(x, 8, metric="manhattan")  # pyrefly: ignore[bad-argument-type]
    pruneops.duplication(x, x, reduce="min")  # pyrefly: ignore[bad-argument-type]
    pruneops.paged_kv_compact_([x], x, x, x, layout="BSHD")  # pyrefly: ignore[bad-argument-type]
    pruneops.backend("gpu")  # pyrefly: ignore[bad-argument-type]
    pruneops.methods.ToDRE()  # pyrefly: ignore[missing-argument]
    pruneops.methods.DART(keep=0.5, compat="code")  # pyrefly: ignore[bad-argument-type]
    pruneops.no_such_operator(x)  # pyrefly: ignore[missing-attribute]


def backends(x: Tensor) -> None:
    with pruneops.backend("reference"):
        pruneops.kcenter(x, 1)
    try:
        pruneops.kcenter(x, 1)
    except pruneops.BackendUnavailable as error:
        assert_type(error, pruneops.BackendUnavailable)


def selection(features: Tensor, scores: Tensor) -> None:
    method = methods.ToDRE(keep=0.1, pivot="norm", depths=(0.5,))
    assert_type(method.tau, float)
    assert_type(method.budget(576), int)
    assert_type(method.layers(32), tuple[int, ...])
    assert_type(method.needs, frozenset[str])
    image = methods.Image(features, scores, frames=2)
    assert_type(image.cls_attention, Tensor | None)
    assert_type(method.select(image), Tensor)
    assert_type(method.select_each([image]), list[Tensor])
    assert_type(method.at_layer(16, methods.Row(features), 32), Tensor | None)
    assert_type(method.to_json(), str)
    assert_type(methods.ToDRE.from_json("{}"), methods.ToDRE)
    assert_type(methods.from_json("{}"), methods.Method)
    assert_type(pruneops.methods.VTW().layer, int | float)
    assert_type(methods.todre_ratios(features, features, scores), tuple[Tensor, Tensor])
    assert_type(methods.dart_select(features, scores, 3, compat="official"), Tensor)
    assert_type(methods.uniform_select(9, 3, device="cpu"), Tensor)


def models(model: nn.Module, inputs: dict[str, Any], method: methods.Method) -> None:
    with pruneops.patch(model, method) as handle:
        assert_type(handle, Handle)
        assert_type(handle.override(keep=0.5), AbstractContextManager[Handle])
        with handle.disabled() as same:
            assert_type(same, Handle)
        assert_type(handle.stats, deque[Stats])
        assert_type(handle.stats[-1].totals, list[int])
        assert_type(handle.current_method(), methods.Method | None)
    assert_type(handle.remove(), None)
    try:
        assert_type(pruneops.prepare(model, inputs, method), dict[str, Any])
    except pruneops.UnsupportedError as error:
        print(error)
    assert_type(PrunedLayer().valid, Tensor | None)


def shown(device: torch.device, path: Path) -> None:
    from pruneops.demo.run import report, run

    assert_type(report(run(path, keep=0.1, device="cpu")), str)
