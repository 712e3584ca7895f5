"""Likelihood terms in bits per dimension (spec: diffusion section 5)."""

import math

import torch
from torch import Tensor

LN2 = math.log(2.0)
BIN = 1.0 / 255.0
"""Half the width of a pixel value's bin in [-1, 1]; used for latents too, as the published losses do."""


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the batch axis, (b, ...) -> (b,)."""
    return x.mean(dim=tuple(range(1, x.ndim)))


def normal_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q || p) of diagonal Gaussians in nats, elementwise."""
    scaled = (mean_q - mean_p) ** 2 * torch.exp(-log_variance_p)
    return 0.5 * (-1.0 + log_variance_p - log_variance_q + torch.exp(log_variance_q - log_variance_p) + scaled)


def _normal_cdf(z: Tensor) -> Tensor:
    """The tanh approximation of the standard normal distribution function."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3))))


def discretised_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log probability (nats, elementwise) that a Gaussian gives to the bin of width 2/255 around x0, with open bins at -1 and 1."""
    offset = x0 - mean
    inverse_std = torch.exp(-0.5 * log_variance)
    below_upper = _normal_cdf(inverse_std * (offset + BIN))
    below_lower = _normal_cdf(inverse_std * (offset - BIN))
    log_lowest = below_upper.clamp(min=1e-12).log()
    log_highest = (1.0 - below_lower).clamp(min=1e-12).log()
    log_inner = (below_upper - below_lower).clamp(min=1e-12).log()
    return torch.where(x0 < -0.999, log_lowest, torch.where(x0 > 0.999, log_highest, log_inner))
