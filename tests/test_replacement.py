"""Known frames held fixed while the others are sampled, on data whose best network is known: frames that are jointly Gaussian."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import DiffusionConfig, FlowMatching, GaussianDiffusion, build
from diffusion.flow import TIME_SCALE
from diffusion.replacement import Replacement
from pipelines.sampling import Sampling, respaced, sample
from tests.gaussian_target import build_full
from tests.gaussian_target import draw as independent_draw
from tests.gaussian_target import exact_network as independent_network
from utils.rng import SampleRng

FRAMES, KNOWN, COUNT = 5, 2, 3
MEAN = torch.tensor([0.2, -0.3, 0.1, 0.4, -0.1], dtype=torch.float64)
COVARIANCE = 0.5 * torch.tensor([[0.9 ** abs(i - j) for j in range(FRAMES)] for i in range(FRAMES)], dtype=torch.float64)
"""A frame is one number and follows the one before it: an autoregressive process."""

PROCESSES = [
    *[DiffusionConfig(steps=200, predict=p, variance=v) for p in ("eps", "x0", "v") for v in ("fixed_small", "learned_range")],
    DiffusionConfig(process="flow"),
]
IDS = ["eps", "eps-learned", "x0", "x0-learned", "v", "v-learned", "flow"]


def denoised(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """E[x_0 | x_t = a x_0 + s n] of x (b, frames) float64; a and s are (b,)."""
    times, rows = torch.stack([a, s], dim=1).unique(dim=0, return_inverse=True)
    level, noise = times[:, 0, None, None], times[:, 1, None, None]
    gain = level * COVARIANCE @ torch.linalg.inv(level**2 * COVARIANCE + noise**2 * torch.eye(FRAMES, dtype=torch.float64))
    return MEAN + (gain[rows] @ (x - a[:, None] * MEAN)[..., None])[..., 0]


def levels(config: DiffusionConfig, t: Tensor) -> tuple[Tensor, Tensor]:
    """a and s (b,) at the times that a network is given."""
    if config.process == "flow":
        return 1 - t.double() / TIME_SCALE, t.double() / TIME_SCALE
    level = torch.from_numpy(build_full(config).tables["alphas_cumprod"])[t]
    return level.sqrt(), (1 - level).sqrt()


def network_of(config: DiffusionConfig, seen: list[Tensor] | None = None) -> Callable[..., Tensor]:
    """The best network of a process, for x (b, 1, frames, 1, 1)."""

    def network(x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        if seen is not None:
            seen.append(x)
        a, s = levels(config, t)
        flat = x.double().reshape(len(x), FRAMES)
        x0 = denoised(flat, a, s)
        a, s = a[:, None], s[:, None]
        eps = (flat - a * x0) / s
        kind = "flow" if config.process == "flow" else config.predict
        output = {"eps": eps, "x0": x0, "v": a * eps - s * x0, "flow": eps - x0}[kind].reshape(x.shape).float()
        learned = config.process == "ddpm" and config.variance == "learned_range"
        return torch.cat([output, torch.zeros_like(output)], dim=1) if learned else output

    return network


def known_frames(seed: int = 0, count: int = COUNT) -> tuple[Tensor, Tensor]:
    """Known frames and noise, (count, 1, KNOWN, 1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    chol = torch.linalg.cholesky(COVARIANCE)
    data = MEAN + torch.randn(count, FRAMES, generator=generator, dtype=torch.float64) @ chol.T
    noise = torch.randn(count, 1, KNOWN, 1, 1, generator=generator)
    return data[:, :KNOWN].reshape(count, 1, KNOWN, 1, 1).float(), noise


def continued(config: DiffusionConfig, sampling: Sampling, process: GaussianDiffusion | FlowMatching | None = None, **given: Any) -> Tensor:
    """Samples (COUNT, FRAMES) with the first frames known."""
    known, noise = known_frames()
    model = Replacement(network_of(config), process or build(config), known, noise)
    return sample(model, config, (1, FRAMES, 1, 1), SampleRng(7, torch.arange(COUNT)), "x", sampling, **given).reshape(COUNT, FRAMES)


@pytest.mark.parametrize("config", PROCESSES, ids=IDS)
def test_known_frames_come_out_and_the_others_follow_them(config):
    """Against the same steps written out in float64, with the noised known frames in the network's input."""
    sampling = Sampling(steps=20)
    ours = continued(config, sampling)
    known, noise = (part.reshape(COUNT, KNOWN).double() for part in known_frames())
    torch.testing.assert_close(ours[:, :KNOWN].double(), known, rtol=0, atol=2e-5)
    process = respaced(config, sampling.steps)
    if isinstance(process, FlowMatching):
        times = process.time_grid(sampling.steps)
        grid = [(1 - time, time) for time in times]
    else:
        grid = [((level**0.5), (1 - level) ** 0.5) for level in reversed([1.0, *process.tables["alphas_cumprod"]])]
    x = SampleRng(7, torch.arange(COUNT)).normal("x/start", (1, FRAMES, 1, 1)).reshape(COUNT, FRAMES).double()
    for (a, s), (b, r) in pairwise(grid):
        x = torch.cat([a * known + s * noise, x[:, KNOWN:]], dim=1)
        x0 = denoised(x, torch.full((COUNT,), a, dtype=torch.float64), torch.full((COUNT,), s, dtype=torch.float64))
        x = b * x0 + r * (x - a * x0) / s
    torch.testing.assert_close(ours[:, KNOWN:].double(), x[:, KNOWN:], rtol=0, atol=5e-5)
    free = sample(network_of(config), config, (1, FRAMES, 1, 1), SampleRng(7, torch.arange(COUNT)), "x", sampling).reshape(COUNT, FRAMES)
    assert (ours - free)[:, KNOWN].abs().min() > 1e-2


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++", "ddim"])
@pytest.mark.parametrize("config", PROCESSES[:-1], ids=IDS[:-1])
def test_every_sampler_ends_in_the_known_frames(config, sampler):
    ours = continued(config, Sampling(steps=20, sampler=sampler, eta=0.7 if sampler == "ddim" else 0.0))
    torch.testing.assert_close(ours[:, :KNOWN], known_frames()[0].reshape(COUNT, KNOWN), rtol=0, atol=2e-5)


def test_heun_ends_in_the_known_frames():
    ours = continued(DiffusionConfig(process="flow"), Sampling(steps=10, sampler="heun"))
    torch.testing.assert_close(ours[:, :KNOWN], known_frames()[0].reshape(COUNT, KNOWN), rtol=0, atol=1e-5)


def test_how_much_of_the_dependence_is_kept():
    """The next frame is 0.9 of the last known one in the data. Through noised frames less of that is heard: 0.59 by ancestral
    sampling, 0.41 by a deterministic path, as the documentation says; a free frame does not depend on the known ones at all."""
    config, rng = DiffusionConfig(steps=200, variance="fixed_small"), SampleRng(3, torch.arange(1000))
    known, noise = known_frames(count=1000)
    model, slopes = Replacement(network_of(config), build(config), known, noise), {}
    for sampler in ("ddpm", "ddim"):
        x = sample(model, config, (1, FRAMES, 1, 1), rng, "x", Sampling(steps=50, sampler=sampler)).reshape(len(rng), FRAMES)
        covariance = torch.cov(x.T)
        slopes[sampler] = float(covariance[KNOWN, KNOWN - 1] / covariance[KNOWN - 1, KNOWN - 1])
    assert abs(slopes["ddpm"] - 0.59) < 0.06 and abs(slopes["ddim"] - 0.41) < 0.06


def test_frames_that_know_nothing_of_each_other_are_sampled_as_ever():
    """Where the frames are independent the known ones change nothing, bit for bit; frames on another axis."""
    config = DiffusionConfig(steps=100, variance="fixed_small")
    known, noise = (part[:, :, :, :1] for part in independent_draw(4))
    model = independent_network(config)
    draws = [
        sample(network, config, (3, 1, 2), SampleRng(0, torch.arange(4)), "x", Sampling(steps=10))
        for network in (model, Replacement(model, build(config), known, noise, axis=3))
    ]
    torch.testing.assert_close(draws[1][..., :1], known, rtol=0, atol=2e-5)
    assert torch.equal(draws[0][..., 1:], draws[1][..., 1:])


def test_a_respaced_process_serves_as_well_and_guidance_goes_around():
    """The process of the sampler in place of that of training; guidance, which doubles the batch, leaves known frames known."""
    config, sampling = DiffusionConfig(steps=200, variance="fixed_small"), Sampling(steps=20)
    full, short = continued(config, sampling), continued(config, sampling, respaced(config, 20))
    torch.testing.assert_close(full, short, rtol=0, atol=1e-4)
    guided = continued(config, Sampling(steps=20, guidance=3.0), condition={"y": torch.zeros(COUNT, dtype=torch.long)})
    torch.testing.assert_close(guided, full, rtol=0, atol=1e-4)  # the network here does not listen to y


def test_the_network_sees_the_known_frames_at_the_level_of_the_step():
    config = DiffusionConfig(steps=200, variance="fixed_small")
    (known, noise), seen, process = known_frames(), [], build(config)
    x, t = torch.randn(COUNT, 1, FRAMES, 1, 1), torch.tensor([0, 100, 199])
    out = Replacement(network_of(config, seen), process, known, noise)(x, t)
    assert torch.equal(seen[0][:, :, :KNOWN], process.q_sample(known, t, noise)) and torch.equal(seen[0][:, :, KNOWN:], x[:, :, KNOWN:])
    torch.testing.assert_close(process.x0_from_eps(x[:, :, :KNOWN], t, out[:, :, :KNOWN]), known, rtol=0, atol=2e-5)


def test_half_precision_outputs_do_not_blur_the_known_frames():
    config = DiffusionConfig(steps=1000, variance="fixed_small")
    (known, noise), process = known_frames(), build(config)
    x, t = torch.randn(COUNT, 1, FRAMES, 1, 1), torch.full((COUNT,), 999)
    out = Replacement(lambda x, t: x.bfloat16(), process, known, noise)(x, t)
    torch.testing.assert_close(process.x0_from_eps(x[:, :, :KNOWN], t, out[:, :, :KNOWN]), known, rtol=0, atol=1e-4)


def test_wrong_frames_are_refused():
    config = DiffusionConfig(variance="fixed_small")
    known, noise = known_frames()
    with pytest.raises(ValueError, match="must be alike"):
        Replacement(network_of(config), build(config), known, noise[:, :, :1])
    model = Replacement(network_of(config), build(config), known, noise)
    with pytest.raises(ValueError, match="at least one must be left"):
        model(torch.zeros(COUNT, 1, KNOWN, 1, 1), torch.zeros(COUNT, dtype=torch.long))
