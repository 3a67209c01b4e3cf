"""Training of DyRate's rate classifier: end to end through the frozen decoder, with masks in place of removal.

In every step of the answer the attention of its token gives a distribution v_t; the classifier's rate, drawn by
straight-through Gumbel-Softmax, masks the least attended visual tokens in the layers from L on. The loss is the
answer's cross-entropy and the squared log ratio of what visual tokens cost to what they would cost at the wanted
budget, in expected FLOPs. Source: arXiv:2501.14204, section III-C; the paper names no term for the FLOPs.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods.base import IMAGE, INSTRUCTION, RESPONSE, SYSTEM
from ..networks import GROUPS, RateClassifier, expected_rate
from .data import Batch, Example, decoder_inputs, encode
from .loop import LoopConfig, Task

NAME = "pruneops_dyrate_training"
MAX_EXPONENT = 4.0  # bounds the gradient to a token that is dropped, though a later layer would attend to it
MASKS: ContextVar["Masks"] = ContextVar("pruneops_dyrate_masks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DyRateConfig(LoopConfig):
    """Settings of the rate classifier's training.

    Parameters
    ----------
    keeps : sequence of float
        Budgets to train for: shares of the visual tokens that the layers from `layer` on hold on average. Each step
        trains one of them, drawn at random.
    rates : int
        K
    layer : int
        L, at least 1; the attention of layer L - 1 decides.
    tau : float
        Temperature of the Gumbel-Softmax.
    flops : float
        Weight of the term that keeps the expected FLOPs at the budget's.

    Notes
    -----
    The paper: rates (k - 1) / K, layers as FastV's K = 3.
    """

    keeps: tuple[float, ...] = (0.5, 0.25, 0.1)
    rates: int = 32
    layer: int = 2
    tau: float = 1.0
    flops: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keeps or not all(isinstance(keep, float) and 0 < keep < 1 for keep in self.keeps):
            raise ValueError(f"config: keeps must be shares in (0, 1), got {self.keeps}")
        if self.tau <= 0:
            raise ValueError(f"config: tau must be above 0, got {self.tau}")
        if self.layer < 1 or self.rates < 2:
            raise ValueError(f"config: layer >= 1 and rates >= 2 are needed, got {self.layer} and {self.rates}")
        if min(self.keeps) < 1 / self.rates:
            raise ValueError(f"config: {self.rates} rates keep at least 1 / {self.rates}; {min(self.keeps)} is less")


class DyRateTask(Task):
    """The rate classifier, in front of a frozen model."""

    model: Any
    processor: Any
    network: RateClassifier

    def __init__(self, model: Any, processor: Any, config: DyRateConfig) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.hold(model=model.eval().requires_grad_(False), processor=processor)
        self.settings, decoder = config, model.get_decoder().config
        if config.layer >= decoder.num_hidden_layers:
            raise ValueError(
                f"config: layer must be below the decoder's {decoder.num_hidden_layers}, got {config.layer}"
            )
        self.network = RateClassifier(
            keeps=config.keeps, rates=config.rates, heads=decoder.num_attention_heads, layer=config.layer
        )
        with torch.no_grad():  # the budget's own rate is likeliest at first
            kept = 1 - torch.arange(config.rates) / config.rates
            for bias, keep in zip(self.network.bias, config.keeps):
                bias.copy_(-8 * (kept.log() - torch.tensor(keep).log()).square())

    def forward(self, examples: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = decoder_inputs(self.model, encode(self.processor, examples))
        budgets = range(len(self.settings.keeps))
        if self.training:
            budgets = [int(torch.randint(len(budgets), ()))]
        results = [self.budget_loss(batch, budget) for budget in budgets]
        extra = {name: torch.stack([each[name] for _, each in results]).mean() for name in results[0][1]}
        if not self.training:
            extra |= {f"kept {self.settings.keeps[b]:g}": r[1]["kept"] for b, r in zip(budgets, results)}
            extra.pop("kept")
        return torch.stack([loss for loss, _ in results]).mean(), extra

    def budget_loss(self, batch: Batch, budget: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss for one of the budgets."""
        logits, masks = masked_logits(self.model, batch, self.network, budget, self.draw)
        target = batch.labels[:, 1:]
        answer = F.cross_entropy(logits[target >= 0].float(), target[target >= 0])
        keep = self.settings.keeps[budget]
        spent = self.flops(masks.expected, masks, batch)
        wanted = self.flops(keep * masks.tokens[:, None].expand_as(masks.kept), masks, batch)
        everything = self.flops(masks.tokens[:, None].expand_as(masks.kept), masks, batch)
        nothing = self.flops(torch.zeros_like(masks.kept), masks, batch)
        distance = ((spent - nothing).mean() / (wanted - nothing).mean()).log()
        share = (masks.kept * masks.counted).sum() / (masks.tokens[:, None] * masks.counted).sum()
        extra = {"answer": answer, "kept": share, "flops": spent.mean() / everything.mean()}
        return answer + self.settings.flops * distance.square(), {k: v.detach() for k, v in extra.items()}

    def draw(self, logits: Tensor) -> Tensor:
        """One-hot rates [B, K]: drawn in training, with the gradient of the soft ones; else the expected ones."""
        if self.training:
            return F.gumbel_softmax(logits, self.settings.tau, hard=True)
        return F.one_hot(expected_rate(logits), logits.shape[-1]).to(logits.dtype)

    def flops(self, kept: Tensor, masks: "Masks", batch: Batch) -> Tensor:
        """FLOPs [B] of the decoder for prompt and answer, given the visual tokens [B, T] kept in each step.

        Two for each parameter and token, four D for each pair of a query and a key; layers below L hold all tokens.
        """
        decoder = self.model.get_decoder()
        width, layers = decoder.config.hidden_size, len(decoder.layers)
        parameters = sum(p.numel() for p in decoder.layers[0].parameters())
        text, tokens, below = masks.text.float(), masks.tokens.float(), self.settings.layer

        def layer(visual):
            prompt = text + visual[:, 0]
            steps = (
                (text[:, None] + visual[:, :-1] + torch.arange(1, visual.shape[1], device=visual.device)) * 4 * width
            )
            steps = (steps + 2 * parameters) * masks.counted[:, 1:]
            return 2 * parameters * prompt + 2 * width * prompt.square() + steps.sum(1)

        return below * layer(tokens[:, None].expand_as(kept)) + (layers - below) * layer(kept)


class Masks:
    """The state of one pass: what each step of the answer keeps. Step 0 is the last token of the prompt.

    Attributes
    ----------
    kept, expected : Tensor [B, T]
        Visual tokens that remain after every step: of the drawn rates, and of the expected ones, which inference takes.
    counted : Tensor [B, T], bool
        Steps that are no padding.
    tokens, text : Tensor [B]
        Visual and text tokens of the prompt.
    """

    kept: Tensor
    expected: Tensor

    def __init__(self, batch: Batch, network: RateClassifier, budget: int, draw: Any) -> None:
        self.classify, self.draw = functools.partial(network, keep=budget), draw
        self.rates, self.layer = network.rates, network.layer
        self.valid, self.visual, length = batch.valid, batch.visual, batch.labels.shape[1]
        answers = batch.labels >= 0
        self.first = answers.byte().argmax(1) - 1  # the row that predicts the first token of the answer
        steps = torch.arange(int(answers.sum(1).max()), device=self.valid.device)
        self.counted = steps < answers.sum(1, keepdim=True)
        self.rows = (self.first[:, None] + steps).clamp(max=length - 1)  # [B, T]
        positions = torch.arange(length, device=self.valid.device)
        before = positions < self.visual.byte().argmax(1, keepdim=True)
        group = torch.where(self.visual, IMAGE, torch.where(before, SYSTEM, INSTRUCTION))
        self.group = torch.where(positions > self.first[:, None], RESPONSE, group)
        self.tokens = self.visual.sum(1)
        self.text = self.first + 1 - self.tokens
        self.causal = positions <= positions[:, None]
        self.mask: Any = None  # [B, S, S], from layer L on

    def decide(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Masks of the layers from L on, by queries and keys of layer L - 1."""
        with torch.no_grad():
            rows = self.rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            logits = query.gather(2, rows).float() @ key.float().transpose(2, 3) * scale  # [B, H, T, S]
            visible = self.valid[:, None] & (torch.arange(key.shape[2], device=key.device) <= self.rows[..., None])
            attention = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
            sums = F.one_hot(self.group, GROUPS).float()
            distribution = (attention @ sums[:, None]).transpose(1, 2).flatten(2)  # [B, T, 4 H]
            scores = attention.mean(1).masked_fill(~self.visual[:, None], -torch.inf)  # [B, T, S]
        counts = self.tokens[:, None] - self.tokens[:, None] * torch.arange(self.rates, device=key.device) // self.rates
        mask, masks, means = self.visual.float(), [], []
        for step in range(scores.shape[1]):
            alive = scores[:, step].masked_fill(mask.detach() == 0, -torch.inf)
            rank = alive.argsort(dim=-1, descending=True, stable=True).argsort(-1)
            logits = self.classify(distribution[:, step])
            stays = (rank[..., None] < counts[:, None]).float() @ self.draw(logits)[..., None]
            means.append((logits.softmax(-1) * counts).sum(-1))
            mask = mask * stays[..., 0]
            masks.append(mask)
        each = torch.stack(masks, 1)  # [B, T, S]
        self.kept, self.expected = each.sum(-1), torch.stack(means, 1).cummin(1).values
        step = (torch.arange(key.shape[2], device=key.device) - self.first[:, None] - 1).clamp(0, each.shape[1] - 1)
        of_row = each.gather(1, step[..., None].expand(-1, -1, each.shape[2]))  # a step's rate holds from the next on
        mask = torch.where(self.visual[:, None], of_row, 1.0)
        eye = torch.eye(mask.shape[1], device=mask.device)
        self.mask = torch.maximum(mask, eye) * (self.causal & (self.valid[:, None] | eye.bool()))


def masked_logits(model: Any, batch: Batch, network: RateClassifier, budget: int, draw: Any) -> tuple[Tensor, Masks]:
    """Logits [B, S - 1, vocabulary] of the next tokens, as pruned generation gives them, and the masks.

    Parameters
    ----------
    model : PreTrainedModel
    batch : Batch
    network : RateClassifier
    budget : int
        Index into its `keeps`.
    draw : callable
        Logits [B, K] to one-hot rates.
    """
    masks = Masks(batch, network, budget, draw)
    with _masked_attention(model.get_decoder(), masks):
        hidden = model.get_decoder()(
            inputs_embeds=batch.embeds, position_ids=batch.positions, attention_mask=batch.valid.long(), use_cache=False
        ).last_hidden_state
    return model.get_output_embeddings()(hidden[:, :-1]), masks


@contextlib.contextmanager
def _masked_attention(decoder: Any, masks: Masks) -> Generator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    modules = [layer.self_attn for layer in decoder.layers]
    before, token = [module.config for module in modules], MASKS.set(masks)
    for module in modules:
        module.config = _Config(module.config)
    try:
        yield
    finally:
        MASKS.reset(token)
        for module, config in zip(modules, before):
            module.config = config


class _Config:
    """An attention module's configuration with our attention function; the decoder still makes its usual masks."""

    _attn_implementation = NAME

    def __init__(self, config):
        self._config = config

    def __getattr__(self, name):
        return getattr(self._config, name)


def _attend(module, query, key, value, attention_mask, scaling=None, **_):
    masks, groups = MASKS.get(), query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if module.layer_idx == masks.layer - 1:
        masks.decide(query, key, scale)
    if module.layer_idx < masks.layer:
        eye = torch.eye(key.shape[2], dtype=torch.bool, device=key.device)
        mask = (masks.causal & masks.valid[:, None] | eye).float()
    else:
        mask = masks.mask
    logits = query.float() @ key.float().transpose(2, 3) * scale
    largest = logits.detach().masked_fill(mask[:, None] == 0, -torch.inf).amax(-1, keepdim=True)
    weight = (logits - largest).clamp(max=MAX_EXPONENT).exp() * mask[:, None]  # what is masked may exceed what is not
    weight = weight / weight.sum(-1, keepdim=True)
    return (weight.to(value.dtype) @ value).transpose(1, 2).contiguous(), None
