"""Classifier-free guidance (spec: diffusion section 7): eps = eps_u + s (eps_c - eps_u); s = 1 is off.

The CMD paper writes (1 + w) eps_c - w eps_u, which is s = 1 + w.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.gaussian import Denoiser


class ClassifierFreeGuidance:
    """A guided network with the signature of the network itself, for n states: only the network's input is doubled.

    `null`: argument -> its value without condition (the label `num_classes`, a vector, True for a drop mask); every key must be among
    the arguments of a call. Other tensors whose first axis is the batch are repeated for both halves.
    `channels`: how many of the C predicted channels (C those of x) are guided, None for all; the published samplers guide 3 whatever C
    is. The rest, and the variance channels, are those of the conditional half.
    """

    def __init__(
        self,
        model: Denoiser,
        scale: float,
        null: Mapping[str, Tensor | float | int | bool],
        channels: int | None = None,
        channel_dim: int = 1,
    ) -> None:
        if not null:
            raise ValueError("guidance needs the null value of at least one condition")
        self.model, self.scale, self.null, self.channels, self.channel_dim = model, scale, dict(null), channels, channel_dim

    def __call__(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The guided output, (b, C or 2C, ...)."""
        missing = self.null.keys() - conditions.keys()
        if missing:
            raise ValueError(f"guidance has a null value for {', '.join(sorted(missing))}, which was not passed to the network")
        if self.scale == 1:
            return self.model(x, t, **conditions)
        doubled = {name: self._double(name, value, len(x)) for name, value in conditions.items()}
        output = self.model(torch.cat([x, x]), torch.cat([t, t]), **doubled)
        conditional, unconditional = output.chunk(2)
        size = x.shape[self.channel_dim]
        guided = size if self.channels is None else min(self.channels, size)
        eps_c, eps_u = conditional.narrow(self.channel_dim, 0, guided), unconditional.narrow(self.channel_dim, 0, guided)
        rest = conditional.narrow(self.channel_dim, guided, conditional.shape[self.channel_dim] - guided)
        return torch.cat([eps_u + self.scale * (eps_c - eps_u), rest], dim=self.channel_dim)

    def _double(self, name: str, value: Any, batch: int) -> Any:
        if name in self.null:
            null = self.null[name]
            null = null.to(value).expand_as(value) if isinstance(null, Tensor) else torch.full_like(value, null)
            return torch.cat([value, null])
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch:
            return torch.cat([value, value])
        return value
