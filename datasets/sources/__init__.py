"""Layouts of videos on disk -> one list of videos.

A layout is a small class with the attributes and methods of `datasets.sources.base.Source`:

    class SquaresSource:
        name = "Squares"                                  # the value of --dataset-name
        summary = "files square_<number>.mp4 in one folder"
        kind = "videos"                                   # or "frames": folders of pictures
        honours = frozenset()                             # of fold, split_lists and captions, those that it uses

        def matches(self, root, options):                 # surely this layout? Looks at few files: `peek`
            videos = peek(root, VIDEO_SUFFIXES, options.exclude)
            return bool(videos) and all(path.name.startswith("square_") for path in videos)

        def list(self, root, options):                    # all videos, in a fixed order
            paths = walk(root, VIDEO_SUFFIXES, options.exclude)
            return Listing([Video(path, relative(path, root)) for path in paths])

To add one, write the class in a file of this folder and put it into `SOURCES` below, before those that match more than it does.
A video's `name` is its identity: sample keys, the order in the shards and splits by share follow from it, so it must not depend on
where the folder lies or on what else is in it. `split` says which split the data set puts it in, `group` which videos must stay
together in a split (clips of one recording). Choosing the split, the order, captions by `--captions`, clips, shards and the report
are the same for all layouts. What is there and cannot be used goes into `Listing.rejected`, what a list names and is not there into
`Listing.missing`; a folder that is of another layout is a `UserError`.
"""

import hashlib
from pathlib import Path

from datasets.shards import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from datasets.sources.base import Listing, Source, SourceOptions, with_embeddings
from datasets.sources.filters import filtered
from datasets.sources.folders import FolderSource, FramesSource, ImagesSource
from datasets.sources.frame_sets import SkyTimelapseSource, TaiChiSource
from datasets.sources.manifest import ManifestSource
from datasets.sources.splits import select
from datasets.sources.ucf101 import UCF101Source
from datasets.sources.video_sets import CLEVRERSource, MovingMNISTSource
from datasets.sources.webdataset import WebDatasetSource
from utils.errors import UserError
from utils.rng import derive_seed

_ALL: tuple[Source, ...] = (
    UCF101Source(),
    SkyTimelapseSource(),
    TaiChiSource(),
    MovingMNISTSource(),
    CLEVRERSource(),
    ManifestSource(),
    WebDatasetSource(),
    FolderSource(),
    FramesSource(),
    ImagesSource(),
)
SOURCES: dict[str, Source] = {source.name: source for source in _ALL}
"""Name of a layout -> the layout; `detect` asks them in this order."""


def detect(root: Path, exclude: Path | None = None) -> str:
    """Name of the first layout that the folder or file surely is of; `folder` when it is of none."""
    options = SourceOptions(exclude=exclude)
    return next((name for name, source in SOURCES.items() if source.matches(root, options)), FolderSource.name)


def list_videos(root: Path, name: str, options: SourceOptions, seed: int) -> Listing:
    """The videos of a source in the order in which they are sharded: by a hash of their name, so that any part of the set is mixed.

    UserError, one line, for a root that is missing, of another layout or holds none, and for an option that the layout has no use for.
    """
    source = SOURCES.get(name)
    if source is None:
        raise UserError(f"--dataset-name {name} is none of {', '.join(SOURCES)}")
    _check(root, source, options)
    listing = source.list(root, options)
    if options.filter is not None and listing.videos:
        listing = filtered(listing, options.filter, root)
    videos = select(listing.videos, options, root)
    if not videos:
        raise _nothing(root, source, options, listing)
    salt = f"{derive_seed(seed, 'data/shard-order'):016x}/"
    videos = with_embeddings(videos, root)
    videos = sorted(videos, key=lambda video: (hashlib.sha256((salt + video.key).encode()).digest(), video.name))
    return Listing(videos, listing.classes, listing.missing, listing.rejected)


def _check(root: Path, source: Source, options: SourceOptions) -> None:
    if not root.exists():
        raise UserError(f"no video folder at {root}: it does not exist")
    if not root.is_dir() and not source.matches(root, options):
        raise UserError(f"no video folder at {root}: it is a file; give the folder, a manifest ({ManifestSource.endings}) or a .tar")
    given = {"fold": options.fold != 1, "split_lists": options.split_lists is not None, "captions": options.captions is not None}
    for option in (option for option, is_given in given.items() if is_given and option not in source.honours):
        users = ", ".join(other.name for other in SOURCES.values() if option in other.honours)
        raise UserError(f"--{option.replace('_', '-')} means nothing to the layout {source.name}: it is for {users}")


def _nothing(root: Path, source: Source, options: SourceOptions, listing: Listing) -> UserError:
    if listing.videos and options.val_fraction:
        groups = len({video.split_group for video in listing.videos})
        share = f"--val-fraction {options.val_fraction:g}"
        return UserError(f"{share} leaves no video of {root} for --split {options.split}: {groups} groups of videos are to be parted")
    kinds, suffixes = ("pictures", IMAGE_SUFFIXES) if source.kind == "frames" else ("videos", VIDEO_SUFFIXES)
    endings = " ".join(sorted(suffix[1:] for suffix in suffixes))
    problem = next((f"; {name}: {reason}, {detail}" for name, reason, detail in listing.rejected), "")
    gone = f"; {len(listing.missing)} that are listed are not there" if listing.missing else ""
    return UserError(f"{root} holds no {kinds} for split {options.split} (looked for files ending in {endings}){gone}{problem}")
