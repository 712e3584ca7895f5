"""VIDM's motion stage: a model of frame r of a clip, given its first frame and frame r - 1, and the flow network with it
(spec, vidm.md sections 3 and 7)."""

import functools

import torch
from torch import Tensor, nn

from datasets.loader import ClipSource
from engine.task import Batch
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
        drawn = functools.partial(self.draw, networks["model"], current.device, given={})
        row = [told["first"], told["previous"], current, drawn("preview/next", told=told)]
        found = {"next": torch.cat(row, dim=3).clamp(-1, 1)}
        video = [told["first"]]
        for number in range(1, min(self.config.preview.frames, self.denoiser.config.video_timesteps)):
            frame = torch.full((len(current),), number, device=current.device)
            video.append(drawn(f"preview/frame-{number}", told={"frame": frame, "previous": video[-1], "first": video[0]}))
        return found | ({"video": torch.stack(video, dim=2).clamp(-1, 1)} if len(video) > 1 else {})


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
