"""The space of frame-wise autoencoders: latents encoded as training goes or read from shards, of images beside the clips too."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from datasets.config import DataConfig, open_shards, resolve
from datasets.loader import ClipSource
from engine.task import Batch, Network
from launch.env import Env
from pipelines.image_vae import SD_SCALE, ImageVae, open_codec
from tasks.clips import ClipInfo, Networks, StoredLatents
from tasks.latent_config import LatteRunConfig
from utils.errors import ConfigError, UserError
from utils.media import to_float
from utils.rng import SampleRng

_log = logging.getLogger(__name__)
_DIGITS = 12
"""Of a hash, as messages show it: 48 bits, which a checkpoint's numbers hold exactly."""


class FrameSpace:
    """Latents b C t h w, (posterior sample - shift) * scale, of clips and of the images that the stream gives beside them."""

    def __init__(self, codec: ImageVae | None, autoencoder: Mapping[str, Any], clips: ClipInfo, scale: float, shift: float) -> None:
        self.codec = codec
        self.autoencoder = dict(autoencoder)
        """What identifies it: sha256, weights, path, kind."""
        self.scale = scale
        self.shift = shift
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
    def latents(self, networks: Networks, batch: Batch, rng: SampleRng) -> Tensor:
        """Of the batch's clips, and behind them on the frame axis of its images, float32. The draws are the samples' own.

        Whether the shards hold pixels, moments or samples decides how much is left to do, not what comes out.
        """
        frames = next(name for name in ("video", "moments", "sample") if name in batch)
        parts = [self._drawn(networks, frames, batch[frames], rng, "vae")]
        if "images" in batch:
            parts.append(self._drawn(networks, frames, batch["images"], rng, "vae-images"))
        return (torch.cat(parts, dim=2) - self.shift) * self.scale

    def _drawn(self, networks: Networks, kind: str, stored: Tensor, rng: SampleRng, stream: str) -> Tensor:
        """Posterior samples b C t h w of what the stream gives, as the autoencoder has them."""
        if kind == "sample":
            return stored.float()
        moments = networks["vae"].moments(to_float(stored)) if kind == "video" else stored.float()
        mean, std = moments.chunk(2, dim=1)
        return mean + std * rng.normal(stream, tuple(mean.shape[1:]))

    @torch.no_grad()
    def show(self, networks: Networks, latents: Tensor) -> Tensor:
        """Decoded, b 3 t h w; without an autoencoder three channels of the latents themselves, three deviations wide."""
        if "vae" in networks:
            return networks["vae"].decode_raw(latents.float() / self.scale + self.shift)
        return latents[:, [0, min(1, latents.shape[1] - 1), min(2, latents.shape[1] - 1)]].float() / 3

    def state(self) -> dict[str, int | float]:
        """Scale and shift, which a run keeps as it began, and the first digits of its autoencoder's hash."""
        return {"latent_scale": self.scale, "latent_shift": self.shift, "autoencoder": self._fingerprint}

    def load_state(self, state: dict[str, int | float]) -> None:
        """Takes back what `state` gave. UserError when that was of another autoencoder."""
        began = state.get("autoencoder", self._fingerprint)
        if began != self._fingerprint:
            then, now = (f"{number:0{_DIGITS}x}..." for number in (began, self._fingerprint))
            raise UserError(
                f"the run began with other weights of the autoencoder ({then}) than those of {self.autoencoder.get('path')} now ({now}): "
                "give it those, or start anew with --resume none"
            )
        self.scale, self.shift = float(state["latent_scale"]), float(state["latent_shift"])

    @property
    def _fingerprint(self) -> int:
        """The first digits of the autoencoder's hash as a number; 0 where it is not known."""
        return int((self.autoencoder.get("sha256") or "0")[:_DIGITS], 16)

    def card(self) -> dict[str, Any]:
        """Autoencoder and normalisation, for an export's card."""
        return {"ae": self.autoencoder, "latent": {"scale": self.scale, "shift": self.shift}}


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
    theirs, ours = str(made_by.get("sha256")), str(autoencoder["sha256"])
    if theirs != ours and _run(made_by) == _run(autoencoder):
        raise ConfigError(
            f"{where} is stale: {autoencoder['path']} has other weights now ({ours[:12]}...) than its latents were made with "
            f"({theirs[:12]}...): run preprocess.py latents again"
        )
    if theirs != ours:
        raise ConfigError(
            f"{where} holds latents of the autoencoder {made_by.get('path')} ({theirs[:12]}..., {made_by.get('weights')} weights), "
            f"not of {autoencoder['path']} ({ours[:12]}..., {autoencoder['weights']} weights): "
            "give that one, or run preprocess.py latents with this one"
        )
    wanted = codec.latent_shape((1, 3, 1, *image_size))
    if _shape_of_frame(stored) != (wanted[1], *wanted[3:]):
        found, takes = ("x".join(map(str, shape)) for shape in (_shape_of_frame(stored), (wanted[1], *wanted[3:])))
        raise ConfigError(f"{where} holds latents of {found} a frame, the autoencoder gives {takes}: run preprocess.py latents again")


def _run(autoencoder: Mapping[str, Any]) -> tuple[str, Any]:
    """Where an autoencoder lies (a run's folder and its export/ are one place), and which of its weights are meant."""
    return str(autoencoder.get("path")).removesuffix("/export"), autoencoder.get("weights")


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
    found: list[Any] = [None]
    if env.is_main:
        try:
            found = [measure(config, codec, env)]
        except UserError as error:  # raised on every rank, so that none waits for the others
            found = [error]
    if env.world_size > 1:
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


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
    mean /= number
    deviation = (square / number - mean**2 + spread / number) ** 0.5
    if not deviation > 0:
        raise ConfigError("the autoencoder gives latents without any variance: train it, or give --latent-scale 1")
    _log.info("latents have mean %.4g and standard deviation %.4g, measured on %d numbers", mean, deviation, number)
    return 1 / deviation, mean
