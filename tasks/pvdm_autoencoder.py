"""PVDM's autoencoder: a clip to three planes of latents and back (spec, pvdm.md section 2). Its training: `tasks.clip_autoencoder`."""

import functools

from datasets.loader import ClipSource
from launch.env import Env
from models.autoencoders.pvdm import PVDMAutoencoder
from pipelines.pvdm_loading import load_pvdm_autoencoder
from tasks.clip_autoencoder import ClipAutoencoder, ClipAutoencoderTask
from tasks.clips import ClipInfo, open_clips
from tasks.pvdm_autoencoder_config import PVDMAutoencoderConfig


def pvdm_autoencoder_task(config: PVDMAutoencoderConfig, clips: ClipInfo) -> ClipAutoencoderTask:
    """The task for clips that are known. Raises ConfigError for sizes that cannot be."""
    model = config.model.of(clips)
    load = functools.partial(load_pvdm_autoencoder, splits=model.splits, plane_heads=model.plane_heads)
    return ClipAutoencoderTask(config, clips, ClipAutoencoder(model, PVDMAutoencoder, load, config.model.init_from))


def build(config: PVDMAutoencoderConfig, env: Env) -> tuple[ClipAutoencoderTask, ClipSource, ClipSource | None]:
    """Task, training clips and (with `data.val_path`) validation clips."""
    clips, source, valid = open_clips(config, config.data, env, latents=False)
    return pvdm_autoencoder_task(config, clips), source, valid
