"""Samplers of a flow: the path from noise (t = 1) to data (t = 0), dx/dt = velocity, by Euler's or Heun's method on `time_grid`.

Both are deterministic, run without gradient and keep x in float32. Common arguments: `model(x, 1000 t, **model_kwargs)`; `clip_denoised`
clamps the estimate x_0 = x - t v to [-1, 1] and takes the velocity that leads there; `callback(k, x, x0)` sees x after step k (k = 0 the
noisiest) and the x_0 that led to it.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.flow import FlowMatching
from diffusion.gaussian import Denoiser
from diffusion.samplers import Callback, Kwargs


@torch.no_grad()
def euler_sample(
    flow: FlowMatching,
    model: Denoiser,
    x_1: Tensor,
    *,
    steps: int,
    clip_denoised: bool = False,
    model_kwargs: Kwargs = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method from noise x_1 (b, ...) to data: `steps` calls of the network, error of first order in 1/steps."""
    velocity = partial(_velocity, flow, model, clip_denoised, model_kwargs)
    grid = flow.time_grid(steps)
    x = x_1.float()
    for k, (t, following) in enumerate(pairwise(grid)):
        v, x0 = velocity(x, float(t))
        x = x + float(following - t) * v
        if callback is not None:
            callback(k, x, x0)
    return x


@torch.no_grad()
def heun_sample(
    flow: FlowMatching,
    model: Denoiser,
    x_1: Tensor,
    *,
    steps: int,
    clip_denoised: bool = False,
    model_kwargs: Kwargs = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method from noise x_1 (b, ...) to data: 2 steps - 1 calls of the network, error of second order in 1/steps.

    The last step is Euler's: the network is not asked about t = 0, where training hardly went, and one step of a lower order does not
    lower that of the whole.
    """
    velocity = partial(_velocity, flow, model, clip_denoised, model_kwargs)
    grid = flow.time_grid(steps)
    x = x_1.float()
    for k, (t, following) in enumerate(pairwise(grid)):
        v, x0 = velocity(x, float(t))
        step = float(following - t)
        ahead = x + step * v
        x = ahead if k == steps - 1 else x + step * (v + velocity(ahead, float(following))[0]) / 2
        if callback is not None:
            callback(k, x, x0)
    return x


def _velocity(flow: FlowMatching, model: Denoiser, clip: bool, model_kwargs: Kwargs, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Velocity and x_0 at x (b, ...) and time t > 0."""
    times = torch.full((len(x),), t, device=x.device)
    v = flow.call(model, x, times, model_kwargs)
    x0 = flow.x0_from_velocity(x, times, v)
    if not clip:
        return v, x0
    x0 = x0.clamp(-1, 1)
    return (x - x0) / t, x0
