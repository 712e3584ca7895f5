"""PVDM's trained networks from an export, a run folder or an official checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from models.autoencoders.pvdm import PVDMAEConfig, PVDMAutoencoder
from models.official import pvdm as official_autoencoder
from models.official import pvdm_unet as official_unet
from models.transformers.plane_dit import PlaneDiT, PlaneDiTConfig
from models.unets.plane_unet import PlaneUNet, PlaneUNetConfig
from pipelines.loading import Loaded, Weights, exported_network, frozen, is_official
from utils.config import to_dict
from utils.errors import UserError
from utils.files import sha256_file
from utils.weights import load_tensors, read_card

RELEASED_WITH: dict[str, Any] = {
    "diffusion": {"schedule": "quad", "variance": "fixed_small"},
    "latent": {"scale": 1.0, "shift": 0.0},
}
"""Process and latents of the released denoisers (spec, pvdm.md section 4), for a card."""


def load_pvdm_autoencoder(
    path: str | Path, weights: Weights = "ema", image_size: tuple[int, int] | None = None, *, splits: int = 1, plane_heads: int = 4
) -> Loaded:
    """PVDM's autoencoder: an export, or the release's checkpoint (model_last.pth), which does not tell `splits` and `plane_heads`.

    `image_size`: of the clips that are at hand; a checkpoint of another size is refused by it. Raises UserError.
    """
    if not is_official(path):
        return exported_network(path, weights, PVDMAutoencoder, PVDMAEConfig, "autoencoder", "pvdm")
    checkpoint = load_tensors(path)
    try:
        if official_unet.is_unet(checkpoint):
            raise ValueError("it is the denoiser's")
        config = official_autoencoder.autoencoder_config(checkpoint, image_size, splits=splits, plane_heads=plane_heads)
        state = official_autoencoder.import_autoencoder(checkpoint)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is no checkpoint of PVDM's autoencoder that can be read: {error}") from None
    card = {"system": "pvdm", "stage": "autoencoder", "model": to_dict(config)}
    return Loaded(frozen(PVDMAutoencoder, config, state, path), config, card, sha256_file(Path(path)), str(path))


def load_pvdm_denoiser(path: str | Path, ae: PVDMAEConfig, weights: Weights = "ema", *, num_heads: int = 8) -> Loaded:
    """PVDM's denoiser over the latents of `ae`: an export of a plane UNet or plane DiT, or the release's (ema_model_<it>.pth).

    `num_heads`: of a released checkpoint, which does not say it. Raises UserError.
    """
    if not is_official(path):
        network, config = _network_of(path)
        return exported_network(path, weights, network, config, "denoiser", "pvdm")
    checkpoint = load_tensors(path)
    try:
        known: dict[str, Any] = {"latent_res": ae.grid, "num_heads": num_heads}
        if "zeros" not in official_unet.unwrap_unet(checkpoint):  # which would tell the frames: averages are kept without it
            known["latent_frames"] = ae.clip_frames
        state, model = official_unet.load(checkpoint, **known)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is no checkpoint of PVDM's denoiser that can be read: {error}") from None
    card = {"system": "pvdm", "stage": "denoiser", "model": to_dict(model), **RELEASED_WITH}
    return Loaded(frozen(PlaneUNet, model, state, path), model, card, sha256_file(Path(path)), str(path), weights)


def _network_of(path: str | Path) -> tuple[Callable[[Any], nn.Module], type[Any]]:
    """Which of the two networks an export holds: only the transformer has a hidden size."""
    settings = read_card(path).get("model", {})
    return (PlaneDiT, PlaneDiTConfig) if "hidden_size" in settings else (PlaneUNet, PlaneUNetConfig)
