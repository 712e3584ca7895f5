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
from models.transformers.config import ClipDiTConfig
from models.transformers.dit import DiTBlock, FinalLayer, init_dit


@dataclass(frozen=True)
class PlaneDiTConfig(ClipDiTConfig):
    """`latent_res` is the plane xy, `latent_frames` the height of the planes yt and xt."""

    def patched(self) -> dict[str, tuple[int, ...]]:
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

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of tokens of xy, yt, xt."""
        return tuple((rows // self.patch_size, columns // self.patch_size) for rows, columns in self.plane_shapes)


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
