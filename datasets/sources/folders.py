"""Any folder of videos, of frame folders, and of pictures."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from datasets.shards import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from datasets.sources.base import Listing, SourceOptions, Video, natural_key, peek, peek_frames, relative, walk
from datasets.sources.captions import with_captions
from datasets.sources.splits import split_off
from datasets.sources.ucf101 import ucf_group

IMAGES = "images"


class FolderSource:
    """Videos anywhere below a folder. The first sub-folder is the class when all videos are in sub-folders.

    Folders train, val, test at the top are splits, and classes begin below them. `<name>.txt` beside a video is its caption.
    """

    name = "folder"
    summary = "any videos; the first sub-folder is the class when all are in sub-folders (below train, val, test, if there are)"
    kind: Literal["videos", "frames"] = "videos"
    honours = frozenset({"captions"})

    def matches(self, root: Path, options: SourceOptions) -> bool:
        """There are videos."""
        return bool(peek(root, VIDEO_SUFFIXES, options.exclude))

    def list(self, root: Path, options: SourceOptions) -> Listing:
        """All videos in natural order."""
        found = labelled(root, walk(root, VIDEO_SUFFIXES, options.exclude), is_frames=False)
        return Listing(with_captions(found.videos, root, options), found.classes)


class FramesSource:
    """Folders of pictures, each a video. Classes and splits as for videos."""

    name = "frames"
    summary = "a folder of picture folders, each a video; classes and splits as in folder"
    kind: Literal["videos", "frames"] = "frames"
    honours = frozenset({"captions"})

    def matches(self, root: Path, options: SourceOptions) -> bool:
        """There are pictures and no videos."""
        return bool(peek_frames(root, options.exclude))

    def list(self, root: Path, options: SourceOptions) -> Listing:
        """All folders that hold pictures; the root itself only where no other does."""
        folders = dict.fromkeys(path.parent for path in walk(root, IMAGE_SUFFIXES, options.exclude))
        found = labelled(root, [folder for folder in folders if folder != root] or list(folders), is_frames=True)
        return Listing(with_captions(found.videos, root, options) if options.captions else found.videos, found.classes)


class ImagesSource:
    """Pictures anywhere below a folder, each a clip of one frame. Classes, splits and captions as for videos.

    Never detected: a folder of pictures may as well be one video.
    """

    name = IMAGES
    summary = "a folder of pictures, each a clip of one frame; classes and splits as in folder; has to be asked for"
    kind: Literal["videos", "frames"] = "frames"
    honours = frozenset({"captions"})

    def matches(self, root: Path, options: SourceOptions) -> bool:
        """No."""
        return False

    def list(self, root: Path, options: SourceOptions) -> Listing:
        """All pictures in natural order."""
        found = labelled(root, walk(root, IMAGE_SUFFIXES, options.exclude), is_frames=False)
        videos = with_captions(found.videos, root, options)
        return Listing(
            [replace(video, path=video.path.parent, is_frames=True, frames=(video.path.name,)) for video in videos], found.classes
        )


def labelled(root: Path, paths: list[Path], is_frames: bool) -> Listing:
    """Videos of the paths, with splits and classes by their folders. Class numbers: natural order, whatever the split.

    Clips of UCF-101 are often parts of other collections, and copied to other formats: their groups stay together here too.
    """
    names = [relative(path, root) for path in paths]
    parts = split_off(names)
    has_classes = bool(parts) and all("/" in rest for _, rest in parts)
    firsts = [rest.split("/")[0] if has_classes else "" for _, rest in parts]
    classes = sorted(set(firsts), key=natural_key) if has_classes else []
    index = {name: number for number, name in enumerate(classes)}
    rows = zip(paths, names, parts, firsts, strict=True)
    videos = [
        Video(path, name, index.get(first, 0), is_frames=is_frames, split=split, group=ucf_group(path.name))
        for path, name, (split, _), first in rows
    ]
    return Listing(videos, classes)
