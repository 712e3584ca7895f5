"""CMD's motion model: a DiT over the motion latent that reads the content frame as extra tokens (paper 3.3; spec, cmd.md section 5)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.layers.embeddings import PatchEmbed, position_parameter
from models.transformers.dit import ContentDiT, DiTConfig, init_dit


@dataclass(frozen=True)
class MotionDiTConfig(DiTConfig):
    input_size: tuple[int, int] = (16, 64)
    """(frames, columns + rows) of the motion latent."""
    in_channels: int = 8
    """Channels of the motion latent."""
    keyframe_size: tuple[int, int] = (64, 64)
    """Height and width of the content frame."""
    keyframe_channels: int = 3
    """Channels of the content frame."""
    keyframe_patch_size: int = 4
    """Side of a patch of the content frame."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keyframe_patch_size < 1:
            raise ValueError(f"keyframe_patch_size {self.keyframe_patch_size}: at least 1")
        h, w = self.keyframe_size
        if h % self.keyframe_patch_size or w % self.keyframe_patch_size:
            raise ValueError(f"content frame {h} x {w} is not a multiple of keyframe_patch_size {self.keyframe_patch_size}")

    @property
    def keyframe_grid(self) -> tuple[int, int]:
        """(rows, columns) of the content frame's tokens."""
        return self.keyframe_size[0] // self.keyframe_patch_size, self.keyframe_size[1] // self.keyframe_patch_size


class MotionDiT(ContentDiT):
    """Denoiser of motion latents (B, D, T, W' + H') given the step, the content frame and, where configured, a label or a vector."""

    config: MotionDiTConfig

    def __init__(self, config: MotionDiTConfig) -> None:
        super().__init__(config)
        self.keyframe_embedder = PatchEmbed(config.keyframe_channels, config.hidden_size, config.keyframe_patch_size)
        self.keyframe_pos_embed = position_parameter(config.hidden_size, config.keyframe_grid, "true")  # the release's too
        init_dit(self.keyframe_embedder)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        t: Tensor,
        keyframe: Tensor,
        y: Tensor | None = None,
        cond: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> Tensor:
        """x (B, D, T, W' + H'), step index t (B,), keyframe (B, C, h, w), y and cond as ContentDiT's -> (B, out_channels, T, W' + H').

        `drop` takes away the label and the vector, never the content frame.
        """
        frame = self.keyframe_embedder(keyframe)
        frame = frame + self.keyframe_pos_embed.to(frame.dtype)
        tokens = torch.cat([self.embed(x), frame], dim=1)  # (B, N + M, D)
        return self.predict(tokens, self.condition(t, y, cond, drop))
