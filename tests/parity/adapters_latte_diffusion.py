"""Checks of Latte's diffusion: tables, losses and sampling trajectories of the official release, scheduler and sampler of the tutorial.

Videos of the releases are b f c h w, ours b c f h w.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion import GaussianDiffusion
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.samplers import ddim_sample, ddpm_sample
from diffusion.schedules import beta_schedule, respace_betas, space_timesteps, tables
from models.official.latte import export_official
from models.transformers.latte import Latte
from tests.parity.adapters_diffusion import SCHEDULES, process
from tests.parity.adapters_latte_net import official_model, swapped, tutorial_model
from tests.parity.case import Case, adapter

REL, ABS, NORMS = 1e-4, 1e-5, 1e-3
"""What the files allow: of losses and states, absolute beside it, of norms of gradients."""

TABLES = 1e-12
NAMED_ENDS = (1e-4, 2e-2)
"""First and last beta of the linear schedule at 1000 steps. Named, it keeps the noise of the whole for any number of steps."""


# ---- the official release


@adapter("latte", "official-schedule")
def check_schedule(case: Case) -> None:
    steps, name = case.config("diffusion_steps"), case.config("noise_schedule")
    ends = case.config("beta_start", None), case.config("beta_end", None)
    betas = beta_schedule(SCHEDULES.get(name, name), steps, *((None, None) if ends == NAMED_ENDS else ends))
    spec = case.config("timestep_respacing", "")
    kept = space_timesteps(steps, spec if isinstance(spec, str | list) else str(spec or ""))
    ours = {name: torch.from_numpy(table) for name, table in tables(respace_betas(betas, kept)).items()}
    ours["timestep_map"] = torch.tensor(kept)
    for name in case.names("out/"):
        case.compare(name, ours[name.removeprefix("out/")], TABLES, each=True)


@adapter("latte", "official-loss")
def check_loss(case: Case) -> None:
    model = official_model(case, "model.")
    diffusion = process(case, "diffusion.", learn_sigma=model.config.learn_sigma)
    x0, t, noise = swapped(case.input("x0")), case.input("t"), swapped(case.input("noise"))
    given = {"y": case.input("y")} if case.has("in/y") else {}
    terms = diffusion.training_losses(model, x0, t, noise, given)
    terms["loss"].mean().backward()
    ours = terms | {"loss_mean": terms["loss"].mean(), "x_t": swapped(diffusion.q_sample(x0, t, noise))}
    ours["timestep_map"] = torch.tensor(diffusion.timestep_map)
    for name in case.names("out/"):
        case.compare(name, ours[name.removeprefix("out/")], REL, ABS)
    # A variance that the loss does not train has no gradient at all.
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    exported = export_official(grads, model.config)
    case.expect_grad_norms(exported, rel=NORMS, abs=1e-6 * max(float(grad.norm()) for grad in exported.values()))


@adapter("latte", "official-ddpm")
def check_ddpm(case: Case) -> None:
    assert not case.config("eta", None)
    check_trajectory(case, ddpm_sample)


@adapter("latte", "official-ddim")
def check_ddim(case: Case) -> None:
    check_trajectory(case, partial(ddim_sample, eta=case.config("eta", None) or 0.0))


def check_trajectory(case: Case, sample: Callable[..., Tensor]) -> None:
    """Every state and estimate. With guidance the release carries two halves, of which the second never reaches the network.

    Ours carries the first alone; the second is sampled beside it by a network that returns what the release's doubled one does.
    """
    model = official_model(case, "model.")
    diffusion = process(case, "diffusion.", learn_sigma=model.config.learn_sigma)
    case.expect("timestep_map", torch.tensor(diffusion.timestep_map))
    x, scale = swapped(case.input("x_T")), case.config("cfg_scale", None)
    noise = case.input("noise").transpose(2, 3) if case.has("in/noise") else None
    assert case.config("batch", len(x)) == len(x)
    run = partial(trajectory, diffusion, sample, clip_denoised=case.config("clip_denoised", False))
    if scale is None:
        found = run(model, x, noise, {"y": case.input("y")} if case.has("in/y") else {})
    else:
        y, half = case.input("y"), len(x) // 2
        assert torch.equal(x[:half], x[half:]) and bool((y[half:] == model.config.num_classes).all())
        guided = ClassifierFreeGuidance(model, scale, {"y": model.config.num_classes}, case.config("cfg_channels", None))
        first = run(guided, x[:half], None if noise is None else noise[:, :half], {"y": y[:half]})
        found = run(partial(doubled, model, guided, y), x, noise, {})
        for name, value in first.items():
            torch.testing.assert_close(value, found[name][:, :half], rtol=0, atol=REL * float(value.abs().max()))
    for name, value in found.items():
        case.expect(name, value, REL)


def doubled(model: Latte, guided: ClassifierFreeGuidance, y: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The release's guided network, b 2c f h w: both halves get the guided noise, of the first half; the variance stays each one's own."""
    half, c = len(x) // 2, x.shape[1]
    first = guided(x[:half], t[:half], y=y[:half])
    own = model(x[:half], t[half:], y=y[half:])
    return torch.cat([first, torch.cat([first[:, :c], own[:, c:]], dim=1)])


def trajectory(
    diffusion: GaussianDiffusion,
    sample: Callable[..., Tensor],
    model: Callable[..., Tensor],
    x: Tensor,
    noise: Tensor | None,
    given: dict[str, Tensor],
    **options: Any,
) -> dict[str, Tensor]:
    """States and estimates of x_0 after each step from x (b, c, f, h, w), as the releases keep them: (steps, b, f, c, h, w)."""
    states: list[Tensor] = []
    estimates: list[Tensor] = []

    def record(k: int, x: Tensor, x0: Tensor) -> None:
        states.append(swapped(x))
        estimates.append(swapped(x0))

    draws = None if noise is None else noise.__getitem__
    sample(diffusion, model, x, noise=draws, model_kwargs=given, callback=record, **options)
    return {"x": torch.stack(states), "pred_x0": torch.stack(estimates)}


# ---- the tutorial


def tutorial_process(case: Case) -> GaussianDiffusion:
    """Its scheduler: linear betas between two ends, the smaller of the variances. It keeps float32 tables."""
    betas = np.linspace(case.config("beta_start"), case.config("beta_end"), case.config("num_timesteps"))
    return GaussianDiffusion(betas, variance="fixed_small")


@adapter("latte", "expl-scheduler")
@torch.no_grad()
def check_scheduler(case: Case) -> None:
    diffusion = tutorial_process(case)
    ours = {name: torch.from_numpy(table).float() for name, table in diffusion.tables.items()}
    ours["alphas"] = 1 - ours["betas"]
    x0, t, noise = case.input("x0"), case.input("t"), case.input("noise")
    ours["noisy"] = diffusion.q_sample(x0, t, noise)
    for name in case.names("in/z_t"):
        step = int(name.removeprefix("in/z_t"))
        p = diffusion.predict_from(noise[:1], x0[:1], torch.tensor([step]))
        draw = case.tensor(name) if step else torch.zeros_like(case.tensor(name))
        ours[f"prev_t{step}"] = (p.mean + torch.exp(0.5 * p.log_variance) * draw)[0]
        ours[f"x0_t{step}"] = p.x0.clamp(-1, 1)[0]
    for name in case.names("out/"):
        case.compare(name, ours[name.removeprefix("out/")], REL, ABS)


@adapter("latte", "expl-sampler")
def check_sampler(case: Case) -> None:
    """All steps. The noise is recorded by step index; the clamped estimate is returned by the release, and never used."""
    model, diffusion = tutorial_model(case, "x_T"), tutorial_process(case)
    noise = case.input("noise").flip(0).transpose(2, 3)
    found = trajectory(diffusion, ddpm_sample, model, swapped(case.input("x_T")), noise, {})
    case.expect("x", found["x"], REL, ABS)
    case.expect("x0_clamped", found["pred_x0"].clamp(-1, 1), REL, ABS)
