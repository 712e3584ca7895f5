"""VIDM's motion generator: the next frame from the first, the flow to the previous one and the frame's index (spec, vidm.md section 3).

A UNet denoises the frame with the flow beside it. A second network walks down over the first frame; its features are added to the
UNet's at every input block. Both are steered pixel by pixel (PosGN).

What sampling can share: the flow between a frame's steps, and the maps of PosGN between all videos at one step of one frame. Features
of the first frame depend on the step and the frame's index through PosGN: those of another step or frame are not the same.

Letters: b batch, h and w sides.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.layers.convolution import laid_out
from models.layers.spynet import InputRange, SpyNet
from models.unets.adm import Resample
from models.unets.pixel import PixelUNetConfig, check_picture
from models.unets.positional import Maps, Place, PosResBlock, PosStage, Size
from models.unets.stages import Head, Plan, check_halvings

Steer = Place | Sequence[Maps]
"""What a stage needs to know of time: where it is, or its maps there."""


@dataclass(frozen=True)
class MotionUNetConfig(PixelUNetConfig):
    diffusion_timesteps: int = 1000
    """Diffusion steps, D: the step's coordinate runs from -1 to 1 over them."""
    video_timesteps: int = 128
    """Frame indices, V: the frame's coordinate runs from -1 to 1 over 0 .. V - 1."""
    flow_input: InputRange = "zero_one"
    """What the flow network is given: pictures in [0, 1], or in [-1, 1] as in the release, whose weights are used to that."""
    residual: float = 0.2
    """What the UNet's features are multiplied by before the first frame's are added."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("diffusion_timesteps", "video_timesteps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")
        if self.flow_input not in ("zero_one", "minus_one_one"):
            raise ValueError(f"flow_input {self.flow_input!r}: zero_one or minus_one_one")
        if self.in_channels != 3:
            raise ValueError(f"in_channels {self.in_channels}: the flow network takes pictures of 3 channels")

    def pos_plan(self) -> Plan:
        """The order of the stages, with residual blocks steered pixel by pixel."""

        def residual(before: int, after: int, kind: Resample) -> nn.Module:
            return PosResBlock(before, after, self.diffusion_timesteps, self.video_timesteps, kind)

        return self.plan(residual)


class MotionMaps(NamedTuple):
    """What each stage of the two networks is steered by, in order."""

    encoder: Sequence[Steer]
    unet: Sequence[Steer]


class FrameEncoder(nn.Module):
    """Features of the first frame for every input block of the UNet."""

    def __init__(self, config: MotionUNetConfig) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList(map(PosStage, config.pos_plan().down(config.in_channels)))

    def forward(self, first: Tensor, steer: Sequence[Steer]) -> list[Tensor]:
        """(b, 3, h, w) -> features (b, C, h', w') of each block."""
        features, x = [], laid_out(first)
        for stage, where in zip(self.input_blocks, steer, strict=True):
            x = stage(x, where)
            features.append(x)
        return features


class PosUNet(nn.Module):
    """A UNet steered pixel by pixel, which may be given features to add at its input blocks."""

    def __init__(self, config: MotionUNetConfig, in_channels: int) -> None:
        super().__init__()
        plan = config.pos_plan()  # in this order: it keeps count
        self.residual = config.residual
        self.input_blocks = nn.ModuleList(map(PosStage, plan.down(in_channels)))
        self.middle_block = PosStage(plan.middle(config.middle()))
        self.output_blocks = nn.ModuleList(map(PosStage, plan.up()))
        self.out = Head(config.widths[0], config.out_channels)

    @property
    def stages(self) -> list[nn.Module]:
        """All blocks that are steered, in order."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def forward(self, x: Tensor, steer: Sequence[Steer], features: Sequence[Tensor] | None = None) -> Tensor:
        """x (b, in_channels, h, w) -> (b, out_channels, h, w). With features f every input block h gives f + residual * h."""
        skips = self.descend(x, steer[: len(self.input_blocks)], features)
        middle, *others = steer[len(self.input_blocks) :]
        x = self.middle_block(skips[-1], middle)
        for stage, where in zip(self.output_blocks, others, strict=True):
            x = stage(x, where, skips.pop())
        return self.out(x).contiguous()

    def descend(self, x: Tensor, steer: Sequence[Steer], features: Sequence[Tensor] | None = None) -> list[Tensor]:
        """What the input blocks give, with the features added: the skips."""
        skips, x = [], laid_out(x)
        for k, (stage, where) in enumerate(zip(self.input_blocks, steer, strict=True)):
            x = stage(x, where)
            x = x if features is None else features[k] + self.residual * x
            skips.append(x)
        return skips


class MotionUNet(nn.Module):
    """Denoiser of a frame given the first one, the previous one and the frame's index. `flow`, `maps`, `encode`, `denoise`: its parts."""

    def __init__(self, config: MotionUNetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = FrameEncoder(config)
        self.unet = PosUNet(config, config.in_channels + 2)
        self.spynet = SpyNet(input_range=config.flow_input)

    def units(self) -> list[nn.Module]:
        """The blocks: what is sharded, compiled and checkpointed as one."""
        return [self.spynet, *self.encoder.input_blocks, *self.unet.stages, self.unet.out]

    def flow(self, first: Tensor, previous: Tensor) -> Tensor:
        """Frames (b, 3, h, w) in [-1, 1] -> (b, 2, h, w) in pixels. The same at all steps of a frame."""
        return self.spynet(first, previous)

    def maps(self, t: Tensor, frame: Tensor, size: Size) -> MotionMaps:
        """The maps of all PosGN modules for frames of that size, float32. Step t and frame (1,): for any batch; (b,): one for each."""
        place = Place(t, frame)

        def found(stages: Iterable[nn.Module]) -> list[Steer]:
            return [stage.maps(place, size) for stage in stages if isinstance(stage, PosStage)]

        return MotionMaps(found(self.encoder.input_blocks), found(self.unet.stages))

    def encode(self, first: Tensor, maps: MotionMaps) -> list[Tensor]:
        """Features of the first frames (b, 3, h, w), at the step and frame of the maps."""
        return self.encoder(first, maps.encoder)

    def denoise(self, x: Tensor, flow: Tensor, maps: MotionMaps, features: Sequence[Tensor]) -> Tensor:
        """Noisy frames x (b, 3, h, w), flow (b, 2, h, w), the maps and the features at that step and frame -> (b, out_channels, h, w)."""
        return self.unet(torch.cat([x, flow.to(x.dtype)], dim=1), maps.unet, features)

    def forward(self, x: Tensor, t: Tensor, frame: Tensor, previous: Tensor, first: Tensor) -> Tensor:
        """Noisy frames x (b, 3, h, w) at steps t (b,), the frames' indices (b,), the frames before them and the first ones, in [-1, 1].

        Returns (b, out_channels, h, w): the noise, then the variance's fraction. Raises ValueError for sides that cannot be halved from
        level to level, and for frames of several sizes.
        """
        size = (x.shape[2], x.shape[3])
        check_halvings({"frames": size}, len(self.config.channel_mult))
        for name, pictures in (("x", x), ("previous", previous), ("first", first)):
            check_picture(name, pictures, self.config.in_channels, size)
        place = Place(t, frame)
        maps = MotionMaps([place] * len(self.encoder.input_blocks), [place] * len(self.unet.stages))  # each stage works its own out
        return self.denoise(x, self.flow(first, previous), maps, self.encode(first, maps))
