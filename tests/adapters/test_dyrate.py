"""DyRate in models: rates change while text is generated; truth is the unpruned model with removed tokens masked out.

The oracle decides by itself, from the attention of layer L - 1, which sees all tokens.
"""

import pytest
import torch
import transformers

from pruneops import networks
from pruneops.adapters.transformers import UnsupportedError, patch
from tests.adapters import oracle
from tests.adapters.situations import DYRATE as METHOD
from tests.adapters.situations import ask, same, turn
from tests.adapters.test_transformers import TEXTS, TWO_IMAGES, flash_emulation, generate, spans_of
from tests.adapters.tiny import model_of, prompts
from tests.host_sync import no_host_sync
from tests.methods.oracles import descending
from tests.methods.weights import KEEPS

transformers.logging.set_verbosity_error()
LAYER, RATES, STEPS = 2, 8, 8
SYSTEM, IMAGE, INSTRUCTION, RESPONSE = range(4)
FAMILIES = "llava", "llava_next", "qwen2_5_vl"


def attention_of(family, tokens):
    """[B, H, T, T] of layer L - 1, from an unpruned eager model."""
    model, seen = model_of(family, "eager")[0], []
    causal = torch.ones(tokens.valid.shape[1], tokens.valid.shape[1]).tril().bool()
    layers = len(model.get_decoder().layers)
    attention = model.get_decoder().layers[LAYER - 1].self_attn
    attention.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    oracle.masked_logits(model, tokens, causal.expand(layers, len(tokens.valid), -1, -1))
    return seen[0].double()


def decisions(method, weights, spans, valid, prompt):
    """[bool [T] of visual tokens left after step 0 (the prompt), 1, ...] of one row, weights [H, T, T]."""
    network = networks.load(networks.RateClassifier, method.weights, dtype=torch.float64)
    index, left, kept = KEEPS.index(method.keep), torch.cat([oracle.places_of(span) for span in spans]), []
    group = torch.full_like(valid, INSTRUCTION, dtype=torch.int64)
    group[: left[0]] = SYSTEM
    group[left] = IMAGE
    group[prompt:] = RESPONSE
    group[~valid] = -1
    tokens = len(left)
    for row in range(prompt - 1, len(valid)):
        vector = [head[row, group == g].sum() for head in weights for g in range(4)]
        chances = (network.weight[index] @ torch.stack(vector) + network.bias[index]).softmax(0)
        rate = round(sum(k * float(chance) for k, chance in enumerate(chances)))
        count = min(len(left), tokens - tokens * rate // RATES)
        left = left[descending(weights[:, row].mean(0)[left], count)].sort().values
        kept.append(torch.zeros_like(valid).index_fill(0, left, True))
    return kept


def truth_of(family, model, inputs, method, generated):
    """(logits, [visual tokens left after every step] of every row), as the oracle has them."""
    tokens, spans = oracle.sequence(model, inputs, generated), spans_of(inputs)
    weights, (B, T) = attention_of(family, tokens), tokens.valid.shape
    visible, counts = torch.ones(len(model.get_decoder().layers), B, T, T, dtype=torch.bool), []
    for b in range(B):
        kept = decisions(method, weights[b], spans[b], tokens.valid[b], tokens.prompt)
        removable = torch.zeros(T, dtype=torch.bool)
        removable[torch.cat([oracle.places_of(span) for span in spans[b]])] = True
        for row in range(T):
            seen = kept[max(row - tokens.prompt, 0)]  # token t sees what was left after token t - 1
            visible[LAYER:, b, row] = seen | ~removable
        counts.append([int(flags.sum()) for flags in kept])
    return oracle.masked_logits(model, tokens, visible), counts


def assert_truth(family, model, inputs, out, method=METHOD, before=0):
    """Logits of every step, to 1e-5 of their size; the counts of every row, which fall while text is generated."""
    generated = out.sequences[:, inputs["input_ids"].shape[1] :]
    truth, counts = truth_of(family, model, inputs, method, generated)
    truth = truth[before:]
    scale = truth.abs().max().clamp(min=1)
    torch.testing.assert_close(torch.stack(out.logits) / scale, truth / scale, rtol=0, atol=1e-5)
    assert all(row == sorted(row, reverse=True) for row in counts)
    assert any(row[0] > row[-2] for row in counts), "no token was removed while text was generated"
    return counts


@pytest.mark.parametrize("texts", [*TEXTS.values(), TWO_IMAGES], ids=[*TEXTS, "two images"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_oracle(family, attention, texts):
    """Logits, statistics and lengths of caches."""
    model, image = model_of(family, attention)
    inputs = prompts(image, texts)
    with patch(model, METHOD) as handle:
        out = generate(model, inputs, STEPS)
    counts = assert_truth(family, model, inputs, out)
    (stats,), total = handle.stats, sum(map(sum, handle.stats[0].images))
    assert stats.totals == [total] * LAYER + [sum(row[-2] for row in counts)] * 2  # the last decision has no step
    text = inputs["attention_mask"].sum(1) - torch.tensor([sum(sizes) for sizes in stats.images])
    longest = max(int(own) + row[-2] for own, row in zip(text, counts)) + STEPS - 1
    sizes = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert sizes[:LAYER] == [inputs["input_ids"].shape[1] + STEPS - 1] * LAYER
    assert all(longest <= size < sizes[0] for size in sizes[LAYER:])
    if len(texts) == 1:
        assert sizes[LAYER:] == [longest] * 2


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_flash_attention(family, texts):
    """Its masks of rank 2, with an emulation."""
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    transformers.AttentionInterface.register("flash_emulation", flash_emulation)
    AttentionMaskInterface.register("flash_emulation", flash_attention_mask)
    model, image = model_of(family)
    inputs, config = prompts(image, TEXTS[texts]), model.get_decoder().config
    with patch(model, METHOD):
        config._attn_implementation = "flash_emulation"
        out = generate(model, inputs, STEPS)
        config._attn_implementation = "sdpa"
    assert_truth(family, model, inputs, out)


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_beams(family, texts):
    """The score of the best beam is the oracle's for its tokens, so that decisions move with their beams."""
    model, image = model_of(family)
    inputs = prompts(image, TEXTS[texts])
    with patch(model, METHOD):
        out = generate(model, inputs, STEPS, num_beams=3, output_scores=True)
    generated = out.sequences[:, inputs["input_ids"].shape[1] :]
    truth, counts = truth_of(family, model, inputs, METHOD, generated)
    assert any(row[0] > row[-2] for row in counts)
    scores = truth.log_softmax(-1).gather(2, generated.T[..., None]).sum((0, 2)) / generated.shape[1]
    torch.testing.assert_close(out.sequences_scores, scores, rtol=1e-5, atol=1e-4)


def test_rows_are_independent():
    """A prompt in a batch has the logits that it has alone."""
    model, image = model_of("llava")
    inputs = prompts(image, TEXTS["left-padded"])
    with patch(model, METHOD):
        both = torch.stack(generate(model, inputs, STEPS).logits)
        for b in range(2):
            row = {name: value[b : b + 1] for name, value in inputs.items()}
            pad = int((row["attention_mask"] == 0).sum())
            row |= {name: row[name][:, pad:] for name in ("input_ids", "attention_mask")}
            assert same(torch.stack(generate(model, row, STEPS).logits), both[:, b : b + 1])


def test_second_turn():
    """Tokens of a later turn decide as if they came one by one, and see what was left before them."""
    model, image = model_of("llava")
    inputs = prompts(image, TEXTS["one"])
    with patch(model, METHOD):
        first = generate(model, inputs, STEPS)
        again = turn(inputs, first, [7, 8, 9])
        second = generate(model, again, STEPS, past_key_values=first.past_key_values)
    assert_truth("llava", model, inputs, second, before=STEPS + 3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_second_turn_of_different_lengths(attention):
    """Padding in a later turn decides nothing, and rows have the logits that they have alone."""
    model, image = model_of("llava", attention)
    inputs = prompts(image, TEXTS["left-padded"])
    new, valid = torch.tensor([[7, 8, 11], [0, 0, 9]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    with patch(model, METHOD):
        out = generate(model, inputs, STEPS)
        ids = torch.cat([out.sequences, new], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS), value=1)
        again = {"input_ids": ids, "attention_mask": torch.cat([mask, valid], 1)}
        both = torch.stack(generate(model, again, STEPS, past_key_values=out.past_key_values).logits)
        for b in range(2):
            stays = inputs["attention_mask"][b].bool()
            row = {
                "input_ids": inputs["input_ids"][b : b + 1, stays],
                "pixel_values": inputs["pixel_values"][b : b + 1],
            }
            alone = generate(model, row | {"attention_mask": torch.ones_like(row["input_ids"])}, STEPS)
            ids = torch.cat([alone.sequences, new[b : b + 1, valid[b].bool()]], 1)
            again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            second = generate(model, again, STEPS, past_key_values=alone.past_key_values)
            assert torch.equal(alone.sequences[0], out.sequences[b, -alone.sequences.shape[1] :])
            assert same(torch.stack(second.logits), both[:, b : b + 1])


# Speculation


def forward(model, tokens, cache):
    return model(input_ids=torch.tensor([tokens]), past_key_values=cache).logits[0]


def shorten(cache, count):
    """Remove the last tokens."""
    for layer in cache.layers:
        layer.crop(-count)


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_speculation(family, attention, accepted):
    """Passes of four tokens, of which the last are wrong and cropped, have the logits of one token a pass."""
    model, image = model_of(family, attention)
    inputs, steps = prompts(image, TEXTS["one"]), 13
    with torch.no_grad(), patch(model, METHOD) as handle:
        plain = generate(model, inputs, steps)
        tokens, prompt = plain.sequences[0, inputs["input_ids"].shape[1] :].tolist(), model(**inputs)
        cache, logits = prompt.past_key_values, [prompt.logits[0, -1:]]
        while len(logits) < steps:
            done = sum(map(len, logits)) - 1
            if done >= steps - 1:
                break
            right = tokens[done : done + accepted + 1]
            wrong = [(token + 1) % 100 for token in tokens[: 3 - accepted]]
            logits.append(forward(model, right + wrong, cache)[: len(right)])
            if wrong:
                shorten(cache, len(wrong))
        kept = handle.stats[-1].kept
    want, got = torch.cat(plain.logits), torch.cat(logits)
    assert same(got, want[: len(got)])
    assert kept[0] == [[image["tokens"]]] and kept[LAYER][0][0] < image["tokens"]
    assert_truth(family, model, inputs, plain)


def test_assisted_decoding_runs():
    """With the candidates in the first pass, whose last token decides for the prompt."""
    model, image = model_of("llava")
    inputs = prompts(image, TEXTS["one"])
    with patch(model, METHOD) as handle:
        for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": model_of("llava", seed=5)[0]}):
            try:
                out = generate(model, inputs, 12, **options)
            except TypeError:  # of some releases, unpatched too
                with handle.disabled(), pytest.raises(TypeError):
                    generate(model, inputs, 12, **options)
                continue
            assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + 12
            assert torch.stack(out.logits).isfinite().all()
        assert all(stats.totals[LAYER] < stats.totals[0] for stats in handle.stats)


def test_crop_of_padded_rows():
    """Rows of different lengths cannot be cropped into what was compacted."""
    model, image = model_of("llava")
    with patch(model, METHOD):
        cache = generate(model, prompts(image, TEXTS["left-padded"]), STEPS).past_key_values
    layer = cache.layers[LAYER]
    assert layer.right_padded
    shorten(cache, layer.size - layer.prompt)
    with pytest.raises(UnsupportedError, match="cannot be cropped"):
        shorten(cache, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_hardly_any_text(family):
    """Only an image, an image first, an image last, a prompt of text in the batch."""
    model, image = model_of(family)
    alone = [["image"]], [[1, "image"]], [["image", 1]], [["image", "image"]]
    for texts in (*alone, [["image"], [4, "image"]], [[5], ["image"]]):
        with patch(model, METHOD) as handle:
            assert ask(model, prompts(image, texts), steps=4).isfinite().all()
            assert handle.stats[0].totals[LAYER] <= handle.stats[0].totals[0]


# Costs


def test_one_read_a_step(monkeypatch):
    """Of lengths, in one copy; none where another method prunes."""
    model, image = model_of("llava")
    inputs, copies, cpu = prompts(image, TEXTS["left-padded"]), [], torch.Tensor.cpu
    with torch.no_grad(), patch(model, METHOD):
        cache, mask = model(**inputs).past_key_values, inputs["attention_mask"]
        monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(1) or cpu(tensor))
        for number in range(5):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            with no_host_sync("pruneops/adapters", "pruneops/methods"):
                model(input_ids=torch.tensor([[7], [9]]), attention_mask=mask, past_key_values=cache)
            assert len(copies) == number  # the first has nothing to remove


def test_caches_share_nothing_with_longer_ones():
    """The memory of removed tokens is free after the next step."""
    model, image = model_of("llava")
    with torch.no_grad(), patch(model, METHOD):
        out = generate(model, prompts(image, TEXTS["one"]), STEPS)
    for layer in out.past_key_values.layers:
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
