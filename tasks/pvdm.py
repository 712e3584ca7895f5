"""PVDM's denoiser stage: what is its own beside `tasks.latent` (spec, pvdm.md sections 3, 4 and 5.2)."""

import dataclasses
import functools

from torch import nn

from datasets.loader import ClipSource
from launch.env import Env
from models.autoencoders.pvdm import PVDMAEConfig
from models.transformers.plane_dit import PlaneDiT, PlaneDiTConfig
from models.unets.plane_unet import PlaneUNet, PlaneUNetConfig
from pipelines.loading import Loaded
from pipelines.pvdm_loading import load_pvdm_denoiser
from pipelines.sampling import Sampling
from tasks.clips import ClipInfo, check_held_out, open_clips
from tasks.diffusion_task import Condition
from tasks.latent import Denoiser, LatentTask
from tasks.plane_latents import NO_AUTOENCODER, open_autoencoder, open_plane_space
from tasks.pvdm_config import PVDMRunConfig, denoiser_size
from utils.errors import ConfigError, UserError


def build(config: PVDMRunConfig, env: Env) -> tuple[LatentTask, ClipSource, ClipSource | None]:
    """Task, training clips and (with `data.val_path`) validation clips.

    Clips have as many frames as the autoencoder takes, and where samples go on after another clip, as many before them.
    """
    ae = open_autoencoder(config)
    frames = config.data.n_frames or (ae.config.clip_frames if ae is not None else 0)
    data, lacking = dataclasses.replace(config.data, n_frames=frames), NO_AUTOENCODER if ae is None else ""
    clips, source, valid = open_clips(config, data, env, pairs=config.cond_prob > 0, no_pixels=lacking)
    check_held_out(clips, valid, labels=config.condition.num_classes != 0, vectors=False)
    if clips.previous and config.cond_prob:
        _check_lengths(config, source, clips.n_frames)
    return pvdm_task(dataclasses.replace(config, data=source.data), ae, clips, env), source, valid


def _check_lengths(config: PVDMRunConfig, source: ClipSource, frames: int) -> None:
    """Raises ConfigError where no clip has frames before it, so that nothing could be learnt of going on."""
    needed = (2 * frames - 1) * source.data.frame_interval + 1
    longest = int(source.shards.frames.max())
    if longest < needed:
        raise ConfigError(
            f"--cond-prob {config.cond_prob:g}: the clips of {source.shards.location} have at most {longest} frames, a clip and the one "
            f"before it take {needed}; prepare them with --clip-length {needed} (or video), or train on single clips with --cond-prob 0"
        )


def pvdm_task(config: PVDMRunConfig, ae: Loaded | None, clips: ClipInfo, env: Env) -> LatentTask:
    """The task for clips that are known. Raises ConfigError or UserError with one line for what does not fit."""
    space = open_plane_space(config, ae, clips, env)
    condition = Condition.of(config.condition, clips)
    known = {name: value for name, value in condition.overrides().items() if name != "cond_dim"}
    planes = space.planes
    model = denoiser_size(config, latent_res=planes.grid, latent_frames=planes.clip_frames, in_channels=planes.embed_dim, **known)
    denoiser = Denoiser(model, functools.partial(_network, model, config.model.init_from, planes))
    return LatentTask(config, clips, space, condition, denoiser, _preview_sampling(config))


def _preview_sampling(config: PVDMRunConfig) -> Sampling:
    """As the release samples: planes are bounded by tanh, so estimates of clean ones are kept in [-1, 1] where they are not rescaled."""
    bounded = config.latent.scale == 1 and config.latent.shift == 0
    if config.diffusion.process == "flow":
        return Sampling(clip=bounded)
    return Sampling(eta=1.0, clip=bounded, keep_eps=bounded)


def _network(config: PlaneUNetConfig | PlaneDiTConfig, start: str, planes: PVDMAEConfig) -> nn.Module:
    """The denoiser with fresh weights, or with those of a trained one of the same sizes."""
    network = PlaneUNet(config) if isinstance(config, PlaneUNetConfig) else PlaneDiT(config)
    if not start:
        return network
    loaded = load_pvdm_denoiser(start, planes, num_heads=config.num_heads)
    if type(loaded.module) is not type(network):
        kinds = type(loaded.module).__name__, type(network).__name__
        raise UserError(f"--init-from {start} cannot start this run: it is a {kinds[0]}, the run trains a {kinds[1]}")
    for field in dataclasses.fields(config):
        theirs, ours = getattr(loaded.config, field.name), getattr(config, field.name)
        if theirs != ours and field.name not in ("dropout", "class_dropout_prob", "out_channels"):
            raise UserError(f"--init-from {start} cannot start this run: its {field.name} is {theirs}, that of the run {ours}")
    device = next(network.parameters()).device  # a dry run builds it on the meta device
    try:
        network.load_state_dict({name: value.to(device) for name, value in loaded.module.state_dict().items()})
    except RuntimeError as error:
        raise UserError(f"--init-from {start} cannot start this run: {str(error).splitlines()[-1].strip()}") from None
    return network
