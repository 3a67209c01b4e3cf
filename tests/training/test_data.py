"""Examples, and the decoder's inputs: exactly what the model itself makes of them."""

import json

import pytest
import torch

from pruneops.adapters.transformers import UnsupportedError
from pruneops.training.data import IGNORED, Example, JsonLines, decoder_inputs, encode
from tests.adapters import tiny
from tests.training.checkpoints import EOS, EXAMPLES, PAD, QUESTIONS, SIZES


def alone(processor, example):
    """Tokens of a prompt, by the processor itself."""
    content = [{"type": "image"}, {"type": "text", "text": example.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[example.image], text=[prompt], return_tensors="pt")["input_ids"][0].tolist()


def test_encode(loaded, examples):
    """Each row is the prompt, the answer and the end, then padding."""
    _, processor = loaded
    inputs = encode(processor, examples)
    length = inputs["input_ids"].shape[1]
    lengths = set()
    for i, example in enumerate(examples):
        prompt = alone(processor, example)
        answer = [*processor.tokenizer.convert_tokens_to_ids(example.answer.split()), EOS]
        gap = length - len(prompt) - len(answer)
        lengths.add(gap)
        assert inputs["input_ids"][i].tolist() == prompt + answer + [PAD] * gap
        assert inputs["labels"][i].tolist() == [IGNORED] * len(prompt) + answer + [IGNORED] * gap
        assert inputs["attention_mask"][i].tolist() == [1] * (length - gap) + [0] * gap
        if "mm_token_type_ids" in inputs:
            types = [int(token == tiny.IMAGE) for token in prompt]
            assert inputs["mm_token_type_ids"][i].tolist() == types + [0] * (length - len(prompt))
    assert len(lengths) > 2 and 0 in lengths  # padded by different amounts


def test_prompt_without_a_chat_template(llava, examples):
    _, processor = llava
    template, processor.chat_template = processor.chat_template, None
    try:
        ids = encode(processor, examples[:1])["input_ids"][0].tolist()
    finally:
        processor.chat_template = template
    words = processor.tokenizer.convert_tokens_to_ids([*examples[0].question.split(), *examples[0].answer.split()])
    assert ids == [tiny.IMAGE] * 16 + words + [EOS]


@torch.no_grad()
def test_decoder_on_a_batch(loaded, examples):
    """The same logits as the model's own forward pass: on the batch, and on each example alone."""
    model, processor = loaded
    inputs = encode(processor, examples)
    batch = decoder_inputs(model, inputs)
    hidden = model.get_decoder()(
        inputs_embeds=batch.embeds, position_ids=batch.positions, attention_mask=batch.valid.long(), use_cache=False
    ).last_hidden_state
    logits = model.get_output_embeddings()(hidden)
    own = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    torch.testing.assert_close(logits[batch.valid], own[batch.valid])
    for i, example in enumerate(examples):
        single = encode(processor, [example])
        length = single.pop("labels").shape[1]
        torch.testing.assert_close(logits[i, :length], model(**single).logits[0], rtol=1e-4, atol=1e-4)
        assert batch.valid[i].sum() == length
    assert batch.visual.equal(inputs["input_ids"] == tiny.IMAGE)
    assert batch.labels.equal(inputs["labels"])


@torch.no_grad()
def test_rotary_embeddings_of_a_batch(loaded, examples):
    """Those that the decoder's layers get, even where mRoPE has three coordinates."""
    model, processor = loaded
    inputs, seen = encode(processor, examples), []
    batch = decoder_inputs(model, inputs)
    layer = model.get_decoder().layers[1]
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    model(**{name: value for name, value in inputs.items() if name != "labels"})
    hook.remove()
    for own, theirs in zip(batch.rotary, seen[0], strict=True):
        theirs = theirs.expand_as(own)
        torch.testing.assert_close(own[batch.valid], theirs[batch.valid])


def test_deepstack_is_refused():
    model, image = tiny.model_of("qwen3_vl")
    inputs = tiny.prompts(image, [[3, "image", 4]])
    inputs["labels"] = torch.full_like(inputs["input_ids"], IGNORED)
    with pytest.raises(UnsupportedError, match=r"deepstack features \(Qwen3-VL\) cannot be trained on yet"):
        decoder_inputs(model, inputs)
    assert not model.get_decoder()._forward_pre_hooks


def test_json_lines(data):
    dataset = JsonLines(data)
    assert len(dataset) == EXAMPLES
    for i in range(EXAMPLES):
        example = dataset[i]
        assert isinstance(example, Example) and example.question == QUESTIONS[i % 3]
        assert example.image.size == SIZES[i % 4] and example.image.mode == "RGB"


def test_text_of_any_language(data):
    """UTF-8, in which a string may hold characters that Python takes for ends of lines."""
    row = {"image": "0.png", "question": "à quoi\u2028sert-il ?", "answer": "\x85 長い"}
    path = data.with_name("languages.jsonl")
    path.write_bytes(f"{json.dumps(row, ensure_ascii=False)}\r\n\n".encode())
    dataset = JsonLines(path)
    assert len(dataset) == 1
    assert dataset[0][1:] == (row["question"], row["answer"])


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"image": "0.png", ', "expected .*JSONDecodeError"),
        ('{"image": "0.png", "question": "q"}', r"expected \{.*\} \(KeyError\('answer'\)\)"),
        ('["0.png", "q", "a"]', "expected .*TypeError"),
        ("7", "expected .*TypeError"),
        ('{"image": 7, "question": "q", "answer": "a"}', "expected .*not all are text"),
        ('{"image": "0.png", "question": "q", "answer": 2}', "expected .*not all are text"),
        ('{"image": "none.png", "question": "q", "answer": "a"}', "no image .*none.png"),
        ('{"image": "", "question": "q", "answer": "a"}', "no image"),
    ],
)
def test_a_bad_line_is_named(data, line, message):
    path = data.with_name("bad.jsonl")
    path.write_text(data.read_text().splitlines()[0] + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: {message}"):
        JsonLines(path)
