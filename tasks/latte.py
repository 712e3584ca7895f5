"""Latte's denoiser stage: what is its own beside `tasks.latent` (spec, latte.md sections 2, 3 and 10)."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from datasets.loader import ClipSource
from diffusion import learned_variance
from engine.task import Batch
from launch.env import Env
from models.official.latte import init_from_dit
from models.transformers.latte import Latte, LatteConfig
from tasks.clips import ClipInfo, open_clips
from tasks.diffusion_task import Condition
from tasks.frame_latents import open_frame_space
from tasks.latent import Denoiser, LatentTask
from tasks.latent_config import LatteRunConfig, latte_size
from utils.errors import UserError
from utils.rng import SampleRng
from utils.weights import load_tensors


@dataclass(frozen=True)
class JointCondition(Condition):
    """What Latte is told: of each clip as ever, and of each image beside it a label of its own, dropped on its own."""

    images: int = 0

    def training(self, batch: Batch, rng: SampleRng) -> dict[str, Any]:
        """Keyword arguments of Latte for a training batch."""
        given = super().training(batch, rng)
        if self.images and self.num_classes and self.dropout > 0:
            draws = [rng.uniform(f"condition-dropout-image-{number}") for number in range(self.images)]
            given["image_drop"] = torch.stack(draws, dim=1) < self.dropout
        return given

    def given(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of Latte with every condition kept."""
        given: dict[str, Any] = super().given(batch)
        if self.images:
            given["images"] = self.images
            if self.num_classes:
                given["image_y"] = batch["image_label"]
        return given


def build(config: LatteRunConfig, env: Env) -> tuple[LatentTask, ClipSource, ClipSource | None]:
    """Task, training clips and (with `data.val_path`) validation clips."""
    clips, source, valid = open_clips(config, config.data, env)
    return latte_task(config, clips, env), source, valid


def latte_task(config: LatteRunConfig, clips: ClipInfo, env: Env) -> LatentTask:
    """The task for clips that are known. Raises ConfigError or UserError with one line for what does not fit."""
    space = open_frame_space(config, clips, env)
    plain = Condition.of(config.condition, clips)
    condition = JointCondition(**vars(plain), images=clips.images)
    channels, frames, height, width = space.shape
    model = latte_size(
        config.model,
        input_size=(height, width),
        in_channels=channels,
        n_frames=frames,
        learn_sigma=learned_variance(config.diffusion),
        **condition.overrides(),
    )
    return LatentTask(config, clips, space, condition, Denoiser(model, functools.partial(_network, model, config.model.init_from_dit)))


def _network(config: LatteConfig, dit: str) -> Latte:
    """Latte with fresh weights, or with those of an image DiT where they have the same shape and meaning."""
    network = Latte(config)
    if dit:
        try:
            network.load_state_dict(init_from_dit(load_tensors(dit)), strict=False)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"--init-from-dit {dit} does not fit {config.depth} blocks of width {config.hidden_size}: {reason}") from None
    return network
