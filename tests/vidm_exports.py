"""A tiny family of VIDM exports with random weights, for tests of what comes after training."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion import DiffusionConfig
from models.unets.vidm_content import ContentUNet, ContentUNetConfig
from models.unets.vidm_motion import MotionUNet, MotionUNetConfig
from utils.config import to_dict
from utils.weights import write_export

SIZES: dict[str, Any] = {
    "image_size": (8, 12),
    "model_channels": 32,
    "channel_mult": (1, 1),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_head_channels": 16,
}
"""Not square, two levels, attention at the lower one."""
CONTENT = ContentUNetConfig(**SIZES)
MOTION = MotionUNetConfig(**SIZES, diffusion_timesteps=40, video_timesteps=6)
PROCESS = DiffusionConfig(steps=40)
DATA = {"dataset": "toy", "digest": "0", "n_frames": 6, "image_size": [8, 12], "fps": 10.0}


def alive(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights where a network starts with zeros, so that every part of it counts."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05, generator=generator)
    return module


def content_network(config: ContentUNetConfig = CONTENT, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return alive(ContentUNet(config), seed)


def motion_network(config: MotionUNetConfig = MOTION, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return alive(MotionUNet(config), seed)


def export_network(run: Path, network: nn.Module, stage: str, process: DiffusionConfig = PROCESS, **card: Any) -> Path:
    """A run folder with the export of a generator."""
    told = {"system": "vidm", "stage": stage, "model": to_dict(network.config), "diffusion": to_dict(process), "data": DATA}
    write_export(run / "export", {"model": network.state_dict()}, told | card)
    return run


def family(root: Path, process: DiffusionConfig = PROCESS, motion: MotionUNetConfig = MOTION, **card: Any) -> dict[str, Path]:
    """The runs of both stages below `root`."""
    return {
        "content": export_network(root / "000-vidm-content", content_network(), "content", process, **card),
        "motion": export_network(root / "001-vidm-motion", motion_network(motion), "motion", process, **card),
    }
