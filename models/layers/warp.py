"""Pictures moved along a flow (spec, vidm.md section 3.6)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def warp(picture: Tensor, flow: Tensor) -> Tensor:
    """(b, c, h, w) sampled where the flow (b, 2, h, w), in pixels, points: at (column + flow[0], row + flow[1]).

    Bilinear between pixels; beyond the edge, the edge.
    """
    h, w = picture.shape[2:]
    rows = torch.arange(h, device=flow.device, dtype=flow.dtype)[:, None]
    columns = torch.arange(w, device=flow.device, dtype=flow.dtype)
    x = 2 * (columns + flow[:, 0]) / max(w - 1, 1) - 1
    y = 2 * (rows + flow[:, 1]) / max(h - 1, 1) - 1
    return F.grid_sample(picture, torch.stack([x, y], dim=-1), mode="bilinear", padding_mode="border", align_corners=True)
