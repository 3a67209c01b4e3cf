"""Concurrent, nested and interrupted passes."""

import asyncio
import contextlib
import functools
import threading
import warnings
from importlib.util import find_spec

import pytest
import torch
import transformers

from pruneops import methods
from pruneops.adapters.transformers import patch
from pruneops.adapters.transformers.cache import ACTIVE
from tests.adapters.oracle import Thin
from tests.adapters.situations import LAYER, PROJECTOR, QUERY, THIN, ask, every_kind, kept, llava, same, traces
from tests.adapters.tiny import model_of, prompts

# Threads, tasks and nested passes


def in_threads(*acts):
    """Results of functions, each in its own thread."""
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


def barrier_hook(count):
    """A hook in which `count` threads wait for each other, as long as all are running."""
    barrier = threading.Barrier(count)

    def wait(*_):
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(2)

    return wait


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
    """Three threads run a pass in lockstep: one prunes, one prunes with other settings, one does not."""
    needs_reentrant("threads")
    model, image = model_of("llava")
    requests = [prompts(image, [text], seed=n) for n, text in enumerate(THREE)]
    handle = patch(model, method)
    blocks = [contextlib.nullcontext, lambda: handle.override(keep=1 if method is THIN else 0.25), handle.disabled]

    def act(i):
        with blocks[i]():
            return ask(model, requests[i], steps=2)

    want = [act(i) for i in range(3)]
    wait = barrier_hook(3)
    hooks = [module.register_forward_hook(wait) for module in SPOTS[spot](model)]
    for _ in range(2):
        got = in_threads(*(functools.partial(act, i) for i in range(3)))
        assert all(same(one, other) for one, other in zip(got, want))
    for hook in hooks:
        hook.remove()
    handle.remove()
    assert same(ask(model, requests[2], steps=2), want[2]) and ACTIVE.get() is None


@every_kind
def test_remove_while_another_thread_is_in_a_pass(method):
    """Its pass ends as it began, and leaves no trace."""
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
    requests = [prompts(image, [text], seed=n) for n, text in enumerate(THREE)]
    handle = patch(model, method)
    blocks = [contextlib.nullcontext, lambda: handle.override(keep=1 if method is THIN else 0.25), handle.disabled]

    async def act(i, pause):
        with blocks[i]():
            logits, given, cache = [], requests[i], None
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
    """A model that runs inside a pass, of itself or of another model, gives its usual logits."""
    needs_reentrant(spot)
    model, image = model_of("llava")
    other = model_of("llava", seed=3)[0]
    inputs, more, text = (prompts(image, [text], seed=n) for n, text in enumerate((*THREE[:2], [6])))
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
        handle.method = CallsBack(act)
    else:
        hooks = [modules[spot].register_forward_pre_hook(act), modules[spot].register_forward_hook(act)]
    busy.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="pruneops")  # no request is unpruned
        assert same(ask(model, inputs), want)
    assert got and all(same(one, act_alone) for one in got)
    if spot != "method":
        for hook in hooks:
            hook.remove()
    assert same(ask(model, inputs), want) and ACTIVE.get() is None


class CallsBack(Thin):
    """Calls a function before it chooses."""

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
    """A layer's hook runs the same model, unpruned."""
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
    """The module whose forward will fail."""
    decoder, base = model.get_decoder(), model.model
    return {
        "tower": [module for module in base.vision_tower.modules() if hasattr(module, "q_proj")][-1],
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
    """After any exception, anywhere: modules, hooks and configurations are as before the pass, the user's cache is
    empty again, and the next logits are right."""
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
    """The same in a decode step, with a method that needs masks there."""
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
    """GeneratorExit from a generator that is closed between passes."""
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
