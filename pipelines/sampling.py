"""One call that draws from a diffusion model, with noise that belongs to the sample and not to the batch it is in."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from diffusion import DiffusionConfig, GaussianDiffusion, build
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.samplers import ddim_sample, ddpm_sample
from utils.errors import ConfigError
from utils.rng import SampleRng


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw from one diffusion model."""

    steps: int = 50
    """Denoising steps, spread evenly over those of training."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """DDIM, or ancestral sampling (DDPM)."""
    eta: float = 0.0
    """DDIM: share of fresh noise; 0 is deterministic."""
    guidance: float = 1.0
    """Scale s of classifier-free guidance, eps_u + s (eps_c - eps_u); 1: none."""
    cfg_channels: int | None = None
    """Channels that are guided; None: all. The published DiT and CMD samplers guide 3."""
    clip: bool = False
    """Keep the estimate of the clean sample in [-1, 1] at each step (for data of that range)."""


def sample(
    model: Callable[..., Tensor],
    diffusion: DiffusionConfig,
    shape: tuple[int, ...],
    rng: SampleRng,
    stream: str,
    sampling: Sampling,
    *,
    condition: Mapping[str, Tensor] | None = None,
    always: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """One draw (*shape) for each sample of `rng`, (b, *shape) float32 on its device.

    `condition` (`y` or `cond`) is what guidance takes away in its second half, `always` (the keyframe) what both halves keep.
    """
    given = dict(condition or {})
    if given and sampling.guidance != 1:
        given["drop"] = torch.zeros(len(rng), dtype=torch.bool, device=rng.device)
        model = ClassifierFreeGuidance(model, sampling.guidance, {"drop": True}, sampling.cfg_channels)
    kwargs = given | dict(always or {})
    start = rng.normal(f"{stream}/start", shape)

    def noise(step: int) -> Tensor:
        return rng.normal(f"{stream}/step-{step}", shape)

    process = respaced(diffusion, sampling.steps)
    if sampling.sampler == "ddpm":
        return ddpm_sample(process, model, start, noise=noise, clip_denoised=sampling.clip, model_kwargs=kwargs)
    return ddim_sample(process, model, start, noise=noise, eta=sampling.eta, clip_denoised=sampling.clip, model_kwargs=kwargs)


@lru_cache(maxsize=16)
def respaced(diffusion: DiffusionConfig, steps: int) -> GaussianDiffusion:
    """The process in `steps` evenly spread steps. Raises ConfigError when there are fewer in it."""
    if not 1 <= steps <= diffusion.steps:
        raise ConfigError(f"{steps} sampling steps: the model was trained with {diffusion.steps}, so 1 to {diffusion.steps} are possible")
    return build(dataclasses.replace(diffusion, respacing=str(steps)))
