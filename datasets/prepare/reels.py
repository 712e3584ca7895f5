"""A source video opened for reading, whatever it is: a file, a file inside a tar, or pictures in a folder."""

import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from datasets.prepare.scenes import shrink, small_frames
from datasets.prepare.windows import ClipRules
from datasets.sources.base import Video
from datasets.transforms import rgb_pixels
from datasets.video import VideoError, VideoInfo, decode, probe

COPY_BYTES = 1 << 22
Taken = TypeVar("Taken")


class Reel(Protocol):
    """An open source video."""

    size: tuple[int, int]
    """Height and width of the upright picture."""
    fps: float
    times: np.ndarray
    """Seconds of each frame after the first."""

    def read(self, wanted: Callable[[int], bool]) -> Generator[np.ndarray, None, None]:
        """The frames that are wanted, uint8 (h, w, 3), in order; all others are looked at as well, and damage raises VideoError."""

    def small(self) -> Iterator[np.ndarray]:
        """All frames, as small as `scenes.find_cuts` takes them."""


class FileReel:
    """A video file."""

    def __init__(self, path: Path, rules: ClipRules) -> None:
        self.info: VideoInfo = probe(path, rules.filters.max_pixels)
        sides = self.info.height, self.info.width
        self.size = (sides[1], sides[0]) if self.info.turns % 2 else sides
        self.fps, self.times = self.info.fps, self.info.times
        self.read = partial(decode, path, self.info, rules.decoder)
        self.small = partial(small_frames, path, self.info)


class PictureReel:
    """Pictures of one size."""

    def __init__(self, video: Video, rules: ClipRules) -> None:
        try:
            self.paths = video.frame_paths()
        except OSError as error:
            raise VideoError("not a readable video", f"{video.path.name}: {error.strerror}") from None
        if not self.paths:
            raise VideoError("no frames", "no pictures in the folder")
        self.max_pixels = rules.filters.max_pixels
        self.size = (0, 0)
        self.size = self._open(self.paths[0], lambda image: (image.height, image.width))
        self.fps = video.fps or rules.frames_fps
        self.times = np.arange(len(self.paths)) / self.fps

    def read(self, wanted: Callable[[int], bool]) -> Generator[np.ndarray, None, None]:
        """See Reel."""
        for number, path in enumerate(self.paths):
            if wanted(number):
                yield self._open(path, rgb_pixels)
            else:
                self._open(path, lambda image: image.size)

    def small(self) -> Iterator[np.ndarray]:
        """See Reel."""
        return shrink(self.read(lambda number: True))

    def _open(self, path: Path, take: Callable[[Image.Image], Taken]) -> Taken:
        """What `take` makes of a picture. VideoError for one that is damaged, too large or of another size than the first."""
        try:
            with Image.open(path) as image:
                if image.width * image.height > self.max_pixels:
                    raise VideoError("too large", f"{path.name} is {image.width}x{image.height}, more than {self.max_pixels} pixels")
                if self.size[0] and (image.height, image.width) != self.size:
                    first = f"{self.size[1]}x{self.size[0]}"
                    raise VideoError("frames differ in size", f"{path.name} is {image.width}x{image.height}, the first {first}")
                return take(image)
        except VideoError:
            raise
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise VideoError("damaged", f"{path.name}: {str(error).splitlines()[0][:200]}") from None


@contextmanager
def open_reel(video: Video, rules: ClipRules) -> Iterator[Reel]:
    """Opens a source video. VideoError when it cannot be used."""
    if video.is_frames:
        yield PictureReel(video, rules)
    elif video.member is None:
        yield FileReel(video.path, rules)
    else:
        with tempfile.TemporaryDirectory() as folder:
            # The name stands in messages, so it is the video's own; the folder keeps it apart.
            path = Path(folder, Path(video.name).name[-100:])
            _copy_member(video.path, *video.member, path)
            yield FileReel(path, rules)


def _copy_member(tar: Path, offset: int, size: int, path: Path) -> None:
    """Writes `size` bytes of a tar from `offset` on to a file of their own."""
    try:
        source = tar.open("rb")
    except OSError as error:
        raise VideoError("not a readable video", f"{tar.name}: {error.strerror}") from None
    with source, path.open("wb") as copy:
        source.seek(offset)
        while size and (data := source.read(min(size, COPY_BYTES))):
            copy.write(data)
            size -= len(data)
    if size:
        raise VideoError("truncated", f"{tar.name} ends {size} bytes before the video does")
