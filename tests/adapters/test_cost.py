"""Cost of pruning for a pass: masks, hooks, host synchronisations."""

import sys

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from pruneops import methods
from pruneops.adapters.prepare import prepare
from pruneops.adapters.transformers import patch
from tests.adapters.test_prepare import since_5_18
from tests.adapters.test_transformers import REAL, TEXTS, TWO_IMAGES, generate
from tests.adapters.tiny import model_of, prompts
from tests.host_sync import host_syncs, no_host_sync

transformers.logging.set_verbosity_error()
PROJECTOR, LAYER = methods.ToDRE(keep=0.5, depths=()), methods.DART(keep=0.5, layer=2)
# Budgets that depend on sizes only; ToDRE's second stage depends on content.
STATIC = [method for method in REAL if not getattr(method, "depths", ())] + [methods.FasterVLM(keep=0.5)]
FOLDERS = "pruneops/adapters", "pruneops/methods"


def without_mask(inputs):
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


@pytest.fixture
def reads(monkeypatch):
    """Copies to the host, which the detector does not report: the lines of the adapters that make one."""
    places, cpu = [], torch.Tensor.cpu

    def counted(tensor, *args, **kwargs):
        caller = sys._getframe(1)
        while caller.f_code.co_filename.endswith("host_sync.py"):
            caller = caller.f_back
        if "/pruneops/adapters/" in caller.f_code.co_filename:
            places.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
        return cpu(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    return places


@pytest.mark.parametrize("texts", [[[3, "image", 5]], TWO_IMAGES], ids=["one", "two"])
@pytest.mark.parametrize("method", STATIC, ids=lambda method: f"{method.name}-{len(method.to_json())}")
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_one_prompt_reads_nothing(family, method, texts, reads):
    model, image = model_of(family)
    if method.name == "fastervlm" and not family.startswith("llava"):
        pytest.skip("a tower without [CLS]")
    inputs = without_mask(prompts(image, texts))
    with patch(model, method) as handle, torch.no_grad(), no_host_sync(*FOLDERS):
        out = model(**inputs, logits_to_keep=1)
        model(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values)
    (stats,) = handle.stats
    assert stats.totals[-1] < sum(map(sum, stats.images)) and not reads


@pytest.mark.parametrize("method", STATIC[:2], ids=lambda method: method.name)
@pytest.mark.parametrize("family", ["llava", "internvl", "idefics3"])
def test_a_batch_is_read_once(family, method, reads):
    model, image = model_of(family)
    with patch(model, method), no_host_sync(*FOLDERS):
        generate(model, prompts(image, TEXTS["left-padded"]))
    assert len(reads) == 1


@since_5_18
def test_prepare_reads_nothing(reads):
    model, image = model_of("llava")
    with no_host_sync(*FOLDERS):
        prepare(model, without_mask(prompts(image, TWO_IMAGES)), PROJECTOR)
    assert not reads


def test_second_stage_synchronises_once_a_layer():
    """ToDRE's second stage depends on content."""
    model, image = model_of("llava")
    method = methods.ToDRE(keep=1.0, depths=(0.5, 0.75), tau=0.0)
    with patch(model, method), torch.no_grad(), host_syncs(*FOLDERS) as places:
        model(**without_mask(prompts(image, TEXTS["one"])))
    assert len(places) == 2 and all("pruneops/methods/todre.py" in place for place in places)


def layer_masks(model, act):
    """The mask of every call of a decoder layer."""
    masks = []

    def hook(module, args, kwargs):
        masks.append(kwargs.get("attention_mask"))

    hooks = [layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for layer in model.get_decoder().layers]
    try:
        act()
    finally:
        for registered in hooks:
            registered.remove()
    return masks


@pytest.mark.parametrize("method", [PROJECTOR, LAYER, methods.FastV(keep=0.5, layer=1)], ids=lambda m: m.name)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_sdpa_needs_no_mask(family, method):
    """Neither in prefill nor in a decode step, so that its flash kernel can run."""
    model, image = model_of(family)
    inputs = without_mask(prompts(image, TEXTS["one"]))

    def act():
        with patch(model, method), torch.no_grad():
            out = model(**inputs)
            model(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values)

    masks = layer_masks(model, act)
    assert len(masks) == 8 and all(mask is None for mask in masks)


@pytest.mark.parametrize(
    ("attention", "texts", "method", "limit"),
    [
        ("eager", "one", PROJECTOR, 1),
        ("eager", "one", LAYER, 1),  # later layers use a slice of the first ones'
        ("sdpa", "left-padded", PROJECTOR, 1),
        ("sdpa", "left-padded", LAYER, 2),  # one for each set of tokens
    ],
)
def test_masks_of_a_pass(attention, texts, method, limit):
    model, image = model_of("llava", attention)
    inputs = prompts(image, TEXTS[texts])
    passes = []

    def act():
        with patch(model, method):
            generate(model, inputs, steps=3)

    masks = layer_masks(model, act)
    for first in range(0, len(masks), 4):
        passes.append({mask.untyped_storage().data_ptr() for mask in masks[first : first + 4] if mask is not None})
    assert len(passes) == 3 and all(1 <= len(masks) <= limit for masks in passes)


def hooks_in_a_pass(model, act):
    """(on layers, on attention modules and the decoder) in every pass."""
    counts, decoder = [], model.get_decoder()
    number = lambda m: len(m._forward_hooks) + len(m._forward_pre_hooks)  # noqa: E731

    def count(*_):
        layers = [number(layer) + ("forward" in vars(layer.self_attn)) for layer in decoder.layers]
        counts.append((layers, number(decoder)))

    hook = decoder.norm.register_forward_pre_hook(count)
    count()
    try:
        act()
    finally:
        hook.remove()
    (before, before_decoder), *counts = counts
    return [([a - b for a, b in zip(layers, before)], n - before_decoder) for layers, n in counts]


@pytest.mark.parametrize(
    ("method", "prefill"),
    [
        (PROJECTOR, [0, 0, 0, 0]),
        (LAYER, [0, 0, 1, 1]),
        (methods.FastV(keep=0.5, layer=2), [0, 1, 1, 1]),  # queries of the layer before
        (methods.VTW(layer=3), [0, 0, 0, 1]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_hooks(method, prefill):
    """Only on layers that the method needs; none at all in decode, nor after it."""
    model, image = model_of("llava")
    inputs = without_mask(prompts(image, TEXTS["one"]))
    generate(model, inputs)  # transformers leaves hooks

    def act():
        with patch(model, method):
            generate(model, inputs, steps=3)

    first, *rest = hooks_in_a_pass(model, act)  # the decoder: its input and its output
    assert first == (prefill, 2) and rest == [([0] * 4, 0)] * 2


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_one_image_uses_kcenter():
    """Not the varlen operator, which costs three times as much."""
    model, image = model_of("llava")
    with patch(model, PROJECTOR), torch.no_grad(), Operators() as seen:
        model(**prompts(image, TEXTS["one"]))
    assert [name for name in seen.names if "kcenter" in name and name.startswith("pruneops::")] == ["pruneops::kcenter"]


def test_decode_has_no_extra_operators():
    """A decode step after pruning runs exactly the operators of an unpruned one."""
    model, image = model_of("llava")
    inputs, steps = without_mask(prompts(image, TEXTS["one"])), {}
    for method in (None, PROJECTOR, LAYER):
        handle = None if method is None else patch(model, method)
        with torch.no_grad():
            out = model(**inputs)
            with Operators() as seen:
                model(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values)
        steps[method] = seen.names
        if handle is not None:
            handle.remove()
    assert steps[PROJECTOR] == steps[LAYER] == steps[None]
