"""Which tokens belong to an image, in `patch` and in `prepare`."""

import dataclasses
import functools
import itertools
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy
import pytest
import torch
import transformers

from pruneops import methods
from pruneops.adapters.prepare import prepare
from pruneops.adapters.transformers import UnsupportedError, patch
from pruneops.adapters.transformers.token_layout import run_length, tiles_length
from tests.adapters import oracle, tiny
from tests.adapters.oracle import Thin
from tests.adapters.test_prepare import SUPPORTED, since_5_18
from tests.adapters.test_transformers import METHODS, STEPS, generate
from tests.adapters.tiny import FAMILIES, IMAGE, prompts_and_truth

transformers.logging.set_verbosity_error()
model_of = functools.cache(tiny.model_of)
SUPPORTED_FAMILIES = [*FAMILIES, "pixtral", "mistral3", "glm4v", "glm4v_moe", "qwen3_vl_moe"]
SIZES = {
    "llava": [(), (), ()],
    "llava_next": [(4, 4), (4, 8), (3, 8)],
    "llava_onevision": [(4, 8), (4, 3), (2, 8)],
    "internvl": [(1, 1), (2, 2), (1, 3)],
    "idefics3": [(2, 2), (0, 0), (1, 3)],
    "smolvlm": [(2, 2), (0, 0), (3, 1)],
}  # of three images; of the other families, in tokens: 2 x 3, 4 x 2, 3 x 5
VIDEOS = "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "smolvlm"
FRAMES = "internvl", "smolvlm"  # each frame is an image
LAYOUTS = {
    "one": [[3, "b", 4]],
    "several": [[2, "a", 3, "b", 1, "c", 4]],
    "adjacent": [[2, "a", "b", "c", "a", 3]],
    "images alone": [["b", "a"]],
    "batch": [[3, "a", 2, "b", 4], [5], [1, "c", 6]],
    "adjacent in a batch": [["a", "b", 3], [2, "c", "a", "b", 2]],
    "video": [[3, "v", 4]],
    "videos": [[2, "v", "w", 3], [4, "v", 9]],
    "mixed": [[2, "a", 3, "v", 1, "b", 4], [1, "v", "b", 6], [5]],
}
SIDES = "left", "right"
SOME = "adjacent in a batch", "videos"
CASES = [
    (family, layout)
    for family in SUPPORTED_FAMILIES
    for layout in (LAYOUTS if "moe" not in family else ("adjacent in a batch", "videos", "mixed"))
    if family in VIDEOS or not (layout == "mixed" or (layout.startswith("video") and not family.startswith("glm")))
]


def batch(image, layout, side="left"):
    family = image["family"]
    a, b, c = (("image", *size) for size in SIZES.get(family, [(2, 3), (4, 2), (3, 5)]))
    more = 2 if family == "llava_onevision" else 3  # its videos have equal lengths
    pieces = {"a": a, "b": b, "c": c, "v": ("video", 2), "w": ("video", more)}
    texts = [[pieces.get(piece, piece) for piece in row] for row in LAYOUTS[layout]]
    return prompts_and_truth(image, texts, side="right" if side == "right" else "left", frames=family in FRAMES)


@dataclasses.dataclass(frozen=True)
class Spy(Thin):
    """Keeps the half of an image with the largest first feature, and records the features that it was given."""

    seen: list = dataclasses.field(default_factory=list)
    at_step = None  # as in most methods

    def select_each(self, images):
        self.seen.append([image.features.detach() for image in images])
        return [image.features[:, 0].topk(-(-len(image.features) // 2)).indices.sort().values for image in images]

    def check(self, embeds, truth):
        rows = iter(self.seen)
        for row, images in zip(embeds, truth):
            given = next(rows)
            assert [len(features) for features in given] == [len(places) for places in images]
            assert all(torch.equal(features, row[places]) for features, places in zip(given, images))
        assert next(rows, None) is None


def first_layer(model, inputs):
    """(the decoder's inputs, the inputs of its first layer, logits)."""
    decoder, calls, left = model.get_decoder(), [], []
    hook = decoder.layers[0].input_layernorm.register_forward_pre_hook(lambda module, args: left.append(args[0]))
    with torch.no_grad(), oracle.recorded(decoder, calls):
        out = model(**inputs)
    hook.remove()
    return calls[0]["inputs_embeds"], left[0], out.logits


@pytest.mark.parametrize(
    ("family", "layout", "side"),
    [(*case, side) for case in CASES for side in (SIDES if len(LAYOUTS[case[1]]) > 1 else ("left", "unmasked"))],
)
def test_images(family, layout, side):
    """Patch and prepare select from the features of each image, and keep the same tokens."""
    model, image = model_of(family)
    inputs, truth = batch(image, layout, side)
    if side == "unmasked":
        del inputs["attention_mask"]
    embeds, *_ = first_layer(model, inputs)
    patched, prepared = Spy(projector=True), Spy(projector=True)
    with patch(model, patched) as handle:
        _, left, _ = first_layer(model, inputs)
    assert handle.stats[-1].images == [[len(places) for places in images] for images in truth]
    patched.check(embeds, truth)
    if SUPPORTED:
        shorter = prepare(model, inputs, prepared)
        prepared.check(embeds, truth)
        valid = shorter["attention_mask"].bool()
        assert torch.equal(first_layer(model, shorter)[0][valid], left[valid])


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_embeddings_in_place_of_ids(family):
    """Images are located by the placeholder's embedding; tiles need ids."""
    model, image = model_of(family)
    inputs, truth = batch(image, "mixed" if family in VIDEOS else "batch")
    spy, embeds = Spy(projector=True), first_layer(model, inputs)[0]
    if getattr(model.base_model, "rope_deltas", None) is not None:
        model.base_model.rope_deltas = None  # without ids, models reuse it from an earlier pass
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    tiles = family in ("idefics3", "smolvlm")
    with patch(model, spy), pytest.raises(UnsupportedError, match="give input_ids") if tiles else nullcontext():
        first_layer(model, inputs)
    if not tiles:
        spy.check(embeds, truth)


@pytest.mark.parametrize("method", [methods.Uniform(keep=0.4), methods.FastV(keep=0.4, layer=2)], ids=lambda m: m.name)
@pytest.mark.parametrize(("family", "layout"), [case for case in CASES if case[1] in (*SOME, "mixed")])
def test_budgets(family, layout, method):
    """Of all tiles, rows and frames of an image together."""
    model, image = model_of(family)
    inputs, truth = batch(image, layout)
    with patch(model, method) as handle:
        first_layer(model, inputs)
    assert handle.stats[-1].kept[-1] == [[method.budget(len(places)) for places in images] for images in truth]


def assert_logits(logits, model, inputs, truth, method, generated):
    right = oracle.logits(model, inputs, truth, method, generated)
    scale = right.abs().max().clamp(min=1)
    torch.testing.assert_close(logits / scale, right / scale, rtol=0, atol=1e-5)


GENERATED = [
    (family, layout, method, attention)
    for family, layout in CASES
    for method, attention in itertools.product(("projector", "layers", "all three"), ("sdpa", "eager"))
    if layout not in ("one", "images alone")
    if attention == "sdpa" or (layout in SOME and method == "all three")
]
BATCHES = [(family, layout) for family, layout in CASES if len(LAYOUTS[layout]) > 1]


@pytest.mark.parametrize(("family", "layout", "method", "attention"), GENERATED)
def test_generate(family, layout, method, attention):
    model, image = model_of(family, attention)
    (inputs, truth), method = batch(image, layout), METHODS[method]
    with patch(model, method):
        out = generate(model, inputs)
    generated = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert_logits(torch.stack(out.logits), model, inputs, truth, method, generated)


@since_5_18
@pytest.mark.parametrize(("family", "layout"), BATCHES)
def test_generate_prepared(family, layout):
    model, image = model_of(family)
    (inputs, truth), method = batch(image, layout), METHODS["projector"]
    out = generate(model, prepare(model, inputs, method))
    assert_logits(torch.stack(out.logits), model, inputs, truth, method, out.sequences[:, -STEPS:])


@pytest.mark.parametrize("method", ["projector", "layers", "all three", pytest.param("prepared", marks=since_5_18)])
@pytest.mark.parametrize(("family", "layout"), BATCHES)
def test_right_padding(family, layout, method):
    """Logits of each row's last token are those of the same prompts padded on the left."""
    model, image = model_of(family)
    inputs, _ = batch(image, layout, "right")
    if method == "prepared":
        method = METHODS["projector"]
        logits = first_layer(model, prepare(model, inputs, method))[2][:, -1]
    else:
        method = METHODS[method]
        with patch(model, method):
            logits = first_layer(model, inputs)[2]
        logits = logits[range(len(logits)), inputs["attention_mask"].sum(1) - 1]
    assert_logits(logits[None], model, *batch(image, layout), method, logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize(("family", "layout"), BATCHES)
def test_rows_padded_on_either_side(family, layout):
    """A method that reads rows sees the same ones."""
    model, image = model_of(family)
    logits = []
    for side in SIDES:
        inputs, _ = batch(image, layout, side)
        with patch(model, methods.FastV(keep=0.5, layer=2)):
            output = first_layer(model, inputs)[2]
        last = inputs["attention_mask"].sum(1) - 1
        logits.append(output[:, -1] if side == "left" else output[range(len(output)), last])
    scale = logits[0].abs().max().clamp(min=1)
    torch.testing.assert_close(logits[0] / scale, logits[1] / scale, rtol=0, atol=1e-5)


# Prompts as the processors write them

TOKENS = {"fake_image_token": "<fake>", "image_token": "<image>", "image_seq_len": 4, "image_seq_length": 4}
TOKENS |= dict.fromkeys(["global_image_tag", "global_image_token"], "<global-img>")
TOKENS |= {"start_image_token": "<img>", "end_image_token": "</img>"}
GRIDS = [(0, 0), *itertools.product(range(1, 5), repeat=2)]


def processing(family):
    """Its module; SmolVLM's of older releases needs torchvision."""
    return pytest.importorskip(f"transformers.models.{family}.processing_{family}", exc_type=ImportError)


def written(family, rows, cols):
    module = processing(family)
    if hasattr(module, "get_image_prompt_string"):
        return module.get_image_prompt_string(rows, cols, 4, "<fake>", "<image>", "<global-img>")
    image = {"rows": [[rows]], "cols": [[cols]]}
    return module.Idefics3Processor.replace_image_token(SimpleNamespace(**TOKENS), image, 0)


def cut(length, text, newlines="\n\n|\n", padding=0):
    """Tokens of every image of a row; `length` returns those of the first."""
    pieces = re.findall(rf"<.*?>|{newlines}|[^<\n]", text)
    pieces = ["", *pieces, *[""] * padding] if padding else pieces
    ids = numpy.unique(pieces, return_inverse=True)[1]
    places, sizes = numpy.flatnonzero(numpy.array(pieces) == "<image>"), []
    while sum(sizes) < len(places):
        rest = places[sum(sizes) :]
        sizes.append(length(rest, ids) if length is tiles_length else length(rest))
    return sizes


@pytest.mark.parametrize("newlines", ["\n\n|\n", "\n"], ids=["pairs", "single"])  # as tokenizers merge them
@pytest.mark.parametrize("between", ["", "\n", "\n\n", "!", "!!", " and\n\n"])
@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_tiles(family, between, newlines):
    strings = {(rows, cols): written(family, rows, cols) for rows, cols in GRIDS}
    for number, (first, second) in enumerate(itertools.product(GRIDS, repeat=2)):
        images = [first, second, *[GRIDS[number % len(GRIDS)]] * (number % 2)]
        before, after = [("", ""), ("", "\n"), ("Two:\n", "\n\n"), ("U", "?")][number % 4]
        text = before + between.join(strings[grid] for grid in images) + after
        assert cut(tiles_length, text, newlines, number % 3) == [4 * (rows * cols + 1) for rows, cols in images]


def test_frames(monkeypatch):
    """Of SmolVLM and InternVL; those beside each other in a prompt too."""
    smolvlm, internvl = processing("smolvlm").SmolVLMProcessor, processing("internvl").InternVLProcessor
    if not hasattr(smolvlm, "replace_video_token"):
        pytest.skip("older processors write a whole prompt at once")
    monkeypatch.setattr(processing("smolvlm"), "num2words", str)
    processor = SimpleNamespace(**TOKENS)
    metadata = SimpleNamespace(fps=1, timestamps=[0, 1, 2], duration=3)
    video = {"pixel_values": torch.zeros(1, 3, 1), "video_metadata": [metadata]}
    video = smolvlm.replace_video_token(processor, video, 0)
    image = written("smolvlm", 2, 1)
    assert cut(tiles_length, image + video + video + image + "\n") == [12, *[4] * 6, 12]
    image = internvl.replace_image_token(processor, {"num_patches": [3]}, 0)
    video = internvl.replace_video_token(processor, {"pixel_values_videos": torch.zeros(1, 2, 1)}, 0)
    for text in (image + image + video + video + image, f"{image}\n{image}\n{video}\n{video}\n{image}\n"):
        assert cut(run_length, text) == [12, 12, 4, 4, 4, 4, 12]


# Errors


def ways_to_run(family):
    """{way: function of inputs}."""
    model, image = model_of(family)

    def patched(method):
        def run(inputs):
            with patch(model, method):
                first_layer(model, inputs)

        return run

    ways = {"projector": patched(Spy(projector=True)), "layer": patched(METHODS["layer"])}
    if SUPPORTED:
        ways["prepare"] = lambda inputs: prepare(model, inputs, Spy(projector=True))
    return image, ways


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("layout", ["one", "batch"])
@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_wrong_count(family, layout, change):
    image, ways = ways_to_run(family)
    inputs, truth = batch(image, layout)
    place = truth[0][0][0] if change < 0 else inputs["attention_mask"][0].argmax()
    inputs["input_ids"][0, place] = 5 if change < 0 else IMAGE
    features = sum(len(places) for row in truth for places in row)
    ours = f"{features + change} image tokens in the prompts for {features} image features"
    models = rf"\b{features + change}\b.* features|not divisible by patch_size|Number of elements of source"
    for name, run in ways.items():  # within a pass the model itself may raise it
        with pytest.raises((ValueError, RuntimeError), match=ours if name == "prepare" else models):
            run(dict(inputs))


@pytest.mark.parametrize("layout", ["one", "batch"])
@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_hidden_image_tokens(family, layout):
    image, ways = ways_to_run(family)
    inputs, truth = batch(image, layout)
    inputs["attention_mask"][0, truth[0][0][0]] = 0
    # models with grids fail earlier, in their positions
    errors, message = (RuntimeError, "|shape mismatch") if "grid" in image else (UnsupportedError, "")
    for run in ways.values():
        with pytest.raises(errors, match="attention mask hides tokens of an image" + message):
            run(dict(inputs))
