"""Selector and DTR in models, against the unpruned model with removed tokens masked out; `prepare` with both.

The choices are made here again, by plain loops over the networks' logits; DTR's decoder layers are the model's own.
"""

import itertools

import pytest
import torch
import transformers

import pruneops
from pruneops import networks
from pruneops.adapters.transformers import UnsupportedError, patch
from pruneops.methods import DTR, Selector
from pruneops.training.dtr import RankingConfig, from_decoder
from tests.adapters import oracle
from tests.adapters.test_transformers import TEXTS, TWO_IMAGES, generate, spans_of
from tests.adapters.tiny import model_of, prompts
from tests.methods.oracles import descending

transformers.logging.set_verbosity_error()
FAMILIES = "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl"
NEEDS_PREPARE = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18), reason="prepare needs transformers 5.18"
)
STEPS, BASE, RANKS = 3, 2, 3


@pytest.fixture(scope="module")
def selector(tmp_path_factory):
    torch.manual_seed(0)
    network = networks.SelectorNetwork(features=32, width=16, layers=2, heads=2)
    path = tmp_path_factory.mktemp("weights") / "selector.safetensors"
    networks.save(network, path)
    return network.eval(), path


def ranking_model(model, folder, base=BASE, two_classes=False):
    """(network, path): a random ranking model over the decoder's first layers."""
    torch.manual_seed(0)
    network = from_decoder(
        model.get_decoder(), RankingConfig(ranks=RANKS, base_layers=base, heads=4, two_classes=two_classes)
    ).eval()
    with torch.no_grad():
        for parameter in (*network.cross.parameters(), *network.mlp.parameters()):
            parameter.mul_(4)  # logits that differ
    networks.save(network, folder / "dtr.safetensors")
    return network, folder / "dtr.safetensors"


def whole_run(model, inputs, spans, out):
    """Of `generate`'s output: (the oracle's sequence, for every row the positions of its images)."""
    generated = out.sequences[:, inputs["input_ids"].shape[1] :]
    return oracle.sequence(model, inputs, generated), [[oracle.places_of(span) for span in row] for row in spans]


def assert_kept(model, tokens, images, kept, out):
    """Logits of a run from whose prompts all but `kept` [row][image] were removed before layer 0."""
    B, T = tokens.valid.shape
    visible = torch.ones(len(model.get_decoder().layers), B, T, T, dtype=torch.bool)
    for b, (row, chosen) in enumerate(zip(images, kept)):
        for image, ranks in zip(row, chosen):
            visible[:, b, :, image] = False
            visible[:, b, :, image[ranks]] = True
    truth = oracle.masked_logits(model, tokens, visible)
    scale = truth.abs().max().clamp(min=1)
    torch.testing.assert_close(torch.stack(out.logits) / scale, truth / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("texts", [TEXTS["one"], TEXTS["left-padded"], TWO_IMAGES], ids=["one", "padded", "two images"])
@pytest.mark.parametrize("family", FAMILIES)
def test_selector(family, texts, selector):
    network, path = selector
    model, image = model_of(family)
    inputs = prompts(image, texts)
    with patch(model, Selector(weights=path, keep=0.4)) as handle:
        out = generate(model, inputs, STEPS)
    tokens, images = whole_run(model, inputs, spans_of(inputs, image["tokens"]), out)
    kept = []
    for embeds, row in zip(tokens.embeds, images):
        logits = [network(embeds[places][None])[0] for places in row]
        k = handle.method.budget(image["tokens"])
        kept.append([torch.tensor(sorted(descending(each[:, 1] - each[:, 0], k))) for each in logits])
    assert_kept(model, tokens, images, kept, out)
    assert handle.stats[0].kept[-1] == [[len(ranks) for ranks in row] for row in kept]


@pytest.mark.parametrize("two_classes", [False, True])
@pytest.mark.parametrize("texts", [TEXTS["one"], TEXTS["left-padded"], TWO_IMAGES], ids=["one", "padded", "two images"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dtr(family, texts, two_classes, tmp_path):
    model, image = model_of(family)
    network, path = ranking_model(model, tmp_path, two_classes=two_classes)
    inputs = prompts(image, texts)
    with patch(model, DTR(weights=path, keep=2)) as handle:
        if unmerged_rotary(model):
            with pytest.raises(UnsupportedError, match="rotary"):
                generate(model, inputs, STEPS)
            return
        out = generate(model, inputs, STEPS)
    tokens, images = whole_run(model, inputs, spans_of(inputs, image["tokens"]), out)
    kept = []
    for b, row in enumerate(images):
        first = int(tokens.valid[b].byte().argmax())
        prompt = slice(first, tokens.prompt)
        with torch.no_grad():
            hidden = model.get_decoder()(
                inputs_embeds=tokens.embeds[b : b + 1, prompt], position_ids=tokens.positions[..., b : b + 1, prompt],
                attention_mask=torch.ones(1, tokens.prompt - first).long(), use_cache=False, output_hidden_states=True,
            ).hidden_states[BASE]  # fmt: skip
            places = torch.cat(row) - first
            text = torch.ones(1, hidden.shape[1], dtype=torch.bool).index_fill(1, places, False)
            x = hidden[:, places]
            for layer in network.cross:
                x = layer(x, hidden, text)
            logits = network.mlp(network.norm(x))[0]
        sizes = [len(each) for each in row]
        kept.append([torch.tensor(sorted(ranked(part, 2))) for part in logits.split(sizes)])
    assert_kept(model, tokens, images, kept, out)
    assert handle.stats[0].kept == [[[2] * len(row) for row in images]] * len(model.get_decoder().layers)


def unmerged_rotary(model):
    """Whether this transformers gives decoder layers the three axes of mRoPE apart, which no method can read."""
    positions = torch.zeros(3, 1, 2, dtype=torch.int64)
    if "qwen" not in model.config.model_type:
        return False
    return model.get_decoder().rotary_emb(torch.zeros(1, 2, 32), positions)[0].dim() == 4


def ranked(logits, k):
    """The first k tokens of the ranked list."""
    chances, taken = logits.double().log_softmax(-1), []
    for rank in itertools.repeat(0, k) if logits.shape[-1] == 2 else range(k):
        taken.append(next(i for i in descending(chances[:, rank], len(chances)) if i not in taken))
    return taken


@NEEDS_PREPARE
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl", "idefics3", "mistral3", "pixtral", "glm4v"])
def test_prepare(family, selector, tmp_path):
    """Prepared inputs give what the patched model gives, of a batch with padding and two images."""
    model, image = model_of(family)
    base = BASE if family in FAMILIES else 0
    for method in (
        Selector(weights=selector[1], keep=2), Selector(weights=selector[1]),
        DTR(weights=ranking_model(model, tmp_path, base)[1], keep=2),
    ):  # fmt: skip
        inputs = prompts(image, TWO_IMAGES)
        with patch(model, method):
            want = generate(model, inputs, STEPS)
        got = generate(model, pruneops.prepare(model, inputs, method), STEPS)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-4)
