"""A tiny family of PVDM exports with random weights, for tests of what comes after training."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from diffusion import DiffusionConfig
from models.autoencoders.pvdm import PVDMAEConfig, PVDMAutoencoder
from models.official import pvdm as official_autoencoder
from models.official import pvdm_unet as official_unet
from models.transformers.plane_dit import PlaneDiT, PlaneDiTConfig
from models.unets.plane_unet import PlaneUNet, PlaneUNetConfig
from tests.latte_exports import randomised
from utils.config import to_dict
from utils.weights import read_export, write_export

AE = PVDMAEConfig(
    dim=32, image_size=(16, 16), patch_size=4, n_frames=4, depth=1, heads=2, head_dim=16, plane_depth=1, plane_heads=4, plane_mlp_dim=32
)
UNET = PlaneUNetConfig(
    latent_res=(4, 4), latent_frames=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2, 1)
)
DIT = PlaneDiTConfig(latent_res=(4, 4), latent_frames=4, patch_size=2, hidden_size=32, depth=1, num_heads=2)
DATA = {"dataset": "toy", "digest": "0", "n_frames": 4, "image_size": [16, 16], "fps": 8.0, "classes": []}
PROCESS = DiffusionConfig(steps=100, schedule="quad", variance="fixed_small")


def export_autoencoder(run: Path, config: PVDMAEConfig = AE, seed: int = 0) -> Path:
    """A run folder with the export of an autoencoder."""
    card = {"system": "pvdm", "stage": "autoencoder", "model": to_dict(config), "data": DATA}
    write_export(run / "export", {"model": randomised(PVDMAutoencoder(config), seed).state_dict()}, card)
    return run


def export_denoiser(
    run: Path, ae: Path, config: PlaneUNetConfig | PlaneDiTConfig = UNET, process: DiffusionConfig = PROCESS, seed: int = 1, **card: Any
) -> Path:
    """A run folder with the export of a denoiser on the latents of the autoencoder of a run."""
    network = PlaneDiT(config) if isinstance(config, PlaneDiTConfig) else PlaneUNet(config)
    first = {"sha256": read_export(ae)[2], "weights": "ema", "path": str(ae.absolute())}
    told = {"system": "pvdm", "stage": "denoiser", "model": to_dict(config), "diffusion": to_dict(process), "ae": first, "data": DATA}
    told["latent"] = {"scale": 1.0, "shift": 0.0}
    write_export(run / "export", {"model": randomised(network, seed).state_dict()}, told | card)
    return run


def family(root: Path, config: PlaneUNetConfig | PlaneDiTConfig = UNET, process: DiffusionConfig = PROCESS) -> dict[str, Path]:
    """The runs of both stages below `root`."""
    ae = export_autoencoder(root / "000-pvdm-autoencoder")
    return {"ae": ae, "denoiser": export_denoiser(root / "001-pvdm-denoiser", ae, config, process)}


def official(root: Path, config: PlaneUNetConfig = UNET) -> dict[str, Path]:
    """Both checkpoints as the release saves them."""
    root.mkdir(parents=True, exist_ok=True)
    ae, unet = randomised(PVDMAutoencoder(AE), 0), randomised(PlaneUNet(config), 1)
    paths = {"ae": root / "model_last.pth", "denoiser": root / "ema_model_100.pth"}
    torch.save(official_autoencoder.export_autoencoder(ae.state_dict(), AE), paths["ae"])
    torch.save(official_unet.export_unet(unet.state_dict(), config), paths["denoiser"])
    return paths


def without_condition(config: PlaneUNetConfig = UNET) -> PlaneUNetConfig:
    """The same network without an input for the clip before."""
    return dataclasses.replace(config, conditional=False)
