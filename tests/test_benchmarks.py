"""The benchmark harness, on cases too small to mean anything: timings are never asserted."""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pruneops

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    common,
    compile_ahead,
    gpu,
    guard,
    harness,
    machine,
    native_spaces,
    registry,
    report,
    spaces,
    stages,
    summary,
    tune,
)
from benchmarks.ops import kv_compact  # noqa: E402
from pruneops import backends  # noqa: E402
from tests import tally  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPERATORS = {name: registry.operator(name) for name in registry.names()}
KCENTER = OPERATORS["kcenter"]
LOOP = KCENTER.baselines["loop"]
TINY = KCENTER.select("tiny", CPU)[0]
RATES = machine.PeakRates(read=1e10, copy=1e10, matmul={torch.float32: 1e11, torch.bfloat16: 1e11})
SLOW = machine.PeakRates(read=1e3, copy=1e3, matmul={torch.float32: 1e11})
ON_CPU = ["ops", "kcenter", "--device", "cpu", "--cases", "tiny"]
CHEAP = [*ON_CPU, "--backends", "reference"]


@pytest.fixture(autouse=True)
def known_peak_rates(monkeypatch):
    """Skip the half second that measuring the rates takes."""
    monkeypatch.setattr(machine, "peak_rates", lambda device, dtypes: RATES)


def small(operator, name, **sizes):
    """A case of an operator by name, with other sizes."""
    case = operator.select(name, CPU)[0]
    return dataclasses.replace(case, sizes=case.sizes | sizes)


def baseline(prepare, **options):
    return registry.Baseline(prepare, lambda case, rates: 0, **options)


def with_baselines(**baselines):
    return dataclasses.replace(KCENTER, baselines=baselines)


def run_tiny(operator, seconds, backends=(), rates=RATES):
    """Entries of one case by name."""
    found = harness.implementations(operator, TINY, CPU, backends, list(operator.baselines), rates)
    result = harness.run_case(operator, TINY, CPU, found, rates, seconds)
    return {entry["name"]: entry for entry in result["implementations"]}


def run_reference(operator, arguments):
    with pruneops.backend("reference"):
        return operator.call(arguments)


def test_table_and_json_hold_everything(tmp_path, capsys):
    out = tmp_path / "run.json"
    assert command.main([*CHEAP, "--baselines", "loop,loop_item,n_by_n", "--seconds", "5", "--out", str(out)]) == 0
    table = capsys.readouterr().out
    shown = (
        TINY.shape,
        "reference",
        "loop_item",
        "n_by_n",
        "% of roofline",
        "vs loop",
        "10/10",
        "peak rates of this run",
    )
    for text in (*shown, "faster", "slower"):
        assert text in table
    document = json.loads(out.read_text())
    assert document["complete"] and document["operator"] == "kcenter" and document["baselines"]
    assert {"python", "torch", "triton", "pruneops"} == set(document["versions"])
    assert {"device", "machine", "commit", "dirty", "date", "command", "peak_rates", "unavailable"} <= set(document)
    (case,) = document["cases"]
    assert case["bytes"] == 96 * 64 * 4 + 10 * 12
    assert case["operations"] == 2 * 96 * 64 * 10
    assert case["roofline_s"] == pytest.approx(case["bytes"] / 1e10)
    for entry in case["implementations"]:
        assert entry["status"] == "ok" and len(entry["times_s"]) >= harness.MIN_TURNS
        assert entry["p20_s"] <= entry["median_s"] <= entry["p80_s"]
        assert ("host_s" in entry) == (entry["median_s"] < harness.SHORT)
        assert entry["check"]["agree_with_reference"] == entry["check"]["choices"] == 10
        assert set(entry["ratios"]) == {"loop", "loop_item", "n_by_n"} - {entry["name"]}


def test_host_time_is_that_of_one_call(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call():
        calls.append(pruneops.backends._forced.get())
        now[0] += 0.25

    assert harness.host_seconds("reference", call, CPU, blocks=3, calls=5) == 0.25
    assert calls == ["reference"] * 15


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps memory")
def test_freed_memory_stays():
    script = """
        import torch
        from benchmarks import machine
        machine.keep_freed_memory()
        def pages():
            return int(open("/proc/self/statm").read().split()[1])
        before = pages()
        torch.ones(1 << 24)  # 64 MiB
        print(pages() - before > 15000, machine.facts(torch.device("cpu"))["machine"]["freed_memory"])
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True", "kept"], done.stderr


def test_roofline_is_reads_and_copies_or_operations():
    rates = machine.PeakRates(read=2e10, copy=1e10, matmul={torch.float32: 1e11})
    assert rates.roofline(registry.Cost(30, 10, 0), torch.float32) == pytest.approx(20 / 2e10 + 20 / 1e10)
    assert rates.roofline(registry.Cost(30, 10, 1000), torch.float32) == pytest.approx(1000 / 1e11)


@pytest.mark.parametrize("name", OPERATORS)
def test_tiny_cases_of_every_operator(name, tmp_path, capsys):
    out, operator = tmp_path / "run.json", OPERATORS[name]
    baselines = [own for own in operator.baselines if own != "compiled"]
    options = ["--backends", "reference", "--baselines", ",".join(baselines), "--seconds", "10", "--out", str(out)]
    assert command.main(["ops", name, "--device", "cpu", "--cases", "tiny", *options]) == 0
    table = capsys.readouterr().out
    assert "graph not run" in table and "WRONG" not in table
    cases = json.loads(out.read_text())["cases"]
    assert [case["name"] for case in cases] == list(operator.sets["cpu"]["tiny"])
    able = [own for own in baselines if operator.baselines[own].why_not(CPU) is None]
    for case in cases:
        assert case["shape"] in table and case["bytes"] > 0 and case["operations"] >= 0
        assert {entry["name"] for entry in case["implementations"]} <= {"reference", *able}
        assert all(entry["status"] == "ok" and entry["of_roofline"] > 0 for entry in case["implementations"])


@pytest.mark.parametrize("name", OPERATORS)
def test_sets_name_cases_once(name):
    for device, sets in OPERATORS[name].sets.items():
        for chosen in sets:
            cases = OPERATORS[name].select(chosen, torch.device(device))
            assert {case.name for case in cases} == set(sets[chosen]) and len(cases) == len(sets[chosen])


def test_wrong_backend_gets_no_ratio(monkeypatch, capsys):
    def call(arguments):
        return KCENTER.call(arguments)._replace(radii=torch.zeros(1, 10))

    monkeypatch.setattr(registry, "operator", lambda name: dataclasses.replace(KCENTER, call=call))
    assert command.main([*CHEAP, "--baselines", "loop", "--seconds", "1"]) == 1
    streams = capsys.readouterr()
    assert "WRONG" in streams.out and "faster" not in streams.out and "slower" not in streams.out
    assert "backend reference: WRONG" in streams.err


@pytest.mark.parametrize(
    "name, case, spoil, message",
    [
        ("kcenter", 0, lambda r: (r[0].roll(1, -1), r[1]), "begin with the pivot"),
        ("kcenter", 0, lambda r: (r[0][:, :1].expand_as(r[0]), r[1]), "different tokens"),
        ("kcenter", 0, lambda r: (torch.cat([r[0][:, :1], r[0][:, 1:].flip(-1)], -1), r[1]), "off by"),
        ("kcenter", 0, lambda r: (r[0], r[1] + 1e-3), "off by 0.001"),
        ("kcenter", 0, lambda r: (r[0], r[1] * torch.nan), "off by inf"),
        ("pivot_cosine", 0, lambda r: r + 1e-3, "off by 0.001"),
        ("pivot_cosine", 0, lambda r: r[:, :-1], "of shape [1, 3, 96]"),
        ("pivot_cosine", 0, lambda r: r.index_fill(-1, torch.tensor([5]), torch.nan), "off by inf"),
        ("pivot_cosine", 1, lambda r: r.roll(1, -1), "off by"),
        ("exclusive_bottomk", 0, lambda r: r[:, :-1], "of shape [1, 9]"),
        ("exclusive_bottomk", 0, lambda r: r.roll(1, -1), "off by"),
        ("exclusive_bottomk", 0, lambda r: r.index_fill(-1, torch.tensor([9]), -1), "not tokens that are free"),
        ("exclusive_bottomk", 1, lambda r: torch.cat([r[:, :-1], r[:, :1]], -1), "not all different"),
        ("assign_ranks", 0, lambda r: r.roll(1, -1), "off by"),
        ("assign_ranks", 0, lambda r: r[:, :1].expand_as(r), "not all different"),
        ("attention_mass", 0, lambda r: (r[0] * 1.01, r[1]), "off by 0.01"),
        ("attention_mass", 1, lambda r: (r[0], r[1] + 1e-3), "off by 0.001"),
        ("attention_received", 0, lambda r: r + 1e-3, "off by"),
        ("attention_received", 1, lambda r: r.roll(1, -1), "off by"),
        ("kv_compact", 0, lambda r: [t[:, :, :-1] for t in r], "4 of shape [[2, 2, 9, 16]]"),
        ("kv_compact", 0, lambda r: r[:-1], "3 of shape"),
        ("kv_compact", 0, lambda r: [r[1], r[0], *r[2:]], "other bits in 2 tensors"),
        ("kv_compact", 0, lambda r: [-r[0], *r[1:]], "other bits in 1 tensors"),
        ("kv_compact", 1, lambda r: [r[0].roll(1, 2), *r[1:]], "other bits"),
        ("paged_kv_compact", 0, lambda r: [r[0].roll(1, 0), *r[1:]], "other bits"),
        ("gather_tokens", 1, lambda r: [r[0], r[1].flip(0), ~r[2], *r[3:]], "other bits in tensors [1, 2]"),
        ("gather_tokens", 0, lambda r: [r[0][..., :-1], *r[1:]], "of shapes [[1, 10, 63]"),
    ],
)
def test_check_finds_what_is_wrong(name, case, spoil, message):
    operator = OPERATORS[name]
    case = operator.cases[case]
    arguments = operator.arguments(case, CPU)
    result = run_reference(operator, arguments)
    assert operator.check(case, arguments, result, result, torch.float32).right
    checked = operator.check(case, arguments, spoil(result), result, torch.float32)
    assert not checked.right and message in checked.message


def test_check_of_selection_finds_a_token_that_is_taken():
    operator = OPERATORS["exclusive_bottomk"]
    case = operator.cases[0]
    arguments = operator.arguments(case, CPU)
    result = run_reference(operator, arguments | {"taken": None})
    arguments["taken"] = torch.zeros_like(arguments["taken"]).index_fill(1, result[0, 3:4], True)
    assert "free" in operator.check(case, arguments, result, None, torch.float32).message


@pytest.mark.parametrize("name", ["kv_compact", "paged_kv_compact"])
def test_check_in_place_counts_calls(name):
    """A replayed graph has one more; what failed changes nothing for those after it."""
    operator = OPERATORS[name]
    case = next(case for case in operator.cases if case.sizes.get("in_place", True))
    arguments = operator.arguments(case, CPU)
    contents = arguments["contents"]
    for done, counted, right in ((1, 1, True), (3, 3, True), (3, 2, True), (1, 2, False), (0, 1, False)):
        for _ in range(done):
            run_reference(operator, arguments)
        contents.times = counted
        checked = operator.check(case, arguments, contents.tensors, None, torch.float32)
        assert checked.right == right, (done, counted)
    for label, each in operator.baselines.items():
        if label != "compiled" and each.why_not(CPU) is None:
            contents.tensors[0].zero_()
            result = each.prepare(case, arguments)()
            assert operator.verify(case, arguments, result, None, torch.float32).right


@pytest.mark.parametrize(
    "name, case, sizes",
    [
        ("kcenter", "b8-n576-d1024-bfloat16", {"N": 60, "D": 24, "k": 7}),
        ("kcenter", "varlen-d1024-float32", {"lengths": [50, 30], "D": 24, "ks": [9, 4]}),
        ("kcenter", "euclidean-b1-n2880-d1024-float32", {"B": 3, "N": 60, "D": 24, "k": 7}),
        ("kcenter", "euclidean-b1-n2880-d1024-bfloat16", {"N": 60, "D": 24, "k": 7}),
        ("pivot_cosine", "b8-n576-d1024-p8-bfloat16", {"N": 50, "D": 24}),
        ("pivot_cosine", "duplication-b1-n2880-d4096-p8-bfloat16", {"N": 50, "D": 24}),
        ("pivot_cosine", "varlen-d1024-p8-bfloat16", {"lengths": [30, 20], "D": 24}),
        ("exclusive_bottomk", "b8-n576-d1024-p8-bfloat16", {"N": 90, "D": 24}),
        ("exclusive_bottomk", "scores-b8-n576-p8", {"N": 90}),
        ("assign_ranks", "b8-n576-j32-bfloat16", {"N": 50}),
        ("kv_compact", "c64-b1-h32-s3072-bfloat16", {"caches": 3, "Hk": 3, "S": 50, "K": 7}),
        ("kv_compact", "c16-b8-h4-s3072-bfloat16", {"caches": 3, "S": 50, "K": 7}),
        ("kv_compact", "heads-c16-b1-h32-s3072-float32", {"caches": 3, "S": 50, "K": 7}),
        ("kv_compact", "in-place-c16-b1-h32-s3072-bfloat16", {"caches": 3, "S": 50, "K": 45}),
        ("kv_compact", "in-place-c16-b8-h4-s3072-bfloat16", {"caches": 3, "S": 50, "K": 45}),
        ("kv_compact", "in-place-heads-c16-b1-h32-s3072-bfloat16", {"caches": 3, "Hk": 2, "S": 50, "K": 45}),
        ("paged_kv_compact", "t8-b8-s3072-k2765-bfloat16", {"tensors": 3, "S": 50, "K": 45}),
        ("gather_tokens", "b1-s2880-d4096-bfloat16", {"S": 50, "K": 5}),
        ("gather_tokens", "b8-s2880-d4096-bfloat16", {"S": 50, "K": 5}),
    ],
)
def test_every_variant_and_baseline_is_right_in_its_precision(name, case, sizes, monkeypatch):
    """Compiled baselines too, as one graph, by the compiler that only traces."""
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    operator = OPERATORS[name]
    case = small(operator, case, **sizes)
    arguments = operator.arguments(case, CPU)
    with pruneops.backend("reference"):
        for call in (operator.call, *operator.variants(case).values()):
            checked = operator.check(case, arguments, call(arguments), operator.call(arguments), torch.float32)
            assert checked.right, checked.message
    for label, each in operator.baselines.items():
        if each.why_not(CPU) is None and each.applies(case):
            checked = operator.verify(case, arguments, each.prepare(case, arguments)(), None, case.dtype)
            assert checked.right, (label, checked.message)


EUCLIDEAN = KCENTER.select("euclidean-b1-n96-d64-float32", CPU)[0]


@pytest.mark.parametrize("spoil, message", [
    (lambda r: (r[0], r[1] * 1.01), "off by"),
    (lambda r: (torch.cat([r[0][:, :1], r[0][:, 1:].flip(-1)], -1), r[1]), "off by"),
    (lambda r: (r[0].roll(1, -1), r[1]), "begin with the pivot"),
])  # fmt: skip
def test_check_of_distances_finds_what_is_wrong(spoil, message):
    arguments = KCENTER.arguments(EUCLIDEAN, CPU)
    result = run_reference(KCENTER, arguments)
    assert KCENTER.check(EUCLIDEAN, arguments, result, result, torch.float32).right
    checked = KCENTER.check(EUCLIDEAN, arguments, spoil(result), result, torch.float32)
    assert not checked.right and message in checked.message


def test_an_optional_package_that_is_absent_is_named(monkeypatch, capsys):
    """Of a baseline that does not apply nothing is said."""
    for spec in (None, "there"):
        monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name, spec=spec: spec)
        options = ["--baselines", "quickfps,loop", "--seconds", "1", "--cases", "tiny"]
        assert command.main([*CHEAP, *options]) == 0
        table = capsys.readouterr().out
        assert ("quickfps not run: torch_quickfps is not installed" in table) == (spec is None)
        assert "vs quickfps" not in table
    found = harness.implementations(KCENTER, EUCLIDEAN, CPU, [], ["quickfps", "n_by_n", "graph"], RATES)
    assert [each.name for each in found] == ["quickfps"]


@pytest.mark.skipif(importlib.util.find_spec("torch_quickfps") is None, reason="torch_quickfps is not installed")
@pytest.mark.parametrize("name", ["quickfps", "quickfps plain"])
def test_quickfps_answers_alike(name):
    arguments = KCENTER.arguments(EUCLIDEAN, CPU)
    result = KCENTER.baselines[name].prepare(EUCLIDEAN, arguments)()
    assert torch.equal(result, run_reference(KCENTER, arguments).indices[0])


@pytest.mark.parametrize("case", ["prefill-s130-h4-float32", "text-s130-h4-float32"])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_flex_attention_gives_mass_and_lse(case, auxiliary, monkeypatch):
    """Uncompiled, as on a CPU; where PyTorch has no auxiliary outputs too."""
    operator, module = OPERATORS["attention_mass"], sys.modules["benchmarks.ops.attention_mass"]
    case = operator.select(case, CPU)[0]
    monkeypatch.setattr(module, "compiled", lambda function, **options: function)
    if not auxiliary:
        monkeypatch.setattr(module.baselines, "AuxRequest", None)
    arguments = operator.arguments(case, CPU)
    result = operator.baselines["flex"].prepare(case, arguments)()
    assert isinstance(result, tuple) == (not case.sizes["lse"])
    checked = operator.check(case, arguments, result, None, torch.float32)
    assert checked.right, checked.message


def test_order_of_implementations():
    """Variants beside their backend, baselines that compile last."""

    def names(operator, case, *backends):
        found = harness.implementations(operator, case, CPU, backends, list(operator.baselines), RATES)
        return [implementation.name for implementation in found]

    baselines = {"a": baseline(None, compiles=True), "b": baseline(None)}
    operator = dataclasses.replace(OPERATORS["exclusive_bottomk"], baselines=baselines)
    scores, features = operator.select("tiny", CPU)
    assert names(operator, features, "reference", "cpu") == ["reference", "cpu", "cpu two calls", "b", "a"]
    assert names(operator, scores, "cpu") == ["cpu", "b", "a"]


def test_what_does_not_fit_the_time_is_skipped(capsys):
    entries = run_tiny(with_baselines(loop=LOOP, n_by_n=KCENTER.baselines["n_by_n"]), 1, rates=SLOW)
    assert [entry["status"] for entry in entries.values()] == ["skipped", "skipped"]
    assert "would take" in entries["loop"]["reason"]
    assert command.main([*CHEAP, "--baselines", "loop", "--seconds", "0"]) == 0
    assert capsys.readouterr().out.count(f"skipped: {harness.OUT_OF_TIME}") == 2


def fails_when_prepared(case, arguments):
    raise OSError("no compiler\nand more")


def fails_in_a_turn(case, arguments):
    call, calls = LOOP.prepare(case, arguments), []

    def counted():
        calls.append(None)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return call()

    return counted


@pytest.mark.parametrize("prepare, reason", [
    (fails_when_prepared, "OSError: no compiler"),
    (fails_in_a_turn, "OutOfMemoryError: out of memory"),
])  # fmt: skip
def test_a_failing_baseline_costs_only_itself(prepare, reason):
    entries = run_tiny(with_baselines(fails=baseline(prepare), loop=LOOP), 1)
    assert (entries["fails"]["status"], entries["fails"]["reason"]) == ("failed", reason)
    assert entries["loop"]["status"] == "ok" and "fails" not in entries["loop"]["ratios"]


def test_a_baseline_that_prepares_too_long_costs_only_later_baselines():
    def slow(case, arguments):
        time.sleep(0.3)
        return LOOP.prepare(case, arguments)

    entries = run_tiny(with_baselines(slow=baseline(slow), late=LOOP), 0.3, backends=["reference"])
    assert [entry["status"] for entry in entries.values()] == ["ok", "ok", "skipped"]
    assert entries["late"]["reason"] == harness.OUT_OF_TIME


def test_turns_alternate():
    order = []
    backends = dict(zip("abc", ["cpu", "auto", "cuda"]))
    calls = {n: (b, lambda n=n: order.append((n, pruneops.backends._forced.get()))) for n, b in backends.items()}
    times = harness.take_turns(calls, machine.Clock(CPU), 0)
    assert order == list(backends.items()) * harness.MIN_TURNS
    assert all(len(t) == harness.MIN_TURNS for t in times.values())


def test_slow_implementations_leave_turns_to_the_others(monkeypatch):
    """No more than their share of the seconds; the reference one turn, all others the fewest at least."""
    now = [0.0]
    monkeypatch.setattr(harness, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def clock(seconds):
        now[0] += seconds
        return seconds

    calls = {"reference": ("reference", 3.0), "slow": ("auto", 0.5), "slower": ("auto", 2.0), "quick": ("cuda", 0.01)}

    def turns(seconds):
        return [len(own) for own in harness.take_turns(calls, clock, seconds).values()]

    *slow, quick = turns(12)
    assert slow == [1, 5, harness.MIN_TURNS] and quick > 40
    assert turns(101) == [8, 50, 12, harness.MAX_TURNS]
    assert harness.summary([2.0], 1.0)["p20_s"] == 2.0


@pytest.mark.parametrize(
    "module, arguments, message",
    [
        (command, ["ops", "nonesuch"], "no operator 'nonesuch'"),
        (command, ["ops", "kcenter", "--cases", "nonesuch"], "no case 'nonesuch'"),
        (command, ["ops", "kcenter", "--baselines", "nonesuch"], "no baseline 'nonesuch'"),
        (command, ["ops", "kcenter", "--backends", "nonesuch"], "no backend 'nonesuch'"),
        (command, ["ops", "kcenter", "--out", "/nonesuch/x.json"], "no file can be written"),
        (command, ["ops", "kcenter", "--seconds", "soon"], "invalid float"),
        (command, [], "required"),
        (gpu, ["--stages", "build,nonesuch"], "benchmarks.gpu: no stage 'nonesuch'"),
        (gpu, ["--operators", "nonesuch"], "benchmarks.gpu: no operator 'nonesuch'"),
        (tune, ["--spaces", "nonesuch"], "benchmarks.tune: no space 'nonesuch'"),
        *(
            pytest.param(module, [], "PyTorch sees no GPU here; nothing was run", marks=pytest.mark.skipif(
                torch.cuda.is_available(), reason="says what happens without a GPU"
            ))
            for module in (gpu, tune)
        ),
    ],
)  # fmt: skip
def test_bad_requests_get_one_line_and_status_2(module, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        module.main(arguments)
    streams = capsys.readouterr()
    assert exit.value.code == 2 and streams.out == ""
    assert message in streams.err and streams.err.count("\n") == 1


def test_interruption_keeps_finished_cases(monkeypatch, tmp_path, capsys):
    out, run_case, done = tmp_path / "run.json", harness.run_case, []

    def interrupted(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(run_case(*arguments))
        return done[0]

    monkeypatch.setattr(harness, "run_case", interrupted)
    cases = [*CHEAP, "--cases", "tiny,b1-n576-d1024-float32"]
    assert command.main([*cases, "--baselines", "none", "--seconds", "4", "--out", str(out)]) == 130
    document = json.loads(out.read_text())
    assert len(document["cases"]) == 1 and not document["complete"]
    assert "INCOMPLETE" in capsys.readouterr().out


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    report.write(path, {"old": True})
    with pytest.raises(TypeError):
        report.write(path, {"new": object()})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(path, {"new": True})
    assert json.loads(path.read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def tensors_of(value, seen):
    """Tensors that a function closes over, however deep."""
    if id(value) in seen:
        return []
    seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        return [value]
    inner = []
    if isinstance(value, (list, tuple)):
        inner = list(value)
    elif isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, functools.partial):
        inner = [value.func, value.args, value.keywords]
    elif callable(value) and hasattr(value, "__closure__"):
        inner = [cell.cell_contents for cell in value.__closure__ or ()] + [value.__defaults__, value.__kwdefaults__]
    elif type(value).__module__.startswith("benchmarks."):
        inner = list(vars(value).values())
    return [tensor for own in inner for tensor in tensors_of(own, seen)]


@pytest.fixture
def no_graphs(monkeypatch):
    """CUDA graphs that record nothing: what they capture runs at once."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def test_replay_holds_its_call(no_graphs):
    tensor = torch.ones(3)
    held = weakref.ref(tensor)
    replay = harness.capture(lambda tensor=tensor: tensor + 1)
    del tensor
    gc.collect()
    assert held() is not None and torch.equal(replay(), torch.full((3,), 2.0))


@pytest.mark.parametrize("name", OPERATORS)
def test_captured_baselines_hold_all_that_they_close_over(name, no_graphs, monkeypatch):
    """A graph holds addresses: tensors made for a baseline must live as long as what replays it."""
    held = []

    def capture(call, tensor=None):
        held.extend(weakref.ref(tensor) for tensor in tensors_of(call, {}))
        return harness.capture(call)

    monkeypatch.setattr(common, "capture", capture)
    for module in (kv_compact, sys.modules[f"benchmarks.ops.{name}"]):  # as if tensors were on a GPU
        if hasattr(module, "graph_on_cuda"):
            monkeypatch.setattr(module, "graph_on_cuda", capture)
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    cases = OPERATORS[name].select("tiny", CPU)
    if name == "kcenter":
        cases.append(small(KCENTER, "varlen-d1024-float32", D=24, lengths=[50, 30], ks=[9, 4]))
    captured = 0
    for case in cases:
        for label, each in OPERATORS[name].baselines.items():
            if label == "flex" or each.package or not each.applies(case):  # is not captured, may not be here
                continue
            replay = each.prepare(case, OPERATORS[name].arguments(case, CPU))
            if held:
                gc.collect()
                assert all(reference() is not None for reference in held), (case.name, label)
                captured += 1
                held.clear()
            del replay
    assert captured >= len(cases)


@pytest.mark.parametrize("breaks_at", [1, 4])  # when it is prepared, when implementations take turns
def test_a_lost_context_is_the_fault_of_whom_it_befell(breaks_at, monkeypatch):
    lost, calls, progress = [], [], []

    def synchronize(device=None):
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(harness, "Clock", lambda device: machine.Clock(CPU))

    def prepare(case, arguments):
        call = LOOP.prepare(case, arguments)

        def counted():
            calls.append(None)
            if len(calls) >= breaks_at:
                lost.append(None)
                raise RuntimeError("CUDA error: unspecified launch failure")
            return call()

        return counted

    operator = with_baselines(fine=LOOP, breaks=baseline(prepare), late=LOOP)
    operator = dataclasses.replace(operator, arguments=lambda case, device: KCENTER.arguments(case, CPU))
    found = harness.implementations(operator, TINY, CPU, [], list(operator.baselines), RATES)
    with pytest.raises(harness.ContextLost, match=r"illegal memory access was encountered$"):
        harness.run_case(operator, TINY, CUDA, found, RATES, 2, progress=lambda *at: progress.append(at))
    assert progress[-1] == (TINY.name, "breaks")


def test_an_operator_without_a_kernel_is_unsupported(monkeypatch, capsys):
    reason = "attention_mass has no such kernel; it has reference, triton"

    def absent(arguments):
        raise backends.BackendUnavailable(f"backend 'cpu' cannot run here: {reason}")

    monkeypatch.setattr(registry, "operator", lambda name: dataclasses.replace(KCENTER, call=absent))
    monkeypatch.setattr(backends, "why_not", lambda name, kind: None if name == "cpu" else "not today")
    monkeypatch.setattr(machine, "peak_rates", lambda device, dtypes: SLOW)  # no reference to compare with
    assert command.main([*ON_CPU, "--backends", "cpu", "--baselines", "none", "--seconds", "1"]) == 0
    streams = capsys.readouterr()
    assert f"unsupported: {reason}" in streams.out and "failed" not in streams.out


def test_backends_of_all_cases_come_first_and_what_compiles_last(monkeypatch, tmp_path, capsys):
    """What is slow to prepare takes no time from the others; time passes there only."""
    now, progress = [0.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    for module in (command, harness):
        monkeypatch.setattr(module, "time", clock)

    def slow(case, arguments):
        now[0] += 3
        return LOOP.prepare(case, arguments)

    cases = tuple(dataclasses.replace(TINY, name=f"case-{i}") for i in range(3))
    sets = {"cpu": {"tiny": tuple(case.name for case in cases)}}
    operator = with_baselines(compiles=baseline(slow, compiles=True), quick=LOOP)
    operator = dataclasses.replace(operator, cases=cases, sets=sets)
    monkeypatch.setattr(registry, "operator", lambda name: operator)
    monkeypatch.setattr(guard.Worker, "progress", lambda self, *at: progress.append(at))
    out = tmp_path / "run.json"
    options = ["--baselines", "all", "--seconds", "4", "--backends-first", "--out", str(out)]
    assert command.main([*CHEAP, *options]) == 0
    document = json.loads(out.read_text())
    assert document["complete"] and [case["phase"] for case in document["cases"]] == [2, 2, 2]
    found = [{entry["name"]: entry for entry in case["implementations"]} for case in document["cases"]]
    for case in found:
        assert case["reference"]["status"] == case["quick"]["status"] == "ok"
        assert case["reference"]["check"]["agree_with_reference"] == 10
        assert "quick" in case["reference"]["ratios"]
    assert [case["compiles"]["status"] for case in found] == ["ok", "skipped", "skipped"]
    assert found[0]["compiles"]["prepare_s"] == 3 and "takes 3 s to prepare" in found[1]["compiles"]["reason"]
    firsts = [progress.index((case.name, name)) for name in ("reference", "quick") for case in cases]
    assert firsts == sorted(firsts) and firsts[-1] < progress.index(("case-0", "compiles"))


@pytest.mark.parametrize("median, graph, host, recorded", [
    (5e-3, False, 3e-4, True),  # works for long, returns early
    (5e-3, True, 3e-4, False),
    (5e-3, False, 2e-3, False),
    (5e-4, True, 1e-5, True),
])  # fmt: skip
def test_host_time_of_backends_on_cuda(median, graph, host, recorded, monkeypatch):
    seen = []

    def host_seconds(backend, call, device, blocks, calls):
        seen.append(blocks * calls * median)
        return host

    monkeypatch.setattr(harness, "host_seconds", host_seconds)
    backend = harness.Implementation("cuda", "backend", None, 0, torch.float32, "cuda", graph=graph)
    entry = {"median_s": median}
    harness._time_host(backend, ("cuda", None), CUDA, entry, None)
    assert ("host_s" in entry) == recorded and sum(seen) < 0.5


# A worker with implementations that end it in every way; it imports nothing that is slow.
DYING = """
import argparse, json, os, signal, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("out", "in-flight", "skip"):
    parser.add_argument(f"--{name}", type=Path)
for name in ("resume", "wait"):
    parser.add_argument(f"--{name}", action="store_true")
options = parser.parse_args()
assert float(sys.stdin.readline()) > 0
skip = json.loads(options.skip.read_text())
known = json.loads(options.out.read_text())["cases"] if options.out.exists() else []
for case in ("first", "second", "third"):
    for name in ("good", "exits", "killed", "aborts", "hangs"):
        if any(entry[:2] == [case, name] for entry in known):
            continue
        how = [own[2:] for own in skip if own[0] in (case, None) and own[1] == name]
        if not how:
            options.in_flight.write_text(json.dumps([case, name]))
            print(f"  {case} {name}: 0.0 s", file=sys.stderr, flush=True)
            if name == "exits":
                print("boom", file=sys.stderr, flush=True)
                os._exit(7)
            if name == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "aborts":
                os.abort()
            if name == "hangs":
                time.sleep(60)
            options.in_flight.write_text("null")
        known.append([case, name, *(how[0] if how else ["ok", ""])])
        options.out.with_suffix(".new").write_text(json.dumps({"cases": known}))
        options.out.with_suffix(".new").rename(options.out)
"""


def test_a_process_that_dies_or_hangs_costs_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guard, "MIN_HANG_SECONDS", 1)
    monkeypatch.setattr(guard, "HANG_SHARE", 0)
    script, seen = tmp_path / "dying.py", []
    script.write_text(DYING)
    supervisor = guard.Supervisor([sys.executable, script], tmp_path, seen.append)
    supervisor.start()
    assert supervisor.run(90)[:2] == ("ended", 0)
    assert {(case, name): how for case, name, how, _ in supervisor.crashes} == {
        (case, name): "hung" if name == "hangs" else "crashed"
        for case in ("first", "second")
        for name in ("exits", "killed", "aborts", "hangs")
    }
    messages = {name: message for _, name, _, message in supervisor.crashes}
    assert messages["exits"] == "exit status 7: boom" and messages["killed"] == "SIGKILL"
    assert messages["aborts"] == "SIGABRT: Fatal Python error: Aborted"
    assert messages["hangs"].startswith("no end after")
    assert len(seen[-1]["cases"]) == 15 and len(seen) >= 3
    ends = {(case, name): rest for case, name, *rest in seen[-1]["cases"]}
    assert all(ends[case, "good"][0] == "ok" for case in ("first", "second", "third"))
    assert ends["third", "killed"] == ["crashed", "in 2 other cases"]


@pytest.mark.parametrize("script, ended", [
    ("import time; time.sleep(60)", "out of time"),
    ("raise SystemExit('no such option')", "failed"),  # it died before any implementation
])  # fmt: skip
def test_workers_that_get_nowhere(script, ended, tmp_path):
    supervisor = guard.Supervisor([sys.executable, "-c", script], tmp_path, None)
    begin = time.monotonic()
    assert supervisor.run(2 if ended == "out of time" else 30)[0] == ended
    assert time.monotonic() - begin < 20 and not supervisor.crashes


def test_crashes_of_a_real_benchmark(tmp_path, monkeypatch, capsys):
    """One implementation dies as it is prepared, one as they take turns; the others are not affected."""
    script = tmp_path / "benchmark.py"
    script.write_text(
        textwrap.dedent("""
        import dataclasses, os, signal, sys
        import torch
        from benchmarks import __main__ as command, machine, registry

        kcenter = registry.operator("kcenter")
        loop = kcenter.baselines["loop"]

        def aborts(case, arguments):
            os.abort()

        def dies_in_a_turn(case, arguments):
            call, count = loop.prepare(case, arguments), []

            def counted():
                count.append(None)
                if len(count) == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call()

            return counted

        baselines = {name: dataclasses.replace(loop, prepare=own) for name, own in (
            ("aborts", aborts), ("loop", loop.prepare), ("dies", dies_in_a_turn), ("late", loop.prepare)
        )}
        registry.operator = lambda name: dataclasses.replace(kcenter, baselines=baselines)
        machine.peak_rates = lambda device, dtypes: machine.PeakRates(1e10, 1e10, {torch.float32: 1e11})
        sys.exit(command.main(sys.argv[1:]))
    """)
    )
    run = SimpleNamespace(document={"operators": {}}, cases="tiny", device=CPU)
    record = functools.partial(run.document["operators"].__setitem__, "kcenter")
    options = ["--baselines", "all", "--backends-first", "--rates", tmp_path / "rates"]
    supervisor = guard.Supervisor([sys.executable, script, *CHEAP, *options], tmp_path, record)
    with guard.stopped_at_the_end([supervisor]):
        assert stages.operator("kcenter", supervisor, run, 120, last_phase=0) == ("passed", "1 of 1 cases", {})
        (case,), worker = run.document["operators"]["kcenter"]["cases"], supervisor.process
        assert [entry["status"] for entry in case["implementations"]] == ["ok"] + ["skipped"] * 4 and not worker.wait(0)
        assert stages.operator("kcenter", supervisor, run, 120) == ("passed", "1 of 1 cases", {})
    assert supervisor.process is None and json.loads((tmp_path / "rates").read_text())
    (case,) = run.document["operators"]["kcenter"]["cases"]
    entries = {entry["name"]: entry for entry in case["implementations"]}
    assert entries["aborts"]["status"] == entries["dies"]["status"] == "crashed"
    assert entries["aborts"]["reason"] == "SIGABRT: Fatal Python error: Aborted"
    assert entries["dies"]["reason"] == "SIGKILL"
    assert all(entries[name]["status"] == "ok" for name in ("reference", "loop", "late"))
    assert {"loop", "late"} == set(entries["reference"]["ratios"])
    assert "crashed: SIGKILL" in report.text(run.document["operators"]["kcenter"])


def idle(*_):
    return "passed", "", {}


def rehearse(tmp_path, *options):
    """Exit status and record of a run without a GPU."""
    status = gpu.main(["--device", "cpu", "--results", str(tmp_path), *options])
    return status, json.loads(next(tmp_path.glob("*.json")).read_text())


def test_gpu_rehearsal(tmp_path, monkeypatch, capsys):
    """Every stage, the benchmark of one operator."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads of a parallel region wait for each other on a busy machine
    status, document = rehearse(tmp_path, "--operators", "attention_received", "--soak", "1")
    found = {stage["name"]: (stage["status"], stage["message"]) for stage in document["stages"]}
    assert status == 0 and document["complete"], found
    names = ["build", "compile ahead", "tests", "small shapes", "soak"]
    names += ["benchmark attention_received", "baselines attention_received"]
    assert all(found.pop(name)[0] == "passed" for name in names)
    assert set(found) == set(stages.TOOLS) and {status for status, _ in found.values()} == {"skipped"}
    (path,) = tmp_path.glob("*.md")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("record: ") and path.name in last and last in path.read_text()
    assert "## attention_received" in path.read_text()


def test_tune_rehearsal(tmp_path, monkeypatch, capsys):
    """The sweep of one kernel, in Triton's interpreter."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--spaces", "kcenter gram half", "--seconds", "60", "--results", str(tmp_path)]
    assert tune.main(["--device", "cpu", *options]) == 0
    (path,) = tmp_path.glob("tune-*.json")
    document = json.loads(path.read_text())
    assert document["complete"] and path.with_suffix(".md").exists()
    (known,) = document["spaces"].values()
    assert [entry["status"] for entry in known["candidates"]] == ["ok", "ok"] and len(known["final"]) == 2
    assert "1 of 1 spaces" in capsys.readouterr().out


def test_gpu_builds_for_its_gpu_alone(monkeypatch, capsys):
    asked = {}

    def launch(command, limit, **environment):
        asked.update(environment)
        return 0, ""

    monkeypatch.delenv("PRUNEOPS_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(stages, "launch", launch)
    monkeypatch.setattr(backends, "why_not", lambda name, kind: None)
    run = SimpleNamespace(device=CUDA, document={"machine": {}})
    assert stages.build(run, 60)[:2] == ("passed", "triton, cuda can run")
    assert asked == {"PRUNEOPS_CUDA_ARCHS": "90"}
    monkeypatch.setattr(backends, "why_not", lambda name, kind: "it does not load" if name == "cuda" else None)
    assert stages.build(run, 60)[:2] == ("failed", "cannot run: cuda")


def test_gpu_stages_that_fail_cost_only_themselves(tmp_path, monkeypatch, capsys):
    sleep = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    monkeypatch.setattr(stages, "build", lambda run, limit: guard.launch(sleep, min(limit, 1)))
    monkeypatch.setattr(stages, "tests", lambda run, limit: 1 / 0)
    monkeypatch.setattr(stages, "sanitize", lambda tool, run, limit: ("not found", "no tool", {}))
    status, document = rehearse(tmp_path, "--stages", "build,tests,sanitize")
    found = {stage["name"]: stage for stage in document["stages"]}
    statuses = [stage["status"] for stage in found.values()]
    assert status == 1 and statuses == ["out of time", "failed"] + ["not found"] * 5
    assert "begun" in found["build"]["output"] and "division" in found["tests"]["message"]


def test_gpu_record_is_written_after_every_step(tmp_path, monkeypatch, capsys):
    seen = []

    def look(*_):
        document = json.loads(next(tmp_path.glob("*.json")).read_text())
        assert next(tmp_path.glob("*.md")).exists() and not document["complete"]
        seen.append([stage["name"] for stage in document["stages"] if stage["status"] == "passed"])
        return "passed", "", {}

    def operator(name, supervisor, run, limit, last_phase):
        supervisor.record({"baselines": [], "cases": [{"name": "known"}] if len(seen) % 2 else []})
        return look()

    for name in ("build", "soak"):
        monkeypatch.setattr(stages, name, look if name == "soak" else idle)
    monkeypatch.setattr(stages, "compile_ahead", idle)
    monkeypatch.setattr(stages, "operator", operator)
    monkeypatch.setattr(report, "markdown", lambda document: "")
    monkeypatch.setattr(summary, "lines", lambda document, path: ["title"])
    monkeypatch.setattr(guard.Supervisor, "start", lambda self: None)
    status, document = rehearse(tmp_path, "--stages", "build,soak,operators", "--operators", "kcenter,kv_compact")
    assert status == 0 and document["complete"]
    assert "build" in seen[0] and "soak" in seen[1] and "benchmark kcenter" in seen[2]
    assert set(document["operators"]) == {"kcenter", "kv_compact"}


def test_gpu_interruption_leaves_a_whole_record(tmp_path, monkeypatch, capsys):
    started = []

    def long(*arguments):
        started.append(None)
        return guard.launch([sys.executable, "-c", "import time; time.sleep(60)"], 50)

    monkeypatch.setattr(stages, "build", idle)
    for name in ("tests", "sanitize", "soak"):
        monkeypatch.setattr(stages, name, long)

    def interrupt():
        while len(started) < 7 or len(guard.Process.running) < 7:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread, begin = threading.Thread(target=interrupt, daemon=True), time.monotonic()
    thread.start()
    try:
        status, document = rehearse(tmp_path, "--stages", "build,tests,sanitize,soak")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert status == 130 and not document["complete"] and time.monotonic() - begin < 40
    assert [stage["status"] for stage in document["stages"]] == ["passed"] + ["interrupted"] * 7
    assert not guard.Process.running and "INCOMPLETE" in capsys.readouterr().out


def test_gpu_operators_share_the_time_those_with_goals_first(tmp_path, monkeypatch, capsys):
    passes = {0: {}, command.LAST_PHASE: {}}

    def operator(name, supervisor, run, limit, last_phase):
        passes[last_phase][name] = limit
        assert last_phase == 0 or len(passes[0]) == len(OPERATORS)
        return "passed", "", {}

    monkeypatch.setattr(stages, "operator", operator)
    monkeypatch.setattr(stages, "compile_ahead", idle)
    monkeypatch.setattr(guard.Supervisor, "start", lambda self: None)
    assert rehearse(tmp_path, "--stages", "operators", "--seconds", "100")[0] == 0
    shares = {name: operator.gpu_time_share for name, operator in OPERATORS.items()}
    counts = {name: len(operator.sets["cpu"]["tiny"]) for name, operator in OPERATORS.items()}
    for limits, weights in zip(passes.values(), (counts, shares)):
        assert set(limits) == set(OPERATORS)
        assert list(limits)[:4] == ["kcenter", "attention_mass", "exclusive_bottomk", "kv_compact"]
        assert limits["kcenter"] == pytest.approx(99 * weights["kcenter"] / sum(weights.values()), abs=1)
        assert list(limits.values())[-1] == pytest.approx(99, abs=3)  # all that the others left


def test_gpu_times_some_backends_alone(tmp_path, capsys):
    """Without baselines, and without compiling what others need."""
    options = ["--stages", "operators", "--operators", "attention_received", "--backends", "cpu"]
    status, document = rehearse(tmp_path, *options)
    assert status == 0 and [stage["name"] for stage in document["stages"]] == ["benchmark attention_received"]
    cases = document["operators"]["attention_received"]["cases"]
    assert [[entry["name"] for entry in case["implementations"]] for case in cases] == [["cpu"], ["cpu"]]


def test_a_process_is_ended_with_all_that_it_started():
    """One that keeps the output open too; one that left the group is not waited for."""
    script = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(9)']," \
        " start_new_session=True); print('begun', flush=True); time.sleep(60)"  # fmt: skip
    begin = time.monotonic()
    with pytest.raises(guard.OutOfTime, match="begun"):
        guard.launch([sys.executable, "-c", script], 2)
    assert time.monotonic() - begin < 8


def test_tests_that_run_out_of_time_leave_what_they_found(monkeypatch):
    def report_of(name, outcome="passed", when="call", seconds=0.5):
        return SimpleNamespace(nodeid=name, outcome=outcome, when=when, duration=seconds)

    def launch(command, limit, **environment):
        written = tally.Tally(environment["PRUNEOPS_TALLY"])
        for each in (
            report_of("a", when="setup"), report_of("a"), report_of("b", "failed", seconds=7.0),
            report_of("c", "skipped", "setup"), report_of("d"), report_of("d", "failed", "teardown"),
            report_of("e", "failed", "???"),
        ):  # fmt: skip
            written.pytest_runtest_logreport(each)
        raise guard.OutOfTime("dots")

    monkeypatch.setattr(stages, "launch", launch)
    status, message, details = stages.tests(SimpleNamespace(device=CPU), 10)
    assert status == "failed" and message == "out of time after 1 passed, 1 failed, 2 error, 1 skipped"
    assert details["bad"] == ["b", "d", "e"] and details["slowest"][0] == ["b", 7.0]


def test_gpu_tests_are_in_the_files_that_are_run():
    """Other files have no test marked gpu."""
    marks = re.compile(r"@(pytest.mark.gpu|every_backend|every_kernel|on_targets|CUDA_KERNELS)|marks=.*mark\.gpu")
    marked = {
        str(path.relative_to(ROOT)) for path in Path(ROOT, "tests").rglob("test_*.py") if marks.search(path.read_text())
    }
    assert all(name.startswith(stages.GPU_TESTS) for name in marked), marked
    assert all((ROOT / name).exists() for name in stages.GPU_TESTS)


def test_tests_of_native_kernels_come_first(tmp_path, monkeypatch):
    """Through pytest-xdist too; what was cut off shows in the counts."""
    (tmp_path / "test_own.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(9))\n"
        "@pytest.mark.parametrize('target', ['reference-cuda', 'triton-cuda', 'cuda-cuda', 'b'])\n"
        "def test_a(target, i): pass\n"
    )
    for name, options in {"alone": [], "together": ["-n", "2", "--dist", "load", "--maxschedchunk", "1"]}.items():
        monkeypatch.setenv("PRUNEOPS_TALLY", str(tmp_path / name))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.tally", "-p", "no:cacheprovider", *options]
        done = subprocess.run(
            [*command, "--rootdir", tmp_path, tmp_path / "test_own.py"], cwd=ROOT, capture_output=True
        )
        assert done.returncode == 0, done.stdout
        found = tally.read(tmp_path / name)
        assert found["kinds"] == {kind: [9, 9] for kind in tally.KINDS} and found["counts"]["passed"] == 36
        first, *lines = (tmp_path / name).read_text().splitlines()
        order = [tally.kind(json.loads(line)["test"]) for line in lines]
        assert "reference" not in order[:18] and "cuda" not in order[18:]
    (tmp_path / "cut").write_text("\n".join([first, *lines[:2]]))
    assert sum(ended for ended, _ in tally.read(tmp_path / "cut")["kinds"].values()) == 2


def test_compile_ahead_compiles_a_slice(monkeypatch, capsys):
    """Kernels and baselines, each by one process; what fails is named."""
    compiled = []

    def kernel(name):
        def compile(spec, target):
            compiled.append((name, spec, target.arch))
            if spec == ("bad",):
                raise RuntimeError("no such type\nand more")

        return SimpleNamespace(__name__=name, compile=compile)

    pairs = [(kernel("a"), ("x", torch.float32)), (kernel("b"), ("bad",)), (kernel("c"), ())]
    monkeypatch.setattr(compile_ahead, "specializations", lambda: pairs)
    monkeypatch.setattr(compile_ahead, "REHEARSED", 3)
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    for i in range(2):
        assert compile_ahead.main(["--device", "cpu", "--slice", f"{i}/2"]) == 0
    assert [arch for *_, arch in compiled] == [90] * 3
    assert capsys.readouterr().out.splitlines() == [
        "compiled: a-x-float32: ok", "compiled: c: ok", "compiled: b-bad: RuntimeError: no such type",
    ]  # fmt: skip
    found = list(compile_ahead.compiled_baselines(["kcenter", "kv_compact"], "tiny", CPU))
    assert {(operator.name, name) for operator, _, name in found} == {
        ("kcenter", "compiled"),
        ("kv_compact", "compiled"),
    }


@pytest.mark.parametrize(
    "prints, status, ended",
    [
        ("a: ok\n========= ERROR SUMMARY: 0 errors", 0, "passed"),
        ("a: ok\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "passed"),
        ("a: ok\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", 0, "failed"),
        ("a: ok\n========= ERROR SUMMARY: 2 errors", stages.FOUND, "failed"),
        ("========= ERROR SUMMARY: 0 errors", 0, "failed"),  # no call was checked
        ("Device not supported", 0, "failed"),
        (None, 0, "not found"),
    ],
)
def test_sanitizer_passes_only_on_a_clean_summary(prints, status, ended, tmp_path, monkeypatch):
    if prints is not None:
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\nexit {status}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nonesuch"))
    assert stages.sanitize("memcheck", SimpleNamespace(device=CUDA), 20)[0] == ended


OK_CUDA, OK_TRITON = "sanitize: kcenter cuda a: ok", "sanitize: kcenter triton a: ok"


@pytest.mark.parametrize("prints, status, message", [
    ([OK_CUDA, OK_TRITON], "incomplete", "2 clean calls (cuda 1, triton 1)"),
    ([OK_CUDA, "========= Invalid __global__ read of size 4"], "failed", "Invalid __global__"),
    (["sanitize: kcenter cuda a: WRONG"], "failed", "WRONG"),
    ([], None, None),
])  # fmt: skip
def test_sanitizer_that_runs_out_of_time(prints, status, message, monkeypatch):
    def launch(*arguments, **options):
        raise guard.OutOfTime("".join(f"{line}\n" for line in ["========= COMPUTE-SANITIZER", *prints]))

    monkeypatch.setattr(stages, "launch", launch)
    monkeypatch.setattr(stages.shutil, "which", lambda *arguments, **options: "compute-sanitizer")
    run = SimpleNamespace(device=CUDA)
    if status is None:
        with pytest.raises(guard.OutOfTime):
            stages.sanitize("racecheck", run, 20)
        return
    ended = stages.sanitize("racecheck", run, 20)
    assert ended[0] == status and message in ended[1]


def full_record():
    """What a run on a GPU knows at its end, all cases with goals, much of it gone wrong."""
    own = {"kind": "baseline", "status": "ok", "reason": "ok", "median_s": 2e-3, "of_roofline": 0.01}
    backend = {"kind": "backend", "status": "ok", "reason": "ok", "of_roofline": 0.02}
    crashed = {"kind": "baseline", "status": "crashed", "reason": "SIGABRT: " + 300 * "x"}
    entries = [
        {**backend, "name": "triton", "median_s": 9e-4, "host_s": 7e-5, "ratios": {"loop": 2.2}},
        {**backend, "name": "cuda", "median_s": 8e-4, "host_s": 2e-5, "ratios": {"loop": 2.5, "copy": 0.5}},
        {**own, "name": "loop"},
        {**own, "name": "copy", "median_s": 4e-4, "reason": registry.LOWER_BOUND},
        *({**crashed, "name": f"baseline {i}"} for i in range(4)),
    ]
    operators = {}
    for name in gpu.by_share(OPERATORS):
        cases = OPERATORS[name].select("goals", CUDA)
        operators[name] = {"cases": [{"name": case.name, "implementations": entries} for case in cases]}
    names = ("build", "compile ahead", "tests", "small shapes", *stages.TOOLS, "soak")
    found = [{"name": name, "status": "failed", "message": f"{name} " + 200 * "y", "seconds": 1.0} for name in names]
    found += [{"name": f"benchmark {name}", "status": "passed", "message": "", "seconds": 1.0} for name in operators]
    found += [{"name": f"baselines {name}", "status": "passed", "message": "", "seconds": 2.0} for name in operators]
    expected = {name: [case["name"] for case in known["cases"]] for name, known in operators.items()}
    found[2]["bad"] = [f"tests/ops/test_kcenter.py::test_number_{i}[{200 * 'z'}]" for i in range(40)]
    return {"device": "H100", "date": "2026-11-27T00:00:00", "commit": None, "dirty": True, "seconds": 299.0,
            "stages": found, "expected": expected, "operators": operators, "complete": False}  # fmt: skip


@pytest.mark.parametrize("copies", [1, 2])
def test_summary_has_at_most_60_lines(copies, tmp_path):
    document = full_record()
    for known in document["expected"].values():
        known *= copies
    lines = summary.lines(document, tmp_path / "record.json")
    assert len(lines) <= 60 and max(map(len, lines)) <= summary.WIDTH
    assert lines[0].startswith("H100") and lines[-1].startswith("record: ")
    assert "INCOMPLETE: the run did not end" in lines
    text = "\n".join(lines)
    (sanitizers,) = [line for line in lines if line.startswith("sanitize: ")]
    assert all(f"{name} failed {name}" in sanitizers for name in summary.SANITIZERS)
    assert text.count("failed: tests/ops") == summary.MAX_TESTS and "failed: 38 more" in text
    assert ("more cases" in text) == (copies > 1)
    hosts = "triton 70.0 us (limit 60 us MISSED), cuda 20.0 us (limit 45 us met)"
    assert f"benchmark kcenter: passed (1.0 s); baselines passed (2.0 s); host at most: {hosts}" in text
    first = next(line for line in lines if "b1-n576-d1024-bfloat16" in line)
    expected = "cuda 800 us, 2 % of roofline, 2.50x faster than loop, host 20.0 us; baseline 0 crashed: SIGABRT"
    assert expected in first
    if copies == 1:
        cases = sum(len(known["cases"]) for known in document["operators"].values())
        assert sum(line.startswith("  ") for line in lines) == cases


def test_summary_names_cases_that_were_not_reached(tmp_path):
    document = full_record()
    del document["operators"]["kcenter"]["cases"][1:], document["operators"]["gather_tokens"]
    lines = summary.lines(document, tmp_path / "record.json")
    for name in [*document["expected"]["kcenter"][1:], *document["expected"]["gather_tokens"]]:
        assert f"  {name}: not reached" in lines


@pytest.fixture
def tuned_library(tmp_path, monkeypatch):
    """csrc/cuda/tuning.cu with every declared parameter, alone in a library."""
    names = native_spaces.declarations()
    source = "".join(f'inline pruneops::Tuned t{i}{{"{name}", {i}}};\n' for i, name in enumerate(names))
    path = tmp_path / "tuned.cpp"
    path.write_text('#include "cuda/tuning.cu"\n' + source)
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run([*compiler, f"-I{ROOT / 'csrc'}", path, "-o", tmp_path / "tuned.so"], check=True)
    library = ctypes.CDLL(str(tmp_path / "tuned.so"))
    monkeypatch.setattr(native_spaces, "_library", lambda: library)
    return dict(zip(names, itertools.count()))


def test_launch_parameters_of_native_kernels(tuned_library):
    """Every declared parameter is swept, in a case that its operator has; sweeping one leaves it as it was."""
    swept = set()
    for space in native_spaces.SPACES:
        assert [case.name for case in OPERATORS[space.operator].select(space.case, CUDA)] == [space.case]
        assert 2 <= len(space.candidates) == len({tune.label(config) for config in space.candidates}) <= 12
        target, config = space.target, space.candidates[-1]
        now = target.current()
        swept |= set(now)
        assert now == {name: tuned_library[name] for name in config}
        with tune.override(target, config) as used:
            assert target.current() == config and used
        assert target.current() == now
        lines = target.text(config).splitlines()
        assert [re.sub(r".*, (\d+)};", r"\1", line) for line in lines] == [str(value) for value in config.values()]
        for line in lines:
            path, number, text = line.split(":", 2)
            start = text.strip().partition(",")[0]
            assert start in (ROOT / path).read_text().splitlines()[int(number) - 1] and path in target.place
    assert swept == set(tuned_library)
    with pytest.raises(KeyError, match="no launch parameter 'nonesuch'"):
        native_spaces.tune("nonesuch")


def test_sweep_of_a_launch_parameter(tuned_library, monkeypatch, capsys):
    """The operator sees it; afterwards it is as before. A parameter that the library lacks costs its space alone."""
    seen, (name, *_) = [], tuned_library

    def call(arguments):
        seen.append(native_spaces.tune(name))
        return KCENTER.call(arguments)

    monkeypatch.setattr(native_spaces.Native, "backend", "reference")
    target, operator = native_spaces.Native((name,)), dataclasses.replace(KCENTER, call=call)
    arguments, before = operator.arguments(TINY, CPU), native_spaces.tune(name)
    for config in (None, {name: 77}):
        entry, timed = tune.measure(target, config, operator, TINY, arguments, machine.Clock(CPU), CPU)
        assert entry["status"] == "ok" and timed and set(seen) == {before if config is None else 77}
        seen.clear()
    assert native_spaces.tune(name) == before
    space = spaces.Space("a space", native_spaces.Native(("nonesuch",)), "kcenter", TINY.name, ({"nonesuch": 1},))
    assert "has no launch parameter 'nonesuch'" in tune.problem(space, CUDA)
    assert tune.problem(space, CPU) == "" and capsys.readouterr().out.startswith("tune: a space: ")


@pytest.mark.parametrize("space", spaces.SPACES, ids=lambda space: space.name)
def test_spaces_name_what_is_there(space):
    operator = OPERATORS[space.operator]
    assert [case.name for case in operator.select(space.case, CUDA)] == [space.case]
    assert len(space.candidates) == len({tune.label(config) for config in space.candidates}) >= 3
    for target in (space.target, *space.rehearsal[:1]):
        now = target.current()
        assert all(set(config) <= set(now) for config in space.candidates)
        with target.use(now | space.candidates[0]):
            assert {**now, **space.candidates[0]} == target.current()
        assert target.current() == now and target.name in target.text(now)


def test_overrides_log_whether_they_were_read(monkeypatch):
    module = SimpleNamespace(
        T={"a": ({"X": 1}, {"num_warps": 4}), "b": ({"X": 9}, {})},
        f=lambda n, wide: {"X": n, "num_warps": 4},
        g=lambda n: n,
    )
    monkeypatch.setattr(spaces, "_module", lambda name: module)
    entry = spaces.Table("m", "T", "a")
    with entry.use({"X": 2, "num_warps": 8}) as used:
        assert module.T["b"][0]["X"] == 9 and not used
        assert module.T["a"] == ({"X": 2}, {"num_warps": 8}) and used
    function = spaces.Function("m", "f", {1: True}, (1, True), (("g", "X"),))
    with function.use({"X": 5}) as used:
        assert module.f(3, False)["X"] == 3 and not used
        assert module.f(3, True) == {"X": 5, "num_warps": 4} and module.g(3) == 5 and used
    assert module.f(3, True)["X"] == 3 == module.g(3) and module.T["a"][0]["X"] == 1


def test_sweep_proposes_only_what_is_right_and_faster():
    def entry(label, status="ok", median=None, config=None):
        timed = {"median_s": median} if median else {}
        return {"label": label, "status": status, "reason": "because", "config": config} | timed

    current, wrong = entry(tune.CURRENT, median=4e-4), entry("X=1", "WRONG")
    faster, as_fast = entry("X=2", median=3e-4, config={"X": 2}), entry("X=3", median=3.95e-4, config={"X": 3})
    known = {"candidates": [current, wrong, faster, as_fast], "final": []}
    assert tune.verdict(known) == ("passed", "X=2: 300 us, was 400 us (3 ok, 1 WRONG)", {"X": 2})
    assert tune.verdict(known | {"final": [[tune.CURRENT, 3e-4], ["X=2", 2.99e-4]]})[2] is None
    assert tune.verdict(known | {"candidates": [current, as_fast]})[2] is None
    assert tune.verdict(known | {"candidates": [entry(tune.CURRENT, "failed"), faster]})[0] == "failed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OPERATORS)
def test_tiny_cases_on_cuda(name, capsys):
    baselines = ",".join(own for own in OPERATORS[name].baselines if own not in ("compiled", "flex"))
    assert command.main(["ops", name, "--cases", "tiny", "--baselines", baselines, "--seconds", "5"]) == 0
    table = capsys.readouterr().out
    assert "graph" in table and "WRONG" not in table and "failed" not in table


def test_end_to_end(tmp_path, monkeypatch, capsys):
    """Every method against the unpruned model, on a tiny one."""
    from benchmarks import end_to_end
    from tests.adapters.tiny import model_of, prompts

    model, image = model_of("llava")
    monkeypatch.setattr(end_to_end, "build", lambda name, device: (model, prompts(image, [[3, "image", 5]]), 16))
    out = tmp_path / "run.json"
    options = ["--device", "cpu", "--models", "llava-1.5", "--keep", "0.5", "--runs", "1", "--out", str(out)]
    assert command.main(["end_to_end", *options]) == 0
    document = json.loads(out.read_text())
    rows = {row["row"]: row for row in document["rows"]}
    assert document["complete"] and len(rows) == 1 + len(end_to_end.METHODS)
    assert rows["uniform 0.5"]["kv_bytes"] < rows["dart 0.5"]["kv_bytes"] < rows["unpruned"]["kv_bytes"]
    assert rows["divprune 0.5"]["selection_s"] > 0 == rows["unpruned"]["selection_s"]
    printed = capsys.readouterr().out
    assert all(f" {row} " in printed for row in rows)
    with pytest.raises(SystemExit):
        command.main(["end_to_end", "--methods", "nothing"])
    assert "no 'nothing'; there is: todre" in capsys.readouterr().err
