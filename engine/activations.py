"""How much memory a micro-batch takes beside the state of a run: its forward and backward pass are played through on meta tensors.

Every storage that an operator makes is counted from then until it is freed, so that what the backward pass needs, its own temporaries
and what checkpointing computes again are in it. The model, and what it leaves out:
- eager kernels, in blocks of 512 bytes as CUDA's allocator gives them; a compiled block holds less, as it fuses operators;
- attention by a fused kernel, which does not hold the weights of all pairs of tokens;
- bf16 as autocast on a GPU does it; a copy of each weight that is not sharded, as autocast keeps no cache here;
- a gradient leaves as soon as it is there, but for its shard: DDP has its bucket from the start, and sharding reduces a unit at a time;
- not the allocator's gaps, nor what CUDA, its libraries and NCCL take for themselves.
"""

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from engine.config import ParallelConfig
from engine.flops import meta_modules
from engine.shard import recompute
from engine.task import Network, Task
from utils.rng import SampleRng

_log = logging.getLogger(__name__)

_BLOCK = 512
"""Bytes: what CUDA's allocator rounds up to."""

_LOWER = frozenset({
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "mv", "einsum", "conv1d", "conv2d",
    "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention", "prelu",
})  # fmt: skip
"""Functions that autocast computes in bf16 on a GPU."""
_HIGHER = frozenset({
    "layer_norm", "group_norm", "softmax", "log_softmax", "softplus", "exp", "expm1", "log", "log1p", "log2", "log10", "pow",
    "__pow__", "__rpow__", "square", "rsqrt", "reciprocal", "__rtruediv__", "prod", "cumsum", "cumprod", "norm", "normalize",
    "mse_loss", "l1_loss", "smooth_l1_loss", "cross_entropy", "nll_loss", "kl_div", "cosine_similarity",
    "binary_cross_entropy_with_logits", "cdist", "dist",
})  # fmt: skip
"""Functions that autocast computes in fp32."""


@dataclass(frozen=True)
class Activations:
    """Bytes on one GPU, of one micro-batch."""

    saved: int
    """Alive when the loss is known: what the backward pass needs."""
    peak: int
    """The most that are alive at a time."""


class Ledger(TorchDispatchMode):
    """Counts the bytes of the storages that operators inside the block have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: list[torch.UntypedStorage] = []
        self._seen: dict[int, weakref.ref[torch.UntypedStorage] | None] = {}

    def know(self, tensors: Iterable[Tensor]) -> None:
        """These are there before and do not count."""
        self._known += [tensor.untyped_storage() for tensor in tensors]
        self._seen |= {storage._cdata: None for storage in self._known}

    def add(self, size: int) -> None:
        """Count bytes that stay to the end."""
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._enter(leaf.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._seen[key] = weakref.ref(storage, functools.partial(self._leave, key, size))
        self.add(size)

    def _leave(self, key: int, size: int, reference: object) -> None:
        del self._seen[key]
        self.live -= size


class Autocast(TorchFunctionMode):
    """What autocast does on a GPU, for meta tensors, which it does not know: where CPU autocast is on. And attention by a fused kernel."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if (name in _LOWER or name in _HIGHER) and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(functools.partial(_cast, torch.bfloat16 if name in _LOWER else torch.float32), (args, kwargs))
        if name == "scaled_dot_product_attention" and all(isinstance(part, Tensor) and part.ndim == 4 for part in args[:3]):
            return _attention(*args, **kwargs)
        return function(*args, **kwargs)


def count_activations(
    task: Task, networks: Mapping[str, Network], phase: str, batch_size: int, parallel: ParallelConfig, kept: float
) -> Activations | None:
    """What a micro-batch of `batch_size` samples takes on one GPU in the turn of `phase`, its own tensors included.

    `kept`: bytes that stay of a gradient, for each weight. None, with a warning, where a loss does not run on meta tensors. Call it
    before the networks are wrapped.
    """
    autocast, ledger = Autocast(), Ledger()
    modules = meta_modules(networks, phase)
    for name, module in modules.items():
        _prepare(module, networks[name], parallel, autocast)
        ledger.know((*module.parameters(), *module.buffers()))
    for parameter in modules[phase].parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(functools.partial(_reduce, ledger, kept))
    index = torch.arange(batch_size)
    try:
        with ledger, torch.random.fork_rng(devices=[]):
            batch = {name: torch.empty_like(value) for name, value in task.batch_spec(batch_size).items()} | {"index": index}
            with autocast, torch.autocast("cpu", torch.bfloat16, enabled=parallel.precision == "bf16", cache_enabled=False):
                loss = task.loss(phase, modules, batch, SampleRng(0, index, "meta")).total
            saved = ledger.live
            loss.backward()
    except (RuntimeError, TypeError, ValueError) as error:  # what torch raises for operators without a meta kernel
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _log.warning("the activations of %s cannot be counted on meta tensors (%s)", phase, reason)
        return None
    return Activations(saved, ledger.peak)


def _prepare(module: nn.Module, network: Network, parallel: ParallelConfig, autocast: Autocast) -> None:
    """Make a meta copy of a network behave as the wrapped network does on a GPU."""
    units = network.units(module) if network.units else []
    if network.strategy == "fsdp" and parallel.mode != "ddp" and parallel.precision == "bf16":
        exact = {id(parameter) for unit in units if getattr(unit, "float32", False) for parameter in unit.parameters()}
        for parameter in module.parameters():
            if id(parameter) not in exact and parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(torch.bfloat16)
    if network.strategy != "frozen":
        for unit in units:
            unit.forward = _within(autocast, unit.forward)
            recompute(unit, parallel.activation_checkpointing)


def _within(autocast: Autocast, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` under `autocast` also when it is called again in the backward pass, where the mode around the loss is over."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if autocast in _get_current_function_mode_stack():
            return call(*args, **kwargs)
        with autocast:
            return call(*args, **kwargs)

    return forward


def _reduce(ledger: Ledger, kept: float, parameter: Tensor) -> None:
    """What becomes of a gradient that is there."""
    parameter.grad = None
    ledger.add(round(kept * parameter.numel()))


def _cast(dtype: torch.dtype, value: Any) -> Any:
    low = (torch.bfloat16, torch.float16, torch.float32)
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype in low else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Of the fused kernels the one that has a form for meta tensors and takes masks."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
