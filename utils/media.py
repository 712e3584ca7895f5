"""Videos and pictures on the way in and out: ranges, grids, mp4, GIF and PNG. Files appear whole or not at all."""

import io
import math
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.video.stream import VideoStream
from PIL import Image
from torch import Tensor

from utils.files import atomic_path, atomic_write_bytes


def to_float(video: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], contiguous, same shape and device."""
    return video.float().div_(127.5).sub_(1.0).contiguous()


def to_uint8(video: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255], same shape; clamped, then rounded to the nearest level."""
    return video.float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)


_BITEXACT = {"fflags": "+bitexact"}
_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in ITU-R 601's luma, which is also Pillow's "L"."""


def to_channels(video: Tensor, channels: int) -> Tensor:
    """Float RGB b 3 ... -> b channels ..., for networks of 3 channels (as it is) or 1 (luma). Raises ValueError for other numbers."""
    if channels == 3:
        return video
    if channels != 1:
        raise ValueError(f"frames have 3 channels, or 1 as luma, not {channels}")
    red, green, blue = video.split(1, dim=1)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def to_rgb(video: Tensor) -> Tensor:
    """b 1 ... -> b 3 ..., the channel repeated; three channels as they are."""
    return video if video.shape[1] == 3 else video.expand(-1, 3, *video.shape[2:])


def grid(videos: Tensor, columns: int = 0, gap: int = 2) -> Tensor:
    """Videos b c t h w (or images b c h w) side by side with `gap` pixels between -> c t H W (or c H W). columns 0: nearly square.

    Gaps are white: 255 for uint8, 1 for floats.
    """
    columns = min(columns, len(videos)) or math.ceil(math.sqrt(len(videos)))
    rows = math.ceil(len(videos) / columns)
    *lead, h, w = videos.shape[1:]
    white = 255 if videos.dtype == torch.uint8 else 1.0
    out = videos.new_full((*lead, rows * (h + gap) - gap, columns * (w + gap) - gap), white)
    for i, video in enumerate(videos):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        out[..., top : top + h, left : left + w] = video
    return out


def _frames(video: Tensor) -> np.ndarray:
    """c t h w uint8 (1 or 3 channels) -> t h w 3."""
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[0] not in (1, 3):
        raise ValueError(f"expected a uint8 video (c t h w, 1 or 3 channels), got {video.dtype} {tuple(video.shape)}: see to_uint8")
    return video.expand(3, -1, -1, -1).permute(1, 2, 3, 0).cpu().contiguous().numpy()


def _add_stream(container: OutputContainer, size: tuple[int, int], fps: float, crf: int, gop: int) -> VideoStream:
    """H.264 4:2:0 without B-frames, the same bytes each time; frames of (height, width), both even."""
    # x264's macroblock tree reads memory it has not written when frames are small: now and then it gives other bytes.
    options = {"crf": str(crf), "tune": "fastdecode", "mbtree": "0", "bf": "0", "threads": "1"}
    options |= {"g": str(gop), "keyint_min": "1", "sc_threshold": "0"}
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
    stream.height, stream.width = size
    stream.pix_fmt = "yuv420p"
    stream.codec_context.flags |= av.codec.context.Flags.bitexact
    return stream


def _even(frames: np.ndarray) -> np.ndarray:
    """Frames t h w 3 of even sizes, which 4:2:0 needs: an odd last row or column is repeated."""
    odd = frames.shape[1] % 2, frames.shape[2] % 2
    return np.pad(frames, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge") if any(odd) else frames


def _mux(container: OutputContainer, stream: VideoStream, frames: np.ndarray) -> None:
    for frame in frames:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))


def encode_mp4(frames: np.ndarray, fps: float, *, crf: int = 18, gop: int = 0) -> bytes:
    """RGB frames t h w 3 uint8 -> H.264 4:2:0 in mp4, without B-frames, the same bytes each time. gop 0: one key frame in all.

    H.264 4:2:0 needs even sizes: an odd last row or column is repeated.
    """
    frames = _even(frames)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options=_BITEXACT) as container:
        stream = _add_stream(container, frames.shape[1:3], fps, crf, gop or len(frames))
        _mux(container, stream, frames)
        container.mux(stream.encode())
    return buffer.getvalue()


class VideoWriter:
    """An mp4 written as its frames come, of any length in constant memory.

    The file replaces `path` when the block ends, and nothing does when it raises. Its bytes depend on the frames alone, not on how
    they were cut into calls.
    """

    def __init__(self, path: Path | str, fps: float, *, crf: int = 18, gop: int = 16) -> None:
        self.path, self.fps, self.crf, self.gop = Path(path), fps, crf, gop
        self.frames = 0
        """Frames that were written so far."""
        self._stack = ExitStack()
        self._stream: VideoStream | None = None

    def __enter__(self) -> "VideoWriter":
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            self._container = stack.enter_context(av.open(str(temporary), "w", format="mp4", options=_BITEXACT))
            self._stack = stack.pop_all()
        return self

    def write(self, video: Tensor) -> None:
        """Append uint8 frames c t h w (1 or 3 channels), all of the size of the first ones."""
        frames = _even(_frames(video))
        if self._stream is None:
            self._stream = _add_stream(self._container, frames.shape[1:3], self.fps, self.crf, self.gop)
        _mux(self._container, self._stream, frames)
        self.frames += len(frames)

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self._stream is not None:
            self._container.mux(self._stream.encode())
        self._stack.__exit__(*error)


def write_mp4(path: Path | str, video: Tensor, fps: float = 25.0) -> None:
    """Writes a uint8 video c t h w (1 or 3 channels) as H.264."""
    atomic_write_bytes(Path(path), encode_mp4(_frames(video), fps))


def gif_duration(fps: float) -> int:
    """Milliseconds that a frame of a GIF is shown. GIF counts time in 1/100 s; players are slow below 2 of them."""
    return max(20, round(100 / fps) * 10)


def gif_bytes(video: Tensor, fps: float = 25.0) -> bytes:
    """An endless GIF of a uint8 video c t h w (1 or 3 channels)."""
    images = [Image.fromarray(frame) for frame in _frames(video)]
    buffer = io.BytesIO()
    images[0].save(buffer, format="GIF", save_all=True, append_images=images[1:], duration=gif_duration(fps), loop=0, optimize=False)
    return buffer.getvalue()


def write_gif(path: Path | str, video: Tensor, fps: float = 25.0) -> None:
    """Writes a uint8 video c t h w (1 or 3 channels) as an endless GIF."""
    atomic_write_bytes(Path(path), gif_bytes(video, fps))


def png_bytes(image: Tensor) -> bytes:
    """PNG of a uint8 image c h w (1 or 3 channels)."""
    buffer = io.BytesIO()
    Image.fromarray(_frames(image[:, None])[0]).save(buffer, format="PNG")
    return buffer.getvalue()


def write_png(path: Path | str, image: Tensor) -> None:
    """Writes a uint8 image c h w (1 or 3 channels)."""
    atomic_write_bytes(Path(path), png_bytes(image))
