"""The tiny denoiser stage of HVDM on networks with random weights, for tests."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from engine.task import Batch
from pipelines.hvdm_loading import load_hvdm_autoencoder
from tasks.clip_latents import ClipSpace
from tasks.clips import ClipInfo, StoredLatents
from tasks.hvdm import hvdm_task
from tasks.hvdm_config import HVDMRunConfig
from tasks.latent import LatentTask
from tests.pvdm_denoiser import CLIPS, ENV, FRAMES, SIDE, SINGLE, Spy, batch, built, rng
from utils.config import load_config
from utils.weights import read_card

__all__ = ["CLIPS", "ENV", "FRAMES", "SIDE", "SINGLE", "Spy", "batch", "built", "rng"]

LATENT = (4, FRAMES, 4, 4)
UNET = ["--model", "HVDM-S", "--model.model_channels", "32", "--model.channel_mult", "1", "2", "--model.num_res_blocks", "1"]
UNET += ["--preview.steps", "2", "--preview.samples", "2"]
DIT = ["--model", "VolumeDiT-S/2", "--model.hidden_size", "32", "--model.depth", "2", "--model.num_heads", "2", "--preview.steps", "2"]
DIT += ["--preview.samples", "2"]


def config(*argv: str, model: list[str] = UNET) -> HVDMRunConfig:
    """Settings of a tiny denoiser."""
    found = load_config({"hvdm": HVDMRunConfig}, [*model, *argv], prog="train_dit.py")
    found.validate()
    return found


def task(ae: Path | None, *argv: str, clips: ClipInfo = CLIPS, model: list[str] = UNET) -> LatentTask:
    """The denoiser's task; its classes of motion are those of the edges 0.02, 0.04, ..., as nothing is measured."""
    made = hvdm_task(config(*argv, model=model), load_hvdm_autoencoder(ae) if ae else None, clips, ENV)
    dynamics = space_of(made).told.dynamics
    if dynamics is not None:
        dynamics.edges = tuple(0.02 * (k + 1) for k in range(dynamics.bins - 1))
    return made


def space_of(made: LatentTask) -> ClipSpace:
    assert isinstance(made.space, ClipSpace)
    return made.space


def latent_clips(ae: Path, pairs: bool = True, stills: bool = True, **changes: Any) -> ClipInfo:
    """The same clips, as the latent set of this autoencoder describes them."""
    loaded = load_hvdm_autoencoder(ae)
    made_by = {"system": "hvdm", "sha256": loaded.sha256, "weights": "ema", "path": str(ae.absolute()), "model": read_card(ae)["model"]}
    names: dict[str, tuple[int, ...]] = {"latent": LATENT, "dynamics": (1,)} | ({"still": LATENT} if stills else {})
    if pairs:
        names |= {"previous" if name == "latent" else f"previous_{name}": shape for name, shape in names.items()}
    held = StoredLatents(names, torch.float32, made_by, "LATENTS")
    return dataclasses.replace(SINGLE, latents=dataclasses.replace(held, **changes))


def moving(count: int) -> Batch:
    """Pixels of clips that differ in how much moves: the k-th by k."""
    samples = batch(count)
    generator = torch.Generator().manual_seed(1)
    still = torch.randint(100, 156, (count, 3, 1, SIDE, SIDE), generator=generator)
    flicker = torch.randint(-1, 2, (count, 3, 2 * FRAMES, SIDE, SIDE), generator=generator) * torch.arange(count).reshape(-1, 1, 1, 1, 1)
    samples["video"] = (still + flicker).clamp(0, 255).to(torch.uint8)
    return samples
