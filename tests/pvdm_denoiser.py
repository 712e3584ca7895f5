"""The tiny denoiser stage of PVDM on networks with random weights, for tests."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.task import Batch, Task
from launch.env import Env
from pipelines.pvdm_loading import load_pvdm_autoencoder
from tasks.clip_latents import ClipSpace
from tasks.clips import ClipInfo, StoredLatents
from tasks.latent import LatentTask
from tasks.pvdm import pvdm_task
from tasks.pvdm_config import PVDMRunConfig
from tests.latte_exports import randomised
from utils.config import load_config
from utils.rng import SampleRng
from utils.weights import read_card

FRAMES, SIDE = 4, 16
"""Of the clips of `tests.pvdm_exports.AE`, whose latents are 4 x 48."""
CLIPS = ClipInfo(n_frames=FRAMES, image_size=(SIDE, SIDE), fps=8.0, classes=("one", "two"), dataset="toy", digest="0", previous=True)
SINGLE = dataclasses.replace(CLIPS, previous=False)
ENV = Env(0, 1, 0, 1, torch.device("cpu"), "gloo")
UNET = ["--model", "PVDM-S", "--model.model_channels", "32", "--model.channel_mult", "1", "2", "--model.num_res_blocks", "1"]
UNET += ["--model.attention_resolutions", "2", "--model.num_heads", "2", "--preview.steps", "2", "--preview.samples", "2"]
DIT = ["--model", "PlaneDiT-S/2", "--model.hidden_size", "32", "--model.depth", "1", "--model.num_heads", "2", "--preview.steps", "2"]
DIT += ["--preview.samples", "2"]


def config(*argv: str, model: list[str] = UNET) -> PVDMRunConfig:
    """Settings of a tiny denoiser."""
    found = load_config({"pvdm": PVDMRunConfig}, [*model, *argv], prog="train_dit.py")
    found.validate()
    return found


def task(ae: Path | None, *argv: str, clips: ClipInfo = CLIPS, model: list[str] = UNET) -> LatentTask:
    """The denoiser's task."""
    return pvdm_task(config(*argv, model=model), load_pvdm_autoencoder(ae) if ae else None, clips, ENV)


def space_of(made: LatentTask) -> ClipSpace:
    assert isinstance(made.space, ClipSpace)
    return made.space


def latent_clips(ae: Path, pairs: bool = True, **changes: Any) -> ClipInfo:
    """The same clips, as the latent set of this autoencoder describes them."""
    loaded = load_pvdm_autoencoder(ae)
    made_by = {"system": "pvdm", "sha256": loaded.sha256, "weights": "ema", "path": str(ae.absolute()), "model": read_card(ae)["model"]}
    names = ("previous", "latent") if pairs else ("latent",)
    held = StoredLatents(dict.fromkeys(names, (4, 48)), torch.float32, made_by, "LATENTS")
    return dataclasses.replace(SINGLE, latents=dataclasses.replace(held, **changes))


def built(made: Task, seed: int = 0) -> dict[str, Any]:
    """The task's modules, the trained one with random weights, also those that start at zero."""
    networks: dict[str, Any] = {name: network.module for name, network in made.networks().items()}
    networks["model"] = randomised(networks["model"], seed)
    return networks


def batch(count: int = 6, frames: int = 2 * FRAMES) -> Batch:
    """Random pixels; every third sample has no clip before it."""
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (count, 3, frames, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    found = {"video": video, "label": torch.arange(count) % 2, "index": torch.arange(10, 10 + count)}
    if frames > FRAMES:
        found["has_previous"] = torch.arange(count) % 3 != 2
        video[~found["has_previous"], :, :FRAMES] = 0
    return found


def rng(samples: Batch, seed: int = 0) -> SampleRng:
    return SampleRng(seed, samples["index"])


class Spy(nn.Module):
    """Says what a denoiser was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def forward(self, x: Tensor, t: Tensor, **given: Any) -> Tensor:
        self.calls.append({"x": x, "t": t, **given})
        return torch.zeros_like(x)
