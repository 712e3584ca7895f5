"""One level of the orthonormal 3-D Haar transform: a clip <-> its eight subbands of half the size (spec, hvdm.md section 3).

A pair of neighbours (a, b) becomes L = (a + b) / sqrt 2 and H = (a - b) / sqrt 2 along each axis. The letters of a subband stand for time,
height and width. Splitting each axis into pairs turns the transform into one product with a symmetric 8 x 8 matrix, its own inverse.
"""

import torch
from einops import rearrange
from torch import Tensor

from models.layers.precision import without_autocast

BANDS = ("LLL", "LLH", "LHL", "LHH", "HLL", "HLH", "HHL", "HHH")
"""The subbands in their order; the last four are high in time."""


def haar3d(x: Tensor) -> Tensor:
    """(b, c, t, h, w) -> subbands (b, 8, c, t/2, h/2, w/2), in float32 at least and outside autocast: LLL reaches 2 sqrt 2 times the input.

    Raises ValueError naming the axis of odd length.
    """
    if x.dim() != 5:
        raise ValueError(f"the wavelet transform takes clips (b, c, t, h, w), not {tuple(x.shape)}")
    for axis, size in zip(("time", "height", "width"), x.shape[2:], strict=True):
        if size % 2 or not size:
            raise ValueError(f"the wavelet transform takes pairs along each axis: {axis} is {size} in {tuple(x.shape)}, not an even number")
    corners = rearrange(x, "b c (t i) (h j) (w k) -> b (i j k) (c t h w)", i=2, j=2, k=2)
    c, t, h, w = x.shape[1:]
    return _mix(corners).unflatten(2, (c, t // 2, h // 2, w // 2))


def inverse_haar3d(bands: Tensor) -> Tensor:
    """Subbands (b, 8, c, t, h, w) -> (b, c, 2t, 2h, 2w). Raises ValueError for another number of them."""
    if bands.dim() != 6 or bands.shape[1] != len(BANDS):
        raise ValueError(f"the inverse wavelet transform takes subbands (b, 8, c, t, h, w), not {tuple(bands.shape)}")
    c, t, h, w = bands.shape[2:]
    corners = _mix(bands.flatten(2)).unflatten(2, (c, t, h, w)).unflatten(1, (2, 2, 2))
    return rearrange(corners, "b i j k c t h w -> b c (t i) (h j) (w k)")


def _mix(corners: Tensor) -> Tensor:
    """(b, 8, n) -> (b, 8, n): the product with the matrix over axis 1."""
    # Training lets GPUs round float32 factors to TF32, ten bits; the transform is bound by memory, so double costs them little.
    exact = torch.promote_types(corners.dtype, torch.float64 if corners.is_cuda else torch.float32)
    with without_autocast(corners):
        matrix = _matrix(exact, corners.device).expand(len(corners), -1, -1)
        return torch.bmm(matrix, corners.to(exact)).to(torch.promote_types(corners.dtype, torch.float32))


def _matrix(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(8, 8), symmetric and orthogonal: the product of the three axes' pairs."""
    pair = torch.ones(2, 2, dtype=dtype, device=device)
    pair[1, 1] = -1
    return torch.kron(torch.kron(pair, pair), pair) * 8**-0.5
