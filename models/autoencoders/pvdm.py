"""PVDM autoencoder: a clip <-> three planes, one of its content and two of its motion (spec, pvdm.md section 2).

Letters: b clips, S frames of a clip, R_h R_w rows and columns of tokens, d width, e latent channels, L = R_h R_w + S R_w + S R_h.
Tokens are kept frame-major, (S, b, R_h R_w, d), as models/layers/timesformer.py says.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from models.autoencoders.tokens import TokenAEConfig, TokenAutoencoder
from models.layers.planes import PLANES, plane_shapes, split_planes, spread_planes


@dataclass(frozen=True)
class PVDMAEConfig(TokenAEConfig):
    splits: int = 1
    """Parts that a training clip is cut into along time; each is encoded by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.splits < 1 or self.n_frames < self.splits or self.n_frames % self.splits:
            raise ValueError(f"n_frames {self.n_frames} cannot be cut into {self.splits} splits")

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

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Channels and positions of a clip's latent."""
        return self.embed_dim, self.latent_size


class PVDMAutoencoder(TokenAutoencoder):
    """Clip (b, c, S, h, w) <-> latent (b, e, L) in (-1, 1)."""

    config: PVDMAEConfig

    def __init__(self, config: PVDMAEConfig) -> None:
        super().__init__(config)
        self.to_latent = nn.ModuleDict({axis: nn.Linear(config.dim, config.embed_dim) for axis in PLANES})
        self.from_latent = nn.ModuleDict({axis: nn.Linear(config.embed_dim, config.dim) for axis in PLANES})
        self.build_decoder()

    def units(self) -> list[nn.Module]:
        """The layers and the projections: what is sharded, compiled and checkpointed as one."""
        return [*self.encoder, *self.projections.values(), *self.decoder]

    def forward(self, video: Tensor) -> Tensor:
        """(b, c, n S, h, w) -> its reconstruction, the same shape, in (-1, 1)."""
        recon = self.decode(self.encode(video))
        return recon if len(recon) == len(video) else rearrange(recon, "(b n) c t h w -> b c (n t) h w", b=len(video))

    def encode(self, video: Tensor) -> Tensor:
        """(b, c, n S, h, w) -> latents (b n, e, L) float32; n is 1 or `splits`. Raises ValueError for other sizes."""
        planes = zip(PLANES, self.project(self.tokens(video)), strict=True)
        flat = [self.to_latent[axis](plane).flatten(1, 2) for axis, plane in planes]
        return torch.cat(flat, dim=1).float().tanh().transpose(1, 2).contiguous()

    def decode(self, latent: Tensor) -> Tensor:
        """(b, e, L) -> (b, c, S, h, w) in (-1, 1), float32. Raises ValueError for a latent of another size, of other frames for example."""
        return self.pixels(self.features(latent))

    def planes(self, latent: Tensor) -> tuple[Tensor, ...]:
        """(b, e, L) -> xy (b, e, R_h, R_w), yt (b, e, S, R_w), xt (b, e, S, R_h), views."""
        c = self.config
        if latent.dim() != 3 or latent.shape[1:] != (c.embed_dim, c.latent_size):
            what = f"(b, {c.embed_dim}, {c.latent_size}), those of {c.clip_frames} frames of {c.image_size[0]} x {c.image_size[1]}"
            raise ValueError(f"the autoencoder decodes latents {what}, not {tuple(latent.shape)}")
        return split_planes(latent, c.plane_shapes)

    def features(self, latent: Tensor) -> Tensor:
        """Decoder input of latents (b, e, L): the sum of the planes spread over the clip, (S, b, R_h R_w, d)."""
        dtype = self.patch_in.weight.dtype
        planes = zip(PLANES, self.planes(latent), strict=True)
        return spread_planes(*(self.from_latent[axis](plane.permute(0, 2, 3, 1).to(dtype)) for axis, plane in planes))
