"""Training of DTR's token-ranking model on ranked lists that `search` found. Source: DTR, section 3.3."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..adapters.transformers.models import UnsupportedError
from ..methods.dtr import dtr_ranked
from ..networks import RankingModel
from .data import Example, decoder_inputs, encode
from .loop import LoopConfig, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingConfig(LoopConfig):
    """Settings of the search and of the ranking model.

    Parameters
    ----------
    ranks : int
        J, at most 64.
    examples : int
        How many of the data are searched, from the first; 0 for all.
    rows, shard : int
        Of the search: candidates of a forward pass, examples of a file.
    two_classes : bool
        The relaxation: ranked or not, instead of J + 1 classes.
    base_layers, cross_layers, mlp_layers : int
        B, C and M.
    heads : int
        Of the cross-attention layers.
    train_base : bool
        Whether the B layers, which start as the decoder's first, are trained too.
    min_drop : float
        A list ends with the last token that lowers the loss by at least as much; its first token always counts. What
        follows is as good as random, where the answer is certain already.

    Notes
    -----
    The paper: J 32, B 10, C 2, M 2, 203,507 examples, whole lists.
    """

    ranks: int = 32
    examples: int = 0
    rows: int = 64
    shard: int = 64
    two_classes: bool = False
    base_layers: int = 10
    cross_layers: int = 2
    mlp_layers: int = 2
    heads: int = 8
    train_base: bool = True
    min_drop: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.ranks <= 64:
            raise ValueError(f"config: ranks must be 1 to 64, got {self.ranks}")


class Ranked(Dataset[tuple[Example, Tensor]]):
    """Examples with their ranked lists [J]: those of the data that have been searched.

    Parameters
    ----------
    dataset : Dataset of Example
    lists : dict of int to Tensor [J]
        Ranks among the visual tokens, -1 where the image has fewer.
    """

    def __init__(self, dataset: Dataset[Example], lists: dict[int, Tensor]) -> None:
        self.dataset, self.lists, self.numbers = dataset, lists, sorted(lists)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Example, Tensor]:
        number = self.numbers[index]
        return self.dataset[number], self.lists[number]


class RankingTask(Task):
    """The ranking model, with the paper's weighted cross-entropy."""

    model: Any
    processor: Any
    network: RankingModel

    def __init__(self, model: Any, processor: Any, config: RankingConfig) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.hold(model=model.eval().requires_grad_(False), processor=processor)
        self.settings = config
        self.network = from_decoder(model.get_decoder(), config)
        self.network.layers.requires_grad_(config.train_base)

    def forward(self, examples: Sequence[tuple[Example, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = decoder_inputs(self.model, encode(self.processor, [example for example, _ in examples]))
        counts = batch.visual.sum(1)
        order = (~batch.visual).byte().argsort(dim=1, stable=True)[:, : int(counts.max())]  # positions [B, n]
        there = torch.arange(order.shape[1], device=order.device) < counts[:, None]
        text = batch.valid & ~batch.visual & (batch.labels < 0)  # the answer is not known
        logits = self.network(batch.embeds.float(), order, text, batch.rotary)
        lists = torch.stack([ranked for _, ranked in examples])[:, : self.settings.ranks].to(order.device)
        classes = rank_classes(lists, there)
        loss = ranking_loss(logits, classes, there, lists.shape[1])
        seen = logits.detach().float().masked_fill(~there[..., None], torch.nan)
        chosen = dtr_ranked(seen, min(lists.shape[1], seen.shape[1]))
        ranked = classes < lists.shape[1]
        hit = (ranked.gather(1, chosen).sum(1) / ranked.sum(1)).mean()
        first = (chosen[:, 0] == lists[:, 0]).float().mean()
        return loss, {"recall": hit, "first": first}


def without_tail(ranked: Tensor, loss: Tensor, min_drop: float) -> Tensor:
    """Ranked lists [E, J] with -1 after the last token that lowers the loss [E, J] by at least `min_drop`, above 0."""
    if not min_drop:
        return ranked
    drops = torch.nn.functional.pad(loss[:, :-1] - loss[:, 1:] >= min_drop, (1, 0), value=True)
    counts = drops.flip(1).byte().cummax(1).values.flip(1).bool()  # a useful token follows, or it is one
    return ranked.where(counts, -1)


def rank_classes(lists: Tensor, there: Tensor) -> Tensor:
    """Class [B, n] of every token: its rank 0 .. J - 1, or J.

    Parameters
    ----------
    lists : Tensor [B, J], int64
        -1 for no token.
    there : Tensor [B, n], bool
        Tokens that are no padding.
    """
    rows, ranks = lists.shape
    classes = torch.full((rows, there.shape[1] + 1), ranks, device=there.device)
    column = torch.where(lists < 0, there.shape[1], lists.long())
    classes.scatter_(1, column, torch.arange(ranks, device=there.device).expand(rows, -1))
    return classes[:, :-1]


def ranking_loss(logits: Tensor, classes: Tensor, there: Tensor, ranks: int) -> Tensor:
    """Weighted cross-entropy, Eq. 4: ranked tokens weigh (N - J) / J, the rest 1, in the mean over tokens.

    Parameters
    ----------
    logits : Tensor [B, n, J + 1] or [B, n, 2]
    classes : Tensor [B, n]
        From `rank_classes`.
    there : Tensor [B, n], bool
    ranks : int
        J, the class of tokens without a rank.
    """
    counts = there.sum(1, keepdim=True)
    unranked = classes == ranks
    ranked = (~unranked & there).sum(1, keepdim=True).clamp(min=1)
    weight = torch.where(unranked, 1.0, (counts - ranked) / ranked) * there / counts
    label = classes if logits.shape[-1] == ranks + 1 else unranked.long()
    loss = F.cross_entropy(logits.flatten(0, 1).float(), label.flatten(), reduction="none")
    return (loss * weight.flatten()).sum() / len(classes)


def from_decoder(decoder: Any, config: RankingConfig) -> RankingModel:
    """A ranking model whose first layers are copies of a decoder's.

    Raises
    ------
    UnsupportedError
        If those layers have parts that a Llama's or Qwen2's have not.
    """
    width = decoder.config.hidden_size
    fixed: dict[str, Any] = dict(
        width=width, classes=2 if config.two_classes else config.ranks + 1, cross=config.cross_layers,
        heads=config.heads, mlp=config.mlp_layers,
    )  # fmt: skip
    count = min(config.base_layers, len(decoder.layers))
    if not count:
        return RankingModel(**fixed)
    states = [
        {name.replace("self_attn.", "").replace("mlp.", ""): value for name, value in layer.state_dict().items()}
        for layer in decoder.layers[:count]
    ]
    attention, first = decoder.layers[0].self_attn, states[0]
    base = dict(
        layers=count, heads=first["q_proj.weight"].shape[0] // attention.head_dim,
        key_heads=first["k_proj.weight"].shape[0] // attention.head_dim, head_dim=attention.head_dim,
        hidden=first.get("gate_proj.weight", first["q_proj.weight"]).shape[0], bias="q_proj.bias" in first,
        eps=getattr(decoder.config, "rms_norm_eps", 1e-6),
    )  # fmt: skip
    network = RankingModel(base=base, **fixed)
    if first.keys() != network.layers[0].state_dict().keys() or decoder.config.hidden_act != "silu":
        raise UnsupportedError(
            f"pruneops.training: the decoder layers of a {decoder.config.model_type} are none of Llama's or Qwen2's, "
            "so they cannot be the ranking model's first; set base_layers to 0"
        )
    for layer, state in zip(network.layers, states):
        layer.load_state_dict({name: value.float() for name, value in state.items()})
    return network
