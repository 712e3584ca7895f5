"""Folder layouts -> a list of videos with labels. A layout is one function (root, options) -> Listing; SOURCES names them.

To add one: write the function, add it to SOURCES. Its videos go through the same decoding, clips, shards and report as all others.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets.shards import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from utils.errors import UserError
from utils.rng import derive_seed

UCF_NAME = re.compile(r"v_[A-Za-z0-9]+_g\d+_c\d+\.avi$")
UCF_LISTS = "ucfTrainTestlist"


@dataclass(frozen=True)
class Video:
    """One source video: a file, or a folder of frames."""

    path: Path
    name: str
    """Path relative to the source root, with slashes: names the video for good."""
    label: int = 0
    caption: str = ""
    is_frames: bool = False

    @property
    def key(self) -> str:
        """16 hexadecimal digits of the name's hash: the video's part of a sample key."""
        return hashlib.sha256(self.name.encode(errors="surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True)
class Listing:
    """What a layout found."""

    videos: list[Video]
    classes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Names that a list of the data set mentions and the folder lacks."""


@dataclass(frozen=True)
class SourceOptions:
    """Which part of a data set is wanted."""

    split: str = "all"
    fold: int = 1
    split_lists: Path | None = None
    val_fraction: float = 0.0
    exclude: Path | None = None
    """A folder that is not looked into: where the shards go."""


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key that counts: a2 before a10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in re.split(r"(\d+)", text)] + [(2, 0, text)]


def walk(root: Path, suffixes: frozenset[str], exclude: Path | None = None) -> list[Path]:
    """Files under `root` with one of the suffixes, in natural order of their path; hidden names are passed over, links followed."""
    found, seen = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or (exclude is not None and real == os.path.realpath(exclude)):
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".") and Path(name).suffix.lower() in suffixes]
    return sorted(found, key=lambda path: natural_key(path.relative_to(root).as_posix()))


def list_folder(root: Path, options: SourceOptions) -> Listing:
    """Any folder of videos. The class is the first sub-folder; with files directly in the root there are no classes."""
    paths = walk(root, VIDEO_SUFFIXES, options.exclude)
    return _labelled(root, paths, is_frames=False)


def list_frames(root: Path, options: SourceOptions) -> Listing:
    """A folder of frame folders: each folder that holds pictures is a video. Class folders as in `list_folder`."""
    folders = dict.fromkeys(path.parent for path in walk(root, IMAGE_SUFFIXES, options.exclude))
    return _labelled(root, [folder for folder in folders if folder != root] or list(folders), is_frames=True)


def _labelled(root: Path, paths: list[Path], is_frames: bool) -> Listing:
    names = [path.relative_to(root).as_posix() for path in paths]
    has_classes = bool(names) and all("/" in name for name in names)
    classes = sorted({name.split("/")[0] for name in names}, key=natural_key) if has_classes else []
    index = {name: i for i, name in enumerate(classes)}
    videos = [
        Video(path, name, label=index.get(name.split("/")[0], 0), is_frames=is_frames) for path, name in zip(paths, names, strict=True)
    ]
    return Listing(videos, classes)


def list_ucf101(root: Path, options: SourceOptions) -> Listing:
    """UCF-101: class folders of avi files; `ucfTrainTestlist` inside, beside or given selects fold and split.

    Class index: natural order of the class folders, whatever the split.
    """
    lists = options.split_lists or next((path for path in (root / UCF_LISTS, root.parent / UCF_LISTS) if path.is_dir()), None)
    tree = next((root / name for name in ("UCF-101", "UCF101") if (root / name).is_dir()), root)
    found = list_folder(tree, SourceOptions(exclude=options.exclude))
    if options.split == "all" or options.val_fraction:
        return found
    if lists is None or not lists.is_dir():
        raise UserError(
            f"--split {options.split} needs UCF-101's lists: no {lists or root / UCF_LISTS}; give --split-lists FOLDER or --val-fraction"
        )
    path = lists / f"{options.split}list{options.fold:02d}.txt"
    if not path.is_file():
        raise UserError(f"{path} does not exist: UCF-101 has folds 1 to 3; see --fold and --split-lists")
    wanted = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    videos = {video.name: video for video in found.videos}
    return Listing([videos[name] for name in wanted if name in videos], found.classes, [name for name in wanted if name not in videos])


SOURCES: dict[str, Callable[[Path, SourceOptions], Listing]] = {"UCF101": list_ucf101, "folder": list_folder, "frames": list_frames}


def detect(root: Path, exclude: Path | None = None) -> str:
    """Name of the layout of a folder."""
    videos = walk(root, VIDEO_SUFFIXES, exclude)
    if any(UCF_NAME.match(path.name) and path.parent != root for path in videos) and all(UCF_NAME.match(path.name) for path in videos):
        return "UCF101"
    return "folder" if videos or not walk(root, IMAGE_SUFFIXES, exclude) else "frames"


def list_videos(root: Path, name: str, options: SourceOptions, seed: int) -> Listing:
    """The videos of a folder in the order in which they are sharded: by a hash of their name, so that any part of the set is mixed.

    UserError for a folder that is missing or holds none.
    """
    if not root.is_dir():
        raise UserError(f"no video folder at {root}" + (": it is a file, give the folder" if root.exists() else ": it does not exist"))
    listing = SOURCES[name](root, options)
    videos = listing.videos
    if options.split != "all" and (options.val_fraction or name != "UCF101"):
        if not options.val_fraction:
            raise UserError(f"--split {options.split}: {root} has no official split; say --val-fraction, the share of videos to hold out")
        videos = [video for video in videos if (_share(video) < options.val_fraction) == (options.split == "test")]
    if not videos:
        kinds = "pictures" if name == "frames" else "videos"
        suffixes = " ".join(sorted(suffix[1:] for suffix in (IMAGE_SUFFIXES if name == "frames" else VIDEO_SUFFIXES)))
        raise UserError(f"{root} holds no {kinds} for split {options.split} (looked for files ending in {suffixes})")
    salt = f"{derive_seed(seed, 'data/shard-order'):016x}/"
    videos = sorted(videos, key=lambda video: (hashlib.sha256((salt + video.key).encode()).digest(), video.name))
    return Listing(videos, listing.classes, listing.missing)


def _share(video: Video) -> float:
    """A number in [0, 1) that depends on the video's name alone: a split by it is stable when videos are added."""
    return int(video.key, 16) / 2**64
