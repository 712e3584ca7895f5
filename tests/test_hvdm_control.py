"""Whether a denoiser that is told the motion of its clips, or the picture that they begin at, learns what that means."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.task import Batch
from models.autoencoders.hvdm import HVDMAEConfig
from models.layers.motion import motion_edges, motion_energy
from pipelines.loading import Loaded
from pipelines.sampling import Sampling, sample
from tasks.hvdm import hvdm_task
from tasks.latent import LatentTask
from tests.hvdm_denoiser import ENV, SINGLE, config, space_of
from utils.media import to_float
from utils.rng import SampleRng

SIDE, FRAMES, COUNT = 8, 4, 48
FLAGS = ["--model", "VolumeDiT-S/1", "--model.hidden_size", "64", "--model.depth", "2", "--model.num_heads", "4", "--cond-prob", "0"]
FLAGS += ["--diffusion.predict", "x0"]


class Pooling(nn.Module):
    """An autoencoder that needs no training: latents are pixels of a quarter of the size."""

    def encode(self, video: Tensor) -> Tensor:
        return nn.functional.avg_pool3d(video, (1, 4, 4))

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)


def clips(step: int, count: int = 64) -> Batch:
    """Squares of random brightness, that changes from frame to frame by anything from nothing to all."""
    generator = torch.Generator().manual_seed(step)
    picture = torch.rand(count, 3, 1, 2, 2, generator=generator) - 0.5
    flicker = 2 * torch.rand(count, 3, FRAMES, 2, 2, generator=generator) - 1
    flicker[:, :, 0] = 0
    squares = picture + flicker * torch.rand(count, 1, 1, 1, 1, generator=generator)
    video = Pooling().decode((squares.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return {"video": video, "label": torch.zeros(count, dtype=torch.int64), "index": torch.arange(count) + step * count}


def task_of(*argv: str) -> LatentTask:
    torch.manual_seed(0)
    first = HVDMAEConfig(image_size=(SIDE, SIDE), patch_size=4, n_frames=FRAMES, embed_dim=3)
    known = dataclasses.replace(SINGLE, n_frames=FRAMES, image_size=(SIDE, SIDE))
    return hvdm_task(config(*FLAGS, *argv, model=[]), Loaded(Pooling(), first, {}, "0" * 64, "pooling"), known, ENV)


def trained(task: LatentTask, steps: int) -> Callable[[dict[str, Tensor]], Tensor]:
    """What makes clips of what it is told, after so many steps."""
    networks: dict[str, Any] = {name: network.module for name, network in task.networks().items()}
    model = networks["model"].train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        batch = clips(step)
        out = task.loss("model", networks, batch, SampleRng(0, batch["index"]))
        optimiser.zero_grad()
        (out.total / out.count).backward()
        optimiser.step()
    model.eval()

    @torch.no_grad()
    def made(told: dict[str, Tensor]) -> Tensor:
        rng, sampling = SampleRng(1, torch.arange(COUNT)), Sampling(steps=20, clip=True)
        latents = sample(model, task.config.diffusion, space_of(task).shape, rng, "samples", sampling, always=told)
        return task.space.show(networks, latents).clamp(-1, 1)

    return made


def test_samples_of_livelier_classes_move_more() -> None:
    bins = 4
    task = task_of("--dynamics-bins", str(bins))
    dynamics = space_of(task).told.dynamics
    assert dynamics is not None
    dynamics.edges = tuple(motion_edges(motion_energy(to_float(clips(10**6, 512)["video"])), bins).tolist())
    made = trained(task, 200)
    *classes, anything = [motion_energy(made({"dynamics": torch.full((COUNT,), told)})).mean().item() for told in range(bins + 1)]
    assert all(lower < higher for lower, higher in itertools.pairwise(classes)), classes
    assert classes[-1] > 2 * classes[0] and classes[0] < anything < classes[-1], (classes, anything)


def test_samples_begin_at_their_picture() -> None:
    task = task_of("--img-prob", "0.7")
    made = trained(task, 200)
    networks = {name: network.module for name, network in task.networks().items()}
    given = clips(10**6, COUNT)
    told = task.space.starts(networks, given)["from_pictures"]
    pictures = to_float(given["video"][:, :, 0])
    found, without = (made(condition)[:, :, 0] for condition in (told, {}))
    near, far = ((frames - pictures).square().mean().item() for frames in (found, without))
    assert near < 0.15 * far, (near, far)
    swapped = made(told | {"previous": told["previous"].flip(0)})[:, :, 0]
    assert (swapped - pictures.flip(0)).square().mean().item() < 0.15 * far, "whichever picture it is"
