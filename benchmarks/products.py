"""What is left of a training step when all else costs nothing: its matrix products and convolutions, each repeated by itself, warm.

They are those of the step as it runs, in its types and layouts, so this says about how much faster than its baseline the step can become
on a machine by changes to the rest.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import BASELINE, Clock, seconds

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.convolution.default, _aten.convolution_backward.default}
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
REPEATS = 3
"""Times that each product is computed; the least counts."""

Form = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]
"""Type, shape and strides of a tensor."""
Call = tuple[Callable[..., Any], tuple[Hashable, ...]]
"""An operator, and its arguments with a Form in the place of each tensor."""


class Products(TorchDispatchMode):
    """Counts the matrix products and convolutions that are computed while it is entered; those of the fused attention kernels too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[Call]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in _PRODUCTS:
            self.calls[func, tuple(map(_form, args))] += 1
        elif func is _ATTENTION:
            self._attention(*args[:3])
        elif func is _ATTENTION_BACKWARD:
            self._attention_backward(*args[1:4])
        return func(*args, **(kwargs or {}))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Scores, and what they weigh."""
        rows, n, m = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
        self._product(q.dtype, rows, n, q.shape[3], m)
        self._product(q.dtype, rows, n, m, v.shape[3])

    def _attention_backward(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Gradients of weights, values, queries and keys; scores are not counted again, though the kernel computes them anew."""
        rows, n, m = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
        self._product(q.dtype, rows, n, v.shape[3], m)
        self._product(q.dtype, rows, m, n, v.shape[3])
        self._product(q.dtype, rows, n, m, q.shape[3])
        self._product(q.dtype, rows, m, n, q.shape[3])

    def _product(self, dtype: torch.dtype, rows: int, n: int, inner: int, m: int) -> None:
        left: Form = dtype, (rows, n, inner), (n * inner, inner, 1)
        right: Form = dtype, (rows, inner, m), (inner * m, m, 1)
        self.calls[_aten.bmm.default, (left, right)] += 1

    def seconds(self, clock: Clock) -> float:
        """Seconds that all of them take on the CPU, with tensors in the cache as far as they fit."""
        return sum(count * _least_seconds(call, clock) for call, count in self.calls.items())


def _form(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), tuple(value.stride())
    return tuple(value) if isinstance(value, list) else value


def _least_seconds(call: Call, clock: Clock) -> float:
    func, forms = call
    args = [_tensor(form) if isinstance(form, tuple) and form and isinstance(form[0], torch.dtype) else form for form in forms]
    return min(seconds(lambda: func(*args), torch.device("cpu"), clock) for _ in range(1 + REPEATS))


def _tensor(form: Form) -> Tensor:
    dtype, shape, strides = form
    reach = 1 + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    return torch.randn(reach).to(dtype).as_strided(shape, strides)


def bound_line(step: Callable[[], object], medians: Mapping[str, float], steps: int, clock: Clock) -> str:
    """A line on the products of one more step, and how many times as fast as the baseline a step of nothing else would be."""
    with Products() as products:
        step()
    least = products.seconds(clock)
    faster = f"   {medians[BASELINE] / steps / least:.2f} times as fast as {BASELINE}, were that all" if BASELINE in medians else ""
    return f"  {'products alone':<14}{least * 1e3:>9.1f} ms/step{faster}"
