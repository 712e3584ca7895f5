"""What the configs of the UNets share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from models.unets.stages import check_halvings, check_widths


@dataclass(frozen=True)
class UNetConfig(ABC):
    """Levels and their blocks."""

    in_channels: int = 3
    """Channels of what is denoised."""
    model_channels: int = 128
    """Width of the first level over channel_mult's first entry."""
    channel_mult: tuple[float, ...] = (1, 2, 4, 4)
    """Width of each level over model_channels; each level but the first has half the rows and columns."""
    num_res_blocks: int = 2
    """Residual blocks of a level on the way down; one more on the way up."""
    resblock_updown: bool = True
    """Sides are halved and doubled inside residual blocks, instead of by convolutions."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "model_channels", "num_res_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")
        sides = self.halved()
        if not self.channel_mult or min(self.channel_mult) <= 0 or min(map(min, sides.values())) < 1:
            told = " and ".join(f"{name} {values}" for name, values in {"channel_mult": self.channel_mult, **sides}.items())
            raise ValueError(f"{told}: all above 0")
        check_halvings(sides, len(self.channel_mult))
        check_widths(self.model_channels, self.channel_mult)

    @abstractmethod
    def halved(self) -> dict[str, tuple[int, ...]]:
        """Sides that are halved from level to level, by the names of their settings."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(self.model_channels * times) for times in self.channel_mult)


@dataclass(frozen=True)
class ClipUNetConfig(UNetConfig):
    """Of those over a clip's latents."""

    latent_res: tuple[int, int] = (32, 32)
    """Height and width of the latents."""
    latent_frames: int = 16
    """Frames of the latents."""
    in_channels: int = 4
    """Channels of a latent."""
    out_channels: int = 0
    """Channels of the output; 0: as many."""
    use_scale_shift_norm: bool = True
    """The step scales and shifts what is normalised, instead of being added before."""
    conditional: bool = True
    """The latent of the previous clip is a second input."""
    num_classes: int = 0
    """Classes of the label condition; 0: no label, as in the papers."""
    class_dropout_prob: float = 0.1
    """Share of labels dropped in training. Above 0 there is a null label, the row num_classes of the table."""
    dropout: float = 0.0
    """Share of activations dropped in residual blocks."""

    def __post_init__(self) -> None:
        if self.latent_frames < 1:
            raise ValueError(f"latent_frames {self.latent_frames}: at least 1")
        for name in ("out_channels", "num_classes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: at least 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}: a share, from 0 to below 1")
        super().__post_init__()

    def halved(self) -> dict[str, tuple[int, ...]]:
        """Rows and columns."""
        return {"latent_res": self.latent_res}
