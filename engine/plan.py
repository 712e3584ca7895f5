"""What a run would need, told without starting it (`--dry-run`): parameters, memory per GPU, arithmetic, steps, checkpoint size."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from engine.config import RunConfig
from engine.flops import count_flops, meta_copy
from engine.metrics import GIB
from engine.shard import samples_per_rank, shard_size
from engine.task import BatchSource, Network, Task
from launch.env import Env
from utils.config import dump_yaml, to_dict

FP32 = 4
"""Bytes. Weights, gradients, moments and averages are held in fp32 whatever the precision of the arithmetic."""


@dataclass(frozen=True)
class Need:
    """One network on one GPU, bytes."""

    name: str
    strategy: str
    parameters: int
    """Of the whole network."""
    trained: int
    weights: int
    gradients: int
    optimizer: int
    ema: int
    checkpoint: int
    """In a checkpoint, all ranks together."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema


def measure(name: str, network: Network, shards: int) -> Need:
    """What a network takes when its state is cut over `shards` ranks (1: whole on each). Activations are not counted."""
    parameters = sum(parameter.numel() for parameter in network.module.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in network.module.buffers())
    if network.strategy == "frozen":
        return Need(name, "frozen", parameters, 0, FP32 * parameters + buffers, 0, 0, 0, 0)
    trained = sum(parameter.numel() for parameter in network.module.parameters() if parameter.requires_grad)
    cut = shards if network.strategy == "fsdp" else 1
    averaged = network.ema is not None and network.ema.decay > 0
    return Need(
        name,
        f"1/{cut} per GPU" if cut > 1 else "whole on each GPU",
        parameters,
        trained,
        weights=FP32 * parameters // cut + buffers,
        gradients=FP32 * trained // cut,
        optimizer=2 * FP32 * trained // cut,
        ema=(FP32 * parameters // cut + buffers) if averaged else 0,
        checkpoint=(FP32 * parameters + buffers) * (2 if averaged else 1) + 2 * FP32 * trained,
    )


def report(task: Task, source: BatchSource, config: RunConfig, env: Env) -> str:
    """The plan of a run on `env.world_size` GPUs, as text. Needs no GPU and no process group; raises ConfigError for an impossible one."""
    shards = shard_size(config.parallel, env.world_size, env.local_world_size)
    micro = samples_per_rank(config, env) // config.train.accumulation
    total = config.train.max_steps or config.train.epochs * source.steps_per_epoch
    networks = build_on_meta(task)
    needs = [measure(name, network, shards) for name, network in networks.items()]
    lines = [dump_yaml(to_dict(config)), *_modules(networks), *_table(needs)]
    for phase in dict.fromkeys((*task.phases(0), *task.phases(total))):
        flops = count_flops(task, networks, phase, micro)
        amount = "not countable" if flops is None else f"{flops / 1e9:.3f} GFLOP per sample, forward and backward"
        lines.append(f"arithmetic of {phase}: {amount}")
    lines += [
        f"processes: {env.world_size} ({config.parallel.mode}), micro-batch {micro} on each, accumulation {config.train.accumulation}",
        f"steps per epoch: {source.steps_per_epoch}; steps of the run: {total} ({total * config.train.global_batch_size} samples)",
        f"checkpoint: {_size(sum(need.checkpoint for need in needs))}",
    ]
    return "\n".join(lines) + "\n"


def build_on_meta(task: Task) -> dict[str, Network]:
    """The task's networks with empty tensors on the meta device."""
    try:
        with torch.device("meta"):
            networks = task.networks()
    except RuntimeError:
        # A constructor that computes tables with tensors cannot run on meta ones.
        networks = task.networks()
    for network in networks.values():
        network.module = meta_copy(network.module)
    return networks


def _modules(networks: Mapping[str, Network]) -> list[str]:
    """Parameters of each network and of its direct children."""
    lines = ["parameters"]
    for name, network in networks.items():
        lines.append(f"  {name} ({type(network.module).__name__}): {_count(network.module)}")
        children = ((child, _count(module)) for child, module in network.module.named_children())
        lines += [f"    {child}: {count}" for child, count in children if count != "0"]
        own = sum(parameter.numel() for parameter in network.module.parameters(recurse=False))
        lines += [f"    (own): {own:,}"] if own else []
    return lines


def _count(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


def _table(needs: list[Need]) -> list[str]:
    """Memory per GPU; the largest temporary of a sharded network is not in it."""
    columns = ("weights", "gradients", "optimizer", "ema", "total")
    rows: list[tuple[str, ...]] = [("memory per GPU", *columns, "held")]
    rows += [(f"  {need.name}", *(_size(getattr(need, column)) for column in columns), need.strategy) for need in needs]
    rows.append(("  all", *(_size(sum(getattr(need, column) for need in needs)) for column in columns), "without activations"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _size(size: int) -> str:
    return f"{size / GIB:.3f} GiB" if size >= GIB // 10 else f"{size / 2**20:.2f} MiB"
