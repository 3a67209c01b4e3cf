"""ToDRE: pivots, stage 1 and stage 2 against their definitions."""

import pytest
import torch

from pruneops.methods import Image, ToDRE, todre_pivot, todre_ratios, todre_select, todre_select_varlen
from tests.contract import assert_same_bits
from tests.inputs import clustered
from tests.methods.oracles import attention, descending, farthest_first, hard_tokens, prompt

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("tokens", [1, 2, 7, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stage_1(tokens, dtype):
    x = hard_tokens((3, tokens, 16), seed=tokens).to(dtype)
    scores = torch.randint(0, 5, (3, tokens), generator=torch.Generator().manual_seed(tokens)).float()
    for k in {1, (tokens + 1) // 2, max(tokens - 1, 1), tokens}:
        chosen = ToDRE(keep=k).select(Image(x, scores))
        expected = [farthest_first(image, k, descending(score, 1)[0]) for image, score in zip(x, scores)]
        assert chosen.dtype == torch.int64 and chosen.tolist() == expected
        for image, score, row in zip(x, scores, chosen):
            assert_same_bits(ToDRE(keep=k).select(Image(image, score)), row)


def test_copies_are_not_chosen_twice():
    x = torch.ones(6, 4)
    assert ToDRE(keep=4).select(Image(x, torch.arange(6.0))).tolist() == [0, 1, 2, 5]


def test_prefix_of_the_paper():
    """k = 720 and 288 of 2880."""
    assert [ToDRE(keep=keep).budget(2880) for keep in (0.25, 0.1)] == [720, 288]


# Pivots


def test_pivot_of_an_image():
    attention = torch.tensor([[0.1, 0.4, 0.4, 0.2], [torch.nan, torch.inf, -1.0, -2.0]])
    assert todre_pivot(torch.ones(2, 4, 3), attention).tolist() == [1, 2]
    assert todre_pivot(torch.ones(4, 3), torch.full((4,), torch.nan)) == 0


def test_pivot_of_a_thumbnail():
    attention = torch.tensor([0.9, 0.1, 0.3, 0.3, 0.8])
    assert todre_pivot(torch.ones(5, 3), attention, thumbnail=(1, 4)) == 2
    x = hard_tokens((5, 16))
    chosen = ToDRE(keep=3).select(Image(x, attention, thumbnail=(1, 4)))
    assert chosen.tolist() == farthest_first(x, 3, 2)


def test_pivot_of_a_video():
    """The best token of each frame, then the best of those."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        attention = torch.randint(0, 6, (4, 5), generator=generator).float()
        best = [descending(frame, 1)[0] for frame in attention]
        frame = descending(torch.stack([frame[b] for frame, b in zip(attention, best)]), 1)[0]
        assert todre_pivot(torch.ones(20, 3), attention.flatten(), frames=4) == frame * 5 + best[frame]


def test_substitutes():
    """The norm, without attention or on request."""
    x = torch.tensor([[1.0, 0], [3, 4], [0, -5], [torch.nan, 9], [0, 3e38]])
    assert todre_pivot(x) == 1
    scores = torch.tensor([0.0, 0, 0, 1, 0])
    assert ToDRE(keep=1).select(Image(x)).tolist() == [1]
    assert ToDRE(keep=1).select(Image(x, scores)).tolist() == [3]
    assert ToDRE(keep=1, pivot="attention").select(Image(x, scores)).tolist() == [3]
    assert ToDRE(keep=1, pivot="norm").select(Image(x, scores)).tolist() == [1]
    with pytest.raises(ValueError, match=r'ToDRE: image.cls_attention must be given, or pivot "norm" or "auto"'):
        ToDRE(keep=1, pivot="attention").select(Image(x))


# Several images


@pytest.mark.parametrize("keep", [0.3, 4, 1.0])
def test_images_of_different_sizes(keep):
    """One packed call chooses what single calls choose."""
    images = [Image(hard_tokens((n, 16), seed=n), torch.arange(n) % 3.0) for n in (7, 0, 1, 12, 4)]
    images.append(Image(hard_tokens((10, 16), seed=9), None, frames=2))
    method = ToDRE(keep=keep)
    assert_same_bits(method.select_each(images), [method.select(image) for image in images])
    assert [len(indices) for indices in method.select_each(images)] == [method.budget(n) for n in (7, 0, 1, 12, 4, 10)]
    assert method.select_each([]) == []


def test_packed():
    x = clustered((20, 8))
    bounds, pivots = torch.tensor([0, 12, 20]), torch.tensor([3, 15])
    chosen = todre_select_varlen(x, bounds, [5, 2], pivots=pivots)
    single = todre_select(x[:12], 5, pivot=pivots[0]), todre_select(x[12:], 2, pivot=pivots[1] - 12) + 12
    assert_same_bits(chosen, torch.cat(single))


# Stage 2


def ratios(query, key, group):
    """Eq. 7 in loops."""
    weights, group = attention(query, key, hidden=[j for j, g in enumerate(group.tolist()) if g < 0]), group.tolist()

    def share(of, to):
        over = part = 0.0
        for i, one in enumerate(group):
            for j, other in enumerate(group):
                if one == of and not weights[:, i, j].isnan().any():
                    over += float(weights[:, i, j].sum())
                    part += float(weights[:, i, j].sum()) * (other == to)
        return part / over if over else 0.0

    return share(2, 1), share(1, 2)


@pytest.mark.parametrize(
    "group",
    [
        [0, 0, 1, 1, 1, 1, 2, 2, 2],
        [0, 1, 1, 2, 1, 1, 2, 2, 2],
        [1, 1, 2, 2, 1, 1, 1, 1, 1],
        [-1, -1, 0, 1, 1, 2, 1, 2, 2],
        [0, 0, 2, 2, 2, 2, 2, 2, 2],
        [0, 0, 0, 0, 0, 1, 1, 1, 1],
    ],
    ids=str,
)
def test_ratios(group):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 9, 8, generator=generator), torch.randn(2, 2, 9, 8, generator=generator)
    group = torch.tensor(group)
    result = torch.stack(todre_ratios(query, key, group.expand(2, -1)), -1)
    expected = torch.tensor([ratios(q, k, group) for q, k in zip(query, key)])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    if not ((group == 2).cumsum(0) * (group == 1)).any():
        assert (result[:, 1] == 0).all()  # exactly, under the causal mask
    for one_query, one_key, pair in zip(query, key, result):
        torch.testing.assert_close(torch.stack(todre_ratios(one_query, one_key, group)), pair)


def test_layers():
    method = ToDRE(keep=0.1)
    assert method.layers(32) == (16, 20, 24, 28)
    assert method.layers(28) == (14, 17, 21, 24)
    assert [method.layers(count) for count in (1, 2, 3)] == [(), (1,), (1, 2)]
    assert ToDRE(keep=0.1, depths=()).layers(32) == ()
    assert ToDRE(keep=0.1, depths=()).needs == frozenset()
    assert method.needs == {"query", "key"}


def test_stages_apart():
    assert ToDRE(keep=0.1).after_projector and ToDRE(keep=1).after_projector
    second = ToDRE(keep=1.0)
    assert not second.after_projector
    assert second.select(Image(torch.ones(2, 3, 4))).tolist() == [[0, 1, 2]] * 2


def test_removal():
    """All visual tokens go when both ratios are below tau, which the text's keys decide here."""
    row = prompt([4, 3], between=0)
    group = torch.tensor([0] * 3 + [1] * 7 + [2] * 5)
    to_vision, to_text = ratios(row.query, row.key, group)
    assert to_text == 0 and 0.001 < to_vision < 0.9
    above, below = ToDRE(keep=0.5, tau=to_vision + 1e-4), ToDRE(keep=0.5, tau=to_vision - 1e-4)
    gone = above.at_layer(16, row, 32)
    assert gone.shape == (0,) and gone.dtype == torch.int64
    assert below.at_layer(16, row, 32) is None
    assert above.at_layer(15, row, 32) is None
    assert ToDRE(keep=0.5, tau=0).at_layer(16, row, 32) is None


@pytest.mark.parametrize("images, between, after, greater", [([6, 2], 1, 6, "vision"), ([1, 6], 8, 1, "text")])
def test_removal_needs_both_ratios(images, between, after, greater):
    """Text between the images: the second image attends to it."""
    row = prompt(images, between=between, after=after)
    group = torch.full((len(row.hidden),), 2).index_fill(0, row.visual, 1)
    group[:3] = 0
    to_vision, to_text = ratios(row.query, row.key, group)
    assert min(to_vision, to_text) > 0.01 and (to_vision > to_text) == (greater == "vision")
    for tau, gone in ((max(to_vision, to_text) + 1e-4, True), ((to_vision + to_text) / 2, False)):
        assert (ToDRE(keep=0.5, tau=tau).at_layer(1, row, 2) is not None) == gone


def test_nothing_to_remove():
    always = ToDRE(keep=0.5, tau=2)
    assert always.at_layer(1, prompt([3]), 2).tolist() == []
    assert always.at_layer(1, prompt([3], after=0), 2) is None  # no text after the image
    assert always.at_layer(1, prompt([]), 2) is None


def test_nan_keeps():
    row = prompt([3])
    assert ToDRE(keep=0.5, tau=2).at_layer(1, row._replace(query=row.query * torch.nan), 2) is None
