"""The state of a run as one flat dictionary of tensors, keyed by names that do not depend on how a module is wrapped or sharded."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypedDict, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

T = TypeVar("T")

_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")


class State(TypedDict):
    """All that training needs to go on. Optimizer `name` belongs to network `name`."""

    networks: Mapping[str, nn.Module]
    optim: Mapping[str, Optimizer]
    ema: Mapping[str, nn.Module]
    progress: dict[str, int]
    task: dict[str, int | float]


def model_tensors(state: State) -> dict[str, Tensor]:
    """Parameters and buffers of the networks and their averages, as they lie in the modules (writing to one writes to the module)."""
    tensors: dict[str, Tensor] = {}
    for kind, modules in (("networks", state["networks"]), ("ema", state["ema"])):
        for name, module in modules.items():
            values = cast("dict[str, Tensor]", get_model_state_dict(module))
            tensors.update({f"{kind}.{name}.{key}": value for key, value in values.items()})
    return tensors


def buffer_names(state: State) -> set[str]:
    """Names of the networks' buffers, as `model_tensors` has them: what a forward pass may change."""
    return {f"networks.{name}.{key}" for name, module in state["networks"].items() for key in _names(_root(module).named_buffers())}


def optimizer_tensors(state: State) -> dict[str, Tensor]:
    """What the optimizers remember of each parameter. A parameter that has not been stepped yet has no entry."""
    return {
        f"{prefix}.{key}": value
        for optimizer, prefix, parameter in _parameters(state)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def expected_tensors(state: State) -> dict[str, Tensor]:
    """Tensors of the sizes that the whole state will have once every parameter has been stepped by AdamW."""
    moments = {f"{prefix}.{key}": parameter for _, prefix, parameter in _parameters(state) for key in ("exp_avg", "exp_avg_sq")}
    steps = {f"{prefix}.step": torch.zeros(()) for _, prefix, _ in _parameters(state)}
    return model_tensors(state) | moments | steps


def make_optimizer_tensors(state: State, saved: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
    """Fresh optimizer state for exactly what a checkpoint holds (flat name -> full shape, dtype), in place in the optimizers."""
    entries: dict[str, list[str]] = {}
    for key in saved:
        prefix, _, entry = key.rpartition(".")
        entries.setdefault(prefix, []).append(entry)
    tensors: dict[str, Tensor] = {}
    for optimizer, prefix, parameter in _parameters(state):
        remembered = optimizer.state[parameter] = {}
        for entry in entries.get(prefix, []):
            shape, dtype = saved[f"{prefix}.{entry}"]
            if shape == parameter.shape and entry != "step":
                remembered[entry] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            else:
                remembered[entry] = torch.zeros(shape, dtype=dtype, device=_scalar_device(optimizer, parameter))
            tensors[f"{prefix}.{entry}"] = remembered[entry]
        if not remembered:
            del optimizer.state[parameter]
    return tensors


def numbers(values: Mapping[str, int | float], what: str) -> dict[str, int | float]:
    """A copy for JSON. Tensors and objects have no place here: they would need an owner among the ranks."""
    for key, value in values.items():
        assert isinstance(value, int | float), f"{what}[{key!r}] is a {type(value).__name__}: plain numbers only"
    return dict(values)


def _parameters(state: State) -> Iterator[tuple[Optimizer, str, nn.Parameter]]:
    """Each optimizer's parameters with the prefix of their names."""
    for name, optimizer in state["optim"].items():
        names = {parameter: key for key, parameter in _names(_root(state["networks"][name]).named_parameters()).items()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert parameter in names, f"optimizer {name!r} holds parameters that its network no longer has: built before sharding"
                yield optimizer, f"optim.{name}.{names[parameter]}", parameter


def _root(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def _names(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """The same, by names that do not depend on how the module is wrapped."""
    return {_WRAPPERS.sub("", name): value for name, value in named}


def _scalar_device(optimizer: Optimizer, parameter: nn.Parameter) -> torch.device:
    """Where AdamW keeps its step counter."""
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return parameter.device if on_device else torch.device("cpu")
