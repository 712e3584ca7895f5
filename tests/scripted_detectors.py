"""Small TorchScript networks that take videos as the published I3D and C3D do, and sets of videos whose frames are known."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


class ToyI3D(nn.Module):
    """Features of what it was given: brightness of the first and of the last frame, of the left quarter and of all pixels."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert resize, "the network resizes"
        video = x.float()
        if rescale:
            assert x.dtype == torch.uint8, "pixels 0..255 are rescaled"
            video = video / 255 * 2 - 1
        frames = video.mean(dim=(1, 3, 4))
        left = video[:, :, :, :, : max(video.shape[4] // 4, 1)].mean(dim=(1, 2, 3, 4))
        rows = torch.stack([frames[:, 0], frames[:, -1], left, frames.mean(dim=1)], dim=1)
        return rows if return_features else rows.softmax(dim=1)


class ToyC3D(nn.Module):
    """Logits from the brightness of a video; knows no options."""

    def forward(self, x: Tensor) -> Tensor:
        level = x.float().mean(dim=(1, 2, 3, 4))
        return torch.stack([-((level - 60.0 * place) ** 2) / 2000 for place in range(4)], dim=1)


class Pooled(nn.Module):
    """Means of eighths of a video, 24 numbers, or of quarters of a picture, 12."""

    def forward(self, x: Tensor, return_features: bool = True) -> Tensor:
        if x.dim() == 4:
            return torch.nn.functional.adaptive_avg_pool2d(x.float(), (2, 2)).flatten(1)
        return torch.nn.functional.adaptive_avg_pool3d(x.float(), (2, 2, 2)).flatten(1)


class Colours(nn.Module):
    """Mean colours of pictures, and the classes when no features are asked for."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        rows = img.float().mean(dim=(2, 3))
        return rows if return_features else rows.softmax(dim=1)


class Maps(nn.Module):
    """Gives maps in place of rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean(dim=1)


class Long(nn.Module):
    """Takes nine frames or more."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool3d(x.float(), (9, 1, 1)).mean(dim=(3, 4)).flatten(1)


def save_script(net: nn.Module, path: Path) -> Path:
    """Writes the network as TorchScript."""
    torch.jit.script(net).save(str(path))
    return path


def level(video: int, frame: int) -> int:
    """Brightness of a frame: tells which it is."""
    return (7 * video + 3 * frame) % 256


def known_frames(video: int, count: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    """uint8 (t, h, w, 3) of constant frames."""
    levels = np.array([level(video, frame) for frame in range(count)], dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, *size, 3)).copy()


def write_arrays(folder: Path, lengths: Sequence[int], first: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    """Videos as .npy, as VIDM's release writes its samples: (f, 3, h, w), floats 0..255."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, length in enumerate(lengths):
        np.save(folder / f"{number:03d}.npy", known_frames(first + number, length, size).transpose(0, 3, 1, 2).astype(np.float32))
    return folder


def write_noise(folder: Path, count: int, frames: int = 4, size: tuple[int, int] = (16, 16), seed: int = 0) -> Path:
    """Videos of pixels drawn at random, each of another brightness, as .npy."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        video = rng.integers(0, 200, (frames, 3, *size)) + rng.integers(0, 56, (1, 3, 1, 1))
        np.save(folder / f"{number:03d}.npy", video.astype(np.uint8))
    return folder


def write_pictures(folder: Path, frames: np.ndarray) -> Path:
    """A video as a folder of pictures without leading zeros."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame{number}.png")
    return folder
