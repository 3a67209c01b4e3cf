"""The ranking model's loss, Eq. 4 of DTR, and the task around it."""

import math

import pytest
import torch

from pruneops.training.dtr import Ranked, RankingConfig, RankingTask, rank_classes, ranking_loss

SMALL = dict(base_layers=1, cross_layers=1, heads=4)


def test_classes():
    """A token's class is its place in the list, or J; -1 stands for no token."""
    lists = torch.tensor([[3, 0, 4], [1, -1, -1], [-1, -1, -1]])
    there = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [True] * 5])
    assert rank_classes(lists, there).tolist() == [[1, 3, 3, 0, 2], [3, 0, 3, 3, 3], [3] * 5]
    assert rank_classes(lists.int(), there).equal(rank_classes(lists, there))


def expected_loss(logits, lists, counts):
    """Eq. 4 in plain Python; two columns are ranked and not ranked."""
    total = 0.0
    for row, ranked, n in zip(logits.tolist(), lists.tolist(), counts):
        ranked = [token for token in ranked if token >= 0]
        own = 0.0
        for token in range(n):
            values = row[token]
            label = ranked.index(token) if token in ranked else len(values) - 1
            if len(values) == 2 and token in ranked:
                label = 0
            weight = (n - len(ranked)) / len(ranked) if token in ranked else 1
            own += weight * (math.log(sum(map(math.exp, values))) - values[label])
        total += own / n
    return total / len(counts)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize(
    "lists, counts",
    [
        ([[3, 0, 4]], [7]),
        ([[3, 0, 4], [1, 5, 2]], [7, 6]),
        ([[3, 0, 4], [1, 0, -1]], [7, 2]),  # an image of fewer tokens than ranks: all are ranked
        ([[6, 2, -1], [4, -1, -1]], [7, 5]),
    ],
)
def test_loss(classes, lists, counts):
    lists, counts = torch.tensor(lists), torch.tensor(counts)
    logits = torch.randn(len(lists), 7, classes, generator=torch.Generator().manual_seed(0)).requires_grad_()
    there = torch.arange(7) < counts[:, None]
    loss = ranking_loss(logits, rank_classes(lists, there), there, 3)
    assert loss.item() == pytest.approx(expected_loss(logits, lists, counts.tolist()), rel=1e-5)
    (slope,) = torch.autograd.grad(loss, logits)
    assert (slope[~there] == 0).all()  # padding


def test_one_rank():
    """Two classes either way."""
    lists, there = torch.tensor([[2]]), torch.ones(1, 5, dtype=torch.bool)
    logits = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(0))
    loss = ranking_loss(logits, rank_classes(lists, there), there, 1)
    assert loss.item() == pytest.approx(expected_loss(logits, lists, [5]), rel=1e-5)


@pytest.mark.parametrize("two_classes", [False, True])
@pytest.mark.parametrize("ranks", [2, 20])
def test_task(loaded, examples, ranks, two_classes):
    """Its loss is the mean of single examples'; lists may be longer than images have tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = [16] * 4 if loaded[0].config.model_type == "llava" else [8, 6, 9, 16]
    lists = torch.full((4, ranks), -1)
    for row, n in zip(lists, tokens):
        row[: min(n, ranks)] = torch.randperm(n, generator=generator)[:ranks]
    batch = list(zip(examples, lists))
    task = RankingTask(*loaded, RankingConfig(ranks=ranks, two_classes=two_classes, **SMALL)).train()
    with torch.no_grad():
        task.network.mlp[-1].weight.mul_(10)
    loss, extra = task(batch)
    loss.backward()
    grads = [p.grad.abs().sum() for p in task.network.parameters()]
    if ranks == 2:  # where all tokens have ranks, none of them weighs anything
        assert all(grad.isfinite() for grad in grads) and all(g > 0 for g in grads if g.shape)
        single = [task([pair])[0] for pair in batch]
        torch.testing.assert_close(loss, torch.stack(single).mean(), rtol=1e-4, atol=1e-5)
        recall = torch.stack([task([pair])[1]["recall"] for pair in batch]).mean()
        torch.testing.assert_close(extra["recall"], recall)
    assert 0 <= extra["recall"] <= 1 and 0 <= extra["first"] <= 1


@torch.no_grad()
def test_the_answer_is_not_read(loaded, examples):
    """At inference it is not known."""
    task = RankingTask(*loaded, RankingConfig(ranks=2, **SMALL))
    losses = [task([(examples[0]._replace(answer=text), torch.tensor([3, 1]))])[0] for text in ("no", "all of it")]
    torch.testing.assert_close(losses[0], losses[1])
    other = task([(examples[0]._replace(question="why ?"), torch.tensor([3, 1]))])[0]
    assert abs(other - losses[0]) > 1e-4


def test_base_layers_can_be_frozen(llava):
    for train in (True, False):
        network = RankingTask(*llava, RankingConfig(train_base=train, **SMALL)).network
        assert all(p.requires_grad is train for p in network.layers.parameters())
        assert all(p.requires_grad for p in network.cross.parameters())
    assert not any(p.requires_grad for p in llava[0].parameters())


def test_training_overfits(llava, examples):
    """A few steps of the loss find the ranked tokens of one example."""
    ranked = torch.tensor([5, 11])
    task = RankingTask(*llava, RankingConfig(ranks=2, **SMALL)).train()
    optimizer = torch.optim.Adam(task.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss, extra = task([(examples[0], ranked)])
        loss.backward()
        optimizer.step()
    assert extra["recall"] == 1 and extra["first"] == 1 and loss < 0.1


def test_examples_with_lists():
    dataset = Ranked(list("abcdef"), {4: torch.tensor([1]), 1: torch.tensor([0])})
    assert len(dataset) == 2
    assert [(example, ranked.tolist()) for example, ranked in (dataset[0], dataset[1])] == [("b", [0]), ("e", [1])]


@pytest.mark.parametrize("ranks", [0, 65])
def test_ranks_that_are_refused(ranks):
    with pytest.raises(ValueError, match=f"config: ranks must be 1 to 64, got {ranks}"):
        RankingConfig(ranks=ranks)
