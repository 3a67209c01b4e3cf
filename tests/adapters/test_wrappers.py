"""Models that are wrapped, whose methods are overridden, that are copied or pickled."""

import contextlib
import copy
import functools
import pickle
import warnings

import pytest
import torch
import transformers

from pruneops import methods
from pruneops.adapters.prepare import prepare
from pruneops.adapters.transformers import UnsupportedError, patch
from pruneops.adapters.transformers.models import find_model
from tests.adapters.situations import DYRATE, LAYER, PROJECTOR, QUERY, ask, every_kind, kept, llava, same, traces, turn
from tests.adapters.test_prepare import since_5_18
from tests.adapters.test_transformers import TEXTS, generate
from tests.adapters.tiny import CLIP, IMAGE, TEXT, model_of, prompts

# Wrappers


class Delegate(torch.nn.Module):
    """A user-defined wrapper that forwards attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Bare(Delegate):
    """A wrapper that does not forward attributes."""

    __getattr__ = torch.nn.Module.__getattr__


def lora(model, adapter="LoraConfig", **options):
    import peft

    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "v_proj"], **({"r": 2} if "Lora" in adapter else {}), **options}
    if "modules_to_save" not in options:
        options["init_lora_weights" if "Lora" in adapter else "init_ia3_weights"] = False
    return peft.get_peft_model(model, getattr(peft, adapter)(**options)).eval()


def hooked(find):
    """accelerate's hook on the modules that `find` names."""

    def wrap(model):
        from accelerate import hooks

        for module in find(model):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
        return model

    return wrap


def dispatched(model):
    import accelerate

    places = dict.fromkeys([name for name, _ in model.named_children()], "cpu")
    return accelerate.dispatch_model(model, places, force_hooks=True)


WRAPPERS = {
    "lora": lora,
    "lora everywhere": lambda model: lora(model, target_modules="all-linear"),
    "dora": lambda model: lora(model, use_dora=True),
    "ia3": lambda model: lora(model, "IA3Config", feedforward_modules=[]),
    "modules to save": lambda model: lora(model, modules_to_save=["multi_modal_projector", "lm_head"]),
    "data parallel": torch.nn.DataParallel,
    "hook on the model": hooked(lambda model: [model]),
    "hook on the base": hooked(lambda model: [model.model]),
    "hook on the decoder": hooked(lambda model: [model.get_decoder()]),
    "hooks on layers": hooked(lambda model: model.get_decoder().layers),
    "hooks on the tower": hooked(lambda model: [model.model.vision_tower, model.model.multi_modal_projector]),
    "dispatched": dispatched,
    "delegate": Delegate,
    "bare": Bare,
    "nested": lambda model: Delegate(torch.nn.DataParallel(lora(Bare(model).inner))),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def answers(model, real, inputs):
    """Logits of a forward pass and of a generation, by the wrapper if it has `generate`, else by the inner model."""
    with torch.no_grad():
        direct = model(**inputs).logits
    return torch.cat([direct[0], ask(model if hasattr(model, "generate") else real, inputs, steps=2)[:, 0]])


@pytest.mark.parametrize(("method", "first"), [(PROJECTOR, "wrap"), (LAYER, "wrap"), (LAYER, "patch")])
@every_wrapper
def test_wrapper(wrap, method, first):
    """Wrapping before or after patching: pruned to the budget, with the logits of the inner model; unpruned again
    after remove()."""
    model, inputs = llava()
    if first == "patch":
        handle, wrapped = patch(model, method), wrap(model)
    else:
        wrapped = wrap(model)
        handle = patch(wrapped, method)
    real = find_model("test", wrapped)
    with handle.disabled():
        plain = answers(wrapped, real, inputs)
    got = answers(wrapped, real, inputs)
    assert [stats.totals[-1] for stats in handle.stats] == [8, 8]
    handle.remove()
    assert same(answers(wrapped, real, inputs), plain) and not same(got, plain)
    with patch(real, method):
        assert same(answers(real, real, inputs), got)


@since_5_18
@every_wrapper
def test_prepare_through_a_wrapper(wrap):
    """The same as with the inner model."""
    model, inputs = llava()
    wrapped = wrap(model)
    real = find_model("test", wrapped)
    one, other = (ask(real, prepare(model, inputs, PROJECTOR)) for model in (wrapped, real))
    assert same(one, other) and int((prepare(wrapped, inputs, PROJECTOR)["input_ids"] == IMAGE).sum()) == 8


@every_kind
@pytest.mark.parametrize("way", ["merge_and_unload", "unload", "merge_adapter", "disable_adapter"])
def test_adapters_come_and_go(way, method):
    """PEFT removes its adapter, or merges it into the weights, while the model is patched."""
    model, inputs = llava()
    wrapped = lora(model)
    handle = patch(wrapped, method)
    pruned = ask(wrapped, inputs)
    with contextlib.ExitStack() as stack:
        if way == "disable_adapter":
            stack.enter_context(wrapped.disable_adapter())
        left = wrapped if way == "disable_adapter" else getattr(wrapped, way)() or wrapped
        got, count = ask(left, inputs), kept(handle)
        assert same(got, pruned) == ("merge" in way)
        handle.remove()
        plain = ask(left, inputs)
        assert not same(plain, got)
        with patch(left, method) as handle:
            assert same(ask(left, inputs), got) and kept(handle) == count


def small():
    """A model that is compiled in a few seconds."""
    torch.manual_seed(0)
    text = {"model_type": "llama", **TEXT, "num_hidden_layers": 2}
    config = transformers.LlavaConfig(
        text_config=text, vision_config={**CLIP, "num_hidden_layers": 1}, image_token_id=IMAGE, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config).eval(), prompts(model_of("llava")[1], TEXTS["one"])


@pytest.mark.parametrize(
    ("way", "method"),
    [("wrapper", PROJECTOR), *((way, methods.DART(keep=0.5, layer=1)) for way in ("inside", "in place", "lora"))],
    ids=["wrapper", "inside", "in place", "lora"],
)
def test_compiled(way, method):
    """Code compiled before patch() or remove() is not used after it, also if the inner model is patched."""
    torch.compiler.reset()
    model, inputs = small()
    inner = lora(model) if way == "lora" else model
    wrapped = inner if way == "in place" else torch.compile(inner, backend="eager")
    if way == "in place":
        model.compile(backend="eager")
    with torch.no_grad():
        plain = wrapped(**inputs).logits
        with patch(model if way == "inside" else wrapped, method) as handle:
            pruned = wrapped(**inputs).logits
            assert kept(handle) == 8 and not same(pruned, plain)
            assert same(ask(wrapped, inputs, steps=2)[0], pruned[:, -1]) and kept(handle) == 8
        assert same(wrapped(**inputs).logits, plain)


def test_adapters_that_write_prompts():
    """Prefix and prompt tuning add tokens: the request is pruned, or refused."""
    import peft

    for config in (peft.PrefixTuningConfig, peft.PromptTuningConfig):
        model, inputs = llava()
        wrapped = peft.get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        with patch(wrapped, PROJECTOR) as handle:
            try:
                with torch.no_grad():
                    wrapped(**inputs)
            except UnsupportedError:
                continue
            except Exception as error:
                with handle.disabled(), pytest.raises(type(error)):  # not ours
                    wrapped(**inputs)
                continue
            assert kept(handle) == 8


# Overrides by users


def user_override(module, name, calls):
    """An override as users write them."""
    inner = getattr(module, name)

    @functools.wraps(inner)
    def override(*args, **kwargs):
        calls.append(name)
        return inner(*args, **kwargs)

    return override


PLACES = {
    "model": lambda model: (model, "forward"),
    "base": lambda model: (model.model, "forward"),
    "images": lambda model: (model.model, "get_image_features"),
    "tower": lambda model: (model.model.vision_tower, "forward"),
    "decoder": lambda model: (model.get_decoder(), "forward"),
    "layer": lambda model: (model.get_decoder().layers[2], "forward"),
    "attention": lambda model: (model.get_decoder().layers[1].self_attn, "forward"),
}
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


@every_kind
@every_place
def test_override_set_before(place, method):
    """Called while patched and after remove(), which restores every attribute of every module."""
    model, inputs = llava()
    ask(model, inputs)
    module, name = place(model)
    with patch(model, method):
        want = ask(model, inputs)
    override = user_override(module, name, calls := [])
    setattr(module, name, override)
    before = traces(model)
    with patch(model, method) as handle:
        try:
            assert same(ask(model, inputs), want) and calls
        except UnsupportedError:
            assert place is PLACES["attention"] and method in (QUERY, DYRATE) and not calls
        with handle.override(keep=0.25):
            pass
    assert traces(model) == before and vars(module)[name] is override
    calls.clear()
    ask(model, inputs)
    assert calls


@every_kind
@every_place
def test_override_set_while_patched(place, method):
    """It stays after remove(), and the model is then unpruned."""
    model, inputs = llava()
    plain = ask(model, inputs)
    module, name = place(model)
    handle = patch(model, method)
    want = ask(model, inputs)
    override = user_override(module, name, calls := [])
    setattr(module, name, override)
    if not (place is PLACES["attention"] and method in (QUERY, DYRATE)):
        assert same(ask(model, inputs), want) and calls
    handle.remove()
    calls.clear()
    assert vars(module)[name] is override and same(ask(model, inputs), plain) and calls
    with patch(model, PROJECTOR) as again:  # a second patch on top
        assert not same(ask(model, inputs), plain) and kept(again) == 8
    assert vars(module)[name] is override and same(ask(model, inputs), plain)


@every_place
@pytest.mark.parametrize("way", ["delete", "put back", "class"])
def test_override_removed_while_patched(place, way):
    """An override removed by the user, in any way, does not come back with remove(); until then requests are pruned,
    refused, or cause a warning."""
    model, inputs = llava()
    plain, before = ask(model, inputs), traces(model)
    module, name = place(model)
    inner = getattr(module, name)
    setattr(module, name, user_override(module, name, calls := []))
    with patch(model, methods.DivPrune(keep=0.5)) as handle, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        want = ask(model, inputs)
        if way == "delete":
            delattr(module, name)
        else:
            setattr(module, name, inner if way == "put back" else getattr(type(module), name).__get__(module))
        calls.clear()
        with contextlib.suppress(UnsupportedError):
            got = ask(model, inputs)
            assert same(got, want) or (
                same(got, plain) and any("was not pruned" in str(warning.message) for warning in caught)
            )
        assert not calls and handle.stats
    assert same(ask(model, inputs), plain) and not calls
    if way == "delete":
        assert traces(model) == before


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "llava_onevision"])
@pytest.mark.parametrize("name", ["get_image_features", "get_video_features", "forward"])
def test_override_of_an_encoder(family, name):
    """In every family; prepare() calls it too and does not change it."""
    model, image = model_of(family)
    base = model.model
    if not hasattr(base, name):
        return
    inputs = prompts(image, [[3, "video", 5]] if name == "get_video_features" else [[3, "image", 5]])
    ask(model, inputs, steps=1)
    override = user_override(base, name, calls := [])
    setattr(base, name, override)
    before = traces(model)
    with patch(model, LAYER) as handle:
        ask(model, inputs, steps=1)
        assert kept(handle) is not None and (calls or name != "forward")
    assert traces(model) == before
    if name != "forward":
        calls.clear()
        try:
            prepare(model, inputs, PROJECTOR)
            assert calls or family in ("internvl", "smolvlm")  # whose videos are images
        except UnsupportedError:
            pass  # transformers before 5.18
    assert vars(base)[name] is override and traces(model) == before


# Copies


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def zero_projector(model):
    """Set the projector's weights to 0."""
    for parameter in find_model("test", model).model.multi_modal_projector.parameters():
        parameter.data.zero_()


@pytest.mark.parametrize("wrap", [lambda model: model, lora, Delegate], ids=["model", "lora", "delegate"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@every_kind
def test_copy(duplicate, method, wrap):
    """A copy has its own handle and weights; remove() of one does not change the other."""
    model, inputs = llava()
    twin = wrap(llava()[0])
    plain = ask(twin, inputs)
    with patch(twin, method):
        want = ask(twin, inputs)
    wrapped = wrap(model)
    handle = patch(wrapped, method)
    other = duplicate(wrapped)
    real = find_model("test", other)
    assert real._pruneops is not handle and real is not find_model("test", wrapped)
    assert same(ask(other, inputs), want) and not handle.stats and kept(real._pruneops) is not None
    assert same(ask(wrapped, inputs), want) and len(real._pruneops.stats) == 1
    third, fourth = copy.deepcopy(other), copy.deepcopy(other)
    zero_projector(third)
    assert not same(ask(third, inputs), want) and same(ask(wrapped, inputs), want)
    real._pruneops.remove()
    assert same(ask(other, inputs), plain) and same(ask(wrapped, inputs), want) and same(ask(fourth, inputs), want)
    handle.remove()
    assert same(ask(wrapped, inputs), plain) and same(ask(fourth, inputs), want)
    handle = patch(other, method)
    assert same(ask(other, inputs), want)
    other = copy.deepcopy(other)
    handle.remove()
    assert same(ask(other, inputs), want)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@every_kind
def test_copy_of_the_base(duplicate, method):
    """The base model alone, and a copy after remove(), which has no trace of the patch."""
    model, inputs = llava()
    handle = patch(model, method)
    other, clean = duplicate(model.model), llava()[0]
    patch(clean, method).remove()
    assert b"pruneops" not in pickle.dumps(clean)
    with torch.no_grad():
        want = model(**inputs, logits_to_keep=1).logits
        got = model.lm_head(other(**inputs).last_hidden_state[:, -1:])
        assert same(got, want) and len(handle.stats) == 1
        handle.remove()
        assert same(model.lm_head(other(**inputs).last_hidden_state[:, -1:]), want)
        plain = duplicate(clean.model)
        assert "forward" not in vars(plain)
        assert not same(model.lm_head(plain(**inputs).last_hidden_state[:, -1:]), want)


@pytest.mark.parametrize("wrap", [torch.compile, Delegate, torch.nn.DataParallel])
def test_patched_through_a_wrapper_then_pickled(wrap):
    """A patched model can be pickled if it can unpatched, even if its wrapper cannot."""
    model, inputs = llava()
    with patch(wrap(model), PROJECTOR):
        other = pickled(model)
        assert same(ask(other, inputs), ask(model, inputs))


def test_after_a_generation():
    """transformers leaves hooks that cannot be pickled; a patch does not change what can be copied."""

    def outcome(act, model):
        try:
            return bool(act(model))
        except Exception as error:
            return type(error)

    for act in (pickled, copy.deepcopy):
        model, inputs = llava()
        ask(model, inputs)
        want = outcome(act, model)
        with patch(model, QUERY):
            ask(model, inputs)
            assert outcome(act, model) == want


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@every_kind
def test_prefix_reuse(family, method, texts):
    """Two continuations on copies of one cache equal those on two separate caches."""
    model, image = model_of(family)
    inputs = prompts(image, TEXTS[texts])
    with patch(model, method):
        runs = [generate(model, inputs) for _ in range(2)]
        turns = [[7, 8, 9], [17, 18]]
        want = [
            ask(model, turn(inputs, run, new), past_key_values=run.past_key_values) for run, new in zip(runs, turns)
        ]
        prefix = generate(model, inputs)
        for _ in range(2):
            for new, truth in zip(turns, want):
                cache = copy.deepcopy(prefix.past_key_values)
                assert same(ask(model, turn(inputs, prefix, new), past_key_values=cache), truth)
