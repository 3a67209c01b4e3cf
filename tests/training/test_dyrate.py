"""DyRate's training: masks that stand for removal, and the term that holds the FLOPs at the budget."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pruneops.training.data import decoder_inputs, encode
from pruneops.training.dyrate import DyRateConfig, DyRateTask, masked_logits

RATES = 8
RISING, FALLING = 1, 2  # budgets


def task_of(loaded, **settings):
    """A task whose classifier tells attention distributions apart: at random for the first budget, then one whose
    rate rises with the attention to the response and one whose rate falls with it."""
    task = DyRateTask(*loaded, DyRateConfig(**{"rates": RATES, "keeps": (0.5, 0.25, 0.2), **settings}))
    rates, network = torch.arange(RATES), task.network
    with torch.no_grad():
        network.weight[0].normal_(generator=torch.Generator().manual_seed(1)).mul_(6)
        for budget, slope, start in ((RISING, 10, 2), (FALLING, -60, 6)):
            network.weight[budget] = 0
            network.weight[budget, :, 3::4] = slope * rates[:, None] / 4  # of each of the four heads
            network.bias[budget] = -(rates - start).square()
    return task


def batch_of(loaded, examples):
    return decoder_inputs(loaded[0], encode(loaded[1], examples))


def forward(decoder, hidden, rotary, positions, masks):
    """Hidden states [S, D] after the decoder's own layers and norm, under boolean masks [S, S], and the inputs of each
    layer."""
    inputs = []
    for layer, mask in zip(decoder.layers, masks):
        inputs.append(hidden)
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        hidden = layer(hidden, attention_mask=bias[None, None], position_embeddings=rotary, position_ids=positions)
    return decoder.norm(hidden)[0], inputs


def pruned(model, network, budget, batch, b):
    """Logits [S, vocabulary] of row b and, for every step, the visual tokens that are left and the rate: tokens are
    dropped one step after another, each decision made from the attention of one row in the layer before."""
    decoder, length = model.get_decoder(), int(batch.valid[b].sum())
    hidden, labels = batch.embeds[b : b + 1, :length], batch.labels[b, :length].tolist()
    rotary = tuple(part[b : b + 1, :length] for part in batch.rotary)
    positions = batch.positions[..., b : b + 1, :length]
    visual = batch.visual[b, :length].nonzero().flatten().tolist()
    first = next(i for i, label in enumerate(labels) if label >= 0) - 1
    steps = sum(label >= 0 for label in labels)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    _, inputs = forward(decoder, hidden, rotary, positions, [causal] * len(decoder.layers))
    before = decoder.layers[network.layer - 1]
    x, attention = before.input_layernorm(inputs[network.layer - 1]), before.self_attn
    query, key = (
        p(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    query, key = query[0], key[0].repeat_interleave(len(query[0]) // len(key[0]), 0)
    alive, states, rates = list(visual), [], []
    for step in range(steps):
        row = first + step
        weights = (key[:, : row + 1] @ query[:, row, :, None])[..., 0].mul(attention.head_dim**-0.5).softmax(-1)
        sums = torch.zeros(len(weights), 4)
        for place in range(row + 1):
            text = 0 if place < visual[0] else 2 if place <= first else 3
            sums[:, 1 if place in visual else text] += weights[:, place]
        chances = network(sums.flatten(), budget).softmax(-1)
        rate = round(sum(k * float(chance) for k, chance in enumerate(chances)))
        count = len(visual) - len(visual) * rate // RATES
        score = weights.mean(0).tolist()
        alive = sorted(sorted(alive, key=lambda place: (-score[place], place))[:count])
        states.append(alive)
        rates.append(rate)
    mask = causal.clone()
    for row in range(length):
        seen = states[min(max(row - first - 1, 0), steps - 1)]
        for place in visual:
            mask[row, place] &= place in seen or place == row
    layers = [causal if i < network.layer else mask for i in range(len(decoder.layers))]
    return model.get_output_embeddings()(forward(decoder, hidden, rotary, positions, layers)[0]), states, rates


@pytest.fixture
def eager(loaded):
    """Masks as they are, without a kernel of its own."""
    model, before = loaded[0], loaded[0].config._attn_implementation
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(before)


@torch.no_grad()
@pytest.mark.parametrize("layer, budget", [(1, 0), (1, RISING), (2, RISING), (3, FALLING), (2, FALLING)])
def test_masks_stand_for_removal(loaded, examples, eager, layer, budget):
    """The logits are those of a decoder that drops visual tokens step by step."""
    model, _ = loaded
    task, batch = task_of(loaded, layer=layer).eval(), batch_of(loaded, examples)
    logits, masks = masked_logits(model, batch, task.network, budget, task.draw)
    changes, falls = 0, 0
    for b in range(len(examples)):
        expected, states, rates = pruned(model, task.network, budget, batch, b)
        counts = [len(alive) for alive in states]
        changes += len(set(counts)) > 1
        falls += rates != sorted(rates)
        assert masks.kept[b, : len(counts)].tolist() == counts == sorted(counts, reverse=True)
        assert masks.counted[b].sum() == len(counts)
        assert masks.tokens[b] == batch.visual[b].sum() > counts[-1]
        torch.testing.assert_close(logits[b, : len(expected) - 1], expected[:-1], rtol=1e-4, atol=1e-4)
    assert budget != RISING or changes  # tokens were dropped in the middle of an answer
    assert budget != FALLING or falls  # and did not come back


@torch.no_grad()
def test_nothing_is_dropped_at_rate_0(loaded, examples):
    """Then the logits are the model's, whose own attention is back afterwards."""
    model, _ = loaded
    task, batch = task_of(loaded).eval(), batch_of(loaded, examples)
    inputs = encode(loaded[1], examples)
    inputs.pop("labels")
    before = model(**inputs).logits
    none = torch.nn.functional.one_hot(torch.zeros(4, dtype=torch.long), RATES).float()
    logits, masks = masked_logits(model, batch, task.network, 0, lambda _: none)
    torch.testing.assert_close(logits[batch.valid[:, 1:]], before[:, :-1][batch.valid[:, 1:]], rtol=1e-4, atol=1e-4)
    assert masks.kept.equal(masks.tokens[:, None].expand_as(masks.kept).float())
    assert model(**inputs).logits.equal(before)


def test_first_rates_are_the_budgets(loaded, examples):
    """Before training a budget's own share is kept."""
    task = DyRateTask(*loaded, DyRateConfig(rates=RATES, keeps=(0.5, 0.25))).eval()
    with torch.no_grad():
        for budget, keep in enumerate((0.5, 0.25)):
            _, extra = task.budget_loss(batch_of(loaded, examples), budget)
            assert extra["kept"].item() == pytest.approx(keep, abs=0.08)  # whole tokens


def flops(model, kept, tokens, text, steps, layer):
    """Of one row, by the definition: two a parameter and token, four D a pair of a query and a key."""
    decoder = model.get_decoder()
    width, parameters = decoder.config.hidden_size, sum(p.numel() for p in decoder.layers[0].parameters())
    total = 0
    for i in range(len(decoder.layers)):
        visual = [tokens] * steps if i < layer else kept
        prompt = text + visual[0]
        total += 2 * parameters * prompt + 4 * width * prompt * prompt / 2
        for step in range(1, steps):
            total += 2 * parameters + 4 * width * (text + step + visual[step - 1])
    return total


@torch.no_grad()
def test_flops(loaded, examples):
    model, _ = loaded
    task, batch = task_of(loaded).eval(), batch_of(loaded, examples)
    _, masks = masked_logits(model, batch, task.network, 1, task.draw)
    expected = []
    for b in range(4):
        steps = int((batch.labels[b] >= 0).sum())
        prompt = int((batch.labels[b] >= 0).byte().argmax())
        tokens = int(batch.visual[b].sum())
        expected.append(flops(model, masks.kept[b, :steps].tolist(), tokens, prompt - tokens, steps, 2))
    torch.testing.assert_close(task.flops(masks.kept, masks, batch), torch.tensor(expected))


@pytest.mark.parametrize("bias", [4.0, -4.0], ids=["too many", "too few"])
def test_the_term_leads_to_the_budget(loaded, examples, bias):
    """From either side: descent on a term that outweighs the answer ends with the budget's share of tokens."""
    task = DyRateTask(*loaded, DyRateConfig(rates=RATES, keeps=(0.5,), flops=1e6)).train()
    batch = batch_of(loaded, examples)
    with torch.no_grad():
        task.network.bias.copy_(torch.linspace(bias, -bias, RATES))
    optimizer = torch.optim.Adam(task.network.parameters(), 0.3)
    kept = []
    torch.manual_seed(0)
    for _ in range(60):
        loss, extra = task.budget_loss(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        if not kept:
            share = (1 - torch.arange(RATES) / RATES) @ task.network.bias[0].softmax(-1)
            (slope,) = torch.autograd.grad(share, task.network.bias)
            change = -(slope * task.network.bias.grad).sum()  # of the expected share
            assert change < 0 if bias > 0 else change > 0
        optimizer.step()
        kept.append(extra["kept"].item())
    assert kept[0] > 0.8 if bias > 0 else kept[0] < 0.3
    assert sum(kept[-15:]) / 15 == pytest.approx(0.5, abs=0.12)


def test_gradients_reach_the_classifier(loaded, examples):
    """Of the budget that was drawn, from the answer's loss alone too."""
    task = task_of(loaded, flops=0.0).train()
    torch.manual_seed(0)
    loss, extra = task(examples)
    torch.testing.assert_close(loss.detach(), extra["answer"])
    loss.backward()
    for parameter in task.network.parameters():
        assert parameter.grad.isfinite().all()
        assert sorted(part.abs().sum() > 0 for part in parameter.grad) == [False, False, True]
    assert not any(p.requires_grad for p in loaded[0].parameters())


def test_evaluation_takes_all_budgets(llava, examples):
    task = task_of(llava).eval()
    with torch.no_grad():
        loss, extra = task(examples)
        each = [task.budget_loss(batch_of(llava, examples), budget) for budget in range(3)]
    assert extra.keys() == {"answer", "flops", "kept 0.5", "kept 0.25", "kept 0.2"}
    torch.testing.assert_close(loss, torch.stack([own for own, _ in each]).mean())
    assert [extra["kept 0.5"], extra["kept 0.25"], extra["kept 0.2"]] == [own["kept"] for _, own in each]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(keeps=()), "keeps must be shares in"),
        (dict(keeps=(1.0,)), "keeps must be shares in"),
        (dict(keeps=(1,)), "keeps must be shares in"),
        (dict(layer=0), "layer >= 1 and rates >= 2 are needed, got 0 and 32"),
        (dict(rates=1), "layer >= 1 and rates >= 2 are needed, got 2 and 1"),
        (dict(rates=4, keeps=(0.1,)), "4 rates keep at least 1 / 4; 0.1 is less"),
        (dict(tau=0.0), "tau must be above 0"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"config: {message}"):
        DyRateConfig(**settings)


def test_layer_that_the_decoder_has_not(llava):
    with pytest.raises(ValueError, match="config: layer must be below the decoder's 4, got 4"):
        DyRateTask(*llava, DyRateConfig(layer=4))
