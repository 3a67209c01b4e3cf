"""Methods make the same choices inside torch.autocast as outside."""

import inspect

import pytest
import torch
from torch.overrides import TorchFunctionMode

from pruneops import methods
from pruneops.methods import Image
from pruneops.networks import RankingModel, SelectorNetwork, load
from tests.contract import assert_same_bits
from tests.inputs import clustered
from tests.methods.cases import LAYERS, METHODS, SIZES, images, rotary, rows
from tests.methods.weights import ranking_model, selector

pytestmark = pytest.mark.usefixtures("backend")

X, SCORES = images([576])[0][:2]
PARTS, TEXT = X.split(16), (X[:20] + 1, SCORES[:20])
QUERY, KEY, GROUP = clustered((4, 50, 16), seed=1), clustered((2, 50, 16), seed=2), torch.arange(50) // 17
PIVOT, STARTS, PIVOTS = torch.tensor(3), torch.tensor([0, 200, 576]), torch.tensor([5, 300])
LAST, SCORES_OF_ONE, ALIVE = QUERY[:, -1:], SCORES[None], SCORES[None] > 0.2
TOKENS, RATE = torch.tensor([576]), torch.tensor([3])
CACHE, STAYS, LENGTHS = KEY[None].clone(), GROUP[None] > 0, torch.tensor([40])
TWO = X.unflatten(0, (2, 288)), SCORES.unflatten(0, (2, 288))

SELECTOR, RANKING = load(SelectorNetwork, selector()), load(RankingModel, ranking_model())
PROMPT = clustered((50, 16), seed=3), torch.arange(5, 45), rotary(50)
LOGITS = clustered((40, 7), seed=4)

FUNCTIONS = {
    "cls_attention": lambda: methods.cls_attention(QUERY, KEY, cls=3),
    "dart_select": lambda: methods.dart_select(X, SCORES, 100, text=TEXT[0], text_norms=TEXT[1]),
    "divprune_select": lambda: methods.divprune_select(X, 60),
    "divprune_start": lambda: [methods.divprune_start(x) for x in PARTS],
    "dtr_logits": lambda: methods.dtr_logits(RANKING, *PROMPT),
    "dtr_ranked": lambda: methods.dtr_ranked(LOGITS, 20),
    "dtr_select": lambda: methods.dtr_select(LOGITS, 20),
    "dyrate_compact_": lambda: methods.dyrate_compact_([CACHE], STAYS, LENGTHS),
    "dyrate_distribution": lambda: methods.dyrate_distribution(LAST, KEY, GROUP),
    "dyrate_keep": lambda: methods.dyrate_keep(SCORES_OF_ONE, ALIVE, TOKENS, RATE, 8),
    "fastervlm_select": lambda: methods.fastervlm_select(SCORES, 60),
    "fastv_scores": lambda: methods.fastv_scores(QUERY, KEY),
    "fastv_select": lambda: methods.fastv_select(SCORES, 60),
    "mean_attention": lambda: methods.mean_attention(QUERY, KEY),
    "selector_mask": lambda: methods.selector_mask(SCORES),
    "selector_scores": lambda: methods.selector_scores(SELECTOR, X),
    "todre_pivot": lambda: methods.todre_pivot(X),
    "todre_ratios": lambda: methods.todre_ratios(QUERY, KEY, GROUP),
    "todre_select": lambda: methods.todre_select(X, 60, pivot=PIVOT),
    "todre_select_varlen": lambda: methods.todre_select_varlen(X, STARTS, [20, 30], pivots=PIVOTS),
}
NO_ARITHMETIC = {"dart_budget", "from_json", "random_select", "uniform_select", "vtw_layer"}


class AutocastRecorder(TorchFunctionMode):
    """Records whether autocast is enabled in each call of torch."""

    def __init__(self):
        self.enabled = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.enabled.append(torch.is_autocast_enabled("cpu"))
        return function(*args, **(kwargs or {}))


def assert_unchanged(choose):
    """The same bits, and no arithmetic with autocast enabled; it is enabled again afterwards."""
    expected = choose()
    recorder = AutocastRecorder()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(choose(), expected)
        with recorder:
            choose()
        assert torch.is_autocast_enabled("cpu")
    assert recorder.enabled and not any(recorder.enabled)


def test_every_function_is_called():
    functions = {name for name in methods.__all__ if inspect.isfunction(getattr(methods, name))}
    assert functions == FUNCTIONS.keys() | NO_ARITHMETIC


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function):
    assert_unchanged(FUNCTIONS[function])


@pytest.mark.parametrize("method", METHODS)
def test_images(method):
    method = METHODS[method]
    single, batch = Image(X, SCORES), Image(*TWO)
    requests = [images(sizes) for sizes in SIZES.values()]
    assert_unchanged(lambda: [method.select(single), method.select(batch), *map(method.select_each, requests)])


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.layers(LAYERS)])
def test_prompts(method):
    method, prompts = METHODS[method], rows().values()
    layer = method.layers(LAYERS)[0]
    assert_unchanged(lambda: [kept for row in prompts if (kept := method.at_layer(layer, row, LAYERS)) is not None])


def test_compile_without_graph_break():
    torch._dynamo.reset()
    functions = [FUNCTIONS[name] for name in ("cls_attention", "dart_select", "fastv_scores", "todre_ratios")]
    for function in functions:
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        expected = function()
        for device in ("cpu", "cuda"):
            torch.set_autocast_enabled(device, True)
        try:
            result = compiled()
        finally:
            for device in ("cpu", "cuda"):
                torch.set_autocast_enabled(device, False)
        assert_same_bits(result, expected)
