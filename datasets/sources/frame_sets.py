"""SkyTimelapse and TaiChi-HD as pictures: splits, then videos (or recordings of several clips), then frames."""

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from datasets.shards import IMAGE_SUFFIXES
from datasets.sources.base import Listing, SourceOptions, Video, peek_frames, relative, walk
from datasets.sources.splits import folder_split
from utils.errors import UserError

FLAT_FRAME = re.compile(r"(?P<video>.+)_(?P<number>[0-9]+)\.[^.]+")
SKY_CLIP = re.compile(r"(?P<recording>[\w-]{11})_[0-9]+", re.ASCII)
TAICHI_CLIP = re.compile(r"(?P<recording>[^#]+)#[0-9]+#[0-9]+(?:\.mp4)?")


class _FrameSet(ABC):
    """What both share: the pictures of a folder are one video; those directly in a split's folder are <video>_<number>.png."""

    name: str
    shape: str
    """The layout in words."""
    levels: tuple[int, ...]
    """How many folders a video may be deep, below that of its split."""
    kind: Literal["videos", "frames"] = "frames"
    honours: frozenset[str] = frozenset()

    @abstractmethod
    def group(self, parts: Sequence[str]) -> str:
        """The recording that a video was cut from, of the folder names below the split."""

    def list(self, root: Path, options: SourceOptions) -> Listing:
        """All videos in natural order; UserError for pictures that lie deeper than the layout has folders."""
        videos: dict[str, Video] = {}
        for folder, names in by_folder(walk(root, IMAGE_SUFFIXES, options.exclude)).items():
            split, parts = split_and_parts(folder, root)
            if parts and len(parts) not in self.levels:
                raise UserError(f"{folder} holds pictures where {self.name} has none: it is {self.shape}; try --dataset-name frames")
            if parts:
                found = [Video(folder, relative(folder, root), is_frames=True, group=self.group(parts), split=split)]
            else:
                start = "" if folder == root else f"{relative(folder, root)}/"
                found = [
                    Video(folder, start + video, is_frames=True, group=self.group([video]), split=split, frames=frames)
                    for video, frames in flat_videos(folder, names, self.name).items()
                ]
            for video in found:
                if video.name in videos:
                    raise UserError(f"{self.name}'s {video.name} is there twice: as a folder and as pictures beside it; keep one")
                videos[video.name] = video
        outside = [video for video in videos.values() if not video.split]
        if outside and len(outside) < len(videos):
            raise UserError(f"{root / outside[0].name} is beside the folders of {self.name}'s splits: move it away or into one of them")
        return Listing([*videos.values()])


class SkyTimelapseSource(_FrameSet):
    """SkyTimelapse: split/video/frames, or as released split/recording/video/frames; splits train and test, or train and val.

    Pictures directly in a split's folder are taken too, as TaiChi's.
    """

    name = "SkyTimelapse"
    summary = "train and test (or val) folders of picture folders, video/frame or recording/video/frame"
    shape = "split/video/frame or split/recording/video/frame"
    levels = (1, 2)

    def matches(self, root: Path, options: SourceOptions) -> bool:
        """Called sky or with sky_train inside; or two levels where each video is named after its recording."""
        places = [split_and_parts(folder, root) for folder in by_folder(peek_frames(root, options.exclude))]
        if not places or not all(len(parts) in self.levels or (split and not parts) for split, parts in places):
            return False
        named = re.fullmatch(r"sky(?:[ _-]?time[ _-]?lapse)?", root.resolve().name, re.IGNORECASE)
        inside = any((root / f"sky_{split}").is_dir() for split in ("train", "test", "val"))
        return bool(named) or inside or all(len(parts) == 2 and parts[1].startswith(f"{parts[0]}_") for _, parts in places)

    def group(self, parts: Sequence[str]) -> str:
        """The folder of the recording; where there is none, the 11 characters before _<number>."""
        found = SKY_CLIP.fullmatch(parts[-1])
        return parts[0] if len(parts) == 2 or not found else found["recording"]


class TaiChiSource(_FrameSet):
    """TaiChi-HD: split/video/frames or split/<video>_<number>.png; the videos are called <recording>#<first>#<last>.mp4."""

    name = "TaiChi"
    summary = "train and test folders of picture folders, or of pictures <video>_<number>.png"
    shape = "split/video/frame or split/<video>_<number>.png"
    levels = (1,)

    def matches(self, root: Path, options: SourceOptions) -> bool:
        """Called taichi, or with folders named as the release names its videos."""
        places = [split_and_parts(folder, root) for folder in by_folder(peek_frames(root, options.exclude))]
        if not places or not all(len(parts) <= 1 for _, parts in places):
            return False
        named = re.fullmatch(r"tai[ _-]?chi(?:[ _-]?hd)?", root.resolve().name, re.IGNORECASE)
        return bool(named) or all(parts and TAICHI_CLIP.fullmatch(parts[0]) for _, parts in places)

    def group(self, parts: Sequence[str]) -> str:
        """What stands before the first # of the video's name."""
        return parts[-1].partition("#")[0]


def by_folder(paths: list[Path]) -> dict[Path, list[str]]:
    """Folder -> names of its files, both in the order of the paths."""
    folders = defaultdict(list)
    for path in paths:
        folders[path.parent].append(path.name)
    return dict(folders)


def flat_videos(folder: Path, names: Sequence[str], layout: str) -> dict[str, tuple[str, ...]]:
    """Video -> its pictures in order, of pictures <video>_<number>.png in one folder. UserError for another name."""
    videos = defaultdict(list)
    for name in names:
        found = FLAT_FRAME.fullmatch(name)
        if not found:
            raise UserError(f"{folder / name} is in no video folder and is not named <video>_<number> as a frame of {layout}")
        videos[found["video"]].append(name)
    return {video: tuple(frames) for video, frames in videos.items()}


def split_and_parts(folder: Path, root: Path) -> tuple[str, list[str]]:
    """(split, folder names below it) of a folder below the root; the split is empty where the first folder is not one."""
    parts = [] if folder == root else relative(folder, root).split("/")
    split = folder_split(parts[0]) if parts else ""
    return split, parts[1:] if split else parts
