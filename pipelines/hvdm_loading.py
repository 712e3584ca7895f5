"""HVDM's trained networks from an export, a run folder or an official checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.autoencoders.hvdm import HVDMAEConfig, HVDMAutoencoder
from models.official import hvdm as official_autoencoder
from models.official import hvdm_unet as official_unet
from models.official.checkpoint import State
from models.official.released import RELEASED_CLIPS
from models.transformers.volume_dit import VolumeDiT, VolumeDiTConfig
from models.unets.volume_unet import VolumeUNet, VolumeUNetConfig
from pipelines.loading import Loaded, Weights, exported_denoiser, exported_network, is_official, released_network


def load_hvdm_autoencoder(
    path: str | Path, weights: Weights = "ema", image_size: tuple[int, int] | None = None, *, plane_heads: int = 4
) -> Loaded:
    """HVDM's autoencoder: an export, or the release's checkpoint (model_last.pth), which does not tell `plane_heads`.

    `image_size`: of the clips that are at hand; a checkpoint of another size is refused by it. Raises UserError.
    """
    if not is_official(path):
        return exported_network(path, weights, HVDMAutoencoder, HVDMAEConfig, "autoencoder", "hvdm")

    def read(checkpoint: Mapping[str, Any]) -> tuple[State, HVDMAEConfig]:
        if official_unet.is_unet(checkpoint):
            raise ValueError("it is the denoiser's")
        config = official_autoencoder.autoencoder_config(checkpoint, image_size, plane_heads=plane_heads)
        return official_autoencoder.import_autoencoder(checkpoint), config

    card = {"system": "hvdm", "stage": "autoencoder"}
    return released_network(path, "HVDM's autoencoder", HVDMAutoencoder, read, card)


def load_hvdm_denoiser(path: str | Path, ae: HVDMAEConfig, weights: Weights = "ema") -> Loaded:
    """HVDM's denoiser over the latents of `ae`: an export of a volume UNet or volume DiT, or the release's (ema_model_<it>.pth).

    Raises UserError.
    """
    if not is_official(path):
        return exported_denoiser(path, weights, (VolumeUNet, VolumeUNetConfig), (VolumeDiT, VolumeDiTConfig), "hvdm")

    def read(checkpoint: Mapping[str, Any]) -> tuple[State, VolumeUNetConfig]:
        known: dict[str, Any] = {"latent_res": ae.grid}
        if "zeros" not in official_unet.unwrap_unet(checkpoint):  # which would tell the frames: averages are kept without it
            known["latent_frames"] = ae.n_frames
        return official_unet.load(checkpoint, **known)

    card = {"system": "hvdm", "stage": "denoiser", **RELEASED_CLIPS}
    return released_network(path, "HVDM's denoiser", VolumeUNet, read, card, weights)
