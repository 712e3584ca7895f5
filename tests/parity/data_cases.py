"""What the checks of the systems' data share: a release's crop and resize, and lists of frame numbers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datasets.transforms import RELEASES, resize_clip


def resize_settings(release: str) -> dict[str, Any]:
    """Arguments of resize_clip for a release."""
    settings = RELEASES[release]
    return {"mode": settings["resize"], "antialias": settings["antialias"], "centre": settings["centre"]}


def resized(frames: Tensor, size: tuple[int, int], release: str) -> Tensor:
    """t c h w in any type -> t c H W as a release does it; uint8 stays uint8."""
    x = frames if frames.dtype == torch.uint8 else frames.float()
    return torch.from_numpy(resize_clip(x.permute(0, 2, 3, 1).numpy(), size, **resize_settings(release))).permute(0, 3, 1, 2)


def numbers(values: Sequence[int]) -> Tensor:
    """Frame numbers as the files hold them."""
    return torch.tensor(list(values), dtype=torch.int64)
