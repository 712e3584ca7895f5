"""What the benchmarks of a network's training step share: ours against the same network written down plainly, both with the same weights.

They must give the same outputs. A step is loss, backward, norm, fused AdamW, and the moving average where training keeps one.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import CLOCKS, OURS, VARIANTS, StepTrainer, alternate, machine, processes, ratio_lines, seconds
from benchmarks.products import bound_line
from engine.config import EmaConfig
from launch.env import Env

AGREE = 1e-4
"""Largest difference of the two networks' outputs in fp32, relative to the largest output."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network with its plain form, inputs for it and the loss of a step."""

    ours: Callable[[], nn.Module]
    plain: Callable[[Any], nn.Module]
    inputs: tuple[Tensor, ...]
    loss: Callable[[nn.Module], Tensor]
    ema: EmaConfig | None = None


Maker = Callable[[argparse.Namespace, torch.device], tuple[str, Subject]]
"""What is measured, in words, and the subject."""


def network(subject: Subject, is_ours: bool) -> nn.Module:
    """Ours or the plain one with the same random weights everywhere: fresh ones would skip what starts at zero."""
    torch.manual_seed(0)
    ours = subject.ours()
    for parameter in ours.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return ours if is_ours else subject.plain(ours)


@torch.no_grad()
def difference(subject: Subject, device: torch.device) -> float:
    """How far the two are apart in fp32, relative to the largest output."""
    ours, plain = (network(subject, is_ours).to(device)(*subject.inputs) for is_ours in (True, False))
    return float((ours - plain).abs().max() / ours.abs().max())


def measure(subject: Subject, args: argparse.Namespace, env: Env) -> None:
    """Prints the table."""
    apart = difference(subject, env.device)
    print(f"plain and ours apart by {apart:.1e} of the largest output in fp32, allowed {AGREE:g}")
    assert apart < AGREE, "the two networks are not the same"
    trainers, first = {}, {}
    for name in [name for name in VARIANTS if name in args.variants]:
        is_ours, how = VARIANTS[name]
        trainers[name] = StepTrainer(network(subject, is_ours), is_ours, how, subject.loss, env, ema=subject.ema)
        first[name] = seconds(trainers[name].step, env.device)
    rounds = {name: functools.partial(trainer.steps, args.steps) for name, trainer in trainers.items()}
    medians = alternate(rounds, args.rounds, env.device, CLOCKS[args.clock])
    for line in ratio_lines(medians, args.steps, args.batch_size, first, {}):
        print(line, flush=True)
    if OURS in trainers and env.device.type == "cpu":
        print(bound_line(trainers[OURS].step, medians, args.steps, CLOCKS[args.clock]), flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every such benchmark."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=128, help="side of the clips, of which a latent has an eighth (default 128)")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=1, help="steps per round (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all variants, of which the median counts (default 3)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, for a busy machine without a GPU")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace, makers: Sequence[Maker]) -> None:
    """Prints a table for each subject."""
    if args.device == "cuda" and (not torch.cuda.is_available() or args.clock == "cpu"):
        parser.error("--device cuda: torch sees no GPU here, or --clock cpu was asked for, which does not see it")
    torch.set_float32_matmul_precision("high")  # as in training
    with processes() as env:
        env = dataclasses.replace(env, device=torch.device(args.device)) if args.device == "cpu" else env
        print(machine(env.device))
        for make in makers:
            words, subject = make(args, env.device)
            print(f"{words}; median {args.clock} time of {args.rounds} alternating rounds of {args.steps} step(s)", flush=True)
            measure(subject, args, env)
