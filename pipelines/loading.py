"""Trained networks of CMD from an export, a run folder or an official checkpoint."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import DiffusionConfig
from models.autoencoders.cmd import CMDAEConfig, CMDAutoencoder
from models.official import cmd as official
from models.transformers.dit import ContentDiT, DiTConfig
from models.transformers.motion_dit import MotionDiT, MotionDiTConfig
from utils.config import from_dict, to_dict
from utils.errors import UserError
from utils.weights import load_tensors, read_export, sha256_file

OFFICIAL_SUFFIXES = (".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained network, frozen, with what its export says of it."""

    module: nn.Module
    card: dict[str, Any]
    sha256: str
    path: str
    weights: str = "model"
    """Which of the export's weights were asked for."""


def load_autoencoder(path: str | Path, weights: str = "ema", *, n_frames: int = 16, image_size: tuple[int, int] = (64, 64)) -> Loaded:
    """CMD's autoencoder. An official checkpoint does not say its clip size: `n_frames` and `image_size` do.

    Raises UserError when the file is something else.
    """
    if _is_official(path):
        state = official.import_autoencoder(load_tensors(path))
        dim, depth, embed, pixels = _autoencoder_shape(state)
        mode = "pixel" if pixels % 3 == 0 else "latent"
        channels = 3 if mode == "pixel" else 4
        model = CMDAEConfig(
            dim=dim,
            image_size=image_size,
            patch_size=math.isqrt(pixels // channels),
            channels=channels,
            n_frames=n_frames,
            embed_dim=embed,
            depth=depth,
            mode=mode,
            rotary="none",
        )
        return _official_network(path, CMDAutoencoder, model, state, "autoencoder")
    return _exported_network(path, weights, CMDAutoencoder, CMDAEConfig, "autoencoder")


def load_content(path: str | Path, weights: str = "ema") -> Loaded:
    """CMD's content model. Raises UserError when the file is something else."""
    if _is_official(path):
        state = official.import_content(load_tensors(path))
        side = math.isqrt(state["pos_embed"].shape[1]) * state["x_embedder.proj.weight"].shape[-1]
        model = DiTConfig(input_size=(side, side), pos_grid="release", **_dit_shape(state))
        return _official_network(path, ContentDiT, model, state, "content")
    return _exported_network(path, weights, ContentDiT, DiTConfig, "content")


def load_motion(path: str | Path, weights: str = "ema", *, n_frames: int = 16) -> Loaded:
    """CMD's motion model. Of an official checkpoint `n_frames` must be said. Raises UserError when the file is something else."""
    if _is_official(path):
        state = official.import_motion(load_tensors(path))
        patch, key = state["x_embedder.proj.weight"].shape[-1], state["keyframe_embedder.proj.weight"]
        side = math.isqrt(state["keyframe_pos_embed"].shape[1]) * key.shape[-1]
        model = MotionDiTConfig(
            input_size=(n_frames, state["pos_embed"].shape[1] * patch**2 // n_frames),
            keyframe_size=(side, side),
            keyframe_channels=key.shape[1],
            keyframe_patch_size=key.shape[-1],
            pos_grid="release",
            **_dit_shape(state),
        )
        return _official_network(path, MotionDiT, model, state, "motion")
    return _exported_network(path, weights, MotionDiT, MotionDiTConfig, "motion")


def diffusion_of(loaded: Loaded) -> DiffusionConfig:
    """The process that a content or motion model was trained on; an official one's is the default."""
    return from_dict(DiffusionConfig, loaded.card.get("diffusion", {}), f"{loaded.path}: diffusion")


def _is_official(path: str | Path) -> bool:
    return Path(path).suffix in OFFICIAL_SUFFIXES


def _exported_network(path: str | Path, weights: str, network: Callable[[Any], nn.Module], config: type, stage: str) -> Loaded:
    state, card, digest = read_export(path, which=weights)
    found = f"{card.get('system')} {card.get('stage')}"
    if found != f"cmd {stage}":
        raise UserError(f"{path} is an export of '{found}', a 'cmd {stage}' is wanted here")
    model = from_dict(config, card["model"], f"{path}: model")
    return Loaded(_frozen(network, model, state, path), card, digest, str(path), weights)


def _official_network(path: str | Path, network: Callable[[Any], nn.Module], model: Any, state: Mapping[str, Tensor], stage: str) -> Loaded:
    card = {"system": "cmd", "stage": stage, "model": to_dict(model)}
    return Loaded(_frozen(network, model, state, path), card, sha256_file(Path(path)), str(path))


def _frozen(network: Callable[[Any], nn.Module], config: Any, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """The network with its weights, ready for use. Does not touch the global random state."""
    with torch.device("meta"):
        module = network(config)
    try:
        module.load_state_dict(dict(state), assign=True)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit the network that its card describes ({str(error).splitlines()[-1].strip()})") from None
    return module.float().eval().requires_grad_(False)


def _autoencoder_shape(state: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
    """(width, layers, motion channels, values per patch) of an autoencoder's state."""
    dim, pixels = state["patch_in.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("encoder."))
    return dim, depth, state["columns_out.weight"].shape[0], pixels


def _dit_shape(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Config fields that show in the state of a DiT; the head count follows from the published sizes."""
    weight = state["x_embedder.proj.weight"]
    width, out = weight.shape[0], state["final_layer.linear.weight"].shape[0]
    table = state.get("y_embedder.embedding_table.weight")
    return {
        "in_channels": weight.shape[1],
        "patch_size": weight.shape[-1],
        "hidden_size": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_heads": {384: 6, 768: 12, 1024: 16, 1152: 16}.get(width, max(1, width // 64)),
        "learn_sigma": out == 2 * weight.shape[1] * weight.shape[-1] ** 2,
        "num_classes": 0 if table is None else len(table) - 1,
    }
