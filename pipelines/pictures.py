"""Pictures that videos begin at: found, read, cut and resized as clips are."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from datasets.shards import IMAGE_SUFFIXES
from datasets.sources.base import natural_key
from datasets.transforms import resize_clip, rgb_pixels
from utils.errors import UserError
from utils.files import sha256_file
from utils.media import to_float


def find_pictures(paths: Sequence[str]) -> list[Path]:
    """The files that are named, and those of the folders that are named, in natural order. Raises UserError for a place without any."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--image {path} cannot be read: no such file")
        inside = [path] if not path.is_dir() else sorted(filter(_is_picture, path.iterdir()), key=lambda file: natural_key(file.name))
        if not inside:
            raise UserError(f"--image {path}: no picture in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
        found += inside
    return found


def hash_picture(path: Path) -> str:
    """Hexadecimal SHA-256 of the file. Raises UserError."""
    try:
        return sha256_file(path)
    except OSError as error:
        raise UserError(f"--image {path} cannot be read: {error.strerror}") from None


def _is_picture(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES


def read_picture(path: Path, size: tuple[int, int], *, antialias: bool = True) -> Tensor:
    """A picture of any size -> its centre 3 h w float32 in [-1, 1] of `size`, upright as its camera says. Raises UserError."""
    try:
        with Image.open(path) as image:
            frame = rgb_pixels(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {path} cannot be read: {str(error).splitlines()[0][:200]}") from None
    resized = resize_clip(frame[None], size, "crop", antialias=antialias)[0]
    return to_float(torch.from_numpy(resized).permute(2, 0, 1))
