"""What `sample.py` needs to know of CMD: its settings, its exports, and how sample number i is made."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipelines.cmd import CMDPipeline
from pipelines.jobs import SampleConfig, Strip, choose_classes, class_name, in_turn, numbered
from pipelines.loading import diffusion_of
from pipelines.runs import find_family
from pipelines.sampling import Sampler, Sampling, count_steps
from utils.config import flag
from utils.errors import ConfigError, UserError

USUAL_STEPS = {"content": 50, "motion": 100}
"""Stage -> steps where none are given."""


@dataclasses.dataclass(frozen=True)
class CMDSampleConfig(SampleConfig):
    """Generates clips with CMD."""

    system: str = "cmd"
    """Which of the toolkit's systems."""
    ae: str = ""
    """Autoencoder in place of that in --run: an export or run folder, or an official checkpoint (.pt)."""
    content: str = ""
    """Content model in place of that in --run."""
    motion: str = ""
    """Motion model in place of that in --run."""
    vae: str = ""
    """Latent mode: folder of the image VAE."""
    scale_factor: float = 0.18215
    """Latent mode: factor of the image VAE's latents."""
    guidance_scale: float | None = None
    """Guidance of both models, eps_u + s (eps_c - eps_u); 1: none. none: 4."""
    content_guidance_scale: float | None = flag(None, "content.guidance-scale")
    """Guidance of the content model, where it is another."""
    motion_guidance_scale: float | None = flag(None, "motion.guidance-scale")
    """Guidance of the motion model, where it is another."""
    steps: int | None = None
    """Denoising steps of both models; none: 50 of the content model, 100 of the motion model."""
    content_steps: int | None = flag(None, "content.steps")
    """Steps of the content model, where they are others."""
    motion_steps: int | None = flag(None, "motion.steps")
    """Steps of the motion model, where they are others."""
    respacing: str = ""
    """Which steps of training both models take, in place of a number: "50" evenly, "10,15,20" per equal section, "ddim50" at one stride."""
    sampler: Sampler = "auto"
    """Sampler of both models: ddim, ddpm (ancestral) or dpm++ (DPM-Solver++(2M)); of flows euler or heun. auto: ddim, of a flow euler."""
    content_sampler: Sampler | None = flag(None, "content.sampler")
    """Sampler of the content model, where it is another."""
    motion_sampler: Sampler | None = flag(None, "motion.sampler")
    """Sampler of the motion model, where it is another."""
    eta: float = 0.0
    """DDIM: share of fresh noise; 0 is deterministic."""
    cfg_channels: int | None = None
    """Channels that are guided; none: all. The published samplers guide 3."""
    n_frames: int = 16
    """Official checkpoints do not say their clip size: frames."""
    image_size: tuple[int, int] = (64, 64)
    """And height and width."""

    modes: ClassVar[tuple[str, ...]] = ("short",)
    usual_guidance: ClassVar[float] = 4.0

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        if self.mode == "long":
            raise ConfigError(
                "--mode long is not for CMD: its content frame and motion latents mix all frames of a clip, so none of them could be held "
                "fixed, and its models take no clip before"
            )
        super().validate()
        if not self.run and not (self.ae and self.content and self.motion):
            raise ConfigError("what to sample from? give --run FOLDER (the --results-dir of training), or --ae, --content and --motion")
        self.at_least(1, "content_steps", "motion_steps", "n_frames", "cfg_channels")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"--eta {self.eta}: between 0 and 1")
        for name in ("steps", "content_steps", "motion_steps"):
            if getattr(self, name) and self.respacing:
                flag_name = name.replace("_", "-")
                raise ConfigError(f"--{flag_name} {getattr(self, name)} and --respacing {self.respacing}: give one of them")

    def sampling(self, stage: str) -> Sampling:
        """How the model of a stage is sampled: as is said of it, else of both, else as the release does."""

        def chosen(name: str, usual: Any) -> Any:
            return next(value for value in (getattr(self, f"{stage}_{name}"), getattr(self, name), usual) if value is not None)

        return Sampling(
            steps=chosen("steps", USUAL_STEPS[stage]),
            sampler=chosen("sampler", "auto"),
            eta=self.eta,
            guidance=chosen("guidance_scale", self.usual_guidance),
            cfg_channels=self.cfg_channels,
            clip=stage == "content",
            respacing=self.respacing,
        )


class CMDSampleJob:
    """Makes sample number i. What it makes is a function of `settings()` alone."""

    endings = ("",)
    draws = 2

    def __init__(self, config: CMDSampleConfig, device: torch.device, pipeline: CMDPipeline | None = None) -> None:
        """`pipeline`: networks that are there already, of the same settings. Raises UserError or ConfigError in one line."""
        self.config = config
        self.pipeline = pipeline or _open(config, device)
        self.content, self.motion = config.sampling("content"), config.sampling("motion")
        for model, sampling in ((self.pipeline.content, self.content), (self.pipeline.motion, self.motion)):
            assert model is not None
            if model.config.cond_dim:
                raise UserError(f"{model.path} is conditioned on vectors: generate with pipelines.cmd.CMDPipeline.generate(..., cond=...)")
            count_steps(diffusion_of(model), sampling)
        self.labels = choose_classes(config.classes, self.pipeline.num_classes, self.pipeline.classes)
        self.fps = config.fps or self.pipeline.fps
        self.n_frames = self.pipeline.clip_shape[0]
        self.notes: list[str] = []
        if config.num_frames > self.n_frames:
            raise ConfigError(f"--num-frames {config.num_frames}: clips of CMD have {self.n_frames}, as in training, and can only be cut")
        self.n_frames = config.num_frames or self.n_frames
        if not self.labels:
            given = (config.guidance_scale, config.content_guidance_scale, config.motion_guidance_scale)
            scale = next((value for value in given if value not in (None, 1)), None)
            self.notes += [f"warning: --guidance-scale {scale:g} does nothing: the models know no classes"] if scale is not None else []

    def label(self, index: int) -> int | None:
        """Class of a sample; None when the models have none."""
        return in_turn(self.labels, index)

    def name(self, index: int) -> str:
        """File name of a sample, without ending."""
        return numbered(index, self.label(index))

    def generate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The clips b 3 t h w in [-1, 1]."""
        labels = [self.labels[i % len(self.labels)] for i in indices] if self.labels else None
        seed, exact = self.config.seed, self.config.exact
        clips = self.pipeline.generate(indices, labels, seed=seed, content=self.content, motion=self.motion, exact=exact)
        return {"": clips[:, :, : self.n_frames]}

    def strip(self) -> Strip | None:
        """None: two models make a clip of CMD, and neither's steps are clips."""
        return None

    def settings(self) -> dict[str, Any]:
        """Plain values: everything that a sample depends on."""
        content, motion = self.pipeline.content, self.pipeline.motion
        assert content is not None and motion is not None
        parts = {"ae": self.pipeline.ae, "content": content, "motion": motion}
        return {
            "system": "cmd",
            "seed": self.config.seed,
            "classes": self.labels,
            "weights": self.config.weights,
            "sha256": {name: part.sha256 for name, part in parts.items()},
            "vae_sha256": self.pipeline.vae.sha256 if self.pipeline.vae is not None else "",
            "content": self.content.settings(diffusion_of(content)),
            "motion": self.motion.settings(diffusion_of(motion)),
            "exact": self.config.exact,
            "precision": self.config.precision,
            "device": self.pipeline.device.type,
            "fps": self.fps,
            **({"n_frames": self.n_frames} if self.n_frames != self.pipeline.clip_shape[0] else {}),
        }

    def sources(self) -> dict[str, str]:
        """Where the networks were read."""
        parts = {"ae": self.pipeline.ae, "content": self.pipeline.content, "motion": self.pipeline.motion}
        return {name: part.path for name, part in parts.items() if part is not None}

    def class_name(self, label: int | None) -> str:
        """Name of a class, where the training data had one."""
        return class_name(self.pipeline.classes, label)


def _open(config: CMDSampleConfig, device: torch.device) -> CMDPipeline:
    """The networks that the settings name."""
    found = find_family(config.run) if config.run else {}
    return CMDPipeline.from_exports(
        config.ae or found["autoencoder"],
        config.content or found["content"],
        config.motion or found["motion"],
        vae=config.vae,
        scale_factor=config.scale_factor,
        weights=config.weights,
        n_frames=config.n_frames,
        image_size=config.image_size,
        device=device,
        precision=config.precision,
    )
