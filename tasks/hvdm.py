"""HVDM's denoiser stage: what is its own beside `tasks.clip_denoiser` (spec, hvdm.md sections 6 and 8)."""

import dataclasses
import functools
from typing import Any

from datasets.loader import ClipSource
from launch.env import Env
from models.autoencoders.hvdm import HVDMAEConfig
from models.transformers.volume_dit import VolumeDiT, VolumeDiTConfig
from models.unets.volume_unet import VolumeUNet, VolumeUNetConfig
from pipelines.hvdm_loading import load_hvdm_autoencoder, load_hvdm_denoiser
from pipelines.loading import Loaded
from tasks.clip_denoiser import build_stage, clip_task
from tasks.clip_latents import ClipSpace, Told
from tasks.clip_opening import ClipSystem, measure_motion
from tasks.clips import ClipInfo
from tasks.dynamics import Dynamics
from tasks.first_stage import on_main
from tasks.hvdm_config import HVDMRunConfig
from tasks.latent import LatentTask


def build(config: HVDMRunConfig, env: Env) -> tuple[LatentTask, ClipSource, ClipSource | None]:
    """Task, training clips and (with `data.val_path`) validation clips. The task measures motion where the denoiser is told of it."""
    task, source, valid = build_stage(HVDM, config, told_of(config), env)
    space, seen = task.space, dataclasses.replace(config, data=source.data)
    assert isinstance(space, ClipSpace)
    dynamics = space.told.dynamics
    if dynamics is not None:
        task.measures.append(functools.partial(_measure_edges, dynamics, seen, space, env))
    return task, source, valid


def _measure_edges(dynamics: Dynamics, config: HVDMRunConfig, space: ClipSpace, env: Env) -> None:
    """Gives the classes of motion their edges, on every rank."""
    dynamics.edges = on_main(env, functools.partial(measure_motion, config, space, config.dynamics.measure_clips, dynamics.bins, env))


def hvdm_task(config: HVDMRunConfig, ae: Loaded | None, clips: ClipInfo, env: Env) -> LatentTask:
    """The task for clips that are known. Raises ConfigError or UserError with one line for what does not fit."""
    return clip_task(HVDM, config, told_of(config), ae, clips, env)


def told_of(config: HVDMRunConfig) -> Told:
    """What the settings have the denoiser told of."""
    bins = config.model.dynamics_bins
    dynamics = Dynamics(bins, config.dynamics.dropout) if bins else None
    strides, dropout = len(config.frame_strides), config.dynamics.dropout
    return Told(config.cond_prob, config.img_prob, config.model.tasks, dynamics, strides, dropout if strides else 0.0)


def _denoiser(path: str, ae: HVDMAEConfig, wanted: Any) -> Loaded:
    return load_hvdm_denoiser(path, ae)


HVDM = ClipSystem(
    name="hvdm",
    title="HVDM",
    autoencoder=HVDMAEConfig,
    load_autoencoder=load_hvdm_autoencoder,
    load_denoiser=_denoiser,
    networks={VolumeUNetConfig: VolumeUNet, VolumeDiTConfig: VolumeDiT},
)
