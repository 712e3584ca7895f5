"""Tiny networks of Latte with random weights, for tests of its stages and of what comes after them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.task import Batch, Task
from launch.env import Env
from models.autoencoders.frame_vae import FrameVAE, FrameVAEConfig
from tasks.clips import ClipInfo
from tasks.latent import LatentTask
from tasks.latent_config import LatteRunConfig
from tasks.latte import latte_task
from utils.config import load_config, to_dict
from utils.media import to_float
from utils.rng import SampleRng
from utils.weights import write_export

CLIPS = ClipInfo(n_frames=4, image_size=(16, 24), fps=8.0, classes=("one", "two", "three"), dataset="toy", digest="0")
ENV = Env(0, 1, 0, 1, torch.device("cpu"), "gloo")
VAE = FrameVAEConfig(
    down_channels=(8, 16, 16),
    mid_channels=(16,),
    down_sample=(True, True),
    attn_down=(False, False),
    norm_channels=4,
    num_down_layers=1,
    num_mid_layers=1,
    num_up_layers=1,
)
"""Latents of a quarter of the size, 4 channels."""
TINY = ["--model", "Latte-S/2", "--model.hidden_size", "32", "--model.depth", "2", "--model.num_heads", "2", "--preview.steps", "2"]


def vae_export(folder: Path, seed: int = 0, model: FrameVAEConfig = VAE) -> Path:
    """A run folder with the export of a frame VAE of random weights."""
    torch.manual_seed(seed)
    card = {"system": "latte", "stage": "autoencoder", "model": to_dict(model), "data": CLIPS.card()}
    write_export(folder / "export", {"model": FrameVAE(model).state_dict()}, card)
    return folder


def config(*argv: str) -> LatteRunConfig:
    """Settings of a tiny denoiser."""
    found = load_config({"latte": LatteRunConfig}, [*TINY, *argv], prog="train_dit.py")
    found.validate()
    return found


def task(ae: Path | None, *argv: str, clips: ClipInfo = CLIPS) -> LatentTask:
    """The denoiser's task; latents stay as they are unless `argv` says otherwise."""
    given = ["--ae", str(ae)] if ae else []
    return latte_task(config("--latent-scale", "1", *given, *argv), clips, ENV)


def built(made: Task, seed: int = 0) -> dict[str, nn.Module]:
    """The task's modules, the trained one with random weights, also those that start at zero."""
    torch.manual_seed(seed)
    networks = {name: network.module for name, network in made.networks().items()}
    for parameter in next(iter(networks.values())).parameters():
        nn.init.normal_(parameter, std=0.1)
    return networks


def batch(count: int = 4, clips: ClipInfo = CLIPS) -> Batch:
    """Random pixels, with `clips.images` images beside each clip."""
    generator = torch.Generator().manual_seed(0)

    def pixels(frames: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 3, frames, *clips.image_size), generator=generator, dtype=torch.uint8)

    found = {"video": pixels(clips.n_frames), "label": torch.arange(count) % 3, "index": torch.arange(10, 10 + count)}
    if clips.images:
        found |= {"images": pixels(clips.images), "image_label": torch.arange(count * clips.images).view(count, -1) % 3}
    if clips.cond_dim:
        found["cond"] = torch.randn(count, clips.cond_dim, generator=generator)
    return found


def rng(samples: Batch, seed: int = 0) -> SampleRng:
    return SampleRng(seed, samples["index"])


def stored(networks: dict[str, Any], samples: Batch, dtype: torch.dtype = torch.float32) -> Batch:
    """The same samples as a latent set gives them: moments in place of pixels."""
    names = {"video": "moments", "images": "images"}
    pixels = {names[name]: networks["vae"].moments(to_float(samples[name])).to(dtype) for name in names if name in samples}
    return {name: value for name, value in samples.items() if name not in names} | pixels
