"""DTR: one ranked list of the visual tokens, of which any budget is a prefix."""

import json

import pytest
import torch

import pruneops
from pruneops.methods import from_json
from pruneops.methods.dtr import DTR, dtr_logits, dtr_ranked, dtr_select
from pruneops.networks import RankingModel, SelectorNetwork, save
from tests.contract import assert_same_bits
from tests.methods.oracles import prompt

pytestmark = pytest.mark.usefixtures("backend")
WIDTH = 16  # of `prompt`
BASE = dict(layers=1, heads=4, key_heads=2, head_dim=8, hidden=24)


def network(seed=0, **settings):
    torch.manual_seed(seed)
    made = RankingModel(**{"width": WIDTH, "classes": 5, "base": BASE, "cross": 1, "heads": 4, **settings}).eval()
    with torch.no_grad():
        made.mlp[-1].weight.mul_(10)
    return made.requires_grad_(False)


def row_of(images, **settings):
    row = prompt(images, **settings)
    angle = torch.arange(len(row.hidden))[:, None] * torch.tensor([1.0, 0.1, 0.03, 0.01] * 2)
    return row._replace(query=None, key=None, rotary=(angle.cos(), angle.sin()))


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "dtr.safetensors"
    save(network(), path)
    return path


def logits_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ranked_list(logits):
    """The specification, over lists: rank p takes its most probable token that is left, in rounds. Tokens whose logits
    are not finite come last."""
    logits = logits.double()
    finite = [token for token, values in enumerate(logits) if values.isfinite().all()]
    broken = [token for token in range(len(logits)) if token not in finite]
    probability, chosen = logits.softmax(-1), []
    while len(chosen) < len(logits):
        rank = len(chosen) % (logits.shape[-1] - 1)
        left = [token for token in finite if token not in chosen] or [t for t in broken if t not in chosen][:1]
        chosen.append(max(left, key=lambda token: (float(probability[token, rank]), -token)))
    return chosen


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("broken", [(), (1, 4)])
def test_ranked_list(classes, broken):
    """Every budget's list is a prefix of the same permutation, alone and in a batch."""
    logits = logits_of(3, 11, classes).mul_(3)
    for token in broken:
        logits[1, token, 0] = torch.inf
        logits[2, token] = torch.nan
    expected = [ranked_list(row) for row in logits]
    assert all(sorted(row) == list(range(11)) for row in expected)
    for k in range(1, 12):
        ranked = dtr_ranked(logits, k)
        assert ranked.dtype == torch.int64
        assert ranked.tolist() == [row[:k] for row in expected]
        assert dtr_select(logits, k).tolist() == [sorted(row[:k]) for row in expected]
        for b in range(3):
            assert dtr_ranked(logits[b : b + 1], k)[0].tolist() == expected[b][:k]
            assert dtr_select(logits[b], k).tolist() == sorted(expected[b][:k])


def test_no_batch_dimension():
    logits = logits_of(11, 6)
    for k in (1, 5, 8, 11):
        assert dtr_ranked(logits, k).tolist() == dtr_ranked(logits[None], k)[0].tolist()


def test_ranks_of_the_operator():
    """Up to J the list is that of `assign_ranks`."""
    logits = logits_of(4, 30, 9)
    for k in (1, 4, 8):
        assert_same_bits(dtr_ranked(logits, k), pruneops.assign_ranks(logits, k))
    assert_same_bits(dtr_ranked(logits, 20)[:, :8], pruneops.assign_ranks(logits, 8))


def test_more_ranks_than_tokens():
    logits = logits_of(2, 4, 9)
    assert [sorted(row) for row in dtr_ranked(logits, 4).tolist()] == [[0, 1, 2, 3]] * 2
    with pytest.raises(ValueError, match="dtr_ranked: k must be 1 to the 4 tokens, got 5"):
        dtr_ranked(logits, 5)
    with pytest.raises(ValueError, match="dtr_ranked: k must be 1 to the 4 tokens, got 0"):
        dtr_ranked(logits, 0)


def test_ties():
    """The lowest index first."""
    for classes in (2, 4):
        assert dtr_ranked(torch.zeros(6, classes), 6).tolist() == list(range(6))
        assert dtr_select(torch.zeros(6, classes), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("classes", [2, 5])
def test_budgets_of_images(tmp_path, classes):
    """Each image of a prompt keeps its own share, counted before other pruning."""
    ranker, path = network(classes=classes), tmp_path / "w.safetensors"
    save(ranker, path)
    row = row_of([12, 5, 3], sizes=(12, 20, 3))
    logits = ranker(
        row.hidden[None], row.visual[None], ~torch.zeros(1, len(row.hidden)).bool().index_fill(1, row.visual, True),
        tuple(part[None] for part in row.rotary),
    )[0]  # fmt: skip
    torch.testing.assert_close(dtr_logits(ranker, row.hidden, row.visual, row.rotary), logits)
    for keep in (1, 2, 4, 9, 0.25, 0.5):
        method = DTR(weights=path, keep=keep)
        expected = []
        for (start, end), size in zip(row.images, row.sizes):
            k = min(method.budget(size), end - start)
            expected += [start + token for token in sorted(ranked_list(logits[start:end])[:k])]
        kept = method.at_layer(0, row, 8)
        assert kept.tolist() == expected


def test_layers(weights):
    method = DTR(weights=weights, keep=2)
    row = row_of([12])
    assert method.layers(8) == (0,) and not method.after_projector
    assert method.needs == {"rotary"}
    assert method.at_layer(1, row, 8) is None
    assert DTR(weights=weights, keep=12).at_layer(0, row, 8) is None
    assert DTR(weights="none", keep=12).at_layer(0, row, 8) is None  # without a look at the weights
    assert method.at_layer(0, row_of([]), 8) is None


def test_model_without_decoder_layers(tmp_path):
    """It reads no rotary embeddings."""
    ranker, row = network(base=None), row_of([12])
    logits = dtr_logits(ranker, row.hidden, row.visual, None)
    assert_same_bits(logits, dtr_logits(ranker, row.hidden, row.visual, row.rotary))
    save(ranker, tmp_path / "w.safetensors")
    kept = DTR(weights=tmp_path / "w.safetensors", keep=6).at_layer(0, row, 8)
    assert kept.tolist() == sorted(ranked_list(logits)[:6])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(weights, dtype):
    """The model runs in the dtype of the prompt; float32 rotary embeddings are converted."""
    row = row_of([20])
    half = row._replace(hidden=row.hidden.to(dtype))
    logits = dtr_logits(network().to(dtype), half.hidden, half.visual, half.rotary)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, dtr_logits(network(), row.hidden, row.visual, row.rotary), rtol=0.1, atol=0.1)
    kept = DTR(weights=weights, keep=7).at_layer(0, half, 8)
    assert kept.tolist() == sorted(ranked_list(logits)[:7])


def test_text_changes_the_list(weights):
    """The ranking depends on the question."""
    row = row_of([20])
    other = row.hidden.clone()
    other[row.visual[-1] + 1 :] *= -3
    logits = dtr_logits(network(), row.hidden, row.visual, row.rotary)
    assert not torch.allclose(dtr_logits(network(), other, row.visual, row.rotary), logits, atol=1e-3)


def test_autocast_and_inference_mode(weights):
    row = row_of([20])
    with torch.inference_mode():
        expected = DTR(weights=weights, keep=7).at_layer(0, row, 8).tolist()
    logits = dtr_logits(network(), row.hidden, row.visual, row.rotary)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(dtr_logits(network(), row.hidden, row.visual, row.rotary), logits)
        assert DTR(weights=weights, keep=7).at_layer(0, row, 8).tolist() == expected
    assert not dtr_logits(network(), row.hidden.clone().requires_grad_(), row.visual, row.rotary).requires_grad


def test_json(weights):
    for keep in (0.25, 7):
        method = DTR(weights=weights, keep=keep)
        assert json.loads(method.to_json()) == {"schema": 1, "method": "dtr", "keep": keep, "weights": str(weights)}
        assert from_json(method.to_json()) == method
    with pytest.raises(ValueError, match="weights must be given for dtr, got nothing"):
        from_json('{"schema": 1, "method": "dtr", "keep": 1}')


@pytest.mark.parametrize("keep", [None, True, 0, 0.0, 1.5, -1, "0.5"])
def test_values_that_are_refused(keep):
    with pytest.raises(ValueError, match="DTR: keep must be a share"):
        DTR(weights="w", keep=keep)


@pytest.mark.parametrize("weights", [None, 7, "", ["w"]])
def test_weights_that_are_no_path(weights):
    with pytest.raises(ValueError, match="DTR: weights must be a path, got"):
        DTR(weights=weights, keep=1)


def test_refusals(weights, tmp_path):
    row = row_of([12])
    method = DTR(weights=weights, keep=2)
    with pytest.raises(ValueError, match=r"DTR: row\.rotary must be given: this method reads it, got None"):
        method.at_layer(0, row._replace(rotary=None), 8)
    with pytest.raises(ValueError, match=r"DTR: row\.rotary must be cos and sin of shape \[20, Dr\]"):
        method.at_layer(0, row._replace(rotary=(row.rotary[0][:3], row.rotary[1])), 8)
    with pytest.raises(ValueError, match="dtr_logits: hidden must be 16 wide, as its weights, got 8 wide"):
        method.at_layer(0, row._replace(hidden=torch.ones(20, 8)), 8)
    with pytest.raises(ValueError, match=r"weights .*none cannot be read"):
        DTR(weights=tmp_path / "none", keep=2).at_layer(0, row, 8)
    save(SelectorNetwork(features=4, width=4, layers=1, heads=1), tmp_path / "other")
    with pytest.raises(ValueError, match="holds 'selector' of schema 1; expected a 'dtr' file"):
        DTR(weights=tmp_path / "other", keep=2).at_layer(0, row, 8)
