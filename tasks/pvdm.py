"""PVDM's denoiser stage: what is its own beside `tasks.clip_denoiser` (spec, pvdm.md sections 3, 4 and 5.2)."""

from typing import Any

from torch import Tensor

from datasets.loader import ClipSource
from launch.env import Env
from models.autoencoders.pvdm import PVDMAEConfig
from models.layers.planes import split_planes
from models.transformers.plane_dit import PlaneDiT, PlaneDiTConfig
from models.unets.plane_unet import PlaneUNet, PlaneUNetConfig
from pipelines.loading import Loaded
from pipelines.pvdm_loading import load_pvdm_autoencoder, load_pvdm_denoiser
from tasks.clip_denoiser import build_stage, clip_task
from tasks.clip_latents import Told
from tasks.clip_opening import ClipSystem
from tasks.clips import ClipInfo
from tasks.latent import LatentTask
from tasks.pvdm_config import PVDMRunConfig


def build(config: PVDMRunConfig, env: Env) -> tuple[LatentTask, ClipSource, ClipSource | None]:
    """Task, training clips and (with `data.val_path`) validation clips."""
    return build_stage(PVDM, config, Told(config.cond_prob), env)


def pvdm_task(config: PVDMRunConfig, ae: Loaded | None, clips: ClipInfo, env: Env) -> LatentTask:
    """The task for clips that are known. Raises ConfigError or UserError with one line for what does not fit."""
    return clip_task(PVDM, config, Told(config.cond_prob), ae, clips, env)


def _content(latents: Tensor, config: PVDMAEConfig) -> Tensor:
    """Three channels of the content plane, a still b 3 1 h w."""
    content = split_planes(latents, config.plane_shapes)[0]
    return content[:, [min(k, content.shape[1] - 1) for k in range(3)], None]


def _denoiser(path: str, ae: PVDMAEConfig, wanted: Any) -> Loaded:
    return load_pvdm_denoiser(path, ae, num_heads=wanted.num_heads)


PVDM = ClipSystem(
    name="pvdm",
    title="PVDM",
    autoencoder=PVDMAEConfig,
    load_autoencoder=load_pvdm_autoencoder,
    load_denoiser=_denoiser,
    networks={PlaneUNetConfig: PlaneUNet, PlaneDiTConfig: PlaneDiT},
    picture=_content,
)
