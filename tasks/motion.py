"""CMD's motion stage: a DiT that generates motion latents given the content frame (CMD section 3.3; spec systems/cmd.md section 5)."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from datasets.loader import ClipSource
from diffusion import build as build_process
from diffusion import learned_variance
from engine.config import OptimConfig
from engine.task import Batch, LossOutput, Made, Network, Scored
from launch.env import Env
from models.transformers.motion_dit import MotionDiT
from pipelines.sampling import Sampling, sample
from tasks.clips import ClipInfo, Networks, check_held_out, empty_batch, open_clips, units
from tasks.diffusion_checks import check_settings
from tasks.diffusion_task import (
    Condition,
    DenoiserRunConfig,
    DenoiserSizeConfig,
    FirstStage,
    denoising_loss,
    measured,
    named_size,
    open_first_stage,
    say_unused,
)
from utils.config import flag, to_dict
from utils.rng import SampleRng


@dataclasses.dataclass(frozen=True)
class MotionModelConfig(DenoiserSizeConfig):
    name: str = flag("MotionDiT-L/2", "motion-model-config", "model-name")
    """Size: MotionDiT-{S,B,L,XL}/{2,4,8}."""
    keyframe_patch_size: int = flag(4, "keyframe-patch-size")
    """Side of the patches in which the content frame is read; smaller is better and slower."""


@dataclasses.dataclass(frozen=True)
class CMDMotionConfig(DenoiserRunConfig):
    """Trains CMD's motion model."""

    stage: str = "motion"
    """Which of its stages."""
    optim: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(clip_norm=1.0))
    model: MotionModelConfig = dataclasses.field(default_factory=MotionModelConfig)

    def validate(self) -> None:
        """Raises ConfigError on settings and combinations that cannot work."""
        super().validate()
        check_settings("MotionDiT", self.model.name, self.condition, self.preview, self.diffusion, self.best)


class CMDMotionTask:
    """Trains `motion` on the motion latents of a frozen `ae`, with the content frame as its keyframe."""

    name = "cmd-motion"

    def __init__(self, config: CMDMotionConfig, clips: ClipInfo, first: FirstStage) -> None:
        self.config = config
        self.clips = clips
        self.first = first
        self.condition = Condition.of(config.condition, clips)
        self.process = build_process(config.diffusion)
        ae = first.ae.config
        self.model_config = named_size(
            "MotionDiT",
            config.model,
            input_size=ae.latent_size,
            in_channels=ae.embed_dim,
            keyframe_size=first.size,
            keyframe_channels=first.channels,
            keyframe_patch_size=config.model.keyframe_patch_size,
            learn_sigma=learned_variance(config.diffusion),
            **self.condition.overrides(),
        )

    def networks(self) -> dict[str, Network]:
        """`motion`, then the frozen networks before it."""
        ema = self.config.ema if self.config.ema.decay > 0 else None
        motion = Network(MotionDiT(self.model_config), optim=self.config.optim, ema=ema, units=units)
        return {"motion": motion} | self.first.networks()

    def phases(self, step: int) -> tuple[str, ...]:
        """Always the motion model."""
        return ("motion",)

    def loss(self, phase: str, networks: Networks, batch: Batch, rng: SampleRng) -> LossOutput:
        """Diffusion loss of the motion latents, given the true content frames."""
        content, motion = self.first.latents(networks, batch, rng)
        given = {"keyframe": content} | self.condition.training(batch, rng)
        return denoising_loss(self.process, networks["motion"], motion, rng, given)

    def batch_spec(self, batch_size: int) -> Batch:
        """An empty micro-batch on the meta device."""
        return empty_batch(self.clips, batch_size)

    def evaluate(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, tuple[Tensor, int]]:
        """The loss with every condition kept, at the timesteps and with the noise that belong to the samples."""
        content, motion = self.first.latents(networks, batch, rng)
        given = {"keyframe": content} | self.condition.given(batch)
        return measured(denoising_loss(self.process, networks["motion"], motion, rng, given))

    def preview(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Each clip (of latent shards its reconstruction) above one with the same content frame and a generated motion."""
        setting = self.config.preview
        batch = {name: value[: setting.samples] for name, value in batch.items()}
        few = SampleRng(rng.seed, rng.index[: setting.samples], rng.device)
        content, _ = self.first.latents(networks, batch, few)
        own = SampleRng(self.config.train.seed, torch.arange(len(content)), content.device)
        clips = self.first.shown(networks, self.first.clips(networks, batch, few))
        return {"motion_samples": torch.cat([clips, self._drawn(networks, batch, content, own, "preview", setting.steps)], dim=3)}

    def scored(self) -> Scored:
        """Clips with true content frames."""
        clips = self.clips
        what = "generated for true content frames"
        return Scored(what, clips.n_frames, clips.image_size, label="motion_", stride=clips.frame_interval)

    def make(self, networks: Networks, batch: Batch, rng: SampleRng) -> Made:
        """A clip with the content frame and the condition of each sample."""
        content, _ = self.first.latents(networks, batch, rng)
        return Made(self._drawn(networks, batch, content, rng, "score", self.config.score.steps or self.config.preview.steps))

    def _drawn(self, networks: Networks, batch: Batch, content: Tensor, own: SampleRng, stream: str, steps: int) -> Tensor:
        """Clips b 3 t h w in [-1, 1] with generated motion, of content frames b C h w."""
        ae = self.first.ae.config
        guidance = self.condition.guidance(self.config.preview)
        latents = sample(
            networks["motion"],
            self.config.diffusion,
            (ae.embed_dim, *ae.latent_size),
            own,
            stream,
            Sampling(steps=steps, guidance=guidance),
            condition=self.condition.given(batch),
            always={"keyframe": content},
        )
        return self.first.shown(networks, networks["ae"].decode(content, latents).float())

    def state(self) -> dict[str, int | float]:
        """Nothing of its own."""
        return {}

    def load_state(self, state: dict[str, int | float]) -> None:
        """Nothing of its own."""

    def card(self) -> dict[str, Any]:
        """What sampling needs to rebuild and use the motion model."""
        return {
            "system": "cmd",
            "stage": "motion",
            "model": to_dict(self.model_config),
            "diffusion": to_dict(self.config.diffusion),
            "ae": self.first.card(),
            "data": self.clips.card(),
        }


def build(config: CMDMotionConfig, env: Env) -> tuple[CMDMotionTask, ClipSource, ClipSource | None]:
    """Task, training clips and (with `data.val_path`) validation clips."""
    say_unused(config.final, env.is_main)
    clips, source, valid = open_clips(config, config.data, env)
    check_held_out(clips, valid, labels=config.condition.num_classes != 0, vectors=config.condition.use_text_embed)
    return CMDMotionTask(config, clips, open_first_stage(config.ae, config.vae, clips)), source, valid
