"""datasets.frames: which frames a clip has."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.frames import last_start, linspace, linspace_last_start, nearest, spread, strided, strided_within


def test_strided_clips_fill_what_is_there() -> None:
    assert strided(3, 4, 2) == [3, 5, 7, 9]
    assert last_start(10, 4, 2) == 3 and last_start(6, 4, 2) == -1
    assert strided_within(0, 5, 4, 2) == [0, 2, 4] and strided_within(3, 50, 4, 2) == [3, 5, 7, 9]


@given(st.integers(1, 300), st.integers(1, 32), st.integers(1, 6))
def test_the_last_start_is_the_last(total: int, length: int, interval: int) -> None:
    start = last_start(total, length, interval)
    assert strided(start, length, interval)[-1] == total - 1


@given(st.integers(1, 300), st.integers(2, 32), st.integers(1, 6))
def test_linspace_stays_inside_and_reaches_both_ends(total: int, length: int, interval: int) -> None:
    start = linspace_last_start(total, length, interval)
    picks = linspace(start, total, length, interval)
    assert len(picks) == length and picks == sorted(picks)
    assert picks[0] == start and picks[-1] == min(start + length * interval, total) - 1
    assert start == 0 or start + length * interval == total - 1, "the releases never draw the last window that fits"


@given(st.integers(1, 300), st.integers(1, 64))
def test_spread_covers_the_video(total: int, count: int) -> None:
    picks = spread(total, count)
    assert len(picks) == min(total, count) == len(set(picks))
    assert picks == [int(i * total / count) for i in range(count)] if total >= count else picks == list(range(total))


@pytest.mark.parametrize("rate", [12.0, 24.0, 30000 / 1001, 29.833333])
def test_the_own_rate_takes_every_frame_once(rate: float) -> None:
    times = np.arange(97) / rate
    assert nearest(times, 97 / rate, rate).tolist() == list(range(97))


def test_another_rate_takes_the_nearest_frames() -> None:
    assert nearest(np.arange(30) / 30, 1.0, 10).tolist() == list(range(0, 30, 3))
    assert nearest(np.arange(10) / 10, 1.0, 20).tolist() == [k // 2 for k in range(20)]
    uneven = np.array([0.0, 0.1, 0.2, 0.5, 0.9])
    assert nearest(uneven, 1.0, 10).tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4, 4]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.floats(0.5, 120))
def test_no_other_frame_is_nearer(gaps: list[int], fps: float) -> None:
    times = np.cumsum([0, *gaps]) / 100
    picks = nearest(times, times[-1] + 0.05, fps)
    for k, pick in enumerate(picks.tolist()):
        assert abs(times[pick] - k / fps) <= np.abs(times - k / fps).min() + 1e-5
    assert (len(picks) - 1) / fps < times[-1] + 0.05 <= len(picks) / fps + 1e-5
