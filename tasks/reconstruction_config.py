"""Settings of the losses that autoencoders share."""

import dataclasses
from typing import Any, Literal

from utils.config import flag
from utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    kind: Literal["lpips-vgg", "lpips-alex", "lpips-squeeze", "effl0", "none"] = flag("lpips-vgg", "perceptual")
    """Network of the perceptual loss; none trains without."""
    weights: str = flag("", "perceptual-weights")
    """File with the network's weights; empty: the torch hub cache."""
    on_missing: Literal["error", "warn-and-disable"] = "error"
    """What to do when the weights are not there."""
    weight: float = 4.0
    """Its factor in the loss."""


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    enabled: bool = flag(False, "adversarial")
    """Train with a 2-D discriminator on one frame and a 3-D one on the clip."""
    start_step: int = flag(0, "disc-start")
    """Optimiser step at which the discriminators and their loss set in."""
    turns: Literal["both", "alternate"] = flag("both", "disc-turns")
    """both: autoencoder and discriminators are updated in every step; alternate: by turns, each in every other step, the autoencoder in
    the start step, as PVDM's release does."""
    loss: Literal["hinge", "vanilla"] = flag("hinge", "disc-loss")
    """Loss of the discriminators."""
    weight: float = 1.0
    """Factor of the generator's adversarial loss."""
    feature_matching: float = 4.0
    """Factor of the feature matching loss."""
    ndf: int = 64
    """Width of the discriminators' first layer."""
    n_layers: int = 3
    """Layers of stride 2."""
    sync_norms: bool = False
    """Their batch norms take the statistics of the micro-batch over all ranks, so that results do not depend on the number of ranks (but
    on accumulation, which makes micro-batches of other samples); otherwise those of each rank's part."""
    disc_lr: float = 1e-5
    """Learning rate of the discriminators' own AdamW; 0: the autoencoder's."""
    disc_betas: tuple[float, float] = (0.5, 0.9)
    """Its decay rates."""
    disc_weight_decay: float = 0.0
    """Its weight decay."""
    disc_clip_norm: float = 0.0
    """Clip the gradient of each of the two discriminators to this norm; 0: no clipping."""
    disc_init_from: str = flag("", "init-disc-from")
    """The release's criterion (loss_last.pth), whose discriminators the run starts from; empty: fresh ones."""

    def validate(self) -> None:
        """Raises ConfigError on numbers that cannot be."""
        if min(self.ndf, self.n_layers) < 1:
            raise ConfigError("loss.adversarial: ndf and n_layers must be at least 1")
        if not all(0 <= value < 1 for value in self.disc_betas):
            raise ConfigError(f"loss.adversarial.disc_betas {' '.join(map(str, self.disc_betas))}: 0 or more, and below 1")
        names = ("start_step", "weight", "feature_matching", "disc_lr", "disc_weight_decay", "disc_clip_norm")
        check_not_negative({f"adversarial.{name}": getattr(self, name) for name in names})


def check_not_negative(numbers: dict[str, float]) -> None:
    """Raises ConfigError for the first of the numbers of `loss` that is below 0, or no number."""
    for name, value in numbers.items():
        if not value >= 0:  # NaN too
            raise ConfigError(f"loss.{name} {value}: 0 or more")


def without_missing_weights(config: Any) -> Any:
    """A run's config for a dry run: perceptual weights that are missing leave their network out of the count, with a warning."""
    perceptual = dataclasses.replace(config.loss.perceptual, on_missing="warn-and-disable")
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, perceptual=perceptual))
