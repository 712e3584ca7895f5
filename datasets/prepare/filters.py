"""What is left out: videos by their size, rate and length, clips by how much moves in them and by darkness."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datasets.video import MAX_PIXELS, VideoError

BLACK = 0.02
"""Mean brightness, 0 to 1, under which a frame is black."""
TOGETHER = 64
"""Frames that are compared in one go; the differences at one place add up to less than 2**16."""
LOOK = 64
"""Motion and brightness are measured on about this many pixels a side."""


@dataclass(frozen=True)
class FilterRules:
    """Bounds on videos and clips; 0 (and 1 for `max_motion`) means none."""

    min_fps: float = 0.0
    max_fps: float = 0.0
    min_size: int = 0
    """Least length of the shorter side of the source, in pixels."""
    max_pixels: int = MAX_PIXELS
    """Most pixels of a source frame; a file that says more is not decoded at all."""
    min_seconds: float = 0.0
    max_seconds: float = 0.0
    """Length of the video, or of the part of it that is asked for."""
    min_motion: float = 0.0
    max_motion: float = 1.0
    """Mean absolute difference of neighbouring frames of a clip, 0 to 1."""
    drop_black: bool = False
    """Leave out clips in which every frame is black."""


class Rejection(NamedTuple):
    """A clip that was left out while its video is kept."""

    start: int
    """First frame in the source."""
    reason: str
    detail: str


def check_video(height: int, width: int, fps: float, seconds: float, rules: FilterRules) -> None:
    """Raises VideoError for a video outside the bounds."""
    short = min(height, width)
    if short < rules.min_size:
        raise VideoError("too small", f"{width}x{height}, shorter side under {rules.min_size}")
    if fps < rules.min_fps or (rules.max_fps and fps > rules.max_fps):
        raise VideoError("frame rate out of bounds", f"{fps:.4g} frames per second")
    if seconds < rules.min_seconds or (rules.max_seconds and seconds > rules.max_seconds):
        raise VideoError("length out of bounds", f"{seconds:.2f} s")


def _look(frames: np.ndarray) -> np.ndarray:
    """Every n-th row and column of uint8 (t, h, w, 3), in any order: enough to measure, cheap at any size."""
    down, across = (max(1, side // LOOK) for side in frames.shape[1:3])
    if down == across == 1:
        return frames
    # One channel after the other: copying whole pixels, or all bytes with gaps between them, takes two to four times as long.
    return np.stack([frames[:, ::down, ::across, channel] for channel in range(3)], axis=1)


def motion(frames: np.ndarray) -> float:
    """Mean absolute difference of neighbouring frames of uint8 (t, h, w, 3), 0 to 1; 0 for a single frame."""
    if len(frames) < 2:
        return 0.0
    small, total = _look(frames).reshape(len(frames), -1), 0
    for first in range(0, len(small) - 1, TOGETHER):  # a whole video would take its size in memory three times more
        before, after = small[first:-1][:TOGETHER], small[first + 1 :][:TOGETHER]
        total += int((np.maximum(before, after) - np.minimum(before, after)).sum(axis=0, dtype=np.uint16).sum(dtype=np.int64))
    return total / small[1:].size / 255


def check_clip(start: int, frames: np.ndarray, moved: float, rules: FilterRules) -> Rejection | None:
    """Why a clip, uint8 (t, h, w, 3) with motion `moved`, is left out; None when it stays."""
    if moved < rules.min_motion:
        return Rejection(start, "too little motion", f"frame {start}: {moved:.4f}")
    if moved > rules.max_motion:
        return Rejection(start, "too much motion", f"frame {start}: {moved:.4f}")
    if rules.drop_black and _look(frames).mean(axis=(1, 2, 3), dtype=np.float64).max() < 255 * BLACK:
        return Rejection(start, "black", f"frame {start}")
    return None
