"""Losses and gradients of pruned models against those of the unpruned model with removed tokens masked out."""

import functools

import pytest
import torch
import transformers

from pruneops import methods
from pruneops.adapters.prepare import prepare
from pruneops.adapters.transformers import UnsupportedError, patch
from tests.adapters import oracle
from tests.adapters.oracle import Thin
from tests.adapters.test_prepare import since_5_18
from tests.adapters.test_transformers import spans_of
from tests.adapters.tiny import FAMILIES, model_of, prompts

transformers.logging.set_verbosity_error()


class NoSteps(Thin):
    """Does not prune between decode steps, which would need a cache."""

    at_step = None


THINS = {
    "projector": NoSteps(projector=True),
    "layer": NoSteps(at=(2,)),
    "layers": NoSteps(at=(1, 3)),
    "both": NoSteps(projector=True, at=(1, 2)),
}
TEXTS = {"one": [[3, "image", 5]], "two": [[3, "image", 5], [6, "image", 9]], "images": [[2, "image", 3, "image", 4]]}
every_method = pytest.mark.parametrize("method", THINS.values(), ids=THINS)


def task(family, texts="two", side="left", attention="sdpa"):
    """(model in training mode, inputs with labels): text, without the first token, which padding would predict."""
    model, image = model_of(family, attention)
    inputs = prompts(image, TEXTS[texts], side=side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    learnt = mask & (ids < 100) & (mask.long().cumsum(1) > 1)
    return model.train(), inputs | {"labels": ids.masked_fill(~learnt, -100)}


def removed_tokens(inputs, method, layers):
    """bool [layers, B, S]: tokens visible in each layer, padding not considered."""
    length = inputs["input_ids"].shape[1]
    return torch.stack([oracle.present(method, spans, length, layers, 0) for spans in spans_of(inputs)], 1)


def truth(model, inputs, method):
    """(loss, logits) of the unpruned model with a mask for every layer, logits at removed tokens those of the last kept
    one before."""
    decoder, valid = model.get_decoder(), inputs["attention_mask"].bool()
    seen = removed_tokens(inputs, method, len(decoder.layers)) & valid
    length = seen.shape[-1]
    pairs = (seen[:, :, None] & torch.ones(length, length).tril().bool()) | torch.eye(length).bool()
    masks = torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min)[:, :, None]
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with oracle.masked(decoder, masks):
        logits = model(**given, use_cache=False).logits
    at = torch.arange(length).where(seen[-1], -1).cummax(1).values.clamp(min=0)
    logits = logits.gather(1, at[..., None].expand_as(logits))
    vocabulary = model.config.get_text_config().vocab_size
    return model.loss_function(logits=logits, labels=inputs["labels"], vocab_size=vocabulary), logits


def gradients(model, loss):
    """{name: gradient} of every weight that has one."""
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_gradients(got, want, rtol=1e-4):
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= rtol * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("side", ["left", "right"])
@every_method
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, method, side):
    """Loss, logits and the gradient of every weight are those of the unpruned model with removed tokens masked out."""
    model, inputs = task(family, side=side)
    want, logits = truth(model, inputs, method)
    wanted = gradients(model, want)
    with patch(model, method):
        out = model(**inputs)
        valid = inputs["attention_mask"].bool()
        assert out.logits.shape[:2] == inputs["input_ids"].shape
        torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-5)
        scale = logits.abs().max()
        torch.testing.assert_close(out.logits[valid] / scale, logits[valid] / scale, rtol=0, atol=1e-5)
        assert_gradients(gradients(model, out.loss), wanted)
    assert any("layers.3" in name for name in wanted) and any(gradient.norm() > 1e-4 for gradient in wanted.values())
    assert (model(**inputs).loss - want).abs() > 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("texts", TEXTS)
@every_method
def test_without_a_cache(method, texts, attention):
    """use_cache=False, as an argument or in the configuration, and tuples instead of outputs."""
    model, inputs = task("llava", texts, attention=attention)
    want, _ = truth(model, inputs, method)
    wanted = gradients(model, want)
    with patch(model, method) as handle:
        for where in ("argument", "configuration"):
            model.config.get_text_config().use_cache = model.config.use_cache = where == "argument"
            out = model(**inputs, **({"use_cache": False} if where == "argument" else {}), return_dict=False)
            torch.testing.assert_close(out[0], want, rtol=1e-5, atol=1e-5)
            assert_gradients(gradients(model, out[0]), wanted)
        assert len(handle.stats) == 2


@since_5_18
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_loss(family, texts, side):
    """prepare() shortens labels too: loss and gradients equal those of patch, including the projector's."""
    model, inputs = task(family, texts, side)
    labels = inputs["labels"]
    for method in (methods.Uniform(keep=0.5), methods.DivPrune(keep=0.5)):
        with patch(model, method):
            inputs["labels"] = labels.masked_fill(behind_images(inputs), -100)
            want = model(**inputs).loss
            wanted = gradients(model, want)
        loss = model(**prepare(model, inputs, method)).loss
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
        got = gradients(model, loss)
        assert_gradients(got, {name: value for name, value in wanted.items() if name in got})
        assert any("projector" in name or "merger" in name or "connector" in name for name in got)


def behind_images(inputs):
    """bool [B, S]: tokens predicted by the last token of an image."""
    flags = torch.zeros_like(inputs["input_ids"]).bool()
    for row, spans in zip(flags, spans_of(inputs)):
        for _, end in spans:
            row[end : end + 1] = True
    return flags


REAL = {
    "ToDRE": methods.ToDRE(keep=0.5, depths=()),
    "ToDRE in layers": methods.ToDRE(keep=0.5, tau=2.0),
    "DART": methods.DART(keep=0.5, layer=2),
    "FastV": methods.FastV(keep=0.5, layer=2),
    "VTW": methods.VTW(),
    "DivPrune": methods.DivPrune(keep=0.5),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [*THINS.values(), *REAL.values()], ids=[*THINS, *REAL])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3"])
def test_gradient_checkpointing(family, method, reentrant):
    """The gradients without it, or an UnsupportedError before anything is computed."""
    model, inputs = task(family)
    with patch(model, method):
        want = model(**inputs, use_cache=False).loss
        wanted = gradients(model, want)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        ran = []
        model.get_decoder().register_forward_pre_hook(lambda *_: ran.append(1))
        try:
            loss = model(**inputs).loss
        except UnsupportedError:
            assert not ran
            return
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
        got = gradients(model, loss)
        assert_gradients({name: got[name] for name in wanted if name in got}, wanted)
    model.gradient_checkpointing_disable()
    model.eval()
    with patch(model, method), torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("method", REAL.values(), ids=REAL)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_steps_of_training(family, method):
    """The loss falls, and the same tokens are removed with and without a cache."""
    model, inputs = task(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with patch(model, method) as handle:
        losses = []
        for step in range(4):
            loss = model(**inputs, use_cache=step % 2 == 0).loss
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1] < losses[0] and len({str(stats.kept) for stats in handle.stats}) == 1


class Recording(methods.DivPrune):
    """Selects from features that are always the same, and records its choices."""

    def select_each(self, images):
        chosen = super().select_each([image._replace(features=shared_features(image.features)) for image in images])
        CHOSEN.extend(indices.tolist() for indices in chosen)
        return chosen


CHOSEN = []


@functools.cache
def _features(n, width):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(0))


def shared_features(features):
    return _features(*features.shape)


@pytest.mark.parametrize("method", [Recording(keep=0.5), *REAL.values()], ids=["same features", *REAL])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast(method, checkpointing):
    """A step in bfloat16 runs and is close to float32; from the same features the same tokens are kept."""
    model, inputs = task("llava")
    CHOSEN.clear()
    with patch(model, method) as handle:
        want = model(**inputs).loss
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16):
            try:
                loss = model(**inputs).loss
            except UnsupportedError:
                return
        loss.backward()
        assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)
        torch.testing.assert_close(loss.detach(), want.detach(), rtol=0.2, atol=0.2)
        assert handle.stats[0].totals == handle.stats[1].totals
    assert CHOSEN[:2] == CHOSEN[2:]


@pytest.mark.parametrize("method", REAL.values(), ids=REAL)
@pytest.mark.parametrize("first", ["wrap", "patch"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_step(method, first, checkpointing):
    """PEFT's adapters learn through a pruned model, and no other weight changes."""
    import peft

    model, inputs = task("llava")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, modules_to_save=["multi_modal_projector"])
    if first == "patch":
        handle = patch(model, method)
    wrapped = peft.get_peft_model(model, config).train()
    if checkpointing:
        wrapped.gradient_checkpointing_enable()
        wrapped.enable_input_require_grads()
    if first == "wrap":
        handle = patch(wrapped, method)
    optimizer = torch.optim.SGD([weight for weight in wrapped.parameters() if weight.requires_grad], lr=0.1)
    try:
        loss = wrapped(**inputs).loss
    except UnsupportedError:
        handle.remove()
        return
    before = {name: weight.detach().clone() for name, weight in wrapped.named_parameters()}
    loss.backward()
    optimizer.step()
    changed = {name for name, weight in wrapped.named_parameters() if not torch.equal(weight, before[name])}
    assert any("lora_B" in name for name in changed) and any("projector" in name for name in changed)
    assert all("lora" in name or "modules_to_save" in name for name in changed)
    assert (wrapped(**inputs).loss - loss).abs() > 1e-6 and len(handle.stats) == 2
    handle.remove()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", [REAL["ToDRE"], REAL["FastV"]], ids=["ToDRE", "FastV"])
def test_trainer(method, checkpointing, tmp_path):
    """Three steps of transformers' Trainer; the model that it saves is unpatched."""
    model, inputs = task("llava", "one")
    rows = [{name: value[0] for name, value in inputs.items()}] * 6
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=checkpointing, logging_steps=1,
        remove_unused_columns=False,
    )  # fmt: skip
    handle = patch(model, method)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    try:
        trainer.train()
    except UnsupportedError:
        assert checkpointing and method is REAL["FastV"]
        return
    assert len(handle.stats) == 3 and handle.stats[0].totals[-1] == 16
    assert all(0 < entry["loss"] < 100 for entry in trainer.state.log_history if "loss" in entry)
    trainer.save_model(str(tmp_path / "saved"))
    handle.remove()
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
