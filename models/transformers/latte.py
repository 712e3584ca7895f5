"""Latte: a transformer over latent video whose blocks attend in space and in time by turns (spec, latte.md section 2).

Letters: B batch, T frames, I images beside them, N tokens of a frame, D width. Tokens are kept (T + I, B, N, D), frames first:
attention within a frame sees (T + I) * B rows of N, attention over time T rows of B * N, and both are views of the same memory.
The condition, and what the blocks compute from it, has one row a clip and is spread over frames and tokens where it is used.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from models.layers.embeddings import (
    GridOrder,
    LabelEmbedder,
    PatchEmbed,
    TextEmbedder,
    TimeOrder,
    TimestepEmbedder,
    frame_table,
    grid_table,
)
from models.transformers.dit import DiTBlock, FinalLayer, init_dit


@dataclass(frozen=True)
class LatteConfig:
    input_size: tuple[int, int] = (32, 32)
    """Height and width of the latents."""
    in_channels: int = 4
    """Channels of the latents."""
    n_frames: int = 16
    """Frames of a clip as trained. The network takes any number."""
    patch_size: int = 2
    """Side of a patch; each becomes one token."""
    hidden_size: int = 1152
    """Width of the tokens."""
    depth: int = 28
    """Blocks, half of them in space and half in time."""
    num_heads: int = 16
    """Attention heads."""
    head_dim: int = 0
    """Width of a head; 0: hidden_size / num_heads."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over hidden_size."""
    learn_sigma: bool = True
    """Give twice the channels: the noise and the interpolation of its variance."""
    num_classes: int = 0
    """Classes of the label condition; 0: no label."""
    class_dropout_prob: float = 0.1
    """Share of conditions dropped in training. Above 0 there is a null label, the row num_classes of the table."""
    cond_dim: int = 0
    """Numbers of the text feature of a clip (77 * 768 in the official release); 0: none."""
    cond_in_final: bool = True
    """The text feature reaches the final layer too. The official release leaves it out there."""
    block_layout: Literal["interleaved", "late"] = "interleaved"
    """interleaved: space, time, space, time ... (the paper's variant 1); late: all of space, then all of time (variant 2)."""
    time_embed_order: TimeOrder = "cos_sin"
    """Halves of the step embedding: cos_sin in the official release, sin_cos in the tutorial's."""
    time_embed_dim: int = 256
    """Width of the step embedding before its MLP."""
    pos_embed_order: GridOrder = "wh"
    """What the first half of the position channels encodes: wh, the column (official release); hw, the row (tutorial's)."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "n_frames", "patch_size", "hidden_size", "depth", "num_heads", "time_embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")
        if self.depth % 2:
            raise ValueError(f"depth {self.depth} is odd: half of the blocks attend in space, half in time; use {self.depth + 1}")
        h, w = self.input_size
        if h % self.patch_size or w % self.patch_size or min(h, w) < self.patch_size:
            raise ValueError(f"input_size {h} x {w} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4, which the position tables need")
        if self.head_dim < 0:
            raise ValueError(f"head_dim {self.head_dim}: at least 1, or 0 for hidden_size / num_heads")
        if not self.head_dim and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; or give head_dim")
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio}: nothing is left between the layers of an MLP of width {self.hidden_size}")
        if self.time_embed_dim % 2:
            raise ValueError(f"time_embed_dim {self.time_embed_dim} is odd: half of it are sines, half cosines")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens of a frame."""
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


class Latte(nn.Module):
    """Denoiser of latent clips (B, C, T, h, w) given the step and, where configured, a class label or a text feature."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.x_embedder = PatchEmbed(config.in_channels, d, config.patch_size)
        self.t_embedder = TimestepEmbedder(d, config.time_embed_dim, config.time_embed_order)
        self.y_embedder = LabelEmbedder(config.num_classes, d, config.class_dropout_prob > 0) if config.num_classes else None
        self.cond_embedder = TextEmbedder(config.cond_dim, d) if config.cond_dim else None
        self.blocks = nn.ModuleList(DiTBlock(d, config.num_heads, config.mlp_ratio, config.head_dim) for _ in range(config.depth))
        self.final_layer = FinalLayer(d, config.patch_size, config.out_channels)
        init_dit(self)

    def units(self) -> list[nn.Module]:
        """The blocks: what is sharded, compiled and checkpointed as one."""
        return list(self.blocks)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        cond: Tensor | None = None,
        drop: Tensor | None = None,
        *,
        images: int = 0,
        image_y: Tensor | None = None,
        image_drop: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, T + I, h, w), step t (B,), labels y (B,), text features cond (B, cond_dim) -> (B, out_channels, T + I, h, w).

        `drop` (B,) bool takes label and text away; the label num_classes and None mean the same. The last `images` = I entries of the
        frame axis are pictures with the clip's step, no text and labels `image_y` (B, I) of their own (dropped by `image_drop`): they
        see neither each other nor the clip. Raises ValueError for shapes that are not the model's.
        """
        self._check(x, images)
        tokens = self.x_embedder.frames(x)  # (T + I, B, N, D)
        tokens = tokens + grid_table(tokens.shape[-1], self.config.grid, self.config.pos_embed_order, x.device).to(tokens.dtype)
        step = self.t_embedder(t)
        label, text = self._label(y, drop, len(t)), self._text(cond, drop, len(t))
        clip = _sum(step, label, text)[None]  # (1, B, D)
        space, last = clip, clip if self.config.cond_in_final else _sum(step, label)[None]
        if images and (self.y_embedder is not None or self.cond_embedder is not None):
            bare = self._picture(step, images, image_y, image_drop)
            picture = _sum(bare, self._text(None, None, len(t)))  # (I, B, D)
            pairs = (clip, picture), (last, picture if self.config.cond_in_final else bare)
            space, last = (torch.cat([c.expand(x.shape[2] - images, -1, -1), of_images]) for c, of_images in pairs)
        tokens = run_blocks(self.blocks, temporal(self.config), tokens, space, clip, images)
        patch, (rows, columns) = self.config.patch_size, self.config.grid
        out = self.final_layer(tokens, last)
        return rearrange(out, "t b (r s) (p q c) -> b c t (r p) (s q)", r=rows, s=columns, p=patch, q=patch)

    def _check(self, x: Tensor, images: int) -> None:
        c, (h, w) = self.config.in_channels, self.config.input_size
        if x.ndim != 5 or (x.shape[1], *x.shape[3:]) != (c, h, w) or not 0 <= images < x.shape[2]:
            of = f" of which {images} are images" if images else ""
            raise ValueError(f"the model takes clips (b, {c}, frames, {h}, {w}) with at least one frame, not {tuple(x.shape)}{of}")

    def _label(self, y: Tensor | None, drop: Tensor | None, batch: int) -> Tensor | None:
        if self.y_embedder is None:
            return None
        return self.y_embedder.null_label(batch) if y is None else self.y_embedder(y, drop)

    def _text(self, cond: Tensor | None, drop: Tensor | None, batch: int) -> Tensor | None:
        return None if self.cond_embedder is None else self.cond_embedder(cond, batch, drop)

    def _picture(self, step: Tensor, images: int, y: Tensor | None, drop: Tensor | None) -> Tensor:
        """Condition of the images but for the text, (I, B, D)."""
        step = step.repeat(images, 1)  # (I B, D)
        y, drop = (None if value is None else value.t().flatten() for value in (y, drop))
        return _sum(step, self._label(y, drop, len(step))).unflatten(0, (images, -1))


def temporal(config: LatteConfig) -> list[bool]:
    """Which blocks attend over time."""
    half = config.depth // 2
    return [False] * half + [True] * half if config.block_layout == "late" else [False, True] * half


def run_blocks(
    blocks: Iterable[nn.Module], in_time: Sequence[bool], tokens: Tensor, space: Tensor, clip: Tensor, images: int = 0
) -> Tensor:
    """All blocks on (T + I, B, N, D), those `in_time` over the clip's frames; conditions of all frames (T + I or 1, B, D) and of the clip
    alone (1, B, D). What tells frames apart is added before the first block in time.
    """
    frames = len(tokens) - images
    for k, (block, over_time) in enumerate(zip(blocks, in_time, strict=True)):
        if not over_time:
            tokens = block(tokens, space)
            continue
        video = tokens[:frames]
        if k == in_time.index(True):
            table = frame_table(tokens.shape[-1], frames, tokens.device)
            video = video + table[:, None, None].to(tokens.dtype)
        video = block(video, clip, over_first=True)
        tokens = torch.cat([video, tokens[frames:]]) if images else video
    return tokens


def _sum(first: Tensor, *more: Tensor | None) -> Tensor:
    for value in more:
        first = first if value is None else first + value
    return first
