"""Small denoisers of latent volumes for tests: their settings, weights and inputs."""

from typing import Any

import torch
from torch import Tensor, nn

from models.transformers.volume_dit import VolumeDiT, VolumeDiTConfig
from models.unets.volume_unet import VolumeUNet, VolumeUNetConfig

UNET: dict[str, Any] = {"latent_res": (4, 6), "latent_frames": 3, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
DIT: dict[str, Any] = {"latent_res": (4, 6), "latent_frames": 3, "hidden_size": 32, "depth": 2, "num_heads": 2}
TABLES: dict[str, Any] = {"tasks": True, "dynamics_bins": 10, "strides": 3}


def unet(**changes: Any) -> VolumeUNet:
    return _randomised(VolumeUNet(VolumeUNetConfig(**UNET | changes)))


def dit(**changes: Any) -> VolumeDiT:
    return _randomised(VolumeDiT(VolumeDiTConfig(**DIT | changes)))


def latents(config: VolumeUNetConfig | VolumeDiTConfig, count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, steps, latents before."""
    generator = torch.Generator().manual_seed(0)
    x, previous = (torch.randn(count, *config.latent_shape, generator=generator) for _ in range(2))
    return x, torch.arange(count) * 300 + 7, previous


def _randomised(module: nn.Module) -> Any:
    """Random weights everywhere: fresh ones give zeros."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.eval()
