"""Oracle of a pruned model: the unpruned model, without a cache, with removed tokens masked out."""

import contextlib
import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Thin:
    """A method for tests that keeps some ranks of every image, at the stages, layers and steps of its settings."""

    projector: bool = False
    at: tuple = ()
    steps: tuple = ()
    keep: float = 0.5
    needs = frozenset({"query", "key"})

    @property
    def after_projector(self):
        return self.projector

    def layers(self, count):
        return self.at

    def select_each(self, images):
        return [self.kept(len(image.features), 0) for image in images]

    def at_layer(self, layer, row, count):
        if layer:
            assert row.query.shape[1] == row.key.shape[1] == len(row.hidden)
        return torch.cat([self.kept(end - first, layer) + first for first, end in row.images])

    def step_layer(self, count):
        return 0

    def at_step(self, step):
        number = step.generated + 1  # of the next step, before which tokens are removed
        rank = step.alive.cumsum(1) - 1
        return step.alive & self.stays(rank, number) if number in self.steps else step.alive

    def stays(self, rank, step):
        return rank >= 0 if self.keep == 1 else (rank + step) % 3 != 0

    def kept(self, count, seed):
        return torch.arange(count)[0 if self.keep == 1 else seed % 2 :: 1 if self.keep == 1 else 2]


def places_of(image):
    """Positions of an image's tokens: a list of them, or (first, last + 1)."""
    return torch.arange(*image) if isinstance(image, tuple) else torch.tensor(image)


def present(method, spans, length, layers, step):
    """bool [layers, length]: which tokens of one prompt, whose images are at `spans`, are visible in step `step`."""
    originals = images = [places_of(span) for span in spans]
    if method.projector:
        images = [image[method.kept(len(image), 0)] for image in images]
    visible = torch.ones(layers, length, dtype=torch.bool)
    for layer in range(layers):
        if layer in method.at:
            images = [image[method.kept(len(image), layer)] for image in images]
        visual = torch.cat(images) if images else torch.arange(0)
        if layer == 0:  # decides for all layers
            left = visual
            for done in set(range(2, step + 1)) & set(method.steps):
                left = left[method.stays(torch.arange(len(left)), done)]
        for image in originals:
            visible[layer, image] = False
        visible[layer, visual[torch.isin(visual, left)]] = True
    return visible


def runs(flags):
    """(first, last + 1) of each run of true flags."""
    edges = [0, *map(int, flags), 0]
    starts = [i for i in range(len(flags)) if edges[i + 1] and not edges[i]]
    ends = [i + 1 for i in range(len(flags)) if edges[i + 1] and not edges[i + 2]]
    return list(zip(starts, ends))


@contextlib.contextmanager
def recorded(decoder, calls):
    """Append the keyword arguments of every forward pass of the decoder to `calls`."""
    hook = decoder.register_forward_pre_hook(lambda m, a, kwargs: calls.append(dict(kwargs)), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def masked(decoder, masks):
    """Replace the attention mask of every layer."""

    def hook(mask):
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask})

    hooks = [
        layer.register_forward_pre_hook(hook(mask), with_kwargs=True) for layer, mask in zip(decoder.layers, masks)
    ]
    try:
        yield
    finally:
        for registered in hooks:
            registered.remove()


class Sequence(NamedTuple):
    """A batch of prompts and what is generated from them: the decoder's inputs, [B, T]."""

    embeds: Tensor
    positions: Tensor
    valid: Tensor  # bool
    prompt: int  # its length
    extra: dict  # deepstack features


def sequence(model, inputs, generated):
    """The `Sequence` of the prompts and all generated tokens [B, steps] but the last."""
    decoder, calls = model.get_decoder(), []
    with torch.no_grad(), recorded(decoder, calls):
        count = generated.shape[1]
        model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    first, prompt = calls[0], inputs["input_ids"].shape[1]
    embeds = torch.cat([first["inputs_embeds"], model.get_input_embeddings()(generated[:, :-1])], 1)
    positions = torch.cat([call["position_ids"] for call in calls], -1)
    B, T = embeds.shape[:2]
    valid = torch.cat([inputs["attention_mask"], torch.ones(B, T - prompt)], 1).bool()
    extra = {}
    if first.get("visual_pos_masks") is not None:
        flags = first["visual_pos_masks"]
        extra["visual_pos_masks"] = torch.cat([flags, flags.new_zeros(B, T - prompt)], 1)
        extra["deepstack_visual_embeds"] = first["deepstack_visual_embeds"]
    assert len(calls) == 1 + T - prompt
    return Sequence(embeds, positions, valid, prompt, extra)


def masked_logits(model, tokens, visible):
    """[T - prompt + 1, B, vocabulary] of a `Sequence`, from the end of the prompt on.

    visible: bool [layers, B, T, T], whether the second token can be seen by the first; not the padding's and not later
    ones, anyway.
    """
    decoder, T = model.get_decoder(), tokens.embeds.shape[1]
    visible = visible & tokens.valid[:, None] & torch.ones(T, T).tril().bool()
    visible |= torch.eye(T).bool()
    masks = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, :, None]
    with torch.no_grad(), masked(decoder, masks):
        hidden = decoder(
            inputs_embeds=tokens.embeds, position_ids=tokens.positions, attention_mask=masks[0], use_cache=False,
            **tokens.extra,
        ).last_hidden_state  # fmt: skip
        return model.lm_head(hidden[:, tokens.prompt - 1 :]).transpose(0, 1)


def logits(model, inputs, spans, method, generated):
    """[steps, B, vocabulary]: of the last token after the prompt and after each generated token but the last.

    generated [B, steps]; spans: per row, where its images are; see `places_of`.
    """
    tokens, layers = sequence(model, inputs, generated), len(model.get_decoder().layers)
    B, T = tokens.valid.shape
    visible = torch.zeros(layers, B, T, T, dtype=torch.bool)
    for b in range(B):
        for row in range(T):
            step = max(0, row - tokens.prompt + 1)
            visible[:, b, row] = present(method, spans[b], T, layers, step)
    return masked_logits(model, tokens, visible)
