"""What `sample.py` needs to know of CMD: its settings, its exports, and how sample number i is made."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipelines.cmd import CMDPipeline
from pipelines.loading import diffusion_of
from pipelines.runs import find_family
from pipelines.sampling import Sampling, respaced
from utils.config import flag, to_dict
from utils.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class CMDSampleConfig:
    """Generates clips with CMD."""

    system: str = "cmd"
    """Which of the toolkit's systems."""
    run: str = flag("", "results-dir")
    """Results folder of the training runs: the newest finished content model, its autoencoder and its motion model are taken.
    The same as a bare first argument, which is what works under torchrun too (it may take --run for one of its own flags)."""
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
    weights: Literal["ema", "model"] = "ema"
    """Averaged weights (where there are any), or the last ones."""
    out: Path = Path("samples")
    """Folder to write to. Samples that are already there with the same settings are kept."""
    num_samples: int = 16
    """Clips to generate."""
    classes: tuple[str, ...] = ()
    """Classes by number or name, in turn; none given, or `all`: all of them."""
    seed: int = flag(0, "global-seed")
    """Seed of all noise. Sample number i of a seed is the same clip whatever else is generated with it."""
    guidance_scale: float = 4.0
    """Guidance of the content model, eps_u + s (eps_c - eps_u); 1: none."""
    motion_guidance_scale: float | None = None
    """Guidance of the motion model; none: that of the content model."""
    steps: int | None = None
    """Denoising steps of both models; none: as the next two say."""
    content_steps: int = 50
    """Steps of the content model."""
    motion_steps: int = 100
    """Steps of the motion model."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """Sampler of both models."""
    eta: float = 0.0
    """DDIM: share of fresh noise; 0 is deterministic."""
    cfg_channels: int | None = None
    """Channels that are guided; none: all. The published samplers guide 3."""
    batch_size: int = 4
    """Clips per write; with --no-exact also clips that go through the networks together."""
    exact: bool = True
    """Each clip alone through the networks, so that it is the same to the last bit with any batch size and number of processes."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks."""
    fps: float = 0.0
    """Frame rate of the files; 0: that of the training clips."""
    gif: bool = False
    """Also write each clip as a GIF."""
    n_frames: int = 16
    """Official checkpoints do not say their clip size: frames."""
    image_size: tuple[int, int] = (64, 64)
    """And height and width."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        if not self.run and not (self.ae and self.content and self.motion):
            raise ConfigError("what to sample from? give --run FOLDER (the --results-dir of training), or --ae, --content and --motion")
        for name in ("num_samples", "batch_size", "steps", "content_steps", "motion_steps", "n_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: at least 1")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"--eta {self.eta}: between 0 and 1")
        if self.fps < 0:
            raise ConfigError(f"--fps {self.fps}: above 0, or 0 for that of the training clips")
        if self.cfg_channels is not None and self.cfg_channels < 1:
            raise ConfigError(f"--cfg-channels {self.cfg_channels}: at least 1")


class CMDSampleJob:
    """Makes sample number i. What it makes is a function of `settings()` alone."""

    def __init__(self, config: CMDSampleConfig, device: torch.device) -> None:
        self.config = config
        found = find_family(Path(config.run)) if config.run else {}
        self.pipeline = CMDPipeline.from_exports(
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
        common = Sampling(sampler=config.sampler, eta=config.eta, cfg_channels=config.cfg_channels)
        motion_scale = config.guidance_scale if config.motion_guidance_scale is None else config.motion_guidance_scale
        self.content = dataclasses.replace(common, steps=config.steps or config.content_steps, guidance=config.guidance_scale, clip=True)
        self.motion = dataclasses.replace(common, steps=config.steps or config.motion_steps, guidance=motion_scale)
        for model, sampling in ((self.pipeline.content, self.content), (self.pipeline.motion, self.motion)):
            assert model is not None
            if model.config.cond_dim:
                raise UserError(f"{model.path} is conditioned on vectors: generate with pipelines.cmd.CMDPipeline.generate(..., cond=...)")
            respaced(diffusion_of(model), sampling.steps)
        self.labels = self._choose_classes()
        self.fps = config.fps or self.pipeline.fps

    def label(self, index: int) -> int | None:
        """Class of a sample; None when the models have none."""
        return self.labels[index % len(self.labels)] if self.labels else None

    def name(self, index: int) -> str:
        """File name of a sample, without ending."""
        label = self.label(index)
        return f"{index:06d}" if label is None else f"{index:06d}-class{label:03d}"

    def generate(self, indices: Sequence[int]) -> Tensor:
        """b 3 t h w in [-1, 1]."""
        labels = [self.labels[i % len(self.labels)] for i in indices] if self.labels else None
        return self.pipeline.generate(
            indices, labels, seed=self.config.seed, content=self.content, motion=self.motion, exact=self.config.exact
        )

    def settings(self) -> dict[str, Any]:
        """Plain values: everything that a sample depends on."""
        parts = {"ae": self.pipeline.ae, "content": self.pipeline.content, "motion": self.pipeline.motion}
        return {
            "system": "cmd",
            "seed": self.config.seed,
            "classes": self.labels,
            "weights": self.config.weights,
            "sha256": {name: part.sha256 for name, part in parts.items() if part is not None},
            "vae_sha256": self.pipeline.vae.sha256 if self.pipeline.vae is not None else "",
            "content": to_dict(self.content),
            "motion": to_dict(self.motion),
            "exact": self.config.exact,
            "precision": self.config.precision,
            "device": self.pipeline.device.type,
            "fps": self.fps,
        }

    def sources(self) -> dict[str, str]:
        """Where the networks were read."""
        parts = {"ae": self.pipeline.ae, "content": self.pipeline.content, "motion": self.pipeline.motion}
        return {name: part.path for name, part in parts.items() if part is not None}

    def class_name(self, label: int | None) -> str:
        """Name of a class, where the training data had one."""
        names = self.pipeline.classes
        return names[label] if label is not None and label < len(names) else ""

    def _choose_classes(self) -> list[int]:
        known, names = self.pipeline.num_classes, self.pipeline.classes
        wanted = self.config.classes
        if not known:
            if wanted:
                raise UserError("--classes: these models know no classes")
            return []
        if not wanted or wanted == ("all",):
            return list(range(known))
        return [_class_number(item, known, names) for item in wanted]


def _class_number(item: str, known: int, names: Sequence[str]) -> int:
    if item in names:
        return names.index(item)
    if item.isdecimal() and int(item) < known:
        return int(item)
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    raise UserError(f"--classes {item}: no such class; 0 to {known - 1}" + (f", or {listed}" if names else ""))
