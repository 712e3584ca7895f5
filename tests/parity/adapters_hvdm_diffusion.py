"""Checks of HVDM's diffusion: tables and sampling times, DDIM, the training loss with one ancestral step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.guidance import ClassifierFreeGuidance
from diffusion.samplers import Callback
from diffusion.schedules import space_timesteps
from tests.parity.adapters_hvdm_unet import case_unet, gradients, volume
from tests.parity.adapters_pvdm_diffusion import LOSSES, drawn, expect_tables, process
from tests.parity.case import Case, adapter

STEPS, LOSS = 5e-4, 1e-5
"""Of samples, whose first step divides by 0.012, and of losses."""
NORMS, SMALLEST = 1e-3, 1e-6
"""Norms of gradients: relative, and absolute."""


def guided(case: Case, model: Callable[..., Tensor], previous: Tensor | None) -> Callable[..., Tensor]:
    """Guidance away from no latent before, where there is one."""
    w = case.config("guidance_w", 0.0)
    return model if previous is None else ClassifierFreeGuidance(model, 1 + w, {"previous": 0.0})


def ddim(
    case: Case, model: Callable[..., Tensor], x: Tensor, noise: Tensor | None, previous: Tensor | None, callback: Callback | None = None
) -> Tensor:
    """The sample that DDIM makes of x in the case's steps; `noise` (steps - 1, ...) may be missing where eta is 0."""
    kept = space_timesteps(case.config("T", 1000), f"trailing{case.config('steps')}")
    draws = (lambda k: torch.zeros_like(x)) if noise is None else noise.__getitem__
    return drawn(case, kept, guided(case, model, previous), x, draws, previous, callback)


@adapter("hvdm", "schedule")
def check_schedule(case: Case) -> None:
    assert case.config("schedule", "sqrt-linear") == "sqrt-linear", "the release's only choice: roots of beta on a straight line"
    expect_tables(case, process(case, steps=case.config("T", 1000)))


@adapter("hvdm", "ddim")
def check_ddim(case: Case) -> None:
    model = case_unet(case, case.fields)
    kept = space_timesteps(case.config("T", 1000), f"trailing{case.config('steps')}")
    if case.has("in/times"):
        assert case.input("times").tolist() == [*reversed(kept), -1]
    states, estimates = [volume(case.input("init"), model)], []

    def see(_: int, x: Tensor, x0: Tensor) -> None:
        states.append(x)
        estimates.append(x0)

    noise, previous = (volume(case.input(name), model) if case.has(f"in/{name}") else None for name in ("noise", "cond"))
    assert noise is not None or not case.config("eta")
    ddim(case, model, states[0], noise, previous, see)
    case.expect("sample", states[-1].flatten(2), 0, STEPS)
    case.expect("x", torch.stack(states[:-1]).flatten(3), 0, STEPS)
    case.expect("x0", torch.stack(estimates).flatten(3), 0, STEPS)


@adapter("hvdm", "diffusion_loss")
def check_loss(case: Case) -> None:
    diffusion, model = process(case, loss=LOSSES[case.config("loss", "l2")]), case_unet(case, case.fields)
    x0, noise = volume(case.input("x0"), model), volume(case.input("noise"), model)
    t = case.input("t")
    kwargs: dict[str, Any] = {"previous": volume(case.input("cond"), model)} if case.has("in/cond") else {}
    errors = diffusion.training_losses(model, x0, t, noise, kwargs)["loss"]
    errors.mean().backward()
    case.expect("loss", errors.mean().reshape(1), LOSS)
    case.expect("loss_per_sample", errors, LOSS)
    case.expect("x_t", diffusion.q_sample(x0, t, noise).flatten(2), 0, 1e-6)
    case.expect_grad_norms(gradients(model, case.config("attention_resolutions")), rel=NORMS, abs=SMALLEST)
    if case.has("out/p_sample"):
        times = case.input("p_t")
        with torch.no_grad():
            step = diffusion.p_mean_variance(model, noise, times, clip_denoised=case.config("clip_x0", True), model_kwargs=kwargs)
        fresh = volume(case.input("p_noise"), model) * (times > 0).float().reshape(-1, 1, 1, 1, 1)
        case.expect("p_sample", (step.mean + torch.exp(0.5 * step.log_variance) * fresh).flatten(2), 0, STEPS)
