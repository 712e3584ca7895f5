"""Samplers, guidance and the choice of timesteps."""

from functools import partial

import numpy as np
import pytest
import torch

from diffusion import DiffusionConfig, build
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.samplers import ddim_reverse, ddim_sample, ddpm_sample, drawn_every_step
from diffusion.timestep_sampler import LossSecondMomentTimesteps, UniformTimesteps

MEAN, STD = 0.3, 0.5


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny operations: waking threads for each is all cost, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussian_denoiser(diffusion, x, t):
    """The best possible eps for data drawn from N(MEAN, STD^2), at original timesteps of the linear 1000-step process."""
    level = torch.from_numpy(build(DiffusionConfig()).tables["alphas_cumprod"])[t].view(-1, 1)
    x = x.double()
    x0 = MEAN + STD**2 * level.sqrt() / (level * STD**2 + 1 - level) * (x - level.sqrt() * MEAN)
    eps = ((x - level.sqrt() * x0) / (1 - level).sqrt()).float()
    if diffusion.variance == "learned_range":
        return torch.cat([eps, torch.zeros_like(eps)], 1)
    return eps if diffusion.predict == "eps" else x0.float()


def start(samples=4000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 1, generator=generator), generator


@pytest.mark.parametrize("config", [{}, {"variance": "fixed_small"}, {"variance": "fixed_large", "predict": "x0"}])
def test_ddpm_reaches_the_data_distribution(config):
    diffusion = build(DiffusionConfig(**config))
    x_T, generator = start()
    x = ddpm_sample(diffusion, partial(gaussian_denoiser, diffusion), x_T, noise=drawn_every_step(x_T, generator))
    assert x.mean() == pytest.approx(MEAN, abs=0.03) and x.std() == pytest.approx(STD, rel=0.04)


@pytest.mark.parametrize(("eta", "respacing"), [(0.0, "250"), (0.5, "ddim250"), (1.0, "")])
def test_ddim_reaches_the_data_distribution(eta, respacing):
    diffusion = build(DiffusionConfig(respacing=respacing))
    x_T, generator = start()
    x = ddim_sample(diffusion, partial(gaussian_denoiser, diffusion), x_T, noise=drawn_every_step(x_T, generator), eta=eta)
    assert x.mean() == pytest.approx(MEAN, abs=0.03) and x.std() == pytest.approx(STD, rel=0.04)


def test_ddim_with_eta_1_is_ddpm_with_the_small_variance():
    diffusion = build(DiffusionConfig(respacing="50", variance="fixed_small"))
    model = partial(gaussian_denoiser, diffusion)
    x_T, _ = start(100)
    noise = torch.randn(50, 100, 1, generator=torch.Generator().manual_seed(3)).__getitem__
    torch.testing.assert_close(ddim_sample(diffusion, model, x_T, noise=noise, eta=1.0), ddpm_sample(diffusion, model, x_T, noise=noise))


def test_reverse_leads_back():
    diffusion = build(DiffusionConfig())
    model = partial(gaussian_denoiser, diffusion)
    x_0 = start(100)[0] * STD + MEAN
    x_T = ddim_reverse(diffusion, model, x_0)
    assert (x_T - x_0).abs().max() > 0.3
    torch.testing.assert_close(ddim_sample(diffusion, model, x_T), x_0, rtol=0, atol=0.02)


def test_only_noise_that_counts_is_asked_for():
    diffusion = build(DiffusionConfig(respacing="5"))
    model = partial(gaussian_denoiser, diffusion)
    x_T, _ = start(4)
    asked = []

    def noise(k):
        asked.append(k)
        return torch.zeros(4, 1)

    ddpm_sample(diffusion, model, x_T, noise=noise)
    ddim_sample(diffusion, model, x_T, noise=noise, eta=0.5)
    ddim_sample(diffusion, model, x_T, noise=noise)
    ddim_sample(diffusion, model, x_T)
    assert asked == [0, 1, 2, 3] * 2


def test_published_order_of_draws():
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(3, 1, generator=generator)
    noise = drawn_every_step(x_T, generator)
    draws = [noise(0), noise(2)]
    reference = torch.Generator().manual_seed(0)
    sequence = [torch.randn(3, 1, generator=reference) for _ in range(4)]
    assert torch.equal(draws[0], sequence[1]) and torch.equal(draws[1], sequence[3])
    with pytest.raises(ValueError, match="order"):
        noise(1)


def test_callback_sees_every_step_and_gradients_are_off():
    diffusion = build(DiffusionConfig(respacing="5", variance="fixed_small"))
    x_T, _ = start(4)
    seen = []
    weight = torch.ones(1, requires_grad=True)
    final = ddim_sample(diffusion, lambda x, t: x * weight, x_T, callback=lambda k, x, x0: seen.append((k, x, x0)))
    assert [k for k, _, _ in seen] == list(range(5)) and torch.equal(seen[-1][1], final) and not final.requires_grad


def test_impossible_eta_is_refused():
    diffusion = build(DiffusionConfig(respacing="5"))
    with pytest.raises(ValueError, match="eta"):
        ddim_sample(diffusion, lambda x, t: x, torch.zeros(1, 1), eta=1.5)
    with pytest.raises(ValueError, match="noise"):
        ddim_sample(diffusion, lambda x, t: x, torch.zeros(1, 1), eta=0.5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_classifier_guidance_reaches_the_conditional_distribution(sampler):
    """A classifier that is Gaussian in the noisy sample's x_0 turns N(MEAN, STD^2) into the product of both Gaussians."""
    diffusion = build(DiffusionConfig(respacing="250", variance="fixed_small"))
    levels = torch.from_numpy(build(DiffusionConfig()).tables["alphas_cumprod"])
    target, spread = 0.8, 0.5

    def log_prob_gradient(x, t):
        level = levels[t].view(-1, 1).float()
        gain = STD**2 * level.sqrt() / (level * STD**2 + 1 - level)
        x0 = MEAN + gain * (x - level.sqrt() * MEAN)
        variance = spread**2 + STD**2 * (1 - level) / (level * STD**2 + 1 - level)
        x = x.requires_grad_()
        x0 = MEAN + gain * (x - level.sqrt() * MEAN)
        return torch.autograd.grad((-((x0 - target) ** 2) / (2 * variance)).sum(), x)[0]

    x_T, generator = start()
    model = partial(gaussian_denoiser, diffusion)
    sample = ddpm_sample if sampler == "ddpm" else ddim_sample
    x = sample(diffusion, model, x_T, noise=drawn_every_step(x_T, generator), cond_fn=log_prob_gradient)
    assert x.mean() == pytest.approx((MEAN + target) / 2, abs=0.03) and x.std() == pytest.approx(STD / 2**0.5, rel=0.05)


# ---- classifier-free guidance


def conditional_network(x, t, y):
    """eps and v that depend on the label."""
    y = y.float().view(-1, 1, 1, 1)
    return torch.cat([x * 0.9 + 0.1 * y, torch.sin(x + y)], 1)


def test_guidance_equals_the_doubled_state_of_the_release():
    diffusion = build(DiffusionConfig(respacing="6"))
    generator = torch.Generator().manual_seed(0)
    x_T, noise = torch.randn(2, 4, 3, 3, generator=generator), torch.randn(6, 4, 4, 3, 3, generator=generator)
    y, null = torch.tensor([1, 3]), 10

    def doubled(x, t):
        half = x[:2]
        output = conditional_network(torch.cat([half, half]), t, torch.cat([y, torch.full_like(y, null)]))
        conditional, unconditional = output[:, :3].chunk(2)
        eps = unconditional + 4.0 * (conditional - unconditional)
        return torch.cat([torch.cat([eps, eps]), output[:, 3:]], 1)

    expected = ddpm_sample(diffusion, doubled, torch.cat([x_T, x_T]), noise=noise.__getitem__)[:2]
    guided = ClassifierFreeGuidance(conditional_network, 4.0, {"y": null}, channels=3)
    ours = ddpm_sample(diffusion, guided, x_T, noise=lambda k: noise[k, :2], model_kwargs={"y": y})
    assert torch.equal(ours, expected)


def test_all_eps_channels_are_guided_by_default_and_the_variance_never():
    x, t, y = torch.randn(2, 4, 3, 3), torch.zeros(2, dtype=torch.long), torch.tensor([1, 3])
    conditional = conditional_network(x, t, y)
    difference = ClassifierFreeGuidance(conditional_network, 2.0, {"y": 10})(x, t, y=y) - conditional
    assert (difference[:, :4] != 0).all() and (difference[:, 4:] == 0).all()
    difference = ClassifierFreeGuidance(conditional_network, 2.0, {"y": 10}, channels=3)(x, t, y=y) - conditional
    assert (difference[:, :3] != 0).all() and (difference[:, 3:] == 0).all()


def test_guidance_of_videos_masks_and_vectors():
    """Channels on axis 2; a drop mask and a null vector as conditions; other tensors are repeated, other values passed on."""
    sizes = []

    def network(x, t, drop, vector, keyframe, flag):
        sizes.append((len(x), len(t), len(keyframe), flag))
        condition = torch.where(drop, 0.0, vector.sum(1) + 1).view(-1, 1, 1, 1, 1)
        return torch.cat([x + condition, x], 2)

    x, t = torch.zeros(2, 5, 3, 2, 2), torch.zeros(2, dtype=torch.long)
    guided = ClassifierFreeGuidance(network, 3.0, {"drop": True, "vector": torch.zeros(4)}, channel_dim=2)
    out = guided(x, t, drop=torch.zeros(2, dtype=torch.bool), vector=torch.ones(2, 4), keyframe=torch.zeros(2, 3), flag="f")
    assert sizes == [(4, 4, 4, "f")] and (out[:, :, :3] == 15).all() and (out[:, :, 3:] == 0).all()


def test_scale_1_runs_the_network_once_on_the_plain_batch():
    x, t, y = torch.randn(2, 4, 3, 3), torch.zeros(2, dtype=torch.long), torch.tensor([1, 3])
    seen = []

    def network(x, t, y):
        seen.append(len(x))
        return conditional_network(x, t, y)

    assert torch.equal(ClassifierFreeGuidance(network, 1.0, {"y": 10})(x, t, y=y), conditional_network(x, t, y)) and seen == [2]


def test_guidance_without_its_condition_is_refused():
    with pytest.raises(ValueError, match="null"):
        ClassifierFreeGuidance(conditional_network, 2.0, {})
    with pytest.raises(ValueError, match="for y, which"):
        ClassifierFreeGuidance(conditional_network, 2.0, {"y": 10})(torch.zeros(1, 1), torch.zeros(1))


# ---- timesteps


def test_uniform_timesteps_cover_the_range():
    t, weight = UniformTimesteps(10).sample((torch.arange(1000) + 0.5) / 1000)
    assert t.bincount().tolist() == [100] * 10 and (weight == 1).all()


def test_loss_second_moment_prefers_high_losses_once_its_history_is_full():
    sampler = LossSecondMomentTimesteps(4, history=2, uniform_prob=0.0)
    uniform = torch.arange(10000) / 10000
    sampler.update(torch.tensor([0, 1, 2, 3, 0, 1, 2]), torch.tensor([9.0, 1, 1, 1, 9, 1, 1]))
    assert sampler.weights().tolist() == [1] * 4
    sampler.update(torch.tensor([3, 0, 0]), torch.tensor([1.0, 3, 3]))  # the nines leave the history
    t, weight = sampler.sample(uniform)
    np.testing.assert_allclose(t.bincount() / 10000, [0.5, 1 / 6, 1 / 6, 1 / 6], atol=1e-3)
    torch.testing.assert_close(weight[t == 0].unique(), torch.tensor([0.5]))
    other = LossSecondMomentTimesteps(4, history=2, uniform_prob=0.0)
    other.load_state_dict(sampler.state_dict())
    assert (other.weights() == sampler.weights()).all()
    with pytest.raises(ValueError, match="does not fit"):
        LossSecondMomentTimesteps(5, history=2).load_state_dict(sampler.state_dict())
