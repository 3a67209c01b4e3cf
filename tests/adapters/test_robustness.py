"""What owners of a model do around pruning: wrap it, override and copy it, share it, interrupt it, go on with caches.

What must hold is a relation between runs: the pruned answer of the same model left in peace, or the unpatched one.
"""

import asyncio
import contextlib
import copy
import functools
import gc
import pickle
import threading
import warnings
from importlib.util import find_spec

import pytest
import torch
import transformers

from pruneops import methods
from pruneops.adapters.prepare import prepare
from pruneops.adapters.transformers import UnsupportedError, patch
from pruneops.adapters.transformers.cache import ACTIVE
from pruneops.adapters.transformers.models import find_model
from tests.adapters.oracle import Thin
from tests.adapters.test_prepare import since_5_18
from tests.adapters.test_transformers import REAL, TEXTS, generate
from tests.adapters.tiny import CLIP, IMAGE, TEXT, model_of, prompts

transformers.logging.set_verbosity_error()
PROJECTOR = methods.ToDRE(keep=0.5, depths=())
LAYER = methods.DART(keep=0.5, layer=2)
QUERY = methods.FastV(keep=0.5, layer=2)
THIN = Thin(projector=True, at=(1, 3), steps=(2,))
KINDS = {"projector": PROJECTOR, "layer": LAYER, "query": QUERY, "all three": THIN}
every_kind = pytest.mark.parametrize("method", KINDS.values(), ids=KINDS)


def llava(texts="one"):
    model, image = model_of("llava")
    return model, prompts(image, TEXTS[texts])


def ask(model, inputs, **options):
    """Logits of a generation, or of a forward pass where a wrapper has no more than that."""
    if hasattr(model, "generate"):
        return torch.stack(generate(model, inputs, **options).logits)
    with torch.no_grad():
        return model(**inputs).logits


def same(one, other):
    return one.shape == other.shape and bool(((one - other).abs().max() < 1e-4).item())


def kept(handle):
    """Visual tokens that the last layer held after the latest request's prompt."""
    return handle.stats[-1].totals[-1] if handle.stats else None


TRANSFORMERS_OWN = "_pruneops", "rope_deltas"  # the second is set in every pass of a Qwen


def traces(model):
    """What a pass or a patch could leave behind: attributes of every module, hooks and configurations."""
    own = []
    for module in model.modules():
        names = {name: id(value) for name, value in vars(module).items() if name not in TRANSFORMERS_OWN}
        hooks = [len(value) for name, value in vars(module).items() if name.endswith("_hooks")]
        config = getattr(module, "config", None)
        own.append((names, hooks, getattr(config, "_attn_implementation", None)))
    return own


# Wrappers


class Delegate(torch.nn.Module):
    """A wrapper of somebody's own."""

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
    """One that shows nothing of what is inside."""

    __getattr__ = torch.nn.Module.__getattr__


def lora(model, adapter="LoraConfig", **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "v_proj"], **({"r": 2} if "Lora" in adapter else {}), **options}
    if "modules_to_save" not in options:
        options["init_lora_weights" if "Lora" in adapter else "init_ia3_weights"] = False
    return peft.get_peft_model(model, getattr(peft, adapter)(**options)).eval()


def hooked(find):
    """accelerate's hook on the modules that `find` names."""

    def wrap(model):
        hooks = pytest.importorskip("accelerate.hooks")
        for module in find(model):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
        return model

    return wrap


def dispatched(model):
    accelerate = pytest.importorskip("accelerate")
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
    """Of a forward pass, and of a generation by the wrapper if it has one, else by the model inside."""
    with torch.no_grad():
        direct = model(**inputs).logits
    return torch.cat([direct[0], ask(model if hasattr(model, "generate") else real, inputs, steps=2)[:, 0]])


@pytest.mark.parametrize(("method", "first"), [(PROJECTOR, "wrap"), (LAYER, "wrap"), (LAYER, "patch")])
@every_wrapper
def test_wrapper(wrap, method, first):
    """Whichever comes first, wrapping or patching: pruned to the budget, with the answers of the model inside; plain
    again after remove()."""
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
    """As through the model inside."""
    model, inputs = llava()
    wrapped = wrap(model)
    real = find_model("test", wrapped)
    one, other = (ask(real, prepare(own, inputs, PROJECTOR)) for own in (wrapped, real))
    assert same(one, other) and int((prepare(wrapped, inputs, PROJECTOR)["input_ids"] == IMAGE).sum()) == 8


@every_kind
@pytest.mark.parametrize("way", ["merge_and_unload", "unload", "merge_adapter", "disable_adapter"])
def test_adapters_come_and_go(way, method):
    """PEFT takes its adapter away, or melts it into the weights, while the model is patched."""
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
    """One that is compiled in a few seconds."""
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
    """Code that was compiled before does not outlive patch(), nor remove(), also where the model inside is patched."""
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
    """Prefix and prompt tuning bring tokens of their own: an answer that is pruned, or a refusal."""
    peft = pytest.importorskip("peft")
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


# Overrides of the owner


def own(module, name, calls):
    """An override as owners write them."""
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
    """Called while patched and after remove(); every attribute of every module is then what it was."""
    model, inputs = llava()
    ask(model, inputs)
    module, name = place(model)
    with patch(model, method):
        want = ask(model, inputs)
    override = own(module, name, calls := [])
    setattr(module, name, override)
    before = traces(model)
    with patch(model, method) as handle:
        try:
            assert same(ask(model, inputs), want) and calls
        except UnsupportedError:
            assert place is PLACES["attention"] and method is QUERY and not calls
        with handle.override(keep=0.25):
            pass
    assert traces(model) == before and vars(module)[name] is override
    calls.clear()
    ask(model, inputs)
    assert calls


@every_kind
@every_place
def test_override_set_while_patched(place, method):
    """It stays when the patch goes, and the model is then plain."""
    model, inputs = llava()
    plain = ask(model, inputs)
    module, name = place(model)
    handle = patch(model, method)
    want = ask(model, inputs)
    override = own(module, name, calls := [])
    setattr(module, name, override)
    if not (place is PLACES["attention"] and method is QUERY):
        assert same(ask(model, inputs), want) and calls
    handle.remove()
    calls.clear()
    assert vars(module)[name] is override and same(ask(model, inputs), plain) and calls
    with patch(model, PROJECTOR) as again:  # and once more on top
        assert not same(ask(model, inputs), plain) and kept(again) == 8
    assert vars(module)[name] is override and same(ask(model, inputs), plain)


@every_place
@pytest.mark.parametrize("way", ["delete", "put back", "class"])
def test_override_taken_away_while_patched(place, way):
    """By its owner, in whichever way: it does not come back with remove(); until then requests are pruned, or refused,
    or their owner is warned."""
    model, inputs = llava()
    plain, before = ask(model, inputs), traces(model)
    module, name = place(model)
    inner = getattr(module, name)
    setattr(module, name, own(module, name, calls := []))
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
            assert same(got, want) or (same(got, plain) and any("was not pruned" in str(own.message) for own in caught))
        assert not calls and handle.stats
    assert same(ask(model, inputs), plain) and not calls
    if way == "delete":
        assert traces(model) == before


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "llava_onevision"])
@pytest.mark.parametrize("name", ["get_image_features", "get_video_features", "forward"])
def test_override_of_an_encoder(family, name):
    """In every family; prepare() calls it too and leaves it."""
    model, image = model_of(family)
    base = model.model
    if not hasattr(base, name):
        return
    inputs = prompts(image, [[3, "video", 5]] if name == "get_video_features" else [[3, "image", 5]])
    ask(model, inputs, steps=1)
    override = own(base, name, calls := [])
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


def blind(model):
    """A model whose projector gives nothing."""
    for parameter in find_model("test", model).model.multi_modal_projector.parameters():
        parameter.data.zero_()


@pytest.mark.parametrize("wrap", [lambda model: model, lora, Delegate], ids=["model", "lora", "delegate"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@every_kind
def test_copy(duplicate, method, wrap):
    """Pruned by a handle of its own, with its own weights; neither's remove() touches the other."""
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
    blind(third)
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
    """The base model alone, and a copy after remove(), which is plain and holds nothing of ours."""
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
    """What can be pickled unpatched can be patched, though the wrapper could not be."""
    model, inputs = llava()
    with patch(wrap(model), PROJECTOR):
        other = pickled(model)
        assert same(ask(other, inputs), ask(model, inputs))


def test_after_a_generation():
    """transformers leaves hooks that cannot be pickled; a patch makes no difference to what can be copied."""

    def fate(act, model):
        try:
            return bool(act(model))
        except Exception as error:
            return type(error)

    for act in (pickled, copy.deepcopy):
        model, inputs = llava()
        ask(model, inputs)
        want = fate(act, model)
        with patch(model, QUERY):
            ask(model, inputs)
            assert fate(act, model) == want


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@every_kind
def test_prefix_reuse(family, method, texts):
    """Two continuations of one cache, each on a copy, are those of two caches of their own."""
    model, image = model_of(family)
    inputs = prompts(image, TEXTS[texts])
    with patch(model, method):
        runs = [generate(model, inputs) for _ in range(2)]
        words = [[7, 8, 9], [17, 18]]
        want = [
            ask(model, turn(inputs, run, own), past_key_values=run.past_key_values) for run, own in zip(runs, words)
        ]
        prefix = generate(model, inputs)
        for _ in range(2):
            for own, truth in zip(words, want):
                cache = copy.deepcopy(prefix.past_key_values)
                assert same(ask(model, turn(inputs, prefix, own), past_key_values=cache), truth)


def turn(inputs, run, words):
    """The inputs of the next turn: all so far and a few more words."""
    ids = torch.cat([run.sequences, torch.tensor([words] * len(run.sequences))], 1)
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)[:, -ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": mask}


# State of threads, tasks and passes in one another


def together(*acts):
    """Their results, each in a thread of its own."""
    results = [None] * len(acts)

    def work(i):
        try:
            results[i] = acts[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def meeting(count):
    """A hook in which so many threads wait for each other, as long as they are all still running."""
    barrier = threading.Barrier(count)

    def meet(*_):
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(2)

    return meet


REENTRANT = find_spec("transformers.utils.output_capturing") is not None


def needs_reentrant(spot):
    if not REENTRANT and spot in ("tower", "projector", "threads"):
        pytest.skip("this transformers replaces methods of a tower while it runs, so two runs differ unpatched too")


THREE = [3, "image", 5], [9, "image", 2], ["image", 7]
SPOTS = {
    "tower": lambda model: model.model.vision_tower.modules(),
    "layers": lambda model: model.get_decoder().layers,
    "attention": lambda model: [layer.self_attn.q_proj for layer in model.get_decoder().layers],
    "decoder": lambda model: [model.get_decoder()],
}


@pytest.mark.parametrize("spot", SPOTS)
@every_kind
def test_threads_in_one_pass(method, spot):
    """Three threads walk through a pass side by side: one prunes, one prunes by other settings, one does not."""
    needs_reentrant("threads")
    model, image = model_of("llava")
    asked = [prompts(image, [text], seed=n) for n, text in enumerate(THREE)]
    handle = patch(model, method)
    blocks = [contextlib.nullcontext, lambda: handle.override(keep=1 if method is THIN else 0.25), handle.disabled]

    def act(i):
        with blocks[i]():
            return ask(model, asked[i], steps=2)

    want = [act(i) for i in range(3)]
    meet = meeting(3)
    hooks = [module.register_forward_hook(meet) for module in SPOTS[spot](model)]
    for _ in range(2):
        got = together(*(functools.partial(act, i) for i in range(3)))
        assert all(same(one, other) for one, other in zip(got, want))
    for hook in hooks:
        hook.remove()
    handle.remove()
    assert same(ask(model, asked[2], steps=2), want[2]) and ACTIVE.get() is None


@every_kind
def test_remove_while_another_thread_is_in_a_pass(method):
    """Its pass ends as it began, and nothing stays."""
    model, inputs = llava()
    plain, before = ask(model, inputs), traces(model)
    with patch(model, method):
        want = ask(model, inputs, steps=1)
    handle = patch(model, method)
    hook = model.get_decoder().layers[1].register_forward_hook(lambda *_: handle.remove())
    assert same(ask(model, inputs, steps=1), want)
    hook.remove()
    assert same(ask(model, inputs), plain) and traces(model) == before


@every_kind
def test_tasks(method):
    """Settings belong to a task; decode loops of several tasks take turns."""
    model, image = model_of("llava")
    asked = [prompts(image, [text], seed=n) for n, text in enumerate(THREE)]
    handle = patch(model, method)
    blocks = [contextlib.nullcontext, lambda: handle.override(keep=1 if method is THIN else 0.25), handle.disabled]

    async def act(i, pause):
        with blocks[i]():
            logits, given, cache = [], asked[i], None
            for _ in range(4):
                out = model(**given, past_key_values=cache)
                logits.append(out.logits[:, -1])
                given, cache = {"input_ids": logits[-1].argmax(-1, keepdim=True)}, out.past_key_values
                await asyncio.sleep(0) if pause else None
            return torch.stack(logits)

    async def gathered():
        return await asyncio.gather(*(act(i, True) for i in range(3)))

    with torch.no_grad():  # which is of the thread, so not within a task
        want = [asyncio.run(act(i, False)) for i in range(3)]
        got = asyncio.run(gathered())
    assert all(same(one, other) for one, other in zip(got, want))
    assert not same(want[0], want[1])


def test_blocks_that_end_out_of_order():
    """Blocks of two handles, and of one handle twice."""
    (one, inputs), (other, _) = llava(), llava()
    handle, second = patch(one, PROJECTOR), patch(other, LAYER)
    plain = ask(llava()[0], inputs)
    want = ask(one, inputs)
    with handle.disabled(), second.override(keep=0.25):
        assert same(ask(one, inputs), plain) and not same(ask(other, inputs), plain) and kept(second) == 4
        with handle.override(keep=0.5):
            assert same(ask(one, inputs), want)
        assert same(ask(one, inputs), plain)
        with second.disabled(), handle.override(keep=0.5):
            assert same(ask(one, inputs), want) and same(ask(other, inputs), plain)
    assert same(ask(one, inputs), want) and kept(second) == 4


INNER = {
    "another": lambda model, other, handle, inputs, text: ask(other, inputs, steps=2),
    "another's text": lambda model, other, handle, inputs, text: ask(other, text, steps=2),
    "itself": lambda model, other, handle, inputs, text: ask(model, inputs, steps=2),
    "its own text": lambda model, other, handle, inputs, text: ask(model, text, steps=2),
    "its encoder": lambda model, other, handle, inputs, text: model.model.get_image_features(
        pixel_values=inputs["pixel_values"]
    ).pooler_output[0],
    "another's encoder": lambda model, other, handle, inputs, text: other.model.get_image_features(
        pixel_values=inputs["pixel_values"]
    ).pooler_output[0],
}


@pytest.mark.parametrize("spot", ["tower", "projector", "layer 0", "layer 2", "attention", "decoder", "method"])
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_pass_inside_a_pass(inner, spot):
    """A model that is asked from within a pass, of its own or of another model, prunes and answers as ever."""
    needs_reentrant(spot)
    model, image = model_of("llava")
    other = model_of("llava", seed=3)[0]
    inputs, more, text = (prompts(image, [own], seed=n) for n, own in enumerate((*THREE[:2], [6])))
    handle, _ = patch(model, THIN), patch(other, QUERY)

    @torch.no_grad()
    def act(*_):
        if not busy:
            busy.append(1)
            got.append(inner(model, other, handle, more, text))
            busy.clear()

    busy, got = [1], []
    want = ask(model, inputs)
    act_alone = inner(model, other, handle, more, text)
    decoder = model.get_decoder()
    modules = {
        "tower": model.model.vision_tower, "projector": model.model.multi_modal_projector, "layer 0": decoder.layers[0],
        "layer 2": decoder.layers[2], "attention": decoder.layers[1].self_attn.k_proj, "decoder": decoder,
    }  # fmt: skip
    if spot == "method":
        handle.method = Asking(act)
    else:
        hooks = [modules[spot].register_forward_pre_hook(act), modules[spot].register_forward_hook(act)]
    busy.clear()
    assert same(ask(model, inputs), want)
    assert got and all(same(one, act_alone) for one in got)
    if spot != "method":
        for hook in hooks:
            hook.remove()
    assert same(ask(model, inputs), want) and ACTIVE.get() is None


class Asking(Thin):
    """One that asks somebody else before it chooses."""

    def __init__(self, act):
        super().__init__(projector=True, at=(1, 3), steps=(2,))
        object.__setattr__(self, "act", act)

    def select_each(self, images):
        self.act()
        return super().select_each(images)

    def at_layer(self, *args):
        self.act()
        return super().at_layer(*args)


@every_kind
def test_disabled_pass_inside_a_pass(method):
    """A layer's hook asks the same model, unpruned."""
    model, inputs = llava()
    plain, got = ask(model, inputs, steps=1), []
    with patch(model, method) as handle:
        want = ask(model, inputs, steps=1)

        def act(*_):
            if len(got) == 0:
                got.append(None)
                with handle.disabled():
                    got.append(ask(model, inputs, steps=1))

        model.get_decoder().layers[1].register_forward_hook(act)
        assert same(ask(model, inputs, steps=1), want) and same(got[1], plain)


# Exceptions


def faulty(model, where):
    """The module whose forward, or the object whose method, is to fail."""
    decoder, base = model.get_decoder(), model.model
    return {
        "tower": [own for own in base.vision_tower.modules() if hasattr(own, "q_proj")][-1],
        "projector": base.multi_modal_projector,
        "before": decoder.layers[0],
        "at": decoder.layers[2],
        "after": decoder.layers[3],
        "attention": decoder.layers[1].self_attn.k_proj,
        "norm": decoder.norm,
        "head": model.lm_head,
    }[where]


ERRORS = ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit
DECODER = ["before", "at", "after", "attention", "norm", "head"]
WHERE = ["features", "method", "tower", "projector", *DECODER]


class Failing(Thin):
    """A method that fails in its layer."""

    def at_layer(self, layer, row, count):
        if layer == 3:
            raise self.keep
        return super().at_layer(layer, row, count)


def fail_once(model, where, error, handle, stack):
    @functools.wraps(type(model.model).get_image_features)  # generate reads its signature
    def fail(*_, **__):
        raise error("on purpose")

    if where == "features":
        inner = vars(model.model).get("get_image_features")
        model.model.get_image_features = fail
        stack.callback(setattr, model.model, "get_image_features", inner)
    elif where == "method":
        handle.method, method = Failing(projector=True, at=(1, 3), keep=error("on purpose")), handle.method
        stack.callback(setattr, handle, "method", method)
    else:
        for register in ("register_forward_pre_hook", "register_forward_hook")[: 1 + (error is KeyboardInterrupt)]:
            stack.callback(getattr(faulty(model, where), register)(fail).remove)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", WHERE)
def test_exception_in_a_prefill(where, error):
    """Whatever is raised, wherever: modules, hooks and configurations are what they were before the pass, the user's
    cache is empty again, and the next answers are right."""
    needs_reentrant(where if where == "tower" else None)
    model, inputs = llava("left-padded")
    plain, clean = ask(model, inputs), traces(model)
    fields = "cls_attention" if where in ("tower", "projector") else None
    for method in (methods.FasterVLM(keep=0.5),) if fields else (QUERY, THIN):
        handle = patch(model, method)
        before, want = traces(model), ask(model, inputs)
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        first = cache.layers
        with contextlib.ExitStack() as stack:
            fail_once(model, where, error, handle, stack)
            with pytest.raises(error, match="on purpose"):
                ask(model, inputs, past_key_values=cache)
        if where == "head":  # the pass of the base model was over
            cache.reset()
        assert traces(model) == before and ACTIVE.get() is None
        assert len(handle.stats) == 1 + (where == "head")
        assert cache.get_seq_length() == 0 and (where == "head" or cache.layers is first)
        assert same(ask(model, inputs, past_key_values=cache), want) and same(ask(model, inputs), want)
        handle.remove()
        assert traces(model) == clean and same(ask(model, inputs), plain)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", DECODER)
def test_exception_in_a_step(where, error):
    """The same in a step of generation, by methods that need masks of their own there."""
    model, inputs = llava("left-padded")
    plain, clean = ask(model, inputs), traces(model)
    handle = patch(model, THIN)
    before, want = traces(model), ask(model, inputs)
    with torch.no_grad():
        out = model(**inputs)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        step = {"input_ids": torch.tensor([[7], [8]]), "attention_mask": mask, "past_key_values": out.past_key_values}
        with contextlib.ExitStack() as stack:
            fail_once(model, where, error, handle, stack)
            with pytest.raises(error, match="on purpose"):
                model(**step)
    assert traces(model) == before and ACTIVE.get() is None and same(ask(model, inputs), want)
    handle.remove()
    assert traces(model) == clean and same(ask(model, inputs), plain)


def test_generator_that_is_closed_in_a_pass():
    """GeneratorExit as it comes in life: a pass whose owner goes away."""
    model, inputs = llava()
    with patch(model, QUERY) as handle:

        def tokens():
            with handle.override(keep=0.25):
                while True:
                    yield ask(model, inputs, steps=1)

        stream = tokens()
        next(stream)
        assert kept(handle) == 4
        stream.close()
        ask(model, inputs, steps=1)
        assert kept(handle) == 8


# Caches


@every_kind
def test_reset(method):
    """A cache that was reset is as good as a new one, for a pruned request, one of text, and an unpruned one."""
    model, image = model_of("llava")
    asked = [prompts(image, texts) for texts in (TEXTS["one"], TEXTS["left-padded"], [[6]], [[2, "image", 3, "image"]])]
    plain = [ask(model, inputs) for inputs in asked]
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    with patch(model, method) as handle:
        want = [ask(model, inputs) for inputs in asked]
        for i in (0, 1, 2, 3, 0, 3, 2, 1, 1):
            cache.reset()
            assert same(ask(model, asked[i], past_key_values=cache), want[i])
        cache.reset()
        with handle.disabled():
            assert same(ask(model, asked[1], past_key_values=cache), plain[1])
    for i in (3, 2, 1, 0):
        cache.reset()
        assert same(ask(model, asked[i], past_key_values=cache), plain[i])


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
    """It goes on with the same answer, or is refused; patched again, by another method even, it goes on."""
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
    """Three turns, each as patch has it."""
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
    """With a word on what to do instead, before the tower runs; the next request is answered."""
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


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("method", [PROJECTOR, LAYER, QUERY], ids=["projector", "layer", "query"])
def test_speculation(family, method):
    """Prompt lookup and an assistant propose; what is said is what the patched model says alone, or it is refused."""
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
        again = {name: torch.cat([own, own]) for name, own in inputs.items()}
        if family == "llava":
            assert same(torch.stack(generate(model, again).logits)[:, 2:], torch.stack(want.logits))


# Memory and words


def test_memory_of_a_server():
    """Requests leave nothing behind but the statistics of the last 16."""
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


def said(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(own.message) for own in caught if "pruneops" in str(own.message)]


@pytest.mark.parametrize(
    "method", [methods.Random(keep=1.0), methods.Uniform(keep=99), methods.DART(keep=1.0, layer=2)]
)
def test_unpruned_requests_are_told(method):
    """Once, with the reason; never of requests of text, or of those that were not to be pruned."""
    model, image = model_of("llava")
    inputs = prompts(image, TEXTS["one"])
    with patch(model, method) as handle:
        assert not said(lambda: ask(model, prompts(image, [[5], [7]])))
        with handle.disabled():
            assert not said(lambda: ask(model, inputs))
        (words,) = said(lambda: [ask(model, inputs) for _ in range(3)])
        assert "was not pruned" in words and method.__class__.__name__ in words and "16" in words
    with patch(model, PROJECTOR):
        assert not said(lambda: ask(model, inputs))


# Sizes


@pytest.mark.parametrize("method", REAL, ids=lambda method: f"{method.name}-{len(method.to_json())}")
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl", "smolvlm"])
def test_hardly_any_text(family, method):
    """An image and nothing else, first, last: an answer with finite logits, or a refusal in our words."""
    model, image = model_of(family)
    for texts in ([["image"]], [[1, "image"]], [["image", 1]], [["image", "image"]], [["image"], [4, "image"]]):
        inputs = prompts(image, texts)
        with patch(model, method) as handle:
            try:
                assert ask(model, inputs, steps=2).isfinite().all()
                assert len(handle.stats) == 1 and all(map(len, handle.stats[0].images))
            except UnsupportedError as error:
                assert str(error).startswith("pruneops: ")
