"""One optimiser step of each CMD stage: eager and compiled, fp32 and bf16, each as a ratio to eager fp32 in the same run.

A step is what `engine.loop.fit` does for one: the task's loss, backward, norm and clipping, fused AdamW, moving average; on a made-up
batch that lies on the device, with a frozen autoencoder of random weights before the diffusion stages, and without a perceptual network.
"""

import argparse
import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.common import CLOCKS, alternate, machine, processes, seconds
from engine.config import EmaConfig, OptimConfig, ParallelConfig, RunConfig
from engine.tally import Tally
from engine.task import Batch, Task
from engine.team import Team
from launch.env import Env
from models.autoencoders.cmd import CMDAEConfig, CMDAutoencoder
from pipelines.loading import Loaded
from tasks.autoencoder import CMDAutoencoderTask
from tasks.autoencoder_config import AutoencoderModelConfig, CMDAutoencoderConfig, PerceptualConfig, ReconstructionLossConfig
from tasks.clips import ClipInfo
from tasks.content import CMDContentConfig, CMDContentTask, ContentModelConfig
from tasks.diffusion_task import FirstStage
from tasks.motion import CMDMotionConfig, CMDMotionTask, MotionModelConfig
from utils.rng import SampleRng

STAGES = ("autoencoder", "content", "motion")
VARIANTS: dict[str, tuple[Literal["on", "off"], Literal["fp32", "bf16"]]] = {
    "eager fp32": ("off", "fp32"),
    "eager bf16": ("off", "bf16"),
    "compiled fp32": ("on", "fp32"),
    "compiled bf16": ("on", "bf16"),
}
BASELINE = "eager fp32"


@dataclass(frozen=True)
class Size:
    """Networks and clips of a run; batch sizes in the order of STAGES."""

    ae: AutoencoderModelConfig
    content: ContentModelConfig
    motion: MotionModelConfig
    image_size: tuple[int, int] = (64, 64)
    n_frames: int = 16
    batch: tuple[int, int, int] = (8, 64, 64)


SIZES = {
    "tiny": Size(
        AutoencoderModelConfig(dim=16, depth=1, heads=2),
        ContentModelConfig(name="ContentDiT-S/4", hidden_size=16, depth=1, num_heads=2),
        MotionModelConfig(name="MotionDiT-S/4", hidden_size=16, depth=1, num_heads=2),
        image_size=(16, 16),
        n_frames=4,
        batch=(2, 2, 2),
    ),
    "small": Size(
        AutoencoderModelConfig(depth=2), ContentModelConfig(name="ContentDiT-S/2"), MotionModelConfig(name="MotionDiT-S/2"), batch=(1, 2, 2)
    ),
    "release": Size(AutoencoderModelConfig(), ContentModelConfig(name="ContentDiT-L/2"), MotionModelConfig(name="MotionDiT-B/2")),
    "paper": Size(AutoencoderModelConfig(), ContentModelConfig(name="ContentDiT-XL/2"), MotionModelConfig(name="MotionDiT-L/2")),
}


def make_task(stage: str, size: Size, optim: OptimConfig, ema: EmaConfig) -> Task:
    """The stage's task with ten classes, without data and without files."""
    clips = ClipInfo(size.n_frames, size.image_size, classes=tuple("0123456789"))
    if stage == "autoencoder":
        loss = ReconstructionLossConfig(perceptual=PerceptualConfig(kind="none"))
        return CMDAutoencoderTask(CMDAutoencoderConfig(optim=optim, ema=ema, model=size.ae, loss=loss), clips)
    ae = size.ae
    model = CMDAEConfig(ae.dim, size.image_size, n_frames=size.n_frames, embed_dim=ae.embed_dim, depth=ae.depth, heads=ae.heads)
    first = FirstStage(Loaded(CMDAutoencoder(model), model, {}, "", ""))
    if stage == "content":
        return CMDContentTask(CMDContentConfig(optim=optim, ema=ema, model=size.content), clips, first)
    return CMDMotionTask(CMDMotionConfig(optim=optim, ema=ema, model=size.motion), clips, first)


def make_batch(size: Size, count: int, device: torch.device) -> Batch:
    """Noise for clips, on the device."""
    video = torch.randint(0, 256, (count, 3, size.n_frames, *size.image_size), dtype=torch.uint8)
    return {"video": video.to(device), "label": (torch.arange(count) % 10).to(device), "index": torch.arange(count)}


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
            self.team.step(phase, self._done, 1, norm, sums.counts[0] / count, sums.finite & norm.isfinite())
        self._done += 1
        self.team.average(self._done)


def compare(stage: str, size: Size, args: argparse.Namespace, env: Env) -> None:
    """Prints the table of one stage."""
    torch._dynamo.reset()
    count = args.batch_size or size.batch[STAGES.index(stage)]
    task = make_task(stage, size, OptimConfig(clip_norm=1.0), EmaConfig())
    batch = make_batch(size, count, env.device)
    trainers: dict[str, Trainer] = {}
    first: dict[str, float] = {}
    for name in [name for name in VARIANTS if name in (BASELINE, *args.variants)]:
        compiled, precision = VARIANTS[name]
        trainers[name] = Trainer(task, batch, ParallelConfig(mode=args.parallel, precision=precision, compile=compiled), env)
        first[name] = seconds(trainers[name].step, env.device)
        trainers[name].step()

    def several(trainer: Trainer) -> None:
        for _ in range(args.steps):
            trainer.step()

    rounds = {name: functools.partial(several, trainer) for name, trainer in trainers.items()}
    medians = alternate(rounds, args.rounds, env.device, CLOCKS[args.clock])
    weights = sum(p.numel() for p in next(iter(task.networks().values())).module.parameters())
    print(f"{stage}: {weights / 1e6:.1f} M parameters, {count} clips {size.n_frames}x{size.image_size[0]}x{size.image_size[1]} a step")
    for name, median in medians.items():
        step = median / args.steps
        print(f"  {name:<14} {step * 1e3:>9.1f} ms/step {count / step:>8.1f} clips/s   ratio {median / medians[BASELINE]:.3f}", end="")
        print(f"   (first step {first[name]:.1f} s)", flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help=f"besides {BASELINE}")
    parser.add_argument("--size", choices=list(SIZES), default="release" if cuda else "small", help="release with a GPU, else small")
    parser.add_argument("--batch-size", type=int, default=0, help="clips per step; default: by size and stage")
    parser.add_argument("--steps", type=int, default=10 if cuda else 1, help="steps per round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all variants, of which the median counts (default 3)")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="wrapping of the trained network (default ddp)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, for a busy machine without a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    args = parser.parse_args()
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda: torch sees no GPU here")
    if args.device == "cuda" and args.clock == "cpu":
        parser.error("--clock cpu: a GPU's work is not seen by the processor's clock")
    torch.set_float32_matmul_precision("high")  # as in training
    with processes() as env:
        env = dataclasses.replace(env, device=torch.device(args.device)) if args.device == "cpu" else env
        print(machine(env.device))
        how = f"median {args.clock} time of {args.rounds} alternating rounds of {args.steps} step(s)"
        print(f"size {args.size}, {args.parallel}; {how}", flush=True)
        for stage in args.stages:
            compare(stage, SIZES[args.size], args, env)


if __name__ == "__main__":
    main()
