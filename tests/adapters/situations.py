"""What tests of whole situations share: methods of every kind, a model that is asked, and what must not be left behind.

What must hold is a relation between runs: the pruned answer of the same model left in peace, or the unpatched one.
"""

import pytest
import torch
import transformers

from pruneops import methods
from tests.adapters.oracle import Thin
from tests.adapters.test_transformers import TEXTS, generate
from tests.adapters.tiny import model_of, prompts

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


def turn(inputs, run, words):
    """The inputs of the next turn: all so far and a few more words."""
    ids = torch.cat([run.sequences, torch.tensor([words] * len(run.sequences))], 1)
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)[:, -ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": mask}


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
