"""Settings of denoisers on the latents of autoencoders that make one tensor of a whole clip, which videos can go on from."""

import dataclasses
from typing import Any, ClassVar, Literal

import models
from diffusion import DiffusionConfig, learned_variance
from engine.config import EmaConfig, OptimConfig
from tasks.diffusion_checks import check_settings
from tasks.diffusion_task import PreviewConfig
from tasks.latent_config import LatentConfig, LatentRunConfig, NamedSizeConfig
from utils.config import flag
from utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ClipAutoencoderConfig:
    """The system's autoencoder."""

    path: str = flag("", "ae")
    """Its export: the export/ folder or the run's folder of train_ae.py, or the release's model_last.pth. Of latents it may be left out:
    then previews show latents."""
    weights: Literal["ema", "model"] = "ema"
    """Which of the export's weights; ema falls back to model where there is no average."""


@dataclasses.dataclass(frozen=True)
class ClipModelConfig(NamedSizeConfig):
    """A named size, and changes to it: 0 or empty keeps what the size has. A system's own names its sizes."""

    conditional: bool = True
    """The latent of the clip before is an input, so that videos can go on. Off: single clips only."""
    model_channels: int = 0
    """UNet: width of its first level."""
    channel_mult: tuple[int, ...] = ()
    """UNet: width of each level, in model_channels."""
    num_res_blocks: int = 0
    """UNet: residual blocks of a level."""
    use_scale_shift_norm: bool = True
    """UNet: the step scales and shifts features after their norm; off: it is added before."""
    resblock_updown: bool = True
    """UNet: residual blocks change the resolution; off: a convolution does."""
    dropout: float = 0.0
    """UNet: inside residual blocks."""
    patch_size: int = 0
    """Transformer: side of the patches."""
    hidden_size: int = 0
    """Transformer: its width."""
    depth: int = 0
    """Transformer: its blocks."""
    mlp_ratio: float = 0.0
    """Transformer: hidden width of the MLPs over hidden_size."""
    num_heads: int = 0
    """Attention heads."""
    init_from: str = flag("", "init-from")
    """Export, run or released checkpoint (ema_model_<it>.pth) of a denoiser whose weights the run starts from; empty: a fresh start."""


@dataclasses.dataclass(frozen=True)
class ClipRunConfig(LatentRunConfig):
    """What the denoisers of these systems set. A system's own says its name and its sizes."""

    optim: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=0.01))
    ema: EmaConfig = dataclasses.field(default_factory=lambda: EmaConfig(warmup=True, every=25))
    latent: LatentConfig = dataclasses.field(default_factory=lambda: LatentConfig(scale=1.0))
    diffusion: DiffusionConfig = dataclasses.field(default_factory=lambda: DiffusionConfig(schedule="quad", variance="fixed_small"))
    preview: PreviewConfig = dataclasses.field(default_factory=lambda: PreviewConfig(samples=4, steps=100, guidance=1.0))
    ae: ClipAutoencoderConfig = dataclasses.field(default_factory=ClipAutoencoderConfig)
    model: ClipModelConfig = dataclasses.field(default_factory=ClipModelConfig)
    cond_prob: float = flag(0.3, "cond-prob")
    """Share of samples that are learnt as the continuation of the clip before them; the others are told of no clip before.
    0: no sample is, as sets of single clips need."""

    title: ClassVar[str]
    """The system's name as people write it."""
    families: ClassVar[tuple[str, str]]
    """How the names of its sizes begin: the UNets', the transformers'."""

    def __post_init__(self) -> None:
        if self.diffusion.process == "flow" and self.diffusion.schedule == "quad":
            # The stage's own default, which says nothing of a flow.
            object.__setattr__(self, "diffusion", dataclasses.replace(self.diffusion, schedule="linear"))

    @property
    def strides(self) -> tuple[int, ...]:
        """Distances of frames that samples draw from; none: that of `data`."""
        return ()

    @property
    def family(self) -> str:
        """That of the named size."""
        unet, transformer = self.families
        return unet if self.model.name.startswith(unet) else transformer

    def validate(self) -> None:
        """Raises ConfigError on settings and combinations that cannot work."""
        super().validate()
        if not 0 <= self.cond_prob <= 1:
            raise ConfigError(f"--cond-prob {self.cond_prob}: a share, from 0 (no clip goes on) to 1")
        if self.cond_prob and not self.model.conditional:
            raise ConfigError(f"--cond-prob {self.cond_prob}: with model.conditional off no clip goes on after another; give --cond-prob 0")
        if self.condition.use_text_embed:
            raise ConfigError(f"--use-text-embed: {self.title}'s denoisers take class labels, no vectors; drop the flag")
        check_settings(self.family, self.model.name, self.condition, self.preview, self.diffusion, self.best, "--model")
        side = 1024 * (self.model.patch_size or 1)  # the latents are not known yet
        self.denoiser_size(latent_res=(side, side), latent_frames=side)

    def denoiser_size(self, **overrides: object) -> Any:
        """Config of the network that the settings name. Raises ConfigError with the nearest name, or for sizes that cannot be."""
        learned = learned_variance(self.diffusion)
        changed = self.model.changes() | ({"learn_sigma": True} if learned else {})
        unet, transformer = self.families
        if learned and self.family == unet:
            raise ConfigError(
                f"diffusion.variance learned_range: the UNet {self.model.name} has no channels for it; use fixed_small, or a {transformer}"
            )
        try:
            return models.resolve(self.model.name, self.family, **changed | overrides)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
