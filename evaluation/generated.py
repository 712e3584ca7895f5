"""Videos of a trained system that are generated while they are measured, and never written."""

import functools
import hashlib
import json
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from evaluation.versions import made_by
from pipelines.jobs import SampleConfig, SampleJob
from pipelines.long import LongJob, chain, count_clips
from pipelines.systems import SYSTEMS, load_sampling
from utils.media import to_uint8

KEPT = 4
"""Videos that are held, for those that are looked at more than once in a row."""


class GeneratedVideos:
    """Samples 0 to `count` - 1 of sample.py, with the same pixels as `--format png` writes."""

    made = True

    def __init__(self, job: SampleJob, config: SampleConfig, count: int) -> None:
        self.job, self.config, self.count = job, config, count
        self._frames = config.num_frames or job.n_frames
        self._made = functools.lru_cache(maxsize=KEPT)(self._make)

    def __len__(self) -> int:
        return self.count

    def name(self, number: int) -> str:
        return f"sample {number} of --run {self.config.run}"

    def is_pictures(self, number: int) -> bool:
        return False

    def total(self, number: int) -> int:
        return self._frames

    def read(self, number: int, picks: Sequence[int]) -> np.ndarray:
        return self._made(number)[list(picks)]

    def digest(self, number: int) -> str:
        """Of everything that the sample depends on, and its number."""
        return f"{self._digest}/{number}"

    def identity(self) -> dict[str, Any]:
        return {"run": self.config.run, "sampling": self._told, "found": len(self)}

    @functools.cached_property
    def _told(self) -> dict[str, Any]:
        length = {"mode": self.config.recorded_mode, "num_frames": self._frames}
        plain: dict[str, Any] = json.loads(json.dumps(self.job.settings() | length))
        return plain

    @functools.cached_property
    def _digest(self) -> str:
        text = json.dumps(self._told | {"made_by": made_by()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _make(self, number: int) -> np.ndarray:
        """All frames of a sample, uint8 (t, h, w, 3)."""
        if self.config.long:
            job = self.job
            assert isinstance(job, LongJob)
            clips = chain(functools.partial(job.sample_clip, [number]), stop=count_clips(job, self._frames))
            parts = [to_uint8(job.decode_clip(latents, clip)).cpu()[0] for clip, latents in enumerate(clips)]
            video = torch.cat(parts, dim=1)[:, : self._frames]
        else:
            video = to_uint8(self.job.generate([number])[""]).cpu()[0]
        return video.permute(1, 2, 3, 0).contiguous().numpy()


def generated_videos(run: str, flags: str, count: int, device: torch.device) -> GeneratedVideos:
    """The samples that `sample.py RUN FLAGS` would write. Raises UserError or ConfigError in one line."""
    job, config = open_job(run, shlex.split(flags), device)
    return GeneratedVideos(job, config, count)


def open_job(run: str, flags: Sequence[str], device: torch.device) -> tuple[SampleJob, SampleConfig]:
    """What `sample.py RUN FLAGS` would make samples by, and its settings. Raises UserError or ConfigError in one line."""
    config = load_sampling(["--run", run, *flags], "sample.py", "")
    config.validate()
    return SYSTEMS[config.system].job(config, device), config
