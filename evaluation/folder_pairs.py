"""Videos and their reconstructions in two folders, matched by their names."""

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.clips import joined
from evaluation.reconstruction_config import MADE, ORIGINALS
from evaluation.videos import FolderVideos, open_videos
from launch.env import Env
from utils.errors import ConfigError, UserError

SHOWN = 50
"""Mismatches that are printed; of more the number is told."""

Shape = tuple[int, int, int]
"""Frames, height and width."""
Match = tuple[int, int]
"""Numbers of an original and of its reconstruction in their folders."""


class FolderPairs:
    """Each original with its reconstruction: a video of the frames of both, those of the reconstruction behind the others."""

    made = False

    def __init__(self, originals: FolderVideos, reconstructions: FolderVideos, matches: list[Match], shapes: list[Shape]) -> None:
        """`shapes`: of each of the two videos of a pair."""
        self.originals, self.reconstructions, self.matches, self.shapes = originals, reconstructions, matches, shapes

    def __len__(self) -> int:
        return len(self.matches)

    def name(self, number: int) -> str:
        return self.originals.name(self.matches[number][0])

    def is_pictures(self, number: int) -> bool:
        return False

    def total(self, number: int) -> int:
        """Frames of one of the two."""
        return self.shapes[number][0]

    def read(self, number: int, picks: Sequence[int]) -> np.ndarray:
        """Frames of those numbers of the original, then those of the reconstruction."""
        first, second = self.matches[number]
        return np.concatenate([self.originals.read(first, picks), self.reconstructions.read(second, picks)])

    def digest(self, number: int) -> str:
        first, second = self.matches[number]
        text = f"{self.originals.digest(first)} {self.reconstructions.digest(second)}"
        return hashlib.sha256(text.encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        return {**self.originals.identity(), "reconstructions": self.reconstructions.root.name}


def open_pairs(originals: str, reconstructions: str, env: Env) -> FolderPairs:
    """Videos of two folders. To be called by all ranks.

    UserError where the folders do not hold the same videos in the same shapes; what is missing, left over or of another shape is
    printed, a line each.
    """
    first, second = open_videos(originals, ORIGINALS), open_videos(reconstructions, MADE)
    if not isinstance(first, FolderVideos) or not isinstance(second, FolderVideos):
        raise ConfigError(f"{MADE}: reconstructions are matched by name, of two folders of videos; one of these is a shard set")
    one, two = _named(first), _named(second)
    wrong = [f"{first.videos[number].name} has no reconstruction" for name, number in one.items() if name not in two]
    wrong += [f"{second.videos[number].name} has no original" for name, number in two.items() if name not in one]
    matches = [(number, two[name]) for name, number in one.items() if name in two]
    shapes = joined([_shapes(first, second, match) for match in matches[env.rank :: env.world_size]], len(matches), env)
    for match, (own, other) in zip(matches, shapes, strict=True):
        if own != other:
            wrong.append(f"{first.videos[match[0]].name} is {_told(own)}, its reconstruction {_told(other)}")
    if wrong:
        shown = wrong[:SHOWN] + [f"and {len(wrong) - SHOWN} more"] * (len(wrong) > SHOWN)
        for line in shown if env.is_main else []:
            print(f"mismatch: {line}", file=sys.stderr, flush=True)
        raise UserError(f"{MADE} {reconstructions}: {len(wrong)} videos do not match those of {ORIGINALS} {originals} (above)")
    return FolderPairs(first, second, matches, [own for own, _ in shapes])


def _named(videos: FolderVideos) -> dict[str, int]:
    """Numbers by path below the folder; without its suffix, unless videos there differ in that alone."""
    stems = [video.name if video.is_frames else str(Path(video.name).with_suffix("")) for video in videos.videos]
    counts = Counter(stems)
    names = [stem if counts[stem] == 1 else video.name for stem, video in zip(stems, videos.videos, strict=True)]
    return {name: number for number, name in enumerate(names)}


def _shapes(originals: FolderVideos, reconstructions: FolderVideos, match: Match) -> tuple[Shape, Shape]:
    """Of both videos of a pair."""
    return _shape(originals, match[0]), _shape(reconstructions, match[1])


def _shape(videos: FolderVideos, number: int) -> Shape:
    height, width = videos.read(number, [0]).shape[1:3]
    return videos.total(number), height, width


def _told(shape: Shape) -> str:
    return "{} frames of {} x {}".format(*shape)
