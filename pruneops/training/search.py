"""Ranked lists of visual tokens, by which DTR's ranking model is trained: a search by the loss of the answer.

DTR, section 3.2, Algorithm 1. At every step each remaining visual token is tried with the chosen ones, and
the one of lowest loss is chosen. Tokens stand in the prompt in ascending order at their original positions.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import IGNORED, Batch, Example, decoder_inputs, encode

SCHEMA = 1
PADDING = -1  # rank where an image has fewer tokens than the list is long
ROWS, SHARD = 64, 64


class Lists(NamedTuple):
    """Ranked lists of examples.

    Parameters
    ----------
    number : Tensor [E], int64
        Of the example in its dataset, ascending.
    ranked : Tensor [E, J], int64
        Ranks of the chosen tokens among the image's visual tokens, the most important first; -1 where there are fewer.
    loss : Tensor [E, J], float32
        Of the answer with the tokens chosen so far; NaN where there are fewer.
    """

    number: Tensor
    ranked: Tensor
    loss: Tensor


@torch.no_grad()
def ranked_list(model: Any, batch: Batch, ranks: int, *, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """The most important visual tokens of an example, and the loss of its answer with them.

    Ascending candidates share the prefix before the first of them: its keys and values are computed once.

    Parameters
    ----------
    model : PreTrainedModel
        One of those that `pruneops.patch` supports, not patched, in evaluation mode.
    batch : Batch
        Of one example, from `decoder_inputs`; the answer follows the image.
    ranks : int
        J, length of the list; all visual tokens if there are fewer.
    rows : int
        Candidates of one forward pass.

    Returns
    -------
    tuple of Tensor [J]
        Ranks among the visual tokens, int64, and losses, float32: mean cross-entropy of the answer's tokens.

    Raises
    ------
    ValueError
        On a batch of several examples, without visual tokens or an answer after them; on a loss that is not finite.
    """
    _require(ranks, "ranks")
    _require(rows, "rows")
    sample = _Sample(model, batch)
    return _greedy(sample, ranks, lambda kept, candidates: sample.losses(kept, candidates, rows))


@torch.no_grad()
def reference_ranked_list(model: Any, batch: Batch, ranks: int) -> tuple[Tensor, Tensor]:
    """What `ranked_list` computes, by one whole forward pass per candidate."""
    _require(ranks, "ranks")
    sample = _Sample(model, batch)

    def losses(kept, candidates):
        whole = [torch.cat([kept, candidate[None]]).sort().values[None] for candidate in candidates]
        return torch.cat([sample.loss(row, None) for row in whole])

    return _greedy(sample, ranks, losses)


def search(
    model: Any,
    processor: Any,
    dataset: Any,
    folder: Path,
    *,
    ranks: int,
    rows: int = ROWS,
    shard: int = SHARD,
    numbers: Sequence[int] | None = None,
) -> None:
    """Write the ranked lists of a dataset's examples into a folder, or complete them there.

    Under ``torchrun`` or ``accelerate launch`` every process takes its part of the shards.

    Parameters
    ----------
    model : PreTrainedModel
        On this process's device, in evaluation mode.
    processor : ProcessorMixin
        The model's.
    dataset : Dataset of Example
    folder : Path
        For ``lists-00000.safetensors`` and so on, which `load_lists` reads. Shards that are there are not searched.
    ranks, rows
        As in `ranked_list`.
    shard : int
        Examples of a file.
    numbers : sequence of int, optional
        Which examples; default: all.

    Raises
    ------
    ValueError
        If the folder holds a broken file, or lists of another model, dataset or setting.
    """
    from tqdm import tqdm

    _require(shard, "shard")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = sorted(range(len(dataset)) if numbers is None else set(numbers))
    if not numbers or not 0 <= numbers[0] <= numbers[-1] < len(dataset):
        raise ValueError(f"numbers: expected some of 0..{len(dataset) - 1}, the numbers of the dataset's examples")
    settings = {
        "schema": SCHEMA, "ranks": ranks, "shard": shard, "count": len(numbers), "numbers": _digest(str(numbers)),
        "dataset": _dataset_digest(processor, dataset), "model": _model_digest(model),
    }  # fmt: skip
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    mine = [(_file(folder, i), numbers[i * shard : (i + 1) * shard]) for i in range(_shards(settings))[rank::world]]
    missing = [(path, part) for path, part in mine if not path.exists()]
    for path, _ in mine:
        if path.exists():
            _same(path, _settings(path), settings)
    total, left = (sum(len(part) for _, part in shards) for shards in (mine, missing))
    hidden = None if rank == 0 else True
    with tqdm(total=total, initial=total - left, desc="search", unit=" examples", disable=hidden) as bar:
        for path, part in missing:
            lists = []
            for number in part:
                batch = decoder_inputs(model, encode(processor, [dataset[number]]))
                lists.append(ranked_list(model, batch, ranks, rows=rows))
                bar.update()
            _write(path, Lists(torch.tensor(part), *_stacked(lists, ranks)), settings)


def load_lists(folder: Path, *, partial: bool = False) -> Lists:
    """The lists that `search` wrote into a folder.

    Parameters
    ----------
    folder : Path
    partial : bool
        Take what is there of a search that has not finished.

    Returns
    -------
    Lists

    Raises
    ------
    ValueError
        If files are missing, broken, or of different searches.
    """
    paths = sorted(Path(folder).glob("lists-*.safetensors"))
    if not paths:
        raise ValueError(f"folder {folder}: no lists-*.safetensors; run pruneops.training.search.search into it first")
    settings = _settings(paths[0])
    shards = _shards(settings)
    if len(paths) < shards and not partial:
        missing = f"{len(paths)} of {shards} files are there"
        raise ValueError(f"folder {folder}: {missing}; let the search finish, or pass partial=True")
    parts = [_read(path, settings) for path in paths]
    return Lists(*map(torch.cat, zip(*parts)))


class _Sample:
    """An example's tokens before the decoder; positions in the prompt are on the CPU."""

    def __init__(self, model, batch):
        if len(batch.embeds) != 1:
            raise ValueError(f"batch: expected one example, got {len(batch.embeds)}; search them one by one")
        if model.training:
            raise ValueError("model: in training mode, where losses may be random; call model.eval()")
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.embeds, self.positions = batch.embeds[0], batch.positions[..., 0, :]
        labels, valid, visual = (tensor[0].cpu() for tensor in (batch.labels, batch.valid, batch.visual))
        self.visual, answer = (mask.nonzero().flatten() for mask in (visual & valid, labels != IGNORED))
        if not len(self.visual) or not len(answer) or answer[0] <= self.visual[-1]:
            raise ValueError("batch: expected visual tokens, and labels (not -100) of an answer after them")
        self.labels = labels[answer].to(self.embeds.device)
        self.predicting = (answer - answer[-1] - 1).to(self.embeds.device)  # hidden states, from the end of a row
        self.text = (valid & ~visual)[: answer[-1]].nonzero().flatten()  # the last answer's token predicts none

    def decode(self, rows, cache):
        """Last hidden states [R, m, D] of the tokens at places `rows` [R, m] of the prompt."""
        rows = rows.to(self.embeds.device)
        past = 0 if cache is None else cache.get_seq_length()
        return self.decoder(
            inputs_embeds=self.embeds[rows], position_ids=self.positions[..., rows], past_key_values=cache,
            attention_mask=rows.new_ones(len(rows), past + rows.shape[1]),  # without it, gaps would separate sequences
            use_cache=cache is not None,
        ).last_hidden_state  # fmt: skip

    def loss(self, rows, cache):
        """Losses [R] of the answer after the cached tokens and those at places `rows` [R, m]."""
        logits = self.head(self.decode(rows, cache)[:, self.predicting]).float()
        losses = F.cross_entropy(logits.flatten(0, 1), self.labels.repeat(len(rows)), reduction="none")
        return losses.view(len(rows), -1).mean(1)

    def losses(self, kept, candidates, rows):
        """Losses [N] with each of the ascending candidates [N] and the ascending kept tokens [K]."""
        chunks, results = candidates.split(rows), []
        prefix = self.prefix(kept[kept < chunks[-1][0]])
        for chunk in chunks:
            shared = int(torch.searchsorted(kept, chunk[0]))
            tail = kept[shared:].expand(len(chunk), -1)
            ascending = torch.cat([chunk[:, None], tail], 1).sort(1).values
            results.append(self.loss(ascending, _cache(prefix, shared, len(chunk))))
        return torch.cat(results)

    def prefix(self, kept):
        """(keys, values) [1, H, K, Dh] of every layer."""
        if not len(kept):
            return []
        cache = _cache()
        self.decode(kept[None], cache)
        layers: Any = cache.layers
        return [(layer.keys, layer.values) for layer in layers]


def _cache(prefix=(), length=0, rows=1):
    """A cache of the first `length` tokens of a prefix, in every row."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i, pair in enumerate(prefix if length else ()):
        cache.update(*(tensor[:, :, :length].expand(rows, -1, -1, -1) for tensor in pair), i)
    return cache


def _greedy(sample, ranks, losses_of):
    """Algorithm 1; `losses_of(kept, candidates)` are the losses with each candidate."""
    left, kept, ranked, losses = torch.arange(len(sample.visual)), sample.text, [], []
    for _ in range(min(ranks, len(left))):
        of_each = losses_of(kept, sample.visual[left])
        best = int(of_each.argmin())  # the first, of equal ones
        ranked.append(left[best])
        losses.append(of_each[best])
        kept = torch.cat([kept, sample.visual[left[best], None]]).sort().values
        left = torch.cat([left[:best], left[best + 1 :]])
    loss = torch.stack(losses).cpu()
    if not loss.isfinite().all():
        raise ValueError("model: the loss is not finite; load the model in float32 or bfloat16")
    return torch.stack(ranked), loss


def _require(value, name):
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _shards(settings):
    return math.ceil(settings["count"] / settings["shard"])


def _file(folder, i):
    return folder / f"lists-{i:05}.safetensors"


def _stacked(lists, ranks):
    """(ranks [E, J], losses [E, J]) of lists that may be shorter."""
    ranked = torch.full((len(lists), ranks), PADDING)
    loss = torch.full((len(lists), ranks), torch.nan)
    for i, pair in enumerate(lists):
        ranked[i, : len(pair[0])], loss[i, : len(pair[1])] = pair
    return ranked, loss


def _write(path, lists, settings):
    """Write a shard atomically."""
    from safetensors.torch import save_file

    unfinished = path.with_name(f".{path.name}.unfinished")
    save_file(lists._asdict(), unfinished, {"settings": json.dumps(settings)})
    unfinished.chmod(0o644)
    os.replace(unfinished, path)


@contextlib.contextmanager
def _opened(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no whole file of ranked lists ({error!r}); delete it and search again") from None


def _settings(path):
    with _opened(path) as file:
        settings = dict(json.loads(file.metadata()["settings"]))
        if settings["schema"] != SCHEMA:
            raise ValueError(f"schema {settings['schema']}, not {SCHEMA}")
        return settings


def _read(path, settings):
    """Lists of a shard, which must be of the same search."""
    _same(path, _settings(path), settings)
    with _opened(path) as file:
        return Lists(*(file.get_tensor(name) for name in Lists._fields))


def _same(path, there, here):
    """Raise if settings of a file differ from those expected."""
    differing = ", ".join(name for name, value in here.items() if there.get(name) != value)
    if differing:
        raise ValueError(
            f"{path}: from another search, which differs in {differing} (it has {there}); choose an empty folder"
        )


def _digest(content):
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[:16]


def _model_digest(model):
    """Of names, shapes and bits of the weights; sums of integers do not depend on their order."""
    facts = []
    for name, tensor in model.state_dict().items():
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        facts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(bits.sum())}")
    return _digest("\n".join(facts))


def _dataset_digest(processor, dataset):
    """Of the length and eight examples: their pixels, and tokens as the processor makes them."""
    import numpy as np

    facts = [str(len(dataset))]
    for number in sorted({len(dataset) * i // 8 for i in range(8)}):
        example: Example = dataset[number]
        inputs = encode(processor, [example])
        facts += [_digest(np.asarray(example.image).tobytes()), str(inputs["input_ids"].tolist())]
    return _digest("\n".join(facts))
