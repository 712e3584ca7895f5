"""Denoisers on the latents of a frozen first stage, or on frames. A system brings its space (what a batch is there) and its network."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusion import build as build_process
from engine.task import Batch, LossOutput, Made, Network, Scored
from pipelines.sampling import Sampling, sample
from tasks.clips import ClipInfo, Networks, empty_batch, units
from tasks.diffusion_task import Condition, PreviewConfig, denoising_loss, measured
from tasks.latent_config import SpaceRunConfig
from utils.config import to_dict
from utils.rng import SampleRng


class LatentSpace(Protocol):
    """Where a denoiser works: the latents of a frozen first stage, at zero mean and unit variance, or frames in [-1, 1]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the latents of one sample, channels first."""

    def networks(self) -> dict[str, Network]:
        """Frozen networks by name; none where the shards hold latents and nobody asks for pictures."""

    def latents(self, networks: Networks, batch: Batch, rng: SampleRng) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's latents, (b, *shape) float32, and what else the denoiser is told of these samples, as keyword arguments."""

    def after(self, latents: Tensor) -> dict[str, Tensor] | None:
        """What the denoiser is told where samples go on after these; None where they cannot."""

    def starts(self, networks: Networks, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Other ways to begin clips that are worth looking at: name -> what the denoiser is told for as many as the batch has, of them."""

    def show(self, networks: Networks, latents: Tensor) -> Tensor:
        """Latents (b, *shape) as clips b 3 t h w in [-1, 1], or as pictures b 3 h w."""

    def state(self) -> dict[str, int | float]:
        """Numbers that must survive a restart."""

    def load_state(self, state: dict[str, int | float]) -> None:
        """Takes back what `state` gave."""

    def card(self) -> dict[str, Any]:
        """What ties an export to its first stage: plain values for its card."""


@dataclass(frozen=True)
class Denoiser:
    """The network that is trained."""

    config: Any
    build: Callable[[], nn.Module]
    """Makes it with its first weights."""


PLAIN = Sampling()


class LatentTask:
    """Trains `model` to remove noise from the latents of `space`."""

    def __init__(
        self,
        config: SpaceRunConfig,
        clips: ClipInfo,
        space: LatentSpace,
        condition: Condition,
        denoiser: Denoiser,
        sampling: Sampling = PLAIN,
    ) -> None:
        """`sampling`: of previews, but for the number of steps and the guidance, which are settings."""
        self.name = f"{config.system}-{config.stage}"
        self.config = config
        self.clips = clips
        self.space = space
        self.condition = condition
        self.denoiser = denoiser
        self.sampling = sampling
        self.measures: list[Callable[[], None]] = []
        """What `measure` calls."""
        self.process = build_process(config.diffusion)

    def networks(self) -> dict[str, Network]:
        """`model`, then the frozen networks before it."""
        ema = self.config.ema if self.config.ema.decay > 0 else None
        return {"model": Network(self.denoiser.build(), optim=self.config.optim, ema=ema, units=units)} | self.space.networks()

    def phases(self, step: int) -> tuple[str, ...]:
        """Always the denoiser."""
        return ("model",)

    def loss(self, phase: str, networks: Networks, batch: Batch, rng: SampleRng) -> LossOutput:
        """Diffusion loss of the latents."""
        latents, told = self.space.latents(networks, batch, rng)
        return denoising_loss(self.process, networks["model"], latents, rng, self.condition.training(batch, rng) | told)

    def batch_spec(self, batch_size: int) -> Batch:
        """An empty micro-batch on the meta device."""
        return empty_batch(self.clips, batch_size)

    def evaluate(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, tuple[Tensor, int]]:
        """The loss with every condition kept, at the timesteps and with the noise that belong to the samples."""
        latents, told = self.space.latents(networks, batch, rng)
        return measured(denoising_loss(self.process, networks["model"], latents, rng, self.condition.given(batch) | told))

    def preview(self, networks: Networks, batch: Batch, rng: SampleRng) -> dict[str, Tensor]:
        """Clips of a few classes, always from the same noise; each goes on for a second clip where the space knows how. And clips that
        begin in the other ways that it knows."""
        drawn = functools.partial(self.draw, networks["model"], self.noise(batch["label"].device))
        given = self.condition.grid(self.config.preview.samples, batch)
        latents = drawn("preview", given)
        clips = [self.space.show(networks, latents)]
        after = self.space.after(latents)
        if after is not None:
            clips.append(self.space.show(networks, drawn("preview/next", given, after)))
        found = {"samples": torch.cat(clips, dim=2).clamp(-1, 1)}
        some = self.shown(batch)
        for name, told in self.space.starts(networks, some).items():
            found[name] = self.space.show(networks, drawn(f"preview/{name}", self.condition.given(some), told)).clamp(-1, 1)
        return found

    def shown(self, batch: Batch) -> Batch:
        """As many samples of a batch as a preview has, in turn."""
        turn = torch.arange(self.config.preview.samples)
        return {name: value[turn.to(value.device) % len(value)] for name, value in batch.items()}

    def noise(self, device: torch.device) -> SampleRng:
        """That of the samples of a preview."""
        return SampleRng(self.config.train.seed, torch.arange(self.config.preview.samples), device)

    def draw(
        self,
        model: nn.Module,
        own: SampleRng,
        stream: str,
        given: dict[str, Tensor],
        told: dict[str, Tensor] | None = None,
        steps: int = 0,
    ) -> Tensor:
        """A draw for each of the samples of `own`, (b, *shape), from the noise that belongs to the stream. `given`, `told`: as `condition`
        and `always` of `pipelines.sampling.sample`. `steps` 0: those of previews."""
        setting = self.config.preview
        guidance = self.condition.guidance(setting) if isinstance(setting, PreviewConfig) else 1.0
        sampling = dataclasses.replace(self.sampling, steps=steps or setting.steps, guidance=guidance)
        return sample(model, self.config.diffusion, self.space.shape, own, stream, sampling, condition=given, always=told)

    def scored(self) -> Scored:
        """Generated clips, at the first of the distances of frames that the denoiser knows; of first frames pictures."""
        clips = self.clips
        stride = clips.strides[0] if clips.strides else clips.frame_interval
        blind = clips.latents is not None and not self.space.networks()
        missing = "nothing decodes what is generated: give the autoencoder with --ae" if blind else ""
        return Scored("generated", 1 if clips.take == "first" else clips.n_frames, clips.image_size, stride=stride, missing=missing)

    def make(self, networks: Networks, batch: Batch, rng: SampleRng) -> Made:
        """A clip or picture for the condition of each sample, which goes on from nothing."""
        given = Condition.given(self.condition, batch)  # a system's own may add what is trained beside clips
        told = {}
        if self.clips.strides:
            told["stride"] = torch.zeros(len(rng), dtype=torch.int64, device=rng.device)
        latents = self.draw(networks["model"], rng, "score", given, told, self.config.score.steps)
        return Made(self.space.show(networks, latents).clamp(-1, 1))

    def measure(self) -> None:
        """Measures, on every rank, what a run keeps as it began."""
        for measure in self.measures:
            measure()

    def state(self) -> dict[str, int | float]:
        """What the space has measured."""
        return self.space.state()

    def load_state(self, state: dict[str, int | float]) -> None:
        """Takes back what `state` gave."""
        self.space.load_state(state)

    def card(self) -> dict[str, Any]:
        """What sampling needs to rebuild and use the denoiser."""
        return {
            "system": self.config.system,
            "stage": self.config.stage,
            "model": to_dict(self.denoiser.config),
            "diffusion": to_dict(self.config.diffusion),
            **self.space.card(),
            "data": self.clips.card(),
        }
