"""VIDM's two training stages, tiny, for tests of them and of what comes after them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.loop import fit
from engine.task import Batch
from launch.env import Env
from tasks import vidm_content, vidm_motion
from tasks.clips import ClipInfo
from tasks.latent import LatentTask
from tasks.vidm_config import VIDMContentConfig, VIDMMotionConfig
from utils.config import load_config

N, SIZE = 6, (8, 12)
CLIPS = {
    "content": ClipInfo(N, SIZE, fps=10.0, dataset="toy", digest="0", take="first"),
    "motion": ClipInfo(N, SIZE, fps=10.0, dataset="toy", digest="0", take="triple"),
}
SCHEMAS: dict[str, type[Any]] = {"content": VIDMContentConfig, "motion": VIDMMotionConfig}
MODULES: dict[str, Any] = {"content": vidm_content, "motion": vidm_motion}
NET = "--model.model_channels 32 --model.channel_mult 1 1 --model.num_res_blocks 1 --model.attention_resolutions 2"
TINY = f"--system vidm {NET} --model.num_head_channels 16 --preview.samples 2 --preview.steps 2".split()
SHORT = ["--global-batch-size", "4", "--max-steps", "4", "--num-workers", "0", "--no-tensorboard", "--lr", "1e-3", "--parallel", "ddp"]
SHORT += ["--log-every", "1", "--preview-every", "0", "--eval-every", "0", "--ckpt-every", "0", "--compile", "off"]


def config(stage: str, *argv: str) -> Any:
    """Settings of a tiny stage."""
    found = load_config({"vidm": SCHEMAS[stage]}, [*TINY, *argv], prog=f"train_{stage}_diffusion.py")
    found.validate()
    return found


def task(stage: str, *argv: str) -> LatentTask:
    """The task of clips that are made up."""
    make = vidm_content.content_task if stage == "content" else vidm_motion.motion_task
    return make(config(stage, *argv), CLIPS[stage])


def module(made: LatentTask, seed: int = 0) -> nn.Module:
    """The task's network with random weights, also those that start at zero."""
    torch.manual_seed(seed)
    network = made.networks()["model"].module
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network


def batch(stage: str, count: int = 4) -> Batch:
    """Random pixels."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, CLIPS[stage].frames, *SIZE)
    found = {"video": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), "label": torch.zeros(count, dtype=torch.int64)}
    found["index"] = torch.arange(10, 10 + count)
    return found | ({"frame": torch.arange(count) % (N - 1) + 1} if stage == "motion" else {})


def train(env: Env, stage: str, argv: list[str], results: str) -> str:
    """Trains in this process; the run's folder."""
    setting = config(stage, *argv, "--results-dir", results)
    made, source, valid = MODULES[stage].build(setting, env)
    return str(fit(made, source, setting, env, valid=valid))


def train_all(env: Env, stage: str, ways: dict[str, list[str]], results: str) -> dict[str, str]:
    """Run folder of each way."""
    return {name: train(env, stage, argv, f"{results}/{name}") for name, argv in ways.items()}


def arguments(data: Path, *argv: str) -> list[str]:
    return [*SHORT, "--data-path", str(data), *argv]
