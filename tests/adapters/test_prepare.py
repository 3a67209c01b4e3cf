"""`prepare` against the oracle."""

import inspect

import pytest
import torch
import transformers

from pruneops import methods
from pruneops.adapters.prepare import prepare
from pruneops.adapters.transformers import UnsupportedError, patch
from tests.adapters.oracle import Thin
from tests.adapters.test_transformers import STEPS, TEXTS, TWO_IMAGES, assert_oracle, generate
from tests.adapters.tiny import FAMILIES, model_of, prompts
from tests.contract import run_python

transformers.logging.set_verbosity_error()
METHOD = Thin(projector=True)
SUPPORTED = "mm_encoder_outputs" in inspect.signature(transformers.LlavaModel.forward).parameters
since_5_18 = pytest.mark.skipif(not SUPPORTED, reason="needs transformers 5.18")


def assert_prepared(model, inputs, method=METHOD, **options):
    before = {name: value.clone() for name, value in inputs.items()}
    out = generate(model, prepare(model, inputs, method), **options)
    assert all(torch.equal(before[name], value) for name, value in inputs.items())
    out.sequences = torch.cat([inputs["input_ids"], out.sequences[:, -STEPS:]], 1)
    assert_oracle(model, inputs, method, out)


@since_5_18
@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_oracle(family, attention, texts):
    model, image = model_of(family, attention)
    assert_prepared(model, prompts(image, TEXTS[texts]))


@since_5_18
@pytest.mark.parametrize("texts", [TWO_IMAGES, [*TWO_IMAGES, [1, "image", 2]]], ids=len)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_several_images(family, texts):
    model, image = model_of(family)
    assert_prepared(model, prompts(image, texts))


@since_5_18
@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 5}, {"prompt_lookup_num_tokens": 2}],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_options_that_patch_refuses(family, options):
    model, image = model_of(family)
    assert_prepared(model, prompts(image, TEXTS["one"]), **options)


@since_5_18
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_as_patch(family):
    """The same tokens are generated, with beams too."""
    model, image = model_of(family)
    inputs, method = prompts(image, TEXTS["left-padded"]), methods.ToDRE(keep=0.5, depths=())
    prepared = generate(model, prepare(model, inputs, method), num_beams=2)
    with patch(model, method):
        patched = generate(model, inputs, num_beams=2)
    assert torch.equal(prepared.sequences[:, -STEPS:], patched.sequences[:, -STEPS:])


@since_5_18
def test_errors():
    model, image = model_of("llava")
    inputs = prompts(image, TEXTS["one"])
    with pytest.raises(UnsupportedError, match="does not prune after the projector"):
        prepare(model, inputs, methods.FastV(keep=0.5))
    with pytest.raises(ValueError, match="15 image tokens in the prompts for 16 image features"):
        prepare(model, inputs | {"input_ids": inputs["input_ids"].index_fill(1, torch.tensor([3]), 5)}, METHOD)
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        prepare(model, inputs | {"use_cache": False}, METHOD)
    with pytest.raises(TypeError, match="use_cache"):
        generate(model, prepare(model, inputs, METHOD), use_cache=False)
    text = prompts(image, [[4]])
    assert prepare(model, text, METHOD).keys() == text.keys()


@pytest.mark.skipif(SUPPORTED, reason="this transformers has what prepare needs")
def test_older_transformers():
    model, image = model_of("llava")
    with pytest.raises(UnsupportedError, match=r"needs transformers 5\.18 or later; use pruneops\.patch"):
        prepare(model, prompts(image, TEXTS["one"]), METHOD)


def test_imports_no_hooks():
    code = """
import sys
import pruneops.adapters.prepare
names = "handle", "passes", "prefill", "cache", "query_capture"
print([name for name in names if f"pruneops.adapters.transformers.{name}" in sys.modules])
"""
    assert run_python(code) == "[]\n"


def test_without_transformers():
    """Everything else works; `patch` raises an ImportError that says what to install."""
    code = """
import sys
sys.modules["transformers"] = None
import pruneops, pruneops.methods
from pruneops import *
try:
    pruneops.patch
except ImportError as error:
    print(error)
"""
    assert run_python(code) == "pruneops.patch needs transformers 5.0 or later: pip install 'pruneops[transformers]'\n"
