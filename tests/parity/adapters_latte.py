"""Checks of Latte, both releases: crop and resize of their data, and the frames of a clip."""

import re

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.frames import linspace, linspace_last_start, strided_within
from tests.parity import (
    adapters_latte_diffusion,  # noqa: F401 - registers its checks
    adapters_latte_net,  # noqa: F401 - registers its checks
    adapters_latte_vae,  # noqa: F401 - registers its checks
)
from tests.parity.case import Case, adapter
from tests.parity.data_cases import numbers, resized

LEVELS = 2 / 255 * 2
"""Two levels of 255 in [-1, 1]: the tolerance of the tutorial's pictures, which other versions of the libraries round otherwise."""


def model_range(frames: Tensor) -> Tensor:
    """0 to 255 -> -1 to 1."""
    return (frames.float() / 255 - 0.5) / 0.5


@adapter("latte", "official-transform")
def check_official_transform(case: Case) -> None:
    frames, size = case.input("frames").float(), (case.config("size"),) * 2
    for name, source, release in (
        ("resize_then_crop", frames, "latte-ucf101"),
        ("crop_then_resize", frames, "latte-sky"),
        ("flipped", frames.flip(-1), "latte-ucf101"),
    ):
        case.expect(name, model_range(resized(source, size, release)), 1e-4, 1e-5)


@adapter("latte", "expl-transform")
def check_tutorial_transform(case: Case) -> None:
    frames, channels = case.input("frames"), case.config("frame_channels")
    size = case.config("frame_height"), case.config("frame_width")
    release = "latte-tutorial-square" if case.config("centre_square_crop") else "latte-tutorial"
    case.expect("video_path", model_range(resized(frames, size, release))[:, :channels], 0, LEVELS)
    if channels == 1:
        images = [Image.fromarray(frame).convert("L") for frame in frames.permute(0, 2, 3, 1).numpy()]
        frames = torch.from_numpy(np.stack(images))[:, None].expand(-1, 3, -1, -1)
    case.expect("image_path", model_range(resized(frames, size, release))[:, :channels], 0, LEVELS)


def clip_of(name: str) -> tuple[str, dict[str, int]]:
    """idx_i2_n100_s33 -> "idx" and its numbers by letter."""
    kind, *_ = re.split(r"_i\d", name)
    return kind, {letter: int(number) for letter, number in re.findall(r"_([ins])(\d+)", name)}


@adapter("latte", "expl-frameidx")
@adapter("latte", "official-frameidx")
def check_frames(case: Case) -> None:
    length, interval = case.config("num_frames"), case.config("frame_interval")
    intervals = [interval] if isinstance(interval, int) else interval
    for name in case.names("out/"):
        kind, at = clip_of(name.removeprefix("out/"))
        assert at["i"] in intervals
        if kind == "max_start":
            found = torch.tensor(linspace_last_start(at["n"], length, at["i"]))
        else:
            rule = strided_within if kind == "frames" else linspace
            found = numbers(rule(at["s"], at["n"], length, at["i"]))
        case.expect(name.removeprefix("out/"), found)
