"""One source video -> encoded clips: decode in order, choose frames, crop and resize, cut, encode. Runs inside a worker process."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from datasets.prepare.filters import FilterRules, Rejection, motion
from datasets.prepare.writer import Sample, dump_json, npy_bytes, sums_text
from datasets.sources.base import Video
from datasets.transforms import Centre, ResizeMode, resize_clip
from datasets.video import VideoError, decode, probe
from utils.media import encode_mp4

CHUNK = 16
MP4_GOP = 16
MP4_CRF = 18


@dataclass(frozen=True)
class ClipRules:
    """How clips are made of a video."""

    size: tuple[int, int] = (64, 64)
    clip_length: int = 16
    """Frames of a clip; 0: the whole video is one sample."""
    clip_stride: int = 16
    """Frames between the beginnings of two clips, counted after `frame_stride`."""
    frame_stride: int = 1
    """Every how many frames of the source, or of the frames at `fps`, one is taken."""
    fps: float = 0.0
    """Frames per second that are taken, by their time stamps; 0: all frames of the source."""
    rule: Literal["consecutive", "linspace", "spread"] = "consecutive"
    """Which frames a clip has: see `datasets.frames`."""
    scenes: Literal["ignore", "split"] = "ignore"
    """split: no clip crosses a cut."""
    filters: FilterRules = FilterRules()
    codec: Literal["npy", "mp4"] = "npy"
    decoder: Literal["ffmpeg", "pyav"] = "ffmpeg"
    resize: ResizeMode = "crop"
    """See `datasets.transforms.resize_clip`."""
    antialias: bool = True
    centre: Centre = "floor"
    """Which way a crop leans when it cannot be in the middle."""
    on_short: Literal["skip", "pad"] = "skip"
    """A video shorter than one clip: leave it out, or repeat its last frame."""
    min_frames: int = 1
    """Where whole videos are stored: the shortest that is."""
    max_clips: int = 0
    """Clips taken from one video, from its beginning; 0: all."""
    frames_fps: float = 25.0
    """Frame rate of frame folders."""


@dataclass(frozen=True)
class Facts:
    """What the writer and the report want to know of a clip beside its sample."""

    fps: float
    """Frame rate of the clip."""
    source_size: tuple[int, int]
    """Height and width of the source, upright."""
    source_fps: float
    source_seconds: float
    motion: float
    """Mean absolute difference of neighbouring frames, 0 to 1."""
    scene: int
    """Number of cuts before the clip in its video."""
    fingerprint: str
    """Hash of what the clip shows: see `datasets.prepare.duplicates`; empty: it shows nothing to tell it by."""


@dataclass(frozen=True)
class Clip:
    """Frames uint8 (t, h, w, 3) from source frame `start` on."""

    start: int
    frames: np.ndarray
    padded: int = 0


def transform(frames: np.ndarray, rules: ClipRules) -> np.ndarray:
    """Crop and resize uint8 (t, h, w, 3) as the rules say."""
    return resize_clip(frames, rules.size, rules.resize, antialias=rules.antialias, centre=rules.centre)


def cut_clips(frames: Iterator[np.ndarray], rules: ClipRules) -> Iterator[Clip]:
    """Clips of a stream of native frames (h, w, 3).

    All frames are drawn, also those after the last clip: only the end shows that a file is whole.
    """
    taken: list[np.ndarray] = []  # transformed frames base, base + 1, ...
    base = start = made = 0
    for chunk in _chunks(frames, rules.frame_stride):
        if rules.max_clips and made == rules.max_clips:
            continue
        taken.extend(transform(chunk, rules))
        while rules.clip_length and base + len(taken) >= start + rules.clip_length and made != (rules.max_clips or -1):
            first = start - base
            yield Clip(start * rules.frame_stride, np.stack(taken[first : first + rules.clip_length]))
            made, start = made + 1, start + rules.clip_stride
            drop = min(start - base, len(taken))
            del taken[:drop]
            base += drop
    if not rules.clip_length and len(taken) >= rules.min_frames:
        yield Clip(0, np.stack(taken))
    elif taken and rules.clip_length and not made and rules.on_short == "pad":
        padded = rules.clip_length - len(taken)
        yield Clip(0, np.stack(taken + taken[-1:] * padded), padded)


def _chunks(frames: Iterator[np.ndarray], stride: int) -> Iterator[np.ndarray]:
    """Every stride-th frame, CHUNK of them at a time."""
    kept: list[np.ndarray] = []
    for number, frame in enumerate(frames):
        if number % stride == 0:
            kept.append(frame)
        if len(kept) == CHUNK:
            yield np.stack(kept)
            kept = []
    if kept:
        yield np.stack(kept)


def read_frames(video: Video) -> Generator[np.ndarray, None, None]:
    """Pictures of a frame video in order, uint8 (h, w, 3). VideoError for one that is damaged or of another size than the first."""
    try:
        paths = video.frame_paths()
    except OSError as error:
        raise VideoError("unreadable", f"{error.strerror}") from None
    shape: tuple[int, ...] = ()
    for path in paths:
        try:
            with Image.open(path) as image:
                frame = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise VideoError("damaged", f"{path.name}: {str(error).splitlines()[0][:200]}") from None
        if frame.shape != (shape or frame.shape):
            raise VideoError("frames differ in size", f"{path.name} is {frame.shape[1]}x{frame.shape[0]}, the first {shape[1]}x{shape[0]}")
        shape = frame.shape
        yield frame


def samples(video: Video, rules: ClipRules, class_name: str | None, rejected: list[Rejection]) -> Iterator[tuple[Sample, Facts]]:
    """(sample, what is known of it) for each clip of a video; clips that the filters leave out go to `rejected`.

    VideoError when the video cannot be used; what came before is then void.
    """
    if video.is_frames:
        frames, source_fps, size, seconds = read_frames(video), video.fps or rules.frames_fps, (0, 0), 0.0
    else:
        info = probe(video.path)
        frames, source_fps, size = decode(video.path, info, rules.decoder), info.fps, (info.height, info.width)
        seconds = info.frames / info.fps
    fps = round(source_fps / rules.frame_stride, 3)
    empty = True
    with closing(frames):
        for clip in cut_clips(frames, rules):
            empty = False
            yield _sample(video, clip, rules, class_name, fps), Facts(fps, size, source_fps, seconds, motion(clip.frames), 0, "")
    if empty:
        wanted = (rules.clip_length or rules.min_frames) * rules.frame_stride
        remedy = "; --on-short pad repeats the last one" if rules.clip_length else ""
        raise VideoError("too short", f"fewer than {wanted} frames{remedy}")


def _sample(video: Video, clip: Clip, rules: ClipRules, class_name: str | None, fps: float) -> Sample:
    if rules.codec == "npy":
        members, sums = {"npy": npy_bytes(clip.frames)}, sums_text(clip.frames)
    else:
        gop = min(len(clip.frames), MP4_GOP) if not rules.clip_length else len(clip.frames)
        members, sums = {"mp4": encode_mp4(clip.frames, fps, crf=MP4_CRF, gop=gop)}, ""
    length = (len(clip.frames) - clip.padded) * rules.frame_stride
    card = {
        "source": video.name,
        "span": [clip.start, clip.start + length],
        "frame_stride": rules.frame_stride,
        "padded_frames": clip.padded,
        "fps": fps,
        "class": class_name,
        "caption": video.caption or None,
    }
    members["json"] = dump_json(card)
    if class_name is not None:
        members["cls"] = str(video.label).encode()
    if video.caption:
        members["txt"] = video.caption.encode()
    return Sample(f"{video.key}_{clip.start:06d}", members, len(clip.frames), video.label, sums)
