"""From a photograph to AnyRes tiles, and from a visual token back to its pixels.

LLaVA-NeXT's tiling on a 2 x 2 grid: the photograph is scaled into a square canvas of two crops
a side, aspect kept, black bars around it; the canvas is cut into four crops; a fifth tile is the
whole photograph squeezed into one crop, the thumbnail. Tokens are numbered tile by tile, the
thumbnail first, then the crops in reading order, each tile row by row: with 336-pixel crops and
14-pixel patches 5 x 24 x 24 = 2880 tokens.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from . import DemoError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's normalisation, RGB
STD = (0.26862954, 0.26130258, 0.27577711)
TILES = 5


@dataclass(frozen=True)
class Tiling:
    """Where the tokens of a photograph lie.

    Parameters
    ----------
    width, height : int
        Of the photograph, in pixels.
    crop, patch : int
        Side of a tile and of a token's patch, in pixels of the tile.
    """

    width: int
    height: int
    crop: int = 336
    patch: int = 14

    @property
    def side(self):
        """Tokens along one side of a tile."""
        return self.crop // self.patch

    @property
    def tokens(self):
        """Visual tokens of the photograph."""
        return TILES * self.side**2

    @property
    def scaled(self):
        """(width, height) of the photograph on the canvas."""
        longest = max(self.width, self.height)
        return tuple(-(-size * 2 * self.crop // longest) for size in (self.width, self.height))  # rounded up

    @property
    def offset(self):
        """(left, top) of the photograph on the canvas."""
        return tuple((2 * self.crop - size) // 2 for size in self.scaled)

    def place(self, token):
        """(tile, row, column) of a token; tile 0 is the thumbnail, 1-4 the crops in reading order."""
        tile, within = divmod(token, self.side**2)
        return tile, *divmod(within, self.side)

    def box(self, token):
        """(left, top, right, bottom) of a token in pixels of the photograph.

        The box of a token in the black bars lies outside the photograph.
        """
        tile, row, column = self.place(token)
        if tile == 0:
            (left, top), (width, height), x, y = (0, 0), (self.crop, self.crop), 0, 0
        else:
            (left, top), (width, height) = self.offset, self.scaled
            y, x = (self.crop * part for part in divmod(tile - 1, 2))
        across = [(x + self.patch * c - left) * self.width / width for c in (column, column + 1)]
        down = [(y + self.patch * r - top) * self.height / height for r in (row, row + 1)]
        return across[0], down[0], across[1], down[1]


def load(path=None):
    """The photograph at `path`, upright, as an RGB image; by default one that scikit-image brings along.

    Raises
    ------
    DemoError
        If the file cannot be read as an image.
    """
    from PIL import Image, ImageOps

    if path is None:
        from skimage import data

        return Image.fromarray(data.astronaut())
    path = Path(path)
    try:
        if path.is_dir():
            raise DemoError(f"--image {path}: is a directory, not an image")
        if not path.exists():
            raise DemoError(f"--image {path}: no such file")
        if not path.is_file():
            raise DemoError(f"--image {path}: is no regular file")
        if path.stat().st_size == 0:
            raise DemoError(f"--image {path}: the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, large images: none of them stops the demo
            with Image.open(path) as image:
                return _rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError:
        raise DemoError(f"--image {path}: not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise DemoError(f"--image {path}: too large (more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels)") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DemoError(f"--image {path}: cannot be read: {reason}") from None


def tile(photo, tiling):
    """Tiles [5, crop, crop, 3] uint8 of a photograph, in the order of the tokens."""
    import numpy as np
    from PIL import Image

    crop = tiling.crop
    canvas = Image.new("RGB", (2 * crop, 2 * crop))
    canvas.paste(photo.resize(tiling.scaled, Image.Resampling.BICUBIC), tiling.offset)
    thumbnail = photo.resize((crop, crop), Image.Resampling.BICUBIC)
    corners = [(x, y) for y in (0, crop) for x in (0, crop)]
    crops = [canvas.crop((x, y, x + crop, y + crop)) for x, y in corners]
    return np.stack([np.asarray(image) for image in (thumbnail, *crops)])


def normalise(tiles, device, dtype):
    """Pixels [5, 3, crop, crop] as CLIP takes them."""
    pixels = torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return ((pixels - mean) / std).to(dtype)


def _rgb(image):
    """RGB of any mode; what is transparent becomes white, 16-bit grey keeps its high byte."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
