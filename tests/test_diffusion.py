"""The diffusion process: schedules, respacing, the network's view and the losses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from diffusion import DiffusionConfig, GaussianDiffusion, build
from diffusion.likelihood import discretised_log_likelihood, normal_kl
from diffusion.schedules import beta_schedule, respace_betas, space_timesteps, tables
from utils.errors import ConfigError

SHAPE = (4, 3, 5, 6)


def constant(output):
    return lambda x, t: output


def sample_inputs(seed=0, t=(0, 1, 500, 999), shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(shape, generator=generator) * 2 - 1
    noise = torch.randn(shape, generator=generator)
    return x0, torch.tensor(t), noise


# ---- schedules and respacing


def test_linear_schedule_is_scaled_to_the_number_of_steps():
    betas = beta_schedule("linear", 250)
    assert betas[0] == pytest.approx(4e-4) and betas[-1] == pytest.approx(0.08)
    assert np.cumprod(1 - beta_schedule("linear", 1000))[-1] == pytest.approx(4.036e-5, rel=1e-3)


def test_cosine_schedule_follows_its_level_and_is_capped():
    betas = beta_schedule("squaredcos_cap_v2", 100)
    level = np.cos((np.arange(1, 100) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], level / start, rtol=1e-9)
    assert betas[-1] == 0.999


def test_older_schedules():
    assert beta_schedule("const", 3, last=0.1).tolist() == [0.1] * 3
    np.testing.assert_allclose(beta_schedule("jsd", 4), [1 / 4, 1 / 3, 1 / 2, 1])
    np.testing.assert_allclose(np.sqrt(beta_schedule("quad", 5, 1e-4, 4e-2)), np.linspace(0.01, 0.2, 5))
    warm10, warm50 = beta_schedule("warmup10", 20, 1e-4, 2e-2), beta_schedule("warmup50", 20, 1e-4, 2e-2)
    assert (warm10 == 2e-2).sum() == 19 and (warm50 == 2e-2).sum() == 11 and warm10[0] == warm50[0] == 1e-4
    np.testing.assert_allclose(beta_schedule("linear", 3, 0.1, 0.3), [0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linaer", 10), "unknown"),
        (("const", 10), "needs"),
        (("warmup10", 9, 1e-4), "needs"),
        (("linear", 10), "0, 1"),
        (("linear", 0), "1 step"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        beta_schedule(*arguments)


def test_known_respacings():
    assert space_timesteps(1000, "50")[:4] == [0, 20, 41, 61] and space_timesteps(1000, "50")[-1] == 999
    assert space_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    assert space_timesteps(1000, "10,15,20") == space_timesteps(1000, [10, 15, 20])
    assert space_timesteps(10, "") == list(range(10)) and space_timesteps(1000, "1") == [0]
    assert space_timesteps(10, [2, 2, 2]) == [0, 3, 4, 6, 7, 9]


@pytest.mark.parametrize("spec", ["ddim999", "ddimx", "a,b", "11", "6,4", "-1", "0", "10,,2", []])
def test_impossible_respacings_are_refused(spec):
    with pytest.raises(ValueError, match="respacing"):
        space_timesteps(10, spec)


def test_failed_stride_names_both_numbers():
    with pytest.raises(ValueError, match=r"ddim300.*300 of 1000"):
        space_timesteps(1000, "ddim300")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.data())
def test_respaced_process_keeps_the_noise_levels(steps, data):
    count = data.draw(st.integers(1, steps))
    kept = space_timesteps(steps, str(count))
    assert len(kept) == count and kept == sorted(set(kept)) and kept[0] == 0
    assert count == 1 or kept[-1] == steps - 1
    betas = beta_schedule("squaredcos_cap_v2", steps)
    np.testing.assert_allclose(np.cumprod(1 - respace_betas(betas, kept)), np.cumprod(1 - betas)[kept], rtol=1e-9, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-6, 0.9999), min_size=1, max_size=20))
def test_tables_are_finite_and_the_posterior_is_between_its_bounds(betas):
    values = tables(np.array(betas))
    names = set(values) - {"posterior_variance"}
    assert all(np.isfinite(values[name]).all() for name in names)
    assert (values["posterior_variance"] <= values["betas"] * (1 + 1e-9)).all()


# ---- forward process and the network's view


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(0, 2**31))
def test_eps_and_x0_are_inverse(t, seed):
    diffusion = build(DiffusionConfig())
    x0, _, noise = sample_inputs(seed)
    steps = torch.full((4,), t)
    x_t = diffusion.q_sample(x0, steps, noise)
    scale = float(diffusion.tables["sqrt_recipm1_alphas_cumprod"][t])
    torch.testing.assert_close(diffusion.x0_from_eps(x_t, steps, noise), x0, rtol=0, atol=2e-6 * max(scale, 1))
    torch.testing.assert_close(diffusion.eps_from_x0(x_t, steps, x0), noise, rtol=0, atol=2e-6 * max(1 / scale, 1))


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) from the product of the two Gaussians that define it."""
    diffusion = build(DiffusionConfig(steps=20))
    x0, _, x_t = sample_inputs()
    t = torch.tensor([1, 5, 12, 19])
    mean, variance, _ = diffusion.q_posterior(x0, x_t, t)
    b, previous = (torch.from_numpy(diffusion.tables[name])[t].view(-1, 1, 1, 1) for name in ("betas", "alphas_cumprod_prev"))
    precision = (1 - b) / b + 1 / (1 - previous)
    expected = ((1 - b).sqrt() / b * x_t + previous.sqrt() / (1 - previous) * x0) / precision
    torch.testing.assert_close(mean, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance, (1 / precision).float().expand_as(x0), rtol=1e-5, atol=0)


def test_variance_kinds():
    x, _, noise = sample_inputs()
    v = torch.cat([torch.ones(1, 3, 5, 6), -torch.ones(1, 3, 5, 6), torch.zeros(2, 3, 5, 6)])
    learned = build(DiffusionConfig()).predict_from(torch.cat([noise, v], 1), x, torch.full((4,), 500))
    small = build(DiffusionConfig(variance="fixed_small")).predict_from(noise, x, torch.full((4,), 500))
    large = build(DiffusionConfig(variance="fixed_large")).predict_from(noise, x, torch.full((4,), 500))
    torch.testing.assert_close(learned.variance[0], large.variance[0])
    torch.testing.assert_close(learned.variance[1], small.variance[1])
    torch.testing.assert_close(learned.log_variance[2], (small.log_variance[2] + large.log_variance[2]) / 2)
    first = build(DiffusionConfig(variance="fixed_large")).predict_from(noise, x, torch.zeros(4, dtype=torch.long))
    assert first.variance[0, 0, 0, 0] == np.float32(build(DiffusionConfig()).tables["posterior_variance"][1])
    torch.testing.assert_close(learned.mean, small.mean, rtol=0, atol=0)


def test_x0_goes_through_the_hook_before_the_clamp():
    diffusion = build(DiffusionConfig(predict="x0", variance="fixed_small"))
    x, t, _ = sample_inputs()
    p = diffusion.p_mean_variance(constant(x * 3), x, t, clip_denoised=True, denoised_fn=lambda x0: x0 + 10)
    assert (p.x0 == 1).all()


def test_network_gets_original_timesteps_and_passes_extra_through():
    diffusion = build(DiffusionConfig(respacing="50", variance="fixed_small"))
    x, _, noise = sample_inputs()
    seen = []

    def model(x, t, y):
        seen.append((t, y))
        return noise, "extra"

    p = diffusion.p_mean_variance(model, x, torch.tensor([0, 1, 2, 49]), model_kwargs={"y": 7})
    assert seen[0][0].tolist() == [0, 20, 41, 999] and seen[0][1] == 7 and p.extra == "extra"


def test_one_step_process_works_with_learned_variance():
    diffusion = build(DiffusionConfig(respacing="1"))
    x0, _, noise = sample_inputs()
    t = torch.zeros(4, dtype=torch.long)
    terms = diffusion.training_losses(constant(torch.cat([noise, noise], 1)), x0, t, noise)
    p = diffusion.predict_from(torch.cat([noise, noise], 1), x0, t)
    assert torch.isfinite(terms["loss"]).all()
    torch.testing.assert_close(p.log_variance, torch.full_like(x0, math.log(1e-4)))


# ---- losses


def test_bound_trains_the_variance_only():
    diffusion = build(DiffusionConfig())
    x0, t, noise = sample_inputs()
    output = torch.cat([noise + 0.1, torch.zeros_like(noise)], 1).requires_grad_()
    diffusion.training_losses(constant(output), x0, t, noise)["vb"].sum().backward()
    assert (output.grad[:, :3] == 0).all() and (output.grad[:, 3:] != 0).any()


def test_kl_trains_the_mean_too():
    diffusion = build(DiffusionConfig(loss="kl"))
    x0, t, noise = sample_inputs()
    output = torch.cat([noise + 0.1, torch.zeros_like(noise)], 1).requires_grad_()
    diffusion.training_losses(constant(output), x0, t, noise)["loss"].sum().backward()
    assert (output.grad[:, :3] != 0).any() and (output.grad[:, 3:] != 0).any()


def test_loss_kinds_are_multiples_of_the_same_terms():
    x0, _, noise = sample_inputs()
    t = torch.tensor([0, 1, 20, 49])
    model = constant(torch.cat([noise * 0.8, noise * 0.3], 1))
    kinds = ("mse", "rescaled_mse", "kl", "rescaled_kl")
    terms = {kind: build(DiffusionConfig(loss=kind, respacing="50")).training_losses(model, x0, t, noise) for kind in kinds}
    mse, vb = terms["mse"]["mse"], terms["mse"]["vb"]
    torch.testing.assert_close(terms["mse"]["loss"], mse + vb)
    torch.testing.assert_close(terms["rescaled_mse"]["loss"], mse + vb * 0.05)
    torch.testing.assert_close(terms["kl"]["loss"], vb)
    torch.testing.assert_close(terms["rescaled_kl"]["loss"], vb * 50)
    assert mse.shape == vb.shape == (4,)


def test_perfect_prediction_has_no_loss():
    x0, t, noise = sample_inputs(t=(3, 10, 500, 999))
    for predict, output in (("eps", noise), ("x0", x0)):
        v = torch.full_like(x0, -1.0)  # the lower bound of the variance is the posterior's own
        terms = build(DiffusionConfig(predict=predict)).training_losses(constant(torch.cat([output, v], 1)), x0, t, noise)
        assert terms["mse"].abs().max() == 0 and terms["vb"].abs().max() < 1e-4


def test_fixed_variance_has_no_bound():
    x0, t, noise = sample_inputs()
    terms = build(DiffusionConfig(variance="fixed_large")).training_losses(constant(noise * 0), x0, t, noise)
    assert set(terms) == {"loss", "mse"}
    torch.testing.assert_close(terms["mse"], (noise**2).mean(dim=(1, 2, 3)))


def test_channel_axis_of_videos():
    """b t c h w with the channels on axis 2 gives what b c h w gives frame by frame."""
    x0, t, noise = sample_inputs(shape=(4, 2, 3, 5, 6))
    output = torch.cat([noise * 0.9, noise * 0.2], dim=2)
    terms = build(DiffusionConfig(), channel_dim=2).training_losses(constant(output), x0, t, noise)
    frames = [build(DiffusionConfig()).training_losses(constant(output[:, f]), x0[:, f], t, noise[:, f])["loss"] for f in range(2)]
    torch.testing.assert_close(terms["loss"], torch.stack(frames).mean(0))


def test_half_precision_output_is_judged_in_float32():
    diffusion = build(DiffusionConfig())
    x0, t, noise = sample_inputs()
    output = torch.cat([noise * 0.9, noise * 0.2], 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        terms = diffusion.training_losses(constant(output), x0, t, noise)
    expected = diffusion.training_losses(constant(output.float()), x0, t, noise)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_kl_and_bins():
    mean, log_variance = torch.tensor([0.0, 1.0]), torch.tensor([0.0, -1.0])
    p, q = (torch.distributions.Normal(mean[i], (log_variance[i] / 2).exp()) for i in (0, 1))
    expected = torch.distributions.kl_divergence(q, p)
    torch.testing.assert_close(normal_kl(mean[1], log_variance[1], mean[0], log_variance[0]), expected)
    levels = torch.arange(256) / 127.5 - 1
    total = discretised_log_likelihood(levels, torch.tensor(0.1), torch.tensor(-3.0)).exp().sum()
    assert total == pytest.approx(1, abs=1e-4)  # the bins cover the line


def test_prior_and_whole_bound():
    diffusion = build(DiffusionConfig(respacing="20"))
    x0, _, _ = sample_inputs()
    draws = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(1))
    terms = diffusion.bpd_loop(lambda x, t: torch.cat([x * 0.9, x * 0], 1), x0, noise=draws.__getitem__)
    assert terms["vb"].shape == terms["mse"].shape == terms["xstart_mse"].shape == (4, 20)
    torch.testing.assert_close(terms["total_bpd"], terms["vb"].sum(1) + terms["prior_bpd"])
    assert (terms["prior_bpd"] >= 0).all() and (terms["prior_bpd"] < 1e-3).all()


# ---- refusals, devices, compilation


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "warmup10"},
        {"schedule": "cosin"},
        {"respacing": "2000"},
        {"steps": 5},
        {"predict": "PREVIOUS_X"},
        {"loss": "l3"},
        {"loss": "l1", "weighting": "min_snr"},
        {"respacing": "trailing0"},
        {"schedule": "quad", "beta_start": 0.5, "beta_end": 1.5},
        {"schedule": "quad", "beta_start": 0.5, "beta_end": 0.1},
        {"schedule": "quad", "beta_start": 0.5},
        {"variance": "learned"},
    ],
)
def test_impossible_configs_are_one_line(settings):
    with pytest.raises(ConfigError, match="diffusion: ") as error:
        build(DiffusionConfig(**settings))
    assert "\n" not in str(error.value)


def test_missing_variance_channels_are_named():
    x0, t, noise = sample_inputs()
    with pytest.raises(ValueError, match=r"\[4, 3, 5, 6\].*learned_range.*\[4, 6, 5, 6\]"):
        build(DiffusionConfig()).training_losses(constant(noise), x0, t, noise)


def test_schedule_that_ends_in_pure_noise_trains_x0_but_never_inverts():
    betas = beta_schedule("jsd", 10)
    x0, _, noise = sample_inputs()
    t = torch.tensor([0, 3, 8, 9])
    terms = GaussianDiffusion(betas, predict="x0", variance="fixed_small").training_losses(constant(noise), x0, t, noise)
    assert torch.isfinite(terms["loss"]).all()
    with pytest.raises(ValueError, match="jsd"):
        GaussianDiffusion(betas, variance="fixed_small").predict_from(noise, x0, t)


def test_flops_are_counted_on_the_meta_device():
    diffusion = build(DiffusionConfig())
    weight = torch.empty(3, 6, device="meta", requires_grad=True)
    x = torch.empty(4, 3, 5, 6, device="meta")
    t = torch.empty(4, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model = lambda x, t: torch.einsum("bchw,cd->bdhw", x, weight)  # noqa: E731
        diffusion.training_losses(model, x, t, torch.empty_like(x))["loss"].mean().backward()
    assert counter.get_total_flops() == 2 * (2 * 4 * 5 * 6 * 3 * 6)


def test_compiles_as_one_graph():
    diffusion = build(DiffusionConfig())
    x0, t, noise = sample_inputs()

    def loss(x0, t, noise):
        return diffusion.training_losses(lambda x, t: torch.cat([x, x], 1), x0, t, noise)["loss"]

    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(x0, t, noise), loss(x0, t, noise))
