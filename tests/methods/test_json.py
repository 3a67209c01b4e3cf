"""All methods: settings and their JSON, budgets, errors, independence of values."""

import dataclasses
import functools
import json
from fractions import Fraction

import pytest
import torch
from torch._subclasses import FakeTensorMode

from pruneops import methods
from pruneops.methods import (
    DART,
    DTR,
    VTW,
    DivPrune,
    DyRate,
    FasterVLM,
    FastV,
    Image,
    Method,
    Random,
    Row,
    Selector,
    ToDRE,
    Uniform,
    from_json,
)
from tests.methods.cases import rotary
from tests.methods.oracles import prompt
from tests.methods.weights import ranking_model, rate_classifier, selector

CLASSES = (DART, DTR, VTW, DivPrune, DyRate, FasterVLM, FastV, Random, Selector, ToDRE, Uniform)
BUDGETED = tuple(cls for cls in CLASSES if cls not in (VTW, DyRate))
REQUIRED = {DTR: {"weights": ranking_model()}, Selector: {"weights": selector(4)}}
SETTINGS = [
    ToDRE(keep=0.1),
    ToDRE(keep=1, pivot="norm", depths=[0.25], tau=1),
    ToDRE(keep=1.0, depths=()),
    DART(keep=128, compat="official"),
    DART(keep=0.222, layer=5, image_pivots=0, text_pivots=8),
    FastV(keep=0.5, layer=3, rows="last"),
    VTW(),
    VTW(layer=20),
    DivPrune(keep=0.098),
    DyRate(weights=rate_classifier(), keep=0.25),
    DTR(weights=ranking_model(), keep=8),
    Selector(weights=selector(4), keep=0.5),
    FasterVLM(keep=64),
    Random(keep=1 / 3, seed=2**70),
    Uniform(keep=1e-5),
]


def case(method):
    return f"{method.name}-{method.to_json()}"


@pytest.mark.parametrize("method", SETTINGS, ids=case)
def test_round_trip(method):
    text = method.to_json()
    again = from_json(text)
    assert again == method and type(again) is type(method) and hash(again) == hash(method)
    assert again.to_json() == text and Method.from_json(text) == type(method).from_json(text) == method
    for field in dataclasses.fields(method):
        assert type(getattr(again, field.name)) is type(getattr(method, field.name))
    written = json.loads(text)
    assert written["schema"] == 1 and written["method"] == method.name
    assert written.keys() == {"schema", "method"} | {field.name for field in dataclasses.fields(method)}
    assert all(part in str(method) for part in (type(method).__name__, *(f.name for f in dataclasses.fields(method))))


def test_names():
    expected = {"todre", "dart", "fastv", "vtw", "divprune", "fastervlm", "random", "uniform"}
    expected |= {"dtr", "dyrate", "selector"}
    assert {cls.name for cls in CLASSES} == expected
    assert all(name in methods.__all__ for name in [cls.__name__ for cls in CLASSES])
    assert all(hasattr(methods, name) for name in methods.__all__)


def test_settings_left_out_take_their_defaults():
    assert from_json('{"schema": 1, "method": "dart", "keep": 0.25}') == DART(keep=0.25)
    assert from_json('{"schema": 1, "method": "vtw"}') == VTW()
    assert from_json('{"schema": 1, "method": "uniform", "keep": 1}').budget(9) == 1
    assert from_json('{"schema": 1, "method": "uniform", "keep": 1.0}').budget(9) == 9


def test_frozen():
    method = DART(keep=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.keep = 0.3
    with pytest.raises(TypeError):
        DART(0.5)
    assert dataclasses.replace(method, keep=7).budget(100) == 7
    with pytest.raises(ValueError, match="keep"):
        dataclasses.replace(method, keep=2.0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "text must be JSON"),
        ("{", "text must be JSON"),
        (None, "text must be JSON"),
        ("[1]", "text must be a JSON object, got list"),
        ("{}", "schema must be 1, the only one so far, got None"),
        ('{"schema": 2, "method": "dart", "keep": 1}', "schema must be 1, the only one so far, got 2"),
        ('{"schema": "1", "method": "dart", "keep": 1}', "schema must be 1, the only one so far, got '1'"),
        ('{"schema": true, "method": "dart", "keep": 1}', "schema must be 1, the only one so far, got True"),
        ('{"schema": 1, "keep": 1}', "method must be one of dart, .*, vtw, got None"),
        ('{"schema": 1, "method": "DART", "keep": 1}', "method must be one of dart, .*, vtw, got 'DART'"),
        ('{"schema": 1, "method": ["dart"]}', r"method must be one of dart, .*, vtw, got \['dart'\]"),
        ('{"schema": 1, "method": "dart"}', "keep must be given for dart, got nothing"),
        ('{"schema": 1, "method": "vtw", "keep": 1}', "setting must be one of vtw's: layer, got 'keep'"),
        (
            '{"schema": 1, "method": "fastv", "keep": 1, "row": 1}',
            "setting must be one of fastv's: keep, layer, rows, got 'row'",
        ),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ValueError, match=rf"pruneops\.methods\.from_json: {message}"):
        from_json(text)


def test_json_of_another_class():
    with pytest.raises(ValueError, match=r"methods\.DART\.from_json: method must be 'dart', got 'vtw'"):
        DART.from_json(VTW().to_json())


NUMBERS = [None, True, "0.5", [1], float("nan"), float("inf"), -1]
BAD = [
    *((cls, "keep", value) for cls in BUDGETED for value in [*NUMBERS[cls is Selector :], 0, 0.0, 1.5, 2.0, -0.1]),
    *((cls, "layer", value) for cls in (DART, FastV) for value in [*NUMBERS, 0, 2.0, 0.5]),
    *((VTW, "layer", value) for value in [*NUMBERS, 0.0, 1.0, 2.5]),
    *((DART, name, value) for name in ("image_pivots", "text_pivots") for value in [*NUMBERS, 4.0]),
    *((DART, "compat", value) for value in (None, "Paper", "")),
    *((FastV, "rows", value) for value in (None, "mean", 1)),
    *((ToDRE, "pivot", value) for value in (None, "cls", 0)),
    *((ToDRE, "depths", value) for value in (None, 0.5, "ab", [1], [0.5, 1.0], [0.0], [True], [float("nan")])),
    *((ToDRE, "tau", value) for value in NUMBERS),
    *((Random, "seed", value) for value in [*NUMBERS, 0.5]),
]


@pytest.mark.parametrize("cls, setting, value", BAD, ids=lambda value: getattr(value, "__name__", repr(value)))
def test_bad_values(cls, setting, value):
    """From Python and from JSON."""
    settings = ({} if cls is VTW else {"keep": 0.5}) | REQUIRED.get(cls, {}) | {setting: value}
    settings = {name: str(value) if name == "weights" else value for name, value in settings.items()}
    with pytest.raises(ValueError) as error:
        cls(**settings)
    assert str(error.value).startswith(f"pruneops.methods.{cls.__name__}: {setting} must be ")
    assert str(error.value).endswith(f", got {value!r}")
    with pytest.raises(ValueError) as other:
        from_json(json.dumps({"schema": 1, "method": cls.name, **settings}))
    assert str(other.value) == str(error.value)


def test_number_of_pivots():
    for counts in ((0, 0), (60, 5)):
        with pytest.raises(ValueError, match=r"DART: image_pivots \+ text_pivots must be 1 to 64, got"):
            DART(keep=0.5, image_pivots=counts[0], text_pivots=counts[1])


# Budgets


def test_shares_are_exact():
    """To the nearest, halves up, at least one: of the decimal number, not of its binary neighbour."""
    for text in ("0.1", "0.25", "0.5", "0.098", "0.35", "0.7", "0.999", "0.001", "1.0"):
        for tokens in range(1200):
            exact = Fraction(text) * tokens
            low = exact.numerator // exact.denominator
            nearest = low + (exact - low >= Fraction(1, 2))
            assert Uniform(keep=float(text)).budget(tokens) == min(max(nearest, 1), tokens)
    assert Uniform(keep=0.35).budget(10) == 4  # 3.5, where 0.35 as a double lies below
    assert [Uniform(keep=0.5).budget(n) for n in range(6)] == [0, 1, 1, 2, 2, 3]
    assert [Uniform(keep=1 / 3).budget(n) for n in (3, 9, 2880)] == [1, 3, 960]


def test_counts_are_capped():
    for cls in BUDGETED:
        build = functools.partial(cls, **REQUIRED.get(cls, {}))
        assert [build(keep=3).budget(n) for n in (0, 1, 3)] == [0, 1, 3]
        assert [build(keep=1.0).budget(n) for n in (0, 1, 576)] == [0, 1, 576]
    assert [Uniform(keep=3).budget(n) for n in (4, 10**9)] == [3, 3]
    for tokens in (-1, 1.0, True, None):
        with pytest.raises(ValueError, match="Uniform: tokens must be an int of at least 0"):
            Uniform(keep=3).budget(tokens)


# Properties of every method

PRUNE_IMAGES = [method for method in SETTINGS if method.after_projector]


def an_image(*shape):
    generator = torch.Generator().manual_seed(0)
    return Image(torch.randn(shape, generator=generator), torch.rand(shape[:-1], generator=generator))


@pytest.mark.parametrize("method", SETTINGS, ids=case)
def test_images(method):
    """Counts by the budget, ascending, the same in a batch and alone; all tokens where it does not prune them."""
    for tokens in (0, 1, 2, 30):
        image = an_image(2, tokens, 4)
        chosen = method.select(image)
        k = method.budget(tokens) if method.after_projector else tokens
        assert chosen.dtype == torch.int64 and chosen.shape == (2, k)
        assert (chosen[:, 1:] > chosen[:, :-1]).all()
        for b in range(2):
            single = Image(image.features[b], image.cls_attention[b], index=b)
            assert method.select(single).tolist() == chosen[b].tolist()
        assert method.select(an_image(0, tokens, 4)).shape == (0, k)


@pytest.mark.parametrize("method", PRUNE_IMAGES, ids=case)
def test_lists_of_images(method):
    images = [an_image(n, 4) for n in (5, 0, 30, 2)]
    chosen = method.select_each(images)
    single = [method.select(image._replace(index=i)) for i, image in enumerate(images)]
    assert [own.tolist() for own in chosen] == [own.tolist() for own in single]


@pytest.mark.parametrize("method", SETTINGS, ids=case)
def test_prompts(method):
    """Ascending ranks or None at its layers, None at all others."""
    row = prompt([30, 7])._replace(norm=torch.nn.Identity(), rotary=rotary(46))
    for layer in range(32):
        kept = method.at_layer(layer, row, 32)
        assert kept is None or (layer in method.layers(32) and len(kept) < 37)
        assert kept is None or (kept.dtype == torch.int64 and (kept[1:] > kept[:-1]).all())
    assert method.layers(32) == tuple(sorted(set(method.layers(32))))
    for layer in method.layers(32):
        assert method.at_layer(layer, prompt([])._replace(norm=row.norm, rotary=rotary(8)), 32) is None
    for count in (0, -1, 2.0, None):
        with pytest.raises(ValueError, match="count must be an int of at least 1"):
            method.layers(count)


def test_no_look_at_values():
    """Nothing waits for a GPU: shapes are enough, but for stage 2 of ToDRE and what is drawn on the CPU."""
    with FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (an_image(2, 30, 4), prompt([30, 7])))
        image, row = fake
        for method in (
            ToDRE(keep=7),
            ToDRE(keep=7, pivot="norm"),
            DivPrune(keep=7),
            FasterVLM(keep=7),
            Uniform(keep=7),
        ):
            assert method.select(image).shape == (2, 7)
        ragged = [Image(image.features[0]), Image(image.features[1, :9])]
        assert [len(own) for own in ToDRE(keep=0.5).select_each(ragged)] == [15, 5]
        for method in (DART(keep=8), DART(keep=8, compat="official"), FastV(keep=8), FastV(keep=8, rows="last")):
            kept = method.at_layer(2, row._replace(norm=torch.nn.Identity()), 32)
            assert kept.shape == (method.budget(30) + method.budget(7),)


# Shapes that do not fit

X = torch.ones(6, 4)
IMAGES = [
    (Image(torch.ones(6)), "features must be float32, float16 or bfloat16 of shape"),
    (Image(torch.ones(1, 1, 6, 4)), "features must be"),
    (Image(X.long()), r"features must be .*, got int64 of shape \[6, 4\]"),
    (Image(None), "features must be .*, got NoneType"),
    (Image(X, torch.ones(5)), r"image.cls_attention must be float of shape \[6\], got float32 of shape \[5\]"),
    (Image(X, torch.ones(1, 6)), "image.cls_attention must be"),
    (Image(X, torch.ones(6).long()), "image.cls_attention must be"),
    (Image(X, thumbnail=(2, 7)), r"image.thumbnail must be \(start, end\) of some of the 6 tokens, got \(2, 7\)"),
    (Image(X, thumbnail=(2, 2)), "image.thumbnail must be"),
    (Image(X, thumbnail=(-1, 2)), "image.thumbnail must be"),
    (Image(X, frames=4), "image.frames must be a divisor of the 6 tokens, got 4"),
    (Image(X, frames=0), "image.frames must be"),
    (Image(X, index=-1), "image.index must be an int of at least 0, got -1"),
]


@pytest.mark.parametrize("image, message", IMAGES, ids=[message for _, message in IMAGES])
@pytest.mark.parametrize("method", [Uniform(keep=2), VTW(), ToDRE(keep=2)], ids=case)
def test_images_that_are_refused(image, message, method):
    for select in (method.select, lambda image: method.select_each([image])):
        if image.index < 0 and select != method.select:
            continue  # a list numbers its images
        with pytest.raises(ValueError, match=message):
            select(image)


ROW = prompt([4, 3])
ROWS = [
    (ROW._replace(hidden=torch.ones(3)), "row.hidden must be of shape"),
    (ROW._replace(query=None), "row.query must be given: this method reads it, got None"),
    (ROW._replace(key=None), "row.key must be given"),
    (ROW._replace(key=ROW.key[:, 1:]), r"row.key must be of shape \[H, 16, Dh\], got of shape \[2, 15, 8\]"),
    (ROW._replace(query=ROW.query[0]), "row.query must be of shape"),
    (ROW._replace(visual=None), "row.visual must be int64 of rank 1, got NoneType"),
    (ROW._replace(visual=ROW.visual.int()), "row.visual must be int64 of rank 1, got int32"),
    (ROW._replace(images=((0, 4),), sizes=(4,)), "row.images must be one range after another from 0 to the 7 visual"),
    (ROW._replace(images=((0, 5), (4, 7))), "row.images must be"),
    (ROW._replace(images=((0, 9), (9, 7)), sizes=(9, 9)), "row.images must be"),
    (ROW._replace(images=()), "row.images must be"),
    (ROW._replace(sizes=(4,)), r"row.sizes must be one an image, no less than the tokens still there, got \[4\]"),
    (ROW._replace(sizes=(4, 2)), "row.sizes must be"),
]


@pytest.mark.parametrize("row, message", ROWS, ids=[message for _, message in ROWS])
def test_bad_rows(row, message):
    with pytest.raises(ValueError, match=r"methods\.FastV: " + message):
        FastV(keep=2).at_layer(2, row, 4)
    assert FastV(keep=2).at_layer(1, row, 4) is None  # not its layer


def test_norm_that_is_missing():
    with pytest.raises(ValueError, match=r"DART: row\.norm must be given: this method reads it, got None"):
        DART(keep=2, compat="official").at_layer(2, ROW, 4)


def test_row_of_names():
    """The order of fields that adapters rely on."""
    assert Row._fields == ("hidden", "query", "key", "norm", "visual", "images", "sizes", "rotary")
    assert Image._fields[:4] == ("features", "cls_attention", "thumbnail", "frames")
