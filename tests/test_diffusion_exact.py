"""Samplers and losses against a Gaussian target, whose exact networks, paths and smallest losses are known."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from diffusion import DiffusionConfig, FlowMatching, GaussianDiffusion, build
from diffusion.dpm_solver import dpm_solver_sample
from diffusion.flow_samplers import euler_sample, heun_sample
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.samplers import ddim_reverse, ddim_sample, ddpm_sample
from pipelines.sampling import Sampling, sample
from tests.gaussian_target import MU, S, along_path, draw, exact_network, gaussian_network
from utils.rng import SampleRng

DATA, NOISE = (1.0, 0.0), (0.0, 1.0)
GRIDS = {"even": 1.0, "finer in data": 1.5, "finer in noise": 0.7}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ends(process: GaussianDiffusion) -> tuple[tuple[float, float], tuple[float, float]]:
    """(a, s) of the last and of the first index."""
    levels = process.tables["alphas_cumprod"]
    return (levels[-1] ** 0.5, (1 - levels[-1]) ** 0.5), (levels[0] ** 0.5, (1 - levels[0]) ** 0.5)


def observed_order(errors: list[float]) -> float:
    """Of a method whose number of steps doubles from one error to the next."""
    return math.log2(errors[-2] / errors[-1])


# ---- order of convergence


def between_levels(steps: int, power: float, predict: str) -> GaussianDiffusion:
    """A process whose log(a/s) goes from 2.5 to -3 in `steps` steps, even for power 1."""
    log_ratio = 2.5 - 5.5 * np.linspace(0, 1, steps + 1) ** power
    levels = 1 / (1 + np.exp(-2 * log_ratio))
    return GaussianDiffusion(1 - levels / np.append(1, levels[:-1]), predict=predict, variance="fixed_small")


full_order = partial(dpm_solver_sample, lower_order_final=False)


@pytest.mark.parametrize(
    ("method", "predict", "grid", "order", "error"),
    [
        (ddim_sample, "eps", "even", 1, 0.03),
        (ddim_sample, "v", "finer in data", 1, 0.03),
        (dpm_solver_sample, "eps", "even", 2, 3e-4),
        (dpm_solver_sample, "x0", "even", 2, 3e-4),
        (full_order, "v", "even", 2, 3e-4),
        (full_order, "v", "finer in data", 2, 3e-4),
        (full_order, "v", "finer in noise", 2, 3e-4),
    ],
)
def test_order_of_the_samplers_of_noising_steps(method, predict, grid, order, error):
    """Up to the last level that has noise: the step from there to the clean sample does not shrink with the number of steps."""
    x = draw(32)[1]
    errors = []
    for steps in (96, 192):
        process = between_levels(steps, GRIDS[grid], predict)
        seen = []
        method(process, gaussian_network(process), x, callback=lambda k, x, x0, seen=seen: seen.append(x))
        assert len(seen) == steps + 1
        errors.append(float((seen[-2] - along_path(x, *ends(process))).square().mean().sqrt()))
    assert errors[-1] < error
    assert order - 0.1 < observed_order(errors) < order + 0.1


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("method", "order", "error"), [(euler_sample, 1, 0.06), (heun_sample, 2, 2e-3)])
def test_order_of_the_samplers_of_a_flow(method, order, error, shift):
    config = DiffusionConfig(process="flow", time_shift=shift)
    x = draw(32)[1]
    errors = []
    for steps in (128, 256):
        reached = method(build(config), exact_network(config), x, steps=steps)
        errors.append(float((reached - along_path(x, NOISE, DATA)).abs().max()))
    assert errors[-1] < error
    assert order - 0.15 < observed_order(errors) < order + 0.15


def test_heun_is_heun():
    """One step and two, by hand, for the velocity v = x + t."""
    asked = []

    def model(x, t):
        asked.append(float(t[0]) / 1000)
        return x + t.view(-1, 1) / 1000

    x = torch.tensor([[1.0]])
    flow = FlowMatching()
    assert heun_sample(flow, model, x, steps=1).item() == pytest.approx(-1.0)  # Euler's: 1 - (1 + 1)
    first = 2.0  # velocity at t = 1
    ahead = 1 - 0.5 * first
    middle = 1 - 0.25 * (first + ahead + 0.5)
    assert heun_sample(flow, model, x, steps=2).item() == pytest.approx(middle - 0.5 * (middle + 0.5))
    assert asked == [1.0, 1.0, 0.5, 0.5] and euler_sample(flow, model, x, steps=2).item() == pytest.approx(0 - 0.5 * 0.5)


def test_dpm_solver_by_hand():
    """Three steps between known levels, with estimates that do not depend on x."""
    levels = np.array([0.9, 0.5, 0.2])
    process = GaussianDiffusion(1 - levels / np.append(1, levels[:-1]), predict="x0", variance="fixed_small")
    estimates = iter((1.0, 2.0, 4.0) * 2)

    def model(x, t):
        return torch.full_like(x, next(estimates))

    half = np.log(levels / (1 - levels)) / 2
    a, s = np.sqrt(levels), np.sqrt(1 - levels)
    seen = []
    dpm_solver_sample(process, model, torch.ones(1, 1), lower_order_final=False, callback=lambda k, x, x0: seen.append(x.item()))
    first = s[1] / s[2] * 1.0 - a[1] * np.expm1(-(half[1] - half[2])) * 1.0
    change = 2.0 + (2.0 - 1.0) * (half[0] - half[1]) / (2 * (half[1] - half[2]))
    second = s[0] / s[1] * first - a[0] * np.expm1(-(half[0] - half[1])) * change
    assert seen == pytest.approx([first, second, 4.0], rel=1e-5)
    seen.clear()
    dpm_solver_sample(process, model, torch.ones(1, 1), callback=lambda k, x, x0: seen.append(x.item()))
    assert seen[1] == pytest.approx(s[0] / s[1] * first - a[0] * np.expm1(-(half[0] - half[1])) * 2.0, rel=1e-5)


# ---- the map from noise to data, through the one call that everything samples with


ROUTES = [
    ({}, {"sampler": "ddim", "steps": 250}, 0.01),
    ({"predict": "v", "variance": "fixed_small"}, {"steps": 250}, 0.01),
    ({"predict": "v"}, {"sampler": "dpm++", "steps": 40}, 0.02),
    ({"schedule": "squaredcos_cap_v2"}, {"sampler": "dpm++", "respacing": "20,10,10"}, 0.03),
    ({"predict": "x0", "variance": "fixed_large"}, {"sampler": "dpm++", "respacing": "ddim40"}, 0.02),
    ({"process": "flow"}, {"steps": 200}, 0.02),
    ({"process": "flow", "time_shift": 3.0}, {"sampler": "heun", "steps": 60}, 0.02),
]


@pytest.mark.parametrize(("process", "sampling", "error"), ROUTES)
def test_every_deterministic_sampler_follows_the_path(process, sampling, error):
    config = DiffusionConfig(**process)
    rng = SampleRng(5, torch.arange(64))
    reached = sample(exact_network(config), config, (3, 1, 2), rng, "s", Sampling(**sampling))
    start = NOISE
    if config.process == "ddpm":
        kept = build(DiffusionConfig(schedule=config.schedule, respacing=sampling.get("respacing", str(sampling.get("steps")))))
        assert isinstance(kept, GaussianDiffusion)
        start = ends(kept)[0]
    expected = along_path(rng.normal("s/start", (3, 1, 2)), start, DATA)
    assert float((reached - expected).abs().mean()) < error
    assert float((reached - expected).abs().max()) < 8 * error


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_ancestral_sampling_of_v_is_that_of_eps(variance):
    """The same function in other words gives the same trajectory."""
    noise = torch.randn(50, 8, 3, 1, 2, generator=torch.Generator().manual_seed(7)).__getitem__
    found = {}
    for predict in ("eps", "v", "x0"):
        config = DiffusionConfig(predict=predict, variance=variance, respacing="50")
        found[predict] = ddpm_sample(build(config), exact_network(config), draw(8)[1], noise=noise)
    for predict in ("v", "x0"):
        torch.testing.assert_close(found[predict], found["eps"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_sampling_has_the_distribution_of_its_chain(variance):
    """With the exact network each step is linear with Gaussian noise, so that mean and spread of the end follow by recursion."""
    config = DiffusionConfig(predict="v", variance=variance, respacing="25")
    process, count = build(config), 3000
    noise = torch.randn(25, count, 3, 1, 2, generator=torch.Generator().manual_seed(7)).__getitem__
    reached = ddpm_sample(process, exact_network(config), draw(count)[1], noise=noise).double()
    tables = process.tables
    mean, spread = torch.zeros_like(MU), torch.ones_like(S)
    added = tables["posterior_variance" if variance == "fixed_small" else "fixed_large_variance"]
    for i in reversed(range(25)):
        level, c1, c2 = (tables[name][i] for name in ("alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2"))
        gain = level**0.5 * S**2 / (level * S**2 + 1 - level)
        mean = c1 * (MU - gain * level**0.5 * MU) + (c1 * gain + c2) * mean
        spread = (c1 * gain + c2) ** 2 * spread + (added[i] if i else 0.0)
    assert float(((reached.mean(0) - mean[0]).abs() / (spread[0] / count).sqrt()).max()) < 4.5
    torch.testing.assert_close(reached.std(0), spread[0].sqrt(), rtol=0.06, atol=0.0)


def test_reverse_of_v_leads_back():
    config = DiffusionConfig(predict="v", variance="fixed_small")
    process, network = build(config), exact_network(config)
    x0 = draw(16)[0]
    back = ddim_sample(process, network, ddim_reverse(process, network, x0))
    torch.testing.assert_close(back, x0, rtol=0, atol=0.05)


@pytest.mark.parametrize("process", [{"process": "flow"}, {"predict": "v"}, {"predict": "v", "variance": "fixed_small"}])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_guidance_of_v_and_of_the_velocity(process, scale):
    """With a condition that moves the prediction by a constant: the guided one is moved by scale times that, the variance half is not."""
    config = DiffusionConfig(**process)
    plain = exact_network(config)

    def network(x, t, drop):
        output = plain(x, t)
        output[:, :3] += (~drop).float().view(-1, 1, 1, 1)
        return output

    x, t = draw(4)[1], torch.tensor([10, 400, 800, 999])
    guided = ClassifierFreeGuidance(network, scale, {"drop": True})(x, t, drop=torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(guided[:, :3], plain(x, t)[:, :3] + scale)
    assert torch.equal(guided[:, 3:], plain(x, t)[:, 3:])


@pytest.mark.parametrize("process", [{"process": "flow"}, {"predict": "v"}, {}])
@pytest.mark.parametrize("sampler", ["auto", "second order"])
def test_the_clean_sample_is_kept_in_range(process, sampler):
    """Clipping of x_0 keeps every estimate inside and ends inside, for a target that is outside."""
    config = DiffusionConfig(**process)
    second = "heun" if config.process == "flow" else "dpm++"
    estimates = []
    reached = sample(
        exact_network(config),
        config,
        (3, 1, 2),
        SampleRng(0, torch.arange(8)),
        "s",
        Sampling(steps=20, sampler="auto" if sampler == "auto" else second, clip=True),
        callback=lambda k, x, x0: estimates.append(x0),
    )
    assert len(estimates) == 20 and all(float(x0.abs().max()) <= 1 for x0 in estimates)
    assert float(reached.abs().max()) <= 1 + 1e-5 and float(reached[:, 2, 0, 0].min()) < -0.999  # the widest coordinate, around -2


# ---- the smallest possible loss


def bayes_risk(predict: str, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Mean over coordinates of the error of the best prediction."""
    spread = a**2 * S**2 + s**2
    error = {"eps": a**2 * S**2, "x0": S**2 * s**2, "v": S**2, "velocity": S**2}[predict] / spread
    return error.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("weighting", ["none", "min_snr"])
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_loss_of_the_exact_network_is_the_bayes_risk(predict, weighting):
    config = DiffusionConfig(predict=predict, variance="fixed_small", weighting=weighting)
    process = build(config)
    count = 4000
    for step in (50, 300, 700):
        x0, noise = draw(count, seed=step)
        t = torch.full((count,), step)
        terms = process.training_losses(exact_network(config), x0, t, noise)
        level = torch.tensor(process.tables["alphas_cumprod"][step]).view(1, 1, 1, 1)
        risk = float(bayes_risk(predict, level.sqrt(), (1 - level).sqrt()))
        standard_error = float(terms["mse"].std()) / count**0.5
        assert abs(float(terms["mse"].mean()) - risk) < 4 * standard_error and standard_error < 0.05 * risk
        # No other function does better: a shifted one is worse by the square of the shift.
        shifted = process.training_losses(lambda x, t: exact_network(config)(x, t) + 1.0, x0, t, noise)
        assert float(shifted["mse"].mean()) == pytest.approx(risk + 1, abs=0.1)
        weight = float(process.error_weight(t)[0])
        torch.testing.assert_close(terms["loss"], weight * terms["mse"])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_loss_of_the_exact_velocity_is_the_bayes_risk(shift):
    config = DiffusionConfig(process="flow", time_shift=shift)
    process = build(config)
    x0, noise = draw(20000)
    t = process.sample_timesteps(SampleRng(0, torch.arange(len(x0))))
    terms = process.training_losses(exact_network(config), x0, t, noise)
    time = t.double().view(-1, 1, 1, 1)
    risk = bayes_risk("velocity", 1 - time, time)
    excess = terms["loss"] - risk
    assert abs(float(excess.mean())) < 4 * float(excess.std()) / len(x0) ** 0.5 and float(excess.std()) < 2
    assert float(risk.mean()) > 0.5 and torch.equal(terms["loss"], terms["mse"])
