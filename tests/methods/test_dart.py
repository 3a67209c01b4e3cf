"""DART: pivots, turns and counts against its definition, after the paper and after the public code."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from pruneops.methods import DART, dart_budget, dart_select
from tests.contract import assert_same_bits
from tests.methods.oracles import cosine, descending, finite, hard_tokens, prompt

pytestmark = pytest.mark.usefixtures("backend")


def dart(features, norms, k, text=(), text_norms=(), image_pivots=4, text_pivots=4, compat="paper"):
    """The definition in loops, on lists of vectors and of norms; ascending."""
    n, pivots = len(features), image_pivots + text_pivots
    order, text_order = descending(torch.tensor(norms), n), descending(torch.tensor(text_norms), len(text_norms))
    kept = min(n, k if compat == "paper" else image_pivots + pivots * (k // pivots))
    from_image = order[: min(image_pivots, kept)]
    from_text = [t for t in text_order if text_norms[t] != -math.inf][:text_pivots]
    turns = [(norms[i], features[i]) for i in from_image] + [(text_norms[t], text[t]) for t in from_text]
    turns = [turns[i][1] for i in descending(torch.tensor([norm for norm, _ in turns]), len(turns))]
    turns += [features[order[0]]] * (len(from_image) + text_pivots - len(turns))
    taken, rest = set(from_image), kept - len(from_image)
    for turn, pivot in enumerate(turns):
        quota = rest // len(turns) + (turn < rest % len(turns)) if compat == "paper" else k // pivots
        for _ in range(min(quota, kept - len(taken))):
            best = None
            for token in set(range(n)) - taken:
                usable = finite(features[token]) and finite(pivot)
                key = (not usable, cosine(features[token], pivot) if usable else 0, token)
                best = key if best is None or key < best else best
            taken.add(best[2])
    return sorted(taken)


@pytest.mark.parametrize("compat", ["paper", "official"])
@pytest.mark.parametrize("tokens, text_tokens", [(1, 0), (3, 2), (9, 6), (30, 5), (30, 0)])
def test_selection(compat, tokens, text_tokens):
    generator = torch.Generator().manual_seed(tokens + text_tokens)
    x, text = hard_tokens((2, tokens, 16), seed=tokens), hard_tokens((2, text_tokens, 16), seed=100 + text_tokens)
    norms = torch.randint(0, 6, (2, tokens), generator=generator).float()
    text_norms = torch.randint(0, 6, (2, text_tokens), generator=generator).float()
    if tokens > 4:
        norms[:, 2] = torch.nan
    if text_tokens > 4:
        text_norms[:, 4] = torch.inf
        text_norms[0, :2] = -torch.inf  # padding
    options = dict(image_pivots=3, text_pivots=4, compat=compat)
    for k in {1, min(2, tokens), (tokens + 1) // 2, max(tokens - 1, 1), tokens}:
        chosen = dart_select(x, norms, k, text=text, text_norms=text_norms, **options)
        cases = list(zip(x, norms, text, text_norms))
        lists = [[part.double().tolist() for part in case] for case in cases]
        assert chosen.dtype == torch.int64
        assert chosen.tolist() == [dart(f, n, k, t, m, **options) for f, n, t, m in lists]
        assert chosen.shape == (2, dart_budget(k, tokens, 3, 4, compat))
        for (f, n, t, m), row in zip(cases, chosen):
            assert_same_bits(dart_select(f, n, k, text=t, text_norms=m, **options), row)
        if text_tokens == 0:
            assert_same_bits(dart_select(x, norms, k, **options), chosen)


def test_text_pivots_alone():
    x, text = hard_tokens((12, 16)), hard_tokens((3, 16), seed=1)
    norms, text_norms = torch.arange(12.0), torch.tensor([1.0, 3, 2])
    chosen = dart_select(x, norms, 6, text=text, text_norms=text_norms, image_pivots=0, text_pivots=2)
    lists = [part.double().tolist() for part in (x, norms)], [part.double().tolist() for part in (text, text_norms)]
    assert chosen.tolist() == dart(*lists[0], 6, *lists[1], 0, 2)


def test_counts():
    """Exactly k after the paper; 196, 132 and 68 after the public code, which counts image pivots twice."""
    x, text = torch.randn(576, 16, generator=torch.Generator().manual_seed(0)), torch.ones(6, 16)
    for k, official in ((192, 196), (128, 132), (64, 68), (100, 100), (7, 4), (576, 576), (570, 572)):
        for compat, count in (("paper", k), ("official", official)):
            chosen = dart_select(x, x[:, 0].abs(), k, text=text, text_norms=text[:, 0], compat=compat)
            assert len(chosen) == len(set(chosen.tolist())) == count == DART(keep=k, compat=compat).budget(576)


def test_shares_of_the_public_code():
    """n * share // 8, not rounded before; in exact arithmetic."""
    for n, share in itertools.product((1, 5, 576, 577, 2880, 1234), ("0.5", "0.222", "0.1", "0.35", "0.999")):
        kept = DART(keep=float(share), compat="official").budget(n)
        assert kept == min(n, 4 + 8 * (n * Fraction(share) // 8))
    assert DART(keep=0.222, compat="official").budget(576) == 124  # 127.9 tokens
    assert DART(keep=0.222).budget(576) == 128


def test_public_composition():
    """The public code on real values: per pivot the t lowest cosines among those left, pivots in order of norm."""
    generator = torch.Generator().manual_seed(0)
    x, norms = torch.randn(60, 8, generator=generator), torch.rand(60, generator=generator)
    image, text = x[:50], x[50:]
    pool = torch.nn.functional.normalize(x.double(), dim=-1)
    pivots = [*norms[:50].topk(4).indices.tolist(), *(norms[50:].topk(4).indices + 50).tolist()]
    keep, left = set(pivots[:4]), set(range(50)) - set(pivots[:4])
    for pivot in sorted(pivots, key=lambda i: -norms[i]):
        valid = sorted(left)
        lowest = (-pool[valid] @ pool[pivot]).topk(24 // 8).indices.tolist()
        keep |= {valid[i] for i in lowest}
        left -= keep
    chosen = dart_select(image, norms[:50], 24, text=text, text_norms=norms[50:], compat="official")
    assert chosen.tolist() == sorted(keep)


# In the decoder


def expected_ranks(method, row, hidden):
    """Ranks that `at_layer` must give, image by image."""
    norms = row.key.double().abs().sum((0, 2)).tolist()
    visual, hidden, ranks = row.visual.tolist(), hidden.double().tolist(), []
    for (start, end), size in zip(row.images, row.sizes):
        image = visual[start:end]
        after = [i for i in range(len(hidden)) if i > image[-1] and i not in visual]
        k = max(1, math.floor(method.keep * size + 0.5)) if isinstance(method.keep, float) else min(method.keep, size)
        parts = [[hidden[i] for i in image], [norms[i] for i in image]]
        text = [[hidden[i] for i in after], [norms[i] for i in after]]
        ranks += [start + i for i in dart(*parts, k, *text, compat=method.compat)]
    return ranks


@pytest.mark.parametrize("images", [[20], [20, 1, 9], [9, 30]], ids=str)
@pytest.mark.parametrize("keep", [0.5, 12])
def test_prompt(images, keep):
    row = prompt(images)
    row = row._replace(hidden=hard_tokens(row.hidden.shape, seed=3))
    method = DART(keep=keep)
    kept = method.at_layer(2, row, 4)
    assert kept.tolist() == expected_ranks(method, row, row.hidden)
    assert len(kept) == sum(map(method.budget, images))


def test_prompt_of_the_public_code():
    """Cosines after the final norm, which changes directions."""
    row = prompt([26, 10], seed=1)._replace(norm=lambda x: x * torch.arange(16) ** 2)
    method = DART(keep=16, compat="official")
    kept = method.at_layer(2, row, 4)
    assert kept.tolist() == expected_ranks(method, row, row.hidden * torch.arange(16) ** 2)
    assert len(kept) == 20 + 10
    for keep, counts in ((0.3, [8 + 0, 8 + 0]), (16, [8 + 16, 10])):
        kept = DART(keep=keep, image_pivots=8, text_pivots=0, compat="official").at_layer(2, row, 4)
        assert [int((kept < 26).sum()), int((kept >= 26).sum())] == counts


def test_budgets_count_from_the_first_size():
    row = prompt([20, 9], sizes=[40, 9])
    assert len(DART(keep=0.25).at_layer(2, row, 4)) == 10 + 2
    assert DART(keep=0.5).at_layer(2, prompt([20, 9], sizes=[40, 18]), 4) is None


def test_little_text():
    """Counts do not change where fewer text tokens follow than pivots are wanted."""
    for after in (0, 1, 3):
        row = prompt([20], after=after)
        for compat, count in (("paper", 17), ("official", 20)):
            method = DART(keep=17, compat=compat)
            kept = method.at_layer(2, row._replace(norm=torch.nn.Identity()), 4)
            expected = expected_ranks(method, row, row.hidden)
            assert (kept is None and count == 20) or kept.tolist() == expected
            assert len(expected) == count


def test_layers():
    method = DART(keep=0.5, layer=3)
    assert method.layers(4) == (3,) and not method.after_projector
    assert method.needs == {"key"} and DART(keep=0.5, compat="official").needs == {"key", "norm"}
    assert method.at_layer(2, prompt([9]), 4) is None
    with pytest.raises(ValueError, match=r"DART: layer must be one of the decoder's layers, 0 to 2, got 3"):
        method.layers(3)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=0), "k must be 1 to the 5 tokens, got 0"),
        (dict(k=6), "k must be 1 to the 5 tokens, got 6"),
        (dict(compat="code"), r"compat must be one of \('paper', 'official'\), got 'code'"),
        (dict(image_pivots=0, text_pivots=0), "image_pivots, text_pivots must be at least 0, together 1 to 64"),
        (dict(image_pivots=65), "together 1 to 64"),
        (dict(norms=torch.ones(4)), r"norms must be float of shape \[5\], got torch.float32 of shape \[4\]"),
        (dict(norms=torch.ones(5, dtype=torch.int64)), "norms must be float"),
        (dict(text=torch.ones(2, 3)), "text_norms must be given with text"),
        (dict(text=torch.ones(2, 4), text_norms=torch.ones(2)), r"text must be of shape \['m', 3\]|text must be of"),
        (dict(features=torch.ones(5)), "features must be float32"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(features=torch.ones(5, 3), norms=torch.ones(5), k=2) | change
    with pytest.raises(ValueError, match=r"pruneops\.methods\.dart_select: .*" + message):
        dart_select(**arguments)
