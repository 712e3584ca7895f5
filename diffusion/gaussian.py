"""The Gaussian diffusion process: what a network's output says about x_{t-1}, and the training losses.

Spec: diffusion sections 2-5. Tensors are (b, ...) with the channels on `channel_dim`; t is (b,) int64, an index of this (possibly
respaced) process. All arithmetic is float32 in the order of the published code, whatever precision the network ran in.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from diffusion.forward import ForwardProcess
from diffusion.likelihood import LN2, discretised_log_likelihood, mean_flat, normal_kl
from utils.rng import SampleRng

Predict = Literal["eps", "x0", "v"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Loss = Literal["mse", "rescaled_mse", "l1", "robust", "kl", "rescaled_kl"]
Weighting = Literal["none", "min_snr", "p2"]
Denoiser = Callable[..., Any]
"""(x, original timesteps (b,) int64, **conditions) -> output, or (output, anything)."""

FIXED_TABLES = {
    "fixed_small": ("posterior_variance", "posterior_log_variance_clipped"),
    "fixed_large": ("fixed_large_variance", "fixed_large_log_variance"),
}

SMALLEST_ETA = 1e-18
WEIGHED = {"none": get_args(Loss), "min_snr": ("mse", "rescaled_mse"), "p2": ("mse", "rescaled_mse", "robust")}
"""Weighting -> the losses that it weighs."""


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t) as the network sees it; all of x_t's shape."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0: Tensor
    estimate: Tensor
    """What the network predicts (eps, x0 or v), untouched."""
    extra: Any = None
    """What the network returned beside its output."""


class GaussianDiffusion(ForwardProcess):
    """A diffusion process over T = len(betas) steps.

    `predict`: what the network's first C channels are (v: the velocity of `ForwardProcess`); `variance`: learned_range takes C more
    channels, which interpolate the log variance between its bounds; `robust_eta`: of the loss robust; `weighting`: of the error over
    the timesteps, min_snr with gamma `min_snr_gamma`, p2 with `p2_gamma` and `p2_k`; `timestep_map`: the index that the network is
    given for each step (default: the step itself).
    """

    def __init__(
        self,
        betas: Sequence[float] | np.ndarray,
        *,
        predict: Predict = "eps",
        variance: Variance = "learned_range",
        loss: Loss = "mse",
        robust_eta: float = 1e-8,
        weighting: Weighting = "none",
        min_snr_gamma: float = 5.0,
        p2_gamma: float = 1.0,
        p2_k: float = 1.0,
        timestep_map: Sequence[int] | None = None,
        channel_dim: int = 1,
    ) -> None:
        _check_option("predict", predict, get_args(Predict))
        _check_option("variance", variance, get_args(Variance))
        _check_option("loss", loss, get_args(Loss))
        _check_option("weighting", weighting, get_args(Weighting))
        if loss not in WEIGHED[weighting]:
            kinds = " or ".join(kind for kind in WEIGHED[weighting] if kind != "rescaled_mse")
            raise ValueError(f"weighting {weighting} weighs the {kinds}, which loss {loss!r} does not have")
        if loss == "robust" and weighting != "none" and predict != "eps":
            raise ValueError(f"weighting {weighting} of the loss robust is that of the noise's error: predict eps, not {predict}")
        if not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma {min_snr_gamma}: above 0")
        for name, value in (("p2_gamma", p2_gamma), ("p2_k", p2_k)):
            if not value >= 0:
                raise ValueError(f"{name} {value}: 0 or more")
        if not robust_eta >= SMALLEST_ETA:
            raise ValueError(f"robust_eta {robust_eta}: {SMALLEST_ETA} or more, for its square is a number of float32")
        super().__init__(betas, timestep_map)
        self.predict, self.variance, self.loss, self.channel_dim = predict, variance, loss, channel_dim
        self.weighting, self.min_snr_gamma, self.p2_gamma, self.p2_k = weighting, min_snr_gamma, p2_gamma, p2_k
        self.robust_eta = robust_eta

    def sample_timesteps(self, rng: SampleRng) -> Tensor:
        """A step of this process for each sample, all alike, (b,) int64."""
        return rng.integers("timestep", self.num_timesteps)

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
        x0 = self._x0_of(output, x, t)
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        return Prediction(self.q_posterior(x0, x, t)[0], variance, log_variance, x0, output)

    def eps_of(self, p: Prediction, x: Tensor, t: Tensor, *, as_given: bool = False) -> Tensor:
        """The noise in x (b, ...): the one that leads to the prediction's x_0, or `as_given` by the network, whatever was done to x_0
        since. A network that predicts x_0 gives no noise of its own: there the two are the same."""
        if not as_given or self.predict == "x0":
            return self.eps_from_x0(x, t, p.x0)
        return p.estimate if self.predict == "eps" else self.eps_from_v(x, t, p.estimate)

    def _x0_of(self, estimate: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.predict == "eps":
            return self.x0_from_eps(x, t, estimate)
        return self.x0_from_v(x, t, estimate) if self.predict == "v" else estimate

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

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of what `training_losses` gives."""
        if self.loss in ("kl", "rescaled_kl"):
            return ("loss", "vb")
        error = self.loss if self.loss in ("robust", "l1") else "mse"
        return ("loss", error, *(("vb",) if self.variance == "learned_range" else ()))

    def training_losses(
        self, model: Denoiser, x0: Tensor, t: Tensor, noise: Tensor, model_kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Per-sample terms, each (b,) float32: `loss` always, `mse` for the mse losses (`l1` for l1, `robust` for robust), `vb` where the
        bound is part of the loss.

        loss = w mse + vb for mse (rescaled_mse: vb is times T/1000 already), w being `error_weight`; w robust + vb for robust, whose
        error d counts sqrt(d^2 + eta^2); l1 + vb for l1; vb for kl, T vb for rescaled_kl.
        """
        x0 = x0.float()
        x_t = self.q_sample(x0, t, noise)
        output, _ = self.call(model, x_t, t, model_kwargs)
        if self.loss in ("kl", "rescaled_kl"):
            vb = self.variational_bound(x0, x_t, t, self.predict_from(output, x_t, t))
            return {"loss": vb * self.num_timesteps if self.loss == "rescaled_kl" else vb, "vb": vb}
        target = self._target(x0, t, noise.float())
        if self.variance != "learned_range":
            name, error = self._error(target, output)
            return {"loss": self._weighted(error, t), name: error}
        estimate, v = output.chunk(2, dim=self.channel_dim)
        name, error = self._error(target, estimate)
        # The bound trains the variance only: through the mean its gradient is far noisier than the mse.
        frozen = torch.cat([estimate.detach(), v], dim=self.channel_dim)
        vb = self.variational_bound(x0, x_t, t, self.predict_from(frozen, x_t, t))
        if self.loss == "rescaled_mse":
            vb = vb * (self.num_timesteps / 1000.0)
        return {"loss": self._weighted(error, t) + vb, name: error, "vb": vb}

    def _error(self, target: Tensor, estimate: Tensor) -> tuple[str, Tensor]:
        """Name and value (b,) of the distance that the network is trained on."""
        difference = target - estimate
        if self.loss == "robust":
            return "robust", mean_flat(torch.sqrt(difference**2 + self.robust_eta**2))
        return ("l1", mean_flat(difference.abs())) if self.loss == "l1" else ("mse", mean_flat(difference**2))

    def _target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        if self.predict == "v":
            return self.velocity(x0, t, noise)
        return noise if self.predict == "eps" else x0

    def _weighted(self, error: Tensor, t: Tensor) -> Tensor:
        return error if self.weighting == "none" else self.error_weight(t) * error

    def error_weight(self, t: Tensor) -> Tensor:
        """Weight of each sample's error, (b,); 1 without weighting.

        min_snr: min(SNR, gamma) on the squared error of x_0 (Hang et al. 2023). p2: 1 / (k + SNR)^gamma on that of eps (Choi et al. 2022;
        spec: VIDM section 6). In terms of what the network predicts: the squared errors of eps and v are SNR and SNR + 1 times that of x_0.
        """
        if self.weighting == "none":
            return torch.ones(t.shape, device=t.device)
        snr = self._device_tables(t.device)["snr"][t]
        if self.weighting == "p2":
            weight = (self.p2_k + snr) ** -self.p2_gamma
            return weight if self.predict == "eps" else weight * (snr / (snr + 1) if self.predict == "v" else snr)
        if self.predict == "eps":
            return (self.min_snr_gamma / snr).clamp(max=1.0)
        capped = snr.clamp(max=self.min_snr_gamma)
        return capped / (snr + 1) if self.predict == "v" else capped

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
