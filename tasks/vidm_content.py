"""VIDM's content stage: an image model of first frames (spec, vidm.md section 4)."""

import functools

from torch import nn

from datasets.loader import ClipSource
from launch.env import Env
from models.unets.vidm_content import ContentUNet, ContentUNetConfig
from pipelines.vidm_loading import load_vidm_content
from tasks.clips import ClipInfo, open_clips
from tasks.latent import Denoiser, LatentTask
from tasks.starting import started
from tasks.vidm import ANCESTRAL, UNCONDITIONAL, UNTOLD, FrameSpace
from tasks.vidm_config import VIDMContentConfig


def build(config: VIDMContentConfig, env: Env) -> tuple[LatentTask, ClipSource, ClipSource | None]:
    """Task, first frames of the training clips and (with `data.val_path`) of the validation clips."""
    clips, source, valid = open_clips(config, config.data, env, latents=False, take="first")
    return content_task(config, clips), source, valid


def content_task(config: VIDMContentConfig, clips: ClipInfo) -> LatentTask:
    """The task for clips that are known. Raises ConfigError or UserError with one line for what does not fit."""
    size = config.network_size(image_size=clips.image_size)
    denoiser = Denoiser(size, functools.partial(_network, size, config.model.init_from))
    return LatentTask(config, clips, FrameSpace(clips.image_size), UNCONDITIONAL, denoiser, ANCESTRAL)


def _network(size: ContentUNetConfig, start: str) -> nn.Module:
    """The generator with fresh weights, or with those of a trained one."""
    network = ContentUNet(size)
    if not start:
        return network
    known = {name: getattr(size, name) for name in ("image_size", *UNTOLD)}
    return started(network, size, load_vidm_content(start, **known), start, free=("dropout",))
