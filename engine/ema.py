"""Exponential moving average of a network's weights: a module under the same sharding plan, updated by one foreach call."""

from collections.abc import Mapping

import torch
from torch import nn

from engine.config import EmaConfig
from engine.optim import local_parts
from engine.task import Network


class Ema:
    """`module` holds the average of `source`: trainable weights averaged in fp32, buffers copied. Frozen weights never differ."""

    def __init__(self, module: nn.Module, source: nn.Module, config: EmaConfig) -> None:
        """Both modules sharded alike and equal in value; their tensors must stay where they are in memory (loads are in place)."""
        self.module = module
        self._config = config
        pairs = list(zip(module.parameters(), source.parameters(), strict=True))
        # Lists of local shards, made once: walking modules and DTensor dispatch would cost host time at every update.
        self._averages = local_parts(average for average, weight in pairs if weight.requires_grad)
        self._weights = local_parts(weight for _, weight in pairs if weight.requires_grad)
        self._buffers = list(module.buffers()), list(source.buffers())

    def decay(self, number: int) -> float:
        """Decay of the `number`-th update (from 1)."""
        return min(self._config.decay, (1 + number) / (10 + number)) if self._config.warmup else self._config.decay

    @torch.no_grad()
    def update(self, done: int) -> None:
        """After `done` steps, where an update is due: average <- decay * average + (1 - decay) * weight."""
        number, rest = divmod(done, self._config.every)
        if rest:
            return
        torch._foreach_lerp_(self._averages, self._weights, 1.0 - self.decay(number))
        if self._buffers[0]:
            torch._foreach_copy_(*self._buffers)


def late_averages(networks: Mapping[str, Network], total: int) -> list[str]:
    """A line for each network whose average will still be the initial weights when the run ends after `total` steps."""
    every = {name: network.ema.every for name, network in networks.items() if network.ema and network.ema.decay > 0}
    late = {name: k for name, k in every.items() if k > total}
    return [f"ema.every {k}: the run ends before the first update, the average of {name} stays as it began" for name, k in late.items()]
