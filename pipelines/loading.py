"""Trained networks from an export, a run folder or an official checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion import DiffusionConfig
from models.autoencoders.cmd import CMDAEConfig, CMDAutoencoder
from models.autoencoders.frame_vae import FrameVAE, FrameVAEConfig
from models.official import cmd as official
from models.official.checkpoint import State, unwrap
from models.transformers.dit import ContentDiT, DiTConfig
from models.transformers.motion_dit import MotionDiT, MotionDiTConfig
from utils.config import from_dict, to_dict
from utils.errors import UserError
from utils.files import sha256_file
from utils.weights import load_tensors, read_export

Weights = Literal["ema", "model"]
OFFICIAL_SUFFIXES = (".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained network, frozen, with what its export says of it."""

    module: nn.Module
    config: Any
    """Config dataclass of the module."""
    card: dict[str, Any]
    sha256: str
    path: str
    weights: Weights = "model"
    """Which of the export's weights were asked for."""


def load_autoencoder(path: str | Path, weights: Weights = "ema", *, n_frames: int = 16, image_size: tuple[int, int] = (64, 64)) -> Loaded:
    """CMD's autoencoder. An official checkpoint does not say its clip size: `n_frames` and `image_size` do.

    Raises UserError when the file is something else.
    """
    if not is_official(path):
        return _exported_network(path, weights, CMDAutoencoder, CMDAEConfig, "autoencoder")

    def describe(state: State) -> CMDAEConfig:
        mode: Literal["pixel", "latent"] = "pixel" if state["to_logit.1.weight"].shape[1] == 3 else "latent"
        return official.autoencoder_config(state, image_size, n_frames, mode)

    return _official_network(path, CMDAutoencoder, "autoenc", official.import_autoencoder, describe, "autoencoder")


def load_content(path: str | Path, ae: CMDAEConfig, weights: Weights = "ema") -> Loaded:
    """CMD's content model over the content frames of `ae`. Raises UserError when the file is something else."""
    if not is_official(path):
        return _exported_network(path, weights, ContentDiT, DiTConfig, "content")

    def describe(state: State) -> DiTConfig:
        return official.content_config(state, ae.image_size)

    return _official_network(path, ContentDiT, "cdiff_model", official.import_content, describe, "content")


def load_motion(path: str | Path, ae: CMDAEConfig, weights: Weights = "ema") -> Loaded:
    """CMD's motion model over the motion latents of `ae`. Raises UserError when the file is something else."""
    if not is_official(path):
        return _exported_network(path, weights, MotionDiT, MotionDiTConfig, "motion")

    def describe(state: State) -> MotionDiTConfig:
        return official.motion_config(state, ae.latent_size, ae.image_size)

    return _official_network(path, MotionDiT, "mdiff_model", official.import_motion, describe, "motion")


def load_frame_vae(path: str | Path, weights: Weights = "ema") -> Loaded:
    """Latte's frame VAE. Raises UserError when the file is something else."""
    return _exported_network(path, weights, FrameVAE, FrameVAEConfig, "autoencoder", "latte")


def diffusion_of(loaded: Loaded) -> DiffusionConfig:
    """The process that a content or motion model was trained on; an official one's is the default."""
    return from_dict(DiffusionConfig, loaded.card.get("diffusion", {}), f"{loaded.path}: diffusion")


def is_official(path: str | Path) -> bool:
    """Whether a path names an official checkpoint rather than an export of ours."""
    return Path(path).suffix in OFFICIAL_SUFFIXES


def _exported_network(
    path: str | Path, weights: Weights, network: Callable[[Any], nn.Module], config: type[Any], stage: str, system: str = "cmd"
) -> Loaded:
    state, card, digest = read_export(path, which=weights)
    found = f"{card.get('system')} {card.get('stage')}"
    if found != f"{system} {stage}":
        raise UserError(f"{path} is an export of '{found}', a '{system} {stage}' is wanted here")
    model = from_dict(config, card["model"], f"{path}: model")
    return Loaded(_frozen(network, model, state, path), model, card, digest, str(path), weights)


def _official_network(
    path: str | Path,
    network: Callable[[Any], nn.Module],
    entry: str,
    convert: Callable[[State], State],
    describe: Callable[[State], Any],
    stage: str,
) -> Loaded:
    checkpoint = load_tensors(path)
    try:
        # Of a diffusion model the average generates; the autoencoder has none.
        state = unwrap(checkpoint, "ema", entry)
        model, ours = describe(state), convert(state)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is no official checkpoint of CMD's {stage} stage: {error}") from None
    card = {"system": "cmd", "stage": stage, "model": to_dict(model)}
    return Loaded(_frozen(network, model, ours, path), model, card, sha256_file(Path(path)), str(path))


def _frozen(network: Callable[[Any], nn.Module], config: Any, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """The network with its weights, ready for use. Does not touch the global random state."""
    with torch.device("meta"):
        module = network(config)
    try:
        module.load_state_dict(dict(state), assign=True)
    except RuntimeError as error:
        raise UserError(
            f"{path}: its weights do not fit the network that its card describes ({str(error).splitlines()[-1].strip()})"
        ) from None
    return module.float().eval().requires_grad_(False)
