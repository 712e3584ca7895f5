"""Train, val and test: those that the data set has, and a share held out by group, never by clip."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from datasets.sources.base import SourceOptions, Video, hash16, printable
from utils.errors import UserError

SPLITS = ("all", "train", "val", "test")
_FOLDER = re.compile(
    r"(?:(?:sky|video|taichi)[_-])?(?:(?P<train>train|training)|(?P<val>val|valid|validation)|(?P<test>test|testing))"
    r"(?:[_-](?:vid|videos|frames))?",
    re.IGNORECASE,
)
_log = logging.getLogger(__name__)


def folder_split(folder: str) -> str:
    """train, val or test for the folder name of a split (train, sky_train, video_validation, val_vid, ...), else an empty string.

    The whole name counts: a video whose name has `val` in it is in no split for that.
    """
    found = _FOLDER.fullmatch(folder)
    return (found.lastgroup or "") if found else ""


def split_off(names: Sequence[str]) -> list[tuple[str, str]]:
    """(split, rest of the path) of each relative path where all lie in folders of splits; else no split, and the paths as they are."""
    tops = {name.partition("/")[0] if "/" in name else "" for name in names}
    if all(folder_split(top) for top in tops):
        return [(folder_split(name.partition("/")[0]), name.partition("/")[2]) for name in names]
    return [("", name) for name in names]


def held_out(video: Video, fraction: float) -> bool:
    """Whether a video belongs to the share that is held out: by a hash of its group, so that it stays when others are added."""
    return int(hash16(video.split_group), 16) / 2**64 < fraction


def select(videos: list[Video], options: SourceOptions, root: Path) -> list[Video]:
    """The videos of the wanted split.

    The data set's own splits count. `val_fraction` holds out a share of its train split as val; where it has no splits, of all
    videos, and val and test are then two names of that share. UserError for a split that is not to be had.
    """
    official = Counter(video.split for video in videos if video.split)
    wanted, fraction = options.split, options.val_fraction
    if wanted not in SPLITS:
        raise UserError(f"--split {wanted} is none of {', '.join(SPLITS)}")
    if wanted == "all":
        if fraction:
            raise UserError(f"--val-fraction {fraction:g} parts the videos in two: say which, --split train or --split val")
        if len(official) > 1:
            counts = ", ".join(f"{split} ({count})" for split, count in sorted(official.items()))
            _log.warning("%s: taking the splits %s together; --split takes one", root, counts)
        return videos
    if not official:
        if not fraction:
            raise UserError(f"--split {wanted}: {root} has no official split; say --val-fraction, the share of videos to hold out")
        return [video for video in videos if held_out(video, fraction) == (wanted != "train")]
    if outside := [video.name for video in videos if not video.split]:
        _log.warning("%s: %d videos are in no split and are left out, %s is one", root, len(outside), printable(outside[0]))
    if fraction and "val" in official:
        raise UserError(f"--val-fraction {fraction:g}: {root} has a val split of its own; leave the flag out")
    if fraction and wanted in ("train", "val"):
        return [video for video in videos if video.split == "train" and held_out(video, fraction) == (wanted == "val")]
    if wanted not in official:
        remedy = "; --val-fraction holds out a share of train as val" if wanted == "val" and "train" in official else ""
        raise UserError(f"--split {wanted}: {root} has {', '.join(sorted(official))}{remedy}")
    return [video for video in videos if video.split == wanted]
