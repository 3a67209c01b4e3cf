"""The benchmark harness, on cases too small to mean anything: timings are never asserted."""

import contextlib
import dataclasses
import functools
import gc
import json
import os
import platform
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
    gpu,
    guard,
    harness,
    machine,
    registry,
    report,
    spaces,
    stages,
    summary,
    tally,
    tune,
)
from pruneops import backends  # noqa: E402

CPU = torch.device("cpu")
OPERATORS = {name: registry.operator(name) for name in registry.names()}
KCENTER = OPERATORS["kcenter"]
TINY = KCENTER.select("tiny", CPU)[0]
CEILINGS = machine.Ceilings(read=1e10, copy=1e10, matmul={torch.float32: 1e11, torch.bfloat16: 1e11})
CHEAP = ["ops", "kcenter", "--device", "cpu", "--cases", "tiny", "--backends", "reference"]


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    """Skip the half second that measuring the rates takes."""
    monkeypatch.setattr(machine, "ceilings", lambda device, dtypes: CEILINGS)


def spoiled(result):
    """A wrong answer of the right shape: choices in reverse but for the first, scores off by 0.001, mass by 1 %, one
    token's elements in reverse."""
    if isinstance(result, list):
        return [result[0].flip(-1), *result[1:]]
    if isinstance(result, tuple) and result[0].is_floating_point():
        return type(result)(result[0] * 1.01, result[1])
    if isinstance(result, tuple):
        return type(result)(torch.cat([result[0][:, :1], result[0][:, 1:].flip(-1)], -1), result[1])
    return result + 1e-3 if result.is_floating_point() else result.flip(-1)


def small(operator, name, **sizes):
    """A case of an operator by name, with other sizes."""
    case = operator.select(name, CPU)[0]
    return dataclasses.replace(case, sizes=case.sizes | sizes)


def test_table_and_json_hold_everything(tmp_path, capsys):
    out = tmp_path / "run.json"
    assert command.main([*CHEAP, "--peers", "loop,loop_item,n_by_n", "--seconds", "5", "--out", str(out)]) == 0
    table = capsys.readouterr().out
    for words in (
        TINY.shape,
        "reference",
        "loop_item",
        "n_by_n",
        "% of floor",
        "vs loop",
        "10/10",
        "rates of this run",
    ):
        assert words in table
    assert "faster" in table and "slower" in table
    document = json.loads(out.read_text())
    assert document["complete"] and document["operator"] == "kcenter" and document["peers"]
    assert {"python", "torch", "triton", "pruneops"} == set(document["versions"])
    assert {"device", "machine", "commit", "dirty", "date", "command", "ceilings", "unavailable"} <= set(document)
    (case,) = document["cases"]
    assert case["bytes"] == 96 * 64 * 4 + 10 * 12
    assert case["operations"] == 2 * 96 * 64 * 10
    assert case["floor_s"] == pytest.approx(case["bytes"] / 1e10)
    for entry in case["contenders"]:
        assert entry["status"] == "ok" and len(entry["times_s"]) >= harness.LEAST_TURNS
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
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


def test_floor_is_reads_and_copies_or_operations():
    rates = machine.Ceilings(read=2e10, copy=1e10, matmul={torch.float32: 1e11})
    assert rates.floor(registry.Cost(30, 10, 0), torch.float32) == pytest.approx(20 / 2e10 + 20 / 1e10)
    assert rates.floor(registry.Cost(30, 10, 1000), torch.float32) == pytest.approx(1000 / 1e11)


@pytest.mark.parametrize("name", OPERATORS)
def test_tiny_cases_of_every_operator(name, tmp_path, capsys):
    out, operator = tmp_path / "run.json", OPERATORS[name]
    peers = [peer for peer in operator.peers if peer != "compiled"]
    options = ["--backends", "reference", "--peers", ",".join(peers), "--seconds", "10", "--out", str(out)]
    assert command.main(["ops", name, "--device", "cpu", "--cases", "tiny", *options]) == 0
    table = capsys.readouterr().out
    assert "graph not run" in table and "WRONG" not in table
    cases = json.loads(out.read_text())["cases"]
    assert [case["name"] for case in cases] == list(operator.sets["cpu"]["tiny"])
    for case in cases:
        assert case["shape"] in table and case["bytes"] > 0 and case["operations"] >= 0
        able = [name for name in peers if "cpu" in operator.peers[name].devices]
        assert {entry["name"] for entry in case["contenders"]} == {"reference", *able}
        assert all(entry["status"] == "ok" and entry["of_floor"] > 0 for entry in case["contenders"])


@pytest.mark.parametrize("name", OPERATORS)
def test_sets_name_cases_once(name):
    for device, sets in OPERATORS[name].sets.items():
        for chosen in sets:
            cases = OPERATORS[name].select(chosen, torch.device(device))
            assert {case.name for case in cases} == set(sets[chosen]) and len(cases) == len(sets[chosen])


@pytest.mark.parametrize("name", OPERATORS)
def test_wrong_backend_gets_no_ratio(name, monkeypatch, capsys):
    operator = OPERATORS[name]
    wrong = dataclasses.replace(operator, call=lambda arguments: spoiled(operator.call(arguments)))
    monkeypatch.setattr(registry, "operator", lambda name: wrong)
    options = ["--backends", "reference", "--peers", next(iter(operator.peers)), "--seconds", "1"]
    assert command.main(["ops", name, "--device", "cpu", "--cases", "tiny", *options]) == 1
    streams = capsys.readouterr()
    assert "WRONG" in streams.out and "faster" not in streams.out and "slower" not in streams.out
    assert "backend reference: WRONG" in streams.err


@pytest.mark.parametrize(
    "name, case, spoil, words",
    [
        ("pivot_cosine", 0, lambda r: r[:, :-1], "of shape [1, 3, 96]"),
        ("pivot_cosine", 0, lambda r: r.index_fill(-1, torch.tensor([5]), torch.nan), "off by inf"),
        ("pivot_cosine", 1, lambda r: r.roll(1, -1), "off by"),
        ("exclusive_bottomk", 0, lambda r: r[:, :-1], "of shape [1, 9]"),
        ("exclusive_bottomk", 0, lambda r: r.roll(1, -1), "off by"),
        ("exclusive_bottomk", 0, lambda r: r.index_fill(-1, torch.tensor([9]), -1), "not tokens that are free"),
        ("exclusive_bottomk", 1, lambda r: torch.cat([r[:, :-1], r[:, :1]], -1), "not all different"),
        ("assign_ranks", 0, lambda r: r.roll(1, -1), "off by"),
        ("assign_ranks", 0, lambda r: r[:, :1].expand_as(r), "not all different"),
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
def test_check_of_selection_refuses(name, case, spoil, words):
    operator = OPERATORS[name]
    case = operator.cases[case]
    arguments = operator.arguments(case, CPU)
    with pruneops.backend("reference"):
        result = operator.call(arguments)
    assert operator.check(case, arguments, result, result, torch.float32).right
    checked = operator.check(case, arguments, spoil(result), result, torch.float32)
    assert not checked.right and words in checked.words


@pytest.mark.parametrize("name", ["kv_compact", "paged_kv_compact"])
def test_check_in_place_counts_calls(name):
    """Those replayed from a graph are one more; what failed leaves nothing to those after it."""
    operator = OPERATORS[name]
    case = next(case for case in operator.cases if case.sizes.get("in_place", True))
    arguments = operator.arguments(case, CPU)
    contents = arguments["contents"]
    for done, counted, right in ((1, 1, True), (3, 3, True), (3, 2, True), (1, 2, False), (0, 1, False)):
        for _ in range(done):
            with pruneops.backend("reference"):
                operator.call(arguments)
        contents.times = counted
        checked = operator.check(case, arguments, contents.tensors, None, torch.float32)
        assert checked.right == right, (done, counted)
    for label, peer in operator.peers.items():
        if label != "compiled" and "cpu" in peer.devices:
            contents.tensors[0].zero_()
            result = peer.prepare(case, arguments)()
            assert operator.check(case, arguments, result, None, torch.float32).right


def test_check_of_selection_refuses_a_token_that_is_taken():
    operator = OPERATORS["exclusive_bottomk"]
    case = operator.cases[0]
    arguments = operator.arguments(case, CPU)
    with pruneops.backend("reference"):
        result = operator.call(arguments | {"taken": None})
    arguments["taken"] = torch.zeros_like(arguments["taken"]).index_fill(1, result[0, 3:4], True)
    assert "free" in operator.check(case, arguments, result, None, torch.float32).words


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda i, r: (i.roll(1, -1), r), "begin with the pivot"),
        (lambda i, r: (i[:, :1].expand_as(i), r), "different tokens"),
        (lambda i, r: (i, r + 1e-3), "off by 0.001"),
        (lambda i, r: (i, r * torch.nan), "off by inf"),
    ],
)
def test_check_refuses(spoil, words):
    arguments = KCENTER.arguments(TINY, CPU)
    chosen = KCENTER.call(arguments)
    assert KCENTER.check(TINY, arguments, chosen, chosen, torch.float32).right
    checked = KCENTER.check(TINY, arguments, spoil(*chosen), chosen, torch.float32)
    assert not checked.right and words in checked.words


def test_half_precision_and_packed_images_are_right():
    for name in ("b8-n576-d1024-bfloat16", "varlen-d1024-float32"):
        case = KCENTER.select(name, CPU)[0]
        sizes = dict(case.sizes, D=24)
        sizes |= {"lengths": [50, 30], "ks": [9, 4]} if "ks" in sizes else {"N": 60, "k": 7}
        case = dataclasses.replace(case, sizes=sizes)
        arguments = KCENTER.arguments(case, CPU)
        expected = KCENTER.call(arguments)
        assert KCENTER.check(case, arguments, expected, expected, torch.float32).right
        for peer in ("loop", "loop_item", "n_by_n"):
            result = KCENTER.peers[peer].prepare(case, arguments)()
            assert KCENTER.check(case, arguments, result, None, case.dtype).right, (name, peer)


@pytest.mark.parametrize(
    "name, case, sizes",
    [
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
def test_every_form_and_peer_is_right_in_its_precision(name, case, sizes, monkeypatch):
    """Compiled peers too, as one graph, by the compiler that only traces."""
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    operator = OPERATORS[name]
    case = small(operator, case, **sizes)
    arguments = operator.arguments(case, CPU)
    with pruneops.backend("reference"):
        for face in (operator.call, *operator.variants(case).values()):
            checked = operator.check(case, arguments, face(arguments), operator.call(arguments), torch.float32)
            assert checked.right, checked.words
    for label, peer in operator.peers.items():
        if "cpu" in peer.devices:
            checked = operator.check(case, arguments, peer.prepare(case, arguments)(), None, case.dtype)
            assert checked.right, (label, checked.words)


def test_variants_stand_beside_their_backend():
    operator = OPERATORS["exclusive_bottomk"]
    scores, features = operator.select("tiny", CPU)
    names = [c.name for c in harness.contenders(operator, features, CPU, ["reference", "cpu"], [], CEILINGS)]
    assert names == ["reference", "cpu", "cpu two calls"]
    assert [c.name for c in harness.contenders(operator, scores, CPU, ["cpu"], [], CEILINGS)] == ["cpu"]


def test_what_does_not_fit_the_time_is_shown(capsys):
    slow = machine.Ceilings(read=1e3, copy=1e3, matmul={torch.float32: 1e11})
    found = harness.contenders(KCENTER, TINY, CPU, [], ["loop", "n_by_n"], slow)
    result = harness.run_case(KCENTER, TINY, CPU, found, slow, 1)
    assert [entry["status"] for entry in result["contenders"]] == ["skipped", "skipped"]
    assert "would take" in result["contenders"][0]["reason"]
    assert command.main([*CHEAP, "--peers", "loop", "--seconds", "0"]) == 0
    assert capsys.readouterr().out.count("skipped: the time given is used up") == 2


def test_a_failing_peer_costs_only_itself(monkeypatch):
    def broken(case, arguments):
        raise OSError("no compiler\nand more")

    peers = {"broken": registry.Peer(broken, lambda case, ceilings: 0), "loop": KCENTER.peers["loop"]}
    operator = dataclasses.replace(KCENTER, peers=peers)
    found = harness.contenders(operator, TINY, CPU, [], list(peers), CEILINGS)
    first, second = harness.run_case(operator, TINY, CPU, found, CEILINGS, 2)["contenders"]
    assert (first["status"], first["reason"]) == ("failed", "OSError: no compiler")
    assert second["status"] == "ok"


def test_a_peer_that_compiles_too_long_costs_later_peers_alone():
    def slow(case, arguments):
        time.sleep(0.3)
        return KCENTER.peers["loop"].prepare(case, arguments)

    peers = {"slow": registry.Peer(slow, lambda case, ceilings: 0), "late": KCENTER.peers["loop"]}
    operator = dataclasses.replace(KCENTER, peers=peers)
    found = harness.contenders(operator, TINY, CPU, ["reference"], list(peers), CEILINGS)
    entries = harness.run_case(operator, TINY, CPU, found, CEILINGS, 0.3)["contenders"]
    assert [entry["status"] for entry in entries] == ["ok", "ok", "skipped"]
    assert entries[2]["reason"] == "the time given is used up"


def test_turns_alternate():
    order = []
    backends = dict(zip("abc", ["reference", "auto", "cuda"]))
    calls = {n: (b, lambda n=n: order.append((n, pruneops.backends._forced.get()))) for n, b in backends.items()}
    times = harness.take_turns(calls, machine.Clock(CPU), 0)
    assert order == list(backends.items()) * harness.LEAST_TURNS
    assert all(len(t) == harness.LEAST_TURNS for t in times.values())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["ops", "nonesuch"], "no operator 'nonesuch'"),
        (["ops", "kcenter", "--cases", "nonesuch"], "no case 'nonesuch'"),
        (["ops", "kcenter", "--peers", "nonesuch"], "no peer 'nonesuch'"),
        (["ops", "kcenter", "--backends", "nonesuch"], "no backend 'nonesuch'"),
        (["ops", "kcenter", "--out", "/nonesuch/x.json"], "no file can be written"),
        (["ops", "kcenter", "--seconds", "soon"], "invalid float"),
        ([], "required"),
    ],
)
def test_bad_requests_get_one_line_and_status_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_interruption_keeps_finished_cases(monkeypatch, tmp_path, capsys):
    out, run_case, done = tmp_path / "run.json", harness.run_case, []

    def interrupted(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(run_case(*arguments))
        return done[0]

    monkeypatch.setattr(harness, "run_case", interrupted)
    cases = "tiny,b1-n576-d1024-float32"
    options = [*CHEAP[:5], cases, *CHEAP[6:], "--peers", "none", "--seconds", "4", "--out", str(out)]
    assert command.main(options) == 130
    document = json.loads(out.read_text())
    assert len(document["cases"]) == 1 and not document["complete"]
    assert "INCOMPLETE" in capsys.readouterr().out


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    report.write(path, {"old": True})
    with pytest.raises(TypeError):
        report.write(path, {"new": object()})

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        report.write(path, {"new": True})
    assert json.loads(path.read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("name", OPERATORS)
def test_every_sanitized_shape_is_right(name):
    assert [words for words, passed in OPERATORS[name].sanitize(CPU) if not passed] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("module", ["gpu", "tune"])
def test_gpu_run_without_a_gpu_says_so(module, capsys):
    assert {"gpu": gpu, "tune": tune}[module].main([]) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err == f"benchmarks.{module}: PyTorch sees no GPU here; nothing was run\n"


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
def no_card(monkeypatch):
    """CUDA graphs that record nothing: what they run, they run at once."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def test_replay_holds_its_call(no_card):
    tensor = torch.ones(3)
    held = weakref.ref(tensor)
    replay = harness.capture(lambda tensor=tensor: tensor + 1)
    del tensor
    gc.collect()
    assert held() is not None and torch.equal(replay(), torch.full((3,), 2.0))


@pytest.mark.parametrize("name", OPERATORS)
def test_captured_peers_hold_all_that_they_close_over(name, no_card, monkeypatch):
    """A graph knows addresses: tensors made for a peer must live as long as what replays it."""
    module = sys.modules[f"benchmarks.ops.{name}"]
    held = []

    def capture(call):
        held.extend(weakref.ref(tensor) for tensor in tensors_of(call, {}))
        return harness.capture(call)

    monkeypatch.setattr(module, "capture", capture)
    if hasattr(module, "on_card"):  # as if its tensors were on one
        monkeypatch.setattr(module, "on_card", lambda call, tensor: capture(call))
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    cases = OPERATORS[name].select("tiny", CPU)
    if name == "kcenter":
        cases.append(small(KCENTER, "varlen-d1024-float32", D=24, lengths=[50, 30], ks=[9, 4]))
    captured = 0
    for case in cases:
        for label, peer in OPERATORS[name].peers.items():
            if label == "flex":  # is not captured
                continue
            replay = peer.prepare(case, OPERATORS[name].arguments(case, CPU))
            gc.collect()
            assert all(reference() is not None for reference in held), (case.name, label)
            captured += bool(held)
            del replay
            held.clear()
    assert captured >= len(cases)


def breaking_card(monkeypatch):
    """A device that seems to be a card, and a function that breaks its context."""
    state = {"lost": False}

    def synchronize(device=None):
        if state["lost"]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(harness, "Clock", lambda device: machine.Clock(CPU))
    return SimpleNamespace(type="cuda"), lambda: state.update(lost=True)


@pytest.mark.parametrize("breaks_at", [1, 4])  # when it is prepared, when contenders take turns
def test_a_lost_context_is_the_fault_of_whom_it_befell(breaks_at, monkeypatch):
    device, lose = breaking_card(monkeypatch)
    loop, calls, told = KCENTER.peers["loop"], [], []

    def prepare(case, arguments):
        call = loop.prepare(case, arguments)

        def counted():
            calls.append(None)
            if len(calls) >= breaks_at:
                lose()
                raise RuntimeError("CUDA error: unspecified launch failure")
            return call()

        return counted

    peers = {"fine": loop, "breaks": registry.Peer(prepare, lambda case, ceilings: 0), "late": loop}
    operator = dataclasses.replace(KCENTER, peers=peers, arguments=lambda case, device: KCENTER.arguments(case, CPU))
    found = harness.contenders(operator, TINY, CPU, [], list(peers), CEILINGS)
    with pytest.raises(harness.ContextLost, match=r"illegal memory access was encountered$"):
        harness.run_case(operator, TINY, device, found, CEILINGS, 2, doing=lambda *at: told.append(at))
    assert told[-1] == (TINY.name, "breaks")


def test_one_that_fails_in_a_turn_costs_only_itself():
    calls = []

    def fails_later(case, arguments):
        def call():
            calls.append(None)
            if len(calls) > 3:
                raise torch.OutOfMemoryError("out of memory")
            return KCENTER.peers["loop"].prepare(case, arguments)()

        return call

    peers = {"tires": registry.Peer(fails_later, lambda case, ceilings: 0), "loop": KCENTER.peers["loop"]}
    operator = dataclasses.replace(KCENTER, peers=peers)
    found = harness.contenders(operator, TINY, CPU, [], list(peers), CEILINGS)
    first, second = harness.run_case(operator, TINY, CPU, found, CEILINGS, 1)["contenders"]
    assert (first["status"], first["reason"]) == ("failed", "OutOfMemoryError: out of memory")
    assert second["status"] == "ok" and "tires" not in second["ratios"]


def test_an_operator_without_a_kernel_is_not_there(monkeypatch, capsys):
    reason = "attention_mass has no such kernel; it has reference, triton"

    def absent(arguments):
        raise backends.BackendUnavailable(f"backend 'cpu' cannot run here: {reason}")

    monkeypatch.setattr(registry, "operator", lambda name: dataclasses.replace(KCENTER, call=absent))
    monkeypatch.setattr(backends, "why_not", lambda name, kind: None if name == "cpu" else "not today")
    slow = machine.Ceilings(read=1e3, copy=1e3, matmul={torch.float32: 1e11})  # no reference to compare with
    monkeypatch.setattr(machine, "ceilings", lambda device, dtypes: slow)
    options = ["--device", "cpu", "--cases", "tiny", "--backends", "cpu", "--peers", "none", "--seconds", "1"]
    assert command.main(["ops", "kcenter", *options]) == 0
    streams = capsys.readouterr()
    assert f"not there: {reason}" in streams.out and "failed" not in streams.out


def test_backends_of_all_cases_come_first_and_what_compiles_last(monkeypatch, tmp_path, capsys):
    """What is slow to prepare takes the time of nobody else; time passes there only."""
    now, told = [0.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    for module in (command, harness):
        monkeypatch.setattr(module, "time", clock)

    def slow(case, arguments):
        now[0] += 3
        return KCENTER.peers["loop"].prepare(case, arguments)

    peers = {"compiles": registry.Peer(slow, lambda *_: 0, compiles=True), "quick": KCENTER.peers["loop"]}
    cases = tuple(dataclasses.replace(TINY, name=f"case-{i}") for i in range(3))
    sets = {"cpu": {"tiny": tuple(case.name for case in cases)}}
    operator = dataclasses.replace(KCENTER, peers=peers, cases=cases, sets=sets)
    monkeypatch.setattr(registry, "operator", lambda name: operator)
    monkeypatch.setattr(guard.Watch, "doing", lambda self, *at: told.append(at))
    out = tmp_path / "run.json"
    options = ["--backends", "reference", "--seconds", "4", "--backends-first", "--out", str(out)]
    assert command.main(["ops", "kcenter", "--device", "cpu", "--cases", "tiny", *options]) == 0
    document = json.loads(out.read_text())
    assert document["complete"] and [case["rank"] for case in document["cases"]] == [2, 2, 2]
    found = [{entry["name"]: entry for entry in case["contenders"]} for case in document["cases"]]
    for case in found:
        assert case["reference"]["status"] == case["quick"]["status"] == "ok"
        assert case["reference"]["check"]["agree_with_reference"] == 10
        assert "quick" in case["reference"]["ratios"]
    assert [case["compiles"]["status"] for case in found] == ["ok", "skipped", "skipped"]
    assert found[0]["compiles"]["prepare_s"] == 3 and "takes 3 s to prepare" in found[1]["compiles"]["reason"]
    firsts = [told.index((case.name, name)) for name in ("reference", "quick") for case in cases]
    assert firsts == sorted(firsts) and firsts[-1] < told.index(("case-0", "compiles"))


def test_a_peer_that_compiles_goes_last_in_its_case():
    peers = {"a": registry.Peer(None, lambda *_: 0, compiles=True), "b": registry.Peer(None, lambda *_: 0)}
    operator = dataclasses.replace(KCENTER, peers=peers)
    found = harness.contenders(operator, TINY, CPU, ["reference"], list(peers), CEILINGS)
    assert [contender.name for contender in found] == ["reference", "b", "a"]


@pytest.mark.parametrize("median, graph, host, recorded", [
    (5e-3, False, 3e-4, True),  # works for long, returns early
    (5e-3, True, 3e-4, False),
    (5e-3, False, 2e-3, False),
    (5e-4, True, 1e-5, True),
])  # fmt: skip
def test_host_time_of_backends_on_a_card(median, graph, host, recorded, monkeypatch):
    seen = []

    def host_seconds(backend, call, device, blocks, calls):
        seen.append(blocks * calls * median)
        return host

    monkeypatch.setattr(harness, "host_seconds", host_seconds)
    contender = harness.Contender("cuda", "backend", None, 0, torch.float32, "cuda", graph=graph)
    entry = {"median_s": median}
    harness._time_host(contender, ("cuda", None), SimpleNamespace(type="cuda"), entry, None)
    assert ("host_s" in entry) == recorded and sum(seen) < 0.5


# A process that does as guarded ones do, with contenders that end it in every way; it imports nothing that is slow.
DYING = """
import argparse, json, os, signal, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("out", "doing", "skip"):
    parser.add_argument(f"--{name}", type=Path)
for name in ("resume", "wait"):
    parser.add_argument(f"--{name}", action="store_true")
options = parser.parse_args()
assert float(sys.stdin.readline()) > 0
skip = json.loads(options.skip.read_text())
known = json.loads(options.out.read_text())["cases"] if options.out.exists() else []
for case in ("first", "second", "third"):
    for contender in ("good", "exits", "killed", "aborts", "hangs"):
        if any(entry[:2] == [case, contender] for entry in known):
            continue
        how = [own[2:] for own in skip if own[0] in (case, None) and own[1] == contender]
        if not how:
            options.doing.write_text(json.dumps([case, contender]))
            print(f"  {case} {contender}: 0.0 s", file=sys.stderr, flush=True)
            if contender == "exits":
                print("boom", file=sys.stderr, flush=True)
                os._exit(7)
            if contender == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if contender == "aborts":
                os.abort()
            if contender == "hangs":
                time.sleep(60)
            options.doing.write_text("null")
        known.append([case, contender, *(how[0] if how else ["ok", ""])])
        options.out.with_suffix(".new").write_text(json.dumps({"cases": known}))
        options.out.with_suffix(".new").rename(options.out)
"""


def test_a_process_that_dies_or_hangs_costs_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guard, "LEAST_PATIENCE", 1)
    monkeypatch.setattr(guard, "PATIENCE", 0)
    script, seen = tmp_path / "dying.py", []
    script.write_text(DYING)
    guarded = guard.Guarded([sys.executable, script], tmp_path, seen.append)
    guarded.ready()
    assert guarded.run(90)[:2] == ("ended", 0)
    assert {(case, contender): how for case, contender, how, _ in guarded.crashes} == {
        (case, contender): "hung" if contender == "hangs" else "crashed"
        for case in ("first", "second")
        for contender in ("exits", "killed", "aborts", "hangs")
    }
    words = {contender: words for _, contender, _, words in guarded.crashes}
    assert words["exits"] == "exit status 7: boom" and words["killed"] == "SIGKILL"
    assert words["aborts"] == "SIGABRT: Fatal Python error: Aborted" and words["hangs"].startswith("no end after")
    assert len(seen[-1]["cases"]) == 15 and len(seen) >= 3
    ends = {(case, contender): rest for case, contender, *rest in seen[-1]["cases"]}
    assert all(ends[case, "good"][0] == "ok" for case in ("first", "second", "third"))
    assert ends["third", "killed"] == ["crashed", "in 2 other cases"]


@pytest.mark.parametrize("script, ended", [
    ("import time; time.sleep(60)", "out of time"),
    ("raise SystemExit('no such option')", "failed"),  # it died before it came to any contender
])  # fmt: skip
def test_guarded_processes_that_get_nowhere(script, ended, tmp_path):
    guarded = guard.Guarded([sys.executable, "-c", script], tmp_path, None)
    begin = time.monotonic()
    assert guarded.run(2 if ended == "out of time" else 30)[0] == ended
    assert time.monotonic() - begin < 20 and not guarded.crashes


def test_crashes_of_a_real_benchmark(tmp_path, monkeypatch, capsys):
    """One contender dies as it is prepared, one as they take turns; the others come out as if nothing had been."""
    script = tmp_path / "benchmark.py"
    script.write_text(
        textwrap.dedent("""
        import dataclasses, os, signal, sys
        import torch
        from benchmarks import __main__ as command, machine, registry

        kcenter = registry.operator("kcenter")
        loop = kcenter.peers["loop"]

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

        peers = {name: dataclasses.replace(loop, prepare=own) for name, own in (
            ("aborts", aborts), ("loop", loop.prepare), ("dies", dies_in_a_turn), ("late", loop.prepare)
        )}
        registry.operator = lambda name: dataclasses.replace(kcenter, peers=peers)
        machine.ceilings = lambda device, dtypes: machine.Ceilings(1e10, 1e10, {torch.float32: 1e11})
        sys.exit(command.main(sys.argv[1:]))
    """)
    )
    options = ["ops", "kcenter", "--device", "cpu", "--cases", "tiny", "--backends", "reference", "--backends-first"]
    run = SimpleNamespace(document={"operators": {}}, cases="tiny", device=CPU)
    record = functools.partial(run.document["operators"].__setitem__, "kcenter")
    guarded = guard.Guarded([sys.executable, script, *options], tmp_path, record)
    assert stages.operator("kcenter", guarded, run, 120) == ("passed", "1 of 1 cases", {})
    (case,) = run.document["operators"]["kcenter"]["cases"]
    entries = {entry["name"]: entry for entry in case["contenders"]}
    assert entries["aborts"]["status"] == entries["dies"]["status"] == "crashed"
    assert (
        entries["aborts"]["reason"] == "SIGABRT: Fatal Python error: Aborted" and entries["dies"]["reason"] == "SIGKILL"
    )
    assert all(entries[name]["status"] == "ok" for name in ("reference", "loop", "late"))
    assert {"loop", "late"} == set(entries["reference"]["ratios"])
    assert "crashed: SIGKILL" in report.text(run.document["operators"]["kcenter"])


def idle(*_):
    return "passed", "", {}


def rehearse(tmp_path, *options):
    """Exit status and record of a run without a card."""
    status = gpu.main(["--device", "cpu", "--results", str(tmp_path), *options])
    return status, json.loads(next(tmp_path.glob("*.json")).read_text())


def test_gpu_rehearsal(tmp_path, monkeypatch, capsys):
    """Every stage, the benchmark of one operator, the sweep of one kernel."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # teams of threads wait for each other on a busy machine
    status, document = rehearse(tmp_path, "--operators", "attention_received", "--soak", "1")
    found = {stage["name"]: (stage["status"], stage["words"]) for stage in document["stages"]}
    assert status == 0 and document["complete"], found
    assert {name for name, (status, _) in found.items() if status == "passed"} >= {
        "build", "compile ahead", "tests", "small shapes", "benchmark attention_received", "tune",
    }  # fmt: skip
    assert all(found[name][0] == "skipped" for name in stages.TOOLS)
    assert found["soak"][0] in ("passed", "not there")
    (path,) = tmp_path.glob("*.md")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("record: ") and path.name in last and last in path.read_text()
    assert "## attention_received" in path.read_text()


def test_gpu_builds_for_its_card_alone(monkeypatch, capsys):
    asked = {}

    def launch(command, limit, **environment):
        asked.update(environment)
        return 0, ""

    monkeypatch.delenv("PRUNEOPS_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(stages, "launch", launch)
    monkeypatch.setattr(backends, "why_not", lambda name, kind: None)
    run = SimpleNamespace(device=SimpleNamespace(type="cuda"), document={"machine": {}})
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
    assert (
        status == 1 and [stage["status"] for stage in found.values()] == ["out of time", "failed"] + ["not found"] * 5
    )
    assert "begun" in found["build"]["output"] and "division" in found["tests"]["words"]


def test_gpu_record_is_written_after_every_step(tmp_path, monkeypatch, capsys):
    seen = []

    def look(*_):
        document = json.loads(next(tmp_path.glob("*.json")).read_text())
        assert next(tmp_path.glob("*.md")).exists() and not document["complete"]
        seen.append([stage["name"] for stage in document["stages"] if stage["status"] == "passed"])
        return "passed", "", {}

    def operator(name, guarded, run, limit):
        guarded.record({"peers": [], "cases": [{"name": "known"}] if len(seen) % 2 else []})
        return look()

    for name in ("build", "soak"):
        monkeypatch.setattr(stages, name, look if name == "soak" else idle)
    monkeypatch.setattr(stages, "ahead", idle)
    monkeypatch.setattr(stages, "operator", operator)
    monkeypatch.setattr(report, "markdown", lambda document: "")
    monkeypatch.setattr(summary, "lines", lambda document, path: ["title"])
    monkeypatch.setattr(guard.Guarded, "ready", lambda self: None)
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
    assert set(gpu.SHARES) == set(OPERATORS)
    limits = {}

    def operator(name, guarded, run, limit):
        limits[name] = limit
        return "passed", "", {}

    monkeypatch.setattr(stages, "operator", operator)
    monkeypatch.setattr(stages, "ahead", idle)
    monkeypatch.setattr(guard.Guarded, "ready", lambda self: None)
    assert rehearse(tmp_path, "--stages", "operators", "--seconds", "100")[0] == 0
    assert list(limits)[:3] == ["kcenter", "attention_mass", "exclusive_bottomk"]
    assert limits["kcenter"] == pytest.approx(99 * gpu.SHARES["kcenter"] / sum(gpu.SHARES.values()), abs=1)
    assert list(limits.values())[-1] == pytest.approx(99, abs=3)  # all that the others left


def test_a_process_is_ended_with_all_that_it_started():
    """One that holds on to the output too, and one that left the group is not waited for."""
    script = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']," \
        " start_new_session=True); print('begun', flush=True); time.sleep(60)"  # fmt: skip
    begin = time.monotonic()
    with pytest.raises(guard.OutOfTime, match="begun"):
        guard.launch([sys.executable, "-c", script.replace("time.sleep(60)'", "time.sleep(9)'")], 2)
    assert time.monotonic() - begin < 8


def test_tests_that_run_out_of_time_leave_what_they_found(tmp_path, monkeypatch):
    def report_of(name, outcome="passed", when="call", seconds=0.5):
        return SimpleNamespace(nodeid=name, outcome=outcome, when=when, duration=seconds)

    def launch(command, limit, **environment):
        written = tally._Tally(environment["PRUNEOPS_TALLY"])
        for each in (
            report_of("a", when="setup"), report_of("a"), report_of("b", "failed", seconds=7.0),
            report_of("c", "skipped", "setup"), report_of("d"), report_of("d", "failed", "teardown"),
            report_of("e", "failed", "???"),
        ):  # fmt: skip
            written.pytest_runtest_logreport(each)
        raise guard.OutOfTime("dots")

    monkeypatch.setattr(stages, "launch", launch)
    status, words, details = stages.tests(SimpleNamespace(device=CPU), 10)
    assert status == "failed" and words == "out of time after 1 passed, 1 failed, 2 error, 1 skipped"
    assert details["bad"] == ["b", "d", "e"] and details["slowest"][0] == ["b", 7.0]


@pytest.mark.parametrize(
    "prints, status, ended",
    [
        ("a: ok\n========= ERROR SUMMARY: 0 errors", 0, "passed"),
        ("a: ok\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "passed"),
        ("a: ok\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", 0, "failed"),
        ("a: ok\n========= ERROR SUMMARY: 2 errors", stages.FOUND, "failed"),
        ("========= ERROR SUMMARY: 0 errors", 0, "failed"),  # it watched nothing
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
    run = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert stages.sanitize("memcheck", run, 20)[0] == ended


@pytest.mark.parametrize(
    "prints, status, words",
    [
        (
            ["sanitize: kcenter cuda a: ok", "sanitize: kcenter triton a: ok"],
            "incomplete",
            "2 clean calls (cuda 1, triton 1)",
        ),
        (
            ["sanitize: kcenter cuda a: ok", "========= Invalid __global__ read of size 4"],
            "failed",
            "Invalid __global__",
        ),
        (["sanitize: kcenter cuda a: WRONG"], "failed", "WRONG"),
        ([], None, None),
    ],
)
def test_sanitizer_that_runs_out_of_time(prints, status, words, monkeypatch):
    def launch(*arguments, **options):
        raise guard.OutOfTime("".join(f"{line}\n" for line in ["========= COMPUTE-SANITIZER", *prints]))

    monkeypatch.setattr(stages, "launch", launch)
    monkeypatch.setattr(stages.shutil, "which", lambda *arguments, **options: "compute-sanitizer")
    run = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    if status is None:
        with pytest.raises(guard.OutOfTime):
            stages.sanitize("racecheck", run, 20)
        return
    ended = stages.sanitize("racecheck", run, 20)
    assert ended[0] == status and words in ended[1] and ended[0] not in gpu.BAD[1:]


def full_record():
    """What a run on a card knows at its end, all cases with goals, much of it gone wrong."""
    cuda, operators = torch.device("cuda"), {}
    for name in gpu.SHARES:
        peer = {"kind": "peer", "status": "ok", "reason": "ok", "median_s": 2e-3, "of_floor": 0.01}
        entries = [
            {"name": "triton", "kind": "backend", "status": "ok", "reason": "ok", "median_s": 9e-4, "of_floor": 0.02,
             "host_s": 7e-5, "ratios": {"loop": 2.2}},
            {"name": "cuda", "kind": "backend", "status": "ok", "reason": "ok", "median_s": 8e-4, "of_floor": 0.02,
             "host_s": 2e-5, "ratios": {"loop": 2.5, "copy": 0.5}},
            {"name": "loop", **peer}, {"name": "copy", **peer, "median_s": 4e-4, "reason": "a yardstick"},
            *({"name": f"peer {i}", "kind": "peer", "status": "crashed", "reason": "SIGABRT: " + 300 * "x"}
              for i in range(4)),
        ]  # fmt: skip
        cases = [{"name": case.name, "contenders": entries} for case in OPERATORS[name].select("goals", cuda)]
        operators[name] = {"cases": cases}
    names = ("build", "compile ahead", "tests", "small shapes", *stages.TOOLS, "soak")
    found = [{"name": name, "status": "failed", "words": f"{name} " + 200 * "y", "seconds": 1.0} for name in names]
    found += [{"name": f"benchmark {name}", "status": "passed", "words": "", "seconds": 1.0} for name in operators]
    found[2]["bad"] = [f"tests/ops/test_kcenter.py::test_number_{i}[{200 * 'z'}]" for i in range(40)]
    return {"device": "H100", "date": "2026-11-27T00:00:00", "commit": None, "dirty": True, "seconds": 299.0,
            "stages": found, "operators": operators, "complete": False}  # fmt: skip


@pytest.mark.parametrize("copies", [1, 2])
def test_summary_has_at_most_60_lines(copies, tmp_path):
    document = full_record()
    for known in document["operators"].values():
        known["cases"] *= copies
    lines = summary.lines(document, tmp_path / "record.json")
    assert len(lines) <= 60 and max(map(len, lines)) <= summary.WIDTH
    assert (
        lines[0].startswith("H100") and lines[-1].startswith("record: ") and "INCOMPLETE: the run did not end" in lines
    )
    text = "\n".join(lines)
    assert text.count("failed: tests/ops") == 3 and "failed: 37 more" in text
    assert ("more cases" in text) == (copies > 1)
    hosts = "triton 70.0 us (bar 60 us MISSED), cuda 20.0 us (bar 45 us met)"
    assert f"benchmark kcenter: passed (1.0 s); host at most: {hosts}" in text
    first = next(line for line in lines if "b1-n576-d1024-bfloat16" in line)
    assert "cuda 800 us, 2 % of floor, 2.50x faster than loop, host 20.0 us; peer 0 crashed: SIGABRT" in first
    if copies == 1:
        assert sum(line.startswith("  ") for line in lines) == sum(
            len(o["cases"]) for o in document["operators"].values()
        )


@pytest.mark.parametrize("space", spaces.SPACES, ids=lambda space: space.name)
def test_spaces_name_what_is_there(space):
    operator = OPERATORS[space.operator]
    assert [case.name for case in operator.select(space.case, torch.device("cuda"))] == [space.case]
    assert len(space.candidates) == len({tune.label(config) for config in space.candidates}) >= 3
    for target in (space.target, *space.rehearsal[:1]):
        now = target.current()
        assert all(set(config) <= set(now) for config in space.candidates)
        with target.use(now | space.candidates[0]):
            assert {**now, **space.candidates[0]} == target.current()
        assert target.current() == now and target.name in target.text(now)


def test_overrides_tell_whether_they_were_read(monkeypatch):
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
        return {"label": label, "status": status, "reason": "because", "config": config} | (
            {"median_s": median} if median else {}
        )

    today, wrong = entry(tune.TODAY, median=4e-4), entry("X=1", "WRONG")
    faster, as_fast = entry("X=2", median=3e-4, config={"X": 2}), entry("X=3", median=3.95e-4, config={"X": 3})
    known = {"candidates": [today, wrong, faster, as_fast], "final": []}
    assert tune.verdict(known) == ("passed", "X=2: 300 us, was 400 us (3 ok, 1 WRONG)", {"X": 2})
    assert tune.verdict(known | {"final": [[tune.TODAY, 3e-4], ["X=2", 2.99e-4]]})[2] is None
    assert tune.verdict(known | {"candidates": [today, as_fast]})[2] is None
    assert tune.verdict(known | {"candidates": [entry(tune.TODAY, "failed"), faster]})[0] == "failed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OPERATORS)
def test_tiny_cases_on_cuda(name, capsys):
    peers = ",".join(peer for peer in OPERATORS[name].peers if peer not in ("compiled", "flex"))
    assert command.main(["ops", name, "--cases", "tiny", "--peers", peers, "--seconds", "5"]) == 0
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
