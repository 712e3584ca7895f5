"""CMD's content stage: a DiT that generates content frames (CMD section 3.2; spec systems/cmd.md section 6)."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from datasets.loader import ClipSource
from diffusion import build as build_process
from diffusion import learned_variance
from engine.task import Batch, LossOutput, Made, Network, Scored
from launch.env import Env
from models.transformers.dit import ContentDiT
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
class ContentModelConfig(DenoiserSizeConfig):
    name: str = flag("ContentDiT-L/2", "motion-model-config", "model-name")
    """Size: ContentDiT-{S,B,L,XL}/{2,4,8}."""


@dataclasses.dataclass(frozen=True)
class CMDContentConfig(DenoiserRunConfig):
    """Trains CMD's content model."""

    stage: str = "content"
    """Which of its stages."""
    model: ContentModelConfig = dataclasses.field(default_factory=ContentModelConfig)

    def validate(self) -> None:
        """Raises ConfigError on settings and combinations that cannot work."""
        super().validate()
        check_settings("ContentDiT", self.model.name, self.condition, self.preview, self.diffusion, self.best)


class CMDContentTask:
    """Trains `content` on the content frames of a frozen `ae`."""

    name = "cmd-content"

    def __init__(self, config: CMDContentConfig, clips: ClipInfo, first: FirstStage) -> None:
        self.config = config
        self.clips = clips
        self.first = first
        self.condition = Condition.of(config.condition, clips)
        self.process = build_process(config.diffusion)
        self.model_config = named_size(
            "ContentDiT",
            config.model,
            input_size=first.size,
            in_channels=first.channels,
            learn_sigma=learned_variance(config.diffusion),
            **self.condition.overrides(),
        )

    def networks(self) -> dict[str, Network]:
        """`content`, then the frozen networks before it."""
        ema = self.config.ema if self.config.ema.decay > 0 else None
        content = Network(ContentDiT(self.model_config), optim=self.config.optim, ema=ema, units=units)
        return {"content": content} | self.first.networks()

    def phases(self, step: int) -> tuple[str, ...]:
        """Always the content model."""
        return ("content",)

    def loss(self, phase: str, networks: Networks, batch: Batch, rng: SampleRng) -> LossOutput:
        """Diffusion loss of the content frames."""
        content, _ = self.first.latents(networks, batch, rng)
        return denoising_loss(self.process, networks["content"], content, rng, self.condition.training(batch, rng))

    def batch_spec(self, batch_size: int) -> Batch:
        """An empty micro-batch on the meta device."""
        return empty_batch(self.clips, batch_size)

    def evaluate(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, tuple[Tensor, int]]:
        """The loss with every condition kept, at the timesteps and with the noise that belong to the samples."""
        content, _ = self.first.latents(networks, batch, rng)
        return measured(denoising_loss(self.process, networks["content"], content, rng, self.condition.given(batch)))

    def preview(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Content frames of a few classes, always from the same noise."""
        setting, device = self.config.preview, batch["label"].device
        own = SampleRng(self.config.train.seed, torch.arange(setting.samples), device)
        given = self.condition.grid(setting.samples, batch)
        return {"content_samples": self._drawn(networks, own, "preview", setting.steps, given)}

    def scored(self) -> Scored:
        """Content frames, beside those of the same samples' clips: they are no frames of a video."""
        clips = self.clips
        return Scored("generated as content frames", 1, clips.image_size, label="content_", originals=True)

    def make(self, networks: Networks, batch: Batch, rng: SampleRng) -> Made:
        """A content frame for the condition of each sample, and that of its clip."""
        content, _ = self.first.latents(networks, batch, rng)
        steps = self.config.score.steps or self.config.preview.steps
        made = self._drawn(networks, rng, "score", steps, self.condition.given(batch))
        return Made(made, self.first.shown(networks, content[:, :, None])[:, :, 0])

    def _drawn(self, networks: Networks, own: SampleRng, stream: str, steps: int, given: dict[str, Tensor]) -> Tensor:
        """Content frames b 3 h w in [-1, 1] for the samples of `own`."""
        guidance = self.condition.guidance(self.config.preview)
        sampling = Sampling(steps=steps, guidance=guidance, clip=self.first.vae is None)
        shape = (self.first.channels, *self.first.size)
        frames = sample(networks["content"], self.config.diffusion, shape, own, stream, sampling, condition=given)
        return self.first.shown(networks, frames[:, :, None])[:, :, 0]

    def state(self) -> dict[str, int | float]:
        """Nothing of its own."""
        return {}

    def load_state(self, state: dict[str, int | float]) -> None:
        """Nothing of its own."""

    def card(self) -> dict[str, Any]:
        """What sampling needs to rebuild and use the content model."""
        return {
            "system": "cmd",
            "stage": "content",
            "model": to_dict(self.model_config),
            "diffusion": to_dict(self.config.diffusion),
            "ae": self.first.card(),
            "data": self.clips.card(),
        }


def build(config: CMDContentConfig, env: Env) -> tuple[CMDContentTask, ClipSource, ClipSource | None]:
    """Task, training clips and (with `data.val_path`) validation clips."""
    say_unused(config.final, env.is_main)
    clips, source, valid = open_clips(config, config.data, env)
    check_held_out(clips, valid, labels=config.condition.num_classes != 0, vectors=config.condition.use_text_embed)
    return CMDContentTask(config, clips, open_first_stage(config.ae, config.vae, clips)), source, valid
