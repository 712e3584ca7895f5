"""Latte's denoiser stage: what is its own beside `tasks.latent` (spec, latte.md sections 2, 3 and 10)."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datasets.loader import ClipSource
from diffusion import learned_variance
from engine.task import Batch
from launch.env import Env
from models.official.latte import init_from_dit, reorder_time
from models.transformers.latte import Latte, LatteConfig
from pipelines.loading import load_latte
from tasks.clips import ClipInfo, check_held_out, open_clips
from tasks.diffusion_task import Condition
from tasks.frame_latents import open_frame_space
from tasks.latent import Denoiser, LatentTask
from tasks.latent_config import LatteModelConfig, LatteRunConfig, latte_size
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
    clips, source, valid = open_clips(config, config.data, env, images=True)
    check_held_out(clips, valid, labels=config.condition.num_classes != 0, vectors=config.condition.use_text_embed)
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
    return LatentTask(config, clips, space, condition, Denoiser(model, functools.partial(_network, model, config.model)))


def _network(config: LatteConfig, start: LatteModelConfig) -> Latte:
    """Latte with fresh weights, or with those that the settings name, as far as they mean the same."""
    network = Latte(config)
    fresh = network.state_dict()
    try:
        state: Mapping[str, Tensor] = {}
        if start.init_from_dit:
            state = init_from_dit(load_tensors(start.init_from_dit), config)
        elif start.init_from:
            state = _trained(start.init_from, config, fresh)
        # A dry run builds it on the meta device.
        network.load_state_dict({name: value.to(fresh[name].device) for name, value in state.items()}, strict=False)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{start.init_from_dit or start.init_from} cannot start this run: {reason}") from None
    return network


def _trained(path: str, config: LatteConfig, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a trained Latte for one of `config`, whatever release it is from; of other classes or texts nothing is taken.

    Raises ValueError where the networks differ in more than that.
    """
    loaded = load_latte(path, input_size=config.input_size, in_channels=config.in_channels, num_heads=config.num_heads)
    for name in ("patch_size", "num_heads", "block_layout", "pos_embed_order", "learn_sigma"):
        theirs, ours = getattr(loaded.config, name), getattr(config, name)
        if theirs != ours:
            raise ValueError(f"it was trained with {name} {theirs}, the model has {ours}")
    state, _ = reorder_time(loaded.module.state_dict(), loaded.config, config.time_embed_order)
    found = {name: value for name, value in state.items() if name in fresh and fresh[name].shape == value.shape}
    missing = [name for name in fresh if name not in found and not name.startswith(("y_embedder.", "cond_embedder."))]
    if missing:
        raise ValueError(f"it has no {missing[0]} of the shape {tuple(fresh[missing[0]].shape)}")
    return found
