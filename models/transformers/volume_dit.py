"""A transformer over a clip's latent volume: the alternative to HVDM's UNet, with the same inputs and outputs.

Its blocks are Latte's, in space and in time by turns; the latent before is beside the noisy one on the channel axis.
Letters: B batch, C channels, T frames, H and W sides of the latent, N tokens of a frame, D width.
"""

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from models.layers.embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, grid_table
from models.layers.previous import with_previous
from models.layers.tables import add_told, check_tables, tables
from models.transformers.dit import DiTBlock, FinalLayer, init_dit
from models.transformers.latte import run_blocks


@dataclass(frozen=True)
class VolumeDiTConfig:
    latent_res: tuple[int, int] = (32, 32)
    """Height and width of the latents."""
    latent_frames: int = 16
    """Frames of the latents."""
    in_channels: int = 4
    """Channels of a latent."""
    patch_size: int = 2
    """Side of a patch of a frame; each becomes one token."""
    hidden_size: int = 1152
    """Width of the tokens."""
    depth: int = 28
    """Blocks, half of them in space and half in time."""
    num_heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over hidden_size."""
    learn_sigma: bool = False
    """Give twice the channels: the noise and the interpolation of its variance."""
    conditional: bool = True
    """The latent of the previous clip, or of a still picture, is a second input."""
    num_classes: int = 0
    """Classes of the label condition; 0: no label."""
    class_dropout_prob: float = 0.1
    """Share of labels dropped in training. Above 0 there is a null label, the row num_classes of the table."""
    tasks: bool = False
    """The network is told what its second input holds: nothing, the previous clip or a still picture."""
    dynamics_bins: int = 0
    """Bins of the dynamics that the network is told; 0: none."""
    strides: int = 0
    """Frame strides that the network is told; 0: none."""

    def __post_init__(self) -> None:
        for name in ("latent_frames", "in_channels", "patch_size", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")
        if self.num_classes < 0:
            raise ValueError(f"num_classes {self.num_classes}: at least 0")
        if self.depth % 2:
            raise ValueError(f"depth {self.depth} is odd: half of the blocks attend in space, half in time; use {self.depth + 1}")
        if any(side % self.patch_size or side < 1 for side in self.latent_res):
            raise ValueError(f"latent_res {' x '.join(map(str, self.latent_res))} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads} and of 4")
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio}: nothing is left between the layers of an MLP of width {self.hidden_size}")
        check_tables(self)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W)."""
        return (self.in_channels, self.latent_frames, *self.latent_res)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens of a frame."""
        return self.latent_res[0] // self.patch_size, self.latent_res[1] // self.patch_size

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


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
