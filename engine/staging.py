"""The copy of the state that a background save writes: one buffer in host memory, made once, filled while the loop goes on.

Parameters, moments and averages change when a step updates them, not before: the copy is made beside that step's forward and backward
passes, and the loop waits only for what is not copied by then. Buffers, which forward passes change, are copied at once.

Memory that was never touched costs a page fault per 4 KiB, several times the copy itself; so the buffer is kept.
"""

import threading
import weakref
from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from utils.errors import UserError

_ALIGNMENT = 64


class Copy:
    """A copy that is being made. `tensors`: in host memory, whole when `make` has returned; sharded ones stay DTensors."""

    def __init__(self, tensors: dict[str, Tensor], pairs: list[tuple[Tensor, Tensor]], from_gpu: bool) -> None:
        """`pairs` of a tensor's copy and the tensor are still to be copied; `from_gpu`: these, or others before them, from a GPU."""
        self.tensors = tensors
        self._on_host = [pair for pair in pairs if not pair[1].is_cuda]
        self._copied = threading.Event()
        on_gpu = [pair for pair in pairs if pair[1].is_cuda]
        self._event = _queue(on_gpu) if from_gpu else None

    def make(self) -> None:
        """In the thread that writes: return when everything is copied."""
        try:
            for copy, tensor in self._on_host:
                copy.copy_(tensor)
        finally:
            self._copied.set()
        if self._event is not None:
            self._event.synchronize()

    def wait(self) -> None:
        """In the loop: what is copied may change afterwards. For copies from a GPU its queue waits, the host does not."""
        self._copied.wait()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class Arena:
    """Copies a flat dictionary of tensors into its buffer, one after the other. A copy is valid until the next one is made."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._layout: list[tuple[str, torch.Size, torch.dtype]] = []
        self._copies: dict[str, Tensor] = {}
        """Of tensors of that layout: views of the buffer. Making them takes a quarter of the time of a copy."""

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the buffer large enough for such tensors, its pages touched (and pinned). Raises UserError when that is refused."""
        needed = sum(_room(_local(tensor)) for tensor in tensors.values())
        if needed <= len(self._buffer):
            return
        self._buffer, self._copies, self._layout = torch.zeros(0, dtype=torch.uint8), {}, []  # the old one goes first
        buffer = torch.empty(needed, dtype=torch.uint8).fill_(0)
        if self._pinned:
            _pin(buffer)
        self._buffer = buffer

    def copy(self, tensors: Mapping[str, Tensor], at_once: Collection[str]) -> Copy:
        """Begin a copy of the tensors; those that `at_once` names may change as soon as this returns, the others after `Copy.wait`."""
        layout = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        if layout != self._layout:
            self.reserve(tensors)
            self._copies, self._layout = self._views(tensors), layout
        later = []
        for name, tensor in tensors.items():
            pair = _local(self._copies[name]), _local(tensor)
            if name in at_once:
                pair[0].copy_(pair[1], non_blocking=self._pinned)
            else:
                later.append(pair)
        return Copy(dict(self._copies), later, any(tensor.is_cuda for tensor in tensors.values()))

    def _views(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts of the buffer, one after the other, of the tensors' types, shapes, meshes and placements."""
        views: dict[str, Tensor] = {}
        offset = 0
        for name, tensor in tensors.items():
            local = _local(tensor)
            views[name] = _like(tensor, self._buffer[offset : offset + local.nbytes].view(local.dtype).view(local.shape))
            offset += _room(local)
        return views


def _queue(pairs: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
    """Queue copies from the GPU beside what it computes, after all that it has been given so far; the event of their end."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for copy, tensor in pairs:
            copy.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return event


@torch.no_grad()  # else a DTensor's part comes through a function of autograd
def _local(tensor: Tensor) -> Tensor:
    """This rank's part, detached."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _room(local: Tensor) -> int:
    """Bytes of a tensor, rounded up so that the next one is aligned."""
    return -(-local.nbytes // _ALIGNMENT) * _ALIGNMENT


def _like(tensor: Tensor, local: Tensor) -> Tensor:
    """`local` with the mesh and placements of `tensor`. (`DTensor.from_local` would move it to the mesh's device.)"""
    if not isinstance(tensor, DTensor):
        return local
    names, context = tensor.__tensor_flatten__()
    inner = {name: local if name == "_local_tensor" else getattr(tensor, name) for name in names}
    return DTensor.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())


def _pin(buffer: Tensor) -> None:
    """Page-lock a buffer in place: torch's own pinned allocator rounds up to a power of two."""
    runtime = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if status:
        raise UserError(
            f"{buffer.nbytes / 2**30:.2f} GiB of host memory for background checkpoints cannot be page-locked "
            f"({torch.cuda.CudaError(status)}): free memory on this node, or give --no-ckpt-background"
        )
    weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False
