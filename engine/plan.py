"""What a run would need, told without starting it (`--dry-run`): parameters, memory per GPU, arithmetic, steps, checkpoint size."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from engine.activations import Activations, count_activations
from engine.best import check_metric
from engine.config import ParallelConfig, RunConfig
from engine.flops import count_flops, meta_copy
from engine.metrics import GIB
from engine.shard import samples_per_rank, shard_size
from engine.task import BatchSource, Network, Scorer, Task
from launch.env import Env
from utils.config import dump_yaml, to_dict

FP32 = 4
"""Bytes. Weights, gradients, moments and averages are held in fp32 whatever the precision of the arithmetic."""

CHECKPOINTING: tuple[Literal["none", "block", "selective"], ...] = ("none", "block", "selective")
"""What `parallel.activation_checkpointing` may be."""


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
    host: int = 0
    """In host memory, with `parallel.optim_offload`."""
    copied: int = 0
    """Of a checkpoint, what each process copies: its shards."""
    copied_once: int = 0
    """Of a checkpoint, what rank 0 copies for all: tensors that are not cut."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema


@dataclass(frozen=True)
class Peak:
    """The most that a GPU holds in a turn, bytes."""

    state: int
    """But for the gradients' shards, which come as the activations go: they are in `activations`."""
    activations: Activations
    gathered: int
    """Weights and gradients of the units at work, whole."""
    accumulated: int
    """Gradients that wait, whole, for the last micro-batch."""
    samples: int
    """The step's other micro-batches."""

    @property
    def total(self) -> int:
        return self.state + self.activations.peak + self.gathered + self.accumulated + self.samples


def measure(name: str, network: Network, shards: int, offload: bool = False) -> Need:
    """What a network takes when its state is cut over `shards` ranks (1: whole on each), without activations.

    `offload`: the shards of a network of strategy `fsdp` lie in host memory.
    """
    parameters = sum(parameter.numel() for parameter in network.module.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in network.module.buffers())
    if network.strategy == "frozen":
        return Need(name, "frozen", parameters, 0, FP32 * parameters + buffers, 0, 0, 0, 0)
    trained = sum(parameter.numel() for parameter in network.module.parameters() if parameter.requires_grad)
    cut = shards if network.strategy == "fsdp" else 1
    averaged = network.ema is not None and network.ema.decay > 0
    parts = {"weights": FP32 * parameters // cut, "gradients": FP32 * trained // cut, "optimizer": 2 * FP32 * trained // cut}
    parts["ema"] = FP32 * parameters // cut if averaged else 0
    held, host = f"1/{cut} per GPU" if cut > 1 else "whole on each GPU", 0
    if offload and network.strategy == "fsdp":
        host = sum(parts.values())
        held = f"1/{cut}, {_size(host)} in host memory per GPU"
        parts = dict.fromkeys(parts, 0)
    checkpoint = FP32 * parameters * (2 if averaged else 1) + 2 * FP32 * trained
    whole = buffers * (2 if averaged else 1)
    return Need(
        name,
        held,
        parameters,
        trained,
        weights=parts["weights"] + buffers,
        gradients=parts["gradients"],
        optimizer=parts["optimizer"],
        ema=parts["ema"] + (buffers if averaged else 0),
        checkpoint=checkpoint + whole,
        host=host,
        copied=checkpoint // cut if cut > 1 else 0,
        copied_once=whole if cut > 1 else checkpoint + whole,
    )


def report(
    task: Task, source: BatchSource, config: RunConfig, env: Env, valid: BatchSource | None = None, scorer: Scorer | None = None
) -> str:
    """The plan of a run on `env.world_size` GPUs, as text. Needs no GPU and no process group; raises ConfigError for an impossible one.

    `valid`, `scorer`: as for `engine.loop.fit`.
    """
    check_metric(config, valid, scorer)
    shards = shard_size(config.parallel, env.world_size, env.local_world_size)
    micro = samples_per_rank(config, env) // config.train.accumulation
    total = config.train.max_steps or config.train.epochs * source.steps_per_epoch
    networks = build_on_meta(task)
    needs = [measure(name, network, shards, config.parallel.optim_offload) for name, network in networks.items()]
    phases = tuple(dict.fromkeys((*task.phases(0), *task.phases(total))))
    lines = [dump_yaml(to_dict(config)), *_modules(networks), *_table(needs)]
    for phase in phases:
        lines += _peak_lines(task, networks, phase, micro, needs, config)
    for phase in phases:
        flops = count_flops(task, networks, phase, micro)
        amount = "not countable" if flops is None else f"{flops / 1e9:.3f} GFLOP per sample, forward and backward"
        lines.append(f"arithmetic of {phase}: {amount}")
    lines += [
        f"processes: {env.world_size} ({config.parallel.mode}), micro-batch {micro} on each, accumulation {config.train.accumulation}",
        f"steps per epoch: {source.steps_per_epoch}; steps of the run: {total} ({total * config.train.global_batch_size} samples)",
        f"checkpoint: {_size(sum(need.checkpoint for need in needs))}",
        *([scorer.about] if scorer else []),
        *_host_lines(needs, config, env),
    ]
    return "\n".join(lines) + "\n"


def estimate_peak(
    task: Task, networks: Mapping[str, Network], phase: str, micro: int, needs: Sequence[Need], config: RunConfig
) -> Peak | None:
    """The most that a GPU holds in the turn of `phase` with micro-batches of `micro` samples; None where it cannot be counted.

    `needs`: the networks' state, as `measure` finds it.
    """
    parallel, accumulation = config.parallel, config.train.accumulation
    own = next(need for need in needs if need.name == phase)
    sharded = [need for need in needs if parallel.mode != "ddp" and networks[need.name].strategy == "fsdp"]
    found = count_activations(task, networks, phase, micro, parallel, kept=own.gradients / own.trained if own in sharded else 0.0)
    if found is None:
        return None
    sample_bytes = sum(value.numel() * value.element_size() for value in task.batch_spec(micro).values())
    return Peak(
        sum(need.total for need in needs) - sum(need.gradients for need in sharded),
        found,
        gathered=sum(gathered(network, parallel, trained=name == phase) for name, network in networks.items()),
        # Until gradients are exchanged they belong to no shard, and to no bucket of DDP.
        accumulated=FP32 * own.trained if accumulation > 1 else 0,
        samples=(accumulation - 1) * sample_bytes,
    )


def gathered(network: Network, parallel: ParallelConfig, *, trained: bool) -> int:
    """Bytes of a sharded network's weights and gradients that are whole at a time.

    The root's own weights stay; of the largest unit there are its weights and those that are fetched meanwhile, and where it is
    `trained` its gradients, as they are computed and in fp32 as they are reduced.
    """
    if network.strategy != "fsdp" or parallel.mode == "ddp":
        return 0
    width = 2 if parallel.precision == "bf16" else FP32
    module = network.module
    units = [unit for unit in (network.units(module) if network.units else []) if unit is not module]
    sizes = [sum(parameter.numel() for parameter in unit.parameters()) for unit in units]
    everything = sum(parameter.numel() for parameter in module.parameters())
    root, largest = everything - sum(sizes), max(sizes, default=0)
    reduced = (width + FP32) * (largest or everything) if trained else 0
    return width * (root + 2 * largest) + reduced


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
    """Memory of the state per GPU."""
    columns = ("weights", "gradients", "optimizer", "ema", "total")
    rows: list[tuple[str, ...]] = [("memory per GPU", *columns, "held")]
    rows += [(f"  {need.name}", *(_size(getattr(need, column)) for column in columns), need.strategy) for need in needs]
    rows.append(("  all", *(_size(sum(getattr(need, column) for need in needs)) for column in columns)))
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def _peak_lines(task: Task, networks: Mapping[str, Network], phase: str, micro: int, needs: Sequence[Need], config: RunConfig) -> list[str]:
    """The peak of a turn, its parts, and what other activation checkpointing would make of it."""
    used = config.parallel.activation_checkpointing
    peaks: dict[str, Peak] = {}
    for kind in CHECKPOINTING if networks[phase].units else (used,):
        other = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, activation_checkpointing=kind))
        peak = estimate_peak(task, networks, phase, micro, needs, other)
        if peak is None:
            return [f"peak per GPU in the turn of {phase}: not countable"]
        peaks[kind] = peak
    peak = peaks[used]
    parts = {"state": peak.state, f"micro-batch of {micro}": peak.activations.peak, "gathered weights and gradients": peak.gathered}
    parts |= {"accumulated gradients": peak.accumulated, "waiting samples": peak.samples}
    lines = [f"peak per GPU in the turn of {phase}, estimated, without evaluations and previews: {_size(peak.total)}"]
    lines.append("  " + " + ".join(f"{name} {_size(size)}" for name, size in parts.items() if size))
    if len(peaks) > 1:
        others = ", ".join(f"{kind} {_size(other.total)}" for kind, other in peaks.items())
        lines.append(f"  by --activation-checkpointing: {others} (this run: {used})")
    return lines


def _host_lines(needs: Sequence[Need], config: RunConfig, env: Env) -> list[str]:
    """Host memory that the run keeps (page-locked where there are GPUs) beside what its processes and loaders take themselves."""
    shards = sum(need.host for need in needs)
    own, first = (sum(need.copied for need in needs), sum(need.copied_once for need in needs)) if config.checkpoint.background else (0, 0)
    node = env.local_world_size * (shards + own) + first
    if not node:
        return []
    parts = {"shards": shards, "copy for background checkpoints": own, "the same of what is not cut, on rank 0": first}
    listed = " + ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    return [f"host memory kept by a process: {listed}; by rank 0's node of {env.local_world_size} process(es): {_size(node)}"]


def _size(size: int) -> str:
    return f"{size / GIB:.3f} GiB" if size >= GIB // 10 else f"{size / 2**20:.2f} MiB"
