"""Scenes with questions: coloured handwritten digits on crops of photographs, with clutter.

The digits come from scikit-learn, the photographs from scikit-image. Training and test share neither a digit nor a
photograph. A scene is a function of its split, seed and number.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

SIDE, PATCH = 128, 8  # pixels of a scene and of a visual token
ROW = SIDE // PATCH  # visual tokens in a row
COLOURS = {
    "red": (225, 35, 35),
    "green": (35, 190, 50),
    "blue": (45, 75, 240),
    "yellow": (240, 220, 40),
    "magenta": (225, 50, 215),
    "cyan": (40, 215, 225),
    "white": (245, 245, 245),
}
NAMES = tuple(COLOURS)
KINDS = ("digit", "colour", "list", "compare", "count")
SPLITS = {
    "train": (
        "astronaut", "brick", "camera", "chelsea", "gravel", "hubble_deep_field", "immunohistochemistry", "retina",
        "stereo_motorcycle",
    ),
    "test": ("coffee", "grass", "moon", "rocket"),
}  # fmt: skip
OBJECTS, CROWD = (2, 5), 16  # digits in a scene, minimum and maximum; maximum in a crowded one
SIZES = 22, 28  # pixels of a digit's box
CELL, OFF = 3, 2  # side of a digit's cell in tokens; maximum distance of a digit from its centre in pixels
GLYPH = 32  # pixels of the enlarged digits that are drawn
VARIANTS = {"train": 16, "test": 1}  # of every digit; the first is not distorted


class Object(NamedTuple):
    """A digit of a scene; its box in pixels."""

    digit: int
    colour: str
    left: int
    top: int
    size: int


class Scene(NamedTuple):
    """A picture and what is in it.

    Parameters
    ----------
    pixels : array [SIDE, SIDE, 3], uint8
    objects : tuple of Object
        With digits and colours all different.
    owner : array [ROW, ROW], int64
        Which object covers a visual token, -1 where none does.
    glyphs : array [objects, GLYPH, GLYPH], float32
        The digits as they were drawn, 0 to 1.
    """

    pixels: np.ndarray
    objects: tuple
    owner: np.ndarray
    glyphs: np.ndarray


class Question(NamedTuple):
    """A question about a scene, of words of the model's vocabulary; kind and answer are None if unknown."""

    kind: str | None
    text: str
    answer: str | None


def scene(split, seed, number, crowd=False):
    """Scene `number` of a series.

    Parameters
    ----------
    split : {"train", "test"}
    seed, number : int
    crowd : bool
        Four in five scenes have up to 16 digits, with repeated digits and colours: for training the tower.

    Returns
    -------
    Scene
    """
    rng = np.random.default_rng([seed, number, list(SPLITS).index(split)])
    canvas = _background(rng, split)
    coverage = np.zeros((SIDE, SIDE), np.float32)
    owner = np.full((ROW, ROW), -1)
    highest = np.full((ROW, ROW), 0.06)  # coverage of a token by its owner, at least 6 % of its pixels
    objects, drawn = [], []
    digits, glyphs = _digits(split)
    count = CROWD if crowd and rng.random() < 0.8 else rng.integers(OBJECTS[0], OBJECTS[1] + 1)
    for left, top, size in _boxes(rng, count):
        taken = [] if crowd else objects
        digit = _other(rng, 10, [o.digit for o in taken])
        colour = _other(rng, len(NAMES), [NAMES.index(o.colour) for o in taken])
        choices = digits[digit]
        drawn.append(glyphs[choices[rng.integers(len(choices))], rng.integers(VARIANTS[split])])
        enlarge = _resampling(size)
        alpha = enlarge @ drawn[-1] @ enlarge.T
        paint = np.clip(COLOURS[NAMES[colour]] + rng.integers(-22, 23, 3), 0, 255).astype(np.float32)
        area = canvas[top : top + size, left : left + size]
        area += alpha[..., None] * (paint - area)
        coverage[:] = 0
        coverage[top : top + size, left : left + size] = alpha
        part = coverage.reshape(ROW, PATCH, ROW, PATCH).mean((1, 3))
        owner[part > highest] = len(objects)
        highest = np.maximum(highest, part)
        objects.append(Object(digit, NAMES[colour], int(left), int(top), int(size)))
    canvas += rng.normal(0, 4, canvas.shape[:2]).astype(np.float32)[..., None]
    return Scene(canvas.clip(0, 255).astype(np.uint8), tuple(objects), owner, np.stack(drawn))


def questions(objects, rng, *, pairs=3):
    """Every question about a scene; of comparisons at most `pairs`, drawn at random.

    Returns
    -------
    list of Question
    """
    asked = []
    for o in objects:
        asked.append(Question("digit", f"which digit is {o.colour} ?", str(o.digit)))
        asked.append(Question("colour", f"what colour is the {o.digit} ?", o.colour))
    asked.append(Question("list", "list all digits", " ".join(map(str, sorted(o.digit for o in objects)))))
    asked.append(Question("count", "how many digits ?", str(len(objects))))
    couples = [(a, b) for a in objects for b in objects if a is not b]
    for i in rng.permutation(len(couples))[:pairs]:
        a, b = couples[i]
        larger = max(a, b, key=lambda o: o.digit)
        asked.append(Question("compare", f"which is larger , {a.colour} or {b.colour} ?", larger.colour))
    return asked


def _other(rng, count, taken):
    """One of `count` that is not taken."""
    free = [i for i in range(count) if i not in taken]
    return free[rng.integers(len(free))]


def _boxes(rng, count):
    """(left, top, size) of boxes in cells of 3 x 3 tokens that do not overlap, slightly off the cells' centres."""
    cells = []
    for row, column in rng.integers(0, ROW - CELL + 1, (100, 2)):
        if len(cells) < count and all(abs(row - r) >= CELL or abs(column - c) >= CELL for r, c in cells):
            cells.append((row, column))
    boxes = []
    for row, column in cells:
        size = rng.integers(SIZES[0], SIZES[1] + 1)
        left, top = (PATCH * cell + (PATCH * CELL - size) // 2 for cell in (column, row))
        left, top = (np.clip(edge + rng.integers(-OFF, OFF + 1), 0, SIDE - size) for edge in (left, top))
        boxes.append((left, top, size))
    return boxes


def _background(rng, split):
    """A crop of a photograph, reduced in contrast, with pieces of others and strokes; float32 [SIDE, SIDE, 3]."""
    photos = _photographs(split)
    canvas = _crop(rng, photos, SIDE, SIDE).astype(np.float32)
    grey = canvas.mean()
    canvas = (canvas - grey) * rng.uniform(0.5, 0.9) + grey * 0.6 + rng.uniform(20, 70)
    for _ in range(rng.integers(3, 9)):
        height, width = rng.integers(6, 25, 2)
        left, top = rng.integers(0, SIDE - width + 1), rng.integers(0, SIDE - height + 1)
        canvas[top : top + height, left : left + width] = _crop(rng, photos, height, width)
    for _ in range(rng.integers(2, 7)):
        start, turn = rng.uniform(0, SIDE, 2), rng.uniform(0, 2 * np.pi)
        steps = np.arange(0, rng.uniform(8, 40), 0.7)[:, None]
        bent = turn + steps * rng.uniform(-0.06, 0.06)
        path = start + np.cumsum(0.7 * np.concatenate([np.cos(bent), np.sin(bent)], 1), 0)
        y, x = path.clip(0, SIDE - 2).astype(int).T
        paint = rng.integers(0, 256, 3)
        canvas[y, x] = canvas[y + 1, x] = paint
    return canvas


def _crop(rng, photos, height, width):
    photo = photos[rng.integers(len(photos))]
    top = rng.integers(photo.shape[0] - height + 1)
    left = rng.integers(photo.shape[1] - width + 1)
    piece = photo[top : top + height, left : left + width]
    return piece[:, ::-1] if rng.random() < 0.5 else piece


@functools.cache
def _photographs(split):
    """Photographs uint8 [.., .., 3] in three sizes, the shorter side 140 pixels and more."""
    from PIL import Image
    from skimage import data

    photos = []
    for name in SPLITS[split]:
        pixels = data.stereo_motorcycle()[0] if name == "stereo_motorcycle" else getattr(data, name)()
        picture = Image.fromarray(pixels).convert("RGB")
        for shorter in (140, 200, 290):
            scale = shorter / min(picture.size)
            size = [round(scale * length) for length in picture.size]
            photos.append(np.asarray(picture.resize(size, Image.Resampling.BICUBIC)))
    return photos


@functools.cache
def _digits(split):
    """(numbers of the digits of each class, their pictures [digits, variants, GLYPH, GLYPH] in 0..1)."""
    from scipy import ndimage
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    test = np.arange(len(bunch.target)) % 5 == 0
    selected = test if split == "test" else ~test
    images, classes = bunch.images[selected].astype(np.float32) / 16, bunch.target[selected]
    rng = np.random.default_rng(0)
    glyphs = np.empty((len(images), VARIANTS[split], GLYPH, GLYPH), np.float32)
    for i, image in enumerate(images):
        image = np.pad(image, 1)
        for j in range(VARIANTS[split]):
            turn, stretch = np.eye(2), np.ones(2)
            shift = np.zeros(2)
            if j:
                angle, shear = rng.uniform(-0.22, 0.22), rng.uniform(-0.15, 0.15)
                turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle) + shear, np.cos(angle)]])
                stretch, shift = rng.uniform(0.88, 1.12, 2), rng.uniform(-0.4, 0.4, 2)
            matrix = turn * stretch * (8 / GLYPH)
            offset = 4.5 - matrix @ np.full(2, (GLYPH - 1) / 2) + shift
            glyphs[i, j] = ndimage.affine_transform(image, matrix, offset, (GLYPH, GLYPH), order=3)
    return [np.flatnonzero(classes == digit) for digit in range(10)], (1.4 * glyphs).clip(0, 1)


@functools.cache
def _resampling(size):
    """Matrix [size, GLYPH] that resamples a row or column linearly."""
    places = (np.arange(size) + 0.5) * GLYPH / size - 0.5
    weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(GLYPH)) / max(1, GLYPH / size))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
