"""DiT: the diffusion transformer with adaptive layer norm (spec, cmd.md section 7), and CMD's content model, which is the same network.

Letters: B batch, N tokens, D width, C channels. State names are the official ones.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import SelfAttention
from models.layers.embeddings import LabelEmbedder, PatchEmbed, PosGrid, TimestepEmbedder, VectorEmbedder, position_parameter, unpatchify


@dataclass(frozen=True)
class DiTConfig:
    input_size: tuple[int, int] = (64, 64)
    """Height and width of the input."""
    in_channels: int = 3
    """Channels of the input."""
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
    learn_sigma: bool = True
    """Give twice the channels: the noise and the interpolation of its variance."""
    num_classes: int = 0
    """Classes of the label condition; 0: no label."""
    class_dropout_prob: float = 0.1
    """Share of conditions dropped in training. Above 0 there is a null condition; for labels it is the row num_classes of the table."""
    pos_grid: PosGrid = "true"
    """true: positions of the input's real token grid; release: of a square of as many tokens, as the CMD release built them."""
    cond_dim: int = 0
    """Width of the vector condition (a text feature); 0: none."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "patch_size", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")
        h, w = self.input_size
        if h % self.patch_size or w % self.patch_size or min(h, w) < self.patch_size:
            raise ValueError(f"input_size {h} x {w} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads} and of 4")
        rows, columns = self.grid
        if self.pos_grid == "release" and math.isqrt(rows * columns) ** 2 != rows * columns:
            raise ValueError(f"pos_grid 'release' needs a square number of tokens, not {rows} x {columns}; use pos_grid 'true'")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (..., N, D) scaled and shifted by vectors (..., D), which are spread over the tokens: (B, D) is one for each sample."""
    return x * (1 + scale.unsqueeze(-2)) + shift.unsqueeze(-2)


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, head_dim: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor, over_first: bool = False) -> Tensor:
        """Tokens (B, N, D), condition (B, D) -> (B, N, D).

        Tokens may have more axes before N, and the condition the same ones, or ones of size 1 that are spread over the tokens'.
        `over_first`: attention runs along the first of them instead of along N.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1.unsqueeze(-2) * self._attend(modulate(self.norm1(x), shift1, scale1), over_first)
        return x + gate2.unsqueeze(-2) * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def _attend(self, x: Tensor, over_first: bool) -> Tensor:
        # The axes that attention does not run along lie side by side either way, so they become one without a copy.
        if over_first:
            return self.attn(x.flatten(1, -2), over_first=True).view(x.shape)
        return self.attn(x.flatten(0, -3)).view(x.shape)


class FinalLayer(nn.Module):
    """Modulated layer norm and the linear map to the pixels of each patch."""

    def __init__(self, dim: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D), condition (B, D) -> (B, N, patch * patch * out_channels); more axes as in a block."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class ContentDiT(nn.Module):
    """Denoiser of images (B, C, h, w) given the step and, where configured, a class label or a condition vector."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.x_embedder = PatchEmbed(config.in_channels, d, config.patch_size)
        self.pos_embed = position_parameter(d, config.grid, config.pos_grid)
        self.t_embedder = TimestepEmbedder(d)
        self.y_embedder = LabelEmbedder(config.num_classes, d, config.class_dropout_prob > 0) if config.num_classes else None
        self.cond_embedder = VectorEmbedder(config.cond_dim, d, config.class_dropout_prob > 0) if config.cond_dim else None
        self.blocks = nn.ModuleList(DiTBlock(d, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(d, config.patch_size, config.out_channels)
        init_dit(self)

    def units(self) -> list[nn.Module]:
        """The blocks: what is sharded, compiled and checkpointed as one."""
        return list(self.blocks)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, cond: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """x (B, C, h, w), step index t (B,), labels y (B,), vectors cond (B, cond_dim) -> (B, out_channels, h, w).

        `drop` (B,) bool takes the label and the vector away; the label num_classes and cond None mean the same.
        """
        c = self.condition(t, y, cond, drop)
        return self.predict(self.embed(x), c)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> tokens with their positions, (B, N, D). Raises ValueError for another size than the model's."""
        if x.shape[1:] != (self.config.in_channels, *self.config.input_size):
            want = (self.config.in_channels, *self.config.input_size)
            raise ValueError(f"the model takes inputs (b, {', '.join(map(str, want))}), not {tuple(x.shape)}")
        tokens = self.x_embedder(x)
        return tokens + self.pos_embed.to(tokens.dtype)

    def condition(self, t: Tensor, y: Tensor | None, cond: Tensor | None, drop: Tensor | None) -> Tensor:
        """Sum of the embeddings of the step, the label and the vector, (B, D)."""
        c = self.t_embedder(t)
        if self.y_embedder is not None:
            c = c + (self.y_embedder.null_label(len(t)) if y is None else self.y_embedder(y, drop))
        if self.cond_embedder is not None:
            c = c + self.cond_embedder(cond, len(t), drop)
        return c

    def predict(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Blocks and final layer: the first tokens of (B, >= N, D) -> (B, out_channels, h, w)."""
        for block in self.blocks:
            tokens = block(tokens, c)
        rows, columns = self.config.grid
        return unpatchify(self.final_layer(tokens[:, : rows * columns], c), self.config.grid, self.config.patch_size)


def init_dit(model: nn.Module) -> None:
    """Xavier for linears and (flattened) patch convolutions, N(0, 0.02) for the embeddings, zero for what modulates and for the output."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.detach().flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, TimestepEmbedder):
            nn.init.normal_(module.mlp.get_parameter("0.weight"), std=0.02)
            nn.init.normal_(module.mlp.get_parameter("2.weight"), std=0.02)
        elif isinstance(module, LabelEmbedder):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
        elif isinstance(module, VectorEmbedder) and module.null is not None:
            nn.init.normal_(module.null, std=0.02)
        elif isinstance(module, DiTBlock | FinalLayer):
            nn.init.zeros_(module.adaLN_modulation.get_parameter("1.weight"))
        if isinstance(module, FinalLayer):
            nn.init.zeros_(module.linear.weight)
