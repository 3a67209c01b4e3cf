"""Networks: their weight files, and layers that are equal to a decoder's."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pruneops.demo
from pruneops import networks
from pruneops.adapters.transformers import UnsupportedError
from pruneops.networks import RankingModel, RateClassifier, SelectorNetwork, load, rotated, save
from pruneops.training.data import decoder_inputs, encode
from pruneops.training.dtr import RankingConfig, from_decoder
from tests.adapters import tiny
from tests.contract import assert_same_bits

BASE = dict(layers=1, heads=4, key_heads=2, head_dim=8, hidden=24, bias=True)
NETWORKS = {
    "selector": (SelectorNetwork, dict(features=12, width=16, layers=2, heads=2)),
    "selector, width of the features": (SelectorNetwork, dict(features=16, width=16, layers=1, heads=4)),
    "dyrate": (RateClassifier, dict(keeps=(0.5, 0.25), rates=4, heads=2, layer=2)),
    "dtr": (RankingModel, dict(width=32, classes=5, base=BASE, cross=1, heads=4, mlp=3)),
    "dtr, no decoder layers": (RankingModel, dict(width=16, classes=2, cross=2, heads=4, mlp=1)),
}
SELECTOR = NETWORKS["selector"]


def made(kind, config, seed=0):
    torch.manual_seed(seed)
    network = kind(**config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name, tmp_path):
    kind, config = NETWORKS[name]
    network = made(kind, config)
    save(network, tmp_path / "w.safetensors")
    again = load(kind, tmp_path / "w.safetensors")
    assert type(again) is kind and not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert json.dumps(again.config) == json.dumps(network.config)
    expected, state = network.state_dict(), again.state_dict()
    assert expected.keys() == state.keys()
    for key, value in state.items():
        assert_same_bits(value, expected[key])
    assert os.listdir(tmp_path) == ["w.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype, tmp_path):
    network, path = made(*SELECTOR), tmp_path / "w.safetensors"
    save(network, path, torch.float16)
    state = network.state_dict()
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    for name, value in load(SelectorNetwork, path, dtype=dtype).state_dict().items():
        assert_same_bits(value, state[name].half().to(dtype))
    x = torch.randn(2, 5, 12, dtype=dtype)
    expected = network.half().to(dtype)(x)
    assert expected.dtype == dtype
    assert_same_bits(load(SelectorNetwork, path, dtype=dtype)(x), expected)


def test_cache(tmp_path):
    """A file is read once, and again when it has changed."""
    path = tmp_path / "w.safetensors"
    save(made(*SELECTOR), path)
    first = load(SelectorNetwork, path)
    assert load(SelectorNetwork, str(path)) is first
    assert load(SelectorNetwork, path, dtype=torch.float16) is not first
    changed = made(*SELECTOR, seed=1)
    save(changed, path)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
    again = load(SelectorNetwork, path)
    assert again is not first
    assert_same_bits(again.head.weight, changed.head.weight)


def test_load_in_inference_mode(tmp_path):
    """The cached network can be used outside of it too."""
    save(made(*SELECTOR), tmp_path / "w.safetensors")
    with torch.inference_mode():
        network = load(SelectorNetwork, tmp_path / "w.safetensors")
    x = torch.randn(1, 3, 12, requires_grad=True)
    network(x).sum().backward()
    assert x.grad.abs().sum() > 0


def written(path, state=None, **about):
    """A file of the selector with other tensors or facts; None leaves one out."""
    network = made(*SELECTOR)
    facts = {"pruneops": "selector", "schema": "1", "config": json.dumps(network.config), **about}
    facts = {name: value for name, value in facts.items() if value is not None}
    state = network.state_dict() if state is None else state(network.state_dict())
    save_file(state, path, facts)


def change(**changes):
    def apply(state):
        state = state | {name.replace("_", "."): value for name, value in changes.items()}
        return {name: value for name, value in state.items() if value is not None}

    return apply


FOREIGN = Path(pruneops.demo.__file__).parent / "weights" / "model.safetensors"
REFUSED = {
    "empty": (lambda path: path.write_bytes(b""), "no safetensors file"),
    "text": (lambda path: path.write_text("weights " * 100), "no safetensors file"),
    "cut off": (lambda path: (written(path), path.write_bytes(path.read_bytes()[:-9])), "no safetensors file"),
    "folder": (lambda path: path.mkdir(), "no safetensors file"),
    "foreign": (lambda path: path.write_bytes(FOREIGN.read_bytes()), "not written by pruneops"),
    "another network": (
        lambda path: save(made(*NETWORKS["dyrate"]), path),
        "holds 'dyrate' of schema 1",
    ),
    "another schema": (lambda path: written(path, schema="2"), "holds 'selector' of schema 2"),
    "no schema": (lambda path: written(path, schema=None), "holds 'selector' of schema None"),
    "missing tensor": (lambda path: written(path, change(head_bias=None)), r"do not fit .*head\.bias"),
    "extra tensor": (lambda path: written(path, change(head_more=torch.ones(2))), r"do not fit .*head\.more"),
    "misshapen tensor": (lambda path: written(path, change(head_bias=torch.ones(3))), r"do not fit .*head\.bias"),
    "no configuration": (lambda path: written(path, config=None), "do not fit .*config"),
    "configuration that is no JSON": (lambda path: written(path, config="{"), "do not fit"),
    "configuration that is a list": (lambda path: written(path, config="[1]"), "do not fit"),
    "unknown setting": (lambda path: written(path, config='{"depth": 1}'), "do not fit .*depth"),
    "setting of another type": (
        lambda path: written(path, config='{"features": "a", "width": 16, "layers": 2, "heads": 2}'),
        "do not fit",
    ),
    "no heads": (
        lambda path: written(path, config='{"features": 12, "width": 16, "layers": 2, "heads": 0}'),
        "do not fit",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(name, tmp_path):
    path = tmp_path / "w.safetensors"
    write, reason = REFUSED[name]
    write(path)
    expected = rf"pruneops: weights {re.escape(str(path))}: .*{reason}.*; expected a 'selector' file that `python -m"
    with pytest.raises(ValueError, match=expected) as error:
        load(SelectorNetwork, path)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=rf"weights {re.escape(str(tmp_path))}/none cannot be read: No such file"):
        load(SelectorNetwork, tmp_path / "none")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """If writing fails the old file is still there, and no other."""
    path = tmp_path / "w.safetensors"
    save(made(*SELECTOR), path)
    before = path.read_bytes()

    def fail(*_):
        assert path.read_bytes() == before  # nothing has been written into it
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(networks.os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save(made(*SELECTOR, seed=1), path)
    assert path.read_bytes() == before
    write = Path.write_bytes

    def half(self, content):
        write(self, content[: len(content) // 2])
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="disk full"):
            save(made(*SELECTOR, seed=1), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
def test_layers_of_the_ranking_model(loaded, examples, count):
    """They compute what the decoder's first layers do."""
    model, processor = loaded
    batch = decoder_inputs(model, encode(processor, examples))
    network = from_decoder(model.get_decoder(), RankingConfig(base_layers=count, heads=4)).eval()
    assert len(network.layers) == count
    states = model.get_decoder()(
        inputs_embeds=batch.embeds, position_ids=batch.positions, attention_mask=batch.valid.long(),
        use_cache=False, output_hidden_states=True,
    ).hidden_states  # fmt: skip
    hidden = batch.embeds
    for layer, expected in zip(network.layers, states[1:]):
        hidden = layer(hidden, batch.rotary, causal=True)
        torch.testing.assert_close(hidden[batch.valid], expected[batch.valid], rtol=1e-5, atol=1e-5)


def test_settings_of_the_ranking_model(loaded):
    model, _ = loaded
    network = from_decoder(model.get_decoder(), RankingConfig(base_layers=99, ranks=5))
    assert len(network.layers) == 4 and network.config["classes"] == 6  # no more layers than there are
    assert network.config["base"]["bias"] == (model.config.model_type == "qwen2_5_vl")
    assert len(from_decoder(model.get_decoder(), RankingConfig(base_layers=0)).layers) == 0
    assert from_decoder(model.get_decoder(), RankingConfig(two_classes=True)).config["classes"] == 2


def test_layers_of_other_decoders_are_refused():
    model, _ = tiny.model_of("glm4v")
    with pytest.raises(UnsupportedError, match=r"none of Llama's or Qwen2's.*set base_layers to 0"):
        from_decoder(model.get_decoder(), RankingConfig())


def test_ranking_model_without_rotary():
    network = made(*NETWORKS["dtr"])
    hidden, visual, text = torch.ones(1, 3, 32), torch.tensor([[1]]), torch.tensor([[True, False, True]])
    with pytest.raises(ValueError, match="RankingModel: rotary must be given: it has decoder layers"):
        network(hidden, visual, text, None)


@torch.no_grad()
def test_padding_changes_no_logit_of_the_ranking_model():
    network, generator = made(*NETWORKS["dtr"]).eval(), torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 32, generator=generator)
    rotary = tuple(torch.randn(2, 9, 8, generator=generator) for _ in range(2))
    visual = torch.tensor([[2, 3, 4], [1, 2, 5]])
    text = torch.ones(2, 9, dtype=torch.bool).scatter(1, visual, False)
    text[1, 6:] = False
    both = network(hidden, visual, text, rotary)
    one = network(hidden[1:, :6], visual[1:], text[1:, :6], tuple(part[1:, :6] for part in rotary))
    torch.testing.assert_close(both[1:], one)
    layer = network.cross[0]
    tokens = torch.randn(2, 3, 32, generator=generator)
    assert_same_bits(layer(tokens, hidden, torch.zeros_like(text)), tokens)  # no text at all


def test_rotary_embedding_of_some_features():
    """The first Dr features turn in pairs (i, i + Dr / 2), the others stay."""
    generator = torch.Generator().manual_seed(0)
    x, angle = torch.randn(2, 3, 5, 8, generator=generator), torch.randn(2, 5, 2, generator=generator)
    both = torch.cat([angle, angle], -1)
    out = rotated(x, (both.cos(), both.sin()))
    assert_same_bits(out[..., 4:], x[..., 4:])
    for i in range(2):
        turned = torch.complex(x[..., i], x[..., i + 2]) * torch.polar(torch.ones(()), angle[:, None, :, i])
        torch.testing.assert_close(torch.complex(out[..., i], out[..., i + 2]), turned)
    assert rotated(x.bfloat16(), (both.cos(), both.sin())).dtype == torch.bfloat16
