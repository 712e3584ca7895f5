"""Micro-batches on the way from a source to the device, and the time the loop waits for them."""

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from engine.task import Batch, BatchSource
from launch.env import Env


class Feed:
    """The training stream of this rank, a whole step at a time: every turn of a step sees the same samples."""

    def __init__(self, source: BatchSource, first_step: int, accumulation: int, device: torch.device) -> None:
        self._batches = source.batches(first_step)
        self._accumulation = accumulation
        self._device = device
        self.waited = 0.0
        """Seconds that the device could have worked while the loop waited for samples; the reader sets it back to 0."""
        self.worked = 0.0
        """Seconds of the processor that this thread had in the meantime; the reader sets it back to 0."""

    def step(self) -> list[Batch]:
        """The micro-batches of the next step."""
        started, worked = time.perf_counter(), time.thread_time()
        batches = [next(self._batches) for _ in range(self._accumulation)]
        # A GPU that still has queued work does not wait, however long the host does.
        if self._device.type != "cuda" or torch.cuda.current_stream().query():
            self.waited += time.perf_counter() - started
        self.worked += time.thread_time() - worked
        return [to_device(batch, self._device) for batch in batches]

    def close(self) -> None:
        """End the loader's processes."""
        close(self._batches)


def close(batches: Iterator[Batch]) -> None:
    """End an iterator now rather than when it is collected."""
    end = getattr(batches, "close", None)
    if end is not None:
        end()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, `index` left on the CPU; copies to a GPU are queued, not waited for."""
    if device.type != "cuda":
        return batch
    pinned = {key: value if value.is_pinned() or key == "index" else value.pin_memory() for key, value in batch.items()}
    return {key: value if key == "index" else value.to(device, non_blocking=True) for key, value in pinned.items()}


def fixed_batch(source: BatchSource, size: int, env: Env) -> Batch:
    """The first samples of a source, `size` at most, the same on every rank."""
    found: list[Batch | None] = [None]
    if env.is_main:
        batches = source.batches(0)
        found = [{key: value[:size].clone() for key, value in next(batches).items()}]
        close(batches)
    dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    assert found[0] is not None
    return to_device(found[0], env.device)
