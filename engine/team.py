"""The networks of a stage at work: wrapped, each with its optimiser and its average, and whose turn it is."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from engine.config import ParallelConfig, RunConfig
from engine.ema import Ema
from engine.norms import share_norms
from engine.optim import build_optimizer, clip_apart, clip_limit, gradient_norm, guarded_step, learning_rate
from engine.shard import Replicated, device_mesh, parallelize
from engine.task import Network
from launch.env import Env
from utils.errors import UserError


@dataclass
class Member:
    """A trained network."""

    name: str
    network: Network
    module: nn.Module
    """Without DDP's wrapper: what is saved, and what others call while it is not this network's turn."""
    entry: nn.Module
    """What the loss calls in this network's turn."""
    parameters: list[nn.Parameter]
    """Those that are trained, as the optimiser knows them."""
    clipped: list[list[nn.Parameter]]
    """Those that are clipped together, where there is more than one such group."""
    optimizer: Optimizer
    ema: Ema | None

    @property
    def best(self) -> nn.Module:
        """The averaged module where there is one."""
        return self.ema.module if self.ema else self.module


class Team:
    """Wraps the networks of a task (built on the CPU with the seed) and switches between their turns."""

    def __init__(self, networks: Mapping[str, Network], config: RunConfig, env: Env) -> None:
        self._env = env
        self._precision = config.parallel.precision
        mesh = device_mesh(config.parallel, env)
        self.members: dict[str, Member] = {}
        self.frozen: dict[str, nn.Module] = {}
        for name, network in networks.items():
            if network.strategy == "frozen":
                self.frozen[name] = parallelize(network, config.parallel, env, mesh)
            else:
                self.members[name] = _enlist(name, network, config.parallel, env, mesh)

    def autocast(self) -> AbstractContextManager[None]:
        """Arithmetic of the run's precision."""
        # No cache: it would keep a bf16 copy of every gathered weight, and a copy first made without gradient would get none.
        return torch.autocast(self._env.device.type, torch.bfloat16, enabled=self._precision == "bf16", cache_enabled=False)

    @contextmanager
    def turn(self, name: str) -> Iterator[dict[str, nn.Module]]:
        """Modules for the loss of network `name`, of which alone the parameters require a gradient inside the block."""
        for other in self.members.values():
            for parameter in other.parameters:
                parameter.requires_grad_(other.name == name)
        modules = {other.name: other.entry if other.name == name else other.module for other in self.members.values()}
        yield modules | self.frozen
        self.reshard()

    def synchronise(self, name: str, last: bool) -> None:
        """Before a micro-batch: exchange the gradients of network `name` in its backward pass only if it is the step's last."""
        entry = self.members[name].entry
        assert isinstance(entry, Replicated | FSDPModule)
        entry.set_requires_gradient_sync(last)

    def gradient_norm(self, name: str) -> Tensor:
        """Norm of the summed-up gradient of network `name`; raises UserError where DDP cannot have exchanged it."""
        member = self.members[name]
        if isinstance(member.entry, Replicated) and self._env.world_size > 1 and not member.optimizer.state:
            unused = [key for key, parameter in member.module.named_parameters() if parameter.requires_grad and parameter.grad is None]
            if unused:
                cure = "freeze it, or train with --parallel fsdp"
                raise UserError(f"network {name!r}: the loss does not use {unused[0]}, which DDP cannot work with: {cure}")
        return gradient_norm(member.parameters).to(self._env.device)  # of shards in host memory it lies there

    def step(self, name: str, step: int, total: int, norm: Tensor, divisor: Tensor, finite: Tensor) -> float:
        """Update network `name` with its gradient over `divisor`, unless not `finite`; returns the learning rate."""
        member = self.members[name]
        optim = member.network.optim
        assert optim is not None
        rate = learning_rate(optim, step, total)
        for group in member.optimizer.param_groups:
            group["lr"] = rate
        limit = clip_limit(optim, step)
        if limit > 0 and member.clipped:
            clip_apart(member.clipped, limit, divisor)
            limit = 0.0
        guarded_step(member.optimizer, norm, limit, divisor, finite)
        return rate

    def average(self, done: int) -> None:
        """Update the averages that are due after `done` steps, whosever turn the last one was."""
        for member in self.members.values():
            if member.ema:
                member.ema.update(done)

    @contextmanager
    def evaluation(self) -> Iterator[dict[str, nn.Module]]:
        """Modules in evaluation mode, averages in place of networks that have one, no gradient; training mode afterwards."""
        self.share_statistics()
        for member in self.members.values():
            member.module.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield {member.name: member.best for member in self.members.values()} | self.frozen
        finally:  # what is left by a stop signal is saved
            for member in self.members.values():
                member.module.train()
            self.reshard()

    def reshard(self) -> None:
        """Give up gathered weights: a root module keeps them after a forward pass without backward, and they would grow stale."""
        for member in self.members.values():
            for module in (member.module, member.best):
                if isinstance(module, FSDPModule):
                    module.reshard()

    def share_statistics(self) -> None:
        """Give all ranks rank 0's running statistics of batch norms, which each rank gathers from its own samples."""
        for member in self.members.values():
            for module in (member.module, member.best):
                for norm in module.modules():
                    if isinstance(norm, _BatchNorm):
                        for buffer in norm.buffers(recurse=False):
                            dist.broadcast(buffer, src=0)


def _enlist(name: str, network: Network, parallel: ParallelConfig, env: Env, mesh: dist.DeviceMesh | None) -> Member:
    """Wrap one trained network; its average starts as a copy, taken before anything is wrapped."""
    assert network.optim is not None, f"network {name!r} is trained: it needs optimiser settings"
    averaged = network.ema is not None and network.ema.decay > 0
    twin = Network(copy.deepcopy(network.module), network.strategy, units=network.units, methods=network.methods) if averaged else None
    if network.sync_norms and env.world_size > 1:
        share_norms(network.module)
    entry = parallelize(network, parallel, env, mesh)
    module = entry.bare if isinstance(entry, Replicated) else entry
    module.train()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(parameters, network.optim, sharded=isinstance(module, FSDPModule))
    ema = None
    if twin is not None and network.ema is not None:
        ema = Ema(parallelize(twin, parallel, env, mesh, average=True), module, network.ema)
    return Member(name, network, module, entry, parameters, _clip_groups(module, network.clip_parts), optimizer, ema)


def _clip_groups(module: nn.Module, parts: Sequence[str]) -> list[list[nn.Parameter]]:
    """Trained parameters of each of the parts, and those of none of them; nothing where there are no parts."""
    if not parts:
        return []
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(next((part for part in parts if name.startswith(f"{part}.")), ""), []).append(parameter)
    absent = [part for part in parts if part not in groups]
    assert not absent, f"{type(module).__name__} has no trained child {absent[0]} to be clipped apart"
    return list(groups.values())
