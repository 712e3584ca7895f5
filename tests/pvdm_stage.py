"""A tiny first stage of PVDM: settings, task, batches and exports of random weights, for tests of it and of what comes after it."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.loop import fit
from engine.task import Batch, Task
from launch.env import Env
from tasks.clips import ClipInfo
from tasks.pvdm_autoencoder import PVDMAutoencoderTask
from tasks.pvdm_autoencoder_config import PVDMAutoencoderConfig
from utils.config import load_config
from utils.rng import SampleRng
from utils.weights import write_export

CLIPS = ClipInfo(n_frames=4, image_size=(16, 24), fps=8.0, dataset="toy", digest="0")
SIZES = "--model.dim 16 --model.depth 1 --model.heads 2 --model.head_dim 8 --patch-size 4 --model.plane_depth 1 --model.plane_heads 2"
SMALL = f"{SIZES} --model.plane_mlp_dim 16 --perceptual none --loss.adversarial.ndf 4 --loss.adversarial.n_layers 2"
QUIET = "--precision fp32 --compile off --log-every 1 --preview-every 0 --eval-every 0 --ckpt-every 100 --no-tensorboard"


def config(*flags: str) -> PVDMAutoencoderConfig:
    """Settings of a tiny autoencoder; each of `flags` may hold several words."""
    argv = [word for line in (SMALL, *flags) for word in line.split()]
    setting = load_config({"pvdm": PVDMAutoencoderConfig}, argv, prog="train_ae.py")
    setting.validate()
    return setting


def task(*flags: str, clips: ClipInfo = CLIPS) -> PVDMAutoencoderTask:
    return PVDMAutoencoderTask(config(*flags), clips)


def modules(made: Task, seed: int = 0) -> dict[str, nn.Module]:
    """The task's bare modules with their first weights."""
    torch.manual_seed(seed)
    return {name: network.module for name, network in made.networks().items()}


def batch(count: int = 4, first: int = 0, clips: ClipInfo = CLIPS) -> Batch:
    """Clips that are a function of their index."""
    index = torch.arange(first, first + count)
    noise: Tensor = SampleRng(5, index).normal("picture", (3, clips.n_frames, *clips.image_size))
    return {"video": (128 + 60 * noise).clamp(0, 255).to(torch.uint8), "label": torch.zeros(count, dtype=torch.int64), "index": index}


def export(folder: Path, *flags: str, seed: int = 0, clips: ClipInfo = CLIPS) -> Path:
    """A run folder with the export of an autoencoder of random weights."""
    made = task(*flags, clips=clips)
    write_export(folder / "export", {"model": modules(made, seed)["ae"].state_dict()}, made.card())
    return folder


class Clips:
    """An endless source of `batch`."""

    steps_per_epoch = 4

    def __init__(self, setting: PVDMAutoencoderConfig, env: Env, start: int = 0) -> None:
        self.share = setting.train.global_batch_size // env.world_size
        self.micro = self.share // setting.train.accumulation
        self.total, self.offset = setting.train.global_batch_size, start + env.rank * self.share

    def batches(self, first_step: int) -> Iterator[Batch]:
        step = first_step
        while True:
            for start in range(0, self.share, self.micro):
                yield batch(self.micro, step * self.total + self.offset + start)
            step += 1

    def describe(self, index: int) -> str:
        return str(index)


def train(env: Env, folder: Path | str, *flags: str, held_out: bool = False) -> Path:
    """A run on clips made up; `held_out`: with others to evaluate on."""
    setting = config(QUIET, f"--results-dir {folder} --global-batch-size 4 --lr 1e-3", *flags)
    valid = Clips(setting, env, 10_000) if held_out else None
    return fit(PVDMAutoencoderTask(setting, CLIPS), Clips(setting, env), setting, env, valid)
