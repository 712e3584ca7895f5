"""PVDM's denoiser: an image UNet on each of the three planes of a latent, with attention across all planes after each block
(spec, pvdm.md section 3).

Letters: B batch, C channels, L positions of the planes together, E width of the steering vector. Planes of equal width lie on one
sheet, one above the other (see adm.py): for square frames all three do, and the sheet is the sequence that attention across planes reads.
"""

import itertools
import math
from dataclasses import dataclass

from torch import Tensor, nn

from models.layers.convolution import laid_out
from models.layers.embeddings import LabelEmbedder, TimestepEmbedder
from models.layers.planes import plane_shapes
from models.layers.previous import with_previous
from models.unets.adm import AttentionBlock, Rows
from models.unets.config import ClipUNetConfig
from models.unets.plane_stages import PlaneHead, Sheets, Stage
from models.unets.stages import Layers, Plan, check_rates, steered


@dataclass(frozen=True)
class PlaneUNetConfig(ClipUNetConfig):
    """`latent_res` is the plane xy, `latent_frames` the height of the planes yt and xt."""

    model_channels: int = 256
    """Width of the first level."""
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    """Levels with attention inside each plane, by how often smaller their sides are; entries of no level do nothing. Attention across
    planes is everywhere."""
    num_heads: int = 8
    """Heads of all attention."""
    head_channels: int = 0
    """Width of a head, which then decides their number; 0: width of the level / num_heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads < 1 or self.head_channels < 0:
            name, lowest = ("num_heads", 1) if self.num_heads < 1 else ("head_channels", 0)
            raise ValueError(f"{name} {getattr(self, name)}: at least {lowest}")
        for level, width in enumerate(self.widths):
            if width % (self.head_channels or self.num_heads):
                what = f"head_channels {self.head_channels}" if self.head_channels else f"num_heads {self.num_heads}"
                raise ValueError(f"the width {width} of level {level} is not a multiple of {what}")
        check_rates(self.attention_resolutions)

    def halved(self) -> dict[str, tuple[int, ...]]:
        """The frames too."""
        return {"latent_res": self.latent_res, "latent_frames": (self.latent_frames,)}

    @property
    def plane_shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of xy, yt, xt."""
        return plane_shapes(self.latent_frames, self.latent_res)

    @property
    def length(self) -> int:
        """Positions of a latent, L."""
        return sum(rows * columns for rows, columns in self.plane_shapes)

    def heads(self, width: int) -> int:
        """Heads of attention over `width` channels."""
        return width // self.head_channels if self.head_channels else self.num_heads

    @property
    def sheets(self) -> tuple[tuple[Rows, int], ...]:
        """(rows of the planes on it, width) of each sheet: neighbours of equal width share one."""
        grouped = itertools.groupby(self.plane_shapes, key=lambda shape: shape[1])
        return tuple((tuple(rows for rows, _ in shapes), width) for width, shapes in grouped)


class PlaneUNet(nn.Module):
    """Denoiser of latents (B, C, L) given the step and, where configured, the previous clip's latent and a class label."""

    def __init__(self, config: PlaneUNetConfig) -> None:
        super().__init__()
        self.config = config
        emb = 4 * config.model_channels
        self.t_embedder = TimestepEmbedder(emb, config.model_channels)
        self.y_embedder = LabelEmbedder(config.num_classes, emb, config.class_dropout_prob > 0) if config.num_classes else None
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        plan = Plan(config, (2, 2), steered(config, (2, 2)), self._inside)  # in this order: it keeps count
        channels = config.in_channels * (1 + config.conditional)
        self.input_blocks = nn.ModuleList(self._stage(layers, across=k > 0) for k, layers in enumerate(plan.down(channels)))
        # The middle attends inside each plane whatever the level.
        self.middle_block = self._stage(plan.middle(between=[self._attention(len(config.widths) - 1)]))
        self.output_blocks = nn.ModuleList(self._stage(layers) for layers in plan.up())
        rows = tuple(rows for rows, _ in config.sheets)
        self.out = PlaneHead(config.widths[0], config.out_channels or config.in_channels, rows)

    def units(self) -> list[nn.Module]:
        """The blocks: what is sharded, compiled and checkpointed as one."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks, self.out]

    def forward(self, x: Tensor, t: Tensor, previous: Tensor | None = None, y: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """x (B, C, L), step t (B,), latent of the clip before (B, C, L) or None (zeros), labels y (B,) -> (B, out_channels, L).

        `drop` (B,) bool takes the label away; the label num_classes and None mean the same. Raises ValueError for other shapes than
        the model's, and for a `previous` that it has no input for.
        """
        x = with_previous(x, previous, (self.config.in_channels, self.config.length), self.config.conditional)
        emb = self.t_embedder(t)
        if self.y_embedder is not None:
            emb = emb + (self.y_embedder.null_label(len(t)) if y is None else self.y_embedder(y, drop))
        sheets, skips = self._sheets(x), []
        for stage in self.input_blocks:
            sheets = stage(sheets, emb)
            skips.append(sheets)
        sheets = self.middle_block(sheets, emb)
        for stage in self.output_blocks:
            sheets = stage(sheets, emb, skips.pop())
        return self.out(sheets)

    def _sheets(self, x: Tensor) -> Sheets:
        """(B, C, L) -> sheets (B, C, rows of all its planes, columns)."""
        sizes = [(sum(rows), width) for rows, width in self.config.sheets]
        parts = x.split([math.prod(size) for size in sizes], dim=2)
        return tuple(laid_out(part.unflatten(2, size)) for part, size in zip(parts, sizes, strict=True))

    def _stage(self, layers: Layers, across: bool = True) -> Stage:
        """The first stage, a convolution, is the only one without attention across planes."""
        rows = tuple(tuple(height >> layers.level for height in rows) for rows, _ in self.config.sheets)
        return Stage(layers.modules, self._attention(layers.level) if across else None, rows)

    def _attention(self, level: int) -> AttentionBlock:
        width = self.config.widths[level]
        return AttentionBlock(width, self.config.heads(width))

    def _inside(self, level: int) -> list[nn.Module]:
        """Attention inside each plane, at the levels that have it."""
        return [self._attention(level)] if 2**level in self.config.attention_resolutions else []
