"""A transformer over a clip's latent volume: the alternative to HVDM's UNet, with the same inputs and outputs.

Its blocks are Latte's, in space and in time by turns; the latent before is beside the noisy one on the channel axis.
Letters: B batch, C channels, T frames, H and W sides of the latent, N tokens of a frame, D width.
"""

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from models.layers.embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, grid_table
from models.layers.previous import with_previous
from models.layers.tables import TableConfig, add_told, tables
from models.transformers.config import ClipDiTConfig
from models.transformers.dit import DiTBlock, FinalLayer, init_dit
from models.transformers.latte import run_blocks


@dataclass(frozen=True)
class VolumeDiTConfig(TableConfig, ClipDiTConfig):
    """`patch_size` is the side of a patch of a frame; half of the `depth` blocks attend in space, half in time."""

    def __post_init__(self) -> None:
        ClipDiTConfig.__post_init__(self)
        TableConfig.__post_init__(self)
        if self.depth % 2:
            raise ValueError(f"depth {self.depth} is odd: half of the blocks attend in space, half in time; use {self.depth + 1}")

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W)."""
        return (self.in_channels, self.latent_frames, *self.latent_res)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens of a frame."""
        return self.latent_res[0] // self.patch_size, self.latent_res[1] // self.patch_size


class VolumeDiT(nn.Module):
    """Denoiser of latents (B, C, T, H, W) given the step and, where configured, a latent before, a label and what tables tell."""

    def __init__(self, config: VolumeDiTConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.x_embedder = PatchEmbed(config.in_channels * (2 if config.conditional else 1), d, config.patch_size)
        self.t_embedder = TimestepEmbedder(d)
        self.y_embedder = LabelEmbedder(config.num_classes, d, config.class_dropout_prob > 0) if config.num_classes else None
        self.blocks = nn.ModuleList(DiTBlock(d, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(d, config.patch_size, config.out_channels)
        self.task_emb, self.dynamics_emb, self.stride_emb = tables(config, d).values()
        init_dit(self)

    def units(self) -> list[nn.Module]:
        """The blocks: what is sharded, compiled and checkpointed as one."""
        return list(self.blocks)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        previous: Tensor | None = None,
        y: Tensor | None = None,
        drop: Tensor | None = None,
        *,
        task: Tensor | None = None,
        dynamics: Tensor | None = None,
        stride: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, T, H, W), step t (B,), latent before (B, C, T, H, W) or None (zeros), labels y (B,) -> (B, out_channels, T, H, W).

        `drop` (B,) bool takes the label away; the label num_classes and None mean the same. `task`, `dynamics`, `stride` (B,): rows of
        the tables; None: not told. Raises ValueError for other shapes than the model's, and for what it has no input or table for.
        """
        config = self.config
        x = with_previous(x, previous, config.latent_shape, config.conditional)
        tokens = self.x_embedder.frames(x)  # (T, B, N, D)
        tokens = tokens + grid_table(config.hidden_size, config.grid, "wh", x.device).to(tokens.dtype)
        c = self.t_embedder(t)
        if self.y_embedder is not None:
            c = c + (self.y_embedder.null_label(len(t)) if y is None else self.y_embedder(y, drop))
        c = add_told(c, task=(self.task_emb, task), dynamics=(self.dynamics_emb, dynamics), stride=(self.stride_emb, stride))[None]
        tokens = run_blocks(self.blocks, [False, True] * (config.depth // 2), tokens, c, c)
        (rows, columns), patch = config.grid, config.patch_size
        return rearrange(self.final_layer(tokens, c), "t b (r s) (p q c) -> b c t (r p) (s q)", r=rows, s=columns, p=patch, q=patch)
