"""Samplers (spec: diffusion section 6): DDPM, DDIM and DDIM run backwards, all with one signature.

Nothing is drawn here: `noise(k)` gives the standard normal numbers (x's shape) of loop step k, k = 0 the noisiest, and is asked only
where they count (not at the last step, not by DDIM with eta 0). `drawn_every_step` reproduces seeded runs of the published code.
All loops run without gradient and keep x in float32.

Common arguments: `model(x, original timesteps, **model_kwargs)`; `clip_denoised` clamps x_0 to [-1, 1] at each step; `denoised_fn`
maps x_0 before that; `cond_fn(x, original timesteps, **model_kwargs)` returns the gradient of log p(condition | x) with respect to x
(classifier guidance; it is called with gradients enabled and a detached x); `callback(k, x, x0)` sees x after step k and the x_0 that
led to it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.gaussian import Denoiser, GaussianDiffusion, Prediction

Noise = Callable[[int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]
Kwargs = Mapping[str, Any] | None


@torch.no_grad()
def ddpm_sample(
    diffusion: GaussianDiffusion,
    model: Denoiser,
    x_T: Tensor,
    *,
    noise: Noise,
    clip_denoised: bool = False,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    cond_fn: Denoiser | None = None,
    model_kwargs: Kwargs = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling from x_T (b, ...) to x_0 of the same shape."""
    x = x_T.float()
    for k, step in enumerate(reversed(range(diffusion.num_timesteps))):
        t = _full(x, step)
        p = diffusion.p_mean_variance(model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        mean = p.mean
        if cond_fn is not None:
            mean = mean + p.variance * _condition_gradient(diffusion, cond_fn, x, t, model_kwargs)
        x = mean + torch.exp(0.5 * p.log_variance) * noise(k) if step > 0 else mean
        if callback is not None:
            callback(k, x, p.x0)
    return x


@torch.no_grad()
def ddim_sample(
    diffusion: GaussianDiffusion,
    model: Denoiser,
    x_T: Tensor,
    *,
    noise: Noise | None = None,
    eta: float = 0.0,
    clip_denoised: bool = False,
    keep_eps: bool = False,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    cond_fn: Denoiser | None = None,
    model_kwargs: Kwargs = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM from x_T (b, ...) to x_0; eta 0 is deterministic (and needs no noise), eta 1 has the variance of DDPM.

    `keep_eps`: where x_0 was clamped the step still takes the noise that the network predicted, not the one that leads to the clamped
    x_0 (spec: PVDM section 4).
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    if eta > 0 and noise is None:
        raise ValueError(f"DDIM with eta {eta} needs noise")
    if keep_eps and cond_fn is not None:
        raise ValueError("keep_eps keeps the network's noise, which cond_fn is there to change: give one of them")
    x = x_T.float()
    level, level_next = _float32(diffusion, "alphas_cumprod"), _float32(diffusion, "alphas_cumprod_prev")
    sigma = np.float32(eta) * np.sqrt((1 - level_next) / (1 - level)) * np.sqrt(1 - level / level_next)
    on_x0, on_eps = np.sqrt(level_next), np.sqrt(1 - level_next - sigma**2)
    for k, step in enumerate(reversed(range(diffusion.num_timesteps))):
        t = _full(x, step)
        p = diffusion.p_mean_variance(model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        if cond_fn is not None:
            p = condition_score(diffusion, p, cond_fn, x, step, model_kwargs)
        x = p.x0 * float(on_x0[step]) + float(on_eps[step]) * diffusion.eps_of(p, x, t, as_given=keep_eps)
        if step > 0 and eta > 0 and noise is not None:
            x = x + float(sigma[step]) * noise(k)
        if callback is not None:
            callback(k, x, p.x0)
    return x


@torch.no_grad()
def ddim_reverse(
    diffusion: GaussianDiffusion,
    model: Denoiser,
    x_0: Tensor,
    *,
    clip_denoised: bool = False,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    cond_fn: Denoiser | None = None,
    model_kwargs: Kwargs = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM with eta 0 from data x_0 (b, ...) to the noise that leads back to it."""
    x = x_0.float()
    level = _float32(diffusion, "alphas_cumprod_next")
    on_x0, on_eps = np.sqrt(level), np.sqrt(1 - level)
    for k in range(diffusion.num_timesteps):
        t = _full(x, k)
        p = diffusion.p_mean_variance(model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        if cond_fn is not None:
            p = condition_score(diffusion, p, cond_fn, x, k, model_kwargs)
        x = p.x0 * float(on_x0[k]) + float(on_eps[k]) * diffusion.eps_from_x0(x, t, p.x0)
        if callback is not None:
            callback(k, x, p.x0)
    return x


def drawn_every_step(x_T: Tensor, generator: torch.Generator | None = None) -> Noise:
    """Noise from one generator in the published order: after x_T one draw per step, made even for steps that are not asked for."""
    drawn = 0

    def noise(k: int) -> Tensor:
        nonlocal drawn
        if k < drawn:
            raise ValueError(f"step {k} asked for after step {drawn - 1}: the draws are made in order")
        for _ in range(k - drawn):
            torch.randn(x_T.shape, generator=generator, device=x_T.device)
        drawn = k + 1
        return torch.randn(x_T.shape, generator=generator, device=x_T.device)

    return noise


def _full(x: Tensor, step: int) -> Tensor:
    return torch.full((len(x),), step, device=x.device)


def _condition_gradient(diffusion: GaussianDiffusion, cond_fn: Denoiser, x: Tensor, t: Tensor, model_kwargs: Kwargs) -> Tensor:
    with torch.enable_grad():
        return cond_fn(x.detach(), diffusion.original_timesteps(t), **(model_kwargs or {})).detach().float()


def condition_score(
    diffusion: GaussianDiffusion, p: Prediction, cond_fn: Denoiser, x: Tensor, step: int, model_kwargs: Kwargs
) -> Prediction:
    """Classifier guidance of eps; x_0 and the mean follow from it and are not clipped again."""
    t = _full(x, step)
    strength = float(np.sqrt(1 - _float32(diffusion, "alphas_cumprod")[step]))
    eps = diffusion.eps_from_x0(x, t, p.x0) - strength * _condition_gradient(diffusion, cond_fn, x, t, model_kwargs)
    x0 = diffusion.x0_from_eps(x, t, eps)
    return p._replace(x0=x0, mean=diffusion.q_posterior(x0, x, t)[0])


def _float32(diffusion: GaussianDiffusion, name: str) -> np.ndarray:
    """A table as float32, in which DDIM takes its roots: by NumPy, whose square root is the correctly rounded one on every machine."""
    return diffusion.tables[name].astype(np.float32)
