"""Pictures, drawn by matplotlib without a display."""

import io

import numpy as np
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from PIL import Image

BACKGROUND, INK, FAINT = "#15181d", "#e8eaed", "#9aa3ad"
ORDER = ListedColormap(colormaps["plasma"](np.linspace(0.97, 0.22, 256)))  # first bright, last dark
WIDTH, HEIGHT, DPI = 12.0, 6.4, 100  # inches, inches, pixels per inch
MARGIN, GAP = 0.012, 0.016  # of the width
COLUMN = (1 - 2 * MARGIN - 2 * GAP) / 3
SQUARE = WIDTH / HEIGHT  # height of a square of width 1, in figure coordinates


def selection(tiles, tiling, order, radii, caption, form="png"):
    """Photograph in tiles, kept tokens, order of choice: crops above, thumbnail below.

    Parameters
    ----------
    tiles : ndarray [5, crop, crop, 3], uint8
        Thumbnail, then the crops in reading order.
    tiling : pruneops.demo.photo.Tiling
    order : sequence of int
        Kept tokens in order of choice.
    radii : sequence of float
        Distance of each to those before it; values that are not finite are left out.
    caption : str
        Short line about the tokens.
    form : str
        File format by its extension.

    Returns
    -------
    bytes
        The file.
    """
    rank = np.full(tiling.tokens, -1)
    rank[order] = np.arange(len(order))
    rank = rank.reshape(len(tiles), tiling.side, tiling.side)
    count = (rank >= 0).sum((1, 2))  # kept tokens of each tile
    kept = _to_pixels(rank >= 0, tiling.patch)[..., None]
    colour = ORDER(_to_pixels(rank, tiling.patch) / max(1, len(order) - 1))[..., :3]
    light = tiles / 255.0
    dim = 0.22 * light
    grey = 0.08 + 0.30 * light.mean(-1, keepdims=True)

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=BACKGROUND)
    per_tile = f"{tiling.side} x {tiling.side} tokens each"
    whole = _column(figure, tiling, 0, "photograph in tiles", light)
    for line in range(1, tiling.side):
        whole.axhline(line * tiling.patch - 0.5, color=BACKGROUND, lw=0.5, alpha=0.5)
        whole.axvline(line * tiling.patch - 0.5, color=BACKGROUND, lw=0.5, alpha=0.5)
    _say(figure, 0, f"4 crops + thumbnail\n{per_tile}\n\n{caption}")

    _column(figure, tiling, 1, f"kept: {len(order)} of {tiling.tokens} tokens", np.where(kept, light, dim))
    crops = f"crops\n{count[1:].sum()} of {4 * tiling.side**2}"
    _say(figure, 1, f"{crops}\n\nthumbnail\n{count[0]} of {tiling.side**2}")

    thumbnail = _column(figure, tiling, 2, "order of choice", np.where(kept, colour, grey))
    _ring(thumbnail, tiling, order[0])
    _curve(figure, radii)
    return _file(figure, form)


def _to_pixels(tokens, patch):
    """[tiles, side, side] -> [tiles, crop, crop]."""
    return tokens.repeat(patch, axis=-2).repeat(patch, axis=-1)


def _left(column):
    return MARGIN + column * (COLUMN + GAP)


def _column(figure, tiling, column, title, images):
    """Crops above, thumbnail below; the thumbnail's axes."""
    tall = COLUMN * SQUARE
    crops = figure.add_axes((_left(column), 0.93 - tall, COLUMN, tall))
    rows = (images[1:3], images[3:5])
    crops.imshow(np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0), interpolation="antialiased")
    crops.axhline(tiling.crop - 0.5, color=BACKGROUND, lw=2)
    crops.axvline(tiling.crop - 0.5, color=BACKGROUND, lw=2)
    crops.set_title(title, color=INK, fontsize=13, pad=7, loc="left")
    crops.set_axis_off()
    thumbnail = figure.add_axes((_left(column), MARGIN * SQUARE, COLUMN / 2, tall / 2))
    thumbnail.imshow(images[0], interpolation="antialiased")
    thumbnail.set_axis_off()
    return thumbnail


def _say(figure, column, words):
    """Words beside the thumbnail of a column."""
    x, y = _left(column) + COLUMN / 2 + 0.014, (MARGIN + COLUMN / 4) * SQUARE
    figure.text(x, y, words, color=FAINT, fontsize=11, va="center", linespacing=1.4)


def _ring(axes, tiling, token):
    """A ring around the pivot, the first token."""
    _, row, column = tiling.place(token)
    centre = ((column + 0.5) * tiling.patch, (row + 0.5) * tiling.patch)
    axes.add_patch(Circle(centre, tiling.crop / 15, fill=False, color=INK, lw=1.8))


def _curve(figure, radii):
    """Distance of every token when chosen, in the colours of the order: the key to them."""
    left, width = _left(2) + COLUMN / 2 + 0.022, COLUMN / 2 - 0.026
    axes = figure.add_axes((left, 0.075, width, COLUMN / 2 * SQUARE - 0.125), facecolor="none")
    step, radius = np.arange(1, len(radii) + 1), np.asarray(radii, dtype=float)
    step, radius = step[np.isfinite(radius)], radius[np.isfinite(radius)]
    points = np.stack([step, radius], axis=1)[:, None]  # [k, 1, 2]
    segments = np.concatenate([points[:-1], points[1:]], axis=1)
    lines = LineCollection(segments, cmap=ORDER, lw=3, capstyle="round")
    lines.set_array(step[1:])
    lines.set_clim(1, max(2, len(radii)))
    axes.add_collection(lines)
    axes.set_xlim(1, max(2, len(radii)))
    axes.set_ylim(0, 1.08 * radius.max(initial=1e-6))
    axes.set_xticks(sorted({1, len(radii)}))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.set_title("distance when chosen", color=FAINT, fontsize=10.5, loc="left", pad=6)
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#3a4048")


def _file(figure, form):
    """The picture's bytes; a PNG loses its two lowest bits, which nobody sees, and half its size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form)
    if form != "png":
        return buffer.getvalue()
    coarse = Image.open(buffer).convert("RGB").point([min(255, (level + 2) // 4 * 4) for level in range(256)] * 3)
    small = io.BytesIO()
    coarse.save(small, "png", optimize=True)
    return small.getvalue()
