"""How much motion there is in a clip: one number that a denoiser can be told, and samples be measured by (spec, hvdm.md section 8)."""

import torch
from torch import Tensor


def motion_energy(video: Tensor) -> Tensor:
    """Clips b c t h w in [-1, 1] -> (b,) float32: mean |coefficient| of the four Haar subbands that are high in time
    (`models.layers.wavelet`).

    Exactly 0 for a still clip, which a product with the transform's matrix would leave its rounding; grows in proportion to the contrast.
    Raises ValueError for odd sizes.
    """
    if any(size % 2 for size in video.shape[2:]):
        raise ValueError(f"motion is that of pairs of frames, rows and columns: sizes {tuple(video.shape[2:])} are not all even")
    _, moved = _pairs(video.float(), 2)
    bands = [band for rows in _pairs(moved, 3) for band in _pairs(rows, 4)]
    return torch.stack([band.abs().flatten(1).mean(dim=1) for band in bands]).mean(dim=0) * 8**-0.5


def _pairs(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Sums and differences of neighbours along an axis."""
    first, second = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return first + second, first - second


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
