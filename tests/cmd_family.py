"""A tiny family of CMD exports with random weights, for tests of what comes after training."""

from pathlib import Path

import torch

from engine.config import RunConfig
from engine.task import Task
from tasks.autoencoder import CMDAutoencoderConfig, CMDAutoencoderTask
from tasks.clips import ClipInfo
from tasks.content import CMDContentConfig, CMDContentTask
from tasks.diffusion_task import open_first_stage
from tasks.motion import CMDMotionConfig, CMDMotionTask
from utils.config import load_config
from utils.weights import write_export

CLIPS = ClipInfo(n_frames=4, image_size=(16, 24), fps=8.0, classes=("one", "two", "three"), dataset="toy", digest="0")
SMALL = ["--model.dim", "16", "--model.depth", "1", "--model.heads", "2", "--model.patch_size", "4", "--model.embed_dim", "4"]
TINY = ["--model.hidden_size", "32", "--model.depth", "2", "--model.num_heads", "2"]


def config(schema: type[RunConfig], *argv: str) -> RunConfig:
    """A stage's config with small networks."""
    sizes = {
        CMDAutoencoderConfig: [*SMALL, "--perceptual", "none"],
        CMDContentConfig: ["--model.name", "ContentDiT-S/4", *TINY],
        CMDMotionConfig: ["--model.name", "MotionDiT-S/2", *TINY, "--keyframe-patch-size", "8"],
    }
    return load_config({"cmd": schema}, [*sizes[schema], *argv], prog="test")


def autoencoder_task(*argv: str, clips: ClipInfo = CLIPS) -> CMDAutoencoderTask:
    return CMDAutoencoderTask(config(CMDAutoencoderConfig, *argv), clips)


def content_task(ae: Path, *argv: str, clips: ClipInfo = CLIPS) -> CMDContentTask:
    setting = config(CMDContentConfig, "--ae", str(ae), *argv)
    return CMDContentTask(setting, clips, open_first_stage(setting.ae, setting.vae, clips))


def motion_task(ae: Path, *argv: str, clips: ClipInfo = CLIPS) -> CMDMotionTask:
    setting = config(CMDMotionConfig, "--ae", str(ae), *argv)
    return CMDMotionTask(setting, clips, open_first_stage(setting.ae, setting.vae, clips))


def export(task: Task, folder: Path, seed: int = 0) -> Path:
    """A run folder with the export of the task's first network, whose weights are random, also those that start at zero."""
    torch.manual_seed(seed)
    module = next(iter(task.networks().values())).module
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    write_export(folder / "export", {"model": module.state_dict()}, task.card())
    return folder


def family(root: Path, clips: ClipInfo = CLIPS) -> dict[str, Path]:
    """The runs of the three stages below `root`."""
    ae = export(autoencoder_task(clips=clips), root / "000-cmd-autoencoder")
    content = export(content_task(ae, clips=clips), root / "001-cmd-content", 1)
    motion = export(motion_task(ae, clips=clips), root / "002-cmd-motion", 2)
    return {"ae": ae, "content": content, "motion": motion}
