"""Settings of the autoencoder stage of Latte."""

import dataclasses
from typing import Literal

from datasets.config import DataConfig
from engine.config import EmaConfig, OptimConfig, RunConfig
from models.autoencoders.frame_vae import FrameVAEConfig
from models.discriminators import FrameDiscriminatorConfig
from tasks.reconstruction_config import PerceptualConfig, check_not_negative, without_missing_weights
from utils.config import flag
from utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class FrameAdversarialConfig:
    weight: float = flag(0.5, "disc-weight")
    """Factor of the adversarial loss (least squares) in both losses, the autoencoder's and the discriminator's; 0: no discriminator."""
    start_step: int = flag(5000, "disc-start")
    """Optimiser step of the run at which the discriminator and its loss set in. (The release counts from each restart.)"""
    lr: float = 0.0
    """Learning rate of the discriminator's own AdamW; 0: the autoencoder's."""
    betas: tuple[float, float] = (0.5, 0.999)
    """Its decay rates."""
    conv_channels: tuple[int, ...] = (64, 128, 256)
    """Widths of the discriminator's stages of stride 2."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation in the discriminator. batch: over the micro-batch of one rank, as in the release, so that results depend on the number
    of ranks and on accumulation; group: of each frame alone, so that they do not."""


@dataclasses.dataclass(frozen=True)
class FrameLossConfig:
    kl_weight: float = flag(5e-6, "kl-weight")
    """Factor of the KL divergence from the standard normal, which is summed over a latent; the squared error is a mean over a frame."""
    perceptual: PerceptualConfig = dataclasses.field(default_factory=lambda: PerceptualConfig(weight=1.0))
    adversarial: FrameAdversarialConfig = dataclasses.field(default_factory=FrameAdversarialConfig)


@dataclasses.dataclass(frozen=True)
class FrameVAERunConfig(RunConfig):
    """Trains Latte's frame VAE, on single frames."""

    system: str = "latte"
    """Which of the toolkit's systems."""
    stage: str = "autoencoder"
    """Which of its stages."""
    optim: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(lr=1e-5, betas=(0.5, 0.999)))
    ema: EmaConfig = dataclasses.field(default_factory=lambda: EmaConfig(decay=0.0))
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(n_frames=1, frame_sample_prob=0.1))
    model: FrameVAEConfig = dataclasses.field(default_factory=FrameVAEConfig)
    loss: FrameLossConfig = dataclasses.field(default_factory=FrameLossConfig)

    def for_planning(self) -> "FrameVAERunConfig":
        """The same for a dry run: perceptual weights that are missing leave their network out of the count, with a warning."""
        return without_missing_weights(self)

    def discriminator(self) -> FrameDiscriminatorConfig | None:
        """That of the discriminator; None without one. Raises ConfigError."""
        setting = self.loss.adversarial
        if setting.weight == 0:
            return None
        stages = len(setting.conv_channels)
        shapes = {"kernels": (4,) * (stages + 1), "strides": (*(2,) * stages, 1), "paddings": (1,) * (stages + 1)}
        try:
            return FrameDiscriminatorConfig(self.model.channels, setting.conv_channels, **shapes, norm=setting.norm)
        except ValueError as error:
            raise ConfigError(f"loss.adversarial: {error}") from None

    def validate(self) -> None:
        """Raises ConfigError on settings and combinations that cannot work."""
        super().validate()
        adversarial = self.loss.adversarial
        if self.model.channels not in (1, 3):
            raise ConfigError(f"model.channels {self.model.channels}: 3, or 1 for luma")
        if self.data.n_frames not in (0, 1):
            raise ConfigError(f"--n-frames {self.data.n_frames}: the frame VAE is trained on single frames; drop the flag")
        numbers = {
            "kl_weight": self.loss.kl_weight,
            "perceptual.weight": self.loss.perceptual.weight,
            "adversarial.weight": adversarial.weight,
            "adversarial.start_step": adversarial.start_step,
            "adversarial.lr": adversarial.lr,
        }
        check_not_negative(numbers)
        if not all(0 <= value < 1 for value in adversarial.betas):
            raise ConfigError(f"loss.adversarial.betas {' '.join(map(str, adversarial.betas))}: 0 or more, and below 1")
        self.best.check_among(("l1", "psnr", "ssim", "latent_mean", "latent_std"))
        self.discriminator()
