"""What is recorded of the machine when asked for: a trace of some steps, and the GPU's memory when it ran out."""

import gzip
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from engine.config import LogConfig
from launch.env import Env
from utils.files import atomic_path, atomic_write_text

_log = logging.getLogger(__name__)

FOLDER = "profile"
"""Folder of a run for traces, their summaries and memory snapshots."""

_HISTORY = 100_000
"""Allocations that a memory history goes back."""
_ROWS = 30
"""Operators that a summary lists."""


class Profiler:
    """A context manager around the steps, which go through `steps`. Ranks that do not record do nothing."""

    def __init__(self, run: Path, config: LogConfig, env: Env, first: int) -> None:
        """`first`: steps that are done."""
        self._run, self._env, self._config, self._first = run, env, config, first
        self._steps = config.profiled if env.is_main or config.profile_ranks == "all" else None
        self._active: profile | None = None

    def __enter__(self) -> "Profiler":
        _record_collectives(self._run, self._env)
        if self._steps and self._first >= self._steps[0]:
            if self._env.is_main:
                asked = self._config.profile_steps
                _log.warning("--profile-steps %s: the run is at step %d already, nothing is recorded", asked, self._first)
            self._steps = None
        if self._config.memory_history and self._env.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY, stacks="python")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, torch.OutOfMemoryError) and self._env.device.type == "cuda":
            self._snapshot()
        if self._active is not None and error is None:
            self._stop()
        elif self._active is not None and self._env.device.type != "cuda":
            self._active.stop()  # without a trace. A GPU may never answer again, or say what hides the error: it is asked for nothing

    def steps(self, numbers: Iterable[int]) -> Iterator[int]:
        """The steps' numbers (from 0), recorded where that was asked for."""
        for number in numbers:
            if self._steps and number + 1 == self._steps[0]:
                cuda = [ProfilerActivity.CUDA] if self._env.device.type == "cuda" else []
                self._active = profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True, profile_memory=True)
                self._active.start()
            yield number
            if self._steps and number + 1 == self._steps[1] and self._active is not None:
                self._stop()

    def _stop(self) -> None:
        """End the recording and write it. A full disk loses the trace, not the run."""
        active, steps = self._active, self._steps
        assert active is not None and steps is not None
        self._active = self._steps = None
        if self._env.device.type == "cuda":
            torch.cuda.synchronize()
        active.stop()
        name = f"steps_{steps[0]:07d}-{steps[1]:07d}_rank_{self._env.rank}"
        order = "self_cuda_time_total" if self._env.device.type == "cuda" else "self_cpu_time_total"
        try:
            with atomic_path(self._run / FOLDER / f"{name}.json.gz") as temporary:
                _write_trace(active, temporary)
            atomic_write_text(self._run / FOLDER / f"{name}.txt", active.key_averages().table(sort_by=order, row_limit=_ROWS) + "\n")
        except OSError as error:
            _log.warning("the trace of steps %d to %d cannot be written: %s", *steps, error)
            return
        if self._env.is_main:
            _log.info("trace of steps %d to %d: %s (open it in ui.perfetto.dev)", *steps, self._run / FOLDER / f"{name}.json.gz")

    def _snapshot(self) -> None:
        """Write what lies in the GPU's memory. Nothing may hide the error that is on its way."""
        place = self._run / FOLDER / f"out_of_memory_rank_{self._env.rank}.pickle"
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(place))
        except (OSError, RuntimeError) as error:
            _log.warning("the memory snapshot %s cannot be written: %s", place, error)
            return
        hint = "" if self._config.memory_history else "; with --memory-history it would say who allocated what"
        _log.warning("out of memory: snapshot in %s (open it in pytorch.org/memory_viz%s)", place, hint)


def _record_collectives(run: Path, env: Env) -> None:
    """Have NCCL's flight recorder write its last collectives into the run folder when one of them times out.

    The file is named when it is written, long after the group was made; its buffer is asked for before, in `launch.env`.
    """
    if env.device.type == "cuda":
        folder = run / "faults"
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
        os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / "nccl_rank_"))


def _write_trace(active: profile, place: Path) -> None:
    """Chrome's trace format, compressed."""
    plain = place.with_name(f".plain{place.name}")
    try:
        active.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(place, "wb", compresslevel=5) as target:
            shutil.copyfileobj(source, target)
    finally:
        plain.unlink(missing_ok=True)
