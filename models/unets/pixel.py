"""Settings and levels of the UNets over pictures, whose layout VIDM's two generators share (spec, vidm.md sections 3.4, 4 and 5)."""

from dataclasses import dataclass

from torch import Tensor, nn

from models.unets.adm import AttentionBlock
from models.unets.config import UNetConfig
from models.unets.stages import Plan, Residual, check_rates

FACTORS = (2, 2)
"""How much smaller rows and columns of the next level are."""


@dataclass(frozen=True)
class PixelUNetConfig(UNetConfig):
    image_size: tuple[int, int] = (128, 128)
    """Height and width of the pictures."""
    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    """Width of each level over model_channels; each level but the first has half the rows and columns."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Levels with attention, by how many times smaller their sides are (not by their sides). The middle always has it."""
    num_heads: int = 4
    """Heads of attention; read where num_head_channels is -1."""
    num_head_channels: int = 64
    """Channels of a head; -1: num_heads heads at every width."""
    new_attention_order: bool = False
    """Attention's joint projection is all queries, all keys, all values, instead of those of each head in turn."""
    learn_sigma: bool = True
    """The output has the variance beside the noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "num_heads" if self.num_head_channels == -1 else "num_head_channels"
        each = getattr(self, name)
        if each < 1:
            raise ValueError(f"{name} {each}: at least 1" + (", or -1 for num_heads" if name == "num_head_channels" else ""))
        check_rates(self.attention_resolutions)
        levels = len(self.widths)
        for level in {levels - 1} | {level for level in range(levels) if 2**level in self.attention_resolutions}:
            if self.widths[level] % each:
                raise ValueError(f"the width {self.widths[level]} of level {level} is not a multiple of {name} {each}")

    def halved(self) -> dict[str, tuple[int, ...]]:
        """Rows and columns."""
        return {"image_size": self.image_size}

    @property
    def out_channels(self) -> int:
        """Channels of the output: the noise and, where it is learned, the variance."""
        return self.in_channels * (1 + self.learn_sigma)

    def attention(self, level: int) -> AttentionBlock:
        """Attention over the positions of a level."""
        width = self.widths[level]
        heads = self.num_heads if self.num_head_channels == -1 else width // self.num_head_channels
        return AttentionBlock(width, heads, self.new_attention_order)

    def plan(self, residual: Residual) -> Plan:
        """The order of the stages, with these residual blocks."""
        return Plan(self, FACTORS, residual, lambda level: [self.attention(level)] if 2**level in self.attention_resolutions else [])

    def middle(self) -> list[nn.Module]:
        """What stands between the two residual blocks of the middle."""
        return [self.attention(len(self.widths) - 1)]


def check_picture(name: str, x: Tensor, channels: int, size: tuple[int, int]) -> None:
    """Raises ValueError where pictures are not (b, channels, *size)."""
    if x.dim() != 4 or x.shape[1:] != (channels, *size):
        raise ValueError(f"{name}: the model takes (b, {channels}, {size[0]}, {size[1]}), not {tuple(x.shape)}")
