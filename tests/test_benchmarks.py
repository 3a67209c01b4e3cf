"""The benchmark harness, on cases too small to mean anything: timings are never asserted."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import gpu, harness, machine, registry, report  # noqa: E402

CPU = torch.device("cpu")
KCENTER = registry.operator("kcenter")
TINY = KCENTER.select("tiny", CPU)[0]
CEILINGS = machine.Ceilings(copy=1e10, matmul={torch.float32: 1e11})
CHEAP = ["ops", "kcenter", "--device", "cpu", "--cases", "tiny", "--backends", "reference"]


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    """Skip the half second that measuring the rates takes."""
    monkeypatch.setattr(machine, "ceilings", lambda device, dtypes: CEILINGS)


def farthest_in_reverse(arguments):
    """A wrong answer of the right shape."""
    chosen = KCENTER.call(arguments)
    return type(chosen)(torch.cat([chosen.indices[:, :1], chosen.indices[:, 1:].flip(-1)], -1), chosen.radii)


def test_table_and_json_hold_everything(tmp_path, capsys):
    out = tmp_path / "run.json"
    assert command.main([*CHEAP, "--peers", "loop,loop_item,n_by_n", "--seconds", "5", "--out", str(out)]) == 0
    table = capsys.readouterr().out
    for words in (TINY.shape, "reference", "loop_item", "n_by_n", "% of floor", "vs loop", "10/10", "floors from"):
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
        assert entry["check"]["agree_with_reference"] == entry["check"]["choices"] == 10
        assert set(entry["ratios"]) == {"loop", "loop_item", "n_by_n"} - {entry["name"]}


def test_wrong_backend_gets_no_ratio(monkeypatch, capsys):
    wrong = dataclasses.replace(KCENTER, call=farthest_in_reverse)
    monkeypatch.setattr(registry, "operator", lambda name: wrong)
    assert command.main([*CHEAP, "--peers", "loop", "--seconds", "5"]) == 1
    streams = capsys.readouterr()
    assert "WRONG" in streams.out and "faster" not in streams.out and "slower" not in streams.out
    assert "backend reference: WRONG" in streams.err


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


def test_what_does_not_fit_the_time_is_shown(capsys):
    slow = machine.Ceilings(copy=1e3, matmul={torch.float32: 1e11})
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


def test_turns_alternate():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = harness.take_turns(calls, machine.Clock(CPU), 0)
    assert order == list("abc") * harness.LEAST_TURNS
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


def test_every_sanitized_shape_is_right():
    assert all(passed for _, passed in KCENTER.sanitize(CPU))


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
def test_tiny_case_on_cuda(capsys):
    peers = "loop,loop_item,graph,n_by_n"
    assert command.main(["ops", "kcenter", "--cases", "tiny", "--peers", peers, "--seconds", "10"]) == 0
    assert "graph" in capsys.readouterr().out
