"""Crop and resize of video frames: the one set of functions that preprocessing uses, and each release's settings of it."""

from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ResizeMode = Literal["crop", "square", "stretch", "shorter-side", "torchvision", "box-halving"]
Centre = Literal["floor", "round"]
Size = tuple[int, int]
"""Height and width."""

RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)
RELEASES: dict[str, dict[str, object]] = {
    "cmd": {"resize": "square", "antialias": False, "centre": "floor"},
    "pvdm": {"resize": "square", "antialias": False, "centre": "floor"},
    "hvdm": {"resize": "square", "antialias": False, "centre": "floor"},
    "vidm": {"resize": "square", "antialias": False, "centre": "floor"},
    "latte-ucf101": {"resize": "shorter-side", "antialias": False, "centre": "round"},
    "latte-ffs": {"resize": "shorter-side", "antialias": False, "centre": "round"},
    "latte-sky": {"resize": "square", "antialias": False, "centre": "round"},
    "latte-tutorial": {"resize": "stretch", "antialias": True, "centre": "round"},
    "latte-tutorial-square": {"resize": "torchvision", "antialias": True, "centre": "round"},
    "dit": {"resize": "box-halving", "antialias": True, "centre": "floor"},
}
"""Release -> the fields of ClipRules that make its pictures: papers' numbers belong to these."""


def resize_clip(
    frames: np.ndarray, size: Size, mode: ResizeMode = "crop", *, antialias: bool = True, centre: Centre = "floor"
) -> np.ndarray:
    """Frames (t, h, w, c), uint8 or float32, to (t, *size, c) of the same type.

    crop: the largest centred part with the aspect of `size`, then bilinear to `size`. square: the centre square, then to `size` (a
    target that is not square stretches it). stretch: the whole frame to `size`. shorter-side: the frame scaled by one factor until it
    covers `size`, then its centre. torchvision: the same with whole numbers of pixels in between, as torchvision's Resize and
    CenterCrop do. box-halving: halved by box averages while it stays twice as large as `size`, bicubic until it covers `size`, then
    its centre (DiT, ADM). All are bilinear without aligned corners but the last, which has its own filters whatever `antialias` says.
    """
    return fit(trim(frames, size, mode, centre), size, mode, antialias=antialias, centre=centre)


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """A picture as RGB (h, w, 3) uint8. Grey of 16 bits keeps its upper eight; Pillow alone would cut it off at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return np.array(image.convert("RGB"))


def trim(frames: np.ndarray, size: Size, mode: ResizeMode, centre: Centre) -> np.ndarray:
    """First step of `resize_clip`: the part of frames (..., h, w, c) that pictures are made of, a view."""
    if mode not in ("crop", "square"):
        return frames
    return centre_crop(frames, aspect_part(frames, size if mode == "crop" else (1, 1)), centre)


def fit(frames: np.ndarray, size: Size, mode: ResizeMode, *, antialias: bool, centre: Centre) -> np.ndarray:
    """Second step of `resize_clip`: makes trimmed frames (t, h, w, c) as large as `size`."""
    if mode in ("crop", "square", "stretch"):
        return resize(frames, size, antialias=antialias)
    if mode == "box-halving":
        return centre_crop(_box_halving(frames, size), size, centre)
    height, width = frames.shape[1:3]
    scale = max(size[0] / height, size[1] / width)
    covering = max(size[0], int(height * scale)), max(size[1], int(width * scale))
    return centre_crop(resize(frames, covering, antialias=antialias, scale=scale if mode == "shorter-side" else None), size, centre)


def aspect_part(frames: np.ndarray, aspect: Size) -> Size:
    """Size of the largest part of (..., h, w, c) with an aspect (height, width)."""
    h, w = frames.shape[-3:-1]
    # The side that fits stays whole; integer arithmetic keeps the other exact.
    if h * aspect[1] <= w * aspect[0]:
        return h, max(1, h * aspect[1] // aspect[0])
    return max(1, w * aspect[0] // aspect[1]), w


def centre_crop(frames: np.ndarray, size: Size, centre: Centre = "floor") -> np.ndarray:
    """The middle of (..., h, w, c), a view. An odd rest: "floor" leans to the top left, "round" to the even offset (torchvision)."""
    (h, w), (height, width) = frames.shape[-3:-1], size
    top, left = ((rest // 2 if centre == "floor" else round(rest / 2)) for rest in (h - height, w - width))
    return frames[..., top : top + height, left : left + width, :]


def resize(frames: np.ndarray, size: Size, *, antialias: bool = True, scale: float | None = None) -> np.ndarray:
    """Bilinear resize of (t, h, w, c) to (t, *size, c), pixel centres aligned at half pixels (align_corners off).

    `scale`: the exact factor, where `size` is what whole pixels leave of it.
    """
    if frames.shape[1:3] == tuple(size):
        return np.ascontiguousarray(frames)
    x = torch.from_numpy(np.require(frames, requirements=["C", "W"])).permute(0, 3, 1, 2)
    exact = scale is not None and all(int(old * scale) == new for old, new in zip(x.shape[2:], size, strict=True))
    target, factor = (None, scale) if exact else (tuple(size), None)
    x = F.interpolate(x, size=target, scale_factor=factor, mode="bilinear", align_corners=False, antialias=antialias)
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def _box_halving(frames: np.ndarray, size: Size) -> np.ndarray:
    """Pillow's own filters, for they are the definition; a float channel goes through its float pictures."""
    halved = frames.shape[1:3]
    steps: list[tuple[Size, Image.Resampling]] = []
    while halved[0] >= 2 * size[0] and halved[1] >= 2 * size[1]:
        halved = halved[0] // 2, halved[1] // 2
        steps.append((halved, Image.Resampling.BOX))
    scale = max(size[0] / halved[0], size[1] / halved[1])
    steps.append(((round(halved[0] * scale), round(halved[1] * scale)), Image.Resampling.BICUBIC))

    def through(image: Image.Image) -> np.ndarray:
        for (height, width), kind in steps:
            image = image.resize((width, height), kind)
        return np.asarray(image)

    if frames.dtype == np.uint8 and frames.shape[3] == 3:
        return np.stack([through(Image.fromarray(frame)) for frame in frames])
    return np.stack([np.stack([through(Image.fromarray(frame[..., c])) for c in range(frame.shape[2])], axis=-1) for frame in frames])
