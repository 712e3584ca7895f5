"""Frames that are already there, held fixed while the others are sampled (the replacement method: Ho et al. 2022, Video Diffusion Models,
section 3.1): a long video of a network that knows no condition but the frames beside it.

Nothing of it is in a sampler. The network is wrapped: in its input the known frames are put in place, noised to the level of the step;
in its output they are given the prediction that leads from the sampler's state straight to them, so that the sampler ends in them too.

The network hears of the known frames in their noised form only, so the others depend on them less than in the data, and on a
deterministic path less than with noise in every step (Gaussian frames of correlation 0.9: 0.41 by DDIM, 0.59 by ancestral sampling).

It asks of a latent that a frame stands by itself along one axis. Where a position mixes all frames of a clip (CMD's content frame and
motion planes, a triplane) there is nothing that could be held fixed.
"""

from typing import Any

import torch
from torch import Tensor

from diffusion.flow import TIME_SCALE, FlowMatching
from diffusion.gaussian import Denoiser, GaussianDiffusion


class Replacement:
    """A network with the signature of `model` whose first k frames are `known`.

    `process`: the one that the network was trained on, or its respaced form that is sampled with. `known` and its standard normal
    `noise` are b c k ..., frames on `axis`; the noise stays the same over the steps, as that of a deterministic sampler does. Where the
    network predicts a variance the known frames get the middle of its range.
    """

    def __init__(self, model: Denoiser, process: GaussianDiffusion | FlowMatching, known: Tensor, noise: Tensor, axis: int = 2) -> None:
        if known.shape != noise.shape:
            raise ValueError(f"the noise is {list(noise.shape)}, the known frames are {list(known.shape)}: they must be alike")
        self.model, self.process, self.axis = model, process, axis
        self.known, self.noise = known.float(), noise.float()

    def __call__(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The output at x (b, c, frames, ...) and the original timesteps t (b,), its first k frames replaced."""
        count = self.known.shape[self.axis]
        if x.shape[self.axis] <= count:
            raise ValueError(f"{count} known frames of {x.shape[self.axis]}: at least one must be left to sample")
        state, rest = x.narrow(self.axis, 0, count), x.narrow(self.axis, count, x.shape[self.axis] - count)
        times = len(x) // len(self.known)  # guidance doubles the batch
        known, noise = (part.repeat(times, *[1] * (part.ndim - 1)) for part in (self.known, self.noise))
        if isinstance(self.process, GaussianDiffusion):
            noised, exact = _gaussian(self.process, known, noise, state, t)
        else:
            noised, exact = _flow(self.process, known, noise, state, t)
        output = self.model(torch.cat([noised.to(x.dtype), rest], dim=self.axis), t, **conditions)
        free = output.narrow(self.axis, count, rest.shape[self.axis])
        return torch.cat([exact, free.float()], dim=self.axis)  # in float32: at high noise x_0 is the state less a hundredfold of eps


def _gaussian(process: GaussianDiffusion, known: Tensor, noise: Tensor, state: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The known frames at the level of the original timesteps t, and the prediction that takes `state` to them."""
    index = process.steps_of(t)
    eps = process.eps_from_x0(state, index, known)
    exact = {"eps": eps, "x0": known, "v": process.velocity(known, index, eps)}[process.predict]
    if process.variance == "learned_range":
        exact = torch.cat([exact, torch.zeros_like(exact)], dim=process.channel_dim)
    return process.q_sample(known, index, noise), exact


def _flow(process: FlowMatching, known: Tensor, noise: Tensor, state: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a flow, which gives its network 1000 times the time."""
    time = t.float() / TIME_SCALE
    velocity = (state - known) / time.reshape(-1, *[1] * (state.ndim - 1))
    return process.q_sample(known, time, noise), velocity
