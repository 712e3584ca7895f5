"""Checks of VIDM: first frames from noise, and videos frame after frame, in the release's order and in the right one."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from diffusion import DiffusionConfig
from pipelines.loading import Loaded
from pipelines.sampling import Sampling
from pipelines.vidm import Drawing, FrameOrder, VIDMPipeline, released_pixels
from tests.parity.adapters_vidm_net import case_content, case_motion, named_case
from tests.parity.case import Case, adapter
from utils.config import to_dict
from utils.rng import SampleRng

TRAJECTORY = 5e-4


def process_of(case: Case, learned: bool) -> tuple[DiffusionConfig, Sampling]:
    """Process and ancestral sampling of a case."""
    variance = "learned_range" if learned else "fixed_large"
    process = DiffusionConfig(steps=case.config("steps"), schedule=case.config("noise_schedule"), variance=variance)
    respacing = str(case.config("timestep_respacing", ""))
    return process, Sampling(steps=process.steps, sampler="ddpm", clip=case.config("clip_denoised", True), respacing=respacing)


def loaded(network: nn.Module, process: DiffusionConfig) -> Loaded:
    return Loaded(network, network.config, {"diffusion": to_dict(process)}, "", "the case")


@contextmanager
def recorded_noise(start: Tensor, steps: Tensor, first: int = 0) -> Iterator[None]:
    """Draws are those of the file: start (frames, b, ...), steps (frames, steps, b, ...); `first`: position of the first frame drawn."""

    def normal(rng: SampleRng, stream: str, shape: tuple[int, ...]) -> Tensor:
        frame = re.search(r"frame-(\d+)", stream)
        position = int(frame.group(1)) - first if frame else 0
        step = re.search(r"step-(\d+)", stream)
        drawn = (start if step is None else steps[:, int(step.group(1))])[position][rng.index]
        assert drawn.shape == (len(rng), *shape)
        return drawn

    with mock.patch.object(SampleRng, "normal", normal):
        yield


@adapter("vidm", "content sampling")
def check_content_sample(case: Case) -> None:
    other = named_case(case, case.config("state_from"))
    network = case_content(other.fields, other.state()).requires_grad_(False)
    process, sampling = process_of(case, network.config.learn_sigma)
    noise = case.input("x_T")[None], case.input("step_noise")[None]
    # First frames alone: any motion generator of their size will do.
    motion: Any = mock.Mock(config=network.config, module=nn.Identity(), card={}, path="")
    with mock.patch("pipelines.vidm.MotionUNet", nn.Module), recorded_noise(*noise):
        pipeline = VIDMPipeline(motion, loaded(network, process))
        made = pipeline.first_frames(range(len(noise[0][0])), Drawing(content=sampling))
    case.expect("image", made, TRAJECTORY)


@adapter("vidm", "autoregressive video generation")
def check_video(case: Case) -> None:
    other = named_case(case, case.config("state_from"))
    network = case_motion(other, other.fields, other.state()).requires_grad_(False)
    process, sampling = process_of(case, network.config.learn_sigma)
    content, drawn, first = case.input("content"), case.config("frames"), case.config("first_frame_index")
    motion = loaded(network, process)
    # The network takes frames of any size; the release's config has one number, which it does not use.
    motion = dataclasses.replace(motion, config=dataclasses.replace(network.config, image_size=tuple(content.shape[-2:])))
    for exact in (True, False):
        with recorded_noise(case.input("x_T"), case.input("step_noise"), first):
            pipeline = VIDMPipeline(motion)
            drawing = Drawing(FrameOrder(release=first == 0), motion=sampling, exact=exact)
            video = pipeline.generate(range(len(content)), drawn + first, drawing=drawing, first=content)
        assert first == 0 or torch.equal(video[:, :, 0], content)
        frames = video[:, :, first:].transpose(1, 2)
        case.expect("video_nfchw", frames, TRAJECTORY)
    recorded = case.tensor("out/video_uint8").int()
    case.expect("video_uint8", released_pixels(case.tensor("out/video_nfchw")))  # exactly
    assert (released_pixels(frames).int() - recorded).abs().max() <= 1
