"""The rules by which clips are cut, and the plan that they give for one video: which frames of it each clip has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from datasets.frames import last_start, linspace, nearest, spread, strided, strided_within
from datasets.prepare.filters import FilterRules, Rejection
from datasets.transforms import Centre, ResizeMode

SLACK = 1e-6
"""Seconds by which two times may differ and be the same."""
LEAST_RATE = 0.001
"""Frames per second of a clip, at least: some frames spread over days are said to come faster than they do."""


@dataclass(frozen=True)
class ClipRules:
    """How clips are made of a video: all that decides what is in them."""

    size: tuple[int, int] = (64, 64)
    clip_length: int = 16
    """Frames of a clip; 0: the whole video (or each scene of it) is one sample."""
    clip_stride: int = 16
    """Frames between the beginnings of two clips, counted after `frame_stride`."""
    frame_stride: int = 1
    """Every how many frames of the source, or of the frames at `fps`, one is taken."""
    fps: float = 0.0
    """Frames per second that are taken, by their time stamps; 0: all frames of the source."""
    rule: Literal["consecutive", "linspace", "spread"] = "consecutive"
    """consecutive: windows of frames at `frame_stride`. linspace: windows as Latte draws them. spread: one clip over the whole video."""
    codec: Literal["npy", "mp4"] = "npy"
    decoder: Literal["pyav", "ffmpeg"] = "pyav"
    resize: ResizeMode = "crop"
    """See `datasets.transforms.resize_clip`."""
    antialias: bool = True
    centre: Centre = "floor"
    """Which way a crop leans when it cannot be in the middle."""
    on_short: Literal["skip", "pad"] = "skip"
    """A video or scene shorter than one clip: leave it out, or repeat its last frame."""
    min_frames: int = 1
    """The least frames of its own that a whole video or a padded clip has."""
    max_clips: int = 0
    """Clips taken from one video, from its beginning; 0: all."""
    frames_fps: float = 25.0
    """Frame rate of frame folders that say none."""
    scenes: Literal["ignore", "split"] = "ignore"
    """split: no clip crosses a cut."""
    filters: FilterRules = FilterRules()


@dataclass(frozen=True)
class Window:
    """One clip to be."""

    position: int
    """Names the clip within its video: its first frame, counted in the source, or in the frames at the target rate."""
    numbers: np.ndarray
    """Frames of the source in ascending order; some repeat where the source is slower than the target rate, or for padding."""
    stop: int
    """The first frame of the source after the clip."""
    seconds: tuple[float, float]
    """When the clip begins, and when the last of its frames that is no padding is first shown, counted from the first frame."""
    padded: int
    """Frames at the end that repeat the last one."""
    scene: int
    fps: float
    """Frame rate of the clip."""


def plan(times: np.ndarray, fps: float, rules: ClipRules, span: tuple[float, float] | None, cuts: Sequence[int]) -> list[Window]:
    """The clips of a video whose frames are shown at `times` (seconds from 0 on, about `fps` a second).

    `span`: only what is shown in [start, end) seconds. `cuts`: first frames of shots that no clip may cross.
    """
    windows, first = [], 0
    for shot, scene in _shots(_taken(times, fps, rules.fps, span), cuts):
        for picks, padded, rate in _cut(len(shot), rules, rules.fps or fps):
            taken = shot[picks]
            position = first + picks[0] if rules.fps else int(taken[0])
            stride = rules.frame_stride if not rules.fps and rules.rule == "consecutive" else 1
            whole = np.concatenate([taken, np.repeat(taken[-1:], padded)])
            seconds = float(times[taken[0]]), float(times[taken[-1]])
            windows.append(Window(position, whole, int(taken[-1]) + stride, seconds, padded, scene, rate))
        first += len(shot)
    return windows


def short_scenes(times: np.ndarray, fps: float, rules: ClipRules, span: tuple[float, float] | None, cuts: Sequence[int]) -> list[Rejection]:
    """The scenes of a video with several that no clip fits into; arguments as of `plan`."""
    shots = [shot for shot, _ in _shots(_taken(times, fps, rules.fps, span), cuts)]
    short = [shot for shot in shots if next(_cut(len(shot), rules, fps), None) is None] if len(shots) > 1 else []
    return [Rejection(int(shot[0]), "scene too short", f"frame {shot[0]}: {len(shot)} frames") for shot in short]


def _shots(numbers: np.ndarray, cuts: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
    """Frames without a cut between them, and how many cuts there are before."""
    scenes = np.searchsorted(np.asarray(cuts, dtype=np.int64), numbers, side="right")
    edges = [0, *(np.flatnonzero(np.diff(scenes)) + 1).tolist(), len(numbers)]
    for first, last in pairwise(edges):
        if first < last:
            yield numbers[first:last], int(scenes[first])


def _taken(times: np.ndarray, fps: float, target: float, span: tuple[float, float] | None) -> np.ndarray:
    """Frames of the source, in order, of which clips are made."""
    start, stop = span or (0.0, np.inf)
    first, last = np.searchsorted(times, [start - SLACK, stop - SLACK]).tolist()
    if not target or first >= last:
        return np.arange(first, last)
    end = min(stop, float(times[-1]) + 1 / fps)
    return first + nearest(times[first:last] - start, end - start, target)


def _cut(total: int, rules: ClipRules, fps: float) -> Iterator[tuple[list[int], int, float]]:
    """(frames, frames of padding, frame rate) of each clip of a run of `total` frames."""
    length, stride = rules.clip_length, rules.frame_stride
    if not length:
        picks = strided_within(0, total, total, stride)
        if len(picks) >= max(1, rules.min_frames):
            yield picks, 0, _rate(fps / stride)
        return
    if rules.rule == "spread":
        picks, rate = spread(total, length), fps * length / max(total, length)
        if len(picks) == length or _pads(picks, rules):
            yield picks, length - len(picks), _rate(rate)
        return
    rate = _rate(fps / stride)
    fits = total - length * stride if rules.rule == "linspace" else last_start(total, length, stride)
    for start in range(0, fits + 1, rules.clip_stride * stride):
        yield linspace(start, total, length, stride) if rules.rule == "linspace" else strided(start, length, stride), 0, rate
    if fits < 0 and total:
        picks = linspace(0, total, length, stride) if rules.rule == "linspace" else strided_within(0, total, length, stride)
        if _pads(picks, rules):
            yield picks, length - len(picks), rate


def _rate(fps: float) -> float:
    """A frame rate as it is stored; no video player takes a rate of 0."""
    return max(LEAST_RATE, round(fps, 3))


def _pads(picks: list[int], rules: ClipRules) -> bool:
    return rules.on_short == "pad" and len(set(picks)) >= max(1, rules.min_frames)
