"""Opens the latent space of a run whose autoencoder makes one latent tensor of a clip, and measures what nobody knows of it."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.config import open_shards, resolve
from datasets.loader import ClipSource
from engine.task import Batch
from launch.env import Env
from models.layers.motion import motion_edges
from pipelines.loading import Loaded
from tasks.clip_config import ClipRunConfig
from tasks.clip_latents import ClipAEConfig, ClipSpace, Told, first_channels
from tasks.clips import ClipInfo, StoredLatents
from tasks.first_stage import check_same_autoencoder, on_main, unit_variance
from utils.config import from_dict, to_dict
from utils.errors import ConfigError
from utils.rng import SampleRng

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipSystem:
    """What is a system's own in its denoiser stage."""

    name: str
    """As in settings and cards."""
    title: str
    """As people write it, and with its article."""
    autoencoder: type[Any]
    """Config class of its autoencoder."""
    load_autoencoder: Callable[[str, Any], Loaded]
    """Path and weights (ema, model) -> autoencoder."""
    load_denoiser: Callable[[str, Any, Any], Loaded]
    """Path, the autoencoder's config and the run's of the network -> a trained denoiser."""
    networks: Mapping[type[Any], Callable[[Any], Any]]
    """Config class -> network."""
    picture: Callable[[Tensor, Any], Tensor] = first_channels
    """Latents and the autoencoder's config -> clips b 3 t h w to look at where there is nothing to decode with."""

    @property
    def no_autoencoder(self) -> str:
        """What to say where one is needed."""
        article = "an" if self.title.startswith("H") else "a"
        return f"which autoencoder? give --ae RUN ({article} {self.title} autoencoder of train_ae.py) or its released model_last.pth"


def open_autoencoder(system: ClipSystem, config: ClipRunConfig) -> Loaded | None:
    """The autoencoder that the settings name. Raises UserError when it cannot be read."""
    return system.load_autoencoder(config.ae.path, config.ae.weights) if config.ae.path else None


def open_clip_space(system: ClipSystem, config: ClipRunConfig, told: Told, ae: Loaded | None, clips: ClipInfo, env: Env) -> ClipSpace:
    """The space of a run, its autoencoder checked against the clips. ConfigError or UserError with one line when they do not fit.

    `config.data` is that of the stream, resolved as far as the first clips of it must be read again to measure them.
    """
    if clips.latents is None and ae is None:
        raise ConfigError(system.no_autoencoder)
    autoencoder = {} if ae is None else _identity(ae)
    if clips.latents is not None:
        model = check_latents(system, clips.latents, autoencoder)
        autoencoder = autoencoder or {name: clips.latents.autoencoder.get(name) for name in ("sha256", "weights", "path", "model")}
    else:
        assert ae is not None
        model = ae.config
        _check_clips(config.ae.path, model, clips)
    _check_told(told, clips)
    space = ClipSpace(ae, autoencoder, model, told, picture=system.picture, scale=config.latent.scale, shift=config.latent.shift)
    if not config.latent.scale:
        space.scale, space.shift = on_main(env, partial(measure, config, space, env))
    return space


def check_latents(system: ClipSystem, stored: StoredLatents, autoencoder: Mapping[str, Any]) -> ClipAEConfig:
    """The autoencoder that the latents in shards were made by. ConfigError when it is none of the system, or not the one given (if one)."""
    where, made_by = f"--data-path {stored.location}", stored.autoencoder
    if made_by.get("system") != system.name or "model" not in made_by:
        raise ConfigError(
            f"{where} holds latents of the system '{made_by.get('system')}'; "
            f"this stage takes those of {system.title}'s autoencoder: run preprocess.py latents with one"
        )
    if autoencoder:
        check_same_autoencoder(stored.location, made_by, autoencoder)
    model: ClipAEConfig = from_dict(system.autoencoder, made_by["model"], f"{stored.location}: autoencoder")
    wanted = {"latent": model.latent_shape, "still": model.latent_shape, "dynamics": (1,)}
    wanted |= {"previous": model.latent_shape, "previous_still": model.latent_shape, "previous_dynamics": (1,)}
    if "latent" not in stored.tensors or any(shape != wanted.get(name) for name, shape in stored.tensors.items()):
        told = "x".join(map(str, model.latent_shape))
        raise ConfigError(f"{where} holds {dict(stored.tensors)}, not latents of {told}: run preprocess.py latents again")
    return model


def _check_told(told: Told, clips: ClipInfo) -> None:
    """Raises ConfigError where the clips lack what the denoiser is to be told of."""
    held = None if clips.latents is None else clips.latents.tensors
    if told.cond_prob and not (clips.previous or (held is not None and "previous" in held)):
        raise ConfigError(
            f"--cond-prob {told.cond_prob:g}: {clips.dataset} holds single clips, nothing goes on after another; prepare longer ones "
            "and give preprocess.py latents --pairs, or train on single clips with --cond-prob 0"
        )
    for wanted, name, flag, again in (
        (told.img_prob > 0, "still", f"--img-prob {told.img_prob:g}", "run preprocess.py latents --stills, or give --img-prob 0"),
        (told.dynamics is not None, "dynamics", "--dynamics-bins", "run preprocess.py latents again, or give --dynamics-bins 0"),
    ):
        if wanted and held is not None and name not in held:
            raise ConfigError(f"{flag}: {clips.dataset} holds no latents '{name}'; {again}")


def _identity(ae: Loaded) -> dict[str, Any]:
    """What ties an export to its autoencoder: plain values."""
    return {"sha256": ae.sha256, "weights": ae.weights, "path": str(Path(ae.path).absolute()), "model": to_dict(ae.config)}


def _check_clips(path: str, model: ClipAEConfig, clips: ClipInfo) -> None:
    takes, given = (model.clip_frames, *model.image_size), (clips.n_frames, *clips.image_size)
    if takes != given:
        wanted, found = ("x".join(map(str, shape)) for shape in (takes, given))
        raise ConfigError(f"--ae {path} takes clips of {wanted} (frames x height x width), these are {found}")


@torch.no_grad()
def measure(config: ClipRunConfig, space: ClipSpace, env: Env) -> tuple[float, float]:
    """1 / std and mean of the latents of the first clips of the stream."""
    plain = ClipSpace(space.ae, space.autoencoder, space.config)
    networks = {} if space.ae is None else {"ae": space.ae.module.to(env.device)}
    number, total, square = 0, 0.0, 0.0
    for batch, rng in _first_clips(config, env, config.latent.measure_clips):
        latents = plain.latents(networks, batch, rng)[0].double()
        number, total, square = number + latents.numel(), total + float(latents.sum()), square + float(latents.square().sum())
    scale, shift = unit_variance(total / number, square / number)
    _log.info("latents have mean %.4g and standard deviation %.4g, measured on %d numbers", shift, 1 / scale, number)
    return scale, shift


@torch.no_grad()
def measure_motion(config: ClipRunConfig, space: ClipSpace, clips: int, classes: int, env: Env) -> tuple[float, ...]:
    """The edges between so many classes of motion of equal size, of the first `clips` clips of the stream."""
    stream = _first_clips(config, env, clips, config.data.num_workers)
    energies = torch.cat([space.energy(batch, rng).double().cpu() for batch, rng in stream])
    edges = tuple(motion_edges(energies, classes).tolist())
    if edges[0] == edges[-1]:
        _log.warning("all %d clips that were measured have the same motion, %.4g: its classes say nothing", len(energies), edges[0])
    _log.info(
        "motion of %d clips: %.4g to %.4g, classes between %s",
        len(energies),
        float(energies.min()),
        float(energies.max()),
        " ".join(f"{edge:.4g}" for edge in edges),
    )
    return edges


def _first_clips(config: ClipRunConfig, env: Env, count: int, workers: int = 0) -> Iterator[tuple[Batch, SampleRng]]:
    """(batch, its draws) of the first clips of the stream, one by one."""
    data = replace(config.data, flip=False, num_workers=workers)
    shards = open_shards(data)
    source = ClipSource(shards, resolve(data, shards), seed=config.train.seed, global_batch_size=1, strides=config.strides)
    for _, batch in zip(range(min(count, shards.num_samples)), source.batches(0), strict=False):
        here = {name: value if name == "index" else value.to(env.device) for name, value in batch.items()}
        yield here, SampleRng(config.train.seed, batch["index"], env.device)
