"""What the encoding of a set is told: the clips, the rules, the autoencoder, and which share of the shards is whose."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datasets.prepare.writer import dump_json
from datasets.shards import SCHEMA, ShardSet

Tensors = dict[str, np.ndarray]
Encode = Callable[[np.ndarray], Tensors]
"""uint8 frames b t h w 3 -> name -> latents b ..., float32; frame by frame: `moments`, b 2C t h' w', means and then deviations."""


@dataclass(frozen=True)
class LatentRules:
    """What decides the values, beside the pixels and the autoencoder."""

    frames: int
    """Frames that a sample is encoded from: as many as the autoencoder takes. 0: it takes them one by one, a sample is a whole clip."""
    stride: int
    """Frames between the beginnings of two windows of a clip that is longer; means nothing frame by frame."""
    dtype: Literal["float16", "float32"] = "float16"
    precision: Literal["fp32", "bf16"] = "fp32"
    on_bad: Literal["fail", "skip"] = "fail"
    store: Literal["moments", "sample"] = "moments"
    """Of each frame: mean and standard deviation of the posterior, or one draw from it. Frame by frame only, as what follows."""
    seed: int = 0
    """Of that draw."""
    scale: float = 0.0
    """Factor that training is told to multiply latents by; 0: as measured."""
    pairs: bool = False
    """Of clips: `frames` are those of two clips in a row, the second of which is the sample and the first what was before it."""

    stills: bool = False
    """Of clips: with each its first frame as a still clip."""

    def to_dict(self) -> dict[str, Any]:
        """Those that count."""
        values = {name: value for name, value in asdict(self).items() if value or name not in ("pairs", "stills")}
        return {name: value for name, value in values.items() if not self.frames or name not in ("store", "seed", "scale")}

    @property
    def clip_frames(self) -> int:
        """Frames of a sample; 0: those of the stored clip."""
        return self.frames // 2 if self.pairs else self.frames


@dataclass(frozen=True)
class Share:
    """Which of several processes this is; the shards go round robin."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class LatentJob:
    """All that the encoding of a set needs."""

    pixels: ShardSet
    out: Path
    rules: LatentRules
    autoencoder: Mapping[str, Any]
    """Plain values for index.json; `sha256` and `vae` name the weights."""
    encode: Encode
    batch_size: int = 32
    """Clips that go through the autoencoder at a time; frame by frame: frames."""
    workers: int = 2
    """Threads that read and decode ahead."""

    @property
    def plan(self) -> str:
        """Hash of all that decides the values, to rounding."""
        names = {key: self.autoencoder.get(key) for key in ("system", "sha256", "vae")}
        return hashlib.sha256(dump_json([SCHEMA, self.pixels.digest, names, self.rules.to_dict()])).hexdigest()

    @property
    def framewise(self) -> bool:
        """Whether each frame has a latent of its own."""
        return not self.rules.frames

    @property
    def windowed(self) -> bool:
        """Whether clips may be longer than what a sample is encoded from."""
        return not self.framewise and self.pixels.meta["clip_length"] != self.rules.frames

    @property
    def shards(self) -> range:
        """Numbers of the shards."""
        return range(len(self.pixels.meta["shards"]))

    def rows(self, shard: int) -> list[int]:
        """The clips of a shard, in order: samples of the pixel set."""
        found: list[int] = np.flatnonzero(self.pixels.shard == shard).tolist()
        return found

    def windows(self, shard: int) -> list[tuple[int, int]]:
        """(sample of the pixel set, first frame) of each sample of a shard, in order."""
        if self.framewise:
            return [(row, 0) for row in self.rows(shard)]
        last = (self.pixels.frames - self.rules.frames).tolist()
        return [(row, start) for row in self.rows(shard) for start in range(0, last[row] + 1, self.rules.stride)]

    def short(self, shard: int) -> int:
        """Clips of a shard that have too few frames for one window."""
        return int((self.pixels.frames[self.pixels.shard == shard] < self.rules.frames).sum())

    def name(self, row: int, start: int) -> str:
        """Key of a sample: that of the clip, and the window's first frame where clips are longer than a window."""
        key = self.pixels.keys[row]
        return f"{key}_w{start:06d}" if self.windowed else key
