"""A process of the checkpoint tests: `checkpoint_worker.py RUN MODE ACTION... [-- RUN MODE ACTION...]`, under torchrun or alone.

Each part is a fresh start of a toy run. MODE: plain, ddp, fsdp, hsdp. Actions, in order: `train:N` steps, `save:STEP`, `wait`,
`poll:SECONDS`, `reserve`, `load[:PATH]` (default: the latest), `diverge` (the ranks get different values), `digest` (prints a
digest of all tensors and numbers), `unlimit` (files may have any size from now on). `width:N` first: another size; `sync`
anywhere: no background saves.
"""

import hashlib
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.checkpoint import Checkpointer, latest
from engine.config import CheckpointConfig, RunConfig
from engine.state import State, model_tensors, optimizer_tensors
from launch.env import Env, distributed
from launch.run import run_main
from utils.errors import UserError


class Net(nn.Module):
    """Blocks, a parameter of the root whose first axis cannot be split, a buffer, and a layer that is never used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, width))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(3))
        self.unused = nn.Linear(width, width)
        self.register_buffer("table", torch.linspace(0, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x * self.scale + self.table)
        return x


def wrap(module: Net, mode: str, env: Env) -> nn.Module:
    if mode == "plain":
        return module
    if mode == "ddp":
        return DistributedDataParallel(module, find_unused_parameters=True)
    shape, names = ((env.world_size, 1), ("replicate", "shard")) if mode == "hsdp" else ((env.world_size,), ("shard",))
    mesh = init_device_mesh(env.device.type, shape, mesh_dim_names=names)
    for block in module.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


class Toy:
    """A network with its average, a second network that is never stepped, and the counters of a run."""

    def __init__(self, mode: str, width: int, env: Env) -> None:
        torch.manual_seed(0)
        self.env, self.width = env, width
        self.net, self.late, self.ema = (wrap(Net(width).to(env.device), mode, env) for _ in range(3))
        self.step = 0
        self.state: State = {
            "networks": {"net": self.net, "late": self.late},
            "optim": {"net": torch.optim.AdamW(self.net.parameters(), 1e-2), "late": torch.optim.AdamW(self.late.parameters())},
            "ema": {"net": self.ema},
            "progress": {"step": 0, "samples": 0},
            "task": {"factor": 0.1},
        }

    def train(self, steps: int, checkpointer: Checkpointer) -> None:
        for _ in range(steps):
            step = self.state["progress"]["step"]
            x = torch.randn(8, 2, self.width, generator=torch.Generator().manual_seed(step)).to(self.env.device)
            part = x.chunk(self.env.world_size)[self.env.rank]
            self.net(part).square().mean().backward()
            checkpointer.copied()
            self.state["optim"]["net"].step()
            self.state["optim"]["net"].zero_grad()
            with torch.no_grad():
                for average, parameter in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                    average.lerp_(parameter, 0.1)
            self.state["progress"].update(step=step + 1, samples=8 * (step + 1))
            self.state["task"]["factor"] = 0.1 * (step + 2)

    def diverge(self) -> None:
        self.state["task"]["factor"] = float(self.env.rank)
        with torch.no_grad():
            for tensor in self.late.state_dict().values():
                tensor.fill_(self.env.rank)

    def digest(self) -> str:
        digest = hashlib.sha256(repr((self.state["progress"], self.state["task"])).encode())
        tensors = model_tensors(self.state) | optimizer_tensors(self.state)
        for key in sorted(tensors):
            value = tensors[key]
            full = value.full_tensor() if isinstance(value, DTensor) else value
            digest.update(key.encode() + full.detach().cpu().numpy().tobytes())
        return digest.hexdigest()


def poll(checkpointer: Checkpointer, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        checkpointer.poll()
        time.sleep(0.02)


def perform(action: str, run: Path, toy: Toy, checkpointer: Checkpointer) -> None:
    name, _, value = action.partition(":")

    def load() -> None:
        checkpoint = Path(value) if value else latest(run)
        if checkpoint is None:
            raise UserError("no checkpoint")
        checkpointer.load(checkpoint, toy.state)

    def digest() -> None:
        text = toy.digest()
        if toy.env.is_main:
            print(f"DIGEST {text}", flush=True)

    actions: dict[str, Callable[[], Any]] = {
        "train": lambda: toy.train(int(value), checkpointer),
        "save": lambda: checkpointer.save(int(value), toy.state),
        "wait": checkpointer.wait,
        "poll": lambda: poll(checkpointer, float(value)),
        "reserve": lambda: checkpointer.reserve(toy.state),
        "diverge": toy.diverge,
        "load": load,
        "digest": digest,
        "unlimit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)),
    }
    actions[name]()


def play(part: list[str], env: Env) -> None:
    run, mode, *actions = part
    width = int(actions.pop(0).partition(":")[2]) if actions[0].startswith("width:") else 64
    config = RunConfig(checkpoint=CheckpointConfig(keep_last=2, background="sync" not in actions))
    toy = Toy(mode, width, env)
    checkpointer = Checkpointer(Path(run), env, config)
    for action in actions:
        if action != "sync":
            perform(action, Path(run), toy, checkpointer)
    checkpointer.wait()


def main() -> None:
    with distributed(60.0) as env:
        part: list[str] = []
        for argument in [*sys.argv[1:], "--"]:
            if argument != "--":
                part.append(argument)
                continue
            play(part, env)
            part = []


if __name__ == "__main__":
    run_main(main)
