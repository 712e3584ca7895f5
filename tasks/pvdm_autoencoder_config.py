"""Settings of the autoencoder stage of PVDM."""

import dataclasses

from models.autoencoders.pvdm import PVDMAEConfig
from tasks.clip_autoencoder_config import ClipAutoencoderRunConfig, TokenModelConfig, network_config
from tasks.clips import ClipInfo
from utils.config import flag


@dataclasses.dataclass(frozen=True)
class PVDMModelConfig(TokenModelConfig):
    splits: int = flag(1, "splits")
    """Clips are cut into so many of equal length, each with planes of its own."""

    def of(self, clips: ClipInfo) -> PVDMAEConfig:
        """The autoencoder for such clips. Raises ConfigError for sizes that cannot be."""
        return network_config(PVDMAEConfig, self, clips)


@dataclasses.dataclass(frozen=True)
class PVDMAutoencoderConfig(ClipAutoencoderRunConfig):
    """Trains PVDM's autoencoder."""

    system: str = "pvdm"
    """Which of the toolkit's systems."""
    model: PVDMModelConfig = dataclasses.field(default_factory=PVDMModelConfig)
