"""Settings of the autoencoder stage of CMD."""

import dataclasses
from typing import Literal

from datasets.config import DataConfig
from engine.config import OptimConfig, RunConfig
from tasks.clips import VaeConfig
from tasks.reconstruction_config import AdversarialConfig, PerceptualConfig, check_not_negative, without_missing_weights
from utils.config import flag
from utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class AutoencoderModelConfig:
    mode: Literal["pixel", "latent"] = flag("pixel", "mode")
    """pixel: clips as they are; latent: frame by frame through an image VAE first."""
    dim: int = 384
    """Width of the transformer."""
    depth: int = 8
    """Layers of the encoder, and of the decoder."""
    heads: int = 8
    """Attention heads."""
    patch_size: int = 2
    """Side of a square patch."""
    embed_dim: int = flag(8, "embed-dim")
    """Channels D of the motion latent."""
    rotary: Literal["axial", "none"] = "axial"
    """Positions in the attention: axial, or none as in the official release (whose weights know no position at all)."""


@dataclasses.dataclass(frozen=True)
class ReconstructionLossConfig:
    l1: float = 4.0
    """pixel mode: factor of the mean absolute error."""
    l2: float = 0.0
    """pixel mode: factor of the mean squared error."""
    content_mean: float = 0.0
    """pixel mode: factor of the squared distance of the content frame from the plain mean of the frames. Without it an autoencoder hides
    motion in fine patterns of the content frame, which a content model finds hard to learn."""
    latent_l2: float = 1.0
    """latent mode: factor of the mean squared error, the only term there."""
    perceptual: PerceptualConfig = dataclasses.field(default_factory=PerceptualConfig)
    adversarial: AdversarialConfig = dataclasses.field(default_factory=AdversarialConfig)


@dataclasses.dataclass(frozen=True)
class CMDAutoencoderConfig(RunConfig):
    """Trains CMD's autoencoder."""

    system: str = "cmd"
    """Which of the toolkit's systems."""
    stage: str = "autoencoder"
    """Which of its stages."""
    optim: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(lr=1e-5, betas=(0.5, 0.9)))
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: AutoencoderModelConfig = dataclasses.field(default_factory=AutoencoderModelConfig)
    vae: VaeConfig = dataclasses.field(default_factory=VaeConfig)
    loss: ReconstructionLossConfig = dataclasses.field(default_factory=ReconstructionLossConfig)

    def for_planning(self) -> "CMDAutoencoderConfig":
        """The same for a dry run: perceptual weights that are missing leave their network out of the count, with a warning."""
        return without_missing_weights(self)

    def validate(self) -> None:
        """Raises ConfigError on settings and combinations that cannot work."""
        super().validate()
        model, loss = self.model, self.loss
        if min(model.dim, model.depth, model.heads, model.patch_size, model.embed_dim) < 1:
            raise ConfigError("model: dim, depth, heads, patch_size and embed_dim must be at least 1")
        if model.dim % model.heads:
            raise ConfigError(f"model.dim {model.dim} is not a multiple of model.heads {model.heads}")
        if model.mode == "latent" and not self.vae.path:
            raise ConfigError("--mode latent needs an image VAE: --vae FOLDER with a diffusers AutoencoderKL")
        if model.mode == "latent" and loss.adversarial.enabled:
            raise ConfigError("the adversarial loss is for --mode pixel; latent mode trains with the squared error alone")
        if model.mode == "latent" and loss.latent_l2 <= 0:
            raise ConfigError(f"loss.latent_l2 is {loss.latent_l2}: in latent mode it is the only loss and must be positive")
        factors = {name: getattr(loss, name) for name in ("l1", "l2", "content_mean")} | {"perceptual.weight": loss.perceptual.weight}
        check_not_negative(factors)
        loss.adversarial.validate()
        if model.mode == "pixel" and not (loss.l1 or loss.l2 or (loss.perceptual.kind != "none" and loss.perceptual.weight)):
            raise ConfigError("loss: l1, l2 and the perceptual loss are all off, nothing is left to train on")
        seen = model.mode == "pixel" and loss.perceptual.kind != "none" and loss.perceptual.weight
        self.best.check_among(("l1", "psnr", "ssim", *(("perceptual",) if seen else ())))
