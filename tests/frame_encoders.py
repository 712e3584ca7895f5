"""An encoder of frames for tests: a fixed convolution, as quick as it is meaningless."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.prepare.latents import LatentJob, LatentRules
from datasets.shards import ShardSet
from pipelines.latents import encode_with
from utils.errors import UserError

CHANNELS, FACTOR = 2, 4


class ConvEncoder:
    """Means and deviations of 2 channels at a quarter of the size, functions of a frame's own pixels alone."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(2 * CHANNELS, 3, FACTOR, FACTOR, generator=generator) * 0.2
        self.seed = seed
        self.batches: list[int] = []
        """Frames of each call."""

    def identity(self) -> dict[str, Any]:
        return {"system": "latte", "sha256": f"{self.seed:064x}", "weights": "ema", "path": "/somewhere", "kind": "latte"}

    def encode_moments(self, video: Tensor) -> Tensor:
        """b 3 t h w -> b 2C t h/4 w/4."""
        if video.shape[-1] % FACTOR or video.shape[-2] % FACTOR:
            raise UserError(f"height and width must be multiples of {FACTOR}")
        self.batches.append(video.shape[0] * video.shape[2])
        b, _, t, h, w = video.shape
        found = torch.nn.functional.conv2d(video.transpose(1, 2).reshape(b * t, 3, h, w), self.weight, stride=FACTOR)
        mean, raw = found.chunk(2, dim=1)
        both = torch.cat([mean + 0.3, raw.sigmoid()], dim=1)
        return both.reshape(b, t, *both.shape[1:]).transpose(1, 2)


def frame_job(pixels: Path, out: Path, encoder: ConvEncoder | None = None, batch_size: int = 5, **rules: Any) -> LatentJob:
    """The job of `preprocess.py latents` with this encoder."""
    encoder = encoder or ConvEncoder()
    shards = ShardSet.open(pixels, on_bad=rules.get("on_bad", "fail"))
    encode = encode_with(encoder, torch.device("cpu"))
    return LatentJob(shards, out, LatentRules(0, 0, **rules), encoder.identity(), encode, batch_size)
