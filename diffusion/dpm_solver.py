"""DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): a multistep sampler of second order, one call of the network a step.

With a = sqrt(A), s = sqrt(1 - A) and l = log(a / s), a step from level u to the less noisy level w of the (respaced) process is

    x_w = (s_w / s_u) x_u - a_w (exp(-h) - 1) D,    h = l_w - l_u,    D = x0_u + (x0_u - x0_before) h / (2 h_before)

where x0_u is the estimate of the clean sample at u, and x0_before and h_before belong to the step before this one. The first step has
nothing before it and is of first order (D = x0_u), which is DDIM's. So is the last one, to the clean sample (l infinite): x = x0_u.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffusion.gaussian import Denoiser, GaussianDiffusion
from diffusion.samplers import Callback, Kwargs, condition_score


@torch.no_grad()
def dpm_solver_sample(
    diffusion: GaussianDiffusion,
    model: Denoiser,
    x_T: Tensor,
    *,
    lower_order_final: bool = True,
    clip_denoised: bool = False,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    cond_fn: Denoiser | None = None,
    model_kwargs: Kwargs = None,
    callback: Callback | None = None,
) -> Tensor:
    """From x_T (b, ...) to x_0, deterministic; the other arguments as in diffusion.samplers.

    `lower_order_final`: the step before the last is of first order too. With steps that are even in t it is several times as long (in l)
    as the one before it, and extrapolating that far does harm; of steps even in l it is no different from the others.
    """
    x = x_T.float()
    on_x, on_x0, on_change = _coefficients(diffusion, lower_order_final)
    before: Tensor | None = None
    for k, step in enumerate(reversed(range(diffusion.num_timesteps))):
        t = torch.full((len(x),), step, device=x.device)
        p = diffusion.p_mean_variance(model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        if cond_fn is not None:
            p = condition_score(diffusion, p, cond_fn, x, step, model_kwargs)
        x = float(on_x[step]) * x + float(on_x0[step]) * p.x0
        if before is not None and on_change[step] != 0:
            x = x + float(on_change[step]) * (p.x0 - before)
        before = p.x0
        if callback is not None:
            callback(k, x, p.x0)
    return x


def _coefficients(diffusion: GaussianDiffusion, lower_order_final: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What x, x0_u and x0_u - x0_before are multiplied by in the step that starts at each index, (T,) float64."""
    level, following = diffusion.tables["alphas_cumprod"], diffusion.tables["alphas_cumprod_prev"]
    count = diffusion.num_timesteps
    on_x = np.sqrt((1 - following) / (1 - level))
    on_x0 = np.sqrt(following) - on_x * np.sqrt(level)  # -a_w (exp(-h) - 1), without the infinite l of the clean sample
    on_change = np.zeros(count)
    half_log_snr = np.log(diffusion.tables["snr"]) / 2
    h = np.append(np.inf, half_log_snr[:-1] - half_log_snr[1:])
    lowest = 2 if lower_order_final else 1
    inner = slice(lowest, count - 1)
    on_change[inner] = on_x0[inner] * h[inner] / (2 * h[lowest + 1 :])
    return on_x, on_x0, on_change
