"""A tiny family of HVDM exports with random weights, for tests of what comes after training."""

from pathlib import Path
from typing import Any

import torch

from diffusion import DiffusionConfig
from models.autoencoders.hvdm import HVDMAEConfig, HVDMAutoencoder
from models.official import hvdm as official_autoencoder
from models.official import hvdm_unet as official_unet
from models.transformers.volume_dit import VolumeDiT, VolumeDiTConfig
from models.unets.volume_unet import VolumeUNet, VolumeUNetConfig
from tests.latte_exports import randomised
from utils.config import to_dict
from utils.weights import read_export, write_export

AE = HVDMAEConfig(
    dim=32,
    image_size=(16, 16),
    patch_size=4,
    n_frames=4,
    depth=1,
    heads=2,
    head_dim=16,
    plane_depth=1,
    plane_heads=4,
    plane_mlp_dim=32,
    fusion_depth=1,
    freq_widths=(8, 8, 16, 16),
)
UNET = VolumeUNetConfig(latent_res=(4, 4), latent_frames=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1)
TOLD = VolumeUNetConfig(**{**vars(UNET), "tasks": True, "dynamics_bins": 3, "strides": 2})
"""The same with all tables."""
DIT = VolumeDiTConfig(latent_res=(4, 4), latent_frames=4, patch_size=2, hidden_size=32, depth=2, num_heads=2)
DATA = {"dataset": "toy", "digest": "0", "n_frames": 4, "image_size": [16, 16], "fps": 8.0, "classes": []}
PROCESS = DiffusionConfig(steps=100, schedule="quad", variance="fixed_small")
Denoiser = VolumeUNetConfig | VolumeDiTConfig


def export_autoencoder(run: Path, config: HVDMAEConfig = AE, seed: int = 0) -> Path:
    """A run folder with the export of an autoencoder."""
    card = {"system": "hvdm", "stage": "autoencoder", "model": to_dict(config), "data": DATA}
    write_export(run / "export", {"model": randomised(HVDMAutoencoder(config), seed).state_dict()}, card)
    return run


def export_denoiser(run: Path, ae: Path, config: Denoiser = UNET, process: DiffusionConfig = PROCESS, seed: int = 1, **card: Any) -> Path:
    """A run folder with the export of a denoiser on the latents of the autoencoder of a run."""
    network = VolumeDiT(config) if isinstance(config, VolumeDiTConfig) else VolumeUNet(config)
    first = {"sha256": read_export(ae)[2], "weights": "ema", "path": str(ae.absolute())}
    told = {"system": "hvdm", "stage": "denoiser", "model": to_dict(config), "diffusion": to_dict(process), "ae": first, "data": DATA}
    told["latent"] = {"scale": 1.0, "shift": 0.0}
    write_export(run / "export", {"model": randomised(network, seed).state_dict()}, told | card)
    return run


def family(root: Path, config: Denoiser = UNET, process: DiffusionConfig = PROCESS, **card: Any) -> dict[str, Path]:
    """The runs of both stages below `root`."""
    ae = export_autoencoder(root / "000-hvdm-autoencoder")
    return {"ae": ae, "denoiser": export_denoiser(root / "001-hvdm-denoiser", ae, config, process, **card)}


def told_family(root: Path) -> dict[str, Path]:
    """As a training leaves it that knew pictures, motion and distances of frames."""
    return family(root, TOLD, cond_prob=0.3, img_prob=0.2, dynamics={"edges": [0.1, 0.2]}, data=DATA | {"frame_strides": [1, 4]})


def official(root: Path, config: VolumeUNetConfig = UNET) -> dict[str, Path]:
    """Both checkpoints as the release saves them, of weights that it can run."""
    root.mkdir(parents=True, exist_ok=True)
    released = HVDMAEConfig(**vars(AE) | official_autoencoder.RELEASE)
    ae, unet = randomised(HVDMAutoencoder(released), 0), randomised(VolumeUNet(config), 1)
    paths = {"ae": root / "model_last.pth", "denoiser": root / "ema_model_100.pth"}
    torch.save(official_autoencoder.export_autoencoder(ae.state_dict(), released), paths["ae"])
    torch.save(official_unet.export_unet(unet.state_dict(), config), paths["denoiser"])
    return paths
