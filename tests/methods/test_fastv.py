"""FastV: attention received, from the last row or from all, against the full softmax matrix."""

import pytest
import torch

from pruneops.methods import FastV, fastv_scores, fastv_select
from tests.methods.oracles import assert_highest, attention, descending, prompt

pytestmark = pytest.mark.usefixtures("backend")


def scores_of(row, rows):
    weights = attention(row.query, row.key)
    return weights[:, -1].mean(0) if rows == "last" else weights.sum(1).mean(0)


@pytest.mark.parametrize("rows", ["all", "last"])
def test_scores(rows):
    row = prompt([9, 4])
    expected = scores_of(row, rows)
    torch.testing.assert_close(fastv_scores(row.query, row.key, rows=rows).double(), expected, rtol=1e-5, atol=1e-6)
    batch = fastv_scores(row.query.expand(2, -1, -1, -1), row.key.expand(2, -1, -1, -1), rows=rows)
    torch.testing.assert_close(batch.double(), expected.expand(2, -1), rtol=1e-5, atol=1e-6)


def test_the_two_rules_differ():
    row = prompt([20])
    one, other = (FastV(keep=5, rows=rows).at_layer(2, row, 4).tolist() for rows in ("all", "last"))
    assert one != other


@pytest.mark.parametrize("rows", ["all", "last"])
@pytest.mark.parametrize("keep", [0.3, 1, 6])
@pytest.mark.parametrize("images", [[20], [12, 1, 7]], ids=str)
def test_prompt(rows, keep, images):
    row = prompt(images)
    method = FastV(keep=keep, rows=rows)
    kept = method.at_layer(2, row, 4)
    scores = scores_of(row, rows)[row.visual]
    for start, end in row.images:
        ranks = kept[(kept >= start) & (kept < end)] - start
        assert_highest(ranks, scores[start:end], method.budget(end - start))
    assert kept.tolist() == sorted(kept.tolist())


def test_everything_kept():
    for keep in (1.0, 20):
        assert FastV(keep=keep).at_layer(2, prompt([20, 3]), 4) is None
    assert FastV(keep=0.5).at_layer(2, prompt([10], sizes=[20]), 4) is None
    assert FastV(keep=0.5).at_layer(2, prompt([]), 4) is None


def test_equal_attention():
    """With equal attention to all keys, the first tokens are kept."""
    row = prompt([10])
    assert FastV(keep=4, rows="last").at_layer(2, row._replace(query=row.query * 0), 4).tolist() == [0, 1, 2, 3]


def test_select():
    scores = torch.tensor([[1.0, 3, 3, torch.nan, 2, torch.inf, -torch.inf], [0.0] * 7])
    for k in range(8):
        assert fastv_select(scores, k).tolist() == [sorted(descending(row, k)) for row in scores]


def test_layers():
    method = FastV(keep=0.5)
    assert method.layers(32) == (2,) and not method.after_projector and method.needs == {"query", "key"}
    assert method.at_layer(3, prompt([9]), 32) is None
    with pytest.raises(ValueError, match="layer must be one of the decoder's layers, 0 to 1, got 2"):
        method.layers(2)
    with pytest.raises(ValueError, match=r"fastv_scores: rows must be one of \('all', 'last'\), got 'mean'"):
        fastv_scores(torch.ones(1, 2, 4), torch.ones(1, 2, 4), rows="mean")
