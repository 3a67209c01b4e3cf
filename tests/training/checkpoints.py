"""Checkpoints of tiny random models with processors, as transformers saves them, and examples to train them on."""

import json
from pathlib import Path

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.adapters import tiny

FAMILIES = ("llava", "qwen2_5_vl")
PAD, BOS, EOS, UNKNOWN = range(4)
SPECIAL = {PAD: "<pad>", BOS: "<bos>", EOS: "<eos>", UNKNOWN: "<unk>"}
VISUAL = {tiny.IMAGE: "<|image_pad|>", tiny.VIDEO: "<|video_pad|>", tiny.START: "<|start|>", tiny.END: "<|end|>"}
CHAT = (
    "<bos>{% for message in messages %}user :{% for part in message['content'] %}"
    "{{ ' IMAGE' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} answer :{% endif %}"
)
QUESTIONS = ("is it dark ?", "what colour is the square in the middle ?", "why ?")
ANSWERS = ("no", "bright green and a little blue", "all of it")
SIZES = ((32, 16), (16, 24), (24, 24), (32, 32))  # width, height
WORDS = tuple(dict.fromkeys(" ".join(("user : answer", *QUESTIONS, *ANSWERS)).split()))
EXAMPLES = 8


class ImagesOnly(transformers.Qwen2_5_VLProcessor):
    """The processor of a Qwen2.5-VL without its part for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = (VISUAL[i] for i in (tiny.IMAGE, tiny.VIDEO))
        self.image_token_id, self.video_token_id = tiny.IMAGE, tiny.VIDEO
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def tokenizer():
    """A tokenizer whose words are separated by spaces, with the numbers that `tiny` gives to special tokens."""
    names = {i: f"word{i}" for i in range(tiny.TEXT["vocab_size"])}
    names |= SPECIAL | VISUAL | dict(enumerate(WORDS, len(SPECIAL)))
    words = Tokenizer(models.WordLevel({name: i for i, name in names.items()}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=list(VISUAL.values()), padding_side="left",
    )  # fmt: skip


def image_processor(name, **settings):
    """Of transformers, without torchvision."""
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return kind(image_mean=[0.5] * 3, image_std=[0.5] * 3, **settings)


def processor(family):
    """A processor for `tiny`'s model of a family."""
    image = VISUAL[tiny.IMAGE]
    if family == "llava":
        images = image_processor("CLIPImageProcessor", size={"height": 32, "width": 32}, do_center_crop=False)
        return transformers.LlavaProcessor(
            images, tokenizer(), patch_size=8, vision_feature_select_strategy="default", image_token=image,
            num_additional_image_tokens=1, chat_template=CHAT.replace("IMAGE", image),
        )  # fmt: skip
    images = image_processor(
        "Qwen2VLImageProcessor", patch_size=4, merge_size=2, temporal_patch_size=1,
        size={"shortest_edge": 64, "longest_edge": 4096},
    )  # fmt: skip
    enclosed = VISUAL[tiny.START] + image + VISUAL[tiny.END]
    return ImagesOnly(images, tokenizer(), chat_template=CHAT.replace("IMAGE", enclosed))


def write_checkpoint(family, folder):
    """Save a model and its processor."""
    model, _ = tiny.model_of(family)
    model.save_pretrained(folder)
    processor(family).save_pretrained(folder)


def write_data(path, examples=EXAMPLES):
    """JSON lines of small pictures, each a square on a ground of another colour."""
    path = Path(path)
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(examples):
        ground, colour = (tuple(torch.randint(256, (3,), generator=generator).tolist()) for _ in range(2))
        picture = Image.new("RGB", SIZES[i % len(SIZES)], ground)
        picture.paste(colour, (4 + i, 4, 12 + i, 12))
        picture.save(path.parent / f"{i}.png")
        row = {"image": f"{i}.png", "question": QUESTIONS[i % 3], "answer": ANSWERS[i // 2 % 3]}
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))
