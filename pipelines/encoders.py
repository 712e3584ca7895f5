"""What turns clips into latents, system by system: how its trained encoder is opened, and what it promises."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from pipelines.clip import ClipPipeline
from pipelines.cmd import CMDPipeline
from pipelines.hvdm import HVDMPipeline
from pipelines.latte import LattePipeline
from pipelines.loading import is_official, released_system
from pipelines.pvdm import PVDMPipeline
from utils.errors import ConfigError
from utils.weights import read_card


class ClipEncoder(Protocol):
    """A pipeline that encodes clips of a fixed number of frames, as far as latents are concerned."""

    @property
    def clip_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the clips that it takes."""

    def identity(self) -> dict[str, Any]:
        """Plain values that tie latents to the autoencoder: system, sha256, weights, path, and what else it needs to be the same."""

    def encode_latents(self, video: Tensor) -> dict[str, Tensor]:
        """Clips b 3 t h w in [-1, 1] -> name -> tensors b ..., what a latent set stores of them."""


@runtime_checkable
class FrameEncoder(Protocol):
    """A pipeline that encodes every frame alone."""

    def identity(self) -> dict[str, Any]:
        """As of a ClipEncoder."""

    def encode_moments(self, video: Tensor) -> Tensor:
        """Clips b 3 t h w in [-1, 1] -> b 2C t h' w' float32: means of the posteriors, and then their standard deviations.

        UserError for a size that it cannot take.
        """


LatentEncoder = ClipEncoder | FrameEncoder


@dataclass(frozen=True)
class EncoderOptions:
    """How the trained networks are opened."""

    path: str
    weights: Literal["ema", "model"] = "ema"
    vae: str = ""
    scale_factor: float = 0.18215
    n_frames: int = 16
    image_size: tuple[int, int] = (64, 64)
    """Of the clips; read for official checkpoints only, as `n_frames` is."""
    precision: Literal["fp32", "bf16"] = "fp32"
    device: torch.device = torch.device("cpu")
    chunk: int = 32
    """Frames that a frame-wise autoencoder takes at a time."""
    pairs: bool | None = None
    """Samples are a clip and the one before it, of autoencoders that know such; None: where the clips are long enough."""
    stills: bool = False
    """With each clip its first frame as a still clip, of autoencoders whose denoisers can start from pictures."""
    lengths: tuple[int, int] = (0, 0)
    """Frames of the shortest and of the longest stored clip."""
    whole_videos: bool = False
    """Stored clips are videos of their own lengths."""


def _cmd(options: EncoderOptions) -> LatentEncoder:
    return CMDPipeline.from_exports(
        options.path,
        vae=options.vae,
        scale_factor=options.scale_factor,
        ae_weights=options.weights,
        n_frames=options.n_frames,
        image_size=options.image_size,
        device=options.device,
        precision=options.precision,
    )


def _latte(options: EncoderOptions) -> LatentEncoder:
    return LattePipeline.from_exports(
        ae=options.path,
        vae=options.vae,
        ae_weights=options.weights,
        chunk=options.chunk,
        device=options.device,
        precision=options.precision,
    )


def _pvdm(options: EncoderOptions) -> LatentEncoder:
    _refuse_vae(options)
    pipeline = PVDMPipeline.from_exports(ae=options.path, ae_weights=options.weights, device=options.device, precision=options.precision)
    return _paired(pipeline, options)


def _hvdm(options: EncoderOptions) -> LatentEncoder:
    _refuse_vae(options)
    pipeline = HVDMPipeline.from_exports(ae=options.path, ae_weights=options.weights, device=options.device, precision=options.precision)
    pipeline.stills = options.stills
    return _paired(pipeline, options)


def _refuse_vae(options: EncoderOptions) -> None:
    if options.vae:
        raise ConfigError(f"--vae {options.vae}: --ae {options.path} takes pixels, no latents of an image VAE; drop the flag")


def _paired(pipeline: ClipPipeline, options: EncoderOptions) -> LatentEncoder:
    """With pairs where they are asked for, or where nothing is said and the clips are long enough."""
    both, (shortest, longest) = 2 * pipeline.clip_shape[0], options.lengths
    enough = shortest >= both or (options.whole_videos and longest >= both)
    pipeline.pairs = enough if options.pairs is None else options.pairs
    return pipeline


ENCODERS: dict[str, Callable[[EncoderOptions], LatentEncoder]] = {"cmd": _cmd, "latte": _latte, "pvdm": _pvdm, "hvdm": _hvdm}
"""System -> what opens its encoder."""
IMAGE_VAE = "latte"
"""The system whose autoencoder may be an image VAE alone."""


def system_of(ae: str, told: str = "") -> str:
    """The system that opens an autoencoder: an export says it, an official checkpoint does unless it is `told`; empty `ae`: an image VAE.

    Raises UserError for what cannot be read, ConfigError where something else is told.
    """
    if not ae and told not in ("", IMAGE_VAE):
        raise ConfigError(f"--system {told}: without --ae it is the image VAE that encodes, frame by frame ({IMAGE_VAE}); drop the flag")
    if ae and not is_official(ae):
        system = str(read_card(ae).get("system", ""))
        if told not in ("", system):
            raise ConfigError(f"--system {told}: --ae {ae} is an export of '{system}'; drop the flag")
        return system
    return told or (released_system(ae) if ae else IMAGE_VAE)
