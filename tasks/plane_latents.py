"""The space of PVDM's autoencoder: latents of clips and of those before them, encoded as training goes or read from shards
(spec, pvdm.md section 5.2).

Letters: b samples, S frames of a clip, e channels and L positions of its latent.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.config import open_shards, resolve
from datasets.loader import ClipSource
from engine.task import Batch, Network
from launch.env import Env
from models.autoencoders.pvdm import PVDMAEConfig
from models.layers.planes import split_planes
from pipelines.loading import Loaded
from pipelines.pvdm_loading import load_pvdm_autoencoder
from tasks.clips import ClipInfo, Networks, StoredLatents, units
from tasks.first_stage import TiedLatents, check_same_autoencoder, on_main, unit_variance
from tasks.pvdm_config import PVDMRunConfig
from utils.config import from_dict, to_dict
from utils.errors import ConfigError
from utils.media import to_float
from utils.rng import SampleRng

NO_AUTOENCODER = "which autoencoder? give --ae RUN (a PVDM autoencoder of train_ae.py) or its released model_last.pth"

_log = logging.getLogger(__name__)


class PlaneSpace(TiedLatents):
    """Latents b e L, (planes - shift) * scale. A share of the samples go on after the clip before them, whose latent is the condition."""

    def __init__(
        self,
        ae: Loaded | None,
        autoencoder: Mapping[str, Any],
        planes: PVDMAEConfig,
        *,
        cond_prob: float = 0.0,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        """`planes`: of the autoencoder, which may itself be missing where the shards hold its latents."""
        super().__init__(autoencoder, scale, shift)
        self.ae = ae
        self.planes = planes
        self.cond_prob = cond_prob
        self.shape = (planes.embed_dim, planes.latent_size)

    def networks(self) -> dict[str, Network]:
        """The autoencoder, where there are pixels to encode or somebody gave it for previews."""
        return {} if self.ae is None else {"ae": Network(self.ae.module, "frozen", units=units, methods=("encode", "decode"))}

    @torch.no_grad()
    def latents(self, networks: Networks, batch: Batch, rng: SampleRng) -> tuple[Tensor, dict[str, Tensor]]:
        """The latents to learn, and as `previous` those of the clips before them: zeros where a sample is told of none.

        Each sample draws for itself whether it goes on after another clip. If so, its clip is the second half of what the stream gives;
        if not, any S frames of that, of a set of latents either half. Nothing is given as `previous` where no sample goes on.
        """
        host = SampleRng(rng.seed, rng.index)  # known here, so that only what is needed is encoded
        goes_on = host.uniform("previous") < self.cond_prob
        if "video" not in batch:
            target, previous = self._stored(batch, goes_on, rng)
        elif "has_previous" not in batch:
            target, previous = networks["ae"].encode(to_float(batch["video"])), None
        else:
            start = rng.integers("window", self.planes.clip_frames + 1)
            target, previous = self.encoded(networks["ae"].encode, batch["video"], batch["has_previous"], goes_on, start)
        # The loss must not inherit the precision of the autoencoder's arithmetic.
        return self._normalised(target), {} if previous is None or not self.cond_prob else {"previous": previous}

    def encoded(self, encode: Any, video: Tensor, has_previous: Tensor, goes_on: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Latents b e L of windows of `video` b 3 2S h w uint8, and normalised ones of the clips before them, exact zeros for none.

        `goes_on` (b,) on the CPU: whether a sample is the second half, told of the first; else its window begins at frame `start`.
        Without a previous clip (`has_previous`, on the device as `start`) the first half is padding: no window reaches into it.
        """
        frames, device = self.planes.clip_frames, video.device
        second = has_previous & ~_on(goes_on, device)
        target = encode(to_float(_windows(video, torch.where(second, start, frames), frames)))
        previous = torch.zeros(target.shape, device=device)
        # One by one: how many there are differs from batch to batch, and compiled units would be compiled anew for each number.
        for row in goes_on.nonzero().flatten().tolist():
            found = self._normalised(encode(to_float(video[row : row + 1, :, :frames])))
            previous[row] = found[0] * has_previous[row]
        return target, previous

    def _stored(self, batch: Batch, goes_on: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor | None]:
        """As `encoded`, of latents in shards."""
        if "previous" not in batch:
            return batch["latent"], None
        told = _on(goes_on, batch["latent"].device)[:, None, None]
        first = rng.integers("window", 2)[:, None, None] == 0
        target = torch.where(first & ~told, batch["previous"], batch["latent"])
        return target, self._normalised(batch["previous"]) * told

    def _normalised(self, latents: Tensor) -> Tensor:
        return (latents.float() - self.shift) * self.scale

    def after(self, latents: Tensor) -> dict[str, Tensor] | None:
        """The latents as the clips before the next ones."""
        return {"previous": latents} if self.cond_prob else None

    def card(self) -> dict[str, Any]:
        """As of any latents, and whether the denoiser learns to go on."""
        return {**super().card(), "cond_prob": self.cond_prob}

    @torch.no_grad()
    def show(self, networks: Networks, latents: Tensor) -> Tensor:
        """Decoded, b 3 S h w; without an autoencoder three channels of the content plane, a still."""
        found = latents.float() / self.scale + self.shift
        if "ae" in networks:
            return networks["ae"].decode(found).float()
        content = split_planes(found, self.planes.plane_shapes)[0]
        return content[:, [min(k, content.shape[1] - 1) for k in range(3)], None]


def _on(value: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, without waiting for it."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def _windows(video: Tensor, start: Tensor, frames: int) -> Tensor:
    """`frames` frames of each clip b c t h w, from frame `start` (b,) on."""
    places = start[:, None] + torch.arange(frames, device=video.device)
    rows = torch.arange(len(video), device=video.device)[:, None]
    return video.transpose(1, 2)[rows, places].transpose(1, 2)


def open_autoencoder(config: PVDMRunConfig) -> Loaded | None:
    """The autoencoder that the settings name. Raises UserError when it cannot be read."""
    return load_pvdm_autoencoder(config.ae.path, config.ae.weights) if config.ae.path else None


def open_plane_space(config: PVDMRunConfig, ae: Loaded | None, clips: ClipInfo, env: Env) -> PlaneSpace:
    """The space of a run, its autoencoder checked against the clips. ConfigError or UserError with one line when they do not fit.

    `config.data` is that of the stream, resolved as far as the first clips of it must be read again to measure a scale.
    """
    if clips.latents is None and ae is None:
        raise ConfigError(NO_AUTOENCODER)
    autoencoder = {} if ae is None else _identity(ae)
    if clips.latents is not None:
        planes = check_latents(clips.latents, autoencoder)
        autoencoder = autoencoder or {name: clips.latents.autoencoder.get(name) for name in ("sha256", "weights", "path", "model")}
    else:
        assert ae is not None
        planes = ae.config
        _check_clips(config.ae.path, planes, clips)
    pairs = clips.previous or (clips.latents is not None and "previous" in clips.latents.tensors)
    if config.cond_prob and not pairs:
        raise ConfigError(
            f"--cond-prob {config.cond_prob:g}: {clips.dataset} holds single clips, nothing goes on after another; prepare longer ones "
            "and give preprocess.py latents --pairs, or train on single clips with --cond-prob 0"
        )
    space = PlaneSpace(ae, autoencoder, planes, cond_prob=config.cond_prob, scale=config.latent.scale, shift=config.latent.shift)
    if not config.latent.scale:
        space.scale, space.shift = on_main(env, partial(measure, config, space, env))
    return space


def check_latents(stored: StoredLatents, autoencoder: Mapping[str, Any]) -> PVDMAEConfig:
    """The autoencoder that the latents in shards were made by. ConfigError when it is no PVDM's, or not the one given (if one is)."""
    where, made_by = f"--data-path {stored.location}", stored.autoencoder
    if made_by.get("system") != "pvdm" or "model" not in made_by:
        raise ConfigError(
            f"{where} holds latents of the system '{made_by.get('system')}'; "
            "this stage takes those of PVDM's autoencoder: run preprocess.py latents with one"
        )
    if autoencoder:
        check_same_autoencoder(stored.location, made_by, autoencoder)
    planes = from_dict(PVDMAEConfig, made_by["model"], f"{stored.location}: autoencoder")
    wanted = (planes.embed_dim, planes.latent_size)
    if "latent" not in stored.tensors or stored.tensors.keys() - {"previous", "latent"} or set(stored.tensors.values()) != {wanted}:
        raise ConfigError(f"{where} holds {dict(stored.tensors)}, not latents of {wanted[0]}x{wanted[1]}: run preprocess.py latents again")
    return planes


def _identity(ae: Loaded) -> dict[str, Any]:
    """What ties an export to its autoencoder: plain values."""
    return {"sha256": ae.sha256, "weights": ae.weights, "path": str(Path(ae.path).absolute()), "model": to_dict(ae.config)}


def _check_clips(path: str, planes: PVDMAEConfig, clips: ClipInfo) -> None:
    takes, given = (planes.clip_frames, *planes.image_size), (clips.n_frames, *clips.image_size)
    if takes != given:
        wanted, found = ("x".join(map(str, shape)) for shape in (takes, given))
        raise ConfigError(f"--ae {path} takes clips of {wanted} (frames x height x width), these are {found}")


@torch.no_grad()
def measure(config: PVDMRunConfig, space: PlaneSpace, env: Env) -> tuple[float, float]:
    """1 / std and mean of the latents of the first clips of the stream."""
    data = replace(config.data, flip=False, num_workers=0, weights=())
    shards = open_shards(data)
    source = ClipSource(shards, resolve(data, shards), seed=config.train.seed, global_batch_size=1, accumulation=1, rank=0, world_size=1)
    plain = PlaneSpace(space.ae, space.autoencoder, space.planes)
    networks = {} if space.ae is None else {"ae": space.ae.module.to(env.device)}
    number, total, square = 0, 0.0, 0.0
    for _, batch in zip(range(min(config.latent.measure_clips, shards.num_samples)), source.batches(0), strict=False):
        here = {name: value if name == "index" else value.to(env.device) for name, value in batch.items()}
        latents = plain.latents(networks, here, SampleRng(config.train.seed, batch["index"], env.device))[0].double()
        number, total, square = number + latents.numel(), total + float(latents.sum()), square + float(latents.square().sum())
    scale, shift = unit_variance(total / number, square / number)
    _log.info("latents have mean %.4g and standard deviation %.4g, measured on %d numbers", shift, 1 / scale, number)
    return scale, shift
