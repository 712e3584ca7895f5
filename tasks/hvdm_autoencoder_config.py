"""Settings of the autoencoder stage of HVDM (spec, hvdm.md sections 4 and 5)."""

import dataclasses
from typing import Literal

from models.autoencoders.hvdm import HVDMAEConfig
from tasks.clip_autoencoder_config import ClipAutoencoderRunConfig, ClipLossConfig, TokenModelConfig, network_config
from tasks.clips import ClipInfo


@dataclasses.dataclass(frozen=True)
class HVDMModelConfig(TokenModelConfig):
    depth: int = 5
    """Layers of the encoder, and of the decoder."""
    fusion_depth: int = 2
    """Layers in which the planes' features attend to those of the wavelet subbands."""
    freq_widths: tuple[int, ...] = (64, 192, 384, 768)
    """Widths of the convolutions that read the subbands."""
    wavelet_time: Literal["repeat", "tile"] = "repeat"
    """Which features of the subbands, of two frames each, a frame attends to. repeat: those of its own two; tile: as the released weights,
    frame t those of slot t mod T/2."""
    frame_rotary: Literal["release", "corrected"] = "corrected"
    """Rotary positions of frames. corrected: a rotation; release: as in the released weights, angles and pairs of channels do not match."""
    readout: Literal["first", "token"] = "token"
    """Which output of a projection is the plane: that of the learned token, or that of the first position, as in the released weights."""

    def of(self, clips: ClipInfo) -> HVDMAEConfig:
        """The autoencoder for such clips. Raises ConfigError for sizes that cannot be."""
        return network_config(HVDMAEConfig, self, clips)


@dataclasses.dataclass(frozen=True)
class HVDMLossConfig(ClipLossConfig):
    subbands: float = 4.0
    """Factor of the mean absolute difference of the wavelet coefficients, over all eight subbands."""

    def distances(self) -> dict[str, float]:
        """As of any, and that of the subbands."""
        return super().distances() | {"subbands": self.subbands}


@dataclasses.dataclass(frozen=True)
class HVDMAutoencoderConfig(ClipAutoencoderRunConfig):
    """Trains HVDM's autoencoder."""

    system: str = "hvdm"
    """Which of the toolkit's systems."""
    model: HVDMModelConfig = dataclasses.field(default_factory=HVDMModelConfig)
    loss: HVDMLossConfig = dataclasses.field(default_factory=HVDMLossConfig)
