"""Pruning inside transformers models against the oracle."""

import dataclasses
import inspect
import json

import pytest
import torch
import transformers

from pruneops import methods
from pruneops.adapters.transformers import UnsupportedError, patch
from tests.adapters import oracle
from tests.adapters.oracle import Thin, runs
from tests.adapters.tiny import FAMILIES, IMAGE, model_of, prompts

transformers.logging.set_verbosity_error()
STEPS = 5
NEWER_FAMILIES = "qwen3_vl_moe", "glm4v", "glm4v_moe"  # those with break tokens: test_token_layout.py
METHODS = {
    "projector": Thin(projector=True),
    "layer": Thin(at=(2,)),
    "layers": Thin(at=(1, 3)),
    "generation": Thin(steps=(2, 3)),
    "all three": Thin(projector=True, at=(1, 2), steps=(2,)),
}
TEXTS = {"one": [[3, "image", 5]], "left-padded": [[3, "image", 5], [6, "image", 9]]}
TWO_IMAGES = [[2, "image", 3, "image", 4]]
REAL = (
    methods.ToDRE(keep=0.5, tau=2.0),
    methods.ToDRE(keep=0.5, pivot="norm", depths=()),
    methods.DART(keep=0.5, layer=2),
    methods.DART(keep=0.5, layer=2, compat="official"),
    methods.FastV(keep=0.5, layer=2),
    methods.VTW(),
    methods.DivPrune(keep=0.5),
    methods.Random(keep=0.5),
    methods.Uniform(keep=0.5),
)


def spans_of(inputs, tokens=None):
    """(first, last + 1) of images: runs of image tokens, cut into pieces of `tokens` each."""
    spans = [runs((row == IMAGE).tolist()) for row in inputs["input_ids"]]
    if tokens is None:
        return spans
    return [[(at, at + tokens) for first, end in row for at in range(first, end, tokens)] for row in spans]


def generate(model, inputs, steps=STEPS, **options):
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip


def assert_oracle(model, inputs, method, out, steps=STEPS, before=0, tokens=None):
    """Logits of every step, to 1e-5 of their size; the unpruned model's are others."""
    generated = out.sequences[:, inputs["input_ids"].shape[1] :]
    spans = spans_of(inputs, tokens)
    truth = oracle.logits(model, inputs, spans, method, generated)[before:]
    scale = truth.abs().max().clamp(min=1)
    torch.testing.assert_close(torch.stack(out.logits) / scale, truth / scale, rtol=0, atol=1e-5)
    unpruned = oracle.logits(model, inputs, spans, Thin(), generated)[before:]
    assert (unpruned - truth).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, *NEWER_FAMILIES])
def test_oracle(family, attention, method, texts):
    model, image = model_of(family, attention)
    inputs, method = prompts(image, TEXTS[texts]), METHODS[method]
    with patch(model, method):
        out = generate(model, inputs)
    assert_oracle(model, inputs, method, out)


def flash_emulation(module, query, key, value, attention_mask, scaling=None, position_ids=None, **_):
    """Interface of flash attention: a mask of rank 2 or none, causal from the last token; gaps start other prompts."""
    (B, _, n, _), length = query.shape, key.shape[2]
    if B == 1 and n > 1 and attention_mask is None and position_ids is not None:
        assert (position_ids.diff() == 1).all(), "taken for packed sequences"
    visible = torch.ones(n, length, dtype=torch.bool).tril(length - n)[None, None]
    if attention_mask is not None:
        assert attention_mask.dim() == 2
        visible = visible & attention_mask[:, None, None, -length:].bool()
    visible = visible | ~visible.any(-1, keepdim=True)
    groups = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(groups, 1) for heads in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_flash_attention(family, method, texts):
    """Its masks and layouts, with an emulation; the real one needs a GPU."""
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    transformers.AttentionInterface.register("flash_emulation", flash_emulation)
    AttentionMaskInterface.register("flash_emulation", flash_attention_mask)
    model, image = model_of(family)
    inputs, method = prompts(image, TEXTS[texts]), METHODS[method]
    decoder = model.get_decoder()
    with patch(model, method):
        decoder.config._attn_implementation = "flash_emulation"
        out = generate(model, inputs)
        decoder.config._attn_implementation = "sdpa"
    assert_oracle(model, inputs, method, out)


@pytest.mark.parametrize("texts", [TWO_IMAGES, [*TWO_IMAGES, [1, "image", 2]]], ids=len)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_several_images(family, texts):
    """Budgets are per image; rows may have different numbers of images."""
    model, image = model_of(family)
    inputs, method = prompts(image, texts), METHODS["all three"]
    with patch(model, method):
        out = generate(model, inputs)
    assert_oracle(model, inputs, method, out)


@pytest.mark.parametrize(
    "texts", [[[2, "image", "image", 4]], [[2, "image", "image", 4], ["image", "image", "image", 1]]]
)
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_adjacent_images(family, texts):
    """Budgets are per image, without a token between images too."""
    model, image = model_of(family)
    inputs, method = prompts(image, texts), METHODS["all three"]
    with patch(model, method) as handle:
        out = generate(model, inputs)
        generate(model, inputs, num_beams=2)
    sizes = [[image["tokens"]] * row.count("image") for row in texts]
    assert [stats.images for stats in handle.stats] == [sizes, [row for row in sizes for _ in range(2)]]
    assert_oracle(model, inputs, method, out, tokens=image["tokens"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_second_generate_on_the_same_cache(family, method):
    model, image = model_of(family)
    inputs, method = prompts(image, TEXTS["one"]), METHODS[method]
    with patch(model, method):
        first = generate(model, inputs)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = generate(model, again, past_key_values=first.past_key_values)
    assert_oracle(model, inputs, method, second, before=STEPS + 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_beams(family, method):
    """The score of the best beam is the oracle's for its tokens."""
    model, image = model_of(family)
    inputs, method = prompts(image, TEXTS["left-padded"]), METHODS[method]
    with patch(model, method):
        out = generate(model, inputs, num_beams=3, output_scores=True)
    generated = out.sequences[:, inputs["input_ids"].shape[1] :]
    truth = oracle.logits(model, inputs, spans_of(inputs), method, generated).log_softmax(-1)
    scores = truth.gather(2, generated.T[..., None]).sum((0, 2)) / generated.shape[1]
    torch.testing.assert_close(out.sequences_scores, scores, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", ["projector", "layer", "generation"])
def test_generated_image_tokens_are_text(method):
    """An image-token id that the model generates belongs to no image."""
    model, image = model_of("llava")
    inputs, method = prompts(image, TEXTS["one"]), METHODS[method]

    def allowed(batch, ids):
        return [IMAGE] if ids.shape[-1] < inputs["input_ids"].shape[1] + 2 else list(range(128))

    with patch(model, method):
        out = generate(model, inputs, prefix_allowed_tokens_fn=allowed)
    assert (out.sequences[:, inputs["input_ids"].shape[1] :][:, :2] == IMAGE).all()
    assert_oracle(model, inputs, method, out)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, *NEWER_FAMILIES])
def test_keeping_everything_changes_no_bit(family, attention):
    model, image = model_of(family, attention)
    inputs = prompts(image, TEXTS["left-padded"])
    plain = generate(model, inputs)
    with patch(model, dataclasses.replace(METHODS["all three"], keep=1)):
        kept = generate(model, inputs)
    assert all(torch.equal(one, other) for one, other in zip(plain.logits, kept.logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_changes_no_bit(family):
    model, image = model_of(family)
    inputs = prompts(image, [[4], [7]])
    plain = generate(model, inputs)
    with patch(model, METHODS["all three"]) as handle:
        kept = generate(model, inputs)
    assert all(torch.equal(one, other) for one, other in zip(plain.logits, kept.logits)) and not handle.stats


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
def test_remove_restores_the_model(family):
    model, image = model_of(family)
    inputs = prompts(image, TEXTS["left-padded"])

    def hooks():
        return [len(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def names():
        return [set(vars(m)) for m in model.modules()]

    plain = generate(model, inputs)  # transformers leaves hooks
    before, attributes = hooks(), names()
    configs = [layer.self_attn.config for layer in model.get_decoder().layers]
    handle = patch(model, METHODS["all three"])
    pruned = generate(model, inputs)
    handle.remove()
    handle.remove()  # a second call does nothing
    assert hooks() == before and names() == attributes
    assert all(layer.self_attn.config is config for layer, config in zip(model.get_decoder().layers, configs))
    again = generate(model, inputs)
    assert all(torch.equal(one, other) for one, other in zip(plain.logits, again.logits))
    assert not torch.equal(plain.logits[0], pruned.logits[0])


@pytest.mark.parametrize("where", ["at_layer", "select_each", "attention"])
def test_errors_leave_no_trace(where):
    """After a method or a model that fails in the middle of a pass, the next pass is right."""
    model, image = model_of("llava")
    inputs, method = prompts(image, TEXTS["one"]), METHODS["all three"]
    configs = model.get_decoder().layers[0].self_attn.config

    class Broken(Thin):
        pass

    def fail(*_):
        raise ZeroDivisionError

    with patch(model, method) as handle:
        if where == "attention":
            hook = model.get_decoder().layers[0].self_attn.q_proj.register_forward_hook(fail)
        else:
            setattr(Broken, where, fail)
            handle.method = Broken(projector=True, at=(1, 2))
        with pytest.raises(ZeroDivisionError):
            generate(model, inputs)
        if where == "attention":
            hook.remove()
        assert all(layer.self_attn.config is configs for layer in model.get_decoder().layers)
        handle.method = method
        out = generate(model, inputs)
    assert_oracle(model, inputs, method, out)


def test_disabled_and_override():
    model, image = model_of("llava")
    inputs = prompts(image, TEXTS["one"])
    plain = generate(model, inputs)
    with patch(model, METHODS["layer"]) as handle:
        with handle.disabled():
            assert torch.equal(generate(model, inputs).logits[-1], plain.logits[-1])
        with handle.override(keep=1):
            assert torch.equal(generate(model, inputs).logits[-1], plain.logits[-1])
        assert not torch.equal(generate(model, inputs).logits[-1], plain.logits[-1])
        assert handle.method == METHODS["layer"]


def test_stats():
    model, image = model_of("llava")
    with patch(model, METHODS["all three"]) as handle:
        generate(model, prompts(image, TEXTS["left-padded"]))
    (stats,) = handle.stats
    assert stats.images == [[16], [16]] and stats.kept == [[[5], [5]], [[2], [2]], [[1], [1]], [[1], [1]]]
    assert stats.totals == [10, 4, 2, 2]
    record = json.loads(json.dumps(stats.to_dict()))
    assert record["seconds"] > 0 and record["kept"] == stats.kept
    assert 0 < record["kv_bytes"][3] < record["kv_bytes"][0] < record["kv_bytes_unpruned"]
    assert "layer" in str(stats) and "visual tokens" in str(stats)


@pytest.mark.parametrize("method", REAL, ids=lambda method: f"{method.name}-{len(method.to_json())}")
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_methods(family, method):
    """Every method in a model keeps its budget of each image."""
    model, image = model_of(family)
    with patch(model, method) as handle:
        generate(model, prompts(image, TEXTS["left-padded"]))
    (stats,) = handle.stats
    assert stats.images == [[image["tokens"]]] * 2
    last = 0 if method.name in ("vtw",) or getattr(method, "depths", ()) else 2 * method.budget(image["tokens"])
    assert stats.totals[-1] == last


def test_cls_attention():
    """Hooks on the tower give the row of its attention matrix; without [CLS], FasterVLM is refused."""
    model, image = model_of("llava", "eager")
    inputs, seen = prompts(image, TEXTS["left-padded"]), []

    class Spy(methods.FasterVLM):
        def select_each(self, images):
            seen.extend(image.cls_attention for image in images)
            return super().select_each(images)

    with patch(model, Spy(keep=3)) as handle:
        generate(model, inputs)
    assert handle.stats[0].kept == [[[3], [3]]] * 4
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    truth = tower.attentions[-1].mean(1)[:, 0, 1:]
    torch.testing.assert_close(torch.stack(seen), truth, rtol=1e-4, atol=1e-6)
    model, image = model_of("internvl")
    with patch(model, methods.FasterVLM(keep=3)), pytest.raises(UnsupportedError, match="cls_attention"):
        generate(model, prompts(image, TEXTS["one"]))


def test_thumbnail():
    """AnyRes: the [CLS] attention of the first tile, and the positions of its tokens."""
    model, image = model_of("llava_next")
    seen = []

    class Spy(methods.ToDRE):
        def select_each(self, images):
            seen.extend(images)
            return super().select_each(images)

    with patch(model, Spy(keep=0.5, depths=())):
        generate(model, prompts(image, TWO_IMAGES))
    assert [image.thumbnail for image in seen] == [(0, 16)] * 2
    assert all(image.cls_attention[:16].min() > 0 and not image.cls_attention[16:].any() for image in seen)


def test_queries_and_keys():
    """FastV gets the queries and keys with which the layer before computed its attention."""
    model, image = model_of("qwen2_5_vl", "eager")
    inputs, seen = prompts(image, TEXTS["one"]), []

    class Spy(Thin):
        def at_layer(self, layer, row, count):
            query, key = row.query, row.key.repeat_interleave(2, 0)
            seen.append((query[:, -1:] @ key.mT * query.shape[-1] ** -0.5).softmax(-1)[:, 0])
            return super().at_layer(layer, row, count)

    with patch(model, Spy(at=(2,))):
        generate(model, inputs)
    with torch.no_grad():
        truth = model(**inputs, output_attentions=True).attentions[1][0, :, -1]
    torch.testing.assert_close(seen[0], truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_layer_0(family, attention, projector, texts):
    """Pruning at the input of the first layer, where no layer before has queries, and of a later one."""
    model, image = model_of(family, attention)
    inputs, method = prompts(image, TEXTS[texts]), Thin(projector=projector, at=(0, 2))
    with patch(model, method):
        out = generate(model, inputs)
    assert_oracle(model, inputs, method, out)


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_rotary_embeddings(family, projector):
    """A method that needs them gets the decoder's, at the tokens of its row."""
    model, image = model_of(family)
    inputs, decoder, seen, made = prompts(image, TEXTS["left-padded"]), model.get_decoder(), [], []

    class Spy(Thin):
        needs = frozenset({"rotary"})

        def at_layer(self, layer, row, count):
            seen.append((layer, row))
            return self.kept(len(row.visual), layer)

    decoder.rotary_emb.register_forward_hook(lambda module, args, output: made.append(output))
    with torch.no_grad(), patch(model, Spy(projector=projector, at=(0, 2))):
        if family == "qwen2_5_vl" and "apply_multimodal_rotary_pos_emb" in vars(inspect.getmodule(type(decoder))):
            with pytest.raises(UnsupportedError, match=r"reads rotary embeddings \[B, S, Dr\].*take a newer release"):
                model(**inputs)
            return
        model(**inputs)
    (truth,) = made
    first, third = ([row for number, row in seen if number == layer] for layer in (0, 2))
    assert len(first) == len(third) == 2
    for b, (one, two) in enumerate(zip(first, third)):
        for own, later, whole in zip(one.rotary, two.rotary, truth):
            assert torch.equal(own, whole[b % len(whole)][-len(one.hidden) :])
            stays = torch.ones(len(own), dtype=torch.bool).index_fill_(0, one.visual, False)
            stays[one.visual[::2]] = True
            assert torch.equal(later, own[stays])


def test_own_forward_loop():
    """A loop without generate: positions follow from the cache."""
    model, image = model_of("llava")
    inputs, method = prompts(image, TEXTS["one"]), METHODS["all three"]
    with torch.no_grad(), patch(model, method):
        out = model(**inputs)
        logits, tokens, cache = [out.logits[:, -1]], [], out.past_key_values
        for _ in range(STEPS - 1):
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            out = model(input_ids=tokens[-1], past_key_values=cache)
            logits.append(out.logits[:, -1])
    tokens.append(logits[-1].argmax(-1, keepdim=True))
    truth = oracle.logits(model, inputs, spans_of(inputs), method, torch.cat(tokens, 1))
    torch.testing.assert_close(torch.stack(logits), truth, rtol=0, atol=1e-5 * float(truth.abs().max().clamp(min=1)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_rows_that_get_shorter_than_others(method, attention):
    """Prompts of one length without a mask: one loses tokens, the other has no image."""
    model, image = model_of("llava", attention)
    both, method = prompts(image, [[3, "image", 5], [24]]), METHODS[method]
    assert both["attention_mask"].all()
    both = {name: both[name] for name in ("input_ids", "pixel_values")}
    one, other = both | {"input_ids": both["input_ids"][:1]}, {"input_ids": both["input_ids"][1:]}

    def steps(inputs):
        out = model(**inputs)
        logits, cache = [out.logits[:, -1]], out.past_key_values
        for _ in range(3):
            out = model(input_ids=torch.full((len(logits[0]), 1), 7), past_key_values=cache)
            logits.append(out.logits[:, -1])
        return torch.stack(logits, 1)

    with torch.no_grad(), patch(model, method):
        got, want = steps(both), torch.cat([steps(one), steps(other)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max().clamp(min=1)))


def test_continuous_batching_is_refused():
    model, image = model_of("llava")
    model.config.text_config._attn_implementation = "paged|sdpa"
    with patch(model, METHODS["layer"]), pytest.raises(UnsupportedError, match="continuous batching cannot be pruned"):
        model(**prompts(image, TEXTS["one"]))


def test_chunked_prefill_is_refused():
    """By transformers itself before 5.5."""
    model, image = model_of("llava")
    with patch(model, METHODS["layer"]), pytest.raises((UnsupportedError, ValueError), match="chunk"):
        generate(model, prompts(image, TEXTS["one"]), prefill_chunk_size=4)


# Errors


def test_unknown_architecture():
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    with pytest.raises(UnsupportedError, match="llama is not supported; supported are llava, "):
        patch(transformers.LlamaForCausalLM(config), Thin())
    with pytest.raises(UnsupportedError, match="Linear is not supported"):
        patch(torch.nn.Linear(2, 2), Thin())


def test_patching_twice():
    model, _ = model_of("llava")
    with patch(model, Thin()), pytest.raises(UnsupportedError, match="patched already; call remove"):
        patch(model, Thin())
    patch(model, Thin()).remove()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "use_cache=False cannot be pruned"),
        ({"cache_implementation": "static"}, "StaticCache cannot be pruned"),
        ({"cache_implementation": "offloaded"}, "cannot be pruned"),
    ],
)
def test_refused_generation(options, message):
    model, image = model_of("llava")
    with patch(model, METHODS["layer"]), pytest.raises(UnsupportedError, match=message):
        generate(model, prompts(image, TEXTS["one"]), **options)
