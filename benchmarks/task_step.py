"""What the benchmarks of a stage's training step share: eager and compiled, fp32 and bf16, each as a ratio to eager fp32 in the same run.

A step is what `engine.loop.fit` does for one: the task's loss, backward, norm and clipping, fused AdamW, moving average; on a made-up
batch that lies on the device.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from benchmarks.common import CLOCKS, alternate, machine, processes, seconds
from engine.config import ParallelConfig, RunConfig
from engine.tally import Tally
from engine.task import Batch, Task
from engine.team import Team
from launch.env import Env
from utils.rng import SampleRng

VARIANTS: dict[str, tuple[Literal["on", "off"], Literal["fp32", "bf16"]]] = {
    "eager fp32": ("off", "fp32"),
    "eager bf16": ("off", "bf16"),
    "compiled fp32": ("on", "fp32"),
    "compiled bf16": ("on", "bf16"),
}
BASELINE = "eager fp32"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A stage and a batch of its samples."""

    stage: str
    task: Task
    batch: Batch
    samples: str
    """What a sample is, in words: clips 16x64x64."""


Maker = Callable[[torch.device], Subject]


class Trainer:
    """One variant of a stage, ready to be stepped."""

    def __init__(self, task: Task, batch: Batch, parallel: ParallelConfig, env: Env) -> None:
        torch.manual_seed(0)
        self._task, self._batch, self._env = task, batch, env
        self.team = Team(task.networks(), RunConfig(parallel=parallel), env)
        self._done = 0

    def step(self) -> None:
        """Forward, backward, norm, clipping, AdamW and moving average of every network whose turn it is."""
        count = len(self._batch["index"])
        for phase in self._task.phases(self._done):
            tally = Tally(self._env)
            with self.team.turn(phase) as modules:
                self.team.synchronise(phase, last=True)
                with self.team.autocast():
                    output = self._task.loss(phase, modules, self._batch, SampleRng(self._done, self._batch["index"], self._env.device))
                (output.total / count).backward()
                tally.add(output)
            sums, norm = tally.reduce(), self.team.gradient_norm(phase)
            self.team.step(phase, self._done, 1, norm, sums.count / count, sums.finite(norm))
        self._done += 1
        self.team.average(self._done)


def compare(subject: Subject, args: argparse.Namespace, env: Env) -> None:
    """Prints the table of one stage."""
    torch._dynamo.reset()
    task, count = subject.task, len(subject.batch["index"])
    trainers: dict[str, Trainer] = {}
    first: dict[str, float] = {}
    for name in [name for name in VARIANTS if name in (BASELINE, *args.variants)]:
        compiled, precision = VARIANTS[name]
        trainers[name] = Trainer(task, subject.batch, ParallelConfig(mode=args.parallel, precision=precision, compile=compiled), env)
        first[name] = seconds(trainers[name].step, env.device)
        trainers[name].step()

    def several(trainer: Trainer) -> None:
        for _ in range(args.steps):
            trainer.step()

    rounds = {name: functools.partial(several, trainer) for name, trainer in trainers.items()}
    medians = alternate(rounds, args.rounds, env.device, CLOCKS[args.clock])
    weights = sum(p.numel() for p in next(iter(task.networks().values())).module.parameters())
    what = subject.samples.split()[0]
    print(f"{subject.stage}: {weights / 1e6:.1f} M parameters, {count} {subject.samples} a step")
    for name, median in medians.items():
        step = median / args.steps
        print(f"  {name:<14} {step * 1e3:>9.1f} ms/step {count / step:>8.1f} {what}/s   ratio {median / medians[BASELINE]:.3f}", end="")
        print(f"   (first step {first[name]:.1f} s)", flush=True)


def add_arguments(parser: argparse.ArgumentParser, sizes: Sequence[str], default_size: str) -> None:
    """Flags of every such benchmark."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help=f"besides {BASELINE}")
    parser.add_argument(
        "--size", choices=sizes, default="release" if cuda else default_size, help=f"release with a GPU, else {default_size}"
    )
    parser.add_argument("--batch-size", type=int, default=0, help="samples per step; default: by size and stage")
    parser.add_argument("--steps", type=int, default=10 if cuda else 1, help="steps per round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all variants, of which the median counts (default 3)")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="wrapping of the trained network (default ddp)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, for a busy machine without a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace, makers: Sequence[Maker]) -> None:
    """Prints a table for each subject."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.device == "cuda" and args.clock == "cpu":
        parser.error("--clock cpu: a GPU's work is not seen by the processor's clock")
    torch.set_float32_matmul_precision("high")  # as in training
    with processes() as env:
        env = dataclasses.replace(env, device=torch.device(args.device)) if args.device == "cpu" else env
        print(machine(env.device))
        how = f"median {args.clock} time of {args.rounds} alternating rounds of {args.steps} step(s)"
        print(f"size {args.size}, {args.parallel}; {how}", flush=True)
        for make in makers:
            compare(make(env.device), args, env)
