"""Rectified flow: the straight path between data and noise, and a network that predicts its velocity.

x_t = (1 - t) x_0 + t n for a time t in [0, 1] (0: data, 1: noise), velocity v = n - x_0 (Liu et al. 2023; Lipman et al. 2023), loss the
mean of (v - network)^2. Training times are uniform or logit-normal (Esser et al. 2024, section 3.1); then, as in the sampler's grid,
they are moved towards noise by t' = s t / (1 + (s - 1) t) (same, section 5.3.2), which large inputs need.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffusion.gaussian import Denoiser
from diffusion.likelihood import mean_flat
from utils.rng import SampleRng

TimeSampling = Literal["logit_normal", "uniform"]
TIME_SCALE = 1000
"""The network is given t times this, the range that its timestep embedding is made for."""

HALF_STEP = 2.0**-25
"""Half the spacing of an addressed uniform number: with it added the number is inside (0, 1) and its logit finite."""


class FlowMatching:
    """The flow. Tensors are (b, ...), t is (b,) float32 in [0, 1]. All arithmetic is float32, whatever precision the network ran in."""

    num_timesteps = TIME_SCALE
    terms = ("loss", "mse")
    """Names of what `training_losses` gives."""

    def __init__(
        self, *, time_sampling: TimeSampling = "logit_normal", logit_mean: float = 0.0, logit_std: float = 1.0, time_shift: float = 1.0
    ) -> None:
        if time_sampling not in ("logit_normal", "uniform"):
            raise ValueError(f"time_sampling {time_sampling!r} is not offered; choose logit_normal, uniform")
        for name, value in (("logit_std", logit_std), ("time_shift", time_shift)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} {value}: a number above 0 is wanted")
        if not math.isfinite(logit_mean):
            raise ValueError(f"logit_mean {logit_mean}: a number is wanted")
        self.time_sampling, self.logit_mean, self.logit_std, self.time_shift = time_sampling, logit_mean, logit_std, time_shift

    # ---- times

    def sample_timesteps(self, rng: SampleRng) -> Tensor:
        """A training time for each sample, (b,) float32, the same on every device."""
        u = rng.uniform("timestep").double() + HALF_STEP
        if self.time_sampling == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))
        return self.shifted(u).float()

    def shifted(self, t: Any) -> Any:
        """Times (numbers, arrays or tensors) moved towards noise by `time_shift`; 0 and 1 stay."""
        return self.time_shift * t / (1 + (self.time_shift - 1) * t)

    def time_grid(self, steps: int) -> np.ndarray:
        """Times of a sampler from 1 down to 0, (steps + 1,) float64: even, then shifted."""
        if steps < 1:
            raise ValueError(f"{steps} sampling steps: at least 1")
        return self.shifted(np.linspace(1.0, 0.0, steps + 1))

    # ---- the path and the network's view of it

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t for standard normal `noise` of x0's shape."""
        x0, noise = x0.float(), noise.float()
        t = _like(t, x0)
        return (1 - t) * x0 + t * noise

    def x0_from_velocity(self, x_t: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """Where the straight line through x_t meets the data."""
        return x_t - _like(t, x_t) * velocity

    def call(self, model: Denoiser, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None = None) -> Tensor:
        """The network's velocity at time t, float32, of x's shape."""
        output = model(x, t * TIME_SCALE, **(model_kwargs or {}))
        output = output[0] if isinstance(output, tuple) else output
        if output.shape != x.shape:
            raise ValueError(f"the network returned {list(output.shape)}; a flow needs {list(x.shape)}: its velocity, without variance")
        return output.float()

    def training_losses(
        self, model: Denoiser, x0: Tensor, t: Tensor, noise: Tensor, model_kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Per-sample `loss` and the same as `mse`, each (b,) float32."""
        x0, noise = x0.float(), noise.float()
        velocity = self.call(model, self.q_sample(x0, t, noise), t, model_kwargs)
        mse = mean_flat((noise - x0 - velocity) ** 2)
        return {"loss": mse, "mse": mse}


def _like(t: Tensor, x: Tensor) -> Tensor:
    """(b,) -> (b, 1, ...) to broadcast against x."""
    return t.float().reshape(-1, *[1] * (x.ndim - 1))
