"""A data distribution for which everything is known: N(MU, diag(S^2)) with six different widths, and the networks that are exact for it.

With x_t = a x_0 + s n and D = a^2 S^2 + s^2: E[x_0 | x_t] = MU + a S^2 / D (x_t - a MU), whose error has the variance S^2 s^2 / D; the
deterministic path keeps (x_t - a MU) / sqrt(D).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion import DiffusionConfig, FlowMatching, GaussianDiffusion, build

MU = torch.tensor([0.3, -0.5, 0.0, 1.0, -2.0, 0.1], dtype=torch.float64).view(1, 3, 1, 2)
S = torch.tensor([0.5, 0.1, 1.0, 0.3, 2.0, 0.05], dtype=torch.float64).view(1, 3, 1, 2)


def draw(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Data and noise, (count, 3, 1, 2) each."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(count, 3, 1, 2, generator=generator) for _ in range(2))
    return (MU + S * first).float(), second


def clean(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """E[x_0 | x_t]."""
    return MU + a * S**2 / (a**2 * S**2 + s**2) * (x - a * MU)


def along_path(x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
    """Where the deterministic path takes x from (a, s) = start to end, float64."""
    (a, s), (b, r) = start, end
    return b * MU + ((b**2 * S**2 + r**2) / (a**2 * S**2 + s**2)).sqrt() * (x.double() - a * MU)


def exact_network(config: DiffusionConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The best possible network of a process, called as networks are: with original indices, or 1000 t."""
    process = build(config)

    def column(values: Tensor) -> Tensor:
        return values.double().view(-1, 1, 1, 1)

    def flow(x: Tensor, t: Tensor) -> Tensor:
        time = column(t) / 1000
        x0 = clean(x.double(), 1 - time, time)
        # E[n - x_0 | x_t]; its limit at t = 0 is -x_0, as nothing is known of n there.
        return torch.where(time > 0, (x.double() - x0) / time.clamp(min=1e-9), -x0).float()

    if isinstance(process, FlowMatching):
        return flow
    return gaussian_network(GaussianDiffusion(build_full(config).tables["betas"], predict=config.predict, variance=config.variance))


def gaussian_network(process: GaussianDiffusion) -> Callable[[Tensor, Tensor], Tensor]:
    """The best possible network of a process that is not respaced. The variance half is 0: the middle of its range."""
    levels = torch.from_numpy(process.tables["alphas_cumprod"])

    def network(x: Tensor, t: Tensor) -> Tensor:
        a, s = levels[t].sqrt().view(-1, 1, 1, 1), (1 - levels[t]).sqrt().view(-1, 1, 1, 1)
        x0 = clean(x.double(), a, s)
        eps = (x.double() - a * x0) / s
        output = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[process.predict].float()
        return torch.cat([output, torch.zeros_like(output)], 1) if process.variance == "learned_range" else output

    return network


def build_full(config: DiffusionConfig) -> GaussianDiffusion:
    """The process that the network was trained on, of a respaced one's config."""
    process = build(DiffusionConfig(steps=config.steps, schedule=config.schedule))
    assert isinstance(process, GaussianDiffusion)
    return process
