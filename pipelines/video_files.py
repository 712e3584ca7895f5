"""The files of a generated video: an mp4, a GIF, or a folder of pictures. Each is there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.stored_video import count_frames, iterate_frames
from utils.files import atomic_folder
from utils.media import VideoWriter, gif_duration, png_bytes, write_gif, write_mp4

Format = Literal["mp4", "gif", "png"]
EXACTEST: tuple[Format, ...] = ("png", "mp4", "gif")
"""Pictures are the frames themselves, an mp4 is compressed, a GIF has 256 colours."""


class Writer(Protocol):
    """A video file that is written as its frames come."""

    @property
    def frames(self) -> int:
        """Frames that were written so far."""

    def write(self, video: Tensor) -> None:
        """Append uint8 frames c t h w."""


class PictureWriter:
    """A folder of pictures, 000000.png and so on, in constant memory. It replaces `path` when the block ends, and nothing does when it
    raises."""

    def __init__(self, path: Path) -> None:
        self.path, self.frames = path, 0
        self._stack = ExitStack()

    def __enter__(self) -> "PictureWriter":
        self._folder = self._stack.enter_context(atomic_folder(self.path))
        return self

    def write(self, video: Tensor) -> None:
        """Append uint8 frames c t h w (1 or 3 channels)."""
        for frame in video.unbind(1):
            (self._folder / f"{self.frames:06d}.png").write_bytes(png_bytes(frame))
            self.frames += 1

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class GifWriter:
    """A GIF, whose frames are held in memory until the block ends."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps, self.frames = path, fps, 0
        self._videos: list[Tensor] = []

    def __enter__(self) -> "GifWriter":
        return self

    def write(self, video: Tensor) -> None:
        """Append uint8 frames c t h w (1 or 3 channels)."""
        self._videos.append(video)
        self.frames += video.shape[1]

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self._videos:
            write_gif(self.path, torch.cat(self._videos, dim=1), self.fps)


def video_path(folder: Path, name: str, form: Format) -> Path:
    """Where a video is: a folder of its name for pictures, else a file."""
    return folder / name if form == "png" else folder / f"{name}.{form}"


def form_of(path: Path) -> Format:
    """The format of a video that is there."""
    if path.is_dir():
        return "png"
    return "gif" if path.suffix.lower() == ".gif" else "mp4"


def exactest(forms: tuple[Format, ...]) -> Format:
    """Of the formats of a video the one that is nearest to its frames."""
    return next(form for form in EXACTEST if form in forms)


def open_writer(path: Path, form: Format, fps: float) -> AbstractContextManager[Writer]:
    """What writes a video of any length to `path`."""
    if form == "mp4":
        return VideoWriter(path, fps)
    return PictureWriter(path) if form == "png" else GifWriter(path, fps)


def write_video(path: Path, form: Format, video: Tensor, fps: float) -> None:
    """Write a uint8 video c t h w that is there as a whole."""
    if form == "mp4":
        write_mp4(path, video, fps)
    else:
        with open_writer(path, form, fps) as writer:
            writer.write(video)


def remove_video(path: Path) -> None:
    """Delete a video of any format, where it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def count(path: Path, form: Format, fps: float) -> int:
    """Frames of a video of that rate; 0 where it is not there or is none."""
    if form == "mp4":
        return count_frames(path)
    return sum(1 for _ in iterate(path, form, fps)) if path.exists() else 0


def iterate(path: Path, form: Format, fps: float) -> Iterator[np.ndarray]:
    """The frames of a video one by one, uint8 (h, w, 3)."""
    if form == "mp4":
        return iterate_frames(path)
    return iterate_pictures(path) if form == "png" else iterate_gif(path, fps)


def iterate_pictures(path: Path) -> Iterator[np.ndarray]:
    """The pictures of a folder, in order."""
    for place in sorted(path.glob("*.png")):
        with Image.open(place) as image:
            yield np.asarray(image.convert("RGB"))


def iterate_gif(path: Path, fps: float) -> Iterator[np.ndarray]:
    """The frames of a GIF of that rate. Equal ones in a row are stored as one that is shown longer."""
    with Image.open(path) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frame = np.asarray(image.convert("RGB"))
            for _ in range(max(1, round(image.info.get("duration", 0) / gif_duration(fps)))):
                yield frame
