"""CMD autoencoder: a clip <-> one content frame and a small motion latent (paper sections 3.1 and 3.2; spec, cmd.md section 3).

Letters: B clips, T frames, h w pixels, p patch, H' = h/p rows and W' = w/p columns of tokens, S = H'W', d width, D motion channels.
Tokens are kept frame-major, (T, B, S, d), as models/layers/timesformer.py says.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from models.layers.rotary import grid_tables, time_tables
from models.layers.timesformer import Layer, PatchHead, patch_vectors


@dataclass(frozen=True)
class CMDAEConfig:
    dim: int = 384
    """Width of the tokens."""
    image_size: tuple[int, int] = (64, 64)
    """Height and width of the clips (of the image VAE's latents in latent mode)."""
    patch_size: int = 2
    """Side of a patch; each becomes one token."""
    channels: int = 3
    """Channels of the clips: 3, or the image VAE's latent channels."""
    n_frames: int = 16
    """Frames per clip."""
    embed_dim: int = 8
    """Channels of the motion latent."""
    depth: int = 8
    """Layers of the encoder, and of the decoder."""
    heads: int = 8
    """Attention heads."""
    mode: Literal["pixel", "latent"] = "pixel"
    """pixel: clips are pixels in [-1, 1]; latent: clips are latents of an image VAE, of any range."""
    rotary: Literal["axial", "none"] = "axial"
    """axial: rotary positions on time and on rows and columns; none: no position information, as in the CMD release's weights."""

    def __post_init__(self) -> None:
        h, w = self.image_size
        if h % self.patch_size or w % self.patch_size or min(h, w) < self.patch_size:
            raise ValueError(f"image_size {h} x {w} is not a multiple of patch_size {self.patch_size}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.rotary == "axial" and self.dim // self.heads < 4:
            raise ValueError(f"rotary positions need at least 4 channels per head, not {self.dim // self.heads}; use rotary 'none'")

    @property
    def grid(self) -> tuple[int, int]:
        """(H', W')."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def latent_size(self) -> tuple[int, int]:
        """(T, W' + H') of the motion latent."""
        return self.n_frames, sum(self.grid)


class CMDAutoencoder(nn.Module):
    """Clip (B, C, T, h, w) <-> content frame z_c (B, C, h, w) and motion latent z_m (B, D, T, W' + H') in (-1, 1)."""

    def __init__(self, config: CMDAEConfig) -> None:
        super().__init__()
        self.config = config
        d, c, p = config.dim, config.channels, config.patch_size
        self.patch_in = nn.Linear(c * p * p, d)
        self.encoder = nn.ModuleList(Layer(d, config.heads) for _ in range(config.depth))
        self.to_weights = PatchHead(d, c, p)
        self.columns_out = nn.Linear(d, config.embed_dim)
        self.rows_out = nn.Linear(d, config.embed_dim)
        self.content_in = nn.Linear(c * p * p, d)
        self.columns_in = nn.Linear(config.embed_dim, d)
        self.rows_in = nn.Linear(config.embed_dim, d)
        self.decoder = nn.ModuleList(Layer(d, config.heads) for _ in range(config.depth))
        self.to_pixels = PatchHead(d, c, p)

    def units(self) -> list[nn.Module]:
        """The layers: what is sharded, compiled and checkpointed as one."""
        return [*self.encoder, *self.decoder]

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, T, h, w), or frames (B T, C, h, w) -> (reconstruction (B, C, T, h, w), z_c, z_m)."""
        z_c, z_m = self.encode(video)
        return self.decode(z_c, z_m), z_c, z_m

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T, h, w), or frames (B T, C, h, w) -> (z_c (B, C, h, w), z_m (B, D, T, W' + H'))."""
        video = self.clips(video)
        tokens = self.tokens(video)
        return self.content(video, self.frame_weights(tokens)), self.motion(tokens)

    def clips(self, video: Tensor) -> Tensor:
        """Reads (B T, C, h, w) as clips of the configured length. Raises ValueError for sizes the model is not built for."""
        c = self.config
        if video.dim() == 4:
            video = rearrange(video, "(b t) c h w -> b c t h w", t=c.n_frames)
        if video.dim() != 5 or video.shape[1] != c.channels or video.shape[3:] != c.image_size:
            want = f"(b, {c.channels}, t, {c.image_size[0]}, {c.image_size[1]})"
            raise ValueError(f"the autoencoder takes clips {want}, not {tuple(video.shape)}")
        return video

    def tokens(self, video: Tensor) -> Tensor:
        """Encoder output of clips (B, C, T, h, w): (T, B, S, d)."""
        return self._stack(self.encoder, self._patches(self.patch_in, rearrange(video, "b c t h w -> t b c h w")))

    def frame_weights(self, tokens: Tensor) -> Tensor:
        """(T, B, C, h, w) float32, a softmax over the frames for each pixel and channel."""
        return self.to_weights(tokens, self.config.grid).float().softmax(dim=0)

    def content(self, video: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the frames: inside the convex hull of the clip's own, (B, C, h, w)."""
        # Not an einsum: autocast would run it in half precision.
        return (rearrange(video, "b c t h w -> t b c h w") * weights.to(video.dtype)).sum(0)

    def motion(self, tokens: Tensor) -> Tensor:
        """(B, D, T, W' + H'): the mean over rows, then the mean over columns."""
        e = tokens.unflatten(2, self.config.grid)  # (T, B, H', W', d)
        planes = torch.cat([self.columns_out(e.mean(dim=2)), self.rows_out(e.mean(dim=3))], dim=2)
        return rearrange(planes, "t b s d -> b d t s").tanh()

    def decode(self, z_c: Tensor, z_m: Tensor) -> Tensor:
        """(B, C, h, w), (B, D, T, W' + H') -> clip (B, C, T, h, w): in (-1, 1) in pixel mode, unbounded in latent mode."""
        h, w = self.config.grid
        content = self._patches(self.content_in, z_c)  # (B, S, d)
        planes = rearrange(z_m, "b d t s -> t b s d").to(content.dtype)
        columns = self.columns_in(planes[:, :, None, :w])  # (T, B, 1, W', d)
        rows = self.rows_in(planes[:, :, w:, None])  # (T, B, H', 1, d)
        x = content.unflatten(1, (h, w)) + columns + rows
        x = self.to_pixels(self._stack(self.decoder, x.flatten(2, 3)), self.config.grid)
        if self.config.mode == "pixel":
            x = 2 * x.float().sigmoid() - 1  # half precision has steps of a grey level near -1 and 1
        return rearrange(x, "t b c h w -> b c t h w")

    def _patches(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """(..., C, h, w) -> (..., S, d)."""
        return linear(patch_vectors(x, self.config.patch_size).to(linear.weight.dtype))

    def _stack(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        """(T, B, S, d) -> (T, B, S, d)."""
        time_rope = space_rope = None
        if self.config.rotary == "axial":
            width = self.config.dim // self.config.heads
            time_rope = time_tables(x.shape[0], width, x.device)
            space_rope = grid_tables(*self.config.grid, width, x.device)
        for layer in layers:
            x = layer(x, time_rope, space_rope)
        return x
