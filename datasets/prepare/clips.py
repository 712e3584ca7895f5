"""One source video -> encoded clips: plan which frames, decode in order, crop and resize, filter, encode. Runs inside a worker process."""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np

from datasets.conditions import MEMBER
from datasets.npy import npy_array
from datasets.prepare.duplicates import fingerprint
from datasets.prepare.filters import Rejection, check_clip, check_video, motion
from datasets.prepare.reels import Reel, open_reel
from datasets.prepare.scenes import find_cuts
from datasets.prepare.windows import ClipRules, Window, plan, short_scenes
from datasets.prepare.writer import Sample, dump_json, npy_bytes, sums_text
from datasets.sources.base import Video
from datasets.transforms import fit, trim
from datasets.video import VideoError
from utils.media import encode_mp4

MP4_GOP = 16
MP4_CRF = 18
TOGETHER = 1 << 20
"""Bytes of frames that are resized in one call: small frames go faster together, large ones while they are in the cache."""
MAX_CLIP_BYTES = 1 << 31
"""A clip of more, uncompressed, is not made: whole videos stay in memory until they are written."""


@dataclass(frozen=True)
class Facts:
    """What the writer and the report want to know of a clip beside its sample."""

    fps: float
    """Frame rate of the clip."""
    source_size: tuple[int, int]
    """Height and width of the source, upright."""
    source_fps: float
    source_seconds: float
    """Length of the source, or of the part of it that was asked for."""
    motion: float
    """Mean absolute difference of neighbouring frames, 0 to 1."""
    scene: int
    """Number of cuts before the clip in its video; 0 where cuts are ignored."""
    fingerprint: str
    """Hash of what the clip shows: see `datasets.prepare.duplicates`; empty: it shows nothing to tell it by, or nobody asked."""


@dataclass(frozen=True)
class Clip:
    """Frames, and where they come from."""

    window: Window
    npy: bytes
    """The frames as a npy file."""
    frames: np.ndarray
    """uint8 (t, h, w, 3), a view of `npy`."""
    facts: Facts


def samples(
    video: Video, rules: ClipRules, class_name: str | None, rejected: list[Rejection], fingerprints: bool = True
) -> Iterator[tuple[Sample, Facts]]:
    """(sample, what is known of it) for each clip of a video; clips that the filters leave out go to `rejected`.

    `fingerprints`: whether clips will be compared. VideoError when the video cannot be used; what came before is then void.
    """
    vector = _vector(video)
    for clip in video_clips(video, rules, rejected, fingerprints):
        yield _sample(video, clip, rules, class_name, vector), clip.facts


def _vector(video: Video) -> dict[str, bytes]:
    """The member that is the condition vector, where there is one. VideoError when it cannot be used."""
    if video.embedding is None:
        return {}
    try:
        return {MEMBER: video.embedding.read()}
    except ValueError as error:
        raise VideoError("condition vector", f"{video.embedding.path.name}: {error}") from None
    except OSError as error:
        raise VideoError("condition vector", f"{video.embedding.path.name}: {error.strerror}") from None


def video_clips(video: Video, rules: ClipRules, rejected: list[Rejection], fingerprints: bool = True) -> Generator[Clip, None, None]:
    """The clips of a video, as `samples` gives them, before they are encoded."""
    with open_reel(video, rules) as reel:
        seconds = _seconds(video, reel)
        check_video(*reel.size, reel.fps, seconds, rules.filters)
        _check_narrow(reel.size, rules)
        cuts = find_cuts(reel.small()) if rules.scenes == "split" else []
        kept, before = 0, len(rejected)
        with closing(_cut(video, reel, rules, cuts, rejected, lambda: 0 < rules.max_clips <= kept)) as found:
            for window, npy in found:
                frames = npy_array(npy)
                moved = motion(frames)
                rejection = check_clip(window.position, frames, moved, rules.filters)
                if rejection:
                    rejected.append(rejection)
                elif not 0 < rules.max_clips <= kept:
                    kept += 1
                    shown = fingerprint(frames) if fingerprints else ""
                    yield Clip(window, npy, frames, Facts(window.fps, reel.size, reel.fps, seconds, moved, window.scene, shown))
        if not kept:
            raise _nothing(rules, rejected[before:])


def _seconds(video: Video, reel: Reel) -> float:
    """Length of what is wanted of a video. VideoError when it has none of it."""
    end = float(reel.times[-1]) + 1 / reel.fps
    start, stop = video.span or (0.0, end)
    if start >= end:
        raise VideoError("part outside the video", f"from {start:g} s on, the video has {end:.2f} s")
    return min(stop, end) - start


def _check_narrow(size: tuple[int, int], rules: ClipRules) -> None:
    """VideoError for a strip that would be scaled to more than any video may have before it is cropped."""
    scale = max(rules.size[0] / size[0], rules.size[1] / size[1])
    if rules.resize not in ("crop", "square", "stretch") and size[0] * size[1] * scale**2 > rules.filters.max_pixels:
        raise VideoError("too narrow", f"{size[1]}x{size[0]} would have to be scaled by {scale:.3g}; --resize crop does not")


def _nothing(rules: ClipRules, rejected: list[Rejection]) -> VideoError:
    """Why a video gave no clip."""
    if rejected:
        reason, count = Counter(rejection.reason for rejection in rejected).most_common(1)[0]
        return VideoError(reason, f"{count} of {len(rejected)} clips, no clip is left")
    wanted = (rules.clip_length or rules.min_frames) * rules.frame_stride
    remedy = "; --on-short pad repeats the last one" if rules.clip_length else ""
    return VideoError("too short", f"fewer than {wanted} frames{' at the target rate' if rules.fps else ''}{remedy}")


def _cut(
    video: Video, reel: Reel, rules: ClipRules, cuts: list[int], rejected: list[Rejection], enough: Callable[[], bool]
) -> Generator[tuple[Window, bytes], None, None]:
    """The clips (npy) that the rules plan for a video. A file may end a little before its packets promise: the plan is then made again."""
    times, done = reel.times, 0
    while True:
        windows = plan(times, reel.fps, rules, video.span, cuts)[done:]
        longest = max((len(window.numbers) for window in windows), default=0)
        if longest * rules.size[0] * rules.size[1] * 3 > MAX_CLIP_BYTES:
            raise VideoError("too long", f"{longest} frames in one clip: give a --clip-length")
        pass_ = _Pass(reel, windows, len(times), enough)
        with closing(pass_.clips(rules, whole=video.span is None)) as found:
            for window, npy in found:
                done += 1
                yield window, npy
        if pass_.seen >= len(times) or not pass_.waiting or enough():
            rejected += [] if enough() else short_scenes(times, reel.fps, rules, video.span, cuts)
            return
        times = times[: pass_.seen]


class _Pass:
    """One pass through the frames of a video."""

    def __init__(self, reel: Reel, windows: list[Window], frames: int, enough: Callable[[], bool]) -> None:
        self.reel, self.enough = reel, enough
        self.seen = 0
        """Frames that have come."""
        self.waiting = deque(windows)
        self.needed = np.zeros(frames, dtype=bool)
        for window in windows:
            self.needed[window.numbers] = True

    def clips(self, rules: ClipRules, whole: bool) -> Generator[tuple[Window, bytes], None, None]:
        """Each window with the npy file of its frames, as soon as they are there.

        `whole`: go on to the end of the video after the last of them, for only the end shows that a file is whole.
        """
        ready: dict[int, np.ndarray] = {}
        with closing(self.reel.read(self._wanted)) as native:
            numbers = np.flatnonzero(self.needed).tolist()
            source = native if whole else islice(native, len(numbers))
            for frame, number in zip(_resized(source, rules), numbers, strict=False):
                ready[number] = frame
                while self.waiting and self.waiting[0].numbers[-1] <= number:
                    window = self.waiting.popleft()
                    npy = npy_bytes([ready[wanted] for wanted in window.numbers.tolist()])
                    first = self.waiting[0].numbers[0] if self.waiting else number + 1
                    ready = {kept: frame for kept, frame in ready.items() if kept >= first}
                    yield window, npy

    def _wanted(self, number: int) -> bool:
        self.seen = number + 1
        return number < len(self.needed) and bool(self.needed[number]) and not self.enough()


def _resized(frames: Iterable[np.ndarray], rules: ClipRules) -> Iterator[np.ndarray]:
    """Frames (h, w, 3), cropped and resized, a few of them at a time."""
    held, buffer = 0, np.empty(0, np.uint8)
    for frame in frames:
        part = trim(frame, rules.size, rules.resize, rules.centre)
        if buffer.shape[1:] != part.shape:
            buffer = np.empty((max(1, TOGETHER // part.nbytes), *part.shape), np.uint8)  # one for all: memory that is new is slow
        buffer[held] = part
        held += 1
        if held == len(buffer):
            yield from _fitted(buffer, rules)
            held = 0
    if held:
        yield from _fitted(buffer[:held], rules)


def _fitted(buffer: np.ndarray, rules: ClipRules) -> np.ndarray:
    frames = fit(buffer, rules.size, rules.resize, antialias=rules.antialias, centre=rules.centre)
    return frames.copy() if np.may_share_memory(frames, buffer) else frames


def _sample(video: Video, clip: Clip, rules: ClipRules, class_name: str | None, vector: dict[str, bytes]) -> Sample:
    window, frames = clip.window, clip.frames
    if rules.codec == "npy":
        members, sums = {"npy": clip.npy}, sums_text(frames)
    else:
        gop = min(len(frames), MP4_GOP) if not rules.clip_length else len(frames)
        members, sums = {"mp4": encode_mp4(frames, clip.facts.fps, crf=MP4_CRF, gop=gop)}, ""
    members["json"] = dump_json(_card(video, clip, rules, class_name))
    if class_name is not None:
        members["cls"] = str(video.label).encode()
    if video.caption:
        members["txt"] = video.caption.encode()
    return Sample(f"{video.key}_{window.position:06d}", members | vector, len(frames), video.label, sums)


def _card(video: Video, clip: Clip, rules: ClipRules, class_name: str | None) -> dict[str, object]:
    """What the json member of a sample says."""
    window, facts = clip.window, clip.facts
    return {
        "source": video.name,
        "span": [int(window.numbers[0]), window.stop],
        "seconds": [round(second, 4) for second in window.seconds],
        "frame_stride": rules.frame_stride,
        "padded_frames": window.padded,
        "fps": facts.fps,
        "source_fps": round(facts.source_fps, 4),
        "source_size": facts.source_size,
        "scene": facts.scene,
        "motion": round(facts.motion, 5),
        "class": class_name,
        "caption": video.caption or None,
    }
