"""One network for many devices: activation checkpointing, then compilation, then sharding (FSDP2) or replication (DDP), in this order.

The module must have been built on the CPU, with the same seed on every rank: `fully_shard` does not broadcast, and numbers
drawn into sharded or meta tensors would depend on the number of ranks.
"""

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from engine.config import ParallelConfig, RunConfig
from engine.task import Network
from launch.env import Env
from utils.errors import ConfigError, UserError

_aten = torch.ops.aten
_EXPENSIVE = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Operators whose outputs selective checkpointing keeps: recomputing them costs more than holding them."""

_SYNC_BUFFERS = next(
    name for name in ("forward_sync_buffers", "broadcast_buffers") if name in inspect.signature(DistributedDataParallel.__init__).parameters
)
"""DDP's option under its name in this version of torch."""


def device_mesh(parallel: ParallelConfig, env: Env) -> DeviceMesh | None:
    """The mesh of sharded networks: (shard,) for fsdp, (replicate, shard) for hsdp, None for ddp. Raises ConfigError."""
    if parallel.mode == "ddp":
        return None
    if parallel.mode == "fsdp":
        return init_device_mesh(env.device.type, (env.world_size,), mesh_dim_names=("shard",))
    size = shard_size(parallel, env.world_size, env.local_world_size)
    return init_device_mesh(env.device.type, (env.world_size // size, size), mesh_dim_names=("replicate", "shard"))


def shard_size(parallel: ParallelConfig, world_size: int, local_world_size: int) -> int:
    """Ranks over which the state of a network of strategy `fsdp` is cut. Raises ConfigError when hsdp does not divide the ranks."""
    if parallel.mode == "ddp":
        return 1
    if parallel.mode == "fsdp":
        return world_size
    size = parallel.shard_size or local_world_size
    if world_size % size:
        raise ConfigError(f"parallel.shard_size {size}: {world_size} ranks cannot be cut into groups of it; give a divisor of {world_size}")
    return size


def samples_per_rank(config: RunConfig, env: Env) -> int:
    """Samples of a step on one rank. Raises ConfigError when the global batch cannot be cut evenly."""
    accumulation, size = config.train.accumulation, config.train.global_batch_size
    parts = env.world_size * accumulation
    if size % parts or size < parts:
        lower = size // parts * parts
        near = f"{lower} or {lower + parts}" if lower else f"{parts}"
        cut = f"{env.world_size} rank(s) x {accumulation} micro-batch(es)"
        worlds = [ranks for ranks in range(1, 2 * env.world_size) if size % (ranks * accumulation) == 0]
        nearest = sorted(sorted(worlds, key=lambda ranks: abs(ranks - env.world_size))[:4])
        ranks = f", or {' or '.join(map(str, nearest))} rank(s)" if nearest else ""
        raise ConfigError(f"--global-batch-size {size} cannot be cut into {cut}: use {near}{ranks}")
    return size // env.world_size


def parallelize(network: Network, parallel: ParallelConfig, env: Env, mesh: DeviceMesh | None, *, average: bool = False) -> nn.Module:
    """The network on its device, ready to be called; `average`: a moving average of it, under the same plan, never trained.

    Returns the module itself (sharded in place, or left whole when it is not trained), or a `Replicated` around it.
    Parameters of a sharded module change identity: build its optimiser afterwards. Raises UserError for tied weights.
    """
    module, frozen = network.module, network.strategy == "frozen"
    units = network.units(module) if network.units else []
    sharded = network.strategy == "fsdp" and mesh is not None
    if sharded:
        _refuse_tied(module, units)
    if frozen or average:
        module.requires_grad_(False).eval()
    else:
        for unit in units:
            recompute(unit, parallel.activation_checkpointing)
    if not average and compiles(parallel, env):
        _compile(units or ([module] if network.strategy == "fsdp" else []))
    module.to(env.device)
    if sharded:
        assert mesh is not None
        _shard(module, units, network.methods, mesh, precision_policy(parallel, env.device), offload_policy(parallel, env.device))
        return module
    return module if frozen or average else Replicated(module, network.methods, env.device)


def compiles(parallel: ParallelConfig, env: Env) -> bool:
    """Whether blocks are compiled."""
    return parallel.compile == "on" or (parallel.compile == "auto" and env.device.type == "cuda")


def precision_policy(parallel: ParallelConfig, device: torch.device) -> MixedPrecisionPolicy:
    """Weights travel and compute in bf16 on a GPU and are reduced in fp32.

    Activations keep the types that autocast gives them, as under DDP (which keeps the small fp32 weights of norms and biases, that
    are rounded to bf16 here). CPU autocast leaves norms alone, which refuse bf16 weights with fp32 input: there the weights stay
    fp32 and autocast alone does the work.
    """
    if parallel.precision == "fp32" or device.type != "cuda":
        return MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def offload_policy(parallel: ParallelConfig, device: torch.device) -> OffloadPolicy:
    """Where the shards of a network lie between steps."""
    return CPUOffloadPolicy(pin_memory=device.type == "cuda") if parallel.optim_offload else OffloadPolicy()


def unit_policy(unit: nn.Module, policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """The policy of a unit: one that says `float32 = True` of itself computes with the weights that are kept, not with rounded ones."""
    return dataclasses.replace(policy, param_dtype=None) if getattr(unit, "float32", False) else policy


class Replicated(nn.Module):
    """A module under DistributedDataParallel whose other methods also go through DDP, so that their gradients are exchanged.

    Buffers are not broadcast: that would write to them between two calls of one backward pass (a discriminator on real and on
    generated samples). Rank 0's are the ones that are saved.
    """

    def __init__(self, module: nn.Module, methods: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self.methods = frozenset(methods)
        self.ddp = DistributedDataParallel(
            _Entry(module),
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{_SYNC_BUFFERS: False},  # type: ignore[arg-type]
        )

    @property
    def bare(self) -> nn.Module:
        """The module without its wrapper: what is saved, and what is called when no gradient of it is wanted."""
        return self.ddp.module.module

    def set_requires_gradient_sync(self, synchronise: bool) -> None:
        """Whether the next backward passes exchange gradients; set it before the forward pass."""
        self.ddp.require_backward_grad_sync = synchronise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.ddp("forward", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "ddp" or name in self._modules:
            return super().__getattr__(name)
        if name in self.__dict__["methods"]:
            return functools.partial(self.ddp, name)
        value = getattr(self.bare, name)
        if inspect.ismethod(value):
            what = f"{type(self.bare).__name__}.{name}"
            raise AttributeError(f"{what} is called in a loss: list it in Network.methods, or its gradients stay on one rank")
        return value


class _Entry(nn.Module):
    """Makes every method reachable through `forward`, the only door that DDP watches."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        call = self.module if method == "forward" else getattr(self.module, method)
        return call(*args, **kwargs)


def _shard(
    module: nn.Module,
    units: Sequence[nn.Module],
    methods: Sequence[str],
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    offload: OffloadPolicy,
) -> None:
    for unit in units:
        if unit is not module:
            fully_shard(unit, mesh=mesh, mp_policy=unit_policy(unit, policy), offload_policy=offload)
    fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for method in methods:
        register_fsdp_forward_method(module, method)


def _compile(units: Sequence[nn.Module]) -> None:
    """Compile every unit for its own sizes: those of a UNet differ, and one graph that takes all of them is slow to make and to run.

    All units share the code of `Module.__call__`, and compilation gives up on code of which it has more variants than a small limit.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(units))
    for unit in units:
        unit.compile(dynamic=False)


def recompute(unit: nn.Module, kind: str) -> None:
    """Make a unit forget its activations and compute them again in the backward pass; its name and its class stay."""
    if kind == "none":
        return
    extra = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_expensive)} if kind == "selective" else {}
    unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False, **extra)


def _keep_expensive(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def _refuse_tied(module: nn.Module, units: Sequence[nn.Module]) -> None:
    """Raise UserError for a parameter that two units share: sharding refuses it (torch 2.15) or silently unties it (2.11)."""
    place = {submodule: unit for unit in units for submodule in unit.modules()}
    owners: dict[nn.Parameter, tuple[str, nn.Module | None]] = {}
    for prefix, submodule in module.named_modules(remove_duplicate=False):
        for name, parameter in submodule._parameters.items():
            if parameter is None:
                continue
            full_name, unit = f"{prefix}.{name}".lstrip("."), place.get(submodule)
            first, first_unit = owners.setdefault(parameter, (full_name, unit))
            if first_unit is not unit:
                raise UserError(
                    f"{type(module).__name__}: {first} and {full_name} are one tied weight in two shard units, which cannot be sharded: "
                    "put both in one unit, or train with --parallel ddp"
                )
