"""PatchGAN discriminators for frames (2-D) and clips (3-D) (spec, cmd.md section 4). Built only when the adversarial loss is enabled."""

from dataclasses import dataclass

from torch import Tensor, nn


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
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
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


def _init(module: nn.Module) -> None:
    """Convolution weights N(0, 0.02); batch norm weights N(1, 0.02), biases 0."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
