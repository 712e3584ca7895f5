"""A tiny first stage of a system of clips: settings, task, batches and exports of random weights, for tests of all that uses it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.loop import fit
from engine.task import Batch, Task
from launch.env import Env
from tasks.clip_autoencoder import ClipAutoencoderTask
from tasks.clips import ClipInfo
from utils.config import load_config
from utils.rng import SampleRng
from utils.weights import write_export

CLIPS = ClipInfo(n_frames=4, image_size=(16, 24), fps=8.0, dataset="toy", digest="0")
QUIET = "--precision fp32 --compile off --log-every 1 --preview-every 0 --eval-every 0 --ckpt-every 100 --no-tensorboard"


@dataclass(frozen=True)
class Stage:
    """A system's first stage."""

    system: str
    schema: type[Any]
    make: Callable[[Any, ClipInfo], ClipAutoencoderTask]
    small: str
    """Flags of a tiny network."""

    def config(self, *flags: str) -> Any:
        """Settings of a tiny autoencoder; each of `flags` may hold several words."""
        argv = [word for line in (f"--system {self.system}", self.small, *flags) for word in line.split()]
        setting = load_config({self.system: self.schema}, argv, prog="train_ae.py")
        setting.validate()
        return setting

    def task(self, *flags: str, clips: ClipInfo = CLIPS) -> ClipAutoencoderTask:
        return self.make(self.config(*flags), clips)

    def export(self, folder: Path, *flags: str, seed: int = 0, clips: ClipInfo = CLIPS) -> Path:
        """A run folder with the export of an autoencoder of random weights."""
        made = self.task(*flags, clips=clips)
        write_export(folder / "export", {"model": modules(made, seed)["ae"].state_dict()}, made.card())
        return folder

    def train(self, env: Env, folder: Path | str, *flags: str, held_out: bool = False) -> Path:
        """A run on clips made up; `held_out`: with others to evaluate on."""
        setting = self.config(QUIET, f"--results-dir {folder} --global-batch-size 4 --lr 1e-3", *flags)
        valid = Clips(setting, env, 10_000) if held_out else None
        return fit(self.make(setting, CLIPS), Clips(setting, env), setting, env, valid)


def modules(made: Task, seed: int = 0) -> dict[str, nn.Module]:
    """The task's bare modules with their first weights."""
    torch.manual_seed(seed)
    return {name: network.module for name, network in made.networks().items()}


def batch(count: int = 4, first: int = 0, clips: ClipInfo = CLIPS) -> Batch:
    """Clips that are a function of their index."""
    index = torch.arange(first, first + count)
    noise: Tensor = SampleRng(5, index).normal("picture", (3, clips.n_frames, *clips.image_size))
    return {"video": (128 + 60 * noise).clamp(0, 255).to(torch.uint8), "label": torch.zeros(count, dtype=torch.int64), "index": index}


class Clips:
    """An endless source of `batch`."""

    steps_per_epoch = 4

    def __init__(self, setting: Any, env: Env, start: int = 0) -> None:
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
