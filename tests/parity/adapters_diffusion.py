"""Checks of the diffusion process: tables, losses, sampling trajectories, bits per dimension, timestep weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion import GaussianDiffusion
from diffusion.samplers import ddim_reverse, ddim_sample, ddpm_sample
from diffusion.schedules import EXPLICIT, NAMED, beta_schedule, respace_betas, space_timesteps, tables
from diffusion.timestep_sampler import LossSecondMomentTimesteps
from tests.parity.case import Case, adapter

TABLES, ARRAYS = 1e-12, 1e-6
PREDICT = {"EPSILON": "eps", "START_X": "x0"}
SCHEDULES = {name: name for name in NAMED + EXPLICIT} | {"cosine": "squaredcos_cap_v2", "squaredcos": "squaredcos_cap_v2"}


def process(case: Case, group: str = "", learn_sigma: bool = True) -> GaussianDiffusion:
    """The process of a loss or sampling case. Its config names types in the release's words, or the release's switches.

    `group` is where they stand ("diffusion."); the respacing may stand beside it. `learn_sigma`: what goes when it does not say.
    """

    def stated(name: str, default: Any) -> Any:
        return case.config(f"{group}{name}", default)

    steps = stated("diffusion_steps", 1000)
    name = stated("noise_schedule", "linear")
    betas = beta_schedule(SCHEDULES.get(name, name), steps, stated("beta_start", None), stated("beta_end", None))
    spacing = [place for place in (f"{group}respacing", f"{group}timestep_respacing", "respacing") if case.config(place, "")]
    kept = space_timesteps(steps, _plain(case.config(spacing[0]) if spacing else ""))
    mean_type = stated("mean_type", "START_X" if stated("predict_xstart", False) else "EPSILON")
    fixed = "FIXED_SMALL" if stated("sigma_small", False) else "FIXED_LARGE"
    var_type = stated("var_type", "LEARNED_RANGE" if stated("learn_sigma", learn_sigma) else fixed)
    rescaled = "RESCALED_MSE" if stated("rescale_learned_sigmas", False) else "MSE"
    loss_type = stated("loss_type", "RESCALED_KL" if stated("use_kl", False) else rescaled)
    return GaussianDiffusion(
        respace_betas(betas, kept), predict=PREDICT[mean_type], variance=var_type.lower(), loss=loss_type.lower(), timestep_map=kept
    )


def analytic_model(diffusion: GaussianDiffusion, x: Tensor, t: Tensor) -> Tensor:
    """The closed-form network that the cases' notes state; t are original indices."""
    t = t.float().reshape(-1, *[1] * (x.ndim - 1))
    eps = 0.9 * x + 0.1 * torch.sin(3 * x + 0.02 * t)
    if diffusion.variance != "learned_range":
        return eps
    return torch.cat([eps, 0.8 * torch.sin(2 * x - 0.01 * t)], dim=1)


# ---- tables


@adapter("diffusion", "tables")
def check_tables(case: Case) -> None:
    lengths, schedules = case.config("lengths"), case.config("schedules")
    for label in sorted({name.split("/")[1] for name in case.names("out/")}):
        stored = case.tensor(f"out/{label}/betas")
        assert len(stored) in lengths, f"{label} has {len(stored)} betas, not one of {lengths}"
        assert any(label.startswith(name) for name in schedules), f"{label} is none of {schedules}"
        _compare_tables(case, f"out/{label}/", _labelled_schedule(label, stored), None)
    respacings = [_plain(spec) for spec in case.config("respacings", [])]
    for name in case.names("out/"):
        label, *rest = name.removeprefix("out/").split("/")
        if len(rest) == 2 and rest[1] == "betas":
            spec = rest[0].removeprefix("respace_")
            assert _plain(spec) in respacings, f"{name}: respacing {spec} is not in the config"
            betas = _labelled_schedule(label, case.tensor(f"out/{label}/betas"))
            kept = space_timesteps(len(betas), _plain(spec))
            _compare_tables(case, f"out/{label}/{rest[0]}/", respace_betas(betas, kept), kept)


def _plain(spec: Any) -> str:
    """A respacing as the string that space_timesteps takes, from a string or a (printed) list."""
    return str(spec if spec is not None else "").strip("[]()").replace(" ", "")


def _labelled_schedule(label: str, stored: Tensor) -> np.ndarray:
    """Betas of a label such as "linear1000". The older schedules' explicit ends are recorded only as the first and last beta."""
    name = SCHEDULES[max((known for known in SCHEDULES if label.startswith(known)), key=len)]
    ends = (float(stored[0]), float(stored[-1])) if name in (*EXPLICIT, "quad") else (None, None)
    return beta_schedule(name, len(stored), *ends)


def _compare_tables(case: Case, prefix: str, betas: np.ndarray, kept: list[int] | None) -> None:
    ours = {name: torch.from_numpy(table) for name, table in tables(betas).items()}
    if kept is not None:
        ours["timestep_map"] = torch.tensor(kept)
    for name in case.names(prefix):
        table = name.removeprefix(prefix)
        if "/" in table:
            continue
        if table == "posterior_log_variance_clipped" and len(betas) == 1:
            # The release has an empty array here, which breaks its one-step sampling; ours is log b_0.
            assert case.tensor(name).numel() == 0 and torch.equal(ours[table], ours["log_betas"])
            continue
        case.compare(name, ours[table], TABLES, each=True)


# ---- losses


@adapter("diffusion", "loss")
def check_loss(case: Case) -> None:
    diffusion = process(case)
    x0, t, noise = case.input("x_start"), case.input("t"), case.input("noise")
    output = case.input("model_output").requires_grad_()
    seen: list[Tensor] = []

    def model(x: Tensor, timesteps: Tensor) -> Tensor:
        seen.append(timesteps)
        return output

    terms = diffusion.training_losses(model, x0, t, noise)
    terms["loss"].mean().backward()
    case.compare("grad/model_output", output.grad, ARRAYS)
    x_t = diffusion.q_sample(x0, t, noise)
    ours = {**terms, "model_t": seen[0], "x_t": x_t}
    for kind, clip in (("p", False), ("p_clip", True)):
        p = diffusion.predict_from(output.detach(), x_t, t, clip_denoised=clip)
        ours |= {f"{kind}_mean": p.mean, f"{kind}_variance": p.variance}
        ours |= {f"{kind}_log_variance": p.log_variance, f"{kind}_pred_xstart": p.x0}
    ours |= dict(zip(("q_mean", "q_variance", "q_log_variance"), diffusion.q_posterior(x0, x_t, t), strict=True))
    ours |= {"prior_bpd": diffusion.prior_bpd(x0)}
    for name in case.names("out/"):
        case.compare(name, ours[name.removeprefix("out/")], ARRAYS)


@adapter("diffusion", "bpd")
def check_bpd(case: Case) -> None:
    diffusion = process(case)
    noise, clip = case.input("noise"), case.config("clip_denoised", True)
    ours = diffusion.bpd_loop(partial(analytic_model, diffusion), case.input("x_start"), noise=noise.__getitem__, clip_denoised=clip)
    ours |= {"timestep_map": torch.tensor(diffusion.timestep_map)}
    for name in case.names("out/"):
        case.compare(name, ours[name.removeprefix("out/")], ARRAYS)


# ---- trajectories


def _check_trajectory(case: Case, start: str, sample: Callable[..., Tensor], reverse: bool = False) -> None:
    """`sample(diffusion, model, x, noise=, clip_denoised=, callback=)` against every recorded x and x0.

    x is compared as our own loop goes. x0 is compared step by step from the recorded x: at high noise it is x and eps times
    sqrt(1/A - 1), over a hundred, so that the last bit of another CPU's exp in x would show in a clipped x0 as more than the tolerance.
    """
    diffusion = process(case)
    model = partial(analytic_model, diffusion)
    clip = case.config("clip_denoised", False)
    x_start = case.input(start)
    samples: list[Tensor] = []
    options: dict[str, Any] = {"clip_denoised": clip, "callback": lambda k, x, x0: samples.append(x)}
    if case.has("in/noise"):
        options["noise"] = case.input("noise").__getitem__
    final = sample(diffusion, model, x_start, **options)
    steps = range(diffusion.num_timesteps) if reverse else reversed(range(diffusion.num_timesteps))
    recorded = [x_start, *(case.tensor("out/samples") if case.has("out/samples") else samples)]
    ours = {"final": final, "samples": torch.stack(samples), "timestep_map": torch.tensor(diffusion.timestep_map)}
    ours["pred_xstart"] = torch.stack(
        [
            diffusion.p_mean_variance(model, x, torch.full((len(x),), step), clip_denoised=clip).x0
            for step, x in zip(steps, recorded, strict=False)
        ]
    )
    for name in case.names("out/"):
        case.compare(name, ours[name.removeprefix("out/")], ARRAYS)


@adapter("diffusion", "ddpm")
def check_ddpm(case: Case) -> None:
    assert not case.config("eta", None)
    _check_trajectory(case, "x_T", ddpm_sample)


@adapter("diffusion", "ddim")
def check_ddim(case: Case) -> None:
    eta = case.config("eta", None) or 0.0
    if case.config("reverse", False):
        _check_trajectory(case, _start(case), _without_noise, reverse=True)
    else:
        _check_trajectory(case, "x_T", partial(ddim_sample, eta=eta))


@adapter("diffusion", "ddim_reverse")
def check_ddim_reverse(case: Case) -> None:
    assert not case.config("eta", None)
    _check_trajectory(case, _start(case), _without_noise, reverse=True)


def _without_noise(*args: Any, noise: Any = None, **options: Any) -> Tensor:
    return ddim_reverse(*args, **options)


def _start(case: Case) -> str:
    return next(name for name in ("x_0", "x0", "x_start", "x_T", "x") if case.has(f"in/{name}"))


# ---- timestep sampling


@adapter("diffusion", "lsm")
def check_loss_second_moment(case: Case) -> None:
    sampler = LossSecondMomentTimesteps(case.config("num_timesteps"), case.config("history_per_term"), case.config("uniform_prob"))
    weights = [sampler.weights()]
    for t, loss in zip(case.input("t").split(1), case.input("loss").split(1), strict=True):
        sampler.update(t, loss)
        weights.append(sampler.weights())
    case.expect("weights", torch.from_numpy(np.stack(weights)), rel=TABLES)
