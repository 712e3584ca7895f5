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
from models.official import frame_vae as official_frame_vae
from models.official import latte as official_latte
from models.official.checkpoint import State, unwrap
from models.official.released import SD_SCALE as SD_SCALE
from models.official.released import latte_process
from models.transformers.dit import ContentDiT, DiTConfig
from models.transformers.latte import Latte, LatteConfig
from models.transformers.motion_dit import MotionDiT, MotionDiTConfig
from utils.config import from_dict, load_yaml, to_dict
from utils.errors import UserError
from utils.files import sha256_file
from utils.weights import load_tensors, read_card, read_export

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

    @property
    def antialias(self) -> bool:
        """Whether the frames it was trained on were made smaller with a filter; those of the releases were not."""
        released = is_official(self.path) or "source" in self.card
        return bool(self.card.get("data", {}).get("antialias", not released))


def load_autoencoder(path: str | Path, weights: Weights = "ema", *, n_frames: int = 16, image_size: tuple[int, int] = (64, 64)) -> Loaded:
    """CMD's autoencoder. An official checkpoint does not say its clip size: `n_frames` and `image_size` do.

    Raises UserError when the file is something else.
    """
    if not is_official(path):
        return exported_network(path, weights, CMDAutoencoder, CMDAEConfig, "autoencoder")

    def describe(state: State) -> CMDAEConfig:
        mode: Literal["pixel", "latent"] = "pixel" if state["to_logit.1.weight"].shape[1] == 3 else "latent"
        return official.autoencoder_config(state, image_size, n_frames, mode)

    return _official_network(path, CMDAutoencoder, "autoenc", official.import_autoencoder, describe, "autoencoder")


def load_content(path: str | Path, ae: CMDAEConfig, weights: Weights = "ema") -> Loaded:
    """CMD's content model over the content frames of `ae`. Raises UserError when the file is something else."""
    if not is_official(path):
        return exported_network(path, weights, ContentDiT, DiTConfig, "content")

    def describe(state: State) -> DiTConfig:
        return official.content_config(state, ae.image_size)

    return _official_network(path, ContentDiT, "cdiff_model", official.import_content, describe, "content")


def load_motion(path: str | Path, ae: CMDAEConfig, weights: Weights = "ema") -> Loaded:
    """CMD's motion model over the motion latents of `ae`. Raises UserError when the file is something else."""
    if not is_official(path):
        return exported_network(path, weights, MotionDiT, MotionDiTConfig, "motion")

    def describe(state: State) -> MotionDiTConfig:
        return official.motion_config(state, ae.latent_size, ae.image_size)

    return _official_network(path, MotionDiT, "mdiff_model", official.import_motion, describe, "motion")


def load_frame_vae(path: str | Path, weights: Weights = "ema") -> Loaded:
    """Latte's frame VAE: an export, or the tutorial release's checkpoint (.pth).

    A checkpoint does not tell the groups of its norms (taken for 32) and the heads of its attention, where it has any: a YAML file of
    the same name beside it may say `norm_channels` and `num_heads`, or be the release's own config. Raises UserError.
    """
    if not is_official(path):
        return exported_network(path, weights, FrameVAE, FrameVAEConfig, "autoencoder", "latte")
    checkpoint = load_tensors(path)
    beside = Path(path).with_suffix(".yaml")
    settings = load_yaml(beside) if beside.is_file() else {}
    settings = settings.get("autoencoder_params", settings)
    try:
        known = {name: int(settings[name]) for name in ("norm_channels", "num_heads") if name in settings}
        state, config = official_frame_vae.load(checkpoint, **known)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no checkpoint of the frame VAE: {error} (settings are read from {beside})") from None
    card = {"system": "latte", "stage": "autoencoder", "model": to_dict(config)}
    return Loaded(frozen(FrameVAE, config, state, path), config, card, sha256_file(Path(path)), str(path))


def load_latte(
    path: str | Path, weights: Weights = "ema", *, input_size: tuple[int, int] | None = None, in_channels: int = 4, num_heads: int = 0
) -> Loaded:
    """Latte's denoiser: an export, or a checkpoint of either release, whose card then says what the release trained on.

    `input_size`: of the latents, for other than trained (positions are computed) and for the tutorial's checkpoint, which does not say
    it (32x32 where nobody does); `in_channels` counts for that one too. `num_heads`: of a checkpoint of no named size. Raises UserError.
    """
    if not is_official(path):
        return _resized(exported_network(path, weights, Latte, LatteConfig, "denoiser", "latte"), input_size)
    checkpoint = load_tensors(path)
    if weights == "model" and "model" in checkpoint:
        checkpoint = {"model": checkpoint["model"]}
    elif weights == "model" and "ema" in checkpoint:
        raise UserError(f"{path} holds the average of the weights alone, as the release's joint training saves it: use --weights ema")
    try:
        release = official_latte.release_of(checkpoint)
        known = {"in_channels": in_channels} if release == "tutorial" else {}
        state, config = official_latte.load(checkpoint, **known, **({"num_heads": num_heads} if num_heads else {}))
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is no checkpoint of Latte that can be read: {error}") from None
    told = to_dict(config)
    if release == "tutorial":
        del told["input_size"]  # nobody knows what it was trained on
    card = {"system": "latte", "stage": "denoiser", "model": told, **latte_process(release, config)}
    loaded = Loaded(frozen(Latte, config, state, path), config, card, sha256_file(Path(path)), str(path), weights)
    return _resized(loaded, input_size)


def _resized(loaded: Loaded, input_size: tuple[int, int] | None) -> Loaded:
    """The same weights for latents of another size."""
    if input_size in (None, loaded.config.input_size):
        return loaded
    try:
        config = dataclasses.replace(loaded.config, input_size=input_size)
    except ValueError as error:
        raise UserError(f"{loaded.path} cannot take other frames: {error}") from None
    return dataclasses.replace(loaded, module=frozen(Latte, config, loaded.module.state_dict(), loaded.path), config=config)


def understood(model: Loaded, given: Mapping[str, Tensor], guidance: float) -> dict[str, Tensor]:
    """The part of a condition (`y`, `cond`) that a denoiser has an input for. Raises UserError when guidance needs what it never saw."""
    known = {"y": model.config.num_classes, "cond": getattr(model.config, "cond_dim", 0)}
    kept = {name: value for name, value in given.items() if known[name]}
    if kept and guidance != 1 and model.config.class_dropout_prob == 0:
        raise UserError(f"{model.path} was trained without dropping its condition, so it cannot be guided: use a guidance scale of 1")
    return kept


def diffusion_of(loaded: Loaded) -> DiffusionConfig:
    """The process that a content or motion model was trained on; an official one's is the default."""
    return from_dict(DiffusionConfig, loaded.card.get("diffusion", {}), f"{loaded.path}: diffusion")


def is_official(path: str | Path) -> bool:
    """Whether a path names an official checkpoint rather than an export of ours."""
    return Path(path).suffix in OFFICIAL_SUFFIXES


def released_system(path: str | Path) -> str:
    """The system whose autoencoder an official checkpoint holds, told by the names in it. Raises UserError where it cannot be read."""
    checkpoint = load_tensors(path)
    names = [name for part in (checkpoint, *checkpoint.values()) if isinstance(part, Mapping) for name in part]
    marks = {"latte": "encoder_conv_in.", "hvdm": "low_freq.", "pvdm": "xy_quant_attn."}
    return next((system for system, mark in marks.items() if any(mark in str(name) for name in names)), "cmd")


def exported_network(
    path: str | Path, weights: Weights, network: Callable[[Any], nn.Module], config: type[Any], stage: str, system: str = "cmd"
) -> Loaded:
    """A network of a run folder or export whose card says `system` and `stage`. Raises UserError."""
    state, card, digest = read_export(path, which=weights)
    found = f"{card.get('system')} {card.get('stage')}"
    if found != f"{system} {stage}":
        raise UserError(f"{path} is an export of '{found}', a '{system} {stage}' is wanted here")
    try:
        model = from_dict(config, card["model"], f"{path}: model")
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} does not describe its network: {error}") from None
    return Loaded(frozen(network, model, state, path), model, card, digest, str(path), weights)


Kind = tuple[Callable[[Any], nn.Module], type[Any]]
"""A network and its config dataclass."""


def exported_denoiser(path: str | Path, weights: Weights, unet: Kind, transformer: Kind, system: str) -> Loaded:
    """A denoiser of a system that has two kinds of them: only the transformer has a hidden size. Raises UserError."""
    network, config = transformer if "hidden_size" in read_card(path).get("model", {}) else unet
    return exported_network(path, weights, network, config, "denoiser", system)


def released_network(
    path: str | Path,
    what: str,
    network: Callable[[Any], nn.Module],
    read: Callable[[Mapping[str, Any]], tuple[State, Any]],
    card: Mapping[str, Any],
    weights: Weights = "model",
) -> Loaded:
    """A network of an official checkpoint, which `read` turns into our state dict and config; `card`: what else is known of `what`.

    Raises UserError where `read` raises ValueError or KeyError.
    """
    checkpoint = load_tensors(path)
    try:
        state, config = read(checkpoint)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is no checkpoint of {what} that can be read: {error}") from None
    told = {**card, "model": to_dict(config)}
    return Loaded(frozen(network, config, state, path), config, told, sha256_file(Path(path)), str(path), weights)


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
    return Loaded(frozen(network, model, ours, path), model, card, sha256_file(Path(path)), str(path))


def frozen(network: Callable[[Any], nn.Module], config: Any, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
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
