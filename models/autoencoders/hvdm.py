"""HVDM autoencoder: a clip <-> a volume of the size of its patches (spec, hvdm.md section 4).

What the planes know of the whole clip asks, by cross-attention, what convolutions see in its wavelet subbands: the volume that the three
planes span is the query, the low band the key, the seven high ones the value.
Letters: b clips, T frames of a clip, R_h R_w rows and columns of tokens, d width, e latent channels.
Tokens are kept frame-major, (T, b, R_h R_w, d), as models/layers/timesformer.py says.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from models.autoencoders.tokens import TokenAEConfig, TokenAutoencoder
from models.layers.frequency import FrequencyStem, stem_strides
from models.layers.planes import spread_planes
from models.layers.timesformer import FusionLayer
from models.layers.wavelet import BANDS, haar3d


@dataclass(frozen=True)
class HVDMAEConfig(TokenAEConfig):
    depth: int = 5
    """Layers of the encoder, and of the decoder."""
    fusion_depth: int = 2
    """Layers of the cross-attention between planes and subbands."""
    freq_widths: tuple[int, ...] = (64, 192, 384, 768)
    """Widths of the convolutions on the subbands, behind which two more go to dim."""
    wavelet_time: Literal["repeat", "tile"] = "repeat"
    """Which of the T/2 subband frames frame t reads: repeat: t // 2, made of it and its neighbour; tile: t mod T/2, which the released
    weights were trained with."""
    frame_rotary: Literal["release", "corrected"] = "corrected"
    """release: the table that the released weights were trained with, whose two channels of a pair disagree; corrected: a true rotation."""
    readout: Literal["first", "token"] = "token"
    """Where a projection is read: at the first feature, as the released weights need, or at the learned token behind them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_frames < 2 or self.n_frames % 2:
            raise ValueError(f"n_frames {self.n_frames}: the wavelet transform pairs the frames of a clip, so their number is even")
        if not self.freq_widths or min(self.freq_widths) < 1:
            raise ValueError(f"freq_widths {self.freq_widths}: at least one convolution, of width 1 at least")
        if self.fusion_depth < 0:
            raise ValueError(f"fusion_depth {self.fusion_depth}: at least 0")
        stem_strides(self.patch_size, len(self.freq_widths))

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(e, T, R_h, R_w)."""
        return self.embed_dim, self.n_frames, *self.grid


class HVDMAutoencoder(TokenAutoencoder):
    """Clip (b, c, T, h, w) <-> latent (b, e, T, R_h, R_w) in (-1, 1)."""

    config: HVDMAEConfig

    def __init__(self, config: HVDMAEConfig) -> None:
        super().__init__(config)
        c, d = config, config.dim
        strides = stem_strides(c.patch_size, len(c.freq_widths))
        self.low_bands = FrequencyStem(c.channels, c.freq_widths, strides, d)
        self.high_bands = FrequencyStem((len(BANDS) - 1) * c.channels, c.freq_widths, strides, d)
        self.fusion = nn.ModuleList(FusionLayer(d, c.heads, c.head_dim, c.wavelet_time) for _ in range(c.fusion_depth))
        self.to_latent = nn.Linear(d, c.embed_dim)
        self.from_latent = nn.Linear(c.embed_dim, d)
        self.build_decoder()

    def units(self) -> list[nn.Module]:
        """Layers, projections and stems: what is sharded, compiled and checkpointed as one."""
        return [*self.encoder, *self.projections.values(), self.low_bands, self.high_bands, *self.fusion, *self.decoder]

    def forward(self, video: Tensor) -> Tensor:
        """(b, c, T, h, w) -> its reconstruction, the same shape, in (-1, 1)."""
        return self.decode(self.encode(video))

    def encode(self, video: Tensor) -> Tensor:
        """(b, c, T, h, w) -> latents (b, e, T, R_h, R_w) float32. Raises ValueError for other sizes."""
        tokens = self.tokens(video)
        low, high = self.frequencies(video)
        fused = self.fuse(spread_planes(*self.project(tokens)), low, high)
        latent = self.to_latent(fused.tanh()).float().tanh()  # (T, b, R_h R_w, e)
        return latent.permute(1, 3, 0, 2).unflatten(3, self.config.grid).contiguous()

    def decode(self, latent: Tensor) -> Tensor:
        """(b, e, T, R_h, R_w) -> (b, c, T, h, w) in (-1, 1), float32. Raises ValueError for a latent of another size."""
        shape = self.config.latent_shape
        if latent.dim() != 5 or latent.shape[1:] != shape:
            raise ValueError(f"the autoencoder decodes latents (b, {', '.join(map(str, shape))}), not {tuple(latent.shape)}")
        rows = latent.flatten(3).permute(2, 0, 3, 1).to(self.from_latent.weight.dtype)  # (T, b, R_h R_w, e)
        return self.pixels(self.from_latent(rows))

    def frequencies(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(b, c, T, h, w) -> features of its low band and of the seven others, each (T/2, b, R_h R_w, d)."""
        bands = haar3d(video)  # (b, 8, c, T/2, h/2, w/2)
        return self.low_bands(bands[:, 0]), self.high_bands(bands[:, 1:].flatten(1, 2))

    def fuse(self, volume: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Volume of the planes (T, b, R_h R_w, d), band features (T/2, b, R_h R_w, d) -> (T, b, R_h R_w, d)."""
        return self.run_layers(self.fusion, volume, low, high)
