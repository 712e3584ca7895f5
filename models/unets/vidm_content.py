"""VIDM's content generator: an image UNet with a learned constant picture beside the noisy one (spec, vidm.md section 4)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.layers.convolution import laid_out
from models.layers.embeddings import LabelEmbedder, TimestepEmbedder
from models.unets.pixel import FACTORS, PixelUNetConfig, check_picture
from models.unets.stages import Head, Stage, steered


@dataclass(frozen=True)
class ContentUNetConfig(PixelUNetConfig):
    use_scale_shift_norm: bool = True
    """The step scales and shifts what is normalised, instead of being added before."""
    dropout: float = 0.0
    """Share of activations dropped in residual blocks."""
    num_classes: int = 0
    """Classes of the label condition; 0: no label, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}: a share, from 0 to below 1")
        if self.num_classes < 0:
            raise ValueError(f"num_classes {self.num_classes}: at least 0")


class ContentUNet(nn.Module):
    """Denoiser of single pictures. The constant ties it to pictures of `config.image_size`."""

    def __init__(self, config: ContentUNetConfig) -> None:
        super().__init__()
        self.config = config
        emb = 4 * config.model_channels
        self.constant = nn.Parameter(torch.randn(1, config.in_channels, *config.image_size))
        self.t_embedder = TimestepEmbedder(emb, config.model_channels)
        self.y_embedder = LabelEmbedder(config.num_classes, emb, null=False) if config.num_classes else None
        plan = config.plan(steered(config, FACTORS))  # in this order: it keeps count
        self.input_blocks = nn.ModuleList(map(Stage, plan.down(2 * config.in_channels)))
        self.middle_block = Stage(plan.middle(config.middle()))
        self.output_blocks = nn.ModuleList(map(Stage, plan.up()))
        self.out = Head(config.widths[0], config.out_channels)

    def units(self) -> list[nn.Module]:
        """The blocks: what is sharded, compiled and checkpointed as one."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks, self.out]

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Noisy pictures x (b, c, h, w) at the steps t (b,) -> (b, out_channels, h, w): the noise, then the variance's fraction.

        `y` (b,): labels of a model with classes. Raises ValueError for pictures of another size than the constant's.
        """
        config = self.config
        check_picture("x", x, config.in_channels, config.image_size)
        emb = self.t_embedder(t)
        if (y is None) != (self.y_embedder is None):
            raise ValueError(f"labels: the model has {config.num_classes} classes, and {'none' if y is None else 'some'} were given")
        if self.y_embedder is not None:
            emb = emb + self.y_embedder(y)
        x = laid_out(torch.cat([x, self.constant.to(x.dtype).expand_as(x)], dim=1))
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for stage in self.output_blocks:
            x = stage(x, emb, skips.pop())
        return self.out(x).contiguous()
