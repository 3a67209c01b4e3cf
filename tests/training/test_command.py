"""`python -m pruneops.training`: settings, and requests that are refused with one line."""

import dataclasses
import json
import re

import pytest
import transformers

from pruneops.training.__main__ import CONFIGS, main
from pruneops.training.loop import read_config
from pruneops.training.selector import SelectorConfig
from tests.adapters import tiny


@pytest.mark.parametrize("what", CONFIGS)
def test_settings(what, tmp_path, capsys):
    """Printed as JSON, which can be given back; a file changes those that it names."""
    assert main([what, "--settings"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {field.name for field in dataclasses.fields(CONFIGS[what])}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(printed))
    assert read_config(CONFIGS[what], path) == CONFIGS[what]()
    path.write_text('{"lr": 1, "steps": 7}')
    assert main([what, "--settings", "--config", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == printed | {"lr": 1.0, "steps": 7}


def test_types_of_settings(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"tau": [2.0, 0.5], "p": 1, "noise": false, "form": "annealed"}')
    config = read_config(SelectorConfig, path, lr=0.25)
    assert config == SelectorConfig(tau=(2.0, 0.5), p=1.0, noise=False, form="annealed", lr=0.25)
    assert isinstance(config.p, float)


CONFIG_ERRORS = [
    ("{", "--config .*config.json: .*"),
    ("[1]", "--config .*config.json: no JSON object"),
    ('{"learning_rate": 1}', "--config .*config.json: no setting 'learning_rate'; there are .*lr, "),
    ('{"lr": "1"}', "--config .*config.json: lr must be like 1e-05, got '1'"),
    ('{"steps": 1.5}', "--config .*config.json: steps must be like 1000, got 1.5"),
    ('{"steps": true}', "--config .*config.json: steps must be like 1000, got True"),
    ('{"noise": 1}', "--config .*config.json: noise must be like True, got 1"),
    ('{"tau": 1.0}', r"--config .*config.json: tau must be like \(1.0, 1.0\), got 1.0"),
    ('{"steps": 0}', "config: steps must be at least 1, got 0"),
    ('{"form": "hard"}', "config: form must be one of"),
    (None, "--config .*config.json: .*No such file"),
]


def refused(capsys, argv, message):
    """Exit status 2 and one line on stderr."""
    assert main([str(part) for part in argv]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line and "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("pruneops.training: ")
    assert re.search(message, lines[0]), lines[0]
    assert captured.out == ""


@pytest.mark.parametrize("text, message", CONFIG_ERRORS, ids=[str(text) for text, _ in CONFIG_ERRORS])
def test_configs_that_are_refused(folders, data, tmp_path, capsys, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    argv = ["selector", "--model", folders["llava"], "--data", data, "--out", tmp_path / "out", "--config", path]
    refused(capsys, argv, message)
    assert not (tmp_path / "out").exists()


def test_data_that_is_refused(folders, data, tmp_path, capsys):
    argv = ["selector", "--model", folders["llava"], "--out", tmp_path / "out", "--data"]
    refused(capsys, [*argv, tmp_path / "none.jsonl"], r"none\.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\n')
    refused(capsys, [*argv, tmp_path / "bad.jsonl"], r"bad\.jsonl, line 1: expected")
    (tmp_path / "latin.jsonl").write_bytes(b'{"image": "\xe9.png"}\n')
    refused(capsys, [*argv, tmp_path / "latin.jsonl"], r"latin\.jsonl")
    refused(capsys, [*argv, data], "held_out = 64 leaves no example of 8 to train on")
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_models_that_are_refused(folders, data, tmp_path, capsys):
    argv = ["dyrate", "--data", data, "--out", tmp_path / "out", "--model"]
    refused(capsys, [*argv, tmp_path / "none"], "--model .*none: no such folder")
    (tmp_path / "empty").mkdir()
    refused(capsys, [*argv, tmp_path / "empty"], "--model .*empty: ")
    config = transformers.LlamaConfig(**tiny.TEXT | {"num_hidden_layers": 1})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    capsys.readouterr()
    refused(capsys, [*argv, tmp_path / "llama"], "--model .*llama: Unrecognized configuration class")


@pytest.mark.parametrize("missing", ["--model", "--data", "--out"])
def test_arguments_that_are_missing(missing, capsys):
    argv = [part for name in ("--model", "--data", "--out") if name != missing for part in (name, "x")]
    with pytest.raises(SystemExit) as stopped:
        main(["dtr", *argv])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {missing} is required")


@pytest.mark.parametrize("argv", [["ranking"], [], ["dtr", "--dtype", "int8"], ["dtr", "--step", "3"]])
def test_arguments_that_are_unknown(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_only_the_search(folders, data, tmp_path, capsys):
    """Its lists are those that a training of dtr takes, without another search."""
    (tmp_path / "config.json").write_text(
        '{"ranks": 1, "examples": 3, "steps": 1, "held_out": 1, "base_layers": 0, "cross_layers": 1, "heads": 4}'
    )
    common = ["--model", folders["llava"], "--data", data, "--config", tmp_path / "config.json"]
    common = [str(part) for part in common]
    assert main(["search", *common, "--out", str(tmp_path / "found")]) == 0
    (shard,) = (tmp_path / "found" / "lists").iterdir()
    before = shard.stat()
    lists = ["--lists", str(tmp_path / "found" / "lists")]
    assert main(["dtr", *common, "--out", str(tmp_path / "out"), *lists]) == 0
    assert shard.stat().st_mtime_ns == before.st_mtime_ns and not (tmp_path / "out" / "lists").exists()
    assert (tmp_path / "out" / "weights.safetensors").exists()
