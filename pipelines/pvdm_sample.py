"""What `sample.py` needs to know of PVDM: its settings and its exports."""

import dataclasses
from typing import ClassVar, Literal

import torch

from diffusion import DiffusionConfig
from pipelines.clip_sample import ClipSampleConfig, ClipSampleJob
from pipelines.pvdm import PVDMPipeline
from utils.errors import ConfigError

PRESETS = {"100/20": (100, 20), "200/200": (200, 200), "400/400": (400, 400), "400/20": (400, 20)}
"""Steps of the first clip, and of the following ones."""


@dataclasses.dataclass(frozen=True)
class PVDMSampleConfig(ClipSampleConfig):
    """Generates clips, or videos of any length, with PVDM."""

    usual_steps: ClassVar[dict[str, int]] = {"ddpm": 400, "flow": 50}

    system: str = "pvdm"
    """Which of the toolkit's systems."""
    preset: Literal["", "100/20", "200/200", "400/400", "400/20"] = ""
    """Steps of the first clip of a video and of the following ones, as the paper names its samplers; --steps and --next-steps change one
    of the two. Without: 400/400, of a flow 50/50."""
    num_heads: int = 8
    """Attention heads of an official denoiser, whose checkpoint does not say them."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        super().validate()
        self.at_least(1, "num_heads")

    def step_counts(self, process: DiffusionConfig) -> tuple[int, int]:
        """Steps of the first clip and of the following ones. Raises ConfigError."""
        if not self.preset:
            return super().step_counts(process)
        if process.process == "flow":
            raise ConfigError(f"--preset {self.preset}: it is a way to sample noising steps, the model is a flow: give --steps")
        first, following = PRESETS[self.preset]
        return self.steps or first, self.next_steps or following


class PVDMSampleJob(ClipSampleJob):
    """Makes sample number i, and the clips of long ones, with PVDM."""

    def __init__(self, config: PVDMSampleConfig, device: torch.device, pipeline: PVDMPipeline | None = None) -> None:
        """`pipeline`: networks that are there already, of the same settings. Raises UserError or ConfigError in one line."""
        pipeline = pipeline or PVDMPipeline.from_exports(**config.networks(), num_heads=config.num_heads, device=device)
        super().__init__(config, pipeline)
