"""PatchGAN discriminators, built only when an adversarial loss is enabled: CMD's pair for frames (2-D) and clips (3-D) (spec, cmd.md
section 4), and the one for frames of Latte's VAE (spec, latte.md section 4.2)."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from models.layers.convolution import Conv3d


@dataclass(frozen=True)
class DiscriminatorConfig:
    channels: int = 3
    """Channels of the frames."""
    ndf: int = 64
    """Width of the first stage; it doubles with each stage, up to 512."""
    n_layers: int = 3
    """Stages of stride 2."""

    def __post_init__(self) -> None:
        if min(self.channels, self.ndf, self.n_layers) < 1:
            raise ValueError(f"channels, ndf and n_layers must be at least 1, not {self.channels}, {self.ndf}, {self.n_layers}")


class PatchDiscriminator(nn.Module):
    """Stages of convolution (kernel 4, padding 2), batch norm and leaky ReLU; the last gives one logit per patch."""

    def __init__(self, config: DiscriminatorConfig, dims: int) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (Conv3d, nn.BatchNorm3d)
        widths = [min(config.ndf * 2**k, 512) for k in range(config.n_layers + 1)]
        strides = [2] * (config.n_layers - 1) + [1]
        stages = [nn.Sequential(conv(config.channels, config.ndf, 4, 2, 2), nn.LeakyReLU(0.2))]
        for before, after, stride in zip(widths, widths[1:], strides, strict=False):
            stages.append(nn.Sequential(conv(before, after, 4, stride, 2), norm(after), nn.LeakyReLU(0.2)))
        stages.append(nn.Sequential(conv(widths[-1], 1, 4, 1, 2)))
        self.count = len(stages)
        for k, stage in enumerate(stages):
            self.add_module(f"model{k}", stage)
        self.apply(_init)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, [T,] h, w) -> the output of every stage; the last one is the logits (B, 1, [t,] r, s)."""
        outputs = []
        for k in range(self.count):
            x = self.get_submodule(f"model{k}")(x)
            outputs.append(x)
        return outputs


class Discriminators(nn.Module):
    """The pair: one looks at a frame of each clip, the other at the clip. State names are the release's."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.discriminator_2d = PatchDiscriminator(config, 2)
        self.discriminator_3d = PatchDiscriminator(config, 3)

    def forward(self, frames: Tensor, clips: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Frames (B, C, h, w), clips (B, C, T, h, w) -> stage outputs of the 2-D and of the 3-D discriminator."""
        return self.discriminator_2d(frames), self.discriminator_3d(clips)


@dataclass(frozen=True)
class FrameDiscriminatorConfig:
    channels: int = 3
    """Channels of the frames."""
    conv_channels: tuple[int, ...] = (64, 128, 256)
    """Widths of the stages before the logits."""
    kernels: tuple[int, ...] = (4, 4, 4, 4)
    """Stage by stage, that of the logits last: side of the kernel."""
    strides: tuple[int, ...] = (2, 2, 2, 1)
    """Its stride."""
    paddings: tuple[int, ...] = (1, 1, 1, 1)
    """Its padding."""
    norm: Literal["batch", "group"] = "batch"
    """batch: statistics of the micro-batch on each rank, as in the release; group: of each frame alone, so that results depend neither on
    the number of ranks nor on accumulation."""

    def __post_init__(self) -> None:
        stages = len(self.conv_channels) + 1
        if stages < 2 or {len(self.kernels), len(self.strides), len(self.paddings)} != {stages}:
            raise ValueError(f"kernels, strides and paddings need one entry more than conv_channels {self.conv_channels}, which needs one")
        if min(self.channels, *self.conv_channels, *self.kernels, *self.strides) < 1 or min(self.paddings) < 0:
            raise ValueError("channels, conv_channels, kernels and strides must be at least 1, paddings at least 0")

    def logits_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a frame. Raises ValueError for one that is too small."""
        frame = f"{height} x {width}"
        for kernel, stride, padding in zip(self.kernels, self.strides, self.paddings, strict=True):
            height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        if min(height, width) < 1:
            raise ValueError(f"frames of {frame} are too small for a discriminator with conv_channels {self.conv_channels}")
        return height, width


class FrameDiscriminator(nn.Module):
    """Stages of convolution, norm (not in the first) and leaky ReLU; the last convolution alone gives one logit per patch.

    Only the first convolution has a bias. State names and initialisation are the tutorial release's.
    """

    def __init__(self, config: FrameDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.channels, *config.conv_channels, 1)
        last = len(widths) - 2
        shapes = zip(widths, widths[1:], config.kernels, config.strides, config.paddings, strict=False)
        self.layers = nn.ModuleList()
        for k, shape in enumerate(shapes):
            norm = _norm(config.norm, widths[k + 1]) if 0 < k < last else nn.Identity()
            self.layers.append(nn.Sequential(nn.Conv2d(*shape, bias=k == 0), norm, nn.LeakyReLU(0.2) if k < last else nn.Identity()))

    def forward(self, x: Tensor) -> Tensor:
        """Frames (B, C, h, w) -> logits (B, 1, r, s)."""
        for layer in self.layers:
            x = layer(x)
        return x


def _norm(kind: Literal["batch", "group"], width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if kind == "batch" else nn.GroupNorm(math.gcd(8, width), width)


def _init(module: nn.Module) -> None:
    """Convolution weights N(0, 0.02); batch norm weights N(1, 0.02), biases 0."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
