"""The copy of the state that a background save writes: one buffer in host memory, made once.

Memory that was never touched costs a page fault per 4 KiB, several times the copy itself; so the buffer is kept.
"""

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from utils.errors import UserError

_ALIGNMENT = 64


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

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of the tensors in host memory; sharded ones stay DTensors."""
        layout = [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        if layout != self._layout:
            self.reserve(tensors)
            self._copies, self._layout = self._views(tensors), layout
        for name, tensor in tensors.items():
            _local(self._copies[name]).copy_(_local(tensor), non_blocking=self._pinned)
        if self._pinned:
            torch.cuda.synchronize()
        return dict(self._copies)

    def _views(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts of the buffer, one after the other, of the tensors' types, shapes, meshes and placements."""
        views: dict[str, Tensor] = {}
        offset = 0
        for name, tensor in tensors.items():
            local = _local(tensor)
            views[name] = _like(tensor, self._buffer[offset : offset + local.nbytes].view(local.dtype).view(local.shape))
            offset += _room(local)
        return views


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
