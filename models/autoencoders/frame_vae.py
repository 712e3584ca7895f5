"""Latte's frame VAE: single frames to Gaussian posteriors over small latents and back (spec, latte.md section 4.1).

Letters: B batch, C channels of a frame, Z of a latent. State names are the tutorial release's. Nothing is drawn here: noise is an argument.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.layers.attention import sdpa

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class FrameVAEConfig:
    channels: int = 3
    """Channels of a frame: 3, or 1 for luma."""
    z_channels: int = 4
    """Channels of a latent."""
    down_channels: tuple[int, ...] = (128, 256, 384, 512)
    """Widths: of the first convolution, then of each level."""
    mid_channels: tuple[int, ...] = (512,)
    """Widths between the levels and the latent, the last level's first and last: a block for each consecutive pair, none for one entry."""
    down_sample: tuple[bool, ...] = (True, True, True)
    """Level by level: halve the sides."""
    attn_down: tuple[bool, ...] = (False, False, False)
    """Level by level: attention after each unit."""
    norm_channels: int = 32
    """Groups of the group norms."""
    num_heads: int = 4
    """Heads of all attention."""
    num_down_layers: int = 2
    """Residual units of each level of the encoder."""
    num_mid_layers: int = 2
    """Pairs of attention and unit after the first unit of each block of the middle; 0: that unit alone."""
    num_up_layers: int = 2
    """Residual units of each level of the decoder."""
    clamp_logvar: bool = True
    """Hold log-variances within -30 to 20, so that no sample overflows; sane weights never get there."""

    def __post_init__(self) -> None:
        levels = len(self.down_channels) - 1
        counts = (self.num_down_layers, self.num_mid_layers + 1, self.num_up_layers, self.norm_channels, self.num_heads)
        if min(self.channels, self.z_channels, *counts, *self.down_channels, *self.mid_channels) < 1:
            raise ValueError("channels, layers (but num_mid_layers), norm_channels and num_heads must be at least 1")
        if levels < 1 or len(self.down_sample) != levels or len(self.attn_down) != levels:
            found = f"{len(self.down_channels)}, {len(self.down_sample)} and {len(self.attn_down)}"
            raise ValueError(f"down_channels needs one entry more than down_sample and attn_down, and two at least; there are {found}")
        if not self.mid_channels or {self.mid_channels[0], self.mid_channels[-1]} != {self.down_channels[-1]}:
            raise ValueError(
                f"mid_channels {self.mid_channels} must begin and end with the last of down_channels, {self.down_channels[-1]}"
            )
        for width in (*self.down_channels, *self.mid_channels):
            if width % self.norm_channels:
                raise ValueError(f"norm_channels {self.norm_channels} does not divide the width {width}")
        for width in self._attended():
            if width % self.num_heads:
                raise ValueError(f"num_heads {self.num_heads} does not divide the width {width}, which has attention")

    @property
    def factor(self) -> int:
        """Pixels along the side of a latent cell."""
        return int(2 ** sum(self.down_sample))

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Sides of the latent of a frame. Raises ValueError for a frame that cells do not fill."""
        if height % self.factor or width % self.factor:
            raise ValueError(f"frames of {height} x {width} do not divide into latent cells of {self.factor} x {self.factor} pixels")
        return height // self.factor, width // self.factor

    def _attended(self) -> set[int]:
        """Widths that some attention works at: a level's outer one in the decoder, its inner one in the encoder."""
        pairs = zip(self.down_channels, self.down_channels[1:], self.attn_down, strict=False)
        levels = {width for before, after, attended in pairs if attended for width in (before, after)}
        return levels | (set(self.mid_channels[1:]) if self.num_mid_layers else set())


class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, N, D), under the names of torch's nn.MultiheadAttention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, E)
        return self.out_proj(sdpa(q, k, v).transpose(1, 2).flatten(2))


class Residuals(nn.Module):
    """What all blocks have: residual units through `widths`, the skip always a 1x1 convolution, and attention with its own skip."""

    def __init__(self, config: FrameVAEConfig, widths: tuple[int, ...], attended: tuple[int, ...]) -> None:
        super().__init__()
        groups, pairs = config.norm_channels, list(itertools.pairwise(widths))
        self.resnet_conv_first = nn.ModuleList(_stage(groups, before, after) for before, after in pairs)
        self.resnet_conv_second = nn.ModuleList(_stage(groups, after, after) for _, after in pairs)
        self.residual_input_conv = nn.ModuleList(nn.Conv2d(before, after, 1) for before, after in pairs)
        self.attention_norms = nn.ModuleList(nn.GroupNorm(groups, width) for width in attended)
        self.attentions = nn.ModuleList(Attention(width, config.num_heads) for width in attended)

    def unit(self, k: int, x: Tensor) -> Tensor:
        """Residual unit k."""
        return self.resnet_conv_second[k](self.resnet_conv_first[k](x)) + self.residual_input_conv[k](x)

    def attend(self, k: int, x: Tensor) -> Tensor:
        """Attention k over all positions of a frame."""
        tokens = self.attentions[k](self.attention_norms[k](x).flatten(2).transpose(1, 2))
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[-2:])

    def chain(self, x: Tensor) -> Tensor:
        """All units, each followed by its attention where there is one."""
        for k in range(len(self.residual_input_conv)):
            x = self.unit(k, x)
            if len(self.attentions):
                x = self.attend(k, x)
        return x


class DownBlock(Residuals):
    """A level of the encoder: units, then a strided convolution."""

    def __init__(self, config: FrameVAEConfig, before: int, after: int, halve: bool, attend: bool) -> None:
        layers = config.num_down_layers
        super().__init__(config, (before, *(after,) * layers), (after,) * layers * attend)
        self.down_sample_conv = nn.Conv2d(after, after, 4, 2, 1) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, h, w) -> (B, after, h/2, w/2), or h, w."""
        return self.down_sample_conv(self.chain(x))


class UpBlock(Residuals):
    """A level of the decoder: a transposed convolution, then units."""

    def __init__(self, config: FrameVAEConfig, before: int, after: int, double: bool, attend: bool) -> None:
        layers = config.num_up_layers
        super().__init__(config, (before, *(after,) * layers), (after,) * layers * attend)
        self.up_sample_conv = nn.ConvTranspose2d(before, before, 4, 2, 1) if double else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, h, w) -> (B, after, 2h, 2w), or h, w."""
        return self.chain(self.up_sample_conv(x))


class MidBlock(Residuals):
    """A unit, then attention and unit in turn."""

    def __init__(self, config: FrameVAEConfig, before: int, after: int) -> None:
        layers = config.num_mid_layers
        super().__init__(config, (before, *(after,) * (layers + 1)), (after,) * layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, h, w) -> (B, after, h, w)."""
        x = self.unit(0, x)
        for k in range(len(self.attentions)):
            x = self.unit(k + 1, self.attend(k, x))
        return x


class FrameVAE(nn.Module):
    """Encoder to the moments of a Gaussian, decoder of its samples. Frames are in [-1, 1]; the output is not bounded."""

    def __init__(self, config: FrameVAEConfig) -> None:
        super().__init__()
        self.config = config
        groups, z, widths, mids = config.norm_channels, config.z_channels, config.down_channels, config.mid_channels
        levels = list(zip(widths, widths[1:], config.down_sample, config.attn_down, strict=False))
        self.encoder_conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.encoder_layers = nn.ModuleList(DownBlock(config, *level) for level in levels)
        self.encoder_mids = nn.ModuleList(MidBlock(config, *pair) for pair in itertools.pairwise(mids))
        self.encoder_norm_out = nn.GroupNorm(groups, mids[-1])
        self.encoder_conv_out = nn.Conv2d(mids[-1], 2 * z, 3, padding=1)
        self.pre_quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.decoder_conv_in = nn.Conv2d(z, mids[-1], 3, padding=1)
        self.decoder_mids = nn.ModuleList(MidBlock(config, *pair) for pair in itertools.pairwise(mids[::-1]))
        self.decoder_layers = nn.ModuleList(UpBlock(config, after, before, *flags) for before, after, *flags in reversed(levels))
        self.decoder_norm_out = nn.GroupNorm(groups, widths[0])
        self.decoder_conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (B, C, h, w) -> mean and log-variance of their posteriors, (B, Z, h', w') float32 each."""
        self.config.latent_size(*x.shape[-2:])
        x = self.encoder_conv_in(x)
        for block in (*self.encoder_layers, *self.encoder_mids):
            x = block(x)
        x = self.encoder_conv_out(nn.functional.silu(self.encoder_norm_out(x)))
        mean, logvar = self.pre_quant_conv(x).float().chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE) if self.config.clamp_logvar else logvar

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, Z, h', w') -> frames (B, C, h, w)."""
        x = self.decoder_conv_in(self.post_quant_conv(z))
        for block in (*self.decoder_mids, *self.decoder_layers):
            x = block(x)
        return self.decoder_conv_out(nn.functional.silu(self.decoder_norm_out(x)))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames and standard normal noise (B, Z, h', w') -> reconstruction of a posterior sample, mean, log-variance."""
        mean, logvar = self.moments(x)
        return self.decode(sample(mean, logvar, noise)), mean, logvar

    def units(self) -> list[nn.Module]:
        """The blocks."""
        return [*self.encoder_layers, *self.encoder_mids, *self.decoder_mids, *self.decoder_layers]


def sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """The posterior's sample that standard normal `noise` leads to."""
    return mean + torch.exp(0.5 * logvar) * noise


def _stage(groups: int, before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(groups, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
