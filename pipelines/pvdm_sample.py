"""What `sample.py` needs to know of PVDM: its settings, its exports, how sample number i is made, and how a long one goes on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion import DiffusionConfig
from pipelines.jobs import SampleConfig, Strip, choose_classes, class_name, in_turn, numbered
from pipelines.loading import diffusion_of
from pipelines.pvdm import PVDMPipeline
from pipelines.runs import find_family
from pipelines.sampling import Sampler, Sampling, count_steps
from utils.config import flag, to_dict
from utils.errors import ConfigError, UserError

PRESETS = {"100/20": (100, 20), "200/200": (200, 200), "400/400": (400, 400), "400/20": (400, 20)}
"""Steps of the first clip, and of the following ones."""
DEFAULT_STEPS = {"ddpm": PRESETS["400/400"], "flow": (50, 50)}
"""The released checkpoints', and what the straighter paths of a flow need."""


@dataclasses.dataclass(frozen=True)
class PVDMSampleConfig(SampleConfig):
    """Generates clips, or videos of any length, with PVDM."""

    system: str = "pvdm"
    """Which of the toolkit's systems."""
    denoiser: str = flag("", "second-model")
    """Denoiser in place of that in --run: an export or run folder, or an official checkpoint (ema_model_<it>.pth)."""
    ae: str = flag("", "first-model")
    """Autoencoder in place of that in --run: an export or run folder, or an official checkpoint (model_last.pth)."""
    preset: Literal["", "100/20", "200/200", "400/400", "400/20"] = ""
    """Steps of the first clip of a video and of the following ones, as the paper names its samplers. Without: 400/400, of a flow 50/50."""
    steps: int | None = None
    """Denoising steps of every clip; with a preset of the first one, in place of the preset's."""
    next_steps: int | None = None
    """Of the following clips of a long video."""
    sampler: Sampler = "auto"
    """ddim, ddpm (ancestral) or dpm++ (DPM-Solver++(2M)); of a flow euler or heun. auto: ddim, of a flow euler."""
    eta: float | None = None
    """DDIM: share of fresh noise; 0 is deterministic. none: 1, the release's."""
    guidance_scale: float = flag(1.0, "cfg-scale")
    """Guidance towards the class and the clip before, eps_u + s (eps_c - eps_u); 1: none, as the release. It doubles the cost."""
    num_heads: int = 8
    """Attention heads of an official denoiser, whose checkpoint does not say them."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        super().validate()
        if not self.run and not self.denoiser:
            raise ConfigError("what to sample from? give --run FOLDER (the --results-dir of training), or --denoiser and --ae")
        self.at_least(1, "steps", "next_steps", "num_heads")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ConfigError(f"--eta {self.eta}: between 0 and 1")
        if self.mode == "short" and self.next_steps is not None:
            raise ConfigError(f"--next-steps {self.next_steps}: only --mode long has a second clip")


class PVDMSampleJob:
    """Makes sample number i, and the clips of long ones. What it makes is a function of `settings()` alone."""

    endings = ("",)

    def __init__(self, config: PVDMSampleConfig, device: torch.device) -> None:
        self.config = config
        self.pipeline = _open(config, device)
        denoiser = self.pipeline.denoiser
        assert denoiser is not None
        self.process = diffusion_of(denoiser)
        steps = _steps(config, self.process)
        self.first, self.following = (_sampling(config, self.process, number, _plain(self.pipeline)) for number in steps)
        self.labels = choose_classes(config.classes, self.pipeline.num_classes, self.pipeline.classes)
        self.fps = config.fps or self.pipeline.fps
        self.n_frames = self.pipeline.clip_shape[0]
        self.notes: list[str] = []
        if config.mode == "long" and not denoiser.config.conditional:
            raise UserError(f"--mode long: the denoiser {denoiser.path} was trained without a clip before (model.conditional is off)")
        if config.mode == "long" and denoiser.card.get("cond_prob") == 0:
            raise UserError(f"--mode long: the denoiser {denoiser.path} was trained on single clips (--cond-prob 0), and cannot go on")
        if config.mode == "short" and config.num_frames:
            if config.num_frames > self.n_frames:
                raise ConfigError(f"--num-frames {config.num_frames}: a clip has {self.n_frames}; for longer videos add --mode long")
            self.n_frames = config.num_frames
        if config.guidance_scale != 1 and config.mode == "short" and not self.labels:
            self.notes.append(f"warning: --guidance-scale {config.guidance_scale:g} does nothing: a first clip has no condition")

    def label(self, index: int) -> int | None:
        """Class of a sample; None when the model has none."""
        return in_turn(self.labels, index)

    def name(self, index: int) -> str:
        """File name of a sample, without ending."""
        return numbered(index, self.label(index))

    def class_name(self, label: int | None) -> str:
        """Name of a class, where the training data had one."""
        return class_name(self.pipeline.classes, label)

    def generate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The clips b 3 t h w in [-1, 1]."""
        latents = self.sample_clip(indices, 0, None)
        return {"": self.decode_clip(latents, 0)[:, :, : self.n_frames]}

    def new_frames(self, clip: int) -> int:
        """All frames of each clip are new."""
        return self.pipeline.clip_shape[0]

    def sample_clip(self, indices: Sequence[int], clip: int, previous: Tensor | None) -> Tensor:
        """Latents b e L of clip number `clip` of these samples, after the one with the latents `previous`."""
        return self.pipeline.generate_latents(
            indices,
            [self.labels[i % len(self.labels)] for i in indices] if self.labels else None,
            seed=self.config.seed,
            sampling=self.following if clip else self.first,
            exact=self.config.exact,
            clip=clip,
            previous=previous,
        )

    def decode_clip(self, latents: Tensor, clip: int) -> Tensor:
        """Its frames, b 3 S h w in [-1, 1]."""
        return torch.cat([self.pipeline.decode(part) for part in latents.split(1 if self.config.exact else len(latents))])

    def strip(self) -> Strip | None:
        """None: what a sampling looks like is shown by Latte, whose frames are latents by themselves."""
        return None

    def settings(self) -> dict[str, Any]:
        """Plain values: everything that a sample depends on."""
        config, pipeline = self.config, self.pipeline
        assert pipeline.denoiser is not None
        length = {"following": self.following.settings(self.process)} if config.mode == "long" else {"n_frames": self.n_frames}
        return {
            "system": "pvdm",
            "seed": config.seed,
            "classes": self.labels,
            "weights": config.weights,
            "ae_weights": pipeline.ae.weights,
            "sha256": {"ae": pipeline.ae.sha256, "denoiser": pipeline.denoiser.sha256},
            "model": to_dict(pipeline.denoiser.config),
            "diffusion": to_dict(self.process),
            "latent": {"scale": pipeline.scale, "shift": pipeline.shift},
            "sampling": self.first.settings(self.process),
            **length,
            "exact": config.exact,
            "precision": config.precision,
            "device": pipeline.device.type,
            "fps": self.fps,
        }

    def sources(self) -> dict[str, str]:
        """Where the networks were read."""
        assert self.pipeline.denoiser is not None
        return {"ae": self.pipeline.ae.path, "denoiser": self.pipeline.denoiser.path}


def _open(config: PVDMSampleConfig, device: torch.device) -> PVDMPipeline:
    """The networks that the settings name. Raises UserError or ConfigError in one line."""
    # A denoiser that is named brings its own autoencoder.
    found = find_family(Path(config.run), "pvdm") if config.run and not config.denoiser else {}
    return PVDMPipeline.from_exports(
        config.denoiser or found["denoiser"],
        config.ae or found.get("autoencoder", ""),
        weights=config.weights,
        num_heads=config.num_heads,
        device=device,
        precision=config.precision,
    )


def _plain(pipeline: PVDMPipeline) -> bool:
    """Whether latents are the planes themselves, which lie in [-1, 1]."""
    return (pipeline.scale, pipeline.shift) == (1.0, 0.0)


def _steps(config: PVDMSampleConfig, process: DiffusionConfig) -> tuple[int, int]:
    """Steps of the first clip and of the following ones. Raises ConfigError."""
    if config.preset and process.process == "flow":
        raise ConfigError(f"--preset {config.preset}: it is a way to sample noising steps, the model is a flow: give --steps")
    usual = PRESETS[config.preset] if config.preset else tuple(min(steps, process.steps) for steps in DEFAULT_STEPS[process.process])
    following = usual[1] if config.preset else config.steps or usual[1]
    return config.steps or usual[0], config.next_steps or following


def _sampling(config: PVDMSampleConfig, process: DiffusionConfig, steps: int, plain: bool) -> Sampling:
    """The release's sampling in `steps` steps, as far as it suits the process. Raises ConfigError.

    `plain`: latents lie in [-1, 1], where estimates of them are kept.
    """
    sampler = Sampling(sampler=config.sampler).resolved(process).sampler
    common = Sampling(steps=steps, sampler=sampler, guidance=config.guidance_scale, clip=plain)
    if sampler == "ddim":
        eta = 1.0 if config.eta is None else config.eta
        common = dataclasses.replace(common, eta=eta, keep_eps=plain, respacing=f"trailing{steps}")
    elif config.eta is not None:
        common = dataclasses.replace(common, eta=config.eta)
    count_steps(process, common)
    return common.resolved(process)
