"""Settings of PVDM's denoiser stage (spec, pvdm.md sections 3, 4, 5.2 and 9)."""

import dataclasses
from typing import ClassVar

from tasks.clip_config import ClipModelConfig, ClipRunConfig
from utils.config import flag


@dataclasses.dataclass(frozen=True)
class PlaneModelConfig(ClipModelConfig):
    """A named size, and changes to it: 0 or empty keeps what the size has."""

    name: str = flag("PVDM-L", "model", "model-name")
    """PVDM-{S,L}, the UNet of the paper, or PlaneDiT-{S,B,L,XL}/{1,2,4}, a transformer over the same latents."""
    attention_resolutions: tuple[int, ...] = ()
    """UNet: levels with attention inside each plane, by their downsampling factors."""
    head_channels: int = 0
    """UNet: width of an attention head; then num_heads does not count."""


@dataclasses.dataclass(frozen=True)
class PVDMRunConfig(ClipRunConfig):
    """Trains PVDM's denoiser."""

    system: str = "pvdm"
    """Which of the toolkit's systems."""
    model: PlaneModelConfig = dataclasses.field(default_factory=PlaneModelConfig)

    title: ClassVar[str] = "PVDM"
    families: ClassVar[tuple[str, str]] = ("PVDM", "PlaneDiT")
