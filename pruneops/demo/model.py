"""The embedded model, a small `LlavaForConditionalGeneration` that answers questions about `scenes`.

CLIP tower with [CLS] (8 x 8 pixels a token, 16 x 16 tokens), projector, Llama decoder of 8 layers with grouped queries.
`python -m benchmarks.quality train` makes its weights; weights/ holds them as transformers saves a model, in float16.
"""

from pathlib import Path
from typing import Any

from .scenes import COLOURS, PATCH, ROW, SIDE

WEIGHTS = Path(__file__).with_name("weights")
LEARNED = Path(__file__).with_name("learned")  # weights of the methods that are trained on this model
SPECIAL = "<pad>", "<bos>", "<eos>", "<unk>", "<image>"
WORDS = (
    *map(str, range(10)), *COLOURS, "which", "digit", "is", "what", "colour", "the", "list", "all", "digits", "how",
    "many", "larger", "or", "?", ",",
)  # fmt: skip
IDS = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
PAD, BOS, EOS, _, IMAGE = range(len(SPECIAL))
CHAT = (  # chat template: images and text in their order, no roles
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}{% endfor %}"
)
LAYERS = 8  # of the decoder
ANSWER = 6  # tokens of the longest answer, <eos> included


def configuration():
    """The model's LlavaConfig."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    tower = CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, projection_dim=128,
        image_size=SIDE, patch_size=PATCH, hidden_act="gelu", initializer_range=0.05,
    )  # fmt: skip
    decoder = LlamaConfig(
        vocab_size=len(IDS), hidden_size=128, intermediate_size=384, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.05,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    settings: dict[str, Any] = dict(
        vision_config=tower, text_config=decoder, image_token_id=IMAGE, image_seq_length=ROW**2,
        projector_hidden_act="gelu", vision_feature_layer=-2, vision_feature_select_strategy="default",
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaConfig(**settings)


def tokens(text):
    """Token numbers of a text; KeyError on a word that is not in the vocabulary."""
    return [IDS[word] for word in text.lower().replace("?", " ? ").replace(",", " , ").split()]


def words(ids):
    """The text of token numbers, up to the first <eos>."""
    names = (*SPECIAL, *WORDS)
    ids = list(ids)
    return " ".join(names[i] for i in (ids[: ids.index(EOS)] if EOS in ids else ids))


def normalised(pixels):
    """float32 [.., 3, SIDE, SIDE] within -1..1 of uint8 pixels [.., SIDE, SIDE, 3]."""
    return pixels.movedim(-1, -3).float() / 127.5 - 1


def processor():
    """A LlavaProcessor for the model, made from its vocabulary."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    words.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("?", " ? "), normalizers.Replace(",", " , ")]
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    images = kind(size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=CHAT,
    )  # fmt: skip


def load(device="cpu", path=WEIGHTS):
    """The model with its weights, float32, sdpa; OSError if they cannot be read."""
    import torch
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model: Any = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return model.to(device).eval()


def inputs(pixels, texts, device="cpu"):
    """Arguments of `generate` for a question about each picture.

    Parameters
    ----------
    pixels : Tensor [B, SIDE, SIDE, 3], uint8
    texts : sequence of str
        B questions of words of the vocabulary.

    Returns
    -------
    dict
        input_ids and attention_mask [B, S], padded on the left, and pixel_values.
    """
    import torch

    rows = [[BOS, *[IMAGE] * ROW**2, *tokens(text)] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": normalised(pixels.to(device))}


def ask(model, pixels, texts):
    """Answers to `texts`, B questions about B pictures, as in `inputs`."""
    import torch

    given = inputs(pixels, texts, model.device)
    with torch.inference_mode():
        out = model.generate(**given, max_new_tokens=ANSWER, do_sample=False)
    return [words(row) for row in out[:, given["input_ids"].shape[1] :].tolist()]
