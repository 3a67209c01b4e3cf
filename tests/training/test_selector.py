"""The selector's losses: the mask in both forms, the penalty, the parts of the reconstruction."""

import math

import pytest
import torch
from PIL import Image

from pruneops.training.data import Example, JsonLines
from pruneops.training.selector import SelectorConfig, SelectorTask, image_features, target
from tests.contract import assert_same_bits

SMALL = dict(width=16, heads=2, layers=1, rebuild_layers=1, image_layers=1, upsample=1)


def task_of(loaded, **settings):
    return SelectorTask(*loaded, SelectorConfig(**SMALL, **settings))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.3, 0.6, 0.8, 1.0])
def test_penalty(llava, share):
    """Eq. 8: the share above p costs, so does the one missing below q, and nothing changes between them."""
    p, q, alpha = 0.6, 0.1, 0.5
    task, x = task_of(llava, p=p, q=q, alpha=alpha), torch.tensor(share, requires_grad=True)
    value = task.penalty(x)
    assert value.item() == pytest.approx(alpha * (max(share, p) - min(share, q)), abs=1e-6)
    (slope,) = torch.autograd.grad(value, x)
    if share > p:
        assert slope.item() == pytest.approx(alpha)
    elif share < q:
        assert slope.item() == pytest.approx(-alpha)
    elif q < share < p:
        assert slope.item() == 0


def gumbel(logits, seed):
    """Logits with the noise that `SelectorTask.mask` draws."""
    torch.manual_seed(seed)
    return logits - torch.empty_like(logits).exponential_().log()


def slopes(mask, logits):
    weight = torch.linspace(-1, 1, mask.numel()).view(mask.shape)
    return torch.autograd.grad((mask * weight).sum(), logits)[0]


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_straight_through_mask(llava, tau, noise):
    """0 or 1, the likelier class under noise, with the gradient of the softmax at a temperature."""
    task = task_of(llava, tau=(9.0, tau), noise=noise).train()
    logits = torch.randn(3, 40, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    noisy = gumbel(logits, 7) if noise else logits
    torch.manual_seed(7)
    mask, share = task.mask(logits)
    kept = noisy[..., 1] > noisy[..., 0]
    torch.testing.assert_close(mask.detach(), kept.float())
    assert share.item() == pytest.approx(kept.float().mean().item())
    soft = torch.sigmoid((noisy[..., 1] - noisy[..., 0]) / tau)
    torch.testing.assert_close(slopes(mask, logits), slopes(soft, logits))


def test_noise_is_gumbels(llava):
    """A token of log-odds z is kept with probability sigmoid(z)."""
    task = task_of(llava).train()
    odds = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0])
    torch.manual_seed(0)
    mask, _ = task.mask(torch.stack([torch.zeros(5), odds], -1).expand(20000, 5, 2))
    torch.testing.assert_close(mask.mean(0), odds.sigmoid(), rtol=0, atol=0.015)


def test_annealed_mask(llava):
    """Soft, at a temperature that falls geometrically from tau[0] to tau[1]."""
    task = task_of(llava, form="annealed", tau=(4.0, 0.25)).train()
    logits = torch.randn(2, 10, 2, generator=torch.Generator().manual_seed(0))
    noisy = gumbel(logits, 7)
    for progress, tau in ((0.0, 4.0), (0.25, 2.0), (0.5, 1.0), (0.75, 0.5), (1.0, 0.25)):
        task.progress = progress
        torch.manual_seed(7)
        mask, share = task.mask(logits)
        expected = torch.sigmoid((noisy[..., 1] - noisy[..., 0]) / tau)
        torch.testing.assert_close(mask, expected)
        torch.testing.assert_close(share, expected.mean())


@pytest.mark.parametrize("form", ["straight-through", "annealed"])
def test_mask_in_evaluation(llava, form):
    task = task_of(llava, form=form, tau=(4.0, 0.25)).eval()
    logits = torch.randn(2, 10, 2, generator=torch.Generator().manual_seed(0))
    mask, share = task.mask(logits)
    assert mask.equal(logits.argmax(-1).float())
    assert share == mask.mean()


def test_loss(loaded, examples):
    """The mean over images of both distances and the penalty, from a mask that is known; other grids, other groups."""
    task = task_of(loaded, alpha=0.5, p=0.2).eval()
    task.prepare(examples)
    with torch.no_grad():
        task.dropped.normal_()
        loss, extra = task(examples)
        total, parts = 0.0, torch.zeros(3)
        for example in examples:
            (tokens,), (grid,) = image_features(*loaded, [example])
            x = (tokens - task.mean) / task.scale
            keep = task.network(tokens[None])[0].argmax(-1) == 1
            rebuilt = task.rebuild(torch.where(keep[:, None], x, task.dropped)[None])[0]
            error = (rebuilt - x).square().mean().sqrt()
            painted = task.paint(rebuilt[None], grid)[0]
            image = (painted - target([example.image], grid, 1, "cpu")[0]).square().mean().sqrt()
            share = keep.float().mean()
            parts += torch.stack([error, image, share])
            total += error + image
        sizes = {tuple(grid) for grid in image_features(*loaded, examples)[1]}
        # the penalty acts on the share of a group of equal grids
        assert set(extra) == {"features", "image", "kept"}
        torch.testing.assert_close(torch.stack(list(extra.values())), parts / 4, rtol=1e-4, atol=1e-5)
        penalty = loss - total / 4
        low, high = (task.penalty(torch.tensor(share)) for share in (0.15, 1.0))
        assert low - 1e-4 <= penalty <= high + 1e-4
        assert len(sizes) == (1 if loaded[0].config.model_type == "llava" else 4)


def test_gradients_reach_every_part(loaded, examples):
    task = task_of(loaded).train()
    task.prepare(examples)
    torch.manual_seed(0)
    task(examples)[0].backward()
    for part in (task.network, task.rebuild, task.paint):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
        assert sum(p.grad.abs().sum() for p in part.parameters()) > 0
    assert task.dropped.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in loaded[0].parameters())
    assert not any(name.startswith("model") for name in task.state_dict())


def test_spread_of_the_features(llava, data):
    """Measured over the examples: what the losses see has mean 0 and variance 1."""
    dataset, task = JsonLines(data), task_of(llava)
    task.prepare(dataset)
    tokens = torch.cat([image_features(*llava, [dataset[i]])[0][0] for i in range(len(dataset))])
    x = (tokens - task.mean) / task.scale
    torch.testing.assert_close(x.mean(0), torch.zeros(32), rtol=0, atol=1e-4)
    assert x.square().mean().item() == pytest.approx(1, rel=1e-4)


def test_features_of_images(loaded, examples):
    """In a batch as alone; the grid has the image's shape."""
    model, processor = loaded
    features, grids = image_features(model, processor, examples)
    for example, tokens, grid in zip(examples, features, grids):
        (single,), (own,) = image_features(model, processor, [example])
        torch.testing.assert_close(tokens, single, rtol=1e-4, atol=1e-4)
        assert own == grid and math.prod(grid) == len(tokens)
        width, height = example.image.size
        assert grid == ((4, 4) if model.config.model_type == "llava" else (height // 8, width // 8))


def test_target():
    """The image at the size that is painted, with 0..255 as -1..1."""
    image = Image.new("RGB", (4, 2), (0, 255, 51))
    image.paste((255, 255, 255), (2, 0, 4, 2))
    pixels = target([image], (1, 2), 1, "cpu")
    assert pixels.shape == (1, 3, 2, 4)
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
    assert_same_bits(pixels[0, :, :, 2:], torch.ones(3, 2, 2))


def test_image_part_can_be_left_out(llava, examples):
    task = SelectorTask(*llava, SelectorConfig(**SMALL | {"upsample": 0})).eval()
    _, extra = task([Example(*example) for example in examples])
    assert extra["image"] == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(form="soft"), "form must be one of"),
        (dict(p=0.1, q=0.2), "0 <= q <= p <= 1 is needed"),
        (dict(p=1.1), "0 <= q <= p <= 1 is needed"),
        (dict(tau=(1.0,)), "tau must be two"),
        (dict(tau=(1.0, 0.0)), "tau must be two"),
        (dict(tau=("a", "b")), "tau must be two"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"config: {message}"):
        SelectorConfig(**settings)
