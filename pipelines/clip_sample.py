"""What `sample.py` needs to know of systems of one latent a clip: settings, how sample number i is made, and how a long one goes on."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from diffusion import DiffusionConfig
from pipelines.clip import ClipPipeline
from pipelines.jobs import SampleConfig, Strip, choose_classes, class_name, in_turn, numbered
from pipelines.loading import Loaded, diffusion_of
from pipelines.runs import find_family
from pipelines.sampling import Sampling, count_steps
from utils.config import flag, to_dict
from utils.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class ClipSampleConfig(SampleConfig):
    """Generates clips, or videos of any length, each clip after the one before."""

    usual_steps: ClassVar[dict[str, int]]
    """Process -> steps where none are given: those of the released checkpoints, and what the straighter paths of a flow need."""

    denoiser: str = flag("", "second-model")
    """Denoiser in place of that in --run: an export or run folder, or an official checkpoint (ema_model_<it>.pth)."""
    ae: str = flag("", "first-model")
    """Autoencoder in place of that in --run: an export or run folder, or an official checkpoint (model_last.pth)."""
    steps: int | None = None
    """Denoising steps of every clip; none: as many as the release takes (PVDM 400, HVDM 100), of a flow 50."""
    next_steps: int | None = None
    """Of the following clips of a long video."""
    eta: float | None = None
    """DDIM: share of fresh noise; 0 is deterministic. none: 1, the release's."""
    guidance_scale: float | None = flag(None, "cfg-scale")
    """Guidance towards the class and the clip before, eps_u + s (eps_c - eps_u); 1: none, as usual. It doubles the cost."""

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        super().validate()
        if not self.run and not self.denoiser:
            raise ConfigError("what to sample from? give --run FOLDER (the --results-dir of training), or --denoiser and --ae")
        self.at_least(1, "next_steps")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ConfigError(f"--eta {self.eta}: between 0 and 1")
        if self.mode == "short" and self.next_steps is not None:
            raise ConfigError(f"--next-steps {self.next_steps}: only --mode long has a second clip")

    def networks(self) -> dict[str, Any]:
        """The exports that the settings name and how they are opened, for a pipeline's `from_exports`. Raises UserError."""
        # A denoiser that is named brings its own autoencoder.
        found = find_family(self.run, self.system) if self.run and not self.denoiser else {}
        named = {"denoiser": self.denoiser or found["denoiser"], "ae": self.ae or found.get("autoencoder", "")}
        return named | {"weights": self.weights, "precision": self.precision}

    def step_counts(self, process: DiffusionConfig) -> tuple[int, int]:
        """Steps of the first clip and of the following ones. Raises ConfigError."""
        usual = min(self.usual_steps[process.process], process.steps)
        return self.steps or usual, self.next_steps or self.steps or usual


class ClipSampleJob:
    """Makes sample number i, and the clips of long ones. What it makes is a function of `settings()` alone."""

    endings = ("",)
    draws = 1

    def __init__(self, config: ClipSampleConfig, pipeline: ClipPipeline) -> None:
        self.config, self.pipeline = config, pipeline
        assert pipeline.denoiser is not None
        self.process = diffusion_of(pipeline.denoiser)
        steps = config.step_counts(self.process)
        self.first, self.following = (_sampling(config, self.process, number, pipeline.bounded) for number in steps)
        self.labels = choose_classes(config.classes, self.pipeline.num_classes, self.pipeline.classes)
        self.fps = config.fps or self.pipeline.fps
        self.n_frames = self.pipeline.clip_shape[0]
        self.notes: list[str] = []
        if config.long:
            self.check_goes_on(pipeline.denoiser)
        if config.mode == "short" and config.num_frames:
            if config.num_frames > self.n_frames:
                raise ConfigError(f"--num-frames {config.num_frames}: a clip has {self.n_frames}; for longer videos add --mode long")
            self.n_frames = config.num_frames
        if config.guidance != 1 and config.mode == "short" and not self.labels:
            self.notes.append(f"warning: --guidance-scale {config.guidance:g} does nothing: a first clip has no condition")

    def check_goes_on(self, denoiser: Loaded) -> None:
        """Raises UserError for a denoiser that makes no clip after another."""
        mode = self.config.mode
        if not denoiser.config.conditional:
            raise UserError(f"--mode {mode}: the denoiser {denoiser.path} was trained without a clip before (model.conditional is off)")
        if mode == "long" and denoiser.card.get("cond_prob") == 0:
            raise UserError(f"--mode long: the denoiser {denoiser.path} was trained on single clips (--cond-prob 0), and cannot go on")

    def label(self, index: int) -> int | None:
        """Class of a sample; None when the model has none."""
        return in_turn(self.labels, index)

    def name(self, index: int) -> str:
        """File name of a sample, without ending."""
        return numbered(index, self.label(index))

    def class_name(self, label: int | None) -> str:
        """Name of a class, where the training data had one."""
        return class_name(self.pipeline.classes, label)

    def generate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The clips b 3 t h w in [-1, 1]."""
        latents = self.sample_clip(indices, 0, None)
        return {"": self.decode_clip(latents, 0)[:, :, : self.n_frames]}

    def new_frames(self, clip: int) -> int:
        """All frames of each clip are new."""
        return self.pipeline.clip_shape[0]

    def sample_clip(self, indices: Sequence[int], clip: int, previous: Tensor | None) -> Tensor:
        """Latents b e ... of clip number `clip` of these samples, after the one with the latents `previous`."""
        return self.pipeline.generate_latents(
            indices,
            self.labels_of(indices),
            seed=self.config.seed,
            sampling=self.following if clip else self.first,
            exact=self.config.exact,
            clip=clip,
            previous=previous,
        )

    def labels_of(self, indices: Sequence[int]) -> list[int] | None:
        """Classes of these samples; None when the model has none."""
        return [self.labels[i % len(self.labels)] for i in indices] if self.labels else None

    def decode_clip(self, latents: Tensor, clip: int) -> Tensor:
        """Its frames, b 3 S h w in [-1, 1]."""
        return self.pipeline.decode_each(latents, self.config.exact)

    def strip(self) -> Strip | None:
        """None: what a sampling looks like is shown by Latte, whose frames are latents by themselves."""
        return None

    def settings(self) -> dict[str, Any]:
        """Plain values: everything that a sample depends on."""
        config, pipeline = self.config, self.pipeline
        assert pipeline.denoiser is not None
        length = {"following": self.following.settings(self.process)} if config.long else {"n_frames": self.n_frames}
        return {
            "system": pipeline.system,
            "seed": config.seed,
            "classes": self.labels,
            "weights": config.weights,
            "ae_weights": pipeline.ae.weights,
            "sha256": {"ae": pipeline.ae.sha256, "denoiser": pipeline.denoiser.sha256},
            "model": to_dict(pipeline.denoiser.config),
            "diffusion": to_dict(self.process),
            "latent": {"scale": pipeline.scale, "shift": pipeline.shift},
            "sampling": self.first.settings(self.process),
            **length,
            "exact": config.exact,
            "precision": config.precision,
            "device": pipeline.device.type,
            "fps": self.fps,
        }

    def sources(self) -> dict[str, str]:
        """Where the networks were read."""
        assert self.pipeline.denoiser is not None
        return {"ae": self.pipeline.ae.path, "denoiser": self.pipeline.denoiser.path}


def _sampling(config: ClipSampleConfig, process: DiffusionConfig, steps: int, bounded: bool) -> Sampling:
    """The releases' sampling in `steps` steps, as far as it suits the process. Raises ConfigError.

    `bounded`: latents lie in [-1, 1], where estimates of them are kept.
    """
    sampler = Sampling(sampler=config.sampler).resolved(process).sampler
    common = Sampling(steps=steps, sampler=sampler, guidance=config.guidance, clip=bounded)
    if sampler == "ddim":
        eta = 1.0 if config.eta is None else config.eta
        common = dataclasses.replace(common, eta=eta, keep_eps=bounded, respacing=f"trailing{steps}")
    elif config.eta is not None:
        common = dataclasses.replace(common, eta=config.eta)
    count_steps(process, common)
    return common.resolved(process)
