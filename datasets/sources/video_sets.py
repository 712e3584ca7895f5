"""Moving MNIST and CLEVRER as mp4 files."""

import re
from pathlib import Path
from typing import Literal

from datasets.shards import VIDEO_SUFFIXES
from datasets.sources.base import Listing, SourceOptions, Video, peek, relative, walk
from datasets.sources.captions import with_captions
from datasets.sources.splits import folder_split, split_off
from utils.errors import UserError

CLEVRER_NAME = re.compile(r"video_(?P<number>[0-9]{5})\.mp4")
CLEVRER_FIRST = (("test", 15000), ("val", 10000), ("train", 0))
"""(split, its first video number): 10,000 videos for training, 5,000 each for validation and test."""
MNIST_CAPTIONS = ("captions.json", "captions.csv", "captions.txt")


class MovingMNISTSource:
    """Moving MNIST as video files, without classes, with captions where there are: captions.json, .csv or .txt, or <name>.txt files."""

    name = "MovingMNIST"
    summary = "a folder of videos, with captions from captions.json, .csv or .txt in it, or <name>.txt beside each"
    kind: Literal["videos", "frames"] = "videos"
    honours = frozenset({"captions"})

    def matches(self, root: Path, options: SourceOptions) -> bool:
        """All are mp4 files in the folder itself or those of its splits, and its name has mnist in it."""
        videos = peek(root, VIDEO_SUFFIXES, options.exclude)
        flat = all(path.suffix.lower() == ".mp4" and "/" not in rest for path, (_, rest) in zip(videos, _parts(videos, root), strict=True))
        return bool(videos) and flat and "mnist" in root.resolve().name.lower()

    def list(self, root: Path, options: SourceOptions) -> Listing:
        """All videos in natural order."""
        paths = walk(root, VIDEO_SUFFIXES, options.exclude)
        videos = [Video(path, relative(path, root), split=split) for path, (split, _) in zip(paths, _parts(paths, root), strict=True)]
        table = next((root / name for name in MNIST_CAPTIONS if (root / name).is_file()), None)
        return Listing(with_captions(videos, root, options, table))


def _parts(paths: list[Path], root: Path) -> list[tuple[str, str]]:
    return split_off([relative(path, root) for path in paths])


class CLEVRERSource:
    """CLEVRER: video_00000.mp4 to video_19999.mp4, in any folders. A folder named after a split decides, else the official numbers."""

    name = "CLEVRER"
    summary = "video_<number>.mp4 in any folders; splits by folders train, val, test, else by number (10000 and 15000 begin val and test)"
    kind: Literal["videos", "frames"] = "videos"
    honours: frozenset[str] = frozenset()

    def matches(self, root: Path, options: SourceOptions) -> bool:
        """All videos are named as in CLEVRER, and so are their folders: any other may be classes."""
        videos = peek(root, VIDEO_SUFFIXES, options.exclude)
        folders = {part for path in videos for part in relative(path, root).split("/")[:-1]}
        named = all(part.startswith("video_") or folder_split(part) for part in folders)
        return bool(videos) and named and all(CLEVRER_NAME.fullmatch(path.name) for path in videos)

    def list(self, root: Path, options: SourceOptions) -> Listing:
        """All videos in natural order. UserError for another name, and for a video that is there twice: it could be in two splits."""
        videos: dict[str, Video] = {}
        for path in walk(root, VIDEO_SUFFIXES, options.exclude):
            found = CLEVRER_NAME.fullmatch(path.name)
            if not found:
                raise UserError(f"{path} is not named video_<5 digits>.mp4 as in CLEVRER; try --dataset-name folder")
            if path.name in videos:
                raise UserError(f"CLEVRER's {path.name} is there twice: {videos[path.name].path} and {path}; give one of the folders")
            name = relative(path, root)
            by_number = next(split for split, first in CLEVRER_FIRST if int(found["number"]) >= first)
            by_folder = next(filter(None, map(folder_split, name.split("/")[:-1])), "")
            videos[path.name] = Video(path, name, split=by_folder or by_number)
        return Listing(list(videos.values()))
