"""The denoiser stage of systems whose autoencoder makes one latent tensor of a clip: its stream, its task and its network."""

import dataclasses
import functools
from typing import Any

from torch import nn

from datasets.loader import ClipSource
from launch.env import Env
from pipelines.loading import Loaded
from pipelines.sampling import Sampling
from tasks.clip_config import ClipRunConfig
from tasks.clip_latents import ClipAEConfig, Told
from tasks.clip_opening import ClipSystem, open_autoencoder, open_clip_space
from tasks.clips import ClipInfo, check_held_out, open_clips
from tasks.diffusion_task import Condition
from tasks.latent import Denoiser, LatentTask
from tasks.starting import started
from utils.errors import ConfigError

TABLES = ("tasks", "dynamics_bins", "strides")
"""Settings of a network that only add to it what starts at zero: it may start from one without."""
FREE = ("dropout", "class_dropout_prob", "out_channels")
"""Those that change no weights."""


def open_stream(system: ClipSystem, config: ClipRunConfig, ae: Loaded | None, env: Env) -> tuple[ClipInfo, ClipSource, ClipSource | None]:
    """The training clips and (with `data.val_path`) the validation clips.

    Clips have as many frames as the autoencoder takes, and where samples go on after another clip, as many before them.
    """
    frames = config.data.n_frames or (ae.config.clip_frames if ae is not None else 0)
    data, lacking = dataclasses.replace(config.data, n_frames=frames), system.no_autoencoder if ae is None else ""
    clips, source, valid = open_clips(config, data, env, pairs=config.cond_prob > 0, strides=config.strides, no_pixels=lacking)
    check_held_out(clips, valid, labels=config.condition.num_classes != 0, vectors=False)
    if clips.previous and config.cond_prob:
        _check_lengths(config, source, clips.n_frames)
    return clips, source, valid


def _check_lengths(config: ClipRunConfig, source: ClipSource, frames: int) -> None:
    """Raises ConfigError where no clip has frames before it, so that nothing could be learnt of going on."""
    needed = (2 * frames - 1) * min(config.strides, default=source.data.frame_interval) + 1
    longest = int(source.shards.frames.max())
    if longest < needed:
        raise ConfigError(
            f"--cond-prob {config.cond_prob:g}: the clips of {source.shards.location} have at most {longest} frames, a clip and the one "
            f"before it take {needed}; prepare them with --clip-length {needed} (or video), or train on single clips with --cond-prob 0"
        )


def clip_task(system: ClipSystem, config: ClipRunConfig, told: Told, ae: Loaded | None, clips: ClipInfo, env: Env) -> LatentTask:
    """The task for clips that are known. Raises ConfigError or UserError with one line for what does not fit."""
    space = open_clip_space(system, config, told, ae, clips, env)
    condition = Condition.of(config.condition, clips)
    known = {name: value for name, value in condition.overrides().items() if name != "cond_dim"}
    first = space.config
    model = config.denoiser_size(latent_res=first.grid, latent_frames=first.clip_frames, in_channels=first.embed_dim, **known)
    denoiser = Denoiser(model, functools.partial(_network, system, model, config.model.init_from, first))
    return LatentTask(config, clips, space, condition, denoiser, _preview_sampling(config))


def build_stage(system: ClipSystem, config: ClipRunConfig, told: Told, env: Env) -> tuple[LatentTask, ClipSource, ClipSource | None]:
    """Task, training clips and (with `data.val_path`) validation clips."""
    ae = open_autoencoder(system, config)
    clips, source, valid = open_stream(system, config, ae, env)
    return clip_task(system, dataclasses.replace(config, data=source.data), told, ae, clips, env), source, valid


def _preview_sampling(config: ClipRunConfig) -> Sampling:
    """As the releases sample: latents are bounded by tanh, so estimates of clean ones are kept in [-1, 1] where they are not rescaled."""
    bounded = config.latent.scale == 1 and config.latent.shift == 0
    if config.diffusion.process == "flow":
        return Sampling(clip=bounded)
    return Sampling(eta=1.0, clip=bounded, keep_eps=bounded)


def _network(system: ClipSystem, config: Any, start: str, first: ClipAEConfig) -> nn.Module:
    """The denoiser with fresh weights, or with those of a trained one of the same sizes."""
    network = system.networks[type(config)](config)
    if not start:
        return network
    return started(network, config, system.load_denoiser(start, first, config), start, free=FREE, may_lack=TABLES)
