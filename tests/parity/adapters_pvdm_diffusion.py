"""Checks of PVDM's diffusion: tables and sampling times, trajectories of its samplers, the training loss, a chain of clips."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion import DiffusionConfig, GaussianDiffusion, build
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.samplers import Callback, Noise, ddim_sample, ddpm_sample
from diffusion.schedules import respace_betas, space_timesteps
from models.official.pvdm_unet import export_unet
from pipelines.long import chain
from tests.parity.adapters_pvdm_unet import loaded_unet, unet_config
from tests.parity.case import Case, adapter

ABS, TABLES = 2e-5, 1e-5
STEP = 2e-4
"""Of one step with a network: 1e-6 in its output counts 15 times at the noisiest step, and more under guidance."""
ROUNDING = 1e-6
"""Relative: a sample that is not clipped may be a hundred, of which float32 holds seven digits."""
NORMS = 1e-3
LOSSES = {"l1": "l1", "l2": "mse"}


def process(case: Case, **changed: Any) -> GaussianDiffusion:
    """The process of a case: roots of beta on a straight line (which the release calls linear), the posterior's variance."""
    ends = {"beta_start": case.config("linear_start", 0.0), "beta_end": case.config("linear_end", 0.0)}
    assert not case.config("v_posterior", 0.0) and case.config("beta_schedule", "linear") == "linear", "the release's only choices"
    kind = {"steps": case.config("timesteps", 1000), "predict": case.config("parameterization", "eps")} | changed
    built = build(DiffusionConfig(**kind, schedule="quad", variance="fixed_small", **ends))
    assert isinstance(built, GaussianDiffusion)
    return built


def stub(x: Tensor, t: Tensor, previous: Tensor | float = 0.0) -> Tensor:
    """The closed-form network that the cases' notes state."""
    return torch.tanh(0.9 * x + 0.3 * previous + 0.0005 * t.reshape(-1, *[1] * (x.ndim - 1)))


def steps_of(case: Case, count: int) -> list[int]:
    """The timesteps of a draw, ascending. The ancestral sampler takes all."""
    full = case.config("timesteps", 1000)
    assert case.config("kind", "ddim") == "ddim" or count == full
    return space_timesteps(full, f"trailing{count}")


def drawn(
    case: Case,
    kept: list[int],
    model: Callable[..., Tensor],
    x: Tensor,
    noise: Noise,
    previous: Tensor | None,
    callback: Callback | None = None,
) -> Tensor:
    """From x at the last of the timesteps `kept` to the clean sample: DDIM with the noise as predicted, or the ancestral sampler."""
    full = process(case)
    betas = respace_betas(full.tables["betas"], kept)
    diffusion = GaussianDiffusion(betas, predict=full.predict, variance="fixed_small", timestep_map=kept)
    options: dict[str, Any] = {"noise": noise, "clip_denoised": case.config("clip_x0", True), "callback": callback}
    options["model_kwargs"] = {} if previous is None else {"previous": previous}
    eta = case.config("eta", 0.0)  # the release's ancestral sampler ignores it
    if case.config("kind", "ddim") == "ddpm_ancestral":
        return ddpm_sample(diffusion, model, x, **options)
    return ddim_sample(diffusion, model, x, eta=eta, keep_eps=True, **options)


def guided(case: Case, model: Callable[..., Tensor], previous: Tensor | None) -> Callable[..., Tensor]:
    """Guidance away from no previous clip. The ancestral sampler of the release has none."""
    w = case.config("w")
    if previous is None or case.config("kind", "ddim") == "ddpm_ancestral":
        return model
    return ClassifierFreeGuidance(model, 1 + w, {"previous": 0.0})


@adapter("pvdm", "schedule")
def check_schedule(case: Case) -> None:
    expect_tables(case, process(case))


def expect_tables(case: Case, diffusion: GaussianDiffusion) -> None:
    """All tables, and the times of DDIM, that a case recorded."""
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
    """A network with weights is compared step by step from the recorded states: over a few steps it makes so much of the last bit that
    the recorded sample is itself 1e-3 from what float64 gives. The closed-form one goes all the way by itself."""
    previous = case.input("cond") if case.config("conditional") else None
    kept, noise = steps_of(case, case.config("sampling_timesteps")), case.input("step_noise")
    states = [case.input("x_T")]
    if case.names("state/"):
        unet = loaded_unet(case.state(), unet_config(json.loads(re.findall(r"\{.*\}", case.notes)[0])))
        recorded, network = case.tensor("out/trajectory"), guided(case, unet, previous)
        for k, x in enumerate(recorded):
            following: list[Tensor] = []
            pair = kept[max(len(kept) - k - 2, 0) : len(kept) - k]
            drawn(case, pair, network, x, lambda _, k=k: noise[k], previous, lambda _, x, x0, found=following: found.append(x))
            states.append(following[0])
        tolerance = STEP
    else:
        drawn(case, kept, guided(case, stub, previous), states[0], noise.__getitem__, previous, lambda k, x, x0: states.append(x))
        tolerance = ABS
    case.expect("trajectory", torch.stack(states[:-1]), ROUNDING, tolerance)
    case.expect("sample", states[-1], ROUNDING, tolerance)


@adapter("pvdm", "ddpm_loss")
def check_loss(case: Case) -> None:
    diffusion = process(case, loss=LOSSES[case.config("loss_type")])
    network = loaded_unet(case.state(), unet_config(case.config("unet")))
    x0, t, noise = case.input("x"), case.input("t"), case.input("noise")
    kwargs = {"previous": case.input("cond")} if case.has("in/cond") else {}
    errors = diffusion.training_losses(network, x0, t, noise, kwargs)["loss"]
    loss, bound = errors.mean(), (diffusion.lookup("lvlb_weights", t, errors) * errors).mean()
    loss.backward()
    for name, value in (("loss", loss), ("loss_simple", errors.mean()), ("loss_vlb", bound)):
        case.expect(name, value.reshape(1), TABLES, ABS)
    case.expect("x_noisy", diffusion.q_sample(x0, t, noise), 0, ABS)
    gradients = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    smallest = 1e-6 * max(float(gradient.norm()) for gradient in gradients.values())  # what rounding makes of gradients that are zero
    case.expect_grad_norms(export_unet(gradients, network.config), rel=NORMS, abs=smallest)


@adapter("pvdm", "long_video_chain")
def check_chain(case: Case) -> None:
    x_T, first, following = case.input("x_T"), case.config("first_steps"), case.config("next_steps")

    def sample_clip(k: int, previous: Tensor | None) -> Tensor:
        kept, noise = steps_of(case, first if previous is None else following), case.input(f"step_noise_{k}")
        return drawn(case, kept, guided(case, stub, previous), x_T[k], noise.__getitem__, previous)

    case.expect("clips", torch.stack(list(chain(sample_clip, stop=case.config("clips")))), 0, ABS)
