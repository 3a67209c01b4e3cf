"""The adaptive selector: tokens of the largest logits, or its own mask."""

import json

import pytest
import torch

from pruneops.methods import Image, from_json
from pruneops.methods.selector import Selector, selector_mask, selector_scores
from pruneops.networks import RateClassifier, SelectorNetwork, save
from tests.contract import assert_same_bits
from tests.methods.oracles import descending

pytestmark = pytest.mark.usefixtures("backend")
WIDTH = 12


def network(seed=0, **settings):
    torch.manual_seed(seed)
    made = SelectorNetwork(**{"features": WIDTH, "width": 16, "layers": 2, "heads": 2, **settings}).eval()
    with torch.no_grad():
        for layer in made.layers:
            layer.q_proj.weight.mul_(4)
        made.head.weight.mul_(8)
    return made.requires_grad_(False)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "selector.safetensors"
    save(network(), path)
    return path


def features(*shape, seed=0):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_largest_logits(weights):
    x = features(3, 20)
    scores = selector_scores(network(), x)
    logits = network()(x)
    torch.testing.assert_close(scores, logits[..., 1] - logits[..., 0])
    for keep, k in ((1, 1), (7, 7), (0.25, 5), (19, 19), (1.0, 20), (50, 20)):
        chosen = Selector(weights=weights, keep=keep).select(Image(x))
        assert chosen.tolist() == [sorted(descending(row, k)) for row in scores]
        for row, own in zip(x, chosen):
            assert Selector(weights=weights, keep=keep).select(Image(row)).tolist() == own.tolist()


def test_order_matters(weights):
    """The network knows where tokens are: a permutation of them is another image."""
    x = features(20)
    scores = selector_scores(network(), x)
    assert not torch.allclose(selector_scores(network(), x.flip(0)).flip(0), scores, atol=1e-3)


def test_mask(weights):
    """Without `keep` as many tokens as the network would keep, which differs from image to image."""
    counts = set()
    for seed in range(6):
        x = features(20, seed=seed)
        chosen = Selector(weights=weights).select(Image(x))
        logits = network()(x[None])[0]
        assert chosen.tolist() == (logits[:, 1] > logits[:, 0]).nonzero().flatten().tolist()
        counts.add(len(chosen))
    assert len(counts) > 1 and max(counts) < 20
    each = Selector(weights=weights).select_each([Image(features(n, seed=n)) for n in (20, 0, 5)])
    assert each[1].tolist() == []
    assert each[2].tolist() == Selector(weights=weights).select(Image(features(5, seed=5))).tolist()


def test_mask_of_at_least_one_token(tmp_path):
    """The likeliest, where the network would drop all."""
    one = network()
    one.head.bias.copy_(torch.tensor([100.0, 0.0]))
    save(one, tmp_path / "w.safetensors")
    x = features(20)
    best = int(selector_scores(one, x).argmax())
    assert Selector(weights=tmp_path / "w.safetensors").select(Image(x)).tolist() == [best]
    assert selector_mask(torch.tensor([[-3.0, -1.0, -1.0], [2.0, 0.0, 1.0]])).tolist() == [
        [False, True, False],
        [True, False, True],
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(weights, dtype):
    """The network runs in the dtype of the features."""
    x = features(20).to(dtype)
    half = network().to(dtype)
    expected = (half(x[None])[0].float() @ torch.tensor([-1.0, 1.0])).tolist()
    assert selector_scores(half, x).dtype == torch.float32
    assert selector_scores(half, x).tolist() == pytest.approx(expected, rel=1e-3)
    for keep in (5, None):
        chosen = Selector(weights=weights, keep=keep).select(Image(x))
        exact = Selector(weights=weights, keep=keep).select(Image(x.float()))
        assert chosen.dtype == torch.int64 and len(set(chosen.tolist()) ^ set(exact.tolist())) <= 4
    assert Selector(weights=weights, keep=5).select(Image(x)).shape == (5,)


def test_budget(weights):
    assert [Selector(weights=weights, keep=0.25).budget(n) for n in (0, 1, 20)] == [0, 1, 5]
    assert [Selector(weights=weights).budget(n) for n in (0, 1, 20)] == [0, 1, 20]  # the most that it can keep
    assert Selector(weights=weights, keep=3).after_projector and Selector(weights=weights).after_projector
    assert Selector(weights=weights, keep=3).layers(4) == ()
    for method in (Selector(weights=weights), Selector(weights=weights, keep=3)):
        with pytest.raises(ValueError, match="Selector: tokens must be an int of at least 0"):
            method.budget(-1)


def test_json(weights):
    for keep in (0.25, 7, None):
        method = Selector(weights=weights, keep=keep)
        text = method.to_json()
        assert json.loads(text) == {"schema": 1, "method": "selector", "keep": keep, "weights": str(weights)}
        assert from_json(text) == method and hash(from_json(text)) == hash(method)
    assert from_json(json.dumps({"schema": 1, "method": "selector", "weights": "w"})) == Selector(weights="w")


def test_gradients_and_inference_mode(weights):
    x = features(20).requires_grad_()
    with torch.inference_mode():
        inside = Selector(weights=weights, keep=5).select(Image(x))
    assert Selector(weights=weights, keep=5).select(Image(x)).tolist() == inside.tolist()
    assert not selector_scores(network(), x).requires_grad


def test_autocast(weights):
    x = features(20)
    expected = selector_scores(network(), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(selector_scores(network(), x), expected)
        assert Selector(weights=weights).select(Image(x)).tolist() == (expected > 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("keep", [True, 0, 0.0, 1.5, -1, "0.5"])
def test_values_that_are_refused(keep):
    with pytest.raises(ValueError, match="Selector: keep must be a share"):
        Selector(weights="w", keep=keep)


@pytest.mark.parametrize("weights", [None, 7, "", ["w"]])
def test_weights_that_are_no_path(weights):
    with pytest.raises(ValueError, match="Selector: weights must be a path, got"):
        Selector(weights=weights, keep=1)


def test_refusals(weights, tmp_path):
    for keep in (5, None):
        with pytest.raises(ValueError, match=r"selector_scores: features must be 12 wide, as its weights, got 8 wide"):
            Selector(weights=weights, keep=keep).select(Image(torch.ones(20, 8)))
        with pytest.raises(ValueError, match="features must be float32, float16 or bfloat16 of shape"):
            Selector(weights=weights, keep=keep).select(Image(torch.ones(20)))
        with pytest.raises(ValueError, match="cls_attention must be float of shape"):
            Selector(weights=weights, keep=keep).select(Image(features(20), torch.ones(3)))
    with pytest.raises(ValueError, match=r"Selector: image\.features must be of shape \[n, D\]: masks differ in size"):
        Selector(weights=weights).select(Image(features(2, 20)))
    with pytest.raises(ValueError, match=r"weights .*none cannot be read"):
        Selector(weights=tmp_path / "none", keep=5).select(Image(features(20)))
    save(RateClassifier(keeps=(0.5,), rates=2, heads=2, layer=1), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds 'dyrate' of schema 1; expected a 'selector' file"):
        Selector(weights=tmp_path / "other.safetensors", keep=5).select(Image(features(20)))


def test_weights_are_read_when_needed(tmp_path):
    """All tokens are kept without a look at them."""
    method = Selector(weights=tmp_path / "later.safetensors", keep=30)
    assert method.select(Image(features(20))).tolist() == list(range(20))
    save(network(), tmp_path / "later.safetensors")
    assert len(method.select(Image(features(40)))) == 30
