"""What stands between real clips and generated ones, system by system: clips of which one part is real and the others are not."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.clips import Clips
from evaluation.versions import made_by
from evaluation.videos import ShardVideos
from pipelines.cmd_sample import CMDSampleJob
from pipelines.hvdm_sample import HVDMSampleJob
from pipelines.jobs import SampleJob
from pipelines.latte_sample import LatteSampleJob
from pipelines.pvdm_sample import PVDMSampleJob
from pipelines.vidm import as_released
from pipelines.vidm_sample import VIDMSampleJob
from utils.errors import UserError
from utils.media import to_float, to_uint8
from utils.rng import SampleRng

Make = Callable[[Tensor, int, int | None], Tensor]
"""(a real clip 1 3 t h w in [-1, 1], its number, its class) -> the clip of the rung, of the same shape."""


@dataclass(frozen=True)
class Rung:
    """How the clips of a rung come from real ones."""

    what: str
    """In words, what is real in them and what is not."""
    make: Make
    depends: Mapping[str, Any]
    """Plain values: all that they depend on but the real clips."""
    classes: int = 0
    """How many the networks know that must be told a clip's; 0: they know none."""
    names: Sequence[str] = ()
    """Of these classes, where they have any."""


_ONE_NETWORK = "one network generates content and motion together"


def clip_shape(job: SampleJob, frames: int) -> tuple[int, int, int]:
    """Frames, height and width of the real clips that the rungs of clips of `frames` frames are made of."""
    if isinstance(job, VIDMSampleJob):
        return frames, *job.pipeline.image_size
    assert isinstance(job, CMDSampleJob | LatteSampleJob | PVDMSampleJob | HVDMSampleJob)
    trained, *size = job.pipeline.clip_shape
    return (frames if isinstance(job, LatteSampleJob) else trained), size[0], size[1]


def frame_interval(job: SampleJob) -> int:
    """Distance of the frames of a clip in the videos that the networks were trained on."""
    if isinstance(job, HVDMSampleJob) and job.config.frame_stride is not None:
        return job.config.frame_stride
    if isinstance(job, CMDSampleJob | VIDMSampleJob):
        part = job.pipeline.motion
    else:
        assert isinstance(job, LatteSampleJob | PVDMSampleJob | HVDMSampleJob)
        part = job.pipeline.denoiser
    assert part is not None
    return int(part.card.get("data", {}).get("frame_interval", 1))


def rungs_of(job: SampleJob) -> tuple[dict[str, Rung], dict[str, str]]:
    """The rungs below full generation, lowest first, and why others do not exist."""
    if isinstance(job, CMDSampleJob):
        return {"reconstruction": _reconstruction(job), "motion": _cmd_motion(job)}, {}
    if isinstance(job, LatteSampleJob | PVDMSampleJob | HVDMSampleJob):
        return {"reconstruction": _reconstruction(job)}, {"motion": _ONE_NETWORK}
    assert isinstance(job, VIDMSampleJob), f"a system of which no rungs are known: {type(job).__name__}"
    return {"motion": _vidm_motion(job)}, {"reconstruction": "VIDM has no autoencoder: it generates pixels"}


def _reconstruction(job: CMDSampleJob | LatteSampleJob | PVDMSampleJob | HVDMSampleJob) -> Rung:
    pipeline = job.pipeline
    autoencoder = {name: value for name, value in pipeline.identity().items() if name != "path"}
    how = {"seed": job.config.seed, "precision": job.config.precision, "device": pipeline.device.type}

    def make(clip: Tensor, number: int, label: int | None) -> Tensor:
        return pipeline.reconstruct(clip, _rng(job.config.seed, number, clip.device))

    return Rung("real clips through the autoencoder", make, autoencoder | how)


def _cmd_motion(job: CMDSampleJob) -> Rung:
    pipeline, settings = job.pipeline, job.settings()
    assert pipeline.motion is not None
    of_others = ("content", "classes", "exact", "fps")
    depends = {name: value for name, value in settings.items() if name not in of_others}
    depends["sha256"] = {name: value for name, value in settings["sha256"].items() if name != "content"}

    def make(clip: Tensor, number: int, label: int | None) -> Tensor:
        content, _ = pipeline.encode(clip, _rng(job.config.seed, number, clip.device))
        return pipeline.animate(content, [number], None if label is None else [label], seed=job.config.seed, motion=job.motion)

    return Rung("content frames of real clips, generated motion", make, depends, pipeline.motion.config.num_classes, pipeline.classes)


def _vidm_motion(job: VIDMSampleJob) -> Rung:
    pipeline, settings = job.pipeline, job.settings()
    depends = {name: value for name, value in settings.items() if name not in ("exact", "fps")}
    for name in ("sha256", "model", "diffusion", "sampling"):
        depends[name] = settings[name]["motion"]

    def make(clip: Tensor, number: int, label: int | None) -> Tensor:
        frames = pipeline.generate([number], clip.shape[2], drawing=job.drawing, first=clip[:, :, 0])
        return as_released(frames) if job.config.release_frame_order else frames

    return Rung("first frames of real clips, all others generated", make, depends)


def _rng(seed: int, number: int, device: torch.device) -> SampleRng:
    return SampleRng(seed, torch.tensor([number]), device)


class RungVideos:
    """Real clips as a rung makes them: video i is the i-th of the real ones."""

    made = True

    def __init__(self, real: Clips, name: str, rung: Rung, device: torch.device, labels: Sequence[int] | None) -> None:
        """`labels`: classes of the clips, where the rung must be told them."""
        self.real, self.rung, self.labels = real, rung, labels
        self._name, self._device = name, device

    def __len__(self) -> int:
        return len(self.real)

    def name(self, number: int) -> str:
        return f"{self._name} of {self.real.videos.name(self.real.numbers[number])}"

    def is_pictures(self, number: int) -> bool:
        return False

    def total(self, number: int) -> int:
        return len(self.real.picks[number])

    def read(self, number: int, picks: Sequence[int]) -> np.ndarray:
        clip = self.real.read(number)
        label = None if self.labels is None else self.labels[number]
        made = self.rung.make(to_float(clip[None].to(self._device)), self.real.numbers[number], label)
        frames = to_uint8(made)[0].permute(1, 2, 3, 0).contiguous().cpu().numpy()
        return frames[list(picks)]

    def digest(self, number: int) -> str | None:
        """Of the real clip, and of all that was done to it."""
        source = self.real.numbers[number]
        content = self.real.videos.digest(source)
        if content is None:
            return None
        label = None if self.labels is None else self.labels[number]
        seen = [content, self.real.picks[number], list(self.real.size), self.real.protocol.resized]
        text = json.dumps([seen, source, label, self._name, dict(self.rung.depends), made_by()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(dict(self.rung.depends)))
        return {"what": self.rung.what, "networks": plain, "found": len(self)}


def labels_of(clips: Clips, names: Sequence[str], known: int) -> list[int]:
    """Classes of real clips as networks of `known` classes called `names` count them: by name where both have names, else by number.

    Raises UserError for clips without classes, and for classes that the networks do not know.
    """
    videos = clips.videos
    if not isinstance(videos, ShardVideos) or not videos.shards.classes:
        raise UserError(f"{videos.name(clips.numbers[0])} has no class, of which the networks know {known}: give a shard set with classes")
    own = videos.shards.classes
    found = []
    for number in clips.numbers:
        name = own[int(videos.shards.label[number])]
        label = names.index(name) if name in names else -1 if names else int(videos.shards.label[number])
        if not 0 <= label < known:
            raise UserError(f"{videos.name(number)} is of the class '{name}', which is none of the {known} that the networks know")
        found.append(label)
    return found
