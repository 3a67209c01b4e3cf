"""Photographs: read from files of any format, squeezed into the square input of the model."""

import warnings
from pathlib import Path
from typing import Any

from . import DemoError


def load(path: str | Path) -> Any:
    """The photograph at `path`, upright, as an RGB image.

    Raises
    ------
    DemoError
        If the file cannot be read as an image.
    """
    from PIL import Image, ImageOps

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
            warnings.simplefilter("ignore")  # about metadata and large images
            with Image.open(path) as image:
                return _rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError:
        raise DemoError(f"--image {path}: not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise DemoError(f"--image {path}: too large (more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels)") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DemoError(f"--image {path}: cannot be read: {reason}") from None


def squeezed(photo: Any, side: int) -> Any:
    """A photograph resized to a square: uint8 [side, side, 3]."""
    import numpy as np
    from PIL import Image

    return np.asarray(photo.resize((side, side), Image.Resampling.BICUBIC))


def _rgb(image):
    """RGB of any mode; transparent pixels become white, 16-bit grey keeps its high byte."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
