"""What a network may predict (eps, x0, v), the min-SNR weights of its loss, and the settings of a process."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from diffusion import DiffusionConfig, FlowMatching, GaussianDiffusion, build, learned_variance
from diffusion.flow_samplers import heun_sample
from pipelines.sampling import Sampling, count_steps, respaced, sample
from tests.gaussian_target import draw, exact_network
from utils.config import from_dict, to_dict
from utils.errors import ConfigError
from utils.rng import SampleRng


def rng(count: int, seed: int = 0) -> SampleRng:
    return SampleRng(seed, torch.arange(count))


def in_words_of(predict: str, process: GaussianDiffusion, x_t: torch.Tensor, t: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """An estimate of the clean sample as the prediction that means it."""
    eps = process.eps_from_x0(x_t, t, x0)
    return {"eps": eps, "x0": x0, "v": process.velocity(x0, t, eps)}[predict]


# ---- v


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["linear", "squaredcos_cap_v2"]), st.integers(0, 2**31))
def test_v_and_x0_are_inverse_at_every_level(step, schedule, seed):
    """Unlike eps, v gives the clean sample back without a loss of digits at any level."""
    process = build(DiffusionConfig(schedule=schedule, predict="v", variance="fixed_small"))
    x0, noise = draw(4, seed)
    t = torch.full((4,), step)
    x_t, v = process.q_sample(x0, t, noise), process.velocity(x0, t, noise)
    torch.testing.assert_close(process.x0_from_v(x_t, t, v), x0, rtol=0, atol=5e-6)
    level = float(process.tables["alphas_cumprod"][step])
    torch.testing.assert_close(v, math.sqrt(level) * noise - math.sqrt(1 - level) * x0, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(process.predict_from(v, x_t, t).x0, x0, rtol=0, atol=5e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 49), st.integers(0, 2**31), st.sampled_from(["kl", "rescaled_kl", "mse", "rescaled_mse"]))
def test_the_bound_does_not_depend_on_the_words(step, seed, loss):
    """The same estimate of x_0 as eps, x0 and v: the same variational bound. v trains the variance with its half detached too."""
    x0, noise = draw(3, seed)
    t = torch.full((3,), step)
    terms = {}
    for predict in ("eps", "x0", "v"):
        process = build(DiffusionConfig(steps=50, predict=predict, loss=loss))
        x_t = process.q_sample(x0, t, noise)
        half = in_words_of(predict, process, x_t, t, 0.8 * x0 + 0.1)
        output = torch.cat([half, torch.sin(x_t)], 1).requires_grad_()
        terms[predict] = process.training_losses(lambda x, t, output=output: output, x0, t, noise)
        terms[predict]["vb"].sum().backward()
        assert bool((output.grad[:, :3] == 0).all()) == ("kl" not in loss)
    for predict in ("x0", "v"):
        torch.testing.assert_close(terms[predict]["vb"], terms["eps"]["vb"], rtol=1e-3, atol=1e-3)


# ---- min-SNR


def test_min_snr_weights_by_hand():
    """Levels with an SNR of 9, 4 and 1/4 at gamma 5 (Hang et al. 2023)."""
    levels = np.array([0.9, 0.8, 0.2])
    expected = {"eps": [5 / 9, 1, 1], "x0": [5, 4, 0.25], "v": [0.5, 0.8, 0.2]}
    for predict, weights in expected.items():
        process = GaussianDiffusion(1 - levels / np.append(1, levels[:-1]), predict=predict, weighting="min_snr")
        torch.testing.assert_close(process.error_weight(torch.arange(3)), torch.tensor(weights))
    plain = GaussianDiffusion(1 - levels / np.append(1, levels[:-1]))
    assert torch.equal(plain.error_weight(torch.arange(3)), torch.ones(3))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.floats(0.1, 50), st.integers(0, 2**31))
def test_min_snr_loss_does_not_depend_on_the_words(step, gamma, seed):
    """The same estimate of x_0 in all three: the same weighted loss, min(SNR, gamma) times the squared error of x_0."""
    x0, noise = draw(4, seed)
    t = torch.full((4,), step)
    estimate = 0.9 * x0 + 0.2
    for predict in ("eps", "x0", "v"):
        process = build(DiffusionConfig(predict=predict, variance="fixed_large", weighting="min_snr", min_snr_gamma=gamma))
        # In float64: at the ends eps is a difference of numbers that are nearly equal.
        a, s = (math.sqrt(float(level)) for level in (process.tables["alphas_cumprod"][step], 1 - process.tables["alphas_cumprod"][step]))
        eps = (a * x0.double() + s * noise.double() - a * estimate.double()) / s
        output = {"eps": eps, "x0": estimate.double(), "v": a * eps - s * estimate.double()}[predict]
        terms = process.training_losses(lambda x, t, output=output: output, x0, t, noise)
        expected = min(a**2 / s**2, gamma) * (estimate - x0).double().square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(terms["loss"].double(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_min_snr_weighs_the_mse_alone(variance):
    x0, noise = draw(4)
    t = torch.tensor([0, 10, 400, 999])
    weighted, plain = (DiffusionConfig(weighting=weighting, variance=variance) for weighting in ("min_snr", "none"))
    network = exact_network(weighted)
    ours = build(weighted).training_losses(network, x0, t, noise)
    before = build(plain).training_losses(network, x0, t, noise)
    assert torch.equal(ours["mse"], before["mse"]) and torch.equal(ours.get("vb", noise), before.get("vb", noise))
    torch.testing.assert_close(ours["loss"], build(weighted).error_weight(t) * before["mse"] + before.get("vb", torch.zeros(4)))
    assert not torch.allclose(ours["loss"], before["loss"])


def test_min_snr_of_a_process_that_ends_in_pure_noise():
    for predict, last in (("eps", 1.0), ("v", 0.0), ("x0", 0.0)):
        process = GaussianDiffusion([0.5, 1.0], predict=predict, weighting="min_snr")
        assert process.error_weight(torch.tensor([1])).item() == last


# ---- the flow


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100), st.floats(-3, 3), st.floats(0.05, 5), st.sampled_from(["uniform", "logit_normal"]))
def test_times_are_inside_and_follow_their_law(shift, mean, std, law):
    flow = FlowMatching(time_sampling=law, logit_mean=mean, logit_std=std, time_shift=shift)
    t = flow.sample_timesteps(rng(4000))
    assert t.dtype == torch.float32 and bool((t >= 0).all()) and bool((t <= 1).all())
    middle = 0.5 if law == "uniform" else 1 / (1 + math.exp(-mean))
    assert float((t.double() < shift * middle / (1 + (shift - 1) * middle)).double().mean()) == pytest.approx(0.5, abs=0.04)
    if law == "logit_normal":
        # Undoing the shift adds a constant to the logit.
        logit = torch.logit(t.double().clamp(1e-12, 1 - 1e-7)) - math.log(shift)
        inside = (t > 1e-6) & (t < 1 - 1e-6)
        quantiles = torch.tensor([0.25, 0.75], dtype=torch.float64)
        if bool(inside.all()):
            expected = mean + std * torch.special.ndtri(quantiles)
            assert float((logit.quantile(quantiles) - expected).abs().max()) < 0.12 * std
    else:
        back = t.double() / (shift - (shift - 1) * t.double())
        assert float((back.sort().values - torch.linspace(0, 1, 4000, dtype=torch.float64)).abs().max()) < 0.04


def test_times_belong_to_the_sample():
    flow = FlowMatching(time_shift=2.0)
    together = flow.sample_timesteps(rng(10))
    apart = torch.cat([flow.sample_timesteps(SampleRng(0, torch.tensor([i]))) for i in range(10)])
    assert torch.equal(together, apart) and not torch.equal(together, flow.sample_timesteps(rng(10, seed=1)))


def test_time_grid():
    np.testing.assert_allclose(FlowMatching().time_grid(4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(FlowMatching(time_shift=3.0).time_grid(2), [1, 1.5 / 2, 0])
    with pytest.raises(ValueError, match="at least 1"):
        FlowMatching().time_grid(0)


def test_the_network_of_a_flow_sees_the_time_and_returns_the_velocity():
    x0, noise = draw(3)
    t = torch.tensor([0.0, 0.25, 1.0])
    seen = {}

    def network(x, timesteps, label):
        seen.update(x=x, t=timesteps, label=label)
        return (torch.zeros_like(x), "extra")

    terms = FlowMatching().training_losses(network, x0.half(), t, noise, {"label": 7})
    assert seen["t"].tolist() == [0.0, 250.0, 1000.0] and seen["label"] == 7 and seen["x"].dtype == torch.float32
    assert torch.equal(seen["x"][0], x0[0].half().float()) and torch.equal(seen["x"][2], noise[2])
    torch.testing.assert_close(seen["x"][1], 0.75 * x0[1].half().float() + 0.25 * noise[1])
    torch.testing.assert_close(terms["loss"], (noise - x0.half().float()).square().mean(dim=(1, 2, 3)))
    with pytest.raises(ValueError, match="without variance"):
        FlowMatching().training_losses(lambda x, t: torch.cat([x, x], 1), x0, t, noise)


def test_flow_is_compiled_whole_and_counted_on_the_meta_device():
    flow = FlowMatching()
    weight = torch.empty(3, 3, device="meta", requires_grad=True)

    def network(x, t):
        return torch.einsum("oc,bchw->bohw", weight.to(x.device) if x.is_meta else torch.eye(3), x) + t.view(-1, 1, 1, 1)

    x0 = torch.empty(4, 3, 1, 2, device="meta")
    t = flow.sample_timesteps(SampleRng(0, torch.arange(4), "meta"))
    with FlopCounterMode(display=False) as counter:
        flow.training_losses(network, x0, t, torch.empty_like(x0))["loss"].sum().backward()
    assert counter.get_total_flops() > 0
    x0, noise = draw(4)
    t = flow.sample_timesteps(rng(4))
    compiled = torch.compile(flow.training_losses, fullgraph=True, backend="aot_eager")(network, x0, t, noise)
    torch.testing.assert_close(compiled["loss"], flow.training_losses(network, x0, t, noise)["loss"])


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_min_snr_losses_are_compiled_whole(predict):
    process = build(DiffusionConfig(predict=predict, weighting="min_snr"))
    network = exact_network(DiffusionConfig(predict=predict))
    x0, noise = draw(4)
    t = torch.tensor([0, 10, 400, 999])
    output = network(process.q_sample(x0, t, noise), t)

    def loss(output, x0, t, noise):
        return process.training_losses(lambda x, t: output, x0, t, noise)["loss"]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(output, x0, t, noise), loss(output, x0, t, noise))


# ---- settings


def test_cards_of_older_exports_are_read_with_the_defaults():
    older = {"steps": 1000, "schedule": "linear", "predict": "eps", "variance": "learned_range", "loss": "mse", "respacing": ""}
    assert from_dict(DiffusionConfig, older, "card") == DiffusionConfig()
    flow = DiffusionConfig(process="flow", time_shift=2.0, logit_mean=0.5)
    assert from_dict(DiffusionConfig, to_dict(flow), "card") == flow


def test_who_has_a_learned_variance():
    assert learned_variance(DiffusionConfig()) and not learned_variance(DiffusionConfig(process="flow"))
    assert not learned_variance(DiffusionConfig(variance="fixed_small"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"process": "flow", "predict": "v"}, "diffusion.predict v: means nothing in the process flow"),
        ({"process": "flow", "weighting": "min_snr"}, "diffusion.weighting min_snr: means nothing in the process flow"),
        ({"process": "flow", "respacing": "50"}, "diffusion.respacing 50: means nothing"),
        ({"time_shift": 3.0}, "diffusion.time_shift 3.0: means nothing in the process ddpm"),
        ({"process": "flow", "time_shift": 0.0}, "time_shift 0.0: a number above 0"),
        ({"process": "flow", "logit_std": -1.0}, "logit_std -1.0: a number above 0"),
        ({"process": "flow", "logit_mean": float("nan")}, "logit_mean nan: a number"),
        ({"min_snr_gamma": 1.0}, "diffusion.min_snr_gamma 1.0: means nothing with diffusion.weighting none"),
        ({"process": "flow", "time_sampling": "uniform", "logit_mean": 1.0}, "means nothing with diffusion.time_sampling uniform"),
        ({"weighting": "min_snr", "loss": "kl"}, "weighs the mse, which loss 'kl' does not have"),
        ({"weighting": "min_snr", "min_snr_gamma": 0.0}, "min_snr_gamma 0.0: above 0"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(setting, message):
    with pytest.raises(ConfigError) as error:
        build(DiffusionConfig(**setting))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("process", "sampling", "message"),
    [
        ("ddpm", {"sampler": "euler"}, "sampler euler: the model's process is ddpm, which has ddim, ddpm, dpm++"),
        ("flow", {"sampler": "dpm++"}, "sampler dpm++: the model's process is flow, which has euler, heun"),
        ("flow", {"respacing": "50"}, "a flow has no steps to choose from"),
        ("flow", {"steps": 0}, "at least 1"),
        ("ddpm", {"respacing": "ddim999"}, "ddim999"),
        ("ddpm", {"steps": 1001}, "1 to 1000"),
    ],
)
def test_samplers_of_the_other_process_are_refused_in_one_line(process, sampling, message):
    config = DiffusionConfig(process=process)
    for attempt in (
        lambda: sample(exact_network(config), config, (3, 1, 2), rng(1), "s", Sampling(**sampling)),
        lambda: count_steps(config, Sampling(**sampling)),
    ):
        with pytest.raises(ConfigError, match=message.replace("+", r"\+")) as error:
            attempt()
        assert "\n" not in str(error.value)


def test_steps_are_counted_and_seen():
    seen: list[int] = []
    for process, sampling, count in (
        ("ddpm", Sampling(steps=7), 7),
        ("ddpm", Sampling(sampler="dpm++", respacing="ddim25"), 25),
        ("ddpm", Sampling(sampler="ddpm", respacing="3,4,5"), 12),
        ("flow", Sampling(steps=6, sampler="heun"), 6),
        ("flow", Sampling(steps=2000), 2000),
    ):
        config = DiffusionConfig(process=process)
        assert count_steps(config, sampling) == count
        seen.clear()
        given_back = sample(exact_network(config), config, (3, 1, 2), rng(2), "s", sampling, callback=lambda k, x, x0: seen.append(k))
        assert seen == list(range(count)) and bool(given_back.isfinite().all())
    assert isinstance(respaced(DiffusionConfig(), "ddim50"), GaussianDiffusion)


def test_auto_is_ddim_or_euler():
    for process, named in (("ddpm", "ddim"), ("flow", "euler")):
        config = DiffusionConfig(process=process)
        first, second = (
            sample(exact_network(config), config, (3, 1, 2), rng(2), "s", Sampling(steps=9, sampler=sampler)) for sampler in ("auto", named)
        )
        assert torch.equal(first, second)


def test_heun_calls_the_network_twice_a_step_but_for_the_last():
    times = []

    def network(x, t):
        times.append(float(t[0]))
        return x

    heun_sample(FlowMatching(), network, torch.ones(1, 1), steps=5)
    assert len(times) == 9 and min(times) == pytest.approx(200)
