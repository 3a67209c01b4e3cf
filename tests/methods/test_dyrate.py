"""DyRate: distributions and scores against the softmax in float64, rates, what is kept, steps of static shapes."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from pruneops import networks
from pruneops.methods import (
    DyRate,
    Method,
    Step,
    dyrate_compact_,
    dyrate_distribution,
    dyrate_keep,
    from_json,
)
from tests.host_sync import no_host_sync
from tests.methods.oracles import attention, descending, prompt
from tests.methods.weights import KEEPS, rate_classifier

HERE = "pruneops/methods"
WEIGHTS = rate_classifier(noise=1.0)
METHOD = DyRate(weights=WEIGHTS, keep=0.25)
RATES = 8


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(query, key, group):
    """(distribution [4 H], scores [S]) of one row in float64."""
    hidden = (group < 0).nonzero().flatten().tolist()
    weights = attention(query, key, hidden=hidden)[:, -1]
    parts = [sum(row[j] for j in range(len(row)) if group[j] == g) for row in weights for g in range(4)]
    return torch.tensor([float(part) for part in parts], dtype=torch.float64), weights.mean(0)


def kept(scores, alive, tokens, rate, rates):
    """Of one row: the flags of `dyrate_keep`, by sorting a list."""
    places = alive.nonzero().flatten()
    count = min(len(places), tokens - math.floor(tokens * rate / rates))
    flags = torch.zeros(len(scores), dtype=torch.bool)
    flags[places[descending(scores[places], count)]] = True
    return flags


GROUPS = torch.tensor([[0, 0, 1, 1, 1, 2, 1, 2, 2, 3, 3, 3], [-1, -1, -1, 0, 1, 1, 2, -1, 2, 3, 3, 3]])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distribution(dtype):
    """Of a batch with padding in front and in the middle, and of single rows; four numbers a head."""
    query, key = draw(2, 4, 1, 8).to(dtype), draw(2, 2, 12, 8, seed=1).to(dtype)
    distribution, scores = dyrate_distribution(query, key, GROUPS)
    assert distribution.shape == (2, 16) and distribution.dtype == scores.dtype == torch.float32
    for b in range(2):
        vector, attended = expected(query[b], key[b], GROUPS[b])
        torch.testing.assert_close(distribution[b].double(), vector, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scores[b].double(), attended, rtol=1e-5, atol=1e-6)
        single = dyrate_distribution(query[b], key[b], GROUPS[b])
        torch.testing.assert_close(single, (distribution[b], scores[b]))
    torch.testing.assert_close(distribution.unflatten(1, (4, 4)).sum(-1), torch.ones(2, 4))


def test_distribution_refuses_several_tokens():
    with pytest.raises(ValueError, match=r"dyrate_distribution: query must be of shape \[.., H, 1, Dh\], got of shape"):
        dyrate_distribution(draw(4, 2, 8), draw(2, 12, 8), GROUPS[0])


@pytest.mark.parametrize("seed", range(20))
def test_keep(seed):
    """Ties, scores that are not finite, and rows of which some tokens are gone already."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (6, 17), generator=generator).float()
    scores[torch.rand(6, 17, generator=generator) < 0.2] = torch.nan
    scores[torch.rand(6, 17, generator=generator) < 0.1] = torch.inf
    scores[torch.rand(6, 17, generator=generator) < 0.1] = -torch.inf
    alive = torch.rand(6, 17, generator=generator) < torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0, 1.0])[:, None]
    tokens = torch.tensor([0, 5, 9, 17, 17, 30])
    rate = torch.randint(0, RATES, (6,), generator=generator)
    with no_host_sync(HERE):
        flags = dyrate_keep(scores, alive, tokens, rate, RATES)
    for b in range(6):
        truth = kept(scores[b], alive[b], int(tokens[b]), int(rate[b]), RATES)
        assert flags[b].tolist() == truth.tolist()


def test_counts():
    """A rate of 0 keeps all, the last rate 1 / K of them, rounded up."""
    scores, alive = draw(1, 10), torch.ones(1, 10, dtype=torch.bool)
    counts = [int(dyrate_keep(scores, alive, torch.tensor([10]), torch.tensor([k]), 4).sum()) for k in range(4)]
    assert counts == [10, 8, 5, 3]


def test_never_more():
    """Whatever the rates, tokens only leave."""
    alive, tokens = torch.ones(3, 40, dtype=torch.bool), torch.full((3,), 40)
    for step in range(30):
        rate = torch.randint(0, RATES, (3,), generator=torch.Generator().manual_seed(step))
        left = dyrate_keep(draw(3, 40, seed=step), alive, tokens, rate, RATES)
        assert not (left & ~alive).any() and (left.sum(1) <= 40 - 40 * rate // RATES).all()
        assert torch.equal(dyrate_keep(draw(3, 40, seed=step), left, tokens, rate, RATES), left)
        alive = left


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": torch.ones(5)}, r"scores must be of shape \[B, S\], got of shape \[5\]"),
        ({"alive": torch.ones(2, 4).bool()}, r"alive must be of shape \[2, 5\], got of shape \[2, 4\]"),
        ({"tokens": torch.tensor(5)}, r"tokens must be of shape \[2\], got of shape \[\]"),
        ({"rate": torch.zeros(3).long()}, r"rate must be of shape \[2\], got of shape \[3\]"),
        ({"rates": 0}, "rates must be an int of at least 1, got 0"),
    ],
)
def test_keep_refuses(changes, message):
    arguments = {
        "scores": torch.ones(2, 5), "alive": torch.ones(2, 5).bool(), "tokens": torch.tensor([5, 5]),
        "rate": torch.tensor([0, 1]), "rates": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match="methods.dyrate_keep: " + message):
        dyrate_keep(**(arguments | changes))


# In prompts and steps


def rate_of(query, key, group, keep=0.25):
    network = networks.load(networks.RateClassifier, WEIGHTS, dtype=torch.float64)
    index = KEEPS.index(keep)
    vector, scores = expected(query, key, group)
    chances = (network.weight[index] @ vector + network.bias[index]).softmax(0)
    return round(sum(k * float(chance) for k, chance in enumerate(chances))), scores


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("images", [[20], [12, 1, 7], [3]], ids=str)
def test_prompt(images, keep):
    """The last token decides for all visual tokens together."""
    counts = set()
    for seed in range(12):
        row = prompt(images, seed=seed)
        group = torch.where(torch.arange(len(row.hidden)) > row.visual[0], 2, 0)
        group[row.visual] = 1
        rate, scores = rate_of(row.query[:, -1:], row.key, group, keep)
        ranks = DyRate(weights=WEIGHTS, keep=keep).at_layer(2, row, 4)
        tokens = len(row.visual)
        alive = torch.zeros(len(group)).index_fill(0, row.visual, 1).bool()
        truth = kept(scores, alive, tokens, rate, RATES)
        assert (row.visual if ranks is None else row.visual[ranks]).tolist() == truth.nonzero().flatten().tolist()
        assert (ranks is None) == (tokens * rate // RATES == 0)
        counts.add(int(truth.sum()))
    assert len(counts) > 1


def a_step(seed=0):
    alive = (GROUPS == 1) & torch.tensor([True] * 4 + [False] + [True] * 7)
    return Step(draw(2, 4, 1, 8, seed=seed), draw(2, 2, 12, 8, seed=seed + 50), GROUPS, alive, (GROUPS == 1).sum(1), 3)


@pytest.mark.usefixtures("backend")
def test_step():
    counts = set()
    for seed in range(12):
        step = a_step(seed)
        with no_host_sync(HERE):
            flags = METHOD.at_step(step)
        for b in range(2):
            rate, scores = rate_of(step.query[b], step.key[b], GROUPS[b])
            truth = kept(scores, step.alive[b], int(step.tokens[b]), rate, RATES)
            assert flags[b].tolist() == truth.tolist()
            counts.add(int(truth.sum()))
    assert len(counts) > 1


# Settings


def test_settings():
    assert isinstance(METHOD.weights, str) and DyRate(weights=str(WEIGHTS), keep=0.25) == METHOD
    assert METHOD.layers(4) == (2,) and METHOD.step_layer(4) == 2 and METHOD.budget(7) == 7
    assert not METHOD.after_projector and METHOD.needs == {"query", "key"}
    assert from_json(METHOD.to_json()) == METHOD == Method.from_json(METHOD.to_json())
    assert json.loads(METHOD.to_json()) == {"schema": 1, "method": "dyrate", "weights": str(WEIGHTS), "keep": 0.25}


@pytest.mark.parametrize("keep", [1, 0, 0.0, 1.0, -0.5, None, "0.5", True, float("nan")])
def test_bad_keep(keep):
    with pytest.raises(ValueError, match=r"DyRate: keep must be a share \(float\) in \(0, 1\), got"):
        DyRate(weights=WEIGHTS, keep=keep)


@pytest.mark.parametrize("weights", [None, 3, "", b"x"])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="DyRate: weights must be a path, got"):
        DyRate(weights=weights, keep=0.5)


def test_files_that_do_not_fit(tmp_path):
    """Found when the network is used first, not when the method is made."""
    with pytest.raises(ValueError, match=r"missing.safetensors cannot be read: No such file"):
        DyRate(weights=tmp_path / "missing.safetensors", keep=0.5).layers(4)
    other = tmp_path / "other.safetensors"
    networks.save(networks.SelectorNetwork(features=8, width=8), other)
    with pytest.raises(ValueError, match=r"holds 'selector'.*expected a 'dyrate' file"):
        DyRate(weights=other, keep=0.5).layers(4)
    with pytest.raises(ValueError, match=r"keep must be one that .*safetensors has: 0.25, 0.5, got 0.3"):
        DyRate(weights=WEIGHTS, keep=0.3).layers(4)
    layers = "one of the decoder.s layers"
    for count in (1, 2):
        with pytest.raises(ValueError, match=rf"safetensors must be for {layers} 1 to {count - 1}, got"):
            METHOD.layers(count)
    heads = DyRate(weights=rate_classifier(heads=8), keep=0.5)
    with pytest.raises(ValueError, match="must be for the decoder's 4 heads, got for 8"):
        heads.at_layer(2, prompt([4]), 4)
    with pytest.raises(ValueError, match=r"step\.query must be given: this method reads it, got None"):
        METHOD.at_step(a_step()._replace(query=None))


def test_a_path_is_stored_as_text():
    assert DyRate(weights=Path("a/b"), keep=0.5).weights == "a/b"


# Static shapes

B, HEADS, SLOTS, N = 3, 4, 48, 20  # slots of a cache; N visual tokens at most


def static_state(seed=0):
    """(key, group) of layer L - 1, (caches, places, lengths) of the layers from L on, visual tokens of each prompt."""
    lengths, tokens = torch.tensor([33, 40, 21]), torch.tensor([N, 13, 0])
    slots = torch.arange(SLOTS)
    group = torch.where(slots < 3, 0, torch.where(slots < 3 + tokens[:, None], 1, 2))
    group = torch.where(slots >= lengths[:, None] - 4, 3, group).masked_fill(slots >= lengths[:, None], -1)
    caches = [draw(B, heads, SLOTS, width, seed=seed + i) for i, (heads, width) in enumerate([(2, 8)] * 2 + [(1, 4)])]
    places = slots.repeat(B, 1)[:, None, :, None].clone()
    return draw(B, 2, SLOTS, 8, seed=seed + 9), group, caches, places, lengths, tokens


def static_step(network, query, key, group, caches, places, lengths, tokens):
    """One whole decision; `places` are the slots of layer L - 1 that the tokens of later layers have there."""
    distribution, scores = dyrate_distribution(query, key, group)
    rate = networks.expected_rate(network(distribution, 0))
    own = places[:, 0, :, 0]
    used = torch.arange(SLOTS, device=own.device) < lengths[:, None]
    alive = used & (group.gather(1, own) == 1)
    keep = dyrate_keep(scores.gather(1, own), alive, tokens, rate, RATES)
    return dyrate_compact_([*caches, places], keep | ~alive, lengths)


def modes():
    yield "as it is", lambda function: function
    for backend in ("eager", "aot_eager"):
        yield backend, lambda function, backend=backend: torch.compile(function, backend=backend, fullgraph=True)


@pytest.mark.parametrize("mode", dict(modes()))
def test_static_step(mode):
    """Whole steps, one after another on the same caches, leave the tokens that a loop over rows leaves."""
    torch._dynamo.reset()
    network = networks.load(networks.RateClassifier, WEIGHTS)
    run = dict(modes())[mode](static_step)
    key, group, caches, places, lengths, tokens = static_state()
    before, left = [cache.clone() for cache in caches], [torch.arange(int(n)) for n in lengths]
    counts = []
    with torch.no_grad():
        for seed in range(6):
            query = draw(B, HEADS, 1, 8, seed=70 + seed) * 2
            lengths = run(network, query, key, group, caches, places, lengths, tokens)
            for b in range(B):
                rate, scores = rate_of(query[b], key[b], group[b])
                alive = torch.zeros(SLOTS).index_fill(0, left[b], 1).bool() & (group[b] == 1)
                flags = kept(scores, alive, int(tokens[b]), rate, RATES) | (group[b] != 1)
                left[b] = left[b][flags[left[b]]]
                assert int(lengths[b]) == len(left[b]) and places[b, 0, : len(left[b]), 0].tolist() == left[b].tolist()
                for cache, old in zip(caches, before):
                    assert torch.equal(cache[b, :, : len(left[b])], old[b][:, left[b]])
            counts.append(lengths.tolist())
    assert len({tuple(count) for count in counts}) > 2


def test_static_step_reads_nothing():
    network = networks.load(networks.RateClassifier, WEIGHTS)
    state, query = static_state(), draw(B, HEADS, 1, 8)
    with no_host_sync(HERE), torch.no_grad():
        static_step(network, query, *state)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (query, *state))
        assert static_step(network, *fake).shape == (B,)


def test_compact():
    """Slots past the lengths are ignored and not written."""
    caches = [draw(2, 3, 6, 4), draw(2, 1, 6, 2).half()]
    before = [cache.clone() for cache in caches]
    keep = torch.tensor([[True, False, True, True, True, True], [False, True, False, True, True, False]])
    left = dyrate_compact_(caches, keep, torch.tensor([4, 6]))
    assert left.tolist() == [3, 3]
    for cache, old in zip(caches, before):
        assert torch.equal(cache[0, :, :3], old[0][:, [0, 2, 3]]) and torch.equal(cache[1, :, :3], old[1][:, [1, 3, 4]])
        assert torch.equal(cache[:, :, 3:], old[:, :, 3:])
