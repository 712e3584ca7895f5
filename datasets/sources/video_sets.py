"""Moving MNIST and CLEVRER as mp4 files, CLEVRER as pictures, too."""

import re
from pathlib import Path
from typing import Literal

from datasets.shards import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from datasets.sources.base import Listing, SourceOptions, Video, peek, relative, walk
from datasets.sources.captions import with_captions
from datasets.sources.splits import folder_split, split_off
from utils.errors import UserError

CLEVRER_NAME = re.compile(r"video_(?P<number>[0-9]{5})(?:\.mp4)?")
CLEVRER_FRAME = re.compile(r"frame[0-9]+\.[^.]+")
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
    """CLEVRER: video_00000 to video_19999 in any folders, as mp4 files or, where there are none, as folders of their frames.

    A folder named after a split decides which it is in, else the official numbers.
    """

    name = "CLEVRER"
    summary = (
        "video_<number>.mp4, or folders of their frames; splits by folders train, val, test, else by number (val from 10000, test 15000)"
    )
    kind: Literal["videos", "frames"] = "videos"
    honours: frozenset[str] = frozenset()

    def matches(self, root: Path, options: SourceOptions) -> bool:
        """All videos are named as in CLEVRER, their pictures frame<number>, and so are their folders: any other may be classes."""
        videos = peek(root, VIDEO_SUFFIXES, options.exclude)
        if not videos:
            pictures = peek(root, IMAGE_SUFFIXES, options.exclude)
            videos = list({path.parent for path in pictures if path.parent != root})
            if not pictures or not all(CLEVRER_FRAME.fullmatch(path.name) and path.parent != root for path in pictures):
                return False
        folders = {part for path in videos for part in relative(path, root).split("/")[:-1]}
        named = all(part.startswith("video_") or folder_split(part) for part in folders)
        return bool(videos) and named and all(CLEVRER_NAME.fullmatch(path.name) for path in videos)

    def list(self, root: Path, options: SourceOptions) -> Listing:
        """All videos in natural order. UserError for another name, and for a video that is there twice: it could be in two splits."""
        videos: dict[int, Video] = {}
        paths = walk(root, VIDEO_SUFFIXES, options.exclude)
        as_frames = not paths
        if as_frames:
            pictures = walk(root, IMAGE_SUFFIXES, options.exclude)
            paths = list(dict.fromkeys(path.parent for path in pictures if path.parent != root))
        for path in paths:
            found = CLEVRER_NAME.fullmatch(path.name)
            if not found:
                what = "a folder video_<5 digits> of frames" if as_frames else "named video_<5 digits>.mp4"
                raise UserError(f"{path} is not {what} as in CLEVRER; try --dataset-name {'frames' if as_frames else 'folder'}")
            number = int(found["number"])
            if number in videos:
                raise UserError(f"CLEVRER's {path.name} is there twice: {videos[number].path} and {path}; give one of the folders")
            name = relative(path, root)
            by_number = next(split for split, first in CLEVRER_FIRST if number >= first)
            by_folder = next(filter(None, map(folder_split, name.split("/")[:-1])), "")
            videos[number] = Video(path, name, split=by_folder or by_number, is_frames=as_frames)
        return Listing(list(videos.values()))
