"""Pictures, drawn by matplotlib without a display."""

import io
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

BACKGROUND, INK, FAINT, LINE = "#15181d", "#e8eaed", "#9aa3ad", "#3a4048"
ACCENT, RIGHT, WRONG = "#4cc9f0", "#2ddc8f", "#ff5c72"
WIDTH, HEIGHT, DPI = 12.0, 5.75, 100  # inches, inches, pixels per inch
MARGIN, GAP, SQUARE, TOP = 0.15, 0.22, 3.72, 0.42  # inches; SQUARE: side of a picture, TOP: space above it
MARKS = {True: (RIGHT, "\N{CHECK MARK}"), False: (WRONG, "\N{BALLOT X}"), None: (INK, "")}
DIM = 0.38  # brightness of removed tokens
TOKEN = 32  # side of a token in the enlarged picture, pixels


def answers(pixels: np.ndarray, record: dict[str, Any], form: str = "png") -> bytes:
    """The demo's picture: the model's input, the kept tokens, tokens of each layer, both answers.

    Parameters
    ----------
    pixels : ndarray [side, side, 3], uint8
    record : dict
        As `pruneops.demo.run.run` returns it.
    form : str
        File format, as an extension without the dot.

    Returns
    -------
    bytes
        The file.
    """
    tokens, kept, method = record["visual_tokens"], record["kept"], record["method"]["method"]
    row = round(tokens**0.5)
    inside = np.isin(np.arange(tokens), kept["tokens"]).reshape(row, row)
    enlarged = Image.fromarray(pixels).resize((row * TOKEN, row * TOKEN), Image.Resampling.BICUBIC)
    light = np.asarray(enlarged) / 255
    grey = DIM * (light + 2 * light.mean(-1, keepdims=True)) / 3
    bright = inside.repeat(TOKEN, 0).repeat(TOKEN, 1)[..., None]

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=BACKGROUND)
    axes = _picture(figure, 0, f"all {tokens} visual tokens", light)
    for line in range(1, row):
        axes.axhline(line * TOKEN - 0.5, color=BACKGROUND, lw=0.6, alpha=0.4)
        axes.axvline(line * TOKEN - 0.5, color=BACKGROUND, lw=0.6, alpha=0.4)
    where = f", from layer {kept['from_layer']} on" if kept["from_layer"] else " tokens"
    title = f"kept: {len(kept['tokens'])} of {tokens}{where} ({method})"
    axes = _picture(figure, 1, title, np.where(bright, light, grey))
    axes.add_collection(
        LineCollection(list(_outline(inside)), colors=ACCENT, lw=1.2, capstyle="projecting", clip_on=False)
    )
    _layers(figure, record["questions"], tokens)
    _answers(figure, record)
    _cache(figure, record)
    return _file(figure, form)


def _axes(figure, left, top, width, height):
    """Axes by inches from the left and from the top."""
    return figure.add_axes((left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT))


def _text(figure, left, top, text, **style):
    """Text, vertically centred `top` inches below the top."""
    style = {"color": INK, "fontsize": 11, "va": "center"} | style
    figure.text(left / WIDTH, 1 - top / HEIGHT, text, **style)


def _left(column):
    return MARGIN + column * (SQUARE + GAP)


def _picture(figure, column, title, image):
    axes = _axes(figure, _left(column), TOP, SQUARE, SQUARE)
    axes.imshow(image, interpolation="antialiased")
    axes.set_axis_off()
    _text(figure, _left(column), TOP / 2, title, fontsize=12.5)
    return axes


def _outline(inside):
    """Line segments [.., 2, 2] between kept and removed tokens, in pixels of the picture."""
    padded = np.pad(inside, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # (line, column)
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])  # (row, line)
    lines = [[(x, y), (x + 1, y)] for y, x in across] + [[(x, y), (x, y + 1)] for y, x in down]
    return TOKEN * np.array(lines, dtype=float).reshape(-1, 2, 2) - 0.5


def _layers(figure, questions, tokens):
    """Bars of the visual tokens of every layer: unpruned an outline, pruned filled; means over the questions."""
    counts = np.array([asked["pruned"]["visual_tokens"] for asked in questions])
    pruned, note = counts.mean(0), "" if (counts == counts[0]).all() else " (mean)"
    left = _left(2) + 0.3
    axes = _axes(figure, left, TOP + 0.3, WIDTH - MARGIN - left, SQUARE - 0.3)
    places = range(len(pruned))
    axes.barh(places, tokens, 0.66, facecolor="none", edgecolor=FAINT, lw=1)
    axes.barh(places, pruned, 0.66, color=ACCENT)
    for place, count in zip(places, pruned):
        beyond = count < 0.85 * tokens
        label = f"{count:.0f}" if count == round(count) else f"{count:.1f}"
        x, side = (count + 0.02 * tokens, "left") if beyond else (count - 0.02 * tokens, "right")
        axes.text(x, place, label, color=INK if beyond else BACKGROUND, fontsize=11, va="center", ha=side)
    axes.set(xlim=(0, 1.005 * tokens), ylim=(len(pruned) - 0.5, -0.5), facecolor="none", xticks=[], yticks=places)
    axes.tick_params(colors=FAINT, labelsize=11, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _text(figure, _left(2), TOP / 2, "visual tokens in each decoder layer", fontsize=12.5)
    _text(figure, left, TOP + 0.1, f"outline: unpruned    filled: pruned{note}", fontsize=10.5, color=FAINT)


def _answers(figure, record):
    """A table below the two pictures."""
    columns = [_left(0), _left(0) + 3.55, _left(0) + 4.75, _left(0) + 6.3]
    top, step = TOP + SQUARE + 0.2, 0.225
    heads = "question", "truth", "unpruned", "pruned"
    for x, head in zip(columns, heads):
        _text(figure, x, top, head, color=FAINT, fontsize=10.5)
    for i, asked in enumerate(record["questions"], 1):
        cells = [(_shortened(asked["question"], 42), INK), (asked["truth"] or "unknown", FAINT)]
        for way in ("unpruned", "pruned"):
            colour, mark = MARKS[asked[way]["right"]]
            cells.append((f"{_shortened(asked[way]['answer'] or '(nothing)', 18)} {mark}", colour))
        for x, (text, colour) in zip(columns, cells):
            _text(figure, x, top + i * step, text, color=colour)


def _shortened(text, limit):
    return text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _cache(figure, record):
    """KV cache and, if the truth is known, right answers, below the bars."""
    questions, kept = record["questions"], record["kept"]
    unpruned, pruned = (np.mean([asked[way]["kv_bytes"] for asked in questions]) for way in ("unpruned", "pruned"))
    lines = [
        (
            f"{unpruned / pruned:.1f}x",
            f"smaller KV cache: {unpruned / 1024:.0f} \N{RIGHTWARDS ARROW} {pruned / 1024:.0f} KiB",
        )
    ]
    known = [asked for asked in questions if asked["truth"] is not None]
    if known:
        right = [sum(asked[way]["right"] for asked in known) for way in ("unpruned", "pruned")]
        lines.append((f"{right[1]} of {len(known)}", f"answers right; unpruned: {right[0]}"))
    if kept["questions"] < len(questions):
        lines.append(("", "tokens shown: those kept for the first question"))
    for i, (number, label) in enumerate(lines):
        top = TOP + SQUARE + 0.32 + 0.42 * i
        _text(figure, _left(2), top, number, fontsize=16, color=ACCENT)
        _text(figure, _left(2) + (0.95 if number else 0), top, label, fontsize=11, color=FAINT)


def _file(figure, form):
    """The file; a PNG drops the two lowest bits of each colour, invisibly, which halves its size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form)
    if form != "png":
        return buffer.getvalue()
    coarse = Image.open(buffer).convert("RGB").point([min(255, (level + 2) // 4 * 4) for level in range(256)] * 3)
    small = io.BytesIO()
    coarse.save(small, "png", optimize=True)
    return small.getvalue()
