"""How much motion there is in a clip: one number that a denoiser can be told, and samples be measured by (spec, hvdm.md section 8)."""

import torch
from torch import Tensor

from models.layers.wavelet import haar3d


def motion_energy(video: Tensor) -> Tensor:
    """Clips b c t h w in [-1, 1] -> (b,) float32: mean |coefficient| of the four subbands that are high in time.

    Exactly 0 for a still clip; grows in proportion to the contrast. Raises ValueError for odd sizes.
    """
    if video.shape[2] % 2:
        raise ValueError(f"{video.shape[2]} frames: motion is that of pairs, so their number is even")
    pairs = video.float().unflatten(2, (-1, 2))
    # (a - b, 0) has the bands high in time of (a, b), and none where a = b: a transform of both would leave what it rounds.
    moved = torch.stack((pairs[:, :, :, 0] - pairs[:, :, :, 1], torch.zeros_like(pairs[:, :, :, 0])), dim=3)
    return haar3d(moved.flatten(2, 3))[:, 4:].abs().flatten(1).mean(dim=1)


def still_clip(video: Tensor) -> Tensor:
    """The first frame of clips b c t h w, t times: a view."""
    return video[:, :, :1].expand(video.shape)


def motion_class(energy: Tensor, edges: Tensor) -> Tensor:
    """Which class of motion each energy (b,) is in, 0 to n, by the `edges` (n,) between them. A still clip is always in class 0."""
    return (energy[:, None] > edges).sum(dim=1)


def motion_edges(energies: Tensor, classes: int) -> Tensor:
    """The `classes` - 1 quantiles, float64, that divide these energies (n,) into classes of equal size."""
    shares = torch.arange(1, classes, dtype=torch.float64) / classes
    return torch.quantile(energies.double(), shares)
