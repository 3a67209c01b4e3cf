"""The benchmark harness, on cases too small to mean anything: timings are never asserted."""

import dataclasses
import functools
import json
import platform
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pruneops

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import gpu, harness, machine, registry, report  # noqa: E402
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
    options = ["--backends", "reference", "--peers", ",".join(peers), "--seconds", "1", "--out", str(out)]
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
def test_gpu_run_without_a_gpu_says_so():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "benchmarks.gpu: PyTorch sees no GPU here; nothing was run\n"


def test_gpu_rehearsal_records_skips_as_skips(tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--stages", "build,tests,sanitize", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    stages = {stage["name"]: stage["status"] for stage in document["stages"]}
    assert document["complete"] and stages["build"] == "passed"
    assert all(stages[name] == "skipped" for name in ("tests", *gpu.TOOLS))
    assert "| memcheck | skipped |" in path.with_suffix(".md").read_text()


def test_gpu_stages_that_fail_cost_only_themselves(tmp_path, monkeypatch, capsys):
    sleep = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    monkeypatch.setattr(gpu, "build", lambda run, limit: gpu.launch(sleep, min(limit, 1)))
    monkeypatch.setattr(gpu, "tests", lambda run, limit: 1 / 0)
    monkeypatch.setattr(gpu, "sanitize", lambda tool, run, limit: ("not found", "no tool", {}))
    assert gpu.main(["--device", "cpu", "--stages", "build,tests,sanitize", "--results", str(tmp_path)]) == 1
    stages = json.loads(next(tmp_path.glob("*.json")).read_text())["stages"]
    assert [stage["status"] for stage in stages] == ["out of time", "failed"] + ["not found"] * 5
    assert "begun" in stages[0]["output"] and "division" in stages[1]["words"]


def test_gpu_operators_share_the_time_those_with_goals_first(tmp_path, monkeypatch, capsys):
    assert set(gpu.SHARES) == set(OPERATORS)
    limits = {}

    def idle(name, run, limit):
        limits[name] = limit
        return "passed", "", {}

    monkeypatch.setattr(gpu, "operators", idle)
    options = ["--device", "cpu", "--stages", "operators", "--results", str(tmp_path), "--seconds", "100"]
    assert gpu.main(options) == 0
    assert list(limits)[:3] == ["kcenter", "attention_mass", "exclusive_bottomk"]
    assert limits["kcenter"] == pytest.approx(100 * 6 / 27, abs=1)
    assert list(limits.values())[-1] == pytest.approx(100, abs=3)  # all that the others left


@pytest.mark.parametrize(
    "prints, status, ended",
    [
        ("a: ok\n========= ERROR SUMMARY: 0 errors", 0, "passed"),
        ("a: ok\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "passed"),
        ("a: ok\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", 0, "failed"),
        ("a: ok\n========= ERROR SUMMARY: 2 errors", gpu.FOUND, "failed"),
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
    assert gpu.sanitize("memcheck", run, 20)[0] == ended


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
