"""How many samples are made at a time: as many as was said, or as many as memory holds, and half as many where it runs out."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size

from utils.errors import UserError

MOST = {"cpu": 8, "cuda": 64}
"""Samples at a time beyond which nothing is gained."""
SHARE = 0.8
"""Of the memory that is free, what samples may take."""


class Batches:
    """The size of the next batch of one process.

    With `size` None it begins with one sample and doubles, up to what the memory per sample that was measured leaves room for.
    `processes`: how many share the memory of the CPU.
    """

    def __init__(self, size: int | None, device: torch.device, processes: int = 1) -> None:
        self.device, self.processes = device, processes
        self.size = size or 1
        self.limit = self.size if size else MOST.get(device.type, MOST["cpu"])
        self.grows = size is None

    def attempt(self, make: Callable[[], object], samples: int) -> bool:
        """Call what makes a batch of so many samples; False where memory ran out: the next one is half as large.

        Raises UserError when one sample alone is too much.
        """
        before = self._begin()
        try:
            make()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        else:
            self._grow(samples, self._peak(before))
            return True
        # Out of the handler, for the exception holds the tensors of its frames.
        if samples == 1:
            remedy = "fewer --num-frames, --precision bf16, or a device with more of it"
            raise UserError(f"{self.device.type} memory does not hold one sample: {remedy}")
        self.size = self.limit = samples // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _begin(self) -> int:
        """Bytes in use."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        return resident_memory()

    def _peak(self, before: int) -> int:
        """Bytes that were in use at most, beyond `before`. On a CPU never less than it was, as its peak counts from the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - before
        return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, 0)

    def _free(self) -> int:
        """Bytes that samples may take."""
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return int(SHARE * (torch.cuda.mem_get_info(self.device)[0] + unused))
        return int(SHARE * available_memory() / self.processes)

    def _grow(self, samples: int, peak: int) -> None:
        if self.grows and samples == self.size:  # the last batch may have been smaller
            fitting = self._free() * samples // max(peak, 1)
            self.size = max(1, min(2 * samples, self.limit, fitting))


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out, of a GPU or of the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)


def resident_memory() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    place = Path("/proc/self/statm")
    return int(place.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if place.is_file() else 0


def available_memory() -> int:
    """Bytes that processes can still have: of the machine, or of the control group (v2) that this one is in, where it is less."""
    meminfo = Path("/proc/meminfo")
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines()) if meminfo.is_file() else {}
    known = [int(rows["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in rows else []
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file():
        limit = (group / "memory.max").read_text().strip()
        known += [int(limit) - int((group / "memory.current").read_text())] if limit.isdecimal() else []
    return max(min(known, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2), 0)
