"""`--filter`: a text file of patterns, one a line, that says which videos of a source are wanted."""

import fnmatch
import logging
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

from datasets.shards import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from datasets.sources.base import Listing, Video, printable
from utils.errors import UserError

MAX_FILTER_BYTES = 1 << 24
MAX_PATTERN = 1000
_log = logging.getLogger(__name__)


def read_patterns(path: Path) -> list[str]:
    """The lines of a filter file, each once. UserError when there are none, or the file cannot be read."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILTER_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--filter: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--filter: {path} is not UTF-8: save it as UTF-8") from None
    patterns = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not patterns:
        raise UserError(f"--filter: {path} is empty: it should have one pattern a line, such as *WallPushups*")
    if len(raw) > MAX_FILTER_BYTES or max(map(len, patterns)) > MAX_PATTERN:
        raise UserError(f"--filter: {path} is no list of patterns: at most {MAX_FILTER_BYTES >> 20} MiB, {MAX_PATTERN} characters a line")
    return patterns


def filtered(listing: Listing, path: Path, root: Path) -> Listing:
    """The videos that any pattern of a filter file matches, and their classes.

    A pattern is of a file name without its ending, with `*`, `?` and `[...]` as in a shell; with a slash in it, of the path below the
    source folder. One that matches nothing is named in the log and, as `missing`, in the report. UserError when none matches.
    """
    patterns = read_patterns(path)
    wanted = _Patterns(patterns)
    videos = [video for video in listing.videos if wanted.take(video)]
    unused = [pattern for pattern in patterns if pattern not in wanted.used]
    if not videos:
        raise UserError(f"--filter: no video of {root} matches a pattern of {path}, such as {printable(patterns[0])}")
    if unused:
        _log.warning("--filter: nothing in %s matches %s", root, ", ".join(map(printable, unused)))
    missing = [name for name in listing.missing if wanted.take(Video(root / name, name))]
    videos, classes = _own_classes(videos, listing.classes)
    return Listing(videos, classes, missing + [printable(pattern) for pattern in unused], listing.rejected)


class _Patterns:
    """Patterns by kind: plain names are looked up, the others tried one by one."""

    def __init__(self, patterns: list[str]) -> None:
        self.plain = {pattern for pattern in patterns if not re.search(r"[*?[]", pattern)}
        globs = [pattern for pattern in patterns if pattern not in self.plain]
        self.globs = [(pattern, "/" in pattern, re.compile(fnmatch.translate(pattern))) for pattern in globs]
        self.used: set[str] = set()

    def take(self, video: Video) -> bool:
        """Whether one matches; notes all that do."""
        name = PurePosixPath(video.name.rpartition("@")[0] if video.span else video.name)
        whole = [name, name.with_suffix("")] if name.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES else [name]
        paths, names = [str(path) for path in whole], [path.name for path in whole]
        found = self.plain & {*paths, *names}
        for pattern, is_path, glob in self.globs:
            if any(glob.match(text) for text in (paths if is_path else names)):
                found.add(pattern)
        self.used |= found
        return bool(found)


def _own_classes(videos: list[Video], classes: list[str]) -> tuple[list[Video], list[str]]:
    """The videos with the classes that are left; class numbers that are names keep their meaning."""
    if all(name.isdecimal() for name in classes):
        return videos, classes
    kept = sorted({video.label for video in videos})
    number = {label: place for place, label in enumerate(kept)}
    return [replace(video, label=number[video.label]) for video in videos], [classes[label] for label in kept]
