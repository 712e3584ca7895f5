"""VIDM's trained networks from an export, a run folder or an official checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.official import vidm as official
from models.official.checkpoint import State
from models.official.released import VIDM_DATA
from models.unets.vidm_content import ContentUNet, ContentUNetConfig
from models.unets.vidm_motion import MotionUNet, MotionUNetConfig
from pipelines.loading import Loaded, Weights, exported_network, is_official, released_network
from utils.errors import UserError


def load_vidm_content(path: str | Path, weights: Weights = "ema", **known: Any) -> Loaded:
    """VIDM's content generator: an export, or an official checkpoint, also of an image model of its layout. Raises UserError.

    `known`: settings that a checkpoint does not tell (those of `models.official.vidm.load_content`); none: the release's.
    """
    if not is_official(path):
        return exported_network(path, weights, ContentUNet, ContentUNetConfig, "content", "vidm")

    def read(checkpoint: Mapping[str, Any]) -> tuple[State, ContentUNetConfig]:
        return official.load_content(_chosen(checkpoint, weights), **known)

    return released_network(path, "VIDM's content generator", ContentUNet, read, _card("content"), weights)


def load_vidm_motion(
    path: str | Path, weights: Weights = "ema", video_timesteps: int | None = None, image_size: tuple[int, int] | None = None, **known: Any
) -> Loaded:
    """VIDM's motion generator: an export, or an official checkpoint, whose flow network is used to pictures in [-1, 1].

    `video_timesteps`: what the caller takes V for. Frame f has the coordinate -1 + 2f/(V-1), so that another V than that of training
    changes the speed of all motion without any error: where the file says its own, the two must be the same. `image_size`: (h, w) of
    the frames, where a checkpoint does not say it (none: the release's); `known`: others of its settings. Raises UserError.
    """
    if not is_official(path):
        loaded = exported_network(path, weights, MotionUNet, MotionUNetConfig, "motion", "vidm")
    else:

        def read(checkpoint: Mapping[str, Any]) -> tuple[State, MotionUNetConfig]:
            times = {"video_timesteps": video_timesteps, "image_size": image_size}
            given = known | {name: value for name, value in times.items() if value is not None}
            return official.load_motion(_chosen(checkpoint, weights), **given)

        loaded = released_network(path, "VIDM's motion generator", MotionUNet, read, _card("motion"), weights)
        process = {"steps": loaded.config.diffusion_timesteps}
        loaded = dataclasses.replace(loaded, card=loaded.card | {"diffusion": process})
    trained = loaded.config.video_timesteps
    if video_timesteps not in (None, trained):
        raise UserError(f"--video-timesteps {video_timesteps}: {path} was trained with {trained} frame indices")
    return loaded


def _chosen(checkpoint: Mapping[str, Any], weights: Weights) -> Mapping[str, Any]:
    """The last weights of a checkpoint that has averages too, where those are wanted."""
    return {"state_dict": checkpoint["state_dict"]} if weights == "model" and "state_dict" in checkpoint else checkpoint


def _card(stage: str) -> dict[str, Any]:
    return {"system": "vidm", "stage": stage, **VIDM_DATA}
