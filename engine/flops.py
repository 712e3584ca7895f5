"""How much arithmetic a stage needs, counted on the meta device, and how much a device could do."""

import copy
import logging
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine.task import Network, Task
from utils.rng import SampleRng

_log = logging.getLogger(__name__)

PEAK_TFLOPS = {
    # Part of the device's name: dense bf16 and fp32 (TF32 where there are tensor cores for it) in 1e12 FLOP/s, from the data sheets.
    "GB200": (2500.0, 1250.0),
    "B200": (2250.0, 1125.0),
    "H200": (989.4, 494.7),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 417.5),
    "H100": (989.4, 494.7),
    "GH200": (989.4, 494.7),
    "A100": (312.0, 156.0),
    "A800": (312.0, 156.0),
    "A40": (149.7, 74.8),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 62.5),
    "L40S": (362.1, 183.2),
    "L40": (181.1, 90.5),
    "L4": (121.0, 60.0),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165.2, 82.6),
    "RTX 4080": (97.5, 48.7),
    "RTX 3090": (71.0, 35.6),
    "RTX A6000": (154.8, 77.4),
    "V100": (15.7, 15.7),  # no bf16 in hardware
    "T4": (8.1, 8.1),  # no bf16 in hardware
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of the device in "bf16" or "fp32"; None where unknown (CPUs, GPUs not in the table)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return peak_of(name, precision)


def peak_of(name: str, precision: str) -> float | None:
    """FLOP/s of a device by its name; the longest matching entry wins."""
    known = [key for key in PEAK_TFLOPS if key in name]
    if not known:
        return None
    return PEAK_TFLOPS[max(known, key=len)][precision == "fp32"] * 1e12


def meta_copy(module: nn.Module) -> nn.Module:
    """The module with empty tensors on the meta device; nothing is copied."""
    tensors: dict[int, object] = {}
    for parameter in module.parameters():
        tensors[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in module.buffers():
        tensors[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, tensors)


def meta_modules(networks: Mapping[str, Network], phase: str) -> dict[str, nn.Module]:
    """Meta copies of the networks as they are in the turn of `phase`."""
    modules = {name: meta_copy(network.module) for name, network in networks.items()}
    for name, module in modules.items():
        module.train(networks[name].strategy != "frozen")
        if name != phase:
            module.requires_grad_(False)
    return modules


def count_flops(task: Task, networks: Mapping[str, Network], phase: str, batch_size: int) -> float | None:
    """FLOPs per sample, forward and backward, of one turn; None, with a warning, where a loss does not run on meta tensors.

    Recomputation by activation checkpointing is not counted: it is no useful work. Call it before the networks are wrapped.
    """
    modules = meta_modules(networks, phase)
    index = torch.arange(batch_size)
    batch = {**task.batch_spec(batch_size), "index": index}
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.random.fork_rng(devices=[]):
            task.loss(phase, modules, batch, SampleRng(0, index, "meta")).total.backward()
    except (RuntimeError, TypeError, ValueError) as error:  # what torch raises for operators without a meta kernel
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _log.warning("the FLOPs of %s cannot be counted on meta tensors (%s): no MFU", phase, reason)
        return None
    return counter.get_total_flops() / batch_size
