"""Which frames a clip has: rules on frame numbers alone.

`length` is the number of frames of a clip, `interval` the distance that is asked for between two of them, `total` the number of frames
that there are. Preprocessing and the loader cut by the same rules.
"""

from collections.abc import Sequence

import numpy as np


def last_start(total: int, length: int, interval: int = 1) -> int:
    """The largest first frame of a strided clip that fits; negative when none does."""
    return total - ((length - 1) * interval + 1)


def strided(start: int, length: int, interval: int = 1) -> list[int]:
    """Every `interval`-th frame from `start` on; 1: consecutive frames."""
    return list(range(start, start + length * interval, interval))


def strided_within(start: int, total: int, length: int, interval: int) -> list[int]:
    """`strided`, cut where the video ends: fewer than `length` frames of a short one (Latte, frame folders)."""
    return list(range(start, min(start + length * interval, total), interval))


def linspace_last_start(total: int, length: int, interval: int) -> int:
    """The largest first frame that Latte draws, also the tutorial: one less than would fit (spec latte 5.2)."""
    return max(0, total - length * interval - 1)


def linspace(start: int, total: int, length: int, interval: int) -> list[int]:
    """`length` frames spread evenly over [start, start + length * interval), both ends taken (spec latte 5.2, both releases).

    Not a constant stride: interval 3 and 16 frames span 47 steps. Short videos get smaller steps, very short ones repeat frames.
    """
    end = min(start + length * interval, total)
    # Not integer division: floats of numpy fall short of a whole number here and there, and the releases cut those off.
    return np.linspace(start, end - 1, length).astype(int).tolist()


def spread(total: int, count: int) -> list[int]:
    """`count` frames over the whole video, the first at 0: int(i * total / count) (spec VIDM 11). All frames of a shorter video."""
    return [i * total // count for i in range(count)] if total >= count else list(range(total))


def nearest(times: Sequence[float] | np.ndarray, end: float, fps: float) -> np.ndarray:
    """For output frame k at k / fps seconds the number of the frame nearest in time; all k with k / fps < end.

    `times`: seconds of the frames from 0 on, ascending; `end`: when the last one goes. A source that is slower repeats frames; a tie
    goes to the earlier one.
    """
    times = np.asarray(times, dtype=np.float64)
    slack = 1e-6  # k / fps and the time stamps are rounded: equal ones must compare as equal
    wanted = np.arange(max(1, int(np.ceil((end - slack) * fps)))) / fps
    return np.searchsorted((times[:-1] + times[1:]) / 2 + slack, wanted)
