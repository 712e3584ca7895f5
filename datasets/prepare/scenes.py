"""Where one shot of a video ends and the next begins.

A hard cut is a change between two frames that is large and stands out of its neighbourhood; a fade is a run of black frames. Frames are
compared as small pictures, so a video is decoded once for this, and cheaply.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from datasets.transforms import resize_clip
from datasets.video import VideoInfo, decoded, to_rgb, video_errors

SMALL = (36, 64)
"""Height and width of the pictures that are compared."""
LEAST, FACTOR, OFFSET = 0.12, 3.0, 0.02
"""A cut changes the picture by more than LEAST, and by more than FACTOR times the median change around it plus OFFSET."""
AROUND = 8
"""Changes on either side that make the neighbourhood."""
DARK = 0.02
"""Mean brightness, 0 to 1, under which a frame is black."""


def small_frames(path: Path, info: VideoInfo) -> Iterator[np.ndarray]:
    """All frames of a video file as uint8 RGB of size SMALL, straight from the decoder."""
    reformatter = VideoReformatter()
    with video_errors(path, "damaged"), closing(decoded(path, info)) as frames:
        for frame in frames:
            yield to_rgb(frame, reformatter, SMALL, Interpolation.AREA)


def shrink(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Frames (h, w, 3) of any size as uint8 of size SMALL."""
    for frame in frames:
        yield resize_clip(frame[None], SMALL, "stretch")[0]


def find_cuts(frames: Iterable[np.ndarray]) -> list[int]:
    """Numbers of the frames that begin a new shot, ascending, without the first frame; `frames` are small, uint8 (h, w, 3)."""
    changes, light = [], []
    before: np.ndarray | None = None
    for frame in frames:
        light.append(_brightness(frame))
        if before is not None:
            changes.append(float((np.maximum(frame, before) - np.minimum(frame, before)).mean(dtype=np.float64)) / 255)
        before = frame
    return sorted({*_hard_cuts(np.array(changes)), *_fades(np.array(light))})


def _brightness(frame: np.ndarray) -> float:
    return float(frame.mean(axis=(0, 1), dtype=np.float64) @ (0.299, 0.587, 0.114)) / 255


def _hard_cuts(changes: np.ndarray) -> Iterator[int]:
    for at in np.flatnonzero(changes > LEAST).tolist():
        around = np.concatenate([changes[max(0, at - AROUND) : at], changes[at + 1 : at + 1 + AROUND]])
        if not len(around) or changes[at] > FACTOR * np.median(around) + OFFSET:
            yield at + 1


def _fades(light: np.ndarray) -> Iterator[int]:
    """The first frame after each run of black ones, where a shot was seen before."""
    black = light < DARK
    seen = np.logical_or.accumulate(~black)
    yield from (np.flatnonzero(black[:-1] & ~black[1:] & seen[:-1]) + 1).tolist()
