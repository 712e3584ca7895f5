"""One optimiser step of each VIDM stage: eager and compiled, fp32 and bf16, each as a ratio to eager fp32 in the same run."""

import argparse
import functools
from dataclasses import dataclass

import torch

from benchmarks.task_step import Subject, add_arguments, run
from engine.task import Batch, Task
from tasks.clips import ClipInfo
from tasks.vidm_config import ContentModelConfig, FrameModelConfig, MotionModelConfig, VIDMContentConfig, VIDMMotionConfig
from tasks.vidm_content import content_task
from tasks.vidm_motion import motion_task

STAGES = ("content", "motion")
FRAMES = 128
"""Of the clips that triples are drawn from."""


@dataclass(frozen=True)
class Size:
    """Changes to the release's networks, the frames' sides and how many there are in a step."""

    model_channels: int = 0
    channel_mult: tuple[int, ...] = ()
    num_res_blocks: int = 0
    num_head_channels: int = 0
    image_size: tuple[int, int] = (128, 128)
    batch: int = 12

    def of(self, model: type[FrameModelConfig]) -> FrameModelConfig:
        """A stage's network."""
        return model(
            model_channels=self.model_channels,
            channel_mult=self.channel_mult,
            num_res_blocks=self.num_res_blocks,
            num_head_channels=self.num_head_channels,
        )


SIZES = {
    "tiny": Size(32, (1, 1), 1, 32, (8, 8), 2),
    "small": Size(channel_mult=(1, 2, 2), num_res_blocks=1, image_size=(64, 64), batch=4),
    "release": Size(),
}


def make_task(stage: str, size: Size) -> Task:
    """The stage's task, without data and without files, as its settings have it."""
    clips = ClipInfo(FRAMES, size.image_size, take="first" if stage == "content" else "triple")
    if stage == "content":
        model = size.of(ContentModelConfig)
        assert isinstance(model, ContentModelConfig)
        return content_task(VIDMContentConfig(model=model), clips)
    model = size.of(MotionModelConfig)
    assert isinstance(model, MotionModelConfig)
    return motion_task(VIDMMotionConfig(model=model), clips)


def make_batch(stage: str, size: Size, count: int, device: torch.device) -> Batch:
    """Noise for frames, on the device."""
    taken = 1 if stage == "content" else 3
    video = torch.randint(0, 256, (count, 3, taken, *size.image_size), dtype=torch.uint8)
    frame = torch.randint(1, FRAMES, (count,))
    found = {"video": video.to(device), "label": torch.zeros(count, dtype=torch.int64, device=device), "index": torch.arange(count)}
    return found | ({"frame": frame.to(device)} if stage == "motion" else {})


def subject(stage: str, size: Size, count: int, device: torch.device) -> Subject:
    """A stage with as many frames, or as many as the size has."""
    samples = f"frames {size.image_size[0]}x{size.image_size[1]}"
    return Subject(stage, make_task(stage, size), make_batch(stage, size, count or size.batch, device), samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["motion"])
    add_arguments(parser, list(SIZES), "small")
    args = parser.parse_args()
    run(parser, args, [functools.partial(subject, stage, SIZES[args.size], args.batch_size) for stage in args.stages])


if __name__ == "__main__":
    main()
