"""VIDM's motion stage: a model of frame r of a clip, given its first frame and frame r - 1, and the flow network with it
(spec, vidm.md sections 3 and 7)."""

import dataclasses
import functools

import torch
from torch import Tensor, nn

from datasets.loader import ClipSource
from engine.task import Batch, Made, Scored
from launch.env import Env
from models.layers.spynet import load_spynet
from models.unets.vidm_motion import MotionUNet, MotionUNetConfig
from pipelines.vidm_loading import load_vidm_motion
from tasks.clips import ClipInfo, Networks, open_clips
from tasks.latent import Denoiser, LatentTask
from tasks.starting import started
from tasks.vidm import ANCESTRAL, UNCONDITIONAL, UNTOLD, FrameSpace
from tasks.vidm_config import VIDMMotionConfig
from utils.errors import ConfigError
from utils.media import to_float
from utils.rng import SampleRng

FREE = ("image_size",)
"""What changes no weights: the network is convolutional, and numbers its rows and columns from -1 to 1."""


class NextFrameSpace(FrameSpace):
    """Frame r of each clip, of which the network is told r, frame r - 1 and frame 0."""

    def latents(self, networks: Networks, batch: Batch, rng: SampleRng) -> tuple[Tensor, dict[str, Tensor]]:
        """The current frames b 3 h w; the conditions as `MotionUNet` names them."""
        first, previous, current = to_float(batch["video"]).unbind(2)
        return current, {"frame": batch["frame"], "previous": previous, "first": first}


class MotionTask(LatentTask):
    """Trains the motion generator."""

    config: VIDMMotionConfig

    def preview(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Pictures of the first, the previous and the true frame beside the drawn one; and short videos that begin in the first frame."""
        current, told = self.space.latents(networks, self.shown(batch), rng)
        own = self.noise(current.device)
        row = [told["first"], told["previous"], current, self.draw(networks["model"], own, "preview/next", {}, told)]
        found = {"next": torch.cat(row, dim=3).clamp(-1, 1)}
        frames = min(self.config.preview.frames, self.denoiser.config.video_timesteps)
        return found | ({"video": self._video(networks, told["first"], frames, own, "preview")} if frames > 1 else {})

    def scored(self) -> Scored:
        """Videos generated from true first frames."""
        return dataclasses.replace(super().scored(), what="generated from true first frames", label="motion_")

    def make(self, networks: Networks, batch: Batch, rng: SampleRng) -> Made:
        """A video that begins in the first frame of each sample."""
        first = to_float(batch["video"][:, :, 0])
        return Made(self._video(networks, first, self.clips.n_frames, rng, "score", self.config.score.steps))

    def _video(self, networks: Networks, first: Tensor, frames: int, own: SampleRng, stream: str, steps: int = 0) -> Tensor:
        """Videos b 3 t h w in [-1, 1] that begin in first frames b 3 h w."""
        video = [first]
        for number in range(1, frames):
            frame = torch.full((len(first),), number, device=first.device)
            told = {"frame": frame, "previous": video[-1], "first": first}
            video.append(self.draw(networks["model"], own, f"{stream}/frame-{number}", {}, told, steps))
        return torch.stack(video, dim=2).clamp(-1, 1)


def build(config: VIDMMotionConfig, env: Env) -> tuple[MotionTask, ClipSource, ClipSource | None]:
    """Task, triples of frames of the training clips and (with `data.val_path`) of the validation clips."""
    clips, source, valid = open_clips(config, config.data, env, latents=False, take="triple")
    return motion_task(config, clips), source, valid


def motion_task(config: VIDMMotionConfig, clips: ClipInfo) -> MotionTask:
    """The task for clips that are known. Raises ConfigError or UserError with one line for what does not fit."""
    steps = config.model.video_timesteps or clips.n_frames
    if clips.n_frames > steps:
        raise ConfigError(f"--video-timesteps {steps}: clips have {clips.n_frames} frames, of which it could not tell the last ones apart")
    size = config.network_size(image_size=clips.image_size, video_timesteps=steps, diffusion_timesteps=config.diffusion.steps)
    denoiser = Denoiser(size, functools.partial(_network, size, config.model.init_from, config.model.spynet))
    return MotionTask(config, clips, NextFrameSpace(clips.image_size), UNCONDITIONAL, denoiser, ANCESTRAL)


def _network(size: MotionUNetConfig, start: str, spynet: str) -> nn.Module:
    """The generator with fresh weights, or with those of a trained one, or of a trained flow network."""
    network = MotionUNet(size)
    if start:
        known = {name: getattr(size, name) for name in ("video_timesteps", *UNTOLD)}
        return started(network, size, load_vidm_motion(start, **known), start, free=FREE)
    if spynet:
        state = load_spynet(spynet)
        device = next(network.parameters()).device  # a dry run builds it on the meta device
        network.spynet.load_state_dict({name: value.to(device) for name, value in state.items()})
    return network
