"""One optimiser step of each CMD stage: eager and compiled, fp32 and bf16, each as a ratio to eager fp32 in the same run.

With a frozen autoencoder of random weights before the diffusion stages, and without a perceptual network.
"""

import argparse
import functools
from dataclasses import dataclass

import torch

from benchmarks.task_step import Subject, add_arguments, run
from engine.config import EmaConfig, OptimConfig
from engine.task import Batch, Task
from models.autoencoders.cmd import CMDAEConfig, CMDAutoencoder
from pipelines.loading import Loaded
from tasks.autoencoder import CMDAutoencoderTask
from tasks.autoencoder_config import AutoencoderModelConfig, CMDAutoencoderConfig, PerceptualConfig, ReconstructionLossConfig
from tasks.clips import ClipInfo
from tasks.content import CMDContentConfig, CMDContentTask, ContentModelConfig
from tasks.diffusion_task import FirstStage
from tasks.motion import CMDMotionConfig, CMDMotionTask, MotionModelConfig

STAGES = ("autoencoder", "content", "motion")


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


def subject(stage: str, size: Size, count: int, device: torch.device) -> Subject:
    """A stage with as many clips, or as many as the size has."""
    batch = make_batch(size, count or size.batch[STAGES.index(stage)], device)
    samples = f"clips {size.n_frames}x{size.image_size[0]}x{size.image_size[1]}"
    return Subject(stage, make_task(stage, size, OptimConfig(clip_norm=1.0), EmaConfig()), batch, samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    add_arguments(parser, list(SIZES), "small")
    args = parser.parse_args()
    run(parser, args, [functools.partial(subject, stage, SIZES[args.size], args.batch_size) for stage in args.stages])


if __name__ == "__main__":
    main()
