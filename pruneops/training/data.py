"""Examples for training, and what a model's decoder gets of them: the same for every family that `patch` supports."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..adapters.transformers.models import UnsupportedError, rotary_at, visual_tokens

IGNORED = -100  # label of a token that is not part of an answer


class Example(NamedTuple):
    """An image (PIL), a question about it, and the answer."""

    image: Any
    question: str
    answer: str


class JsonLines(Dataset[Example]):
    """Examples of a file whose lines are ``{"image": path, "question": text, "answer": text}``.

    Parameters
    ----------
    path : Path
        The file; paths of images are relative to its folder.

    Raises
    ------
    ValueError
        On a line that is no such object, or an image that does not exist; names the line.
    """

    def __init__(self, path: Path) -> None:
        self.folder, self.rows = Path(path).parent, []
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {error}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                image, question, answer = (row[name] for name in Example._fields)
                if not all(isinstance(text, str) for text in (image, question, answer)):
                    raise TypeError("not all are text")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, line {number}: expected {{"image": path, "question": text, "answer": text}} ({error!r})'
                ) from None
            if not (self.folder / image).is_file():
                raise ValueError(f"{path}, line {number}: no image {self.folder / image}")
            self.rows.append((image, question, answer))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        from PIL import Image

        image, question, answer = self.rows[index]
        return Example(Image.open(self.folder / image).convert("RGB"), question, answer)


class Batch(NamedTuple):
    """What the decoder gets of a batch of examples; rows are padded at the end.

    Parameters
    ----------
    embeds : Tensor [B, S, D]
    positions : Tensor [B, S] or [P, B, S], int64
        As the decoder takes them: P coordinates with mRoPE.
    rotary : tuple of Tensor [B, S, Dr]
        Cos and sin of these positions.
    valid, visual : Tensor [B, S], bool
        Tokens that are no padding; tokens of an image.
    labels : Tensor [B, S], int64
        The tokens of the answer and the end of the text at their places, elsewhere -100.
    """

    embeds: Tensor
    positions: Tensor
    rotary: tuple[Tensor, Tensor]
    valid: Tensor
    visual: Tensor
    labels: Tensor


def encode(processor: Any, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Inputs of a model, with `labels`: the chat template's prompt, the answer, the end of the text; padded at the end.

    Parameters
    ----------
    processor : ProcessorMixin
        The model's.
    examples : sequence of Example

    Returns
    -------
    dict
        The processor's tensors; those of the prompt are extended by the answer.
    """
    tokenizer = processor.tokenizer
    prompts = [_prompt(processor, example.question) for example in examples]
    inputs = dict(
        processor(images=[example.image for example in examples], text=prompts, padding=True, return_tensors="pt")
    )
    valid = inputs.pop("attention_mask").bool()
    answers = [
        torch.tensor([*tokenizer(example.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        for example in examples
    ]
    rows = [ids[kept] for ids, kept in zip(inputs["input_ids"], valid)]
    pad = tokenizer.pad_token_id or 0
    extended = {name for name, value in inputs.items() if value.shape == valid.shape} - {"input_ids"}
    for name in extended:
        inputs[name] = _padded([torch.cat([x[kept], 0 * a]) for x, kept, a in zip(inputs[name], valid, answers)], 0)
    inputs["input_ids"] = _padded([torch.cat(pair) for pair in zip(rows, answers)], pad)
    inputs["attention_mask"] = _padded([torch.ones(len(row) + len(a)).long() for row, a in zip(rows, answers)], 0)
    hidden = [torch.full((len(row),), IGNORED) for row in rows]
    inputs["labels"] = _padded([torch.cat(pair) for pair in zip(hidden, answers)], IGNORED)
    return inputs


@torch.no_grad()
def decoder_inputs(model: Any, inputs: dict[str, Tensor]) -> Batch:
    """Encode the images and merge them into the prompts, as the model does, up to the decoder.

    Parameters
    ----------
    model : PreTrainedModel
        One of those that `pruneops.patch` supports, not patched.
    inputs : dict
        From `encode`.

    Returns
    -------
    Batch
        Without gradients.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    labels = inputs.pop("labels")
    decoder, seen = model.get_decoder(), {}

    def stop(module, args, kwargs):
        seen.update(kwargs)
        raise _Reached

    hook = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.base_model(**inputs, use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    if seen.get("deepstack_visual_embeds") is not None:
        raise UnsupportedError(
            "pruneops.training: decoders with deepstack features (Qwen3-VL) cannot be trained on yet"
        )
    embeds, positions = seen["inputs_embeds"], seen.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
    if positions.dim() == 3 and len(positions) == 4:  # those of the text, then three of mRoPE
        positions = positions[1:]
    if positions.dim() == 2:
        positions = positions.expand(embeds.shape[:2])
    rotary = rotary_at("pruneops.training", decoder, embeds, positions)
    visual = torch.stack(list(visual_tokens(model, inputs["input_ids"]).values())).any(0)
    return Batch(embeds, positions, rotary, inputs["attention_mask"].bool(), visual, labels)


class _Reached(Exception):
    """The decoder was reached."""


def _prompt(processor, question):
    if getattr(processor, "chat_template", None):
        talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        return processor.apply_chat_template(talk, add_generation_prompt=True)
    return f"{processor.image_token}\n{question}"


def _padded(rows, value):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
