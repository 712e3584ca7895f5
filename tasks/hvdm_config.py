"""Settings of HVDM's denoiser stage (spec, hvdm.md sections 6 and 8)."""

import dataclasses
from typing import Any, ClassVar

from tasks.clip_config import ClipModelConfig, ClipRunConfig
from utils.config import flag
from utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class VolumeModelConfig(ClipModelConfig):
    """A named size, and changes to it: 0 or empty keeps what the size has."""

    name: str = flag("HVDM-L", "model", "model-name")
    """HVDM-{S,L}, the UNet of the release (L), or VolumeDiT-{S,B,L,XL}/{1,2,4}, a transformer over the same latents."""
    tasks: bool = False
    """The network is told whether its condition is a clip before or a picture; on by itself where img_prob is above 0."""
    dynamics_bins: int = flag(0, "dynamics-bins")
    """Classes of motion that the network is told, from the stillest to the liveliest clips, as many of each; 0: it is told none."""


@dataclasses.dataclass(frozen=True)
class DynamicsConfig:
    """How much motion there is in a clip, as the network is told it where model.dynamics_bins is above 0."""

    measure_clips: int = flag(256, "dynamics-clips")
    """Clips that are measured when a run begins, to divide them into classes of equal size."""
    dropout: float = flag(0.15, "dynamics-dropout")
    """Share of samples whose motion the network is not told, and of those whose frame stride it is not, which sampling without needs."""


@dataclasses.dataclass(frozen=True)
class HVDMRunConfig(ClipRunConfig):
    """Trains HVDM's denoiser."""

    system: str = "hvdm"
    """Which of the toolkit's systems."""
    model: VolumeModelConfig = dataclasses.field(default_factory=VolumeModelConfig)
    img_prob: float = flag(0.0, "img-prob")
    """Share of samples that are learnt from their own first frame, given as a still clip: image-to-video."""
    dynamics: DynamicsConfig = dataclasses.field(default_factory=DynamicsConfig)
    frame_strides: tuple[int, ...] = flag((), "frame-strides")
    """Distances of frames in the stored clips, one of which each sample draws and the network is told; none: data.frame_interval alone."""

    title: ClassVar[str] = "HVDM"
    families: ClassVar[tuple[str, str]] = ("HVDM", "VolumeDiT")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.img_prob and not self.model.tasks:
            object.__setattr__(self, "model", dataclasses.replace(self.model, tasks=True))

    @property
    def strides(self) -> tuple[int, ...]:
        """Distances of frames that samples draw from; none: that of `data`."""
        return self.frame_strides

    def validate(self) -> None:
        """Raises ConfigError on settings and combinations that cannot work."""
        if not 0 <= self.img_prob <= 1:
            raise ConfigError(f"--img-prob {self.img_prob}: a share, from 0 (no sample starts from a picture) to 1")
        if self.img_prob and not self.model.conditional:
            raise ConfigError(f"--img-prob {self.img_prob}: with model.conditional off no clip starts from a picture; give --img-prob 0")
        if self.cond_prob + self.img_prob > 1 + 1e-9:
            raise ConfigError(f"--cond-prob {self.cond_prob} --img-prob {self.img_prob}: shares of the same samples, together at most 1")
        if self.model.tasks and not self.model.conditional:
            raise ConfigError("model.tasks: with model.conditional off there is no condition to tell the kind of; drop one of them")
        if self.model.tasks and not self.cond_prob + self.img_prob:
            raise ConfigError("model.tasks: with --cond-prob 0 and --img-prob 0 there is no condition to tell the kind of; drop it")
        self._check_tables()
        super().validate()

    def _check_tables(self) -> None:
        bins = self.model.dynamics_bins
        if bins < 0 or bins == 1:
            raise ConfigError(f"--dynamics-bins {bins}: 2 or more, or 0 for none")
        if bins and self.dynamics.measure_clips < bins:
            raise ConfigError(f"--dynamics-clips {self.dynamics.measure_clips}: at least one for each of the {bins} classes")
        if not 0 <= self.dynamics.dropout < 1:
            raise ConfigError(f"--dynamics-dropout {self.dynamics.dropout}: a share in [0, 1) is wanted")
        usual = DynamicsConfig()
        if not bins and self.dynamics.measure_clips != usual.measure_clips:
            raise ConfigError(
                f"--dynamics-clips {self.dynamics.measure_clips}: without --dynamics-bins no clip is measured; drop it, or over a recipe "
                f"give --dynamics-clips {usual.measure_clips}"
            )
        if not (bins or self.frame_strides) and self.dynamics.dropout != usual.dropout:
            raise ConfigError(
                f"--dynamics-dropout {self.dynamics.dropout}: without --dynamics-bins or --frame-strides the network is told nothing that "
                f"could be left out; drop it, or over a recipe give --dynamics-dropout {usual.dropout}"
            )
        strides = self.frame_strides
        if any(stride < 1 for stride in strides) or len(set(strides)) != len(strides):
            raise ConfigError(f"--frame-strides {' '.join(map(str, strides))}: different numbers of frames, 1 or more")
        if strides and self.data.frame_interval != 1:
            raise ConfigError(
                f"--frame-strides {' '.join(map(str, strides))} --frame-interval {self.data.frame_interval}: give one of them"
            )

    def denoiser_size(self, **overrides: object) -> Any:
        """As of any; with one row for each frame stride."""
        return super().denoiser_size(**{"strides": len(self.frame_strides)} if self.frame_strides else {}, **overrides)
