"""Checks of PVDM's diffusion: tables and sampling times, trajectories of its samplers, the training loss, a chain of clips."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion import DiffusionConfig, GaussianDiffusion, build
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.samplers import ddim_sample, ddpm_sample
from diffusion.schedules import space_timesteps
from tests.parity.case import Case, adapter

ABS, TABLES = 2e-5, 1e-5
LOSSES = {"l1": "l1", "l2": "mse"}


def process(case: Case, **changed: Any) -> GaussianDiffusion:
    """The process of a case: roots of beta on a straight line, the posterior's variance."""
    ends = {"beta_start": case.config("linear_start", 0.0), "beta_end": case.config("linear_end", 0.0)}
    built = build(DiffusionConfig(steps=case.config("timesteps", 1000), schedule="quad", variance="fixed_small", **ends, **changed))
    assert isinstance(built, GaussianDiffusion)
    return built


def stub(x: Tensor, t: Tensor, previous: Tensor | float = 0.0) -> Tensor:
    """The closed-form network that the cases' notes state."""
    return torch.tanh(0.9 * x + 0.3 * previous + 0.0005 * t.reshape(-1, *[1] * (x.ndim - 1)))


def drawn(case: Case, model: Callable[..., Tensor], x_T: Tensor, steps: int, noise: Tensor, previous: Tensor | None) -> Tensor:
    """One draw, by DDIM from the noisiest step with the noise as predicted, or by all steps of the ancestral sampler."""
    kwargs = {} if previous is None else {"previous": previous}
    clip = case.config("clip_x0", True)
    if case.config("kind", "ddim") == "ddpm_ancestral":
        diffusion = process(case)
        assert diffusion.num_timesteps == steps
        return ddpm_sample(diffusion, model, x_T, noise=noise.__getitem__, clip_denoised=clip, model_kwargs=kwargs)
    diffusion, eta = process(case, respacing=f"trailing{steps}"), case.config("eta")
    return ddim_sample(diffusion, model, x_T, noise=noise.__getitem__, eta=eta, clip_denoised=clip, keep_eps=True, model_kwargs=kwargs)


def guided(case: Case, model: Callable[..., Tensor], previous: Tensor | None) -> Callable[..., Tensor]:
    """Guidance away from no previous clip. The ancestral sampler of the release has none."""
    w = case.config("w")
    if previous is None or case.config("kind", "ddim") == "ddpm_ancestral":
        return model
    return ClassifierFreeGuidance(model, 1 + w, {"previous": 0.0})


@adapter("pvdm", "schedule")
def check_schedule(case: Case) -> None:
    diffusion = process(case)
    ours = {name: torch.from_numpy(table) for name, table in diffusion.tables.items()}
    # The release clips the variance at 1e-20, which is reached at index 0 only; ours has the next entry there, and nothing reads either.
    ours["posterior_log_variance_clipped"] = torch.from_numpy(np.log(diffusion.tables["posterior_variance"].clip(1e-20)))
    for name in case.names("out/"):
        table = name.removeprefix("out/")
        if table.startswith("ddim_times_"):
            kept = space_timesteps(diffusion.num_timesteps, f"trailing{table.removeprefix('ddim_times_')}")
            case.compare(name, torch.tensor([*reversed(kept), -1]), 0)
        else:
            case.compare(name, ours[table], TABLES, each=True)


@adapter("pvdm", "sampler")
def check_sampler(case: Case) -> None:
    previous = case.input("cond") if case.config("conditional") else None
    model, fed = guided(case, stub, previous), []

    def recorded(x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        fed.append(x)
        return model(x, t, **kwargs)

    x_T, noise = case.input("x_T"), case.input("step_noise")
    case.expect("sample", drawn(case, recorded, x_T, case.config("sampling_timesteps"), noise, previous), 0, ABS)
    case.expect("trajectory", torch.stack(fed), 0, ABS)


@adapter("pvdm", "long_video_chain")
def check_chain(case: Case) -> None:
    x_T, first, following = case.input("x_T"), case.config("first_steps"), case.config("next_steps")

    def sample_clip(k: int, previous: Tensor | None) -> Tensor:
        steps = first if previous is None else following
        return drawn(case, guided(case, stub, previous), x_T[k], steps, case.input(f"step_noise_{k}"), previous)

    clips: list[Tensor] = []
    for k in range(case.config("clips")):
        clips.append(sample_clip(k, clips[-1] if clips else None))
    case.expect("clips", torch.stack(clips), 0, ABS)
