"""Videos to be measured, of whichever form: files, folders of pictures, arrays, samples of sample.py, or a shard set."""

import functools
import hashlib
import json
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from datasets.config import DataConfig, open_shards
from datasets.mixture import Collection
from datasets.reader import ClipReader
from datasets.shards import IMAGE_SUFFIXES, INDEX, VIDEO_SUFFIXES
from datasets.sources.base import Video, relative, walk
from datasets.transforms import rgb_pixels
from datasets.video import VideoError, decode, probe
from utils.errors import UserError
from utils.files import sha256_file
from utils.media import gif_duration

OVERVIEWS = ("grid.mp4", "grid.gif", "strip.mp4")
"""Files beside samples that show several of them."""
_FORMS = (".npy", "", ".gif")
"""Of several files of one name the first is read: arrays are exact, "" are pictures and videos, a GIF has 256 colours."""


_HEADER = threading.Lock()
"""NumPy reads the header of an array by `ast`, which Python 3.11 may fail to do in two threads at once (recursion depth mismatch)."""


class VideoSet(Protocol):
    """Numbered videos of any lengths and sizes. Methods may be called from several threads, where the videos are not made."""

    made: bool
    """Whether networks make a video when it is read, which takes long, and is done as sample.py does it: in the main thread."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What errors call a video."""

    def is_pictures(self, number: int) -> bool:
        """Whether it is a folder of pictures."""

    def total(self, number: int) -> int:
        """How many frames it has. Raises UserError for one that cannot be read."""

    def read(self, number: int, picks: Sequence[int]) -> np.ndarray:
        """Frames of those numbers, ascending: uint8 (t, h, w, 3). Raises UserError where they are not all there."""

    def digest(self, number: int) -> str | None:
        """Names the content of a video, whatever it is called; None where nothing can say it without making the video."""

    def identity(self) -> dict[str, Any]:
        """Plain values that say which videos these are."""


def open_videos(path: str | Path, flag: str) -> VideoSet:
    """The videos of a folder, or the clips of a shard set (also of a URL). Raises UserError, which names the flag, where there are none."""
    if "://" in str(path):
        return ShardVideos(str(path))
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: no such folder")
    return ShardVideos(str(folder)) if (folder / INDEX).is_file() else FolderVideos(folder, flag)


class FolderVideos:
    """Every video file, every .npy array and every folder of pictures below a folder is a video; sorted by relative path.

    In a folder of sample.py's, the samples that its settings.json lists, whose rate says how many frames a GIF has. Arrays are
    (t, 3, h, w), numbers 0..255, as VIDM's release writes its samples.
    """

    made = False

    def __init__(self, root: Path, flag: str) -> None:
        self.root, self.flag = root, flag
        settings = sample_settings(root)
        fps = settings.get("fps")
        self._fps = float(fps) if isinstance(fps, int | float) and fps > 0 else None
        self._told = False
        listed = [sample["file"] for sample in settings.get("samples", [])]
        self.videos = [Video(root / name, name, is_frames=(root / name).is_dir()) for name in listed] or _videos_below(root)
        if not self.videos:
            raise UserError(f"{flag} {root} holds no videos: mp4, gif and other video files, .npy arrays and folders of pictures are read")

    def __len__(self) -> int:
        return len(self.videos)

    def name(self, number: int) -> str:
        return f"{self.flag} {self.videos[number].path}"

    def is_pictures(self, number: int) -> bool:
        return self.videos[number].is_frames

    def total(self, number: int) -> int:
        video = self.videos[number]
        with _one_line(self.name(number)):
            if video.is_frames:
                return len(video.frame_paths())
            if video.path.suffix.lower() == ".npy":
                return len(_array(video.path))
            if video.path.suffix.lower() == ".gif":
                return self._gif_total(number)
            return probe(video.path).frames

    def _gif_total(self, number: int) -> int:
        """Frames of a GIF. One that stores a single picture is noted, once, where no rate says how many frames that is."""
        frames, stored = _gif_frames(self.videos[number].path, self._fps)
        if stored == 1 and self._fps is None and not self._told:
            self._told = True
            print(
                f"note: {self.name(number)} stores one picture and counts as one frame: for how many it is shown only the settings.json of "
                "sample.py would say",
                file=sys.stderr,
                flush=True,
            )
        return len(frames)

    def read(self, number: int, picks: Sequence[int]) -> np.ndarray:
        with _one_line(self.name(number)):
            frames = _read(self.videos[number], list(picks), self._fps)
            if len(frames) != len(picks):
                raise ValueError(f"{len(frames)} of the {len(picks)} frames that are wanted of it decode")
            return np.stack(frames)

    def digest(self, number: int) -> str:
        """SHA-256 of the file, of a GIF also the rate that its frames were counted by; of a folder of pictures that of theirs."""
        video = self.videos[number]
        with _one_line(self.name(number)):
            if not video.is_frames:
                timed = self._fps is not None and video.path.suffix.lower() == ".gif"
                return sha256_file(video.path) + (f" at {self._fps:g} fps" if timed else "")
            return hashlib.sha256("".join(map(sha256_file, video.frame_paths())).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        return {"folder": self.root.name, "found": len(self)}


class ShardVideos:
    """The stored clips of a shard set."""

    made = False

    def __init__(self, root: str | Collection) -> None:
        """`root`: where the set is, or sets that are open already."""
        self.shards = root if isinstance(root, Collection) else open_shards(DataConfig(path=(root,)))
        if self.shards.is_latent:
            raise UserError(f"{self.shards.location} holds latents; give the shard set of the clips they were made of")
        self._lock = threading.Lock()
        self._reader = functools.lru_cache(maxsize=4)(functools.partial(ClipReader, self.shards))

    def __len__(self) -> int:
        return self.shards.num_samples

    def name(self, number: int) -> str:
        return self.shards.describe(number)

    def is_pictures(self, number: int) -> bool:
        return False

    def total(self, number: int) -> int:
        return int(self.shards.frames[number])

    def read(self, number: int, picks: Sequence[int]) -> np.ndarray:
        first, samples = picks[0], np.array([number])
        with self._lock:
            clip: np.ndarray = self._reader(picks[-1] - first + 1).read(samples, np.array([first]))[0]
        return clip[np.asarray(picks) - first]

    def digest(self, number: int) -> str:
        """The digest of the index, which holds those of all shards, and the number of the sample."""
        return f"{self.shards.digest}/{number}"

    def identity(self) -> dict[str, Any]:
        return {"dataset": self.shards.name, "dataset_digest": self.shards.digest, "found": len(self)}


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turns what reading a file raises into a UserError of one line, which names the video."""
    try:
        yield
    except (VideoError, OSError, ValueError, SyntaxError, EOFError, LookupError, struct.error, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} cannot be read: {reason[:200]}") from None


def sample_settings(folder: Path) -> dict[str, Any]:
    """What sample.py wrote beside its samples; empty where it is not there. UserError for another file of that name."""
    place = folder / "settings.json"
    if not place.is_file():
        return {}
    try:
        settings = dict(json.loads(place.read_text(encoding="utf-8")))
        ours = isinstance(settings.get("model", {}), dict) and all(str(sample["file"]) for sample in settings.get("samples", []))
    except (ValueError, TypeError, LookupError):
        ours = False
    if not ours:
        raise UserError(f"{place} is damaged, or not of sample.py: move it elsewhere, then all videos of the folder are taken")
    return settings


def _videos_below(root: Path) -> list[Video]:
    """Videos below a folder, sorted by relative path; one form of each.

    An array, pictures and a GIF beside one video file of their name are forms of it. Video files that share a name but for the suffix
    are several videos, and so is what lies beside them: nothing says of which it is a form.
    """
    files = [path for path in walk(root, VIDEO_SUFFIXES | {".npy"}) if path.name not in OVERVIEWS]
    holders = {path.parent for path in files}
    folders = dict.fromkeys(path.parent for path in walk(root, IMAGE_SUFFIXES))
    # Pictures beside videos are overviews of them.
    found = [Video(folder, relative(folder, root), is_frames=True) for folder in folders if folder not in holders]
    forms: dict[str, list[Video]] = {video.name: [video] for video in found}
    for video in sorted((Video(path, relative(path, root)) for path in files), key=_form):
        forms.setdefault(video.name.removesuffix(video.path.suffix), []).append(video)
    chosen = [video for same in forms.values() for video in (same if len(list(filter(_is_coded, same))) > 1 else same[:1])]
    return sorted(chosen, key=lambda video: video.name)


def _is_coded(video: Video) -> bool:
    """Whether it is a video file, and no array, GIF or folder of pictures."""
    return not video.is_frames and video.path.suffix.lower() not in (".npy", ".gif")


def _form(video: Video) -> int:
    suffix = video.path.suffix.lower()
    return _FORMS.index(suffix if suffix in _FORMS else "")


def _read(video: Video, picks: list[int], fps: float | None) -> list[np.ndarray]:
    """Frames (h, w, 3) of a video, those of the numbers that it has. `fps`: of GIFs, where it is known."""
    if video.is_frames:
        paths = video.frame_paths()
        return [_picture(paths[number]) for number in picks]
    suffix = video.path.suffix.lower()
    if suffix == ".npy":
        return list(_pixels(_array(video.path)[picks].transpose(0, 2, 3, 1)))
    if suffix == ".gif":
        frames, _ = _gif_frames(video.path, fps)
        return [frames[number] for number in picks]
    with closing(decode(video.path, probe(video.path), "pyav", set(picks).__contains__)) as decoded:
        return list(islice(decoded, len(picks)))


def _picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return rgb_pixels(image)


def _array(path: Path) -> np.ndarray:
    """An array on disk, of which only what is asked for is read. ValueError for one that is no video."""
    with _HEADER:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim != 4 or array.shape[1] != 3 or array.dtype.kind not in "fiu" or not array.size:
        raise ValueError(f"{array.dtype} {list(array.shape)}: (frames, 3, height, width), numbers 0..255, are wanted")
    return array


def _pixels(values: np.ndarray) -> np.ndarray:
    """Numbers 0..255 as uint8, rounded and clipped. ValueError for other ranges: pixels of [0, 1] would be black, and have a figure."""
    low, high = values.min(), values.max()
    unit = high <= 1 and bool((values != values.round()).any())
    if unit or not (low > -255 and high < 510):  # also where they are not numbers
        raise ValueError(f"pixels from {low:g} to {high:g}: numbers 0..255 are wanted")
    return values.astype(np.float64).round().clip(0, 255).astype(np.uint8)


def _gif_frames(path: Path, fps: float | None) -> tuple[list[np.ndarray], int]:
    """All frames of a GIF, and how many pictures it stores.

    Equal ones are often stored as one that is shown longer: it counts as often as a frame of that rate fits in, of an unknown rate as
    often as the shortest.
    """
    frames, shown = [], []
    with Image.open(path) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(rgb_pixels(image))
            shown.append(image.info.get("duration", 0))
    # No time is there where a player chooses it.
    one = min((time for time in shown if time), default=1) if fps is None else gif_duration(fps)
    return [frame for frame, time in zip(frames, shown, strict=True) for _ in range(max(1, round(time / one - 0.1)))], len(frames)
