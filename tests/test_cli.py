"""The command line: `info`, `--version`, errors of one line."""

import json
import subprocess
import sys

import pytest
import torch

import pruneops
from pruneops import backends, cli


def run(capsys, *argv):
    """(exit status, stdout, stderr) of one command."""
    try:
        status = cli.main(list(argv))
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_info_json_holds_every_operator_and_backend(capsys):
    status, out, err = run(capsys, "info", "--json")
    record = json.loads(out)
    assert (status, err) == (0, "")
    assert record["version"] == pruneops.__version__ and record["torch"] == torch.__version__
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pruneops::")}
    assert {f"pruneops::{name}" for name in record["operators"]} == defined
    for device, serving in record["backends"].items():
        assert tuple(serving["problems"]) == backends.BACKENDS
        assert (serving["auto"] is None) == (device == "cuda" and not torch.cuda.is_available())
        if serving["auto"]:
            assert serving["problems"][serving["auto"]] is None
    assert record["backends"]["cpu"]["auto"] == ("reference" if backends.native_problem() else "cpu")
    assert len(record["gpus"]) == torch.cuda.device_count()


def test_info_gives_a_reason_for_each_backend_that_cannot_run(capsys):
    record = cli.info()
    status, out, _ = run(capsys, "info")
    assert status == 0 and all(f" {name}" in out for name in record["operators"])
    for serving in record["backends"].values():
        for name, problem in serving["problems"].items():
            assert problem is None or f"    {name}: {problem[0].upper()}{problem[1:]}." in out
    assert record["native"]["cpu"]["problem"] or record["native"]["cpu"]["instruction_set"] in out


def test_info_without_gpu_serves_no_cuda_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    serving = cli.info()["backends"]["cuda"]
    assert serving["auto"] is None and all(serving["problems"].values())


def test_info_does_not_use_up_the_warning_about_the_reference():
    before = backends._warn_reference.cache_info().currsize
    cli.info()
    assert backends._warn_reference.cache_info().currsize == before


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"pruneops {pruneops.__version__}\n", "")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["unknown"],
        ["info", "--unknown"],
        ["demo", "--keep", "0"],
        ["demo", "--keep", "1.5"],
        ["demo", "--keep", "-3"],
        ["demo", "--keep", "nan"],
        ["demo", "--keep", "much"],
        ["demo", "--seed", "-1"],
        ["demo", "--method", "fastest"],
        ["demo", "--metric", "cosine"],
        ["demo", "--backend", "opencl"],
    ],
)
def test_bad_arguments_give_one_line_and_status_2(capsys, argv):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("pruneops") and "error: " in err


def test_keep_is_a_count_or_a_fraction():
    assert cli._keep("288") == 288 and isinstance(cli._keep("1"), int)
    assert cli._keep("0.1") == 0.1 and isinstance(cli._keep("1.0"), float)


def test_info_in_a_process_of_its_own_imports_no_extras():
    code = (
        "import sys, pruneops.cli; s = pruneops.cli.main(['info']); print('transformers' in sys.modules); sys.exit(s)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr


def test_reader_that_goes_away_leaves_no_traceback():
    code = f"{sys.executable} -m pruneops.cli info --json | true"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
