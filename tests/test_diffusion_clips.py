"""What sampling clip after clip adds: the quad schedule and L1, trailing steps, DDIM that keeps the predicted noise, and guidance that
sets a condition to a value."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion import DiffusionConfig, GaussianDiffusion, build
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.samplers import ddim_sample
from diffusion.schedules import space_timesteps
from pipelines.sampling import Sampling, count_steps, sample
from tests.gaussian_target import draw, exact_network
from utils.errors import ConfigError
from utils.rng import SampleRng

QUAD = DiffusionConfig(schedule="quad", variance="fixed_small")


def rng(count: int = 3) -> SampleRng:
    return SampleRng(5, torch.arange(count))


# ---- schedule and loss


def test_roots_of_the_quad_schedule_are_on_a_line():
    process = build(QUAD)
    np.testing.assert_allclose(np.sqrt(process.tables["betas"]), np.linspace(math.sqrt(0.0015), math.sqrt(0.0195), 1000))
    own = build(DiffusionConfig(schedule="quad", beta_start=1e-4, beta_end=0.09, steps=3))
    np.testing.assert_allclose(own.tables["betas"], [1e-4, 0.155**2, 0.09])
    line = build(DiffusionConfig(beta_start=0.1, beta_end=0.3, steps=3))
    np.testing.assert_allclose(line.tables["betas"], [0.1, 0.2, 0.3])
    np.testing.assert_allclose(build(DiffusionConfig(steps=50)).tables["betas"], np.linspace(0.002, 0.4, 50))


def test_one_end_alone_may_be_given():
    assert build(DiffusionConfig(schedule="quad", beta_end=0.02)).tables["betas"][[0, -1]] == pytest.approx([0.0015, 0.02])


@pytest.mark.parametrize("other", [{"process": "flow"}, {"schedule": "squaredcos_cap_v2"}])
def test_ends_without_effect_are_refused(other):
    with pytest.raises(ConfigError, match=r"diffusion.beta_start 0.001: means nothing"):
        build(DiffusionConfig(beta_start=1e-3, **other))


def test_weights_of_the_bound_are_those_of_the_squared_error():
    """KL of the posteriors in nats = weight times the squared error of eps, at every step but the first."""
    process = build(DiffusionConfig(steps=20, schedule="quad", variance="fixed_small", loss="kl"))
    x0, noise = draw(1)
    for step in range(1, 20):
        t = torch.tensor([step])
        terms = process.training_losses(lambda x, t: noise + 0.3, x0, t, noise)
        assert float(terms["vb"]) * math.log(2) == pytest.approx(process.tables["lvlb_weights"][step] * 0.09, rel=2e-4)
    assert process.tables["lvlb_weights"][0] == process.tables["lvlb_weights"][1]


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_l1_is_the_mean_distance_and_carries_the_bound(predict):
    x0, noise = draw(4)
    t = torch.tensor([0, 9, 500, 999])
    losses = {}
    for loss in ("l1", "mse"):
        process = build(DiffusionConfig(predict=predict, loss=loss))
        losses[loss] = process.training_losses(lambda x, t: torch.cat([0.5 * x, torch.sin(x)], 1), x0, t, noise)
    target = {"eps": noise, "x0": x0, "v": process.velocity(x0, t, noise)}[predict]
    expected = (target - 0.5 * process.q_sample(x0, t, noise)).abs().mean(dim=(1, 2, 3))
    assert losses["l1"].keys() == {"loss", "l1", "vb"}
    torch.testing.assert_close(losses["l1"]["l1"], expected)
    torch.testing.assert_close(losses["l1"]["vb"], losses["mse"]["vb"])
    torch.testing.assert_close(losses["l1"]["loss"], expected + losses["mse"]["vb"])


# ---- trailing steps


def test_known_trailing_steps():
    assert space_timesteps(1000, "trailing400")[::-1][:4] == [999, 996, 994, 991]
    assert space_timesteps(1000, "trailing4") == [249, 499, 749, 999] and space_timesteps(1000, "trailing1") == [999]
    assert space_timesteps(7, "trailing7") == list(range(7))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.data())
def test_trailing_steps_are_as_many_as_asked_for_and_end_in_the_noisiest(steps, data):
    wanted = data.draw(st.integers(1, steps))
    kept = space_timesteps(steps, f"trailing{wanted}")
    assert len(set(kept)) == wanted and kept == sorted(kept) and kept[0] >= 0 and kept[-1] == steps - 1
    assert all(abs(index - (steps * (k + 1) / wanted - 1)) <= 1.001 for k, index in enumerate(kept))


@pytest.mark.parametrize("spec", ["trailing0", "trailing1001", "trailing-3", "trailing", "trailing2.5", "trailing3,4", "ddim5,10"])
def test_impossible_steps_are_refused(spec):
    with pytest.raises(ValueError, match="respacing"):
        space_timesteps(1000, spec)


def test_trailing_steps_are_a_setting_of_sampling():
    sampling = Sampling(respacing="trailing20", eta=1.0)
    assert count_steps(QUAD, sampling) == 20
    with pytest.raises(ConfigError, match="trailing1001"):
        count_steps(QUAD, Sampling(respacing="trailing1001"))


# ---- the noise that was predicted


def wild(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network whose clean sample leaves [-1, 1] often."""
    return torch.tanh(0.9 * x + 0.0005 * t.view(-1, 1, 1, 1))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_kept_noise_is_that_of_the_network(eta):
    """The step by hand; and another one than with the noise that leads to the clipped sample."""
    process = build(DiffusionConfig(steps=20, schedule="quad", variance="fixed_small"))
    x, noise = draw(2, 1)[1], draw(2, 2)[1]
    levels = process.tables["alphas_cumprod"]
    states = {True: [], False: []}
    for keep, steps in states.items():
        options = {"eta": eta, "clip_denoised": True, "keep_eps": keep}
        ddim_sample(process, wild, x, noise=lambda k: noise, **options, callback=lambda k, x, x0, steps=steps: steps.append(x))
    eps = wild(x, torch.full((2,), 19)).double()
    level, following = levels[19], levels[18]
    x0 = ((x.double() - math.sqrt(1 - level) * eps) / math.sqrt(level)).clamp(-1, 1)
    sigma = eta * math.sqrt((1 - level / following) * (1 - following) / (1 - level))
    expected = math.sqrt(following) * x0 + math.sqrt(1 - following - sigma**2) * eps + sigma * noise
    torch.testing.assert_close(states[True][0].double(), expected, rtol=0, atol=1e-5)
    assert (states[True][0] - states[False][0]).abs().max() > 1e-2


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_without_clipping_there_is_nothing_to_keep(predict):
    """The predicted noise then leads to the sample, in every word a network may use; of x0 it does with clipping too."""
    config = DiffusionConfig(steps=50, predict=predict, variance="fixed_small")
    process, network = build(config), exact_network(config)
    assert isinstance(process, GaussianDiffusion)
    x = draw(3)[1]
    for clip in (False, True) if predict == "x0" else (False,):
        kept, derived = (ddim_sample(process, network, x, clip_denoised=clip, keep_eps=keep) for keep in (True, False))
        torch.testing.assert_close(kept, derived, rtol=0, atol=2e-5)


def test_eps_and_v_keep_the_same_noise():
    """The same estimate in two words: the same trajectory."""
    x = draw(3)[1]
    as_eps = build(DiffusionConfig(steps=50, schedule="quad", variance="fixed_small"))
    as_v = build(DiffusionConfig(steps=50, schedule="quad", variance="fixed_small", predict="v"))

    def in_v(x, t):
        eps = wild(x, t)
        return as_v.velocity(as_v.x0_from_eps(x, t, eps), t, eps)

    ends = [ddim_sample(process, net, x, clip_denoised=True, keep_eps=True) for process, net in ((as_eps, wild), (as_v, in_v))]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)


def test_keep_eps_is_refused_where_it_would_do_nothing():
    for sampling in (Sampling(keep_eps=True), Sampling(keep_eps=True, clip=True, sampler="ddpm")):
        with pytest.raises(ConfigError, match="keep_eps: only ddim with clip"):
            sampling.resolved(QUAD)
    with pytest.raises(ValueError, match="one of them"):
        ddim_sample(build(QUAD), wild, draw(1)[1], clip_denoised=True, keep_eps=True, cond_fn=wild)
    assert Sampling(keep_eps=True, clip=True).settings(QUAD)["keep_eps"] and "keep_eps" not in Sampling(clip=True).settings(QUAD)


# ---- guidance by a value


class Network:
    """Listens to a previous clip and to a label, and counts its calls and the rows that went through it."""

    def __init__(self):
        self.calls, self.rows = 0, 0

    def __call__(self, x, t, previous=None, y=None, drop=None):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        out = torch.tanh(0.9 * x + 0.3 * (0 if previous is None else previous))
        if y is None:
            return out
        label = y.float() if drop is None else torch.where(drop, 9.0, y.float())
        return out + 0.01 * label.view(-1, 1, 1)


SHAPE = (4, 8)
SAMPLING = Sampling(respacing="trailing6", eta=1.0, clip=True, keep_eps=True, guidance=2.5)


def drawn(model, sampling=SAMPLING, **kwargs):
    return sample(model, QUAD, SHAPE, rng(), "x", sampling, **kwargs)


def test_guidance_sets_the_previous_clip_to_its_null_value():
    """Against the published form (1 + w) e(previous) - w e(0)."""
    previous, w = rng().normal("previous", SHAPE), 1.5
    network = Network()

    def published(x, t):
        return (1 + w) * network(x, t, previous) - w * network(x, t, 0 * previous)

    ours = drawn(Network(), condition={"previous": previous}, null={"previous": 0.0})
    torch.testing.assert_close(ours, drawn(published), rtol=0, atol=1e-5)
    assert (ours - drawn(Network(), always={"previous": previous})).abs().max() > 1e-3


def test_null_values_and_drop_go_together():
    previous, y = rng().normal("previous", SHAPE), torch.tensor([1, 2, 3])

    def by_hand(x, t):
        with_both = Network()(x, t, previous, y)
        without = Network()(x, t, 0 * previous, torch.full_like(y, 9))
        return without + 2.5 * (with_both - without)

    both = drawn(Network(), condition={"previous": previous, "y": y}, null={"previous": 0.0})
    torch.testing.assert_close(both, drawn(by_hand), rtol=0, atol=1e-5)
    only = drawn(Network(), condition={"y": y}, always={"previous": previous}, null={"previous": 0.0})
    assert (only - both).abs().max() > 1e-3


def test_no_guidance_costs_one_forward():
    """Neither with scale 1 nor where there is no condition to take away."""
    previous = rng().normal("previous", SHAPE)
    for guidance, condition, rows in ((1.0, {"previous": previous}, 18), (2.5, {}, 18), (2.5, {"previous": previous}, 36)):
        network = Network()
        sampling = Sampling(respacing="trailing6", guidance=guidance)
        drawn(network, sampling, condition=condition, null={"previous": 0.0})
        assert (network.calls, network.rows) == (6, rows)


def test_guidance_of_scale_one_is_the_network_itself():
    network = Network()
    ClassifierFreeGuidance(network, 1.0, {"previous": 0.0})(torch.zeros(2, 4, 8), torch.zeros(2), previous=torch.ones(2, 4, 8))
    assert network.rows == 2
