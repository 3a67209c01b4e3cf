"""Pictures, drawn by matplotlib without a display."""

import io

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from PIL import Image

BACKGROUND, INK, FAINT = "#15181d", "#e8eaed", "#9aa3ad"
ORDER = ListedColormap(colormaps["plasma"](np.linspace(0.97, 0.22, 256)))  # first bright, last dark
HEAT = ListedColormap(colormaps["magma"](np.linspace(0.12, 0.95, 256)))  # dark is new, bright is said already
PIVOTS = ("#4cc9f0", "#ff4d6d", "#ffd23f", "#2ddc8f", "#b48cff", "#ff8c42", "#c6f135", "#ff9ee5")
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
    kept = _to_pixels(rank >= 0, tiling.patch)[..., None]
    colour = ORDER(_to_pixels(rank, tiling.patch) / max(1, len(order) - 1))[..., :3]
    light = tiles / 255.0
    dim = 0.22 * light
    grey = 0.08 + 0.30 * light.mean(-1, keepdims=True)

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=BACKGROUND)
    _photograph(figure, tiling, light, caption)

    _column(figure, tiling, 1, f"kept: {len(order)} of {tiling.tokens} tokens", np.where(kept, light, dim))
    crops, thumbnail = _counts(rank >= 0, tiling)
    _say(figure, 1, f"crops\n{crops}\n\nthumbnail\n{thumbnail}")

    axes = _column(figure, tiling, 2, "order of choice", np.where(kept, colour, grey))
    _mark(axes, tiling, order[0], tiling.crop / 15, fill=False, color=INK, lw=1.8)
    _curve(figure, radii)
    return _file(figure, form)


def duplication(tiles, tiling, order, quotas, scores, note, caption, form="png"):
    """Photograph in tiles, duplication of every token, kept tokens in the colours of their pivots.

    Parameters
    ----------
    tiles, tiling, caption, form
        As in `selection`.
    order : sequence of int
        Kept tokens: the pivots, then what the first of them took, the second, ...
    quotas : sequence of int
        How many tokens each pivot took, of at most 8.
    scores : sequence of float [tokens]
        Duplication of every token: its greatest cosine with a pivot.
    note : str
        Short line about the pivots.

    Returns
    -------
    bytes
        The file.
    """
    count = len(quotas)
    pivots = order[:count]
    colours = np.array([to_rgb(colour) for colour in PIVOTS[:count]])
    taker = np.full(tiling.tokens, -1)
    taker[order] = np.concatenate([np.arange(count), np.repeat(np.arange(count), quotas)])
    taker = taker.reshape(len(tiles), tiling.side, tiling.side)
    kept = _to_pixels(taker >= 0, tiling.patch)[..., None]
    light = tiles / 255.0
    grey = light.mean(-1, keepdims=True)
    tinted = (0.6 + 0.4 * grey) * colours[_to_pixels(taker, tiling.patch)]

    scores = np.nan_to_num(np.reshape(scores, taker.shape))
    heat = ScalarMappable(Normalize(scores.min(), scores.max()), HEAT)

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=BACKGROUND)
    _photograph(figure, tiling, light, caption)

    pictures = HEAT(heat.norm(_to_pixels(scores, tiling.patch)))[..., :3], np.where(kept, tinted, 0.05 + 0.28 * grey)
    titles = "duplication score", f"kept: {len(order)} of {tiling.tokens} tokens"
    for column, title, images, rim in zip((1, 2), titles, pictures, (BACKGROUND, INK)):
        axes = _column(figure, tiling, column, title, images)
        for pivot, colour in zip(pivots, colours):
            _mark(axes, tiling, pivot, tiling.crop / 42, facecolor=colour, edgecolor=rim, lw=1.4)
    _heat_key(figure, heat, note)
    _pivot_key(figure, colours)
    crops, thumbnail = _counts(taker >= 0, tiling)
    words = f"pivots stay; each in\nturn takes the tokens\nleast like it\n\ncrops {crops}\nthumbnail {thumbnail}"
    _say(figure, 2, words, below=0.02)
    return _file(figure, form)


def _photograph(figure, tiling, light, caption):
    """The first column: the photograph, the grid of tokens on its thumbnail."""
    _, thumbnail = _column(figure, tiling, 0, "photograph in tiles", light)
    for line in range(1, tiling.side):
        thumbnail.axhline(line * tiling.patch - 0.5, color=BACKGROUND, lw=0.5, alpha=0.5)
        thumbnail.axvline(line * tiling.patch - 0.5, color=BACKGROUND, lw=0.5, alpha=0.5)
    _say(figure, 0, f"4 crops + thumbnail\n{tiling.side} x {tiling.side} tokens each\n\n{caption}")


def _to_pixels(tokens, patch):
    """[tiles, side, side] -> [tiles, crop, crop]."""
    return tokens.repeat(patch, axis=-2).repeat(patch, axis=-1)


def _left(column):
    return MARGIN + column * (COLUMN + GAP)


def _column(figure, tiling, column, title, images):
    """Crops above, thumbnail below; the axes of both."""
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
    return crops, thumbnail


def _counts(kept, tiling):
    """What is kept of the crops and of the thumbnail, from bool [tiles, side, side]."""
    thumbnail, *crops = kept.sum((1, 2))
    return f"{sum(crops)} of {4 * tiling.side**2}", f"{thumbnail} of {tiling.side**2}"


def _say(figure, column, words, below=0):
    """Words beside the thumbnail of a column."""
    x, y = _left(column) + COLUMN / 2 + 0.014, (MARGIN + COLUMN / 4) * SQUARE - below
    figure.text(x, y, words, color=FAINT, fontsize=11, va="center", linespacing=1.4)


def _mark(axes, tiling, token, radius, **style):
    """A circle around a token; `axes` are those of the crops and of the thumbnail."""
    tile, row, column = tiling.place(token)
    left, top = (0, 0) if tile == 0 else (tiling.crop * part for part in reversed(divmod(tile - 1, 2)))
    centre = (left + (column + 0.5) * tiling.patch, top + (row + 0.5) * tiling.patch)
    axes[tile == 0].add_patch(Circle(centre, radius, clip_on=False, zorder=3, **style))


def _heat_key(figure, heat, note):
    """Colour bar of the duplication score, and a note on the pivots."""
    axes = figure.add_axes((_left(1) + COLUMN / 2 + 0.014, 0.2, COLUMN / 2 - 0.03, 0.024))
    figure.colorbar(heat, cax=axes, orientation="horizontal", ticks=[heat.norm.vmin, heat.norm.vmax], format="%.2f")
    axes.set_title("greatest cosine\nwith a pivot", color=FAINT, fontsize=11, loc="left", pad=8, linespacing=1.4)
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    for label, side in zip(axes.get_xticklabels(), ("left", "right")):
        label.set_horizontalalignment(side)
    axes.set_xlabel(note, color=FAINT, fontsize=11, loc="left", labelpad=8, linespacing=1.4)


def _pivot_key(figure, colours):
    """The pivots' colours in their order, above the words of the last column."""
    for p, colour in enumerate(colours):
        x = _left(2) + COLUMN / 2 + 0.019 + 0.015 * p
        figure.add_artist(Line2D([x], [0.287], marker="o", markersize=6.5, color=colour, markeredgecolor=INK))


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
