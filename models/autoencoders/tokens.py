"""What the video autoencoders of patch tokens share: PVDM's, whose latent is three planes, and HVDM's, whose latent is a volume
(spec, pvdm.md section 2, hvdm.md section 4).

Letters: b clips, S frames of a clip, R_h R_w rows and columns of tokens, d width.
Tokens are kept frame-major, (S, b, R_h R_w, d), as models/layers/timesformer.py says.
"""

from dataclasses import dataclass
from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from models.layers.planes import PLANES, PlaneProjection
from models.layers.rotary import TimeLayout, grid_tables, time_tables
from models.layers.timesformer import Layer, PatchHead, patch_vectors


@dataclass(frozen=True)
class TokenAEConfig:
    dim: int = 384
    """Width of the tokens."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width of the clips."""
    patch_size: int = 8
    """Side of a patch; each becomes one token, and one cell of the latent."""
    n_frames: int = 16
    """Frames of a training clip."""
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
        return self.n_frames


class TokenAutoencoder(nn.Module):
    """The way in, from pixels to tokens and planes, and the stacks of layers; what the latent is, a subclass says."""

    config: TokenAEConfig

    def __init__(self, config: TokenAEConfig) -> None:
        super().__init__()
        c, d = config, config.dim
        plane = (d, c.plane_depth, c.plane_heads, c.plane_head_dim or d // 8, c.plane_mlp_dim, c.readout)
        lengths = {"xy": c.clip_frames, "yt": c.grid[0], "xt": c.grid[1]}
        self.config = config
        self.patch_in = nn.Linear(c.channels * c.patch_size**2, d)
        self.encoder = nn.ModuleList(Layer(d, c.heads, c.head_dim, qkv_bias=False) for _ in range(c.depth))
        self.projections = nn.ModuleDict({axis: PlaneProjection(axis, lengths[axis], *plane) for axis in PLANES})

    def build_decoder(self) -> None:
        """Adds the way out; after the layers of the latent, which come before it in the order of the weights."""
        c = self.config
        self.decoder = nn.ModuleList(Layer(c.dim, c.heads, c.head_dim, qkv_bias=False) for _ in range(c.depth))
        self.to_pixels = PatchHead(c.dim, c.channels, c.patch_size)

    def tokens(self, video: Tensor) -> Tensor:
        """Encoder output of (b, c, n S, h, w): (S, b n, R_h R_w, d). Raises ValueError for sizes the model is not built for."""
        c = self.config
        frames = (c.clip_frames,) if c.clip_frames == c.n_frames else (c.clip_frames, c.n_frames)
        if video.dim() != 5 or video.shape[1] != c.channels or video.shape[2] not in frames or video.shape[3:] != c.image_size:
            want = f"(b, {c.channels}, {' or '.join(map(str, frames))}, {c.image_size[0]}, {c.image_size[1]})"
            raise ValueError(f"the autoencoder takes clips {want}, not {tuple(video.shape)}")
        video = rearrange(video, "b c (n t) h w -> t (b n) c h w", t=c.clip_frames)
        return self.run_layers(self.encoder, self.patch_in(patch_vectors(video, c.patch_size).to(self.patch_in.weight.dtype)))

    def project(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """(S, b, R_h R_w, d) -> planes of features: xy (b, R_h, R_w, d), yt (b, S, R_w, d), xt (b, S, R_h, d)."""
        return tuple(self.projections[axis](tokens, self.config.grid) for axis in PLANES)

    def pixels(self, features: Tensor) -> Tensor:
        """Decoder input (S, b, R_h R_w, d) -> clips (b, c, S, h, w) in (-1, 1), float32."""
        return self.to_pixels.pixels(self.run_layers(self.decoder, features), self.config.grid)

    def run_layers(self, layers: nn.ModuleList, x: Tensor, *context: Tensor) -> Tensor:
        """(S, b, R_h R_w, d) -> (S, b, R_h R_w, d); `context` goes to each layer as it is."""
        c = self.config
        layout: TimeLayout = "halves" if c.frame_rotary == "release" else "pairs"
        time_rope = time_tables(c.clip_frames, c.head_dim, x.device, layout)
        space_rope = grid_tables(*c.grid, c.head_dim, x.device)
        for layer in layers:
            x = layer(x, *context, time_rope, space_rope)
        return x
