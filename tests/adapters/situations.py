"""Shared by tests of complete situations: methods of every kind, a tiny model, comparison of runs, traces of a patch.

These tests compare runs: with the pruned run of the same model without interference, or with the unpatched model.
"""

import pytest
import torch
import transformers

from pruneops import methods
from tests.adapters.oracle import Thin
from tests.adapters.test_transformers import TEXTS, generate
from tests.adapters.tiny import model_of, prompts
from tests.methods.weights import rate_classifier

transformers.logging.set_verbosity_error()
PROJECTOR = methods.ToDRE(keep=0.5, depths=())
LAYER = methods.DART(keep=0.5, layer=2)
QUERY = methods.FastV(keep=0.5, layer=2)
THIN = Thin(projector=True, at=(1, 3), steps=(2,))
DYRATE = methods.DyRate(weights=rate_classifier(heads=4, layer=2, slope=6.0, noise=0.5), keep=0.5)
KINDS = {"projector": PROJECTOR, "layer": LAYER, "query": QUERY, "all three": THIN, "dyrate": DYRATE}
every_kind = pytest.mark.parametrize("method", KINDS.values(), ids=KINDS)


def llava(texts="one"):
    model, image = model_of("llava")
    return model, prompts(image, TEXTS[texts])


def ask(model, inputs, **options):
    """Logits of a generation, or of a forward pass if a wrapper has no `generate`."""
    if hasattr(model, "generate"):
        return torch.stack(generate(model, inputs, **options).logits)
    with torch.no_grad():
        return model(**inputs).logits


def same(one, other):
    return one.shape == other.shape and bool(((one - other).abs().max() < 1e-4).item())


def kept(handle):
    """Visual tokens in the last layer after the prompt of the latest request."""
    return handle.stats[-1].totals[-1] if handle.stats else None


def turn(inputs, run, new):
    """The inputs of the next turn: all tokens so far and some new ones."""
    ids = torch.cat([run.sequences, torch.tensor([new] * len(run.sequences))], 1)
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)[:, -ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": mask}


IGNORED = "_pruneops", "rope_deltas"  # Qwen models set the second in every pass


def traces(model):
    """State that a pass or a patch could change: attributes of every module, hooks and configurations."""
    state = []
    for module in model.modules():
        names = {name: id(value) for name, value in vars(module).items() if name not in IGNORED}
        hooks = [len(value) for name, value in vars(module).items() if name.endswith("_hooks")]
        config = getattr(module, "config", None)
        state.append((names, hooks, getattr(config, "_attn_implementation", None)))
    return state
