"""UCF-101: class folders of avi files, with the official train and test lists."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from datasets.shards import VIDEO_SUFFIXES
from datasets.sources.base import Listing, SourceOptions, Video, natural_key, peek, relative, walk
from utils.errors import UserError

UCF_NAME = re.compile(r"v_(?P<class>[A-Za-z0-9]+)_(?P<group>g[0-9]+)_c[0-9]+\.avi")
UCF_STEM = re.compile(r"v_(?P<class>[A-Za-z0-9]+)_(?P<group>g[0-9]+)_c[0-9]+(?![A-Za-z0-9])")
UCF_LISTS = "ucfTrainTestlist"


class UCF101Source:
    """Files v_<Class>_g<group>_c<clip>.avi in class folders, or in one folder: then their names tell the class.

    Class index: natural order of the classes, whatever the split. The clips of one group were cut from one recording: a split by
    share keeps them together, as the official lists do.
    """

    name = "UCF101"
    summary = "class folders of v_<Class>_g01_c01.avi, with ucfTrainTestlist in or beside the folder, or --split-lists"
    kind: Literal["videos", "frames"] = "videos"
    honours = frozenset({"fold", "split_lists"})

    def matches(self, root: Path, options: SourceOptions) -> bool:
        """All videos are named as in UCF-101."""
        videos = peek(root, VIDEO_SUFFIXES, options.exclude)
        return bool(videos) and all(UCF_NAME.fullmatch(path.name) for path in videos)

    def list(self, root: Path, options: SourceOptions) -> Listing:
        """All videos; where a split is wanted, each with the split that the lists of `options.fold` give it."""
        tree = next((root / name for name in ("UCF-101", "UCF101") if (root / name).is_dir()), root)
        videos, classes = _videos(tree, walk(tree, VIDEO_SUFFIXES, options.exclude))
        places = (tree / UCF_LISTS, root / UCF_LISTS, root.parent / UCF_LISTS)
        lists = options.split_lists or next((path for path in places if path.is_dir()), None)
        if options.split == "all" or (lists is None and options.val_fraction):
            return Listing(videos, classes)
        if lists is None or not lists.is_dir():
            remedy = "give --split-lists FOLDER or --val-fraction"
            raise UserError(f"--split {options.split} needs UCF-101's lists: no {lists or root / UCF_LISTS}; {remedy}")
        return _with_splits(videos, classes, lists, options)


def ucf_group(name: str) -> str:
    """The recording that a file, or a folder of its frames, was cut from, by the naming of UCF-101; empty for another name."""
    found = UCF_STEM.match(name)
    return f"{found['class']}/{found['group']}" if found else ""


def _videos(tree: Path, paths: list[Path]) -> tuple[list[Video], list[str]]:
    rows = []
    for path in paths:
        name, found = relative(path, tree), UCF_NAME.fullmatch(path.name)
        if "/" not in name and not found:
            raise UserError(f"{path} is in no class folder and is not named v_<Class>_g01_c01.avi as in UCF-101; try --dataset-name folder")
        cls = name.split("/")[0] if "/" in name else str(found and found["class"])
        rows.append((path, name, cls, f"{cls}/{found['group']}" if found else ""))
    classes = sorted({cls for _, _, cls, _ in rows}, key=natural_key)
    index = {cls: number for number, cls in enumerate(classes)}
    return [Video(path, name, index[cls], group=group) for path, name, cls, group in rows], classes


def _with_splits(videos: list[Video], classes: list[str], lists: Path, options: SourceOptions) -> Listing:
    wanted = "test" if options.split == "test" else "train"
    paths = {split: lists / f"{split}list{options.fold:02d}.txt" for split in ("train", "test")}
    listed = {split: _read_list(path) for split, path in paths.items() if split == wanted or path.is_file()}
    # By file name: it is unique in UCF-101, and the files may lie in one folder.
    split_of = {name.rpartition("/")[2]: split for split, names in listed.items() for name in names}
    here = {video.path.name for video in videos}
    missing = [name for name in listed[wanted] if name.rpartition("/")[2] not in here]
    return Listing([replace(video, split=split_of.get(video.path.name, "")) for video in videos], classes, missing)


def _read_list(path: Path) -> list[str]:
    try:
        return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: UCF-101 has folds 1 to 3; see --fold and --split-lists") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
