"""One call that draws from a diffusion model, with noise that belongs to the sample and not to the batch it is in."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion import DiffusionConfig, FlowMatching, GaussianDiffusion, Process, build
from diffusion.dpm_solver import dpm_solver_sample
from diffusion.flow_samplers import euler_sample, heun_sample
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.samplers import Callback, Noise, ddim_sample, ddpm_sample
from utils.config import to_dict
from utils.errors import ConfigError, UserError
from utils.rng import SampleRng

Sampler = Literal["auto", "ddim", "ddpm", "dpm++", "euler", "heun"]
SAMPLERS: dict[str, tuple[Sampler, ...]] = {"ddpm": ("ddim", "ddpm", "dpm++"), "flow": ("euler", "heun")}
"""Process -> its samplers, the first of which is `auto`."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw from one diffusion model."""

    steps: int = 50
    """Denoising steps, spread evenly over those of training."""
    sampler: Sampler = "auto"
    """ddim, ddpm (ancestral) or dpm++ (DPM-Solver++(2M)); of a flow euler or heun. auto: ddim, of a flow euler."""
    eta: float = 0.0
    """DDIM: share of fresh noise; 0 is deterministic."""
    guidance: float = 1.0
    """Scale s of classifier-free guidance, eps_u + s (eps_c - eps_u); 1: none."""
    cfg_channels: int | None = None
    """Channels that are guided; None: all. The published DiT and CMD samplers guide 3."""
    clip: bool = False
    """Keep the estimate of the clean sample in [-1, 1] at each step (for data of that range)."""
    respacing: str = ""
    """Which steps of training are taken, in place of `steps`: "50" evenly, "10,15,20" per equal section, "ddim50" at one stride from 0,
    "trailing50" at one stride that ends in the noisiest."""
    keep_eps: bool = False
    """DDIM with `clip`: a step takes the noise as the network predicts it, not the one that leads to the clipped sample (PVDM)."""

    def resolved(self, diffusion: DiffusionConfig) -> "Sampling":
        """The same with `auto` replaced. Raises ConfigError with one line when it does not suit the process."""
        if not math.isfinite(self.guidance):
            raise ConfigError(f"guidance {self.guidance}: a number, 1 for none")
        known = SAMPLERS[diffusion.process]
        if self.sampler not in ("auto", *known):
            raise ConfigError(f"sampler {self.sampler}: the model's process is {diffusion.process}, which has {', '.join(known)}")
        sampler = known[0] if self.sampler == "auto" else self.sampler
        if self.eta and sampler != "ddim":
            raise ConfigError(f"eta {self.eta}: only ddim has a share of fresh noise to set, not {sampler}")
        if self.keep_eps and not (sampler == "ddim" and self.clip):
            raise ConfigError(f"keep_eps: only ddim with clip has a noise to keep, not {sampler}{'' if self.clip else ' without clip'}")
        if self.respacing and diffusion.process == "flow":
            raise ConfigError(f"respacing {self.respacing!r}: a flow has no steps to choose from, give a number of steps")
        return dataclasses.replace(self, sampler=sampler)

    def settings(self, diffusion: DiffusionConfig) -> dict[str, Any]:
        """Plain values that a draw depends on. A setting that was added since and does nothing is left out, so that records of
        older samples stay equal."""
        values = to_dict(self.resolved(diffusion))
        return {name: value for name, value in values.items() if value or name not in ("respacing", "keep_eps")}


Watch = Callable[[int, int], None]
"""Is told how many steps of a draw are done, and how many it has; may raise."""
_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched_steps(watch: Watch) -> Iterator[None]:
    """Every step of the draws of this thread is told to `watch` inside the block."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


def _watched(callback: Callback | None, steps: int) -> Callback | None:
    """A callback that also tells the step to who watches, if anyone does."""
    watch = _WATCH.get()
    if watch is None:
        return callback

    def both(k: int, x: Tensor, x0: Tensor) -> None:
        watch(k + 1, steps)
        if callback is not None:
            callback(k, x, x0)

    return both


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
    null: Mapping[str, Tensor | float] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """One draw (*shape) for each sample of `rng`, (b, *shape) float32 on its device.

    `condition` (`y`, `cond`, a previous clip) is what guidance takes away in its second half, `always` (the keyframe) what both halves
    keep. Taking away is the network's own matter (`drop`), except for a condition with a value in `null`, which is set to that value.
    `callback(k, x, x0)` sees x after step k of `count_steps` and the estimate of the clean sample that led to it.
    Raises ConfigError when the sampling does not suit the process.
    """
    given = dict(condition or {})
    if given and sampling.guidance != 1:
        without = {name: value for name, value in (null or {}).items() if name in given}
        if given.keys() - without.keys():
            given["drop"] = torch.zeros(len(rng), dtype=torch.bool, device=rng.device)
            without["drop"] = True
        model = ClassifierFreeGuidance(model, sampling.guidance, without, sampling.cfg_channels)
    kwargs = given | dict(always or {})
    sampling = sampling.resolved(diffusion)
    process = respaced(diffusion, sampling.respacing or sampling.steps)
    callback = _watched(callback, count_steps(diffusion, sampling))
    start = rng.normal(f"{stream}/start", shape)

    def noise(step: int) -> Tensor:
        return rng.normal(f"{stream}/step-{step}", shape)

    if isinstance(process, FlowMatching):
        integrate = heun_sample if sampling.sampler == "heun" else euler_sample
        return integrate(process, model, start, steps=sampling.steps, clip_denoised=sampling.clip, model_kwargs=kwargs, callback=callback)
    return _denoise(process, model, start, sampling, noise, kwargs, callback)


def _denoise(
    process: GaussianDiffusion,
    model: Callable[..., Tensor],
    start: Tensor,
    sampling: Sampling,
    noise: Noise,
    kwargs: Mapping[str, Tensor],
    callback: Callback | None,
) -> Tensor:
    """`start` through a process of noising steps."""
    if sampling.sampler == "ddpm":
        return ddpm_sample(process, model, start, noise=noise, clip_denoised=sampling.clip, model_kwargs=kwargs, callback=callback)
    if sampling.sampler == "dpm++":
        return dpm_solver_sample(process, model, start, clip_denoised=sampling.clip, model_kwargs=kwargs, callback=callback)
    return ddim_sample(
        process,
        model,
        start,
        noise=noise,
        eta=sampling.eta,
        clip_denoised=sampling.clip,
        keep_eps=sampling.keep_eps,
        model_kwargs=kwargs,
        callback=callback,
    )


def in_groups(
    indices: Sequence[int],
    labels: Sequence[int] | None,
    cond: Tensor | None,
    *,
    seed: int,
    num_classes: int,
    exact: bool,
    device: torch.device,
) -> Iterator[tuple[list[int], SampleRng, dict[str, Tensor]]]:
    """The samples that go through the networks together: positions in `indices`, their noise, and their conditions (`y`, `cond`).

    With `exact` each one alone, because a matrix product may round differently in a larger batch; without, all. `labels` and `cond`
    belong to `indices`. Raises UserError for a class that the models do not know, where they know any.
    """
    wrong = [label for label in labels or () if not 0 <= label < num_classes]
    if wrong and num_classes:
        raise UserError(f"there is no class {wrong[0]}: {num_classes} classes are known, 0 to {num_classes - 1}")
    for group in [[i] for i in range(len(indices))] if exact else [list(range(len(indices)))]:
        given: dict[str, Tensor] = {}
        if labels is not None:
            given["y"] = torch.tensor([labels[i] for i in group], device=device)
        if cond is not None:
            given["cond"] = cond[group].to(device)
        yield group, SampleRng(seed, torch.tensor([indices[i] for i in group]), device), given


def count_steps(diffusion: DiffusionConfig, sampling: Sampling) -> int:
    """How many steps a sampling takes. Raises ConfigError when it does not suit the process."""
    sampling = sampling.resolved(diffusion)
    process = respaced(diffusion, sampling.respacing or sampling.steps)
    return sampling.steps if isinstance(process, FlowMatching) else process.num_timesteps


@lru_cache(maxsize=16)
def respaced(diffusion: DiffusionConfig, steps: int | str) -> Process:
    """The process in `steps` evenly spread steps, or in those of a respacing string; a flow has no steps of its own.

    Raises ConfigError when that cannot be done.
    """
    if diffusion.process == "flow":
        if isinstance(steps, int) and steps < 1:
            raise ConfigError(f"{steps} sampling steps: at least 1")
        return build(diffusion)
    if isinstance(steps, int) and not 1 <= steps <= diffusion.steps:
        raise ConfigError(f"{steps} sampling steps: the model was trained with {diffusion.steps}, so 1 to {diffusion.steps} are possible")
    return build(dataclasses.replace(diffusion, respacing=str(steps)))
