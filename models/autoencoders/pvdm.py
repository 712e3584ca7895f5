"""PVDM autoencoder: a clip <-> three planes, one of its content and two of its motion (spec, pvdm.md section 2).

Letters: b clips, S frames of a clip, R_h R_w rows and columns of tokens, d width, e latent channels, L = R_h R_w + S R_w + S R_h.
Tokens are kept frame-major, (S, b, R_h R_w, d), as models/layers/timesformer.py says.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from models.layers.planes import PLANES, PlaneProjection, plane_shapes, split_planes, spread_planes
from models.layers.rotary import TimeLayout, grid_tables, time_tables
from models.layers.timesformer import Layer, PatchHead, patch_vectors


@dataclass(frozen=True)
class PVDMAEConfig:
    dim: int = 384
    """Width of the tokens."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width of the clips."""
    patch_size: int = 8
    """Side of a patch; each becomes one token, and one cell of the content plane."""
    n_frames: int = 16
    """Frames of a training clip."""
    splits: int = 1
    """Parts that a training clip is cut into along time; each is encoded by itself."""
    embed_dim: int = 4
    """Channels of the latent."""
    channels: int = 3
    """Channels of the clips."""
    depth: int = 8
    """Layers of the encoder, and of the decoder."""
    heads: int = 8
    """Their attention heads."""
    head_dim: int = 64
    """Width of each."""
    plane_depth: int = 4
    """Layers of each projection to a plane."""
    plane_heads: int = 4
    """Their attention heads."""
    plane_head_dim: int = 0
    """Width of each; 0: dim / 8."""
    plane_mlp_dim: int = 512
    """Hidden width of their feed-forward."""
    frame_rotary: Literal["release", "corrected"] = "release"
    """release: the table that the released weights were trained with, whose two channels of a pair disagree; corrected: a true rotation."""
    readout: Literal["first", "token"] = "first"
    """Where a projection is read: at the first feature, as the released weights need, or at the learned token behind them."""

    def __post_init__(self) -> None:
        h, w = self.image_size
        positive = ("dim", "patch_size", "embed_dim", "channels", "heads", "plane_depth", "plane_heads", "plane_mlp_dim")
        for name, lowest in (*((name, 1) for name in positive), ("depth", 0), ("plane_head_dim", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} {getattr(self, name)}: at least {lowest}")
        if h % self.patch_size or w % self.patch_size or min(h, w) < self.patch_size:
            raise ValueError(f"image_size {h} x {w} is not a multiple of patch_size {self.patch_size}")
        if self.splits < 1 or self.n_frames < self.splits or self.n_frames % self.splits:
            raise ValueError(f"n_frames {self.n_frames} cannot be cut into {self.splits} splits")
        if self.head_dim < 4 or self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim of at least 4, not {self.head_dim}")
        if self.dim < 8 and not self.plane_head_dim:
            raise ValueError(f"dim {self.dim} leaves no width for the heads of the projections: set plane_head_dim")

    @property
    def grid(self) -> tuple[int, int]:
        """(R_h, R_w)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def clip_frames(self) -> int:
        """S: frames that make one latent."""
        return self.n_frames // self.splits

    @property
    def plane_shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the planes in the order of the latent: content, then time x columns, then time x rows."""
        return plane_shapes(self.clip_frames, self.grid)

    @property
    def latent_size(self) -> int:
        """L: positions of the latent of one clip of S frames."""
        return sum(rows * columns for rows, columns in self.plane_shapes)


class PVDMAutoencoder(nn.Module):
    """Clip (b, c, S, h, w) <-> latent (b, e, L) in (-1, 1)."""

    def __init__(self, config: PVDMAEConfig) -> None:
        super().__init__()
        self.config = config
        c, d = config, config.dim
        plane = (d, c.plane_depth, c.plane_heads, c.plane_head_dim or d // 8, c.plane_mlp_dim, c.readout)
        lengths = {"xy": c.clip_frames, "yt": c.grid[0], "xt": c.grid[1]}
        self.patch_in = nn.Linear(c.channels * c.patch_size**2, d)
        self.encoder = nn.ModuleList(Layer(d, c.heads, c.head_dim, qkv_bias=False) for _ in range(c.depth))
        self.projections = nn.ModuleDict({axis: PlaneProjection(axis, lengths[axis], *plane) for axis in PLANES})
        self.to_latent = nn.ModuleDict({axis: nn.Linear(d, c.embed_dim) for axis in PLANES})
        self.from_latent = nn.ModuleDict({axis: nn.Linear(c.embed_dim, d) for axis in PLANES})
        self.decoder = nn.ModuleList(Layer(d, c.heads, c.head_dim, qkv_bias=False) for _ in range(c.depth))
        self.to_pixels = PatchHead(d, c.channels, c.patch_size)

    def units(self) -> list[nn.Module]:
        """The layers and the projections: what is sharded, compiled and checkpointed as one."""
        return [*self.encoder, *self.projections.values(), *self.decoder]

    def forward(self, video: Tensor) -> Tensor:
        """(b, c, n S, h, w) -> its reconstruction, the same shape, in (-1, 1)."""
        recon = self.decode(self.encode(video))
        return recon if len(recon) == len(video) else rearrange(recon, "(b n) c t h w -> b c (n t) h w", b=len(video))

    def encode(self, video: Tensor) -> Tensor:
        """(b, c, n S, h, w) -> latents (b n, e, L) float32; n is 1 or `splits`. Raises ValueError for other sizes."""
        tokens = self.tokens(video)
        flat = [self.to_latent[axis](self.projections[axis](tokens, self.config.grid)).flatten(1, 2) for axis in PLANES]
        return torch.cat(flat, dim=1).float().tanh().transpose(1, 2).contiguous()

    def decode(self, latent: Tensor) -> Tensor:
        """(b, e, L) -> (b, c, S, h, w) in (-1, 1), float32. Raises ValueError for a latent of another size, of other frames for example."""
        tokens = self._stack(self.decoder, self.features(latent))
        return self.to_pixels.pixels(tokens, self.config.grid)

    def planes(self, latent: Tensor) -> tuple[Tensor, ...]:
        """(b, e, L) -> xy (b, e, R_h, R_w), yt (b, e, S, R_w), xt (b, e, S, R_h), views."""
        c = self.config
        if latent.dim() != 3 or latent.shape[1:] != (c.embed_dim, c.latent_size):
            what = f"(b, {c.embed_dim}, {c.latent_size}), those of {c.clip_frames} frames of {c.image_size[0]} x {c.image_size[1]}"
            raise ValueError(f"the autoencoder decodes latents {what}, not {tuple(latent.shape)}")
        return split_planes(latent, c.plane_shapes)

    def tokens(self, video: Tensor) -> Tensor:
        """Encoder output of (b, c, n S, h, w): (S, b n, R_h R_w, d). Raises ValueError for sizes the model is not built for."""
        c = self.config
        frames = (c.clip_frames,) if c.splits == 1 else (c.clip_frames, c.n_frames)
        if video.dim() != 5 or video.shape[1] != c.channels or video.shape[2] not in frames or video.shape[3:] != c.image_size:
            want = f"(b, {c.channels}, {' or '.join(map(str, frames))}, {c.image_size[0]}, {c.image_size[1]})"
            raise ValueError(f"the autoencoder takes clips {want}, not {tuple(video.shape)}")
        video = rearrange(video, "b c (n t) h w -> t (b n) c h w", t=c.clip_frames)
        return self._stack(self.encoder, self.patch_in(patch_vectors(video, c.patch_size).to(self.patch_in.weight.dtype)))

    def features(self, latent: Tensor) -> Tensor:
        """Decoder input of latents (b, e, L): the sum of the planes spread over the clip, (S, b, R_h R_w, d)."""
        dtype = self.patch_in.weight.dtype
        planes = zip(PLANES, self.planes(latent), strict=True)
        return spread_planes(*(self.from_latent[axis](plane.permute(0, 2, 3, 1).to(dtype)) for axis, plane in planes))

    def _stack(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        """(S, b, R_h R_w, d) -> (S, b, R_h R_w, d)."""
        c = self.config
        layout: TimeLayout = "halves" if c.frame_rotary == "release" else "pairs"
        time_rope = time_tables(c.clip_frames, c.head_dim, x.device, layout)
        space_rope = grid_tables(*c.grid, c.head_dim, x.device)
        for layer in layers:
            x = layer(x, time_rope, space_rope)
        return x
