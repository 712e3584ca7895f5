"""Frames out of windows of a clip: the first of each window, or the triples of which a model learns to go on frame after frame."""

from typing import Literal, get_args

import numpy as np
import torch

from datasets.config import DataConfig
from datasets.mixture import Collection
from datasets.reader import ClipReader
from datasets.shards import ShardSet
from utils.errors import ConfigError

Take = Literal["window", "first", "triple"]
"""What a sample is: a window of frames, the first frame of one, or a triple out of one."""


class FirstReader(ClipReader):
    """Reads the first frame of windows of `n_frames`, `interval` apart. Otherwise as a ClipReader.

    Windows begin every `step` frames. With step 0 they do not overlap: a stored clip is cut into blocks of n_frames x interval frames, each
    of which holds `interval` windows side by side; what is left at its end counts only where it is too short for a block (spec: VIDM
    section 8).
    """

    def __init__(self, shards: Collection | ShardSet, n_frames: int, *, interval: int = 1, step: int = 0) -> None:
        super().__init__(shards, n_frames, interval=interval)
        self.step, self.rows = step, 1

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """How many windows each sample has, int64 (b,)."""
        frames = self.shards.frames[samples].astype(np.int64)
        starts = frames - (self.n_frames - 1) * self.interval
        if self.step:
            return -(-starts // self.step)
        blocks = frames // (self.n_frames * self.interval)
        return np.where(blocks > 0, blocks * self.interval, starts)

    def _firsts(self, windows: np.ndarray) -> np.ndarray:
        """The first frame of these windows, int64 (b,)."""
        if self.step:
            return windows * self.step
        block, phase = np.divmod(windows, self.interval)
        return block * self.n_frames * self.interval + phase

    @property
    def _in_one(self) -> bool:
        return False

    def _frames(self, samples: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return self._firsts(starts)[:, None]


class TripleReader(FirstReader):
    """Reads three frames of each window: the first, frame r - 1 and frame r, r from 1 to n_frames - 1.

    The number drawn for a sample says the window and r; `frame` of a batch is r. Of uncompressed clips no other frame is read. Otherwise
    as a FirstReader.
    """

    def __init__(self, shards: Collection | ShardSet, n_frames: int, *, interval: int = 1, step: int = 0) -> None:
        super().__init__(shards, n_frames, interval=interval, step=step)
        self.rows = 3

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """How many triples each sample has, int64 (b,): as many for each window."""
        return super().windows(samples) * (self.n_frames - 1)

    def beside(self, samples: np.ndarray, starts: np.ndarray) -> dict[str, torch.Tensor]:
        """`frame`: r of each triple, int64 (b,)."""
        return {"frame": torch.from_numpy(self._drawn(starts)[1])}

    def _drawn(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(window, r), int64 (b,) each, that the numbers mean."""
        window, place = np.divmod(starts, self.n_frames - 1)
        return window, place + 1

    def _frames(self, samples: np.ndarray, starts: np.ndarray) -> np.ndarray:
        window, r = self._drawn(starts)
        return self._firsts(window)[:, None] + np.stack([np.zeros_like(r), r - 1, r], axis=1) * self.interval

    def _spans(self, frames: np.ndarray) -> list[np.ndarray]:
        return [frames[:1], frames[1:]]


def open_frames(shards: Collection, data: DataConfig, take: Take) -> FirstReader:
    """A reader of first frames or triples. Raises ConfigError where the settings or the sets are such that there are none."""
    assert take in get_args(Take)
    what = "the first frames of clips" if take == "first" else "frames out of clips"
    if shards.is_latent:
        raise ConfigError(f"{shards.location} holds latents: this stage learns from {what}, give it the clips")
    others = {
        "--clip-rule linspace": data.clip_rule == "linspace",
        "--frame-sample-prob": data.frame_sample_prob > 0,
        "--num-images": data.images > 0,
        "--previous": data.previous,
    }
    other = next((told for told, given in others.items() if given), None)
    if other:
        raise ConfigError(f"{other}: this stage learns from {what}, with which it does not go; drop the flag")
    if take == "first":
        return FirstReader(shards, data.n_frames, interval=data.frame_interval, step=data.window_step)
    if data.n_frames < 2:
        raise ConfigError(f"--n-frames {data.n_frames}: a frame and what came before it are learnt from clips of 2 frames or more")
    return TripleReader(shards, data.n_frames, interval=data.frame_interval, step=data.window_step)
