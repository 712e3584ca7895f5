"""Folders as a data set has them, of files that only have names, and their listings."""

from collections.abc import Sequence
from pathlib import Path

from datasets.sources import list_videos
from datasets.sources.base import Listing, SourceOptions, natural_key


def touch(root: Path, names: Sequence[str]) -> Path:
    """Files that only have names: listing must not need more."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def listed(root: Path, name: str, **options: object) -> Listing:
    """A listing in order of the names."""
    found = list_videos(root, name, SourceOptions(**options), seed=0)  # type: ignore[arg-type]
    return Listing(sorted(found.videos, key=lambda video: natural_key(video.name)), found.classes, found.missing, found.rejected)


def names(root: Path, name: str, **options: object) -> list[str]:
    return [video.name for video in listed(root, name, **options).videos]


def frames(*folders: str, count: int = 2) -> list[str]:
    return [f"{folder}/{number:05d}.png" for folder in folders for number in range(count)]


def ucf(root: Path) -> list[str]:
    files = [f"{c}/v_{c}_g{g:02d}_c{n:02d}.avi" for c in ("Archery", "Biking") for g in range(1, 9) for n in (1, 2)]
    touch(root, files)
    return files
