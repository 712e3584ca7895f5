"""Windows of frames out of the mp4 clips that the toolkit wrote."""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from datasets.video import to_rgb


def _check_stored(picture: av.VideoFrame | av.VideoCodecContext, wanted: tuple[int, int] | None) -> None:
    if wanted and (picture.height, picture.width) != wanted:
        raise ValueError(f"pictures of {picture.height} x {picture.width} where {wanted[0]} x {wanted[1]} are stored")


def decode_window(payload: bytes, start: int, n_frames: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Frames [start, start + n_frames), uint8 (t, h, w, 3), of an mp4 that `utils.media.encode_mp4` wrote.

    `size`: (height, width) that they must have, where the file may be anybody's; odd sides are stored with one row more.
    ValueError when they are not there. Seeking is safe here: constant frame rate, no B-frames, frame k at k / rate.
    """
    frames: list[np.ndarray] = []
    reformatter = VideoReformatter()  # one for all frames: setting one up takes longer than its work on a small frame
    wanted = size and (size[0] + size[0] % 2, size[1] + size[1] % 2)
    try:
        with av.open(io.BytesIO(payload), "r", format="mp4") as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            _check_stored(stream.codec_context, wanted)
            ticks = 1 / ((stream.average_rate or 0) * (stream.time_base or 0))
            if start:
                container.seek(round(start * ticks), stream=stream, backward=True)
            for frame in container.decode(stream):
                _check_stored(frame, wanted)
                if frame.pts is not None and round(frame.pts / ticks) >= start:
                    frames.append(to_rgb(frame, reformatter))
                if len(frames) == n_frames:
                    return np.stack(frames)
    except (FFmpegError, OSError, LookupError, ArithmeticError, TypeError, AttributeError, MemoryError) as error:
        raise ValueError(str(error)) from None
    raise ValueError(f"{len(frames)} of {n_frames} frames from frame {start} on")


def count_frames(path: Path) -> int:
    """Frames that the head of an mp4 says it has; 0 for a file that is none."""
    try:
        with av.open(str(path), "r", format="mp4") as container:
            return int(container.streams.video[0].frames)
    except (FFmpegError, OSError, LookupError):
        return 0


def iterate_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of an mp4 one by one, uint8 (h, w, 3), in constant memory."""
    reformatter = VideoReformatter()
    with av.open(str(path), "r", format="mp4") as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        for frame in container.decode(stream):
            yield to_rgb(frame, reformatter)
