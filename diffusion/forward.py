"""The forward side of a Gaussian diffusion process: its tables, noising, and how x_t, x_0, the noise and the velocity follow from each
other (spec: diffusion sections 2-5). Tensors are (b, ...); t is (b,) int64, an index of this (possibly respaced) process.

With a = sqrt(A), s = sqrt(1 - A): x_t = a x_0 + s eps, and the velocity v = a eps - s x_0 (Salimans and Ho 2022, section 4), so that
x_0 = a x_t - s v and eps = s x_t + a v.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion.schedules import check_betas, tables


class ForwardProcess:
    """T = len(betas) steps of noising. `timestep_map`: the index that the network is given for each step (default: the step itself)."""

    def __init__(self, betas: Sequence[float] | np.ndarray, timestep_map: Sequence[int] | None = None) -> None:
        betas = check_betas(betas)
        self.num_timesteps = len(betas)
        self.timestep_map = list(range(len(betas))) if timestep_map is None else list(timestep_map)
        if len(self.timestep_map) != self.num_timesteps:
            raise ValueError(f"timestep_map has {len(self.timestep_map)} entries for {self.num_timesteps} steps")
        self.tables = tables(betas)
        """Name -> (T,) float64."""
        self._ends_in_noise = bool(betas[-1] == 1.0)  # A reaches 0 and 1/A infinity: x_0 and eps cannot be told from each other there
        on_cpu = {name: torch.from_numpy(table).float() for name, table in self.tables.items()}
        on_cpu["timestep_map"] = torch.tensor(self.timestep_map)
        self._on_device = {torch.device("cpu"): on_cpu}

    def lookup(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries t of a table as float32, (b, 1, ...) to broadcast against `like`."""
        return self._device_tables(t.device)[name][t].reshape(-1, *[1] * (like.ndim - 1))

    def original_timesteps(self, t: Tensor) -> Tensor:
        """The indices that the network receives, (b,) int64."""
        return self._device_tables(t.device)["timestep_map"][t]

    def steps_of(self, timesteps: Tensor) -> Tensor:
        """The steps of this process that go by these original indices, (b,) int64; `timestep_map` is ascending."""
        return torch.searchsorted(self._device_tables(timesteps.device)["timestep_map"], timesteps)

    def _device_tables(self, device: torch.device) -> dict[str, Tensor]:
        """Float32 copies, made once a device: a lookup never copies from the host."""
        if device not in self._on_device:
            self._on_device[device] = {name: table.to(device) for name, table in self._on_device[torch.device("cpu")].items()}
        return self._on_device[device]

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t for standard normal `noise` of x0's shape."""
        x0, noise = x0.float(), noise.float()
        return self.lookup("sqrt_alphas_cumprod", t, x0) * x0 + self.lookup("sqrt_one_minus_alphas_cumprod", t, x0) * noise

    def q_mean_variance(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), each of x0's shape."""
        mean = self.lookup("sqrt_alphas_cumprod", t, x0) * x0
        variance = self.lookup("one_minus_alphas_cumprod", t, x0).expand_as(x0)
        return mean, variance, self.lookup("log_one_minus_alphas_cumprod", t, x0).expand_as(x0)

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and (clipped) log variance of q(x_{t-1} | x_t, x_0), each of x_t's shape."""
        mean = self.lookup("posterior_mean_coef1", t, x_t) * x0 + self.lookup("posterior_mean_coef2", t, x_t) * x_t
        variance = self.lookup("posterior_variance", t, x_t).expand_as(x_t)
        return mean, variance, self.lookup("posterior_log_variance_clipped", t, x_t).expand_as(x_t)

    def x0_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_0 that together with `eps` gives x_t."""
        self._check_invertible()
        return self.lookup("sqrt_recip_alphas_cumprod", t, x_t) * x_t - self.lookup("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def eps_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise that together with `x0` gives x_t."""
        self._check_invertible()
        return (self.lookup("sqrt_recip_alphas_cumprod", t, x_t) * x_t - x0) / self.lookup("sqrt_recipm1_alphas_cumprod", t, x_t)

    def x0_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The x_0 at which the velocity is `v`."""
        return self.lookup("sqrt_alphas_cumprod", t, x_t) * x_t - self.lookup("sqrt_one_minus_alphas_cumprod", t, x_t) * v

    def eps_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The noise at which the velocity is `v`."""
        return self.lookup("sqrt_one_minus_alphas_cumprod", t, x_t) * x_t + self.lookup("sqrt_alphas_cumprod", t, x_t) * v

    def velocity(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The velocity at the x_t that `noise` makes of x_0."""
        return self.lookup("sqrt_alphas_cumprod", t, x0) * noise - self.lookup("sqrt_one_minus_alphas_cumprod", t, x0) * x0

    def _check_invertible(self) -> None:
        if self._ends_in_noise:
            raise ValueError("the last beta of this schedule is 1 (jsd): x_0 cannot be recovered from eps, use another schedule")
