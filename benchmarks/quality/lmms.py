"""`pruneops_hf`, a model of lmms-eval 0.7.3: any supported transformers model, pruned by any method of pruneops.

How to run it with 7B weights, on a machine with a GPU and a CUDA build of torch, from the root of a checkout:

    pip install setuptools pybind11 ninja && pip install --no-build-isolation ".[transformers]"
    pip install lmms_eval==0.7.3
    python -m benchmarks.quality.lmms --model pruneops_hf --batch_size 1 --output_path results --log_samples \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=todre,keep=0.1 --tasks mme,pope,gqa,textvqa_val
    accelerate launch --num_processes 8 -m benchmarks.quality.lmms --model pruneops_hf --tasks mme,pope \
        --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,max_pixels=1605632,method=dart,keep=0.25

The module registers the model with lmms-eval and runs its command line, with all options of the harness. `method=none`
is the unpruned model to compare with. `keep` is a share with a point (0.25, 1.0) or a count without (64). For other
settings `method` takes JSON or a file of it: 'method={"method": "fastv", "layer": 3},keep=0.5', method=fastv.json.
Visual tokens, and how many of them each decoder layer keeps, are in the `token_counts` of every logged sample; the
first process's means are in `throughput` of the results.

The same with the embedded model and without any download (this is what CI runs):

    python -m benchmarks.quality.lmms_task.utils /tmp/scenes
    python -m benchmarks.quality.lmms --model pruneops_hf --include_path /tmp/scenes --tasks pruneops_scenes \
        --model_args pretrained=pruneops/demo/weights,dtype=float32,method=dart,keep=0.25
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import pruneops
from pruneops.methods import from_json

NAME = "pruneops_hf"
NEW_TOKENS = 1024  # where a task sets no limit


@dataclass
class Counts(TokenCounts):
    """Tokens of a request; visual tokens before pruning and in each decoder layer, None without pruning."""

    visual_tokens: int | None = None
    visual_tokens_kept: list | None = None

    def to_dict(self):
        pruned = {"visual_tokens": self.visual_tokens, "visual_tokens_kept": self.visual_tokens_kept}
        return super().to_dict() | ({} if self.visual_tokens is None else pruned)


class PruneopsHF(lmms):
    """A transformers model with its chat template, pruned.

    Parameters
    ----------
    pretrained : str
        Name or folder of a model that `pruneops.patch` supports.
    method, keep
        See `method_of`.
    device : str, optional
        By default, and with several processes, the one that accelerate gives this process.
    dtype : str
        Of the weights: "auto" as the checkpoint says, "bfloat16", "float16", "float32".
    batch_size : int
    attn_implementation, revision : str, optional
        As transformers takes them.
    min_pixels, max_pixels : int, optional
        Limits on an image, for processors that know them (Qwen).
    """

    is_simple = False  # takes conversations from tasks

    def __init__(
        self, pretrained, method="none", keep=None, device=None, dtype="auto", batch_size=1, attn_implementation=None,
        revision=None, min_pixels=None, max_pixels=None,
    ):  # fmt: skip
        super().__init__()
        method = method_of(method, keep)
        self.batch_size = _batch_size(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        assigned = device is None or self.world_size > 1
        self.device = self.accelerator.device if assigned else torch.device(device)
        pixels = {name: value for name, value in dict(min_pixels=min_pixels, max_pixels=max_pixels).items() if value}
        self.processor = AutoProcessor.from_pretrained(pretrained, revision=revision, **pixels)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
        model = AutoModelForImageTextToText.from_pretrained(
            pretrained, revision=revision, dtype=dtype, attn_implementation=attn_implementation
        )
        self.model = model.to(self.device).eval()
        self.handle = None if method is None else pruneops.patch(self.model, method)

    def generate_until(self, requests):
        queue = utils.Collator([request.args for request in requests], _order, group_fn=_settings, grouping=True)
        results, started, selection = [], time.perf_counter(), 0.0
        with tqdm(total=len(requests), desc=NAME, disable=self.rank != 0) as bar:
            for batch in queue.get_batched(n=self.batch_size):
                answers, seconds = self._answer(batch)
                results += answers
                selection += seconds
                bar.update(len(batch))
        self._report([result.token_counts for result in results], time.perf_counter() - started, selection)
        return queue.get_original(results)

    def loglikelihood(self, requests):
        raise NotImplementedError(f"{NAME} only generates: choose tasks whose output_type is generate_until")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError(f"{NAME} answers in one turn: choose tasks whose output_type is generate_until")

    def clean(self):
        if self.handle is not None:
            self.handle.remove()
            self.handle = None  # it holds the model
        super().clean()

    @torch.inference_mode()
    def _answer(self, batch):
        """(results of requests of equal settings, seconds spent on selection)."""
        _, messages, (settings, *_), documents, tasks, splits = zip(*batch)
        chats = [
            ChatMessages(messages=talk(self.task_dict[task][split][number])).to_hf_messages()
            for talk, task, split, number in zip(messages, tasks, splits, documents)
        ]
        inputs = self.processor.apply_chat_template(
            chats, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.device, self.model.dtype)  # fmt: skip
        pad = self.processor.tokenizer.pad_token_id
        output = self.model.generate(**inputs, **generation(settings), pad_token_id=pad)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = [cut(text, settings) for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        lengths = zip(inputs["attention_mask"].sum(1).tolist(), (new != pad).sum(1).tolist())
        visual, seconds = self._visual(len(batch))
        counts = [Counts(prompt, new, None, *tokens) for (prompt, new), tokens in zip(lengths, visual)]
        return [GenerationResult(text, count) for text, count in zip(texts, counts)], seconds

    def _visual(self, rows):
        """([(visual tokens, those of every layer)] of each request of the last batch, seconds spent on selection)."""
        if self.handle is None or not self.handle.stats:
            return [(None, None)] * rows, 0.0
        stats = self.handle.stats.pop()
        beams = len(stats.images) // rows
        before = [sum(images) for images in stats.images[::beams]]
        kept = [[sum(images) for images in row] for row in zip(*(layer[::beams] for layer in stats.kept))]
        return [(n, layers) if n else (None, None) for n, layers in zip(before, kept)], stats.seconds

    def _report(self, counts, seconds, selection):
        generated = sum(count.output_tokens for count in counts)
        pruned = [count for count in counts if count.visual_tokens is not None]
        extra = {"total_requests": len(counts)}
        if pruned:
            layers = len(pruned[0].visual_tokens_kept)
            extra["visual_tokens"] = sum(count.visual_tokens for count in pruned) / len(pruned)
            extra["visual_tokens_kept"] = sum(sum(count.visual_tokens_kept) for count in pruned) / len(pruned) / layers
            extra["selection_seconds"] = selection / len(counts)
        log_metrics(seconds, generated, generated / seconds, extra)


def method_of(method, keep=None):
    """The pruning method that the arguments of the model name.

    Parameters
    ----------
    method : str
        "none", the name of a method, its settings as JSON as `pruneops.methods.from_json` reads them ("schema" may be
        left out), or a file of such settings, whose name ends in .json.
    keep : float, int or str, optional
        A share with a point or a count without; replaces the one among the settings.

    Returns
    -------
    pruneops.methods.Method or None

    Raises
    ------
    ValueError
        If `method` names no method, or on unknown or bad settings.
    """
    if method == "none":
        if keep is not None:
            raise ValueError(f"{NAME}: keep={keep} needs a method to go with it; got method=none")
        return None
    text = Path(method).read_text() if method.endswith(".json") else method
    try:
        settings = json.loads(text) if text.lstrip().startswith("{") else {"method": text}
    except ValueError as error:
        raise ValueError(f"{NAME}: method={method} must be none, a name, JSON or a file of it: {error}") from None
    if keep is not None:
        settings["keep"] = _number(keep)
    return from_json(json.dumps({"schema": 1} | settings))


def generation(settings):
    """Arguments of `generate` for the generation settings of a task; greedy unless they give a temperature."""
    chosen = {"max_new_tokens": settings.get("max_new_tokens", NEW_TOKENS), "num_beams": settings.get("num_beams", 1)}
    temperature = settings.get("temperature") or 0
    sampled = {"do_sample": True, "temperature": temperature, "top_p": settings.get("top_p")}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return chosen | (sampled if temperature > 0 else greedy)


def cut(text, settings):
    """The text before the first of the task's stop words; an empty line, the harness's default, is ignored."""
    stops = settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text if stop == "\n\n" else text.split(stop)[0]
    return text


def _order(request):
    return -len(request[0]), request[3]  # long questions first, then by document


def _settings(request):
    return request[2]


def _number(keep):
    for kind in (int, float) if isinstance(keep, str) else ():
        try:
            return kind(keep)
        except ValueError:
            continue
    return keep


def _batch_size(value):
    if not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"{NAME}: batch_size={value} must be an int of at least 1")
    return int(value)


# An entry point of the group lmms_eval.models would do the same, but the package does not ship benchmarks.
MODEL_REGISTRY_V2.register_manifest(ModelManifest(NAME, chat_class_path="benchmarks.quality.lmms.PruneopsHF"))


if __name__ == "__main__":
    from lmms_eval.cli.dispatch import main

    main()
