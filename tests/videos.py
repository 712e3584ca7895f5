"""Small real video files for tests of the data path."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from datasets.video import ffmpeg_program

needs_ffmpeg = pytest.mark.skipif(ffmpeg_program() is None, reason="no ffmpeg program: pip install imageio-ffmpeg, or install ffmpeg")
DECODERS = ["pyav", pytest.param("ffmpeg", marks=needs_ffmpeg)]


def noise_frames(count: int, size: tuple[int, int] = (48, 64), seed: int = 0) -> np.ndarray:
    """uint8 (t, h, w, 3): smooth coloured blobs that move, so that every frame differs and codecs keep them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    phase = rng.uniform(0, 6, (3, 2))
    t = np.arange(count)[:, None, None]
    channels = [np.sin(y / 7 + a + t / 3) + np.cos(x / 9 + b - t / 4) for a, b in phase]
    return ((np.stack(channels, axis=-1) + 2) * 63).astype(np.uint8)


def write_video(path: Path, frames: np.ndarray | int, codec: str = "libx264", rate: int = 25, **options: str) -> Path:
    """Writes frames (or that many noise frames) with PyAV; the container follows the suffix."""
    frames = noise_frames(frames) if isinstance(frames, int) else frames
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "12", "threads": "1"} | options)
        stream.bit_rate = 4_000_000
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_tree(root: Path, names: Sequence[str], frames: int = 20) -> Path:
    """A folder of short videos, all different."""
    for seed, name in enumerate(names):
        write_video(root / name, noise_frames(frames + seed, seed=seed), codec="mpeg4" if name.endswith(".avi") else "libx264")
    return root


def folder_digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below a folder: short enough to read when two folders differ."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
