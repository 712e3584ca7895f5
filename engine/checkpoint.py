"""Checkpoints that any number of ranks can read, written while training goes on.

- Every tensor has one owner: sharded tensors (DTensor) belong to all ranks, everything else to rank 0, whose values all ranks
  read. So no key is written by two ranks, of which one would win unseen.
- A thread copies the state into a buffer that is made once, while the loop computes its next gradients, and then writes the copy,
  computes the digests and commits. The loop waits for the copy before it updates anything.
- That thread uses a gloo group that nothing else uses: collectives of two threads on one group would meet each other.
- A checkpoint that cannot be written (a full disk, one that has become read-only) costs a warning, not the run.

`python -m engine.checkpoint inspect|verify|convert` looks at checkpoints without a run.
"""

import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from torch.distributed.tensor import DTensor

from engine import manifest
from engine.config import RunConfig
from engine.contents import cause, saved_tensors
from engine.manifest import latest
from engine.runs import patient_group
from engine.staging import Arena, Copy
from engine.state import State, buffer_names, expected_tensors, make_optimizer_tensors, model_tensors, numbers, optimizer_tensors
from launch.env import Env
from utils.errors import UserError
from utils.files import atomic_write_bytes

__all__ = ["Checkpointer", "State", "latest"]

_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and loads the state of one run folder. Making one is a collective: every rank does it at the same place.

    A state is `{"networks": {name: module}, "optim": {name: optimizer}, "ema": {name: module}, "progress": {...}, "task": {...}}`;
    optimizer `name` belongs to network `name`; progress and task hold plain numbers, and progress has "step" and "samples".
    """

    def __init__(self, folder: Path, env: Env, config: RunConfig) -> None:
        self._run = folder
        self._env = env
        self._keep = config.checkpoint
        self._background = config.checkpoint.background
        self._arena = Arena(pinned=env.device.type == "cuda")
        self._copy: Copy | None = None
        """Of the last save, until the loop has waited for it."""
        self._thread: threading.Thread | None = None
        self._outcome: str | BaseException = ""
        """Of the last save, once its thread has ended: nothing, why there is no checkpoint, or an error of another kind."""
        self._step: int | None = None
        self._held = 0.0
        self._times: dict[str, float] = {}
        self._grace = _grace()
        self._group = patient_group()

    def reserve(self, state: State) -> None:
        """Make the copy's buffer now, optimizer moments included, so that the first save holds the loop no longer than others."""
        if self._background:
            self._arena.reserve(self._owned(expected_tensors(state)))

    def save(self, step: int, state: State) -> None:
        """Write checkpoint `step`. Forward passes may follow, what changes weights only after `copied`; `poll` or `wait` says whether it
        was written.

        Waits for the previous save first. Nothing happens when `step` is the last one saved.
        """
        began = time.perf_counter()
        self._warn(self._settle())
        if step == self._step:
            return
        self._step = step
        temporary = self._run / "checkpoints" / f".{manifest.checkpoint_name(step)}.tmp"
        tensors = self._owned(model_tensors(state) | optimizer_tensors(state))
        if self._background:
            self._copy = self._arena.copy(tensors, buffer_names(state))
        record = {
            "step": step,
            "samples": state["progress"].get("samples"),
            "progress": numbers(state["progress"], "progress"),
            "task": numbers(state["task"], "task"),
            "torch": torch.__version__,
            "world_size": self._env.world_size,
        }
        how = tensors, self._copy, temporary, record, began
        self._thread = threading.Thread(target=self._finish, args=how, name="checkpoint", daemon=True)
        self._thread.start()
        self._held = time.perf_counter() - began
        if not self._background:
            self._thread.join()

    def copied(self) -> None:
        """Return when what was saved may change. Called before each update of weights; without a save it costs nothing."""
        if self._copy is not None:
            began = time.perf_counter()
            self._copy.wait()
            self._copy = None
            self._held += time.perf_counter() - began

    @property
    def writing(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def poll(self) -> None:
        """Warn of a save that could not be written; the next one tries again. Costs nothing; called at every step."""
        if not self.writing:
            self._warn(self._settle())

    def wait(self) -> None:
        """Return when no save is in flight. Raises UserError when the last one could not be written and nothing has said so yet."""
        reason = self._settle()
        if reason:
            raise UserError(f"{reason}; mend that and start the same command again to go on from {self._newest()}")

    def read(self) -> dict[str, float]:
        """On the main rank, of a checkpoint written since the last call: `time/checkpoint`, the seconds that it took, and
        `time/checkpoint_held`, those of them that training waited for (for the checkpoint before it too)."""
        times, self._times = self._times, {}
        return times

    def _settle(self) -> str:
        """Wait for the save in flight; returns, once, why the last one is not there. Raises what is no fault of the file system."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        outcome, self._outcome = self._outcome, ""
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome:
            self._step = None
        return outcome

    def _warn(self, reason: str) -> None:
        if reason and self._env.is_main:
            _log.warning("%s; training goes on, the next checkpoint tries again; until then there is %s", reason, self._newest())

    def _newest(self) -> str:
        newest = latest(self._run)
        return newest.name if newest else "no checkpoint"

    def load(self, path: Path, state: State) -> None:
        """Fill the state from a committed checkpoint, in place: modules, optimizers, and the progress and task dictionaries.

        The digests are `engine.runs.open_run`'s business. Raises UserError when the checkpoint cannot be read here or holds
        other tensors than the state wants.
        """
        self.wait()
        record = manifest.read_manifest(path)
        reader = FileSystemReader(path)
        saved = saved_tensors(reader, path, record)
        wanted = model_tensors(state)
        _compare({key: value for key, value in saved.items() if not key.startswith("optim.")}, wanted, path)
        wanted |= make_optimizer_tensors(state, {key: value for key, value in saved.items() if key.startswith("optim.")})
        try:
            dcp.load(cast("dict[str, Any]", wanted), storage_reader=reader, process_group=self._group)
        except CheckpointException as error:
            raise UserError(f"{path} cannot be read: {cause(error)}") from error
        for kind, modules in (("networks", state["networks"]), ("ema", state["ema"])):
            for name, module in modules.items():
                prefix = f"{kind}.{name}."
                set_model_state_dict(module, {key.removeprefix(prefix): value for key, value in wanted.items() if key.startswith(prefix)})
        state["progress"].update(record["progress"])
        state["task"].update(record["task"])
        self._step = record["step"]

    def _owned(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in tensors.items() if self._env.is_main or isinstance(value, DTensor)}

    def _finish(self, tensors: dict[str, Tensor], copy: Copy | None, temporary: Path, record: dict[str, Any], began: float) -> None:
        """In the thread, on every rank: copy, make the folder, write the files, take their digests, let rank 0 commit, agree on the
        outcome. `began`: when the save did."""
        try:
            if copy is not None:
                copy.make()  # first of all: the loop waits for it
                tensors = copy.tensors
            if self._env.device.type == "cuda":
                torch.cuda.set_device(self._env.device)  # a new thread begins on GPU 0, which may be another rank's
            reason = self._agree(_make_folder(temporary, self._run) if self._env.is_main else "")
            if not reason:
                parts: list[Any] = [None] * self._env.world_size
                dist.all_gather_object(parts, self._write(tensors, temporary), group=self._group)
                reason = next((problem for _, problem in parts if problem), "")
                files = {name: entry for part, _ in parts for name, entry in part.items()}
                reason = self._agree(reason or (self._commit(temporary, record, files) if self._env.is_main else ""))
            if reason:
                if self._env.is_main:
                    shutil.rmtree(temporary, ignore_errors=True)  # for the room
                self._outcome = f"the checkpoint of step {record['step']} could not be written to {temporary.parent}: {reason}"
            elif self._env.is_main:
                self._tell(record["step"], sum(entry["bytes"] for entry in files.values()), time.perf_counter() - began)
        except BaseException as problem:
            self._outcome = problem

    def _agree(self, reason: str) -> str:
        """What rank 0 says went wrong, or nothing, on every rank."""
        agreed = [reason]
        dist.broadcast_object_list(agreed, src=0, group=self._group, device=torch.device("cpu"))
        return agreed[0]

    def _tell(self, step: int, size: int, seconds: float) -> None:
        """Rank 0: how long a checkpoint took, and whether a stop would have the time for one."""
        held = self._held if self._background else seconds
        self._times = {"time/checkpoint": seconds, "time/checkpoint_held": held}
        _log.info("checkpoint of step %d: %.2f GB in %.1f s, training waited %.1f s", step, size / 1e9, seconds, held)
        if self._grace and 2 * seconds > self._grace:
            cure = "set TORCH_ELASTIC_SHUTDOWN_TIMEOUT (launch/ does so, by GRACE), or write checkpoints to a faster disk"
            what = "a stop may have to wait for two checkpoints"
            _log.warning("%s, %.0f s; torchrun kills its processes %.0f s after the signal: %s", what, 2 * seconds, self._grace, cure)
            self._grace = 0.0

    def _write(self, tensors: dict[str, Tensor], temporary: Path) -> tuple[dict[str, dict[str, Any]], str]:
        """Write this rank's part; returns the digests of its files and what went wrong, or nothing.

        `dcp.async_save` is the same in two threads more and keeps the loop for some work on each tensor.
        """
        # Without its copying ahead, which would wait for the GPU's queue of training steps every few MB: the copies are on the host.
        writer = FileSystemWriter(temporary, per_thread_copy_ahead=0)
        try:
            dcp.save(cast("dict[str, Any]", tensors), storage_writer=writer, process_group=self._group)
            own = (f"__{self._env.rank}_", *((".metadata", "config.yaml") if self._env.is_main else ()))
            return manifest.digest_files(temporary, [place.name for place in temporary.iterdir() if place.name.startswith(own)]), ""
        except (OSError, CheckpointException) as problem:
            return {}, cause(problem)

    def _commit(self, temporary: Path, record: dict[str, Any], files: dict[str, dict[str, Any]]) -> str:
        """Rank 0: make the checkpoint visible and delete old ones; returns what went wrong, or nothing."""
        identity = self._run / "identity"
        try:
            text = identity.read_text().strip() if identity.is_file() else ""
            final = manifest.commit(temporary, record | {"identity": text, "files": files})
        except OSError as error:
            return str(error)
        try:
            manifest.abandon_newer(self._run, record["step"])  # of a state that the run has gone back from
            manifest.prune(self._run, self._keep.keep_last, final, self._keep.keep_every)
        except OSError as error:
            _log.warning("a checkpoint of %s could not be set aside or deleted: %s", self._run, error)
        return ""


def _make_folder(temporary: Path, run: Path) -> str:
    """A fresh temporary folder with the run's settings; returns what went wrong, or nothing."""
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if (run / "config.yaml").is_file():
            atomic_write_bytes(temporary / "config.yaml", (run / "config.yaml").read_bytes())
    except OSError as error:
        return str(error)
    return ""


def _grace() -> float:
    """Seconds that torchrun leaves its processes after a signal, as far as it says so; 0: nothing is known."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0.0
    try:
        return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    except ValueError:
        return 0.0


def _compare(saved: dict[str, tuple[torch.Size, torch.dtype]], wanted: dict[str, Tensor], path: Path) -> None:
    """Raise UserError at the first tensor that one side lacks or that has another shape. DCP itself ignores surplus tensors."""
    for key in sorted(saved.keys() | wanted.keys()):
        if key not in saved:
            raise UserError(f"{path} has no tensor {key}: it was saved by another configuration of the model")
        if key not in wanted:
            raise UserError(f"{path} has a tensor {key} that this run has no place for: it was saved by another configuration of the model")
        if saved[key][0] != wanted[key].shape:
            shapes = f"{list(saved[key][0])} there, {list(wanted[key].shape)} here"
            raise UserError(f"{path}: {key} has another shape ({shapes}): it was saved by another configuration of the model")


if __name__ == "__main__":
    import sys

    from engine.checkpoint_tool import main

    sys.exit(main())
