"""The space of frame-wise autoencoders: latents encoded as training goes or read from shards, of images beside the clips too."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from datasets.config import DataConfig, open_shards, resolve
from datasets.loader import ClipSource
from engine.task import Batch, Network
from launch.env import Env
from pipelines.image_vae import SD_SCALE, ImageVae, open_codec
from tasks.clips import ClipInfo, Networks, StoredLatents
from tasks.first_stage import TiedLatents, check_same_autoencoder, on_main, unit_variance
from tasks.latent_config import LatteRunConfig
from utils.errors import ConfigError
from utils.media import to_float
from utils.rng import SampleRng

_log = logging.getLogger(__name__)


class FrameSpace(TiedLatents):
    """Latents b C t h w, (posterior sample - shift) * scale, of clips and of the images that the stream gives beside them."""

    def __init__(self, codec: ImageVae | None, autoencoder: Mapping[str, Any], clips: ClipInfo, scale: float, shift: float) -> None:
        super().__init__(autoencoder, scale, shift)
        self.codec = codec
        if clips.latents is None:
            assert codec is not None
            self.shape: tuple[int, ...] = codec.latent_shape((1, 3, clips.n_frames, *clips.image_size))[1:]
        else:
            channels, height, width = _shape_of_frame(clips.latents)
            self.shape = (channels, clips.n_frames, height, width)

    def networks(self) -> dict[str, Network]:
        """The autoencoder, where there are pixels to encode or somebody gave it for previews."""
        return {} if self.codec is None else {"vae": Network(self.codec, "frozen", methods=("moments", "decode_raw"))}

    @torch.no_grad()
    def latents(self, networks: Networks, batch: Batch, rng: SampleRng) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the batch's clips, and behind them on the frame axis of its images, float32. The draws are the samples' own.

        Whether the shards hold pixels, moments or samples decides how much is left to do, not what comes out. The denoiser is told nothing
        of the space's own.
        """
        frames = next(name for name in ("video", "moments", "sample") if name in batch)
        parts = [self._drawn(networks, frames, batch[frames], rng, "vae")]
        if "images" in batch:
            parts.append(self._drawn(networks, frames, batch["images"], rng, "vae-images"))
        return (torch.cat(parts, dim=2) - self.shift) * self.scale, {}

    def _drawn(self, networks: Networks, kind: str, stored: Tensor, rng: SampleRng, stream: str) -> Tensor:
        """Posterior samples b C t h w of what the stream gives, as the autoencoder has them."""
        if kind == "sample":
            return stored.float()
        moments = networks["vae"].moments(to_float(stored)) if kind == "video" else stored.float()
        mean, std = moments.chunk(2, dim=1)
        return mean + std * rng.normal(stream, tuple(mean.shape[1:]))

    def after(self, latents: Tensor) -> None:
        """Frames are not generated after others."""

    def starts(self, networks: Networks, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """None."""
        return {}

    @torch.no_grad()
    def show(self, networks: Networks, latents: Tensor) -> Tensor:
        """Decoded, b 3 t h w; without an autoencoder three channels of the latents themselves, three deviations wide."""
        if "vae" in networks:
            return networks["vae"].decode_raw(latents.float() / self.scale + self.shift)
        return latents[:, [0, min(1, latents.shape[1] - 1), min(2, latents.shape[1] - 1)]].float() / 3


def open_frame_space(config: LatteRunConfig, clips: ClipInfo, env: Env) -> FrameSpace:
    """The space of a run, its autoencoder checked against the clips. ConfigError or UserError with one line when they do not fit."""
    given = bool(config.ae.path or config.vae.path)
    if clips.latents is None and not given:
        raise ConfigError("which autoencoder? give --ae RUN (a frame VAE of train_ae.py) or --vae FOLDER (a Stable Diffusion VAE)")
    codec, autoencoder = open_codec(config.ae.path, config.ae.weights, config.vae.path, config.vae.chunk) if given else (None, {})
    if clips.latents is not None:
        check_latents(clips.latents, codec, autoencoder, clips.image_size)
        autoencoder = autoencoder or {name: clips.latents.autoencoder.get(name) for name in ("sha256", "weights", "path", "kind")}
    scale, shift = config.latent.scale, config.latent.shift
    if not scale:
        scale, shift = _normalisation(config, clips, codec, env)
    return FrameSpace(codec, autoencoder, clips, scale, shift)


def check_latents(stored: StoredLatents, codec: ImageVae | None, autoencoder: Mapping[str, Any], image_size: tuple[int, int]) -> None:
    """Raises ConfigError when latents in shards are not those of this autoencoder (where one is given), or no frame's latents at all."""
    where, made_by = f"--data-path {stored.location}", stored.autoencoder
    if not stored.framewise:
        raise ConfigError(
            f"{where} holds latents of the system '{made_by.get('system')}', whole clips at once; "
            "this stage takes those of single frames: run preprocess.py latents with a frame VAE"
        )
    if codec is None:
        _shape_of_frame(stored)
        return
    check_same_autoencoder(stored.location, made_by, autoencoder)
    wanted = codec.latent_shape((1, 3, 1, *image_size))
    if _shape_of_frame(stored) != (wanted[1], *wanted[3:]):
        found, takes = ("x".join(map(str, shape)) for shape in (_shape_of_frame(stored), (wanted[1], *wanted[3:])))
        raise ConfigError(f"{where} holds latents of {found} a frame, the autoencoder gives {takes}: run preprocess.py latents again")


def _shape_of_frame(stored: StoredLatents) -> tuple[int, int, int]:
    """Channels, height and width of one frame's latents. ConfigError where a set holds something else."""
    (name, shape), *more = stored.tensors.items()
    if more or name not in ("moments", "sample") or len(shape) != 3 or (name == "moments" and shape[0] % 2):
        raise ConfigError(f"--data-path {stored.location} holds {dict(stored.tensors)}, not the moments or samples of single frames")
    return shape[0] // (2 if name == "moments" else 1), shape[1], shape[2]


def _normalisation(config: LatteRunConfig, clips: ClipInfo, codec: ImageVae | None, env: Env) -> tuple[float, float]:
    """Scale and shift where the settings have none: of Stable Diffusion's VAE, of the latent set, or measured (alike on every rank)."""
    if clips.latents is not None:
        known, stable = clips.latents.statistics, clips.latents.autoencoder.get("kind") == "sd"
        if not known:
            raise ConfigError(f"--data-path {clips.latents.location} does not say how its latents are spread: give --latent-scale")
        if stable and known["shift"] == known["mean"]:  # not a scale that preprocess.py was given
            return SD_SCALE, 0.0
        return known["scale"], known["shift"]
    assert codec is not None
    if codec.kind == "sd":
        return SD_SCALE, 0.0
    return on_main(env, partial(measure, config, codec, env))


@torch.no_grad()
def measure(config: LatteRunConfig, codec: ImageVae, env: Env) -> tuple[float, float]:
    """1 / std and mean of posterior samples of the first clips of the stream: s^2 = Var(mean) + E[std^2]."""
    data: DataConfig = replace(config.data, flip=False, images=0, num_workers=0, weights=())
    shards = open_shards(data)
    source = ClipSource(shards, resolve(data, shards), seed=config.train.seed, global_batch_size=1, accumulation=1, rank=0, world_size=1)
    codec = codec.to(env.device)
    number, mean, square, spread = 0, 0.0, 0.0, 0.0
    for _, batch in zip(range(min(config.latent.measure_clips, shards.num_samples)), source.batches(0), strict=False):
        centre, std = codec.moments(to_float(batch["video"].to(env.device))).double().chunk(2, dim=1)
        number, mean = number + centre.numel(), mean + float(centre.sum())
        square, spread = square + float(centre.square().sum()), spread + float(std.square().sum())
    scale, shift = unit_variance(mean / number, (square + spread) / number)
    _log.info("latents have mean %.4g and standard deviation %.4g, measured on %d numbers", shift, 1 / scale, number)
    return scale, shift
