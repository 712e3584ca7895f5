"""datasets.prepare.scenes: cuts and fades are found where they are, and nowhere else."""

import json
from pathlib import Path

import numpy as np
import pytest

from datasets.prepare.scenes import SMALL, find_cuts, shrink, small_frames
from datasets.video import probe
from tests.videos import noise_frames, write_video

REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "real_videos"
LABELS = REAL / "manifest.json"
LABELLED = {name: row["cuts"] for name, row in json.loads(LABELS.read_text()).items() if "cuts" in row} if LABELS.is_file() else {}


def shots(*lengths: int) -> np.ndarray:
    """Moving blobs, a new and differently lit scene after each length."""
    return np.concatenate([noise_frames(n, SMALL, seed=seed) // (1 + seed % 2 * 2) for seed, n in enumerate(lengths)])


@pytest.mark.skipif(not LABELLED, reason="the folder of real videos is not here")
@pytest.mark.parametrize("name", LABELLED or ["none"])
def test_labelled_cuts_of_real_videos(name: str) -> None:
    path = REAL / name
    assert find_cuts(small_frames(path, probe(path))) == LABELLED[name]


def test_cuts_of_made_videos(tmp_path: Path) -> None:
    frames = shots(20, 9, 31, 5)
    assert find_cuts(frames) == [20, 29, 60]
    path = write_video(tmp_path / "a.mp4", np.repeat(np.repeat(frames, 3, axis=1), 3, axis=2))
    assert find_cuts(small_frames(path, probe(path))) == [20, 29, 60]
    assert find_cuts(shrink(np.repeat(np.repeat(frames, 3, axis=1), 3, axis=2))) == [20, 29, 60]


def test_fast_motion_is_no_cut() -> None:
    rng = np.random.default_rng(0)
    restless = rng.integers(0, 255, (40, *SMALL, 3), dtype=np.uint8)
    assert find_cuts(restless) == [], "every change is large, none stands out"


def test_a_fade_through_black_splits_once() -> None:
    level = np.concatenate([np.linspace(1, 0, 20), np.zeros(5), np.linspace(0.02, 1, 20)])
    frames = (noise_frames(45, SMALL) * level[:, None, None, None]).astype(np.uint8)
    [cut] = find_cuts(frames)
    assert 25 <= cut <= 27
    assert find_cuts(frames[20:]) == [], "before a fade from black there was no shot"
    assert find_cuts(frames[:24]) == []


@pytest.mark.parametrize("count", [0, 1, 2])
def test_tiny_videos_have_no_cut(count: int) -> None:
    assert find_cuts(noise_frames(10, SMALL)[:count]) == []
