"""Settings of the autoencoder stage of PVDM."""

import dataclasses
from typing import Any, Literal

from datasets.config import DataConfig
from engine.config import EmaConfig, OptimConfig, RunConfig
from models.autoencoders.pvdm import PVDMAEConfig
from tasks.clips import ClipInfo
from tasks.reconstruction_config import AdversarialConfig, PerceptualConfig, check_not_negative, without_missing_weights
from utils.config import flag
from utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PVDMModelConfig:
    dim: int = 384
    """Width of the transformers."""
    depth: int = 8
    """Layers of the encoder, and of the decoder."""
    heads: int = 8
    """Their attention heads."""
    head_dim: int = 64
    """Width of a head."""
    patch_size: int = flag(8, "patch-size")
    """Side of a square patch, and so how many times smaller a plane of latents is than a frame."""
    embed_dim: int = flag(4, "embed-dim")
    """Channels of the latents."""
    splits: int = flag(1, "splits")
    """Clips are cut into so many of equal length, each with planes of its own."""
    plane_depth: int = 4
    """Layers of each of the transformers that project onto a plane."""
    plane_heads: int = 4
    """Their attention heads."""
    plane_head_dim: int = 0
    """Width of such a head; 0: dim / 8."""
    plane_mlp_dim: int = 512
    """Hidden width of their MLPs."""
    frame_rotary: Literal["release", "corrected"] = "release"
    """Rotary positions of frames. release: as in the released weights, angles and pairs of channels do not match; corrected: a rotation."""
    readout: Literal["first", "token"] = "first"
    """Which output of a projection is the plane: that of the first position, as in the released weights, or that of the learned token."""
    init_from: str = flag("", "init-from")
    """Export, run or released checkpoint (model_last.pth) of an autoencoder whose weights the run starts from; empty: a fresh start."""

    def of(self, clips: ClipInfo) -> PVDMAEConfig:
        """The autoencoder for such clips. Raises ConfigError for sizes that cannot be."""
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "init_from"}
        try:
            return PVDMAEConfig(image_size=clips.image_size, n_frames=clips.n_frames, **sizes)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None


def release_adversarial() -> AdversarialConfig:
    """The release's discriminators, off: its first phase trains without them."""
    return AdversarialConfig(turns="alternate", sync_norms=True, disc_lr=0.0, disc_weight_decay=0.01, disc_clip_norm=1.0)


@dataclasses.dataclass(frozen=True)
class PVDMLossConfig:
    l1: float = 4.0
    """Factor of the mean absolute error."""
    l2: float = 0.0
    """Factor of the mean squared error."""
    perceptual: PerceptualConfig = dataclasses.field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = dataclasses.field(default_factory=release_adversarial)


@dataclasses.dataclass(frozen=True)
class PVDMAutoencoderConfig(RunConfig):
    """Trains PVDM's autoencoder."""

    system: str = "pvdm"
    """Which of the toolkit's systems."""
    stage: str = "autoencoder"
    """Which of its stages."""
    optim: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(lr=1e-4, betas=(0.5, 0.9), weight_decay=0.01))
    ema: EmaConfig = dataclasses.field(default_factory=lambda: EmaConfig(decay=0.0))
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: PVDMModelConfig = dataclasses.field(default_factory=PVDMModelConfig)
    loss: PVDMLossConfig = dataclasses.field(default_factory=PVDMLossConfig)

    def for_planning(self) -> "PVDMAutoencoderConfig":
        """The same for a dry run: perceptual weights that are missing leave their network out of the count, with a warning."""
        planned: Any = without_missing_weights(self)
        return planned

    def validate(self) -> None:
        """Raises ConfigError on settings and combinations that cannot work."""
        super().validate()
        loss = self.loss
        check_not_negative({"l1": loss.l1, "l2": loss.l2, "perceptual.weight": loss.perceptual.weight})
        loss.adversarial.validate()
        if not (loss.l1 or loss.l2 or (loss.perceptual.kind != "none" and loss.perceptual.weight)):
            raise ConfigError("loss: l1, l2 and the perceptual loss are all off, nothing is left to train on")
        measured = ("l1", "psnr", "ssim", *(("perceptual",) if loss.perceptual.kind != "none" and loss.perceptual.weight else ()))
        if self.best.metric and self.best.metric not in measured:
            raise ConfigError(f"--best-metric {self.best.metric}: evaluations measure {', '.join(measured)}")
