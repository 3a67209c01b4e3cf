"""Training of the embedded model: first its tower on dense labels, then the rest of it on questions.

Stage "tower": crowded scenes; every visual token predicts the digit and colour that cover it and a drawing of that
digit, and [CLS] predicts all digits and colours. Stage "questions": the tower is frozen, and the decoder answers all
questions about a scene in one sequence, in which each question sees the image and itself; a random part of the visual
tokens is left out, digits' tokens more or less often, so that none of them is needed and their share carries no
information. Attention of the tower starts at the tokens' neighbours, from a 2-D sin-cos table.
"""

import csv
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pruneops.demo import model as embedded
from pruneops.demo import scenes

DIGITS, COLOURS, DRAWING = 10, len(scenes.NAMES), 8
TOKENS = scenes.ROW**2
PACK = 120  # text tokens of a scene
BATCH = 8  # scenes per step: on a CPU many small steps train faster than few large ones
STAGES = {"tower": 5000, "questions": 2200}  # steps
MUON, ADAM = 0.02, 3e-3  # learning rates of matrices within layers, of everything else
RISE, FALL = 100, 0.5  # steps of warm-up; share of a stage in which the learning rate falls to 0
SAVE = 60.0  # seconds between checkpoints


def train(folder, *, steps=None, seed=0, device="cpu", workers=1, restart=False):
    """Train, resuming the last run in this folder.

    Parameters
    ----------
    folder : Path
        For checkpoint.pt, loss.csv, loss.png and, at the end, weights/.
    steps : dict of str to int, optional
        Steps of each stage.
    seed : int
        Of weights, scenes and random choices.
    device : str
    workers : int
        Processes that make scenes.
    restart : bool
        Forget the last run's checkpoint.

    Returns
    -------
    tuple of Path and float
        Folder of the weights; seconds of all steps, including earlier runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, steps or STAGES, seed, device, workers)
    if restart:
        run.checkpoint.unlink(missing_ok=True)
    run.resume()
    try:
        for stage in run.steps:
            run.stage(stage)
    except KeyboardInterrupt:
        if run.consistent:
            run.save()
        if run.checkpoint.exists():
            print(f"interrupted; the same command goes on from {run.checkpoint}")
        raise
    run.save()
    plot(folder / "loss.csv", folder / "loss.png")
    return export(run.model, folder / "weights"), run.seconds


class Run:
    """A training run: model, optimizers and progress."""

    def __init__(self, folder, steps, seed, device, workers):
        from transformers import LlavaForConditionalGeneration

        torch.manual_seed(seed)
        self.folder, self.steps, self.seed, self.device, self.workers = folder, steps, seed, device, workers
        self.checkpoint, self.done, self.rows, self.seconds = folder / "checkpoint.pt", dict.fromkeys(steps, 0), [], 0.0
        self.consistent = True  # false within a step
        self.model = LlavaForConditionalGeneration(embedded.configuration())
        self.tower = self.model.model.vision_tower
        self.heads = Heads(self.model.config.vision_config.hidden_size)
        attend_to_neighbours(self.tower)
        self.model.to(device), self.heads.to(device)
        rest = [p for name, p in self.model.named_parameters() if "vision_tower" not in name]
        self.optimizers = {
            "tower": optimizers([*self.tower.parameters(), *self.heads.parameters()]),
            "questions": optimizers(rest),
        }

    def stage(self, stage):
        """The steps of a stage that are left."""
        first, count = self.done[stage], self.steps[stage]
        tower = stage == "tower"
        data = Scenes(self.seed, first * BATCH, (count - first) * BATCH, tower)
        loader = DataLoader(data, BATCH, num_workers=self.workers if len(data) else 0)
        saved = last = time.monotonic()
        recent = None
        bar = tqdm(loader, stage, count, initial=first, unit=" steps", smoothing=0.02, disable=None)
        for pixels, *labels in bar:
            torch.manual_seed(hash((self.seed, stage == "tower", self.done[stage])) % 2**63)
            rate(self.optimizers[stage], self.done[stage], count)
            step = self.tower_loss if tower else self.questions_loss
            loss, right = step(pixels.to(self.device), *(label.to(self.device) for label in labels))
            gradients(self.optimizers[stage], loss)
            self.consistent = False
            for optimizer in self.optimizers[stage]:
                optimizer.step()
            self.done[stage] += 1
            self.consistent = True
            self.seconds, last = self.seconds + time.monotonic() - last, time.monotonic()
            now = loss.item(), right.item()
            recent = now if recent is None else [0.98 * old + 0.02 * new for old, new in zip(recent, now)]
            if self.done[stage] % 20 == 0 or self.done[stage] == count:
                bar.set_postfix_str(f"loss {recent[0]:.3f}, right {recent[1]:.1%}")
                self.rows.append([stage, self.done[stage], *(f"{value:.4f}" for value in recent), round(self.seconds)])
            if time.monotonic() - saved > SAVE:
                self.save()
                saved = time.monotonic()

    def tower_loss(self, pixels, digit, colour, drawing, _):
        seen = self.tower(embedded.normalised(pixels), output_hidden_states=True)
        return self.heads.loss(seen, digit, colour, drawing)

    def questions_loss(self, pixels, digit, colour, drawing, text):
        with torch.no_grad():
            seen = self.tower(embedded.normalised(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]
        share = 1.0 if torch.rand(()) < 0.15 else torch.empty(()).uniform_(0.04, 0.5).item()
        features = self.model.model.multi_modal_projector(seen)
        return answers_loss(self.model, features, kept_tokens(digit < DIGITS, share), text)

    def state(self):
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": {stage: [o.state_dict() for o in group] for stage, group in self.optimizers.items()},
            "progress": [self.done, self.rows, self.seconds, self.seed],
        }

    def save(self):
        """Write the checkpoint, atomically, and the loss table."""
        part = self.checkpoint.with_suffix(".part")
        torch.save(self.state(), part)
        os.replace(part, self.checkpoint)
        with open(self.folder / "loss.csv", "w", newline="") as file:
            csv.writer(file).writerows([["stage", "step", "loss", "right", "seconds"], *self.rows])

    def resume(self):
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.device)
        done, rows, seconds, seed = state["progress"]
        if seed != self.seed:
            raise SystemExit(f"{self.checkpoint} was trained with --seed {seed}; go on with it, or add --restart")
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for stage, group in self.optimizers.items():
            for optimizer, saved in zip(group, state["optimizers"][stage]):
                optimizer.load_state_dict(saved)
        self.done, self.rows, self.seconds = done, rows, seconds


class Scenes(Dataset):
    """Scenes of the training split, as tensors."""

    def __init__(self, seed, first, count, crowd):
        self.seed, self.first, self.count, self.crowd = seed, first, count, crowd

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        number += self.first
        scene = scenes.scene("train", self.seed, number, self.crowd)
        owner = scene.owner.ravel()
        digit = np.array([*(o.digit for o in scene.objects), DIGITS])[owner]
        colour = np.array([*(scenes.NAMES.index(o.colour) for o in scene.objects), COLOURS])[owner]
        drawing = np.concatenate([reduced(scene.glyphs), np.zeros((1, DRAWING**2), np.float32)])[owner]
        text = torch.zeros(0) if self.crowd else packed(scene, np.random.default_rng([self.seed, number, 7]))
        return *map(torch.from_numpy, (scene.pixels, digit, colour, drawing)), text


def reduced(glyphs):
    """[digits, DRAWING ** 2] of glyphs [digits, GLYPH, GLYPH]."""
    part = scenes.GLYPH // DRAWING
    return glyphs.reshape(-1, DRAWING, part, DRAWING, part).mean((2, 4)).reshape(-1, DRAWING**2)


def packed(scene, rng):
    """[4, PACK]: ids, labels (-100 but where an answer is next), number of the question, position."""
    asked = scenes.questions(scene.objects, rng)
    rows = np.zeros((4, PACK), np.int64)
    rows[1:3] = [[-100], [-1]]
    end = 0
    for number in rng.permutation(len(asked)):
        text = embedded.tokens(asked[number].text)
        answer = [*embedded.tokens(asked[number].answer), embedded.EOS]
        start, end = end, end + len(text) + len(answer) - 1
        if end > PACK:
            break
        rows[0, start:end] = [*text, *answer[:-1]]
        rows[1, end - len(answer) : end] = answer
        rows[2, start:end] = number + 1
        rows[3, start:end] = range(1 + TOKENS, 1 + TOKENS + end - start)
    return torch.from_numpy(rows)


class Heads(nn.Module):
    """Output heads on the tower, for the stage "tower"."""

    def __init__(self, width):
        super().__init__()
        self.sizes = [DIGITS + 1, COLOURS + 1, DRAWING**2]
        self.token = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.sizes)))
        self.image = nn.Linear(width, DIGITS + COLOURS)

    def loss(self, seen, digit, colour, drawing):
        """(loss, share of the digits' tokens that name their digit)."""
        of_digit, of_colour, drawn = self.token(seen.hidden_states[-2][:, 1:]).split(self.sizes, -1)
        covered = digit < DIGITS
        weight = torch.where(covered, 1 / covered.sum(), 0.5 / (~covered).sum()).flatten()
        loss = 20 * F.mse_loss(drawn[covered], drawing[covered])
        for logits, label in ((of_digit, digit), (of_colour, colour)):
            loss = loss + weight @ F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
        there = [F.one_hot(label, n + 1).amax(1)[:, :n] for label, n in ((digit, DIGITS), (colour, COLOURS))]
        image = F.binary_cross_entropy_with_logits(self.image(seen.pooler_output), torch.cat(there, 1).float())
        return loss + image, (of_digit.argmax(-1) == digit)[covered].float().mean()


def attend_to_neighbours(tower, sharpness=1.5, size=0.5):
    """Initialise the tower with heads that attend to a token's neighbours.

    The first 32 numbers of a position are sines and cosines of its row and its column, in frequencies at which
    different rows are orthogonal; a query is rotated by the offset, so its product with that neighbour is largest.
    """
    count = 8
    frequency = math.pi * (torch.arange(count) + 0.5) / count

    def encoded(place):
        angle = place.flatten()[:, None] * frequency
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

    def turned(offset):
        turns = ([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]] for a in (frequency * offset).tolist())
        return torch.block_diag(*map(torch.tensor, turns))

    side, diagonal = [(0, 1), (0, -1), (1, 0), (-1, 0)], [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    far = [(0, 2), (0, -2), (2, 0), (-2, 0)]
    body = getattr(tower, "vision_model", tower)  # in a submodule in early versions
    row, column = torch.meshgrid(*2 * [torch.arange(scenes.ROW).float()], indexing="ij")
    with torch.no_grad():
        table = body.embeddings.position_embedding.weight.zero_()
        table[1:, : 4 * count] = size * torch.cat([encoded(row), encoded(column)], 1)
        for layer, offsets in zip(body.encoder.layers, (side, diagonal, side, far, diagonal)):
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight *= 0.3
            for i, (down, right) in enumerate(offsets):
                head = slice(attention.head_dim * i, attention.head_dim * i + 4 * count)
                attention.k_proj.weight[head, : 4 * count] += sharpness * torch.eye(4 * count)
                attention.q_proj.weight[head, : 4 * count] += sharpness * torch.block_diag(turned(down), turned(right))


def optimizers(parameters):
    """Muon for square and oblong matrices of layers, AdamW for tables, heads, biases and norms."""
    matrices = [p for p in parameters if p.dim() == 2 and p.shape[0] % 64 == p.shape[1] % 64 == 0]
    known = set(map(id, matrices))
    others = [p for p in parameters if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=MUON, weight_decay=0.02),
        torch.optim.AdamW(others, lr=ADAM, betas=(0.9, 0.98), weight_decay=0.02),
    ]


def rate(optimizers, step, steps):
    """Set the learning rates: linear warm-up, constant, linear decay to 0."""
    part = min(1, (step + 1) / RISE, (steps - step) / (FALL * steps))
    for optimizer, full in zip(optimizers, (MUON, ADAM)):
        for group in optimizer.param_groups:
            group["lr"] = part * full


def gradients(optimizers, loss):
    """Gradients of a loss, clipped for each optimizer."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)


def kept_tokens(covered, share):
    """Ascending random ranks [B, k] of visual tokens, in half of the scenes biased towards `covered` ones.

    So the share of digits' tokens among the kept ones says little about the number of digits.
    """
    k = max(8, round(share * TOKENS))
    bias = torch.rand(len(covered), 1) * (torch.rand(len(covered), 1) < 0.5)
    order = torch.rand(covered.shape) - bias * covered.cpu()
    return order.argsort(1)[:, :k].sort(1).values


def answered(model, features, keep, text):
    """(logits of every answer's tokens, their labels, flags [B, PACK] of where they are).

    All questions at once: by the mask every question sees <bos>, the image and itself.
    """
    ids, labels, question, position = text.unbind(1)
    keep = keep.to(ids.device)
    kept = features.gather(1, keep[..., None].expand(-1, -1, features.shape[-1]))
    embed = model.get_input_embeddings()
    inputs = torch.cat([embed(ids.new_full((len(ids), 1), embedded.BOS)), kept, embed(ids)], 1)
    positions = torch.cat([torch.zeros_like(position[:, :1]), keep + 1, position], 1)
    block = F.pad(question, (1 + keep.shape[1], 0))
    mask = (block[:, :, None] == block[:, None]) | (block[:, None] == 0)
    mask = (mask & torch.ones_like(mask[0]).tril()) | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    hidden = model.model.language_model(
        inputs_embeds=inputs, attention_mask=mask[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state[:, 1 + keep.shape[1] :]
    there = labels >= 0
    return model.lm_head(hidden[there]), labels[there], there


def answers_loss(model, features, keep, text):
    """(loss, share of the answers' tokens that are right)."""
    logits, labels, _ = answered(model, features, keep, text)
    return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()


def export(model, folder):
    """The model in float16 and its processor, as transformers saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    embedded.processor().save_pretrained(folder)
    model.half().save_pretrained(folder)
    model.float()
    (folder / "model.safetensors").chmod(0o644)
    return folder


def plot(table, picture):
    """The loss curve."""
    from matplotlib.figure import Figure

    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2), ("loss", "right")):
        for stage in dict.fromkeys(row["stage"] for row in rows):
            of_stage = [row for row in rows if row["stage"] == stage]
            axes.plot(
                [int(row["seconds"]) / 60 for row in of_stage], [float(row[column]) for row in of_stage], label=stage
            )
        axes.set(xlabel="minutes", ylabel={"loss": "loss", "right": "share right"}[column])
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=100)
