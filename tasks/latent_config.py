"""Settings of denoisers that train on the latents of a frozen first stage."""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import models
from datasets.config import DataConfig
from diffusion import DiffusionConfig
from engine.config import OptimConfig, RunConfig
from models.transformers.latte import LatteConfig
from tasks.diffusion_checks import check_settings
from tasks.diffusion_task import ConditionConfig, DrawConfig, PreviewConfig
from utils.config import flag
from utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class FrameAutoencoderConfig:
    """A frame VAE of train_ae.py."""

    path: str = flag("", "ae")
    """Its export: the export/ folder or the run's folder. Of latents it may be left out: then previews show latents."""
    weights: Literal["ema", "model"] = "ema"
    """Which of the export's weights; ema falls back to model where there is no average."""


@dataclasses.dataclass(frozen=True)
class FrameVaeConfig:
    """A Stable Diffusion VAE, for want of one of our own."""

    path: str = flag("", "vae", "pretrained-model-path")
    """Folder of a diffusers AutoencoderKL (config.json and its weights) on this machine."""
    chunk: int = 16
    """Frames per pass through the autoencoder, of whichever kind; less needs less memory."""


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """How latents are brought to zero mean and unit variance, which the noise has: (latent - shift) * scale."""

    scale: float = flag(0.0, "latent-scale", "scale-factor")
    """0: 0.18215 for a Stable Diffusion VAE, else as the latent set says, else measured on the first clips. 1: as they are."""
    shift: float = flag(0.0, "latent-shift")
    """Taken off before; only with a scale of one's own. With scale 0 it goes with the scale."""
    measure_clips: int = 64
    """Clips that are encoded at the start to measure a scale that nobody knows."""


@dataclasses.dataclass(frozen=True)
class NamedSizeConfig:
    """A named size, and changes to it: 0 or empty keeps what the size has. A system's own names its sizes."""

    name: str = ""

    apart: ClassVar[tuple[str, ...]] = ("name", "init_from")
    """Settings that the network's config does not have, or not as they stand here."""

    def changes(self) -> dict[str, Any]:
        """What differs from the named size."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in self.apart}
        default = type(self)()
        return {name: value for name, value in own.items() if value != getattr(default, name)}


@dataclasses.dataclass(frozen=True)
class SpaceRunConfig(RunConfig):
    """What the denoisers of all spaces set, of latents and of frames. A system's own adds `model`, and says its name."""

    system: str = ""
    """Which of the toolkit's systems."""
    stage: str = "denoiser"
    """Which of its stages."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    preview: DrawConfig = dataclasses.field(default_factory=DrawConfig)


@dataclasses.dataclass(frozen=True)
class LatentRunConfig(SpaceRunConfig):
    """What the denoisers of latents set. A system's own adds `ae` and `model`, and says its name."""

    optim: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(clip_norm=1.0))
    latent: LatentConfig = dataclasses.field(default_factory=LatentConfig)
    condition: ConditionConfig = dataclasses.field(default_factory=lambda: ConditionConfig(num_classes=0))
    preview: PreviewConfig = dataclasses.field(default_factory=PreviewConfig)

    def for_planning(self) -> Self:
        """The same for a dry run, which measures nothing."""
        known = dataclasses.replace(self.latent, scale=self.latent.scale or 1.0)
        return dataclasses.replace(self, latent=known)

    def validate(self) -> None:
        """Raises ConfigError on settings and combinations that cannot work."""
        super().validate()
        latent = self.latent
        if not 0 <= latent.scale < math.inf:  # NaN too
            raise ConfigError(f"--latent-scale {latent.scale}: more than 0, or 0 to take or measure that of the latents")
        if not math.isfinite(latent.shift):
            raise ConfigError(f"--latent-shift {latent.shift}: it is a number that is taken off each latent")
        if latent.shift and not latent.scale:
            raise ConfigError(f"--latent-shift {latent.shift} needs a --latent-scale: without one both are measured")
        if latent.measure_clips < 1:
            raise ConfigError(f"latent.measure_clips {latent.measure_clips}: at least 1")


@dataclasses.dataclass(frozen=True)
class LatteModelConfig:
    """A named size, and changes to it: 0 or empty keeps what the size has."""

    name: str = flag("Latte-XL/2", "model", "model-name")
    """Size: Latte-{S,B,L,XL}/{2,4,8}."""
    patch_size: int = 0
    """Side of the patches."""
    hidden_size: int = 0
    """Width of the transformer."""
    depth: int = 0
    """Its blocks, an even number."""
    num_heads: int = 0
    """Its attention heads."""
    head_dim: int = 0
    """Width of a head; 0: hidden_size / num_heads."""
    mlp_ratio: float = 0.0
    """Hidden width of the MLPs over hidden_size."""
    block_layout: Literal["interleaved", "late"] = "interleaved"
    """interleaved: space and time by turns (the paper's variant 1); late: all of space, then all of time (variant 2)."""
    time_embed_order: Literal["cos_sin", "sin_cos"] = "cos_sin"
    """Halves of the step embedding: cos_sin as in the official release, sin_cos as in the tutorial's."""
    time_embed_dim: int = 0
    """Width of the step embedding before its MLP."""
    pos_embed_order: Literal["wh", "hw"] = "wh"
    """First half of the position channels: wh, the column, as in the official release; hw, the row, as in the tutorial's."""
    init_from: str = flag("", "init-from", "pretrained")
    """Export, run or released checkpoint of a Latte whose weights the run starts from (of its average); empty: a fresh start."""
    init_from_dit: str = flag("", "init-from-dit")
    """Official checkpoint of an image DiT of this size, whose weights the run starts from; empty: a fresh start."""


@dataclasses.dataclass(frozen=True)
class LatteRunConfig(LatentRunConfig):
    """Trains Latte."""

    system: str = "latte"
    """Which of the toolkit's systems."""
    ae: FrameAutoencoderConfig = dataclasses.field(default_factory=FrameAutoencoderConfig)
    vae: FrameVaeConfig = dataclasses.field(default_factory=FrameVaeConfig)
    model: LatteModelConfig = dataclasses.field(default_factory=LatteModelConfig)

    def validate(self) -> None:
        """Raises ConfigError on settings and combinations that cannot work."""
        super().validate()
        check_settings("Latte", self.model.name, self.condition, self.preview, self.diffusion, self.best, "--model")
        if self.ae.path and self.vae.path:
            raise ConfigError(f"--ae {self.ae.path} and --vae {self.vae.path}: give one of them, the first stage is either")
        if self.vae.chunk < 1:
            raise ConfigError(f"vae.chunk {self.vae.chunk}: at least 1 frame at a time")
        if self.model.init_from and self.model.init_from_dit:
            raise ConfigError("--init-from and --init-from-dit: a run starts from one of them")
        if self.model.init_from_dit and not Path(self.model.init_from_dit).is_file():
            raise ConfigError(f"--init-from-dit {self.model.init_from_dit}: no such file")
        side = self.model.patch_size or 8  # the latents are not known yet
        latte_size(self.model, input_size=(side, side))


def latte_size(sizes: LatteModelConfig, **overrides: object) -> LatteConfig:
    """Config of the network that the settings name. Raises ConfigError with the nearest name, or for sizes that cannot be."""
    free = ("patch_size", "hidden_size", "depth", "num_heads", "head_dim", "mlp_ratio", "time_embed_dim")
    changed = {name: getattr(sizes, name) for name in free if getattr(sizes, name)}
    changed |= {name: getattr(sizes, name) for name in ("block_layout", "time_embed_order", "pos_embed_order")}
    try:
        config = models.resolve(sizes.name, "Latte", **changed, **overrides)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    assert isinstance(config, LatteConfig)
    return config
