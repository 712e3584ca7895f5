"""How long a background checkpoint holds up training, against one that training waits for, and how it slows the steps meanwhile.

The state is a diffusion transformer's weights, AdamW's moments and the moving average. Both are the checkpointer's, in the same run:
flushed to the disk, with digests, committed. `torch.save` of the same tensors, neither flushed nor digested, stands beside them.

"Held" is what the call to save takes, and what the step after it waits until its update may change what is saved. Not in it: the time by
which steps beside the writer are slower (its own line, per step), and the wait for a save before it that is not done yet, of which there
is none here. A run's log says of each checkpoint how long training waited,
for the one before it too.
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.common import machine, now, processes, seconds
from engine.checkpoint import Checkpointer, State
from engine.config import CheckpointConfig, EmaConfig, OptimConfig, ParallelConfig, RunConfig
from engine.state import model_tensors, optimizer_tensors
from engine.task import Network
from engine.team import Team
from launch.env import Env
from models.transformers.dit import ContentDiT, DiTConfig
from tasks.clips import units

TARGET = 0.05


class Training:
    """A small training loop around a network of about `millions` parameters."""

    def __init__(self, millions: float, batch: int, parallel: Literal["ddp", "fsdp"], env: Env) -> None:
        width = 768 if millions >= 32 else 128
        # Of a block's weights: 4 width^2 in attention, 8 in the MLP, 6 in the modulation.
        depth = max(1, round(millions * 1e6 / (18 * width**2)))
        network = ContentDiT(DiTConfig((16, 16), 4, hidden_size=width, depth=depth, num_heads=width // 64))
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        self.config = RunConfig(parallel=ParallelConfig(mode=parallel, precision="fp32"), checkpoint=CheckpointConfig(keep_last=1))
        self.waiting = dataclasses.replace(self.config, checkpoint=CheckpointConfig(keep_last=1, background=False))
        """The same settings with checkpoints that the loop waits for."""
        self._team = Team({"model": Network(network, optim=OptimConfig(), ema=EmaConfig(), units=units)}, self.config, env)
        self._x = torch.randn(batch, 4, 16, 16, device=env.device)
        self._one = torch.ones((), device=env.device)
        self.done = 0

    def step(self, checkpointer: Checkpointer | None = None) -> float:
        """Forward, backward, AdamW and moving average; returns the seconds that the update waited for a copy of the state."""
        self._team.synchronise("model", last=True)
        with self._team.turn("model") as modules, self._team.autocast():
            steps = torch.full((len(self._x),), self.done % 1000, device=self._x.device)
            F.mse_loss(modules["model"](self._x, steps)[:, :4], self._x).backward()
        waited = seconds(checkpointer.copied, self._x.device) if checkpointer else 0.0
        self._team.step("model", self.done, 1, self._team.gradient_norm("model"), self._one, self._one.bool())
        self.done += 1
        self._team.average(self.done)
        return waited

    def state(self) -> State:
        """As the training loop hands it to the checkpointer."""
        member = self._team.members["model"]
        assert member.ema is not None
        return {
            "networks": {"model": member.module},
            "optim": {"model": member.optimizer},
            "ema": {"model": member.ema.module},
            "progress": {"step": self.done, "samples": self.done * len(self._x)},
            "task": {},
        }

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors, those of this rank, as one would give them to `torch.save`."""
        tensors = model_tensors(self.state()) | optimizer_tensors(self.state())
        return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in tensors.items()}


@dataclasses.dataclass
class Times:
    """Seconds, one figure a round (a step)."""

    plain: list[float] = dataclasses.field(default_factory=list)
    """`torch.save`."""
    synchronous: list[float] = dataclasses.field(default_factory=list)
    held: list[float] = dataclasses.field(default_factory=list)
    total: list[float] = dataclasses.field(default_factory=list)
    """From the call to the committed checkpoint, the loop waiting."""
    busy_total: list[float] = dataclasses.field(default_factory=list)
    """The same, the loop going on."""
    step: list[float] = dataclasses.field(default_factory=list)
    busy_step: list[float] = dataclasses.field(default_factory=list)
    """Steps that ended while the checkpoint was being written."""


def measure(training: Training, checkpointer: Checkpointer, folder: Path, args: argparse.Namespace, env: Env) -> Times:
    """Rounds of: steps alone, `torch.save`, a synchronous save, a background save that is waited for, one beside running steps."""
    times, device = Times(), env.device
    synchronous = Checkpointer(folder / "synchronous", env, training.waiting)
    plain = folder / "plain.pt"
    for _ in range(args.rounds):
        times.step += [seconds(training.step, device) for _ in range(args.steps)]
        times.plain.append(seconds(lambda: torch.save(training.tensors(), plain), device))
        plain.unlink()
        times.synchronous.append(seconds(lambda: synchronous.save(training.done, training.state()), device))
        synchronous.wait()

        started = now(device)
        checkpointer.save(training.done, training.state())
        checkpointer.wait()
        times.total.append(now(device) - started)

        training.step()
        started = now(device)
        held = seconds(lambda: checkpointer.save(training.done, training.state()), device)
        begun = now(device)
        held += training.step(checkpointer)
        times.held.append(held)
        while checkpointer.writing:
            times.busy_step.append(now(device) - begun)
            begun = now(device)
            training.step()
        times.busy_total.append(now(device) - started)
        checkpointer.wait()
    return times


def report(times: Times, bytes_saved: int) -> None:
    """Prints medians and ratios."""
    plain, synchronous, held, total, busy_total, step = (
        statistics.median(values) for values in (times.plain, times.synchronous, times.held, times.total, times.busy_total, times.step)
    )
    print(f"  loop held by a synchronous save   {synchronous:>7.3f} s   {bytes_saved / synchronous / 1e9:.2f} GB/s")
    print(f"  loop held by a background save    {held:>7.3f} s   ratio {held / synchronous:.3f} (target below {TARGET})")
    print(f"  torch.save of the same state      {plain:>7.3f} s   ratio {plain / synchronous:.3f}")
    print(f"  until committed, loop waiting     {total:>7.3f} s   ratio {total / synchronous:.3f}")
    print(f"  until committed, loop going on    {busy_total:>7.3f} s   ratio {busy_total / synchronous:.3f}")
    print(f"  step alone                        {step:>7.3f} s")
    if times.busy_step:
        busy = statistics.median(times.busy_step)
        print(f"  step while a save is written      {busy:>7.3f} s   ratio {busy / step:.3f} to a step alone")
    else:
        print("  step while a save is written: none ended before the save did")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--millions", type=float, default=64.0, help="parameters in millions, about (default 64)")
    parser.add_argument("--batch", type=int, default=4, help="samples of a training step (default 4)")
    parser.add_argument("--steps", type=int, default=5, help="steps measured alone in each round (default 5)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="fsdp", help="wrapping of the network (default fsdp)")
    parser.add_argument("--folder", type=Path, help="where to write, for another file system than that of temporary files")
    args = parser.parse_args()
    with processes() as env, tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        print(machine(env.device))
        training = Training(args.millions, args.batch, args.parallel, env)
        checkpointer = Checkpointer(folder, env, training.config)
        checkpointer.reserve(training.state())
        for _ in range(2):
            training.step()
        bytes_saved = sum(value.nbytes for value in training.tensors().values())
        size = f"{training.parameters / 1e6:.1f} M parameters, state of {bytes_saved / 1e9:.2f} GB"
        print(f"{size}, {args.parallel}, median of {args.rounds} rounds", flush=True)
        report(measure(training, checkpointer, folder, args, env), bytes_saved)


if __name__ == "__main__":
    main()
