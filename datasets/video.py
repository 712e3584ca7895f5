"""Decoding: what a file holds, and its frames in order.

Source files are decoded from frame 0 on and frames are numbered as they come: seeking, time stamps and header counts are wrong in
too many real files. Two decoders give the same frames of 8-bit videos: PyAV, and the ffmpeg program (built with ffmpeg-python, run by us).
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import av
import ffmpeg
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation, VideoReformatter

from datasets.ffmpeg import ffmpeg_program, passthrough, read_frame

MAX_PIXELS = 1 << 25
"""Pixels of a frame that are decoded at most where nothing else is said: 8K (7680x4320)."""
PADDING = 1 << 18
"""Decoders count rows and columns of padding as well: they get twice the limit and this."""
MIN_RATE, MAX_RATE, DEFAULT_RATE = 0.01, 1000.0, 25.0
"""Frame rates that are believed, and the one for files that say none of those."""
MAX_SLOWNESS = 20
"""Time stamps that make a file this many times longer than its frame rate does are not believed."""

CONVERTS_IN_THREADS = int(av.__version__.partition(".")[0]) >= 17
"""Whether this PyAV converts pictures in threads, and takes their number."""


class VideoError(ValueError):
    """A file that cannot be used. `reason` is a short class of trouble, the message its detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class VideoInfo:
    """What probing found about the video stream that is used."""

    stream: int
    height: int
    width: int
    """Size of the coded frames, before rotation."""
    turns: int
    """Quarter turns, counter-clockwise, that set the picture upright."""
    fps: float
    frames: int
    """Frames that a whole file must decode to: the larger of the header's count and the packets found."""
    stamps: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Seconds of each frame after the first; None where the file's time stamps are missing, repeated or absurd."""
    max_pixels: int = MAX_PIXELS
    """A frame of more pixels is refused by the decoder."""

    @property
    def times(self) -> np.ndarray:
        """Seconds of each frame after the first: time stamps, or constant rate without them."""
        return self.stamps if self.stamps is not None else np.arange(self.frames) / self.fps

    @property
    def seconds(self) -> float:
        """Length, the last frame's included."""
        return float(self.times[-1]) + 1 / self.fps


def probe(path: Path, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """Picks the best video stream (no cover art), reads all its packets without decoding them, and decodes the first frame.

    Raises VideoError for a file that is empty, not a video, without pictures, cut short, or with frames of more than `max_pixels`.
    """
    with video_errors(path, "not a readable video"):
        if path.exists() and not path.is_file():
            raise VideoError("not a file", "a folder, pipe or device")
        if path.stat().st_size == 0:
            raise VideoError("empty file", "0 bytes")
        with open_video(path) as container:
            return _probe(container, max_pixels)


@contextmanager
def video_errors(path: Path, reason: str) -> Iterator[None]:
    """Turns what the libraries raise on a damaged file, their own slips included, into a VideoError."""
    try:
        yield
    except (FFmpegError, OSError, LookupError, ArithmeticError, UnicodeError, TypeError, AttributeError, MemoryError) as error:
        raise VideoError(reason, _one_line(getattr(error, "strerror", None) or str(error), path)) from None


def open_video(path: Path) -> av.container.InputContainer:
    """Opens a local file, and nothing else that the file may point to on a network."""
    return av.open(str(path.absolute()), options={"protocol_whitelist": "file"}, metadata_errors="ignore")


def _probe(container: av.container.InputContainer, max_pixels: int) -> VideoInfo:
    stream = _best_stream(container)
    _check_size(stream.codec_context, max_pixels)
    stream.codec_context.options = {"max_pixels": str(2 * max_pixels + PADDING)}
    first, stamps, end = None, [], 0
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:
            continue
        stamps.append(packet.pts)
        if packet.pts is not None:
            end = max(end, packet.pts + (packet.duration or 0))
        if first is None:
            first = next(iter(packet.decode()), None)
    if first is None:
        first = next(iter(stream.codec_context.decode(None)), None)
    if first is None:
        raise VideoError("no frames", "no picture could be decoded")
    _check_size(first, max_pixels)
    _check_whole(container, stream, packets := len(stamps), float(end * (stream.time_base or 0)))
    rate = float(stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
    rate = rate if MIN_RATE <= rate <= MAX_RATE else DEFAULT_RATE
    frames = packets if stream.frames > packets else max(stream.frames, packets)
    times = _times(stamps, float(stream.time_base or 0), frames / rate) if frames == packets else None
    turns = round(first.rotation / 90) % 4
    return VideoInfo(stream.index, first.height, first.width, turns, rate, frames, times, max_pixels)


def _check_size(picture: av.VideoCodecContext | av.VideoFrame, max_pixels: int) -> None:
    if picture.width * picture.height > max_pixels:
        raise VideoError("too large", f"{picture.width}x{picture.height}, more than {max_pixels} pixels")


def _times(stamps: list[int | None], unit: float, seconds: float) -> np.ndarray | None:
    """Time stamps of the packets in the order in which frames are shown, from 0 on. None for such as no player could follow."""
    if None in stamps or not unit:
        return None
    shown = np.sort(np.array(stamps, dtype=np.float64))
    times = (shown - shown[0]) * unit
    return times if bool((np.diff(times) > 0).all()) and times[-1] < MAX_SLOWNESS * seconds else None


def _best_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The largest picture, as ffmpeg itself chooses; cover art is a video stream too, and is not meant."""
    streams = [stream for stream in container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic]
    streams = [stream for stream in streams if stream.codec_context is not None]  # a codec that this build does not know
    if not streams:
        raise VideoError("no video stream", "audio or cover art only")
    return max(streams, key=lambda stream: stream.codec_context.width * stream.codec_context.height)


def _check_whole(container: av.container.InputContainer, stream: av.VideoStream, packets: int, end: float) -> None:
    """A file that was cut keeps its header: compare what it promises with the packets that are there."""
    edited = (stream.duration or 0) * (stream.time_base or 0) * (stream.average_rate or 0)
    promised = min(stream.frames, round(edited)) if edited else stream.frames
    if _short(packets, promised):
        raise VideoError("truncated", f"{packets} of {promised} frames are there")
    if not stream.frames and len(container.streams) == 1 and container.duration and end:
        start = (container.start_time or 0) / av.time_base
        if end - start < 0.98 * container.duration / av.time_base - 0.1:
            raise VideoError("truncated", f"ends after {end - start:.2f} of {container.duration / av.time_base:.2f} s")


def _short(found: int, promised: int) -> bool:
    return found < 0.98 * promised and promised - found > 1


def _one_line(text: str, path: Path) -> str:
    # Addresses differ from run to run, and reports must not.
    text = re.sub(r" @ 0x[0-9a-f]+", "", text.replace(str(path), path.name))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "unknown error"


def decode(path: Path, info: VideoInfo, decoder: str, wanted: Callable[[int], bool] = lambda _: True) -> Generator[np.ndarray, None, None]:
    """Frames in decode order, upright, uint8 (h, w, 3) RGB at the native size. decoder: "ffmpeg" or "pyav".

    `wanted` is asked once for each frame by its number; the others are decoded, which shows damage, and not converted. Raises
    VideoError after the last good frame when the file is damaged: an error of the decoder, or frames missing at the end.
    """
    count = 0

    def counted(number: int) -> bool:
        nonlocal count
        count += 1
        return wanted(number)

    with closing(_decode_ffmpeg(path, info, counted) if decoder == "ffmpeg" else _decode_pyav(path, info, counted)) as frames:
        for frame in frames:
            yield np.rot90(frame, info.turns) if info.turns else frame
    if _short(count, info.frames):
        raise VideoError("damaged", f"only {count} of {info.frames} frames decode")


def decoded(path: Path, info: VideoInfo) -> Generator[av.VideoFrame, None, None]:
    """The decoder's own frames in order, by PyAV. VideoError at the first sign of damage."""
    av.logging.set_level(av.logging.ERROR)
    try:
        with video_errors(path, "damaged"), av.logging.Capture() as messages, open_video(path) as container:
            stream = container.streams[info.stream]
            assert isinstance(stream, av.VideoStream)
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(2 * info.max_pixels + PADDING)}
            for frame in container.decode(stream):
                yield frame
                if messages:
                    raise VideoError("damaged", _one_line(messages[0][2], path))
            if messages:
                raise VideoError("damaged", _one_line(messages[0][2], path))
    finally:
        av.logging.set_level(None)


def to_rgb(
    frame: av.VideoFrame, reformatter: VideoReformatter, size: tuple[int, int] | None = None, interpolation: Interpolation | None = None
) -> np.ndarray:
    """A decoded frame as uint8 (h, w, 3), scaled to `size` (height, width) if it has another; rows may lie apart in memory."""
    height, width = size or (frame.height, frame.width)
    # Threads of its own, which a new PyAV starts unless told, take more processor time than the conversion.
    one = {"threads": 1} if CONVERTS_IN_THREADS else {}
    converted = reformatter.reformat(frame, width, height, "rgb24", interpolation=interpolation, **one)
    if converted is frame:
        return frame.to_ndarray()
    plane = converted.planes[0]  # its memory as it is: `to_ndarray` would copy it
    return np.frombuffer(memoryview(plane), np.uint8).reshape(height, plane.line_size)[:, : 3 * width].reshape(height, width, 3)


def _decode_pyav(path: Path, info: VideoInfo, wanted: Callable[[int], bool]) -> Generator[np.ndarray, None, None]:
    reformatter = VideoReformatter()
    with video_errors(path, "damaged"), closing(decoded(path, info)) as frames:
        for number, frame in enumerate(frames):
            if wanted(number):
                yield to_rgb(frame, reformatter, (info.height, info.width))


def ffmpeg_command(program: str, path: Path, info: VideoInfo) -> list[str]:
    """The argument list that decodes one stream of a file to raw RGB on stdout."""
    # "file:" keeps names such as "a:b.mp4" and "-x.mp4" from being read as protocols and options.
    limits = {"max_pixels": 2 * info.max_pixels + PADDING, "protocol_whitelist": "file"}
    source = ffmpeg.input(f"file:{path.absolute()}", threads=1, noautorotate=None, err_detect="explode", **limits)
    name, value = passthrough(program)
    options = {name: value, "f": "rawvideo", "pix_fmt": "rgb24", "threads": 1}
    graph = source[str(info.stream)].output("pipe:", **options)
    return [*graph.global_args("-nostdin", "-v", "error", "-xerror").compile(cmd=program)]


def _decode_ffmpeg(path: Path, info: VideoInfo, wanted: Callable[[int], bool]) -> Generator[np.ndarray, None, None]:
    program = ffmpeg_program()
    assert program is not None, "the caller chose ffmpeg without one"
    try:
        command = ffmpeg_command(program, path, info)
    except UnicodeError:
        raise VideoError("unusable file name", "the name is not valid text: rename the file") from None
    size = info.height * info.width * 3
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, bufsize=0)
        assert process.stdout is not None
        try:
            number = 0
            while len(data := read_frame(process.stdout, size)) == size:
                if wanted(number):
                    yield np.frombuffer(data, dtype=np.uint8).reshape(info.height, info.width, 3)
                number += 1
            process.wait()
            message = os.pread(errors.fileno(), 4096, 0).decode(errors="replace")
            if process.returncode or message.strip() or data:
                raise VideoError("damaged", _one_line(message, path) if message.strip() else f"ffmpeg ended with {process.returncode}")
        except TimeoutError as error:
            raise VideoError("damaged", str(error)) from None
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
