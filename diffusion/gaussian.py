"""The Gaussian diffusion process: forward noising, what a network's output says about x_{t-1}, and the training losses.

Spec: diffusion sections 2-5. Tensors are (b, ...) with the channels on `channel_dim`; t is (b,) int64, an index of this (possibly
respaced) process. All arithmetic is float32 in the order of the published code, whatever precision the network ran in.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.likelihood import LN2, discretised_log_likelihood, mean_flat, normal_kl
from diffusion.schedules import check_betas, tables

Predict = Literal["eps", "x0"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Loss = Literal["mse", "rescaled_mse", "kl", "rescaled_kl"]
Denoiser = Callable[..., Any]
"""(x, original timesteps (b,) int64, **conditions) -> output, or (output, anything)."""

FIXED_TABLES = {
    "fixed_small": ("posterior_variance", "posterior_log_variance_clipped"),
    "fixed_large": ("fixed_large_variance", "fixed_large_log_variance"),
}


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t) as the network sees it; all of x_t's shape."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0: Tensor
    extra: Any = None
    """What the network returned beside its output."""


class GaussianDiffusion:
    """A diffusion process over T = len(betas) steps.

    `predict`: what the network's first C channels are; `variance`: learned_range takes C more channels, which interpolate the log
    variance between its bounds; `timestep_map`: the index that the network is given for each step (default: the step itself).
    """

    def __init__(
        self,
        betas: Sequence[float] | np.ndarray,
        *,
        predict: Predict = "eps",
        variance: Variance = "learned_range",
        loss: Loss = "mse",
        timestep_map: Sequence[int] | None = None,
        channel_dim: int = 1,
    ) -> None:
        _check_option("predict", predict, ("eps", "x0"))
        _check_option("variance", variance, ("learned_range", *FIXED_TABLES))
        _check_option("loss", loss, ("mse", "rescaled_mse", "kl", "rescaled_kl"))
        betas = check_betas(betas)
        self.predict, self.variance, self.loss, self.channel_dim = predict, variance, loss, channel_dim
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

    def _device_tables(self, device: torch.device) -> dict[str, Tensor]:
        """Float32 copies, made once a device: a lookup never copies from the host."""
        if device not in self._on_device:
            self._on_device[device] = {name: table.to(device) for name, table in self._on_device[torch.device("cpu")].items()}
        return self._on_device[device]

    # ---- forward process

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

    def _check_invertible(self) -> None:
        if self._ends_in_noise:
            raise ValueError("the last beta of this schedule is 1 (jsd): x_0 cannot be recovered from eps, use another schedule")

    # ---- the network's view

    def call(self, model: Denoiser, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None = None) -> tuple[Tensor, Any]:
        """The network at the original timesteps: (float32 output, extra)."""
        output = model(x, self.original_timesteps(t), **(model_kwargs or {}))
        output, extra = output if isinstance(output, tuple) else (output, None)
        self._check_channels(output, x)
        return output.float(), extra

    def _check_channels(self, output: Tensor, x: Tensor) -> None:
        expected = list(x.shape)
        expected[self.channel_dim] *= 2 if self.variance == "learned_range" else 1
        if list(output.shape) != expected:
            raise ValueError(f"the network returned {list(output.shape)}; variance {self.variance!r} needs {expected} for this input")

    def predict_from(
        self,
        output: Tensor,
        x: Tensor,
        t: Tensor,
        *,
        clip_denoised: bool = False,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Prediction:
        """p(x_{t-1} | x_t) from the network's output. x_0 goes through `denoised_fn`, then is clamped to [-1, 1] if asked."""
        x = x.float()
        if self.variance == "learned_range":
            output, v = output.chunk(2, dim=self.channel_dim)
            low = self.lookup("posterior_log_variance_clipped", t, x)
            fraction = (v + 1) / 2
            log_variance = fraction * self.lookup("log_betas", t, x) + (1 - fraction) * low
            variance = torch.exp(log_variance)
        else:
            variance, log_variance = (self.lookup(name, t, x).expand_as(x) for name in FIXED_TABLES[self.variance])
        x0 = self.x0_from_eps(x, t, output) if self.predict == "eps" else output
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        return Prediction(self.q_posterior(x0, x, t)[0], variance, log_variance, x0)

    def p_mean_variance(
        self,
        model: Denoiser,
        x: Tensor,
        t: Tensor,
        *,
        clip_denoised: bool = False,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Prediction:
        """Runs the network and `predict_from`."""
        output, extra = self.call(model, x, t, model_kwargs)
        return self.predict_from(output, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)._replace(extra=extra)

    # ---- losses

    def variational_bound(self, x0: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """One term of the bound in bits per dimension, (b,): the KL of the two posteriors, at t = 0 the likelihood of x_0."""
        mean, _, log_variance = self.q_posterior(x0, x_t, t)
        kl = mean_flat(normal_kl(mean, log_variance, prediction.mean, prediction.log_variance)) / LN2
        nll = mean_flat(-discretised_log_likelihood(x0, prediction.mean, prediction.log_variance)) / LN2
        return torch.where(t == 0, nll, kl)

    def training_losses(
        self, model: Denoiser, x0: Tensor, t: Tensor, noise: Tensor, model_kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Per-sample terms, each (b,) float32: `loss` always, `mse` for the mse losses, `vb` where the bound is part of the loss.

        loss = mse + vb for mse (rescaled_mse: vb is times T/1000 already), vb for kl, T vb for rescaled_kl.
        """
        x0 = x0.float()
        x_t = self.q_sample(x0, t, noise)
        output, _ = self.call(model, x_t, t, model_kwargs)
        if self.loss in ("kl", "rescaled_kl"):
            vb = self.variational_bound(x0, x_t, t, self.predict_from(output, x_t, t))
            return {"loss": vb * self.num_timesteps if self.loss == "rescaled_kl" else vb, "vb": vb}
        if self.variance != "learned_range":
            mse = mean_flat((self._target(x0, noise) - output) ** 2)
            return {"loss": mse, "mse": mse}
        estimate, v = output.chunk(2, dim=self.channel_dim)
        mse = mean_flat((self._target(x0, noise) - estimate) ** 2)
        # The bound trains the variance only: through the mean its gradient is far noisier than the mse.
        frozen = torch.cat([estimate.detach(), v], dim=self.channel_dim)
        vb = self.variational_bound(x0, x_t, t, self.predict_from(frozen, x_t, t))
        if self.loss == "rescaled_mse":
            vb = vb * (self.num_timesteps / 1000.0)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _target(self, x0: Tensor, noise: Tensor) -> Tensor:
        return noise.float() if self.predict == "eps" else x0

    # ---- evaluation

    def prior_bpd(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, (b,)."""
        x0 = x0.float()
        last = torch.full((len(x0),), self.num_timesteps - 1, device=x0.device)
        mean, _, log_variance = self.q_mean_variance(x0, last)
        zero = torch.zeros((), device=x0.device)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / LN2

    @torch.no_grad()
    def bpd_loop(
        self,
        model: Denoiser,
        x0: Tensor,
        *,
        noise: Callable[[int], Tensor],
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The whole bound, t from T-1 down to 0; `noise(k)` gives the draw of the k-th of these steps.

        `total_bpd` and `prior_bpd` (b,); `vb`, `xstart_mse` and `mse` (of eps) (b, T) in the order of the loop.
        """
        x0 = x0.float()
        terms: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for k, step in enumerate(reversed(range(self.num_timesteps))):
            t = torch.full((len(x0),), step, device=x0.device)
            draw = noise(k)
            x_t = self.q_sample(x0, t, draw)
            p = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
            terms["vb"].append(self.variational_bound(x0, x_t, t, p))
            terms["xstart_mse"].append(mean_flat((p.x0 - x0) ** 2))
            terms["mse"].append(mean_flat((self.eps_from_x0(x_t, t, p.x0) - draw) ** 2))
        result = {name: torch.stack(values, dim=1) for name, values in terms.items()}
        prior = self.prior_bpd(x0)
        return {"total_bpd": result["vb"].sum(dim=1) + prior, "prior_bpd": prior, **result}


def _check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"diffusion {name} {value!r} is not offered; choose {', '.join(known)}")
