"""Moving digits: a small labelled set of real video files that needs no download. Digits are drawn with the font that PIL brings."""

import json
import shutil
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.errors import UserError
from utils.files import atomic_write_bytes
from utils.media import encode_mp4
from utils.rng import derive_seed

LICENCE = "made by Kinoform's datasets/synthetic.py, no rights reserved (CC0-1.0)"
CARD = "digits.json"
FPS = 8.0


@dataclass(frozen=True)
class DigitsConfig:
    """What decides the videos."""

    num_videos: int = 64
    size: tuple[int, int] = (64, 64)
    frames: int = 32
    digits: int = 1
    """Digits in a video; the first, the largest, is the label."""
    seed: int = 0


@cache
def _glyph(digit: int, height: int) -> np.ndarray:
    """Brightness in [0, 255], uint8 (h, w), of one digit cut to its ink, `height` pixels high."""
    image = Image.new("L", (8 * height, 8 * height))
    ImageDraw.Draw(image).text((height, height), str(digit), fill=255, font=ImageFont.load_default(size=4 * height))
    ink = image.crop(image.getbbox())
    width = max(1, round(ink.width * height / ink.height))
    return np.asarray(ink.resize((width, height), Image.Resampling.BOX))


def draw_video(config: DigitsConfig, number: int) -> np.ndarray:
    """uint8 (t, h, w, 3) of video `number`, whose label is number % 10: digits that bounce off the borders, white on black."""
    rng = np.random.Generator(np.random.Philox(derive_seed(config.seed, f"digits/{number}")))
    side = min(config.size)
    frames = np.zeros((config.frames, *config.size), dtype=np.uint8)
    for i in range(config.digits):
        digit = number % 10 if i == 0 else int(rng.integers(10))
        glyph = _glyph(digit, max(4, round(side * (rng.uniform(0.62, 0.7) if i == 0 else rng.uniform(0.35, 0.45)))))
        room = np.maximum(np.array(config.size) - glyph.shape, 1)
        position = rng.uniform(0, room)
        angle, speed = rng.uniform(0, 2 * np.pi), side * rng.uniform(0.02, 0.04)
        velocity = speed * np.array([np.sin(angle), np.cos(angle)])
        for t, frame in enumerate(frames):
            # Reflection at both borders: a triangle wave of the free movement.
            top, left = np.rint(room - np.abs((position + t * velocity) % (2 * room) - room)).astype(int)
            part = frame[top : top + glyph.shape[0], left : left + glyph.shape[1]]
            np.maximum(part, glyph[: part.shape[0], : part.shape[1]], out=part)
    return np.repeat(frames[..., None], 3, axis=-1)


def make_digits(folder: Path, config: DigitsConfig) -> None:
    """Writes <folder>/<digit>/video_<number>.mp4, unless they are there. UserError when others are."""
    card = json.dumps(asdict(config), sort_keys=True).encode()
    noted = folder / CARD
    if noted.exists():
        if noted.read_bytes() != card:
            raise UserError(f"{folder} holds moving digits of other settings: choose another --out, or --overwrite")
        return
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(config.num_videos):
        path = folder / str(number % 10) / f"video_{number:05d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_mp4(draw_video(config, number), FPS, crf=10))
    atomic_write_bytes(noted, card)
