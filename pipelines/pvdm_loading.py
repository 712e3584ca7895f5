"""PVDM's trained networks from an export, a run folder or an official checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.autoencoders.pvdm import PVDMAEConfig, PVDMAutoencoder
from models.official import pvdm as official_autoencoder
from models.official import pvdm_unet as official_unet
from models.official.checkpoint import State
from models.official.released import RELEASED_CLIPS
from models.transformers.plane_dit import PlaneDiT, PlaneDiTConfig
from models.unets.plane_unet import PlaneUNet, PlaneUNetConfig
from pipelines.loading import Loaded, Weights, exported_denoiser, exported_network, is_official, released_network


def load_pvdm_autoencoder(
    path: str | Path, weights: Weights = "ema", image_size: tuple[int, int] | None = None, *, splits: int = 1, plane_heads: int = 4
) -> Loaded:
    """PVDM's autoencoder: an export, or the release's checkpoint (model_last.pth), which does not tell `splits` and `plane_heads`.

    `image_size`: of the clips that are at hand; a checkpoint of another size is refused by it. Raises UserError.
    """
    if not is_official(path):
        return exported_network(path, weights, PVDMAutoencoder, PVDMAEConfig, "autoencoder", "pvdm")

    def read(checkpoint: Mapping[str, Any]) -> tuple[State, PVDMAEConfig]:
        if official_unet.is_unet(checkpoint):
            raise ValueError("it is the denoiser's")
        config = official_autoencoder.autoencoder_config(checkpoint, image_size, splits=splits, plane_heads=plane_heads)
        return official_autoencoder.import_autoencoder(checkpoint), config

    card = {"system": "pvdm", "stage": "autoencoder"}
    return released_network(path, "PVDM's autoencoder", PVDMAutoencoder, read, card)


def load_pvdm_denoiser(path: str | Path, ae: PVDMAEConfig, weights: Weights = "ema", *, num_heads: int = 8) -> Loaded:
    """PVDM's denoiser over the latents of `ae`: an export of a plane UNet or plane DiT, or the release's (ema_model_<it>.pth).

    `num_heads`: of a released checkpoint, which does not say it. Raises UserError.
    """
    if not is_official(path):
        return exported_denoiser(path, weights, (PlaneUNet, PlaneUNetConfig), (PlaneDiT, PlaneDiTConfig), "pvdm")

    def read(checkpoint: Mapping[str, Any]) -> tuple[State, PlaneUNetConfig]:
        known: dict[str, Any] = {"latent_res": ae.grid, "num_heads": num_heads}
        if "zeros" not in official_unet.unwrap_unet(checkpoint):  # which would tell the frames: averages are kept without it
            known["latent_frames"] = ae.clip_frames
        return official_unet.load(checkpoint, **known)

    card = {"system": "pvdm", "stage": "denoiser", **RELEASED_CLIPS}
    return released_network(path, "PVDM's denoiser", PlaneUNet, read, card, weights)
