"""One video after another by the same networks, each with settings of its own: what the web page asks for."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipelines.jobs import Mode, SampleConfig, SampleJob
from pipelines.long import LongJob, count_clips, write_videos
from pipelines.sampling import SAMPLERS, Sampler, watched_steps
from pipelines.systems import SYSTEMS
from pipelines.video_files import video_path, write_video
from utils.media import to_uint8

Told = Callable[[float, str], None]
"""Is told what share is done, and what is being done."""


@dataclasses.dataclass(frozen=True)
class Wish:
    """What can be chosen for a video; what is left alone is as the system's release has it."""

    mode: Mode = "short"
    label: str = ""
    """A class by number or name; empty: the first."""
    seed: int = 0
    steps: int | None = None
    sampler: Sampler = "auto"
    guidance: float | None = None
    frames: int = 0
    image: str = ""
    """Path of the picture at which the video begins."""


class Studio:
    """Networks that were read once, and what they can be asked for. Serves one caller at a time.

    `config`: settings that all videos have in common. Raises UserError or ConfigError in one line, also from `make`.
    """

    def __init__(self, config: SampleConfig, folder: Path, device: torch.device) -> None:
        config.validate()
        self.config, self.folder, self.device = config, folder, device
        self.first = SYSTEMS[config.system].job(config, device)
        self._made = 0

    @property
    def modes(self) -> tuple[str, ...]:
        """Those of the system."""
        return self.config.modes

    @property
    def classes(self) -> list[str]:
        """Name, or number where there is none, of each class."""
        if self.config.classes:  # the caller's choice among them
            return list(self.config.classes)
        return [self.first.class_name(label) or str(label) for label in self.first.labels]

    @property
    def samplers(self) -> list[str]:
        """Those of all processes: a model refuses those of another."""
        return ["auto", *dict.fromkeys(name for names in SAMPLERS.values() for name in names)]

    @property
    def guided(self) -> bool:
        """Whether there is a condition that guidance could take away."""
        return "guidance_scale" not in self.config.lacks

    def job(self, wish: Wish) -> tuple[SampleConfig, SampleJob]:
        """The settings that a wish comes to, and what makes its samples."""
        config = dataclasses.replace(
            self.config,
            mode=wish.mode,
            classes=(wish.label,) if wish.label else self.config.classes,
            seed=wish.seed,
            steps=wish.steps,
            sampler=wish.sampler,
            guidance_scale=wish.guidance,
            num_frames=wish.frames,
            image=(wish.image,) if wish.image and wish.mode == "image" else (),
            num_videos=1,
        )
        config.validate()
        return config, SYSTEMS[config.system].job(config, self.device, self.first.pipeline)  # type: ignore[attr-defined]

    def make(self, wish: Wish, told: Told) -> tuple[Path, dict[str, Any]]:
        """An mp4 of sample 0, the same as sample.py writes, and its settings. The one before last is deleted."""
        config, job = self.job(wish)
        frames = config.num_frames or job.n_frames
        clips = count_clips(job, frames) if config.long and isinstance(job, LongJob) else 1
        self._made += 1
        folder = self.folder / f"{self._made:06d}"
        begun = 0

        def watch(step: int, steps: int) -> None:
            nonlocal begun
            begun += step == 1
            told(min((begun - 1 + step / steps) / (clips * job.draws), 1.0), f"step {step} of {steps}" + (f", clip {begun}" * (clips > 1)))

        with watched_steps(watch):
            path = video_path(folder, job.name(0), "mp4")
            if config.long:
                assert isinstance(job, LongJob)
                write_videos(job, [0], folder, frames, self.device, lambda: None, keep=False)
            else:
                write_video(path, "mp4", to_uint8(job.generate([0])[""])[0].cpu(), job.fps)
        shutil.rmtree(self.folder / f"{self._made - 2:06d}", ignore_errors=True)
        length = {"mode": config.recorded_mode, "num_frames": frames}
        notes = {"notes": job.notes} if job.notes else {}
        return path, length | {"class": job.class_name(job.label(0)) or job.label(0)} | notes | job.settings()
