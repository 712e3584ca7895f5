"""HVDM's autoencoder: a clip to a volume of latents and back (spec, hvdm.md sections 4 and 5). Its training: `tasks.clip_autoencoder`."""

import functools

from datasets.loader import ClipSource
from launch.env import Env
from models.autoencoders.hvdm import HVDMAutoencoder
from pipelines.hvdm_loading import load_hvdm_autoencoder
from tasks.clip_autoencoder import ClipAutoencoder, ClipAutoencoderTask
from tasks.clips import ClipInfo, open_clips
from tasks.hvdm_autoencoder_config import HVDMAutoencoderConfig


def hvdm_autoencoder_task(config: HVDMAutoencoderConfig, clips: ClipInfo) -> ClipAutoencoderTask:
    """The task for clips that are known. Raises ConfigError for sizes that cannot be."""
    model = config.model.of(clips)
    load = functools.partial(load_hvdm_autoencoder, plane_heads=model.plane_heads)
    return ClipAutoencoderTask(config, clips, ClipAutoencoder(model, HVDMAutoencoder, load, config.model.init_from))


def build(config: HVDMAutoencoderConfig, env: Env) -> tuple[ClipAutoencoderTask, ClipSource, ClipSource | None]:
    """Task, training clips and (with `data.val_path`) validation clips."""
    clips, source, valid = open_clips(config, config.data, env, latents=False)
    return hvdm_autoencoder_task(config, clips), source, valid
