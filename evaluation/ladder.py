"""Where a generator loses what: one distance for what the autoencoder gives back, one for generated motion of true content, one for all.

The rungs are measured upon the same real clips, by one protocol (CMD, table of its components).
"""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from evaluation.clips import Clips
from evaluation.extractors import open_extractor
from evaluation.generated import GeneratedVideos, open_job
from evaluation.protocols import PROTOCOLS, Protocol
from evaluation.quality import Figures, agreed, clips_of, frechet_figures, measured, meet, more_real, other_real
from evaluation.rungs import RungVideos, clip_shape, frame_interval, labels_of, rungs_of
from evaluation.settings import FvdConfig
from evaluation.videos import VideoSet, open_videos
from launch.env import Env
from pipelines.jobs import SampleConfig, SampleJob
from utils.config import flag
from utils.errors import ConfigError, UserError


def _unset(default: Any) -> Any:
    """A setting of `evaluate.py fvd` that the networks and the real clips decide here, and no flag."""
    return dataclasses.field(default=default, init=False)


@dataclasses.dataclass(frozen=True)
class LadderConfig(FvdConfig):
    """Frechet video distances of reconstructions, of generated motion of true content, and of full generation, upon the same clips."""

    dir1: str = _unset("")
    dir2: str = _unset("")
    preset: str = _unset("")
    stride: int = _unset(0)
    resolution: int = _unset(0)

    run: str = flag("", "results-dir")
    """The trained system: the --results-dir of training, or what else sample.py takes. The same as a
    bare first argument, which is what works under torchrun too (it may take --run for one of its own flags)."""
    data_path: str = ""
    """Real clips, of which all rungs are made: a shard set made by preprocess.py. Where the networks know no classes, or there is one
    network, also a folder of videos."""
    num_videos: int = flag(2048, "ns")
    """Clips of each rung, and real ones; a set of fewer is measured whole, and said so."""
    n_frames: int = flag(0, "n")
    """Of each clip; 0: as many as in training. Only Latte and VIDM make others."""
    real_stride: int = 0
    """Distance of two frames of a clip in the stored videos; 0: as in training."""
    steps: int = 0
    """Denoising steps of all networks; 0: as sample.py. More settings of sample.py, such as --motion.steps, go into --sampling."""
    guidance_scale: float | None = None
    """Guidance of all networks; none: as sample.py."""
    protocol: str = "stylegan-v"
    """stylegan-v: the network resizes, covariances over n. pvdm: PVDM, HVDM and CMD, centre crop, covariances over n - 1. videomae:
    content-debiased FVD, of another network. Of real videos all take frames in a row, from a random offset on."""
    sampling: str = ""
    """Settings of sample.py in one text, such as --sampling="--content.steps 50 --motion.steps 100 --seed 1"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dir1", self.data_path)

    @property
    def known(self) -> Mapping[str, Protocol]:
        """Those of clips of frames in a row."""
        return {name: rules for name, rules in PROTOCOLS.items() if not rules.spread}

    @property
    def flags(self) -> list[str]:
        """Settings of sample.py."""
        given = {"--num-frames": self.n_frames or None, "--steps": self.steps or None, "--guidance-scale": self.guidance_scale}
        return [*(f"{name}={value}" for name, value in given.items() if value is not None), *shlex.split(self.sampling)]

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        if not self.run:
            raise ConfigError("which networks? give --run RUNS, the --results-dir of training")
        if not self.data_path:
            raise ConfigError("upon which clips? give --data-path FOLDER, a shard set made by preprocess.py")
        if self.steps < 0:
            raise ConfigError(f"--steps {self.steps}: at least 1, or 0 for those of sample.py")
        super().validate()


def measure_ladder(config: LadderConfig, env: Env) -> Figures:
    """One distance a rung, with all that `measure_fvd` says of each, on all ranks; the processes share the clips."""
    extractor = open_extractor(config.rules.network, config.i3d, "--i3d", config.rules, env.device, config.i3d_sha256)
    videos = open_videos(config.data_path, "--data-path")
    job, sampling = open_job(config.run, config.flags, env.device)
    config = _resolved(config, job, sampling)
    real = clips_of(config, videos, "real", env, clip_shape(job, config.frames)[1:], config.real_stride)
    if len(real) < 2:
        raise UserError(f"--data-path {config.data_path}: one video of at least {config.frames} frames; a distance needs two")
    sets, left_out = _sets(job, sampling, real, env)
    keep = bool(config.bootstrap or config.fd_inf)
    extra = other_real(config, real, real, env)  # every rung has a clip for each real one
    truth = measured(config, real, extractor, env, keep_rows=keep)
    more = more_real(config, extra, extractor, env)
    rungs: dict[str, Figures] = {}
    for name, made in sets.items():
        clips = clips_of(config, made, "generated", env, real.size, 1)
        side = measured(config, clips, extractor, env, keep_rows=keep)
        if not env.is_main:
            meet(env, config.bootstrap)
        else:
            told = [note for one in rungs.values() for note in one["notes"]]
            rungs[name] = frechet_figures(config, extractor, truth, side, more, env, told)
            rungs[name]["protocol"]["id"] += f"_{name}"
    return agreed(_summary(config, rungs, left_out) if env.is_main else None, env)


def _resolved(config: LadderConfig, job: SampleJob, sampling: SampleConfig) -> LadderConfig:
    """With frames and stride as the networks have them. Raises ConfigError for what they cannot make."""
    if sampling.image or (sampling.long and sampling.system != "vidm"):
        raise ConfigError("--sampling: the clips of a ladder are from noise, and as long as in training: no --mode long or image")
    frames = sampling.num_frames or job.n_frames
    if frames != (takes := clip_shape(job, frames)[0]):
        raise ConfigError(f"--n-frames {frames}: the autoencoder takes clips of {takes} frames, and the rungs are of equal clips")
    return dataclasses.replace(config, n_frames=frames, real_stride=config.real_stride or frame_interval(job))


def _sets(job: SampleJob, sampling: SampleConfig, real: Clips, env: Env) -> tuple[dict[str, VideoSet], dict[str, str]]:
    """The clips of each rung, lowest first, and why others do not exist. Raises UserError."""
    rungs, left_out = rungs_of(job)
    sets: dict[str, VideoSet] = {}
    for name, rung in rungs.items():
        labels = labels_of(real, rung.names, rung.classes) if rung.classes else None
        sets[name] = RungVideos(real, name, rung, env.device, labels)
    sets["full"] = GeneratedVideos(job, sampling, len(real))
    return sets, left_out


def _summary(config: LadderConfig, rungs: dict[str, Figures], left_out: dict[str, str]) -> Figures:
    """The distances side by side; then each with all that belongs to it."""
    figure = config.rules.figure
    figures: Figures = {f"{figure}_{name}": one[figure] for name, one in rungs.items()}
    first = next(iter(rungs.values()))
    figures |= {name: first[name] for name in ("noise_floor", "noise_floor_of_halves", "floor_videos") if name in first}
    figures |= {f"frame_difference_ratio_{name}": one["frame_difference_ratio"] for name, one in rungs.items()}
    figures |= {"clips": first["real_videos"], "notes": list(dict.fromkeys(note for one in rungs.values() for note in one["notes"]))}
    own = {name: {key: one["protocol"][key] for key in ("id", "generated")} for name, one in rungs.items()}
    protocol = {name: value for name, value in first["protocol"].items() if name not in ("id", "generated")}
    return figures | {"rungs": rungs, "protocol": protocol | own | ({"left out": left_out} if left_out else {})}
