"""Small generators of VIDM for tests: their settings, weights and inputs."""

from typing import Any

import torch
from torch import Tensor, nn

from models.unets.vidm_content import ContentUNet, ContentUNetConfig
from models.unets.vidm_motion import MotionUNet, MotionUNetConfig

SMALL: dict[str, Any] = {
    "image_size": (8, 12),
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_head_channels": 32,
}
MOTION: dict[str, Any] = SMALL | {"video_timesteps": 16}


def content(**changes: Any) -> ContentUNet:
    return randomised(ContentUNet(ContentUNetConfig(**SMALL | changes)))


def motion(**changes: Any) -> MotionUNet:
    return randomised(MotionUNet(MotionUNetConfig(**MOTION | changes)))


def randomised(module: nn.Module) -> Any:
    """Random weights everywhere: fresh ones give zeros."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.eval()


def pictures(count: int = 2, size: tuple[int, int] = (8, 12), kinds: int = 3) -> list[Tensor]:
    """Noisy, previous and first pictures (count, 3, *size), within [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(count, 3, *size, generator=generator) * 2 - 1 for _ in range(kinds)]


def times(count: int = 2) -> tuple[Tensor, Tensor]:
    """Steps and frame indices (count,)."""
    return torch.arange(count) * 300 + 7, torch.arange(count) * 5 + 1
