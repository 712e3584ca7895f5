"""Settings that the autoencoders of whole clips share (PVDM's planes, HVDM's volumes)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Self, TypeVar

from datasets.config import DataConfig
from engine.config import EmaConfig, OptimConfig, RunConfig
from tasks.clips import ClipInfo
from tasks.reconstruction_config import AdversarialConfig, PerceptualConfig, check_not_negative, without_missing_weights
from utils.config import flag
from utils.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TokenModelConfig:
    """An autoencoder of patch tokens; the sizes of clips are those of the data."""

    dim: int = 384
    """Width of the transformers."""
    depth: int = 8
    """Layers of the encoder, and of the decoder."""
    heads: int = 8
    """Their attention heads."""
    head_dim: int = 64
    """Width of a head."""
    patch_size: int = flag(8, "patch-size")
    """Side of a square patch, and so how many times smaller the latents are than a frame."""
    embed_dim: int = flag(4, "embed-dim")
    """Channels of the latents."""
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


def release_adversarial() -> AdversarialConfig:
    """The releases' discriminators, off: their first phase trains without them."""
    return AdversarialConfig(turns="alternate", sync_norms=True, disc_lr=0.0, disc_weight_decay=0.01, disc_clip_norm=1.0)


@dataclasses.dataclass(frozen=True)
class ClipLossConfig:
    l1: float = 4.0
    """Factor of the mean absolute error."""
    l2: float = 0.0
    """Factor of the mean squared error."""
    perceptual: PerceptualConfig = dataclasses.field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = dataclasses.field(default_factory=release_adversarial)

    def distances(self) -> dict[str, float]:
        """Factors of the distances that need no network, by name."""
        return {"l1": self.l1, "l2": self.l2}

    @property
    def is_perceptual(self) -> bool:
        """Whether the perceptual distance counts."""
        return self.perceptual.kind != "none" and self.perceptual.weight != 0


@dataclasses.dataclass(frozen=True)
class ClipAutoencoderRunConfig(RunConfig):
    """Trains an autoencoder of whole clips."""

    system: str = ""
    """Which of the toolkit's systems."""
    stage: str = "autoencoder"
    """Which of its stages."""
    optim: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(lr=1e-4, betas=(0.5, 0.9), weight_decay=0.01))
    ema: EmaConfig = dataclasses.field(default_factory=lambda: EmaConfig(decay=0.0))
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: ClipLossConfig = dataclasses.field(default_factory=ClipLossConfig)

    def for_planning(self) -> Self:
        """The same for a dry run: perceptual weights that are missing leave their network out of the count, with a warning."""
        planned: Self = without_missing_weights(self)
        return planned

    def validate(self) -> None:
        """Raises ConfigError on settings and combinations that cannot work."""
        super().validate()
        loss, distances = self.loss, self.loss.distances()
        check_not_negative(distances | {"perceptual.weight": loss.perceptual.weight})
        loss.adversarial.validate()
        if not any(distances.values()) and not loss.is_perceptual:
            raise ConfigError(f"loss: {', '.join(distances)} and the perceptual loss are all off, nothing is left to train on")
        self.best.check_among(("l1", "psnr", "ssim", *(("perceptual",) if loss.is_perceptual else ())))


def network_config(kind: Callable[..., T], model: Any, clips: ClipInfo) -> T:
    """The network of config class `kind` for such clips, of the settings `model` (a dataclass: its sizes, and `init_from`).

    Raises ConfigError for sizes that cannot be.
    """
    sizes = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.name != "init_from"}
    try:
        return kind(image_size=clips.image_size, n_frames=clips.n_frames, **sizes)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
