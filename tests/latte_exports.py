"""A tiny family of Latte exports with random weights, for tests of what comes after training."""

import dataclasses
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from diffusion import DiffusionConfig, learned_variance
from models.autoencoders.frame_vae import FrameVAE, FrameVAEConfig
from models.transformers.latte import Latte, LatteConfig
from utils.config import to_dict
from utils.weights import read_export, write_export

VAE = FrameVAEConfig(
    z_channels=4, down_channels=(8, 16), mid_channels=(16,), down_sample=(True,), attn_down=(False,), norm_channels=4, num_down_layers=1
)
LATTE = LatteConfig(input_size=(4, 6), n_frames=4, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=3)
DATA = {"dataset": "toy", "digest": "0", "n_frames": 4, "image_size": [8, 12], "fps": 8.0, "classes": ["one", "two", "three"]}
SCALE = {"scale": 0.5, "shift": 0.1}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, also where they start at zero."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def export_vae(run: Path, config: FrameVAEConfig = VAE, seed: int = 0) -> Path:
    """A run folder with the export of a frame VAE."""
    card = {"system": "latte", "stage": "autoencoder", "model": to_dict(config), "data": DATA | {"n_frames": 1}}
    write_export(run / "export", {"model": randomised(FrameVAE(config), seed).state_dict()}, card)
    return run


def export_denoiser(
    run: Path, ae: dict[str, Any], config: LatteConfig = LATTE, process: DiffusionConfig | None = None, seed: int = 1, **card: Any
) -> Path:
    """A run folder with the export of a denoiser on the latents of `ae`."""
    process = process or DiffusionConfig(steps=100)
    config = dataclasses.replace(config, learn_sigma=learned_variance(process))
    told = {"system": "latte", "stage": "denoiser", "model": to_dict(config), "diffusion": to_dict(process), "ae": ae, "latent": SCALE}
    write_export(run / "export", {"model": randomised(Latte(config), seed).state_dict()}, told | {"data": DATA} | card)
    return run


def identity(run: Path) -> dict[str, Any]:
    """What a denoiser's card says of the frame VAE of a run."""
    return {"sha256": read_export(run)[2], "weights": "ema", "path": str(run.absolute()), "kind": "latte"}


def family(root: Path, process: DiffusionConfig | None = None, config: LatteConfig = LATTE) -> dict[str, Path]:
    """The runs of both stages below `root`."""
    ae = export_vae(root / "000-latte-autoencoder")
    return {"ae": ae, "denoiser": export_denoiser(root / "001-latte-denoiser", identity(ae), config, process)}


class FakeKL(nn.Module):
    """Stands in for diffusers' AutoencoderKL: halves the size, its posterior has the means of 2x2 blocks and a spread of 0.1."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(latent_channels=4, block_out_channels=(8, 16))

    @classmethod
    def from_pretrained(cls, folder: Path, **options: Any) -> "FakeKL":
        assert options["local_files_only"]
        return cls()

    def encode(self, x: torch.Tensor) -> SimpleNamespace:
        mean = nn.functional.avg_pool2d(x, 2)
        mean = torch.cat([mean, mean[:, :1]], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.1)))

    def decode(self, z: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=nn.functional.interpolate(z[:, :3], scale_factor=2))


def sd_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like diffusers', and a package that reads it."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    package = types.ModuleType("diffusers")
    package.AutoencoderKL = FakeKL  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "diffusers", package)
    return folder
