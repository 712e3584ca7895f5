"""datasets.prepare.filters: motion and darkness are measured on every n-th pixel."""

import numpy as np
import pytest

from datasets.prepare.filters import LOOK, FilterRules, check_clip, motion


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (127, 129), (128, 300), (256, 255)])
@pytest.mark.parametrize("count", [1, 2, 70])
def test_motion_is_the_mean_difference_of_every_nth_pixel(size: tuple[int, int], count: int) -> None:
    frames = np.random.default_rng(count).integers(0, 256, (count, *size, 3), dtype=np.uint8)[:, :, ::-1]
    down, across = (max(1, side // LOOK) for side in size)
    small = frames[:, ::down, ::across].astype(np.int64)
    expected = np.abs(np.diff(small, axis=0)).mean() / 255 if count > 1 else 0.0
    assert motion(frames) == pytest.approx(expected, abs=1e-12)


def test_only_clips_that_are_black_throughout_are_dropped() -> None:
    rules = FilterRules(drop_black=True)
    frames = np.full((3, 130, 70, 3), 4, np.uint8)
    rejection = check_clip(0, frames, 0.0, rules)
    assert rejection and rejection.reason == "black"
    frames[1] = 7
    assert check_clip(0, frames, 0.0, rules) is None
