"""Caches that are reset, continued, cropped or refused; memory of a server; warnings about unpruned requests."""

import contextlib
import gc
import warnings

import pytest
import torch
import transformers

from pruneops import methods
from pruneops.adapters.prepare import prepare
from pruneops.adapters.transformers import UnsupportedError, patch
from pruneops.adapters.transformers.cache import ACTIVE
from tests.adapters.situations import LAYER, PROJECTOR, QUERY, ask, every_kind, llava, same, turn
from tests.adapters.test_prepare import since_5_18
from tests.adapters.test_transformers import REAL, TEXTS, generate
from tests.adapters.tiny import CLIP, IMAGE, TEXT, model_of, prompts

# Caches


@every_kind
def test_reset(method):
    """A cache that was reset behaves as a new one, for a pruned request, one of text, and an unpruned one."""
    model, image = model_of("llava")
    requests = [
        prompts(image, texts) for texts in (TEXTS["one"], TEXTS["left-padded"], [[6]], [[2, "image", 3, "image"]])
    ]
    plain = [ask(model, inputs) for inputs in requests]
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    with patch(model, method) as handle:
        want = [ask(model, inputs) for inputs in requests]
        for i in (0, 1, 2, 3, 0, 3, 2, 1, 1):
            cache.reset()
            assert same(ask(model, requests[i], past_key_values=cache), want[i])
        cache.reset()
        with handle.disabled():
            assert same(ask(model, requests[1], past_key_values=cache), plain[1])
    for i in (3, 2, 1, 0):
        cache.reset()
        assert same(ask(model, requests[i], past_key_values=cache), plain[i])


def next_turns(model, inputs, run, count=2):
    """Logits of the turns that follow on the cache of a run."""
    logits = []
    for n in range(count):
        again = turn(inputs, run, [7 + n, 18 + n, 9])
        run = generate(model, again, past_key_values=run.past_key_values)
        inputs = again
        logits.append(torch.stack(run.logits))
    return torch.stack(logits)


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
@every_kind
def test_conversation_after_the_block(family, method, texts):
    """It continues with the same answer, or is refused; it continues if patched again, even with another method."""
    model, image = model_of(family)
    inputs = prompts(image, TEXTS[texts])
    with patch(model, method) as handle:
        want = next_turns(model, inputs, generate(model, inputs))
        runs = [generate(model, inputs) for _ in range(5)]
        with handle.disabled():
            assert same(next_turns(model, inputs, runs[0]), want)
        handle.method = methods.Random(keep=0.1)
        assert same(next_turns(model, inputs, runs[1]), want)
    with contextlib.suppress(UnsupportedError):
        assert same(next_turns(model, inputs, runs[2]), want)
    for run, other in zip(runs[3:], (method, methods.VTW())):
        with patch(model, other):
            assert same(next_turns(model, inputs, run), want)


@since_5_18
@pytest.mark.parametrize("texts", [*TEXTS, "side by side"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"])
def test_later_turns_of_prepared_inputs(family, texts):
    """Three turns, each with the logits of patch."""
    model, image = model_of(family)
    inputs = prompts(image, TEXTS.get(texts, [[2, "image", "image", 4], ["image", "image", 9]]))
    with patch(model, PROJECTOR):
        run = generate(model, inputs)
        want = torch.stack(run.logits), next_turns(model, inputs, run)
    ready = prepare(model, inputs, PROJECTOR)
    run = generate(model, ready)
    assert same(torch.stack(run.logits), want[0])
    assert same(next_turns(model, ready, run), want[1])


def sliding(model):
    config = transformers.LlavaConfig(
        text_config={"model_type": "mistral", **TEXT, "head_dim": 8, "sliding_window": 8}, vision_config=CLIP,
        image_token_id=IMAGE,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).eval(), None


def cache_of(kind):
    def make(model):
        config = model.config.get_text_config()
        if kind == "static":
            return model, transformers.StaticCache(config=config, max_cache_len=64)
        if kind == "quantised":
            layer = type(
                "Quantised", (transformers.cache_utils.QuantizedLayer,), dict.fromkeys(["_quantize", "_dequantize"])
            )
            return model, transformers.Cache(layers=[layer() for _ in range(4)])
        if kind == "sliding":
            layers = [transformers.cache_utils.DynamicSlidingWindowLayer(sliding_window=8) for _ in range(4)]
            return model, transformers.Cache(layers=layers)
        if kind == "encoder-decoder":
            return model, transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
        cache = transformers.DynamicCache(config=config)
        cache.offloading = True
        return model, cache

    return make


CACHES = {kind: cache_of(kind) for kind in ("static", "quantised", "sliding", "encoder-decoder", "offloaded")}
CACHES |= {
    "sliding decoder": sliding,
    "sliding decoder, plain cache": lambda model: (sliding(model)[0], transformers.DynamicCache()),
}


@pytest.mark.parametrize("method", [PROJECTOR, LAYER], ids=["projector", "layer"])
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_refused_caches(make, method):
    """The error names an alternative and comes before the tower runs; the next request works."""
    model, inputs = llava()
    model, cache = make(model)
    ran = []
    model.model.vision_tower.register_forward_hook(lambda *_: ran.append(1))
    with patch(model, method) as handle, torch.no_grad():
        with pytest.raises(UnsupportedError, match=r"use pruneops\.prepare|with the default DynamicCache"):
            model(**inputs, past_key_values=cache)
        assert not ran and not handle.stats and ACTIVE.get() is None
        with handle.disabled():
            if cache is None or type(cache) is transformers.DynamicCache:
                model(**inputs)


@pytest.mark.parametrize("method", [PROJECTOR, LAYER], ids=["projector", "layer"])
def test_sliding_windows_without_a_cache(method):
    """Refused in training too, without a cache."""
    model, inputs = sliding(None)[0].train(), llava()[1]
    with patch(model, method), pytest.raises(UnsupportedError, match="sliding-window"):
        model(**inputs, use_cache=False)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("method", [PROJECTOR, LAYER, QUERY], ids=["projector", "layer", "query"])
def test_speculation(family, method):
    """Prompt lookup and assisted decoding give the tokens of the patched model alone, or are refused."""
    model, image = model_of(family)
    inputs = prompts(image, TEXTS["one"])
    assistant = model_of(family, seed=5)[0]
    with patch(model, method) as handle:
        want = generate(model, inputs, steps=12).sequences
        for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": assistant}, {"assistant_model": model}):
            try:
                got = generate(model, inputs, steps=12, **options).sequences
            except UnsupportedError:
                continue
            except Exception as error:
                with handle.disabled(), pytest.raises(type(error)):  # not ours
                    generate(model, inputs, steps=12, **options)
                continue
            assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@every_kind
def test_many_sequences_of_one_prompt(family, method):
    """Beams, and samples that are all the greedy answer."""
    model, image = model_of(family)
    inputs = prompts(image, TEXTS["left-padded"])
    with patch(model, method):
        want = generate(model, inputs)
        one = generate(model, inputs, num_beams=3)
        twice = generate(model, inputs, num_beams=3, num_return_sequences=2)
        assert torch.equal(one.sequences, twice.sequences[::2])
        again = {name: torch.cat([value, value]) for name, value in inputs.items()}
        if family == "llava":
            assert same(torch.stack(generate(model, again).logits)[:, 2:], torch.stack(want.logits))


# Memory and warnings


def test_memory_of_a_server():
    """Only the statistics of the last 16 requests stay in memory."""
    model, inputs = llava()
    with patch(model, QUERY) as handle:

        def serve(count):
            with torch.no_grad():
                for _ in range(count):
                    model(**inputs)
            gc.collect()
            return len(gc.get_objects())

        before = serve(50)
        assert serve(200) <= before + 20 and len(handle.stats) == 16


def warnings_of(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in caught if "pruneops" in str(warning.message)]


@pytest.mark.parametrize(
    "method", [methods.Random(keep=1.0), methods.Uniform(keep=99), methods.DART(keep=1.0, layer=2)]
)
def test_warning_about_unpruned_requests(method):
    """Once, with the reason; never for requests of text, or while disabled."""
    model, image = model_of("llava")
    inputs = prompts(image, TEXTS["one"])
    with patch(model, method) as handle:
        assert not warnings_of(lambda: ask(model, prompts(image, [[5], [7]])))
        with handle.disabled():
            assert not warnings_of(lambda: ask(model, inputs))
        (message,) = warnings_of(lambda: [ask(model, inputs) for _ in range(3)])
        assert "was not pruned" in message and method.__class__.__name__ in message and "16" in message
    with patch(model, PROJECTOR):
        assert not warnings_of(lambda: ask(model, inputs))


# Sizes


@pytest.mark.parametrize("method", REAL, ids=lambda method: f"{method.name}-{len(method.to_json())}")
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl", "smolvlm"])
def test_hardly_any_text(family, method):
    """Only an image, an image first, an image last: finite logits, or an UnsupportedError."""
    model, image = model_of(family)
    for texts in ([["image"]], [[1, "image"]], [["image", 1]], [["image", "image"]], [["image"], [4, "image"]]):
        inputs = prompts(image, texts)
        with patch(model, method) as handle:
            try:
                assert ask(model, inputs, steps=2).isfinite().all()
                assert len(handle.stats) == 1 and all(map(len, handle.stats[0].images))
            except UnsupportedError as error:
                assert str(error).startswith("pruneops: ")
