"""A DiT over the patches of a clip's three planes: the transformer alternative to PVDM's UNet, with the same inputs and outputs.

All patches of all planes are one sequence. Each plane has the fixed position table of its own grid and a learned vector that tells it
from the others; patches are embedded, and read out, by the same weights in each. Letters: B batch, C channels, L positions of the
planes together, N tokens, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.layers.embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, grid_table, unpatchify
from models.layers.planes import join_planes, plane_shapes, split_planes
from models.layers.previous import with_previous
from models.transformers.dit import DiTBlock, FinalLayer, init_dit


@dataclass(frozen=True)
class PlaneDiTConfig:
    latent_res: tuple[int, int] = (32, 32)
    """Height and width of the plane xy."""
    latent_frames: int = 16
    """Frames of a clip: height of the planes yt and xt."""
    in_channels: int = 4
    """Channels of a latent."""
    patch_size: int = 2
    """Side of a patch; each becomes one token."""
    hidden_size: int = 1152
    """Width of the tokens."""
    depth: int = 28
    """Blocks."""
    num_heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over hidden_size."""
    learn_sigma: bool = False
    """Give twice the channels: the noise and the interpolation of its variance."""
    conditional: bool = True
    """The previous clip's latent is a second input."""
    num_classes: int = 0
    """Classes of the label condition; 0: no label."""
    class_dropout_prob: float = 0.1
    """Share of labels dropped in training. Above 0 there is a null label, the row num_classes of the table."""

    def __post_init__(self) -> None:
        for name in ("latent_frames", "in_channels", "patch_size", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")
        sides = {"latent_res": self.latent_res, "latent_frames": (self.latent_frames,)}
        for name, values in sides.items():
            if any(value % self.patch_size or value < 1 for value in values):
                raise ValueError(f"{name} {' x '.join(map(str, values))} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads} and of 4")
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio}: nothing is left between the layers of an MLP of width {self.hidden_size}")

    @property
    def plane_shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of xy, yt, xt."""
        return plane_shapes(self.latent_frames, self.latent_res)

    @property
    def length(self) -> int:
        """Positions of a latent, L."""
        return sum(rows * columns for rows, columns in self.plane_shapes)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of tokens of xy, yt, xt."""
        return tuple((rows // self.patch_size, columns // self.patch_size) for rows, columns in self.plane_shapes)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


class PlaneDiT(nn.Module):
    """Denoiser of latents (B, C, L) given the step and, where configured, the previous clip's latent and a class label."""

    def __init__(self, config: PlaneDiTConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.x_embedder = PatchEmbed(config.in_channels * (2 if config.conditional else 1), d, config.patch_size)
        self.plane_embed = nn.Parameter(torch.empty(len(config.grids), d))
        self.t_embedder = TimestepEmbedder(d)
        self.y_embedder = LabelEmbedder(config.num_classes, d, config.class_dropout_prob > 0) if config.num_classes else None
        self.blocks = nn.ModuleList(DiTBlock(d, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(d, config.patch_size, config.out_channels)
        init_dit(self)
        nn.init.normal_(self.plane_embed, std=0.02)

    def units(self) -> list[nn.Module]:
        """The blocks: what is sharded, compiled and checkpointed as one."""
        return list(self.blocks)

    def forward(self, x: Tensor, t: Tensor, previous: Tensor | None = None, y: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """x (B, C, L), step t (B,), latent of the clip before (B, C, L) or None (zeros), labels y (B,) -> (B, out_channels, L).

        `drop` (B,) bool takes the label away; the label num_classes and None mean the same. Raises ValueError for other shapes than
        the model's, and for a `previous` that it has no input for.
        """
        config = self.config
        x = with_previous(x, previous, (config.in_channels, config.length), config.conditional)
        tokens = self._embed(x)
        c = self.t_embedder(t)
        if self.y_embedder is not None:
            c = c + (self.y_embedder.null_label(len(t)) if y is None else self.y_embedder(y, drop))
        for block in self.blocks:
            tokens = block(tokens, c)
        parts = self.final_layer(tokens, c).split([rows * columns for rows, columns in config.grids], dim=1)
        return join_planes(*(unpatchify(part, grid, config.patch_size) for part, grid in zip(parts, config.grids, strict=True)))

    def _embed(self, x: Tensor) -> Tensor:
        """(B, C, L) -> tokens of all planes with their places, (B, N, D)."""
        parts = [self.x_embedder(plane) for plane in split_planes(x, self.config.plane_shapes)]
        places = [grid_table(self.config.hidden_size, grid, "wh", x.device) for grid in self.config.grids]
        places = [place + vector for place, vector in zip(places, self.plane_embed, strict=True)]
        tokens = torch.cat(parts, dim=1)
        return tokens + torch.cat(places).to(tokens.dtype)
