"""Checkpoints that any number of ranks can read, written while training goes on.

- Every tensor has one owner: sharded tensors (DTensor) belong to all ranks, everything else to rank 0, whose values all ranks
  read. So no key is written by two ranks, of which one would win unseen.
- The loop waits for one copy of the state into a buffer that is made once. A thread writes it, computes the digests and commits.
- That thread uses a gloo group that nothing else uses: collectives of two threads on one group would meet each other.
"""

import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from torch.distributed.tensor import DTensor

from engine import manifest
from engine.config import RunConfig
from engine.manifest import latest
from engine.staging import Arena
from engine.state import State, expected_tensors, make_optimizer_tensors, model_tensors, numbers, optimizer_tensors
from launch.env import Env
from utils.errors import UserError
from utils.files import atomic_write_bytes

__all__ = ["Checkpointer", "State", "latest"]

_WRITE_TIMEOUT = timedelta(hours=1)
"""The ranks meet after each has written its part; a slow file system may take long for that."""


class Checkpointer:
    """Saves and loads the state of one run folder. Making one is a collective: every rank does it at the same place.

    A state is `{"networks": {name: module}, "optim": {name: optimizer}, "ema": {name: module}, "progress": {...}, "task": {...}}`;
    optimizer `name` belongs to network `name`; progress and task hold plain numbers, and progress has "step" and "samples".
    """

    def __init__(self, folder: Path, env: Env, config: RunConfig) -> None:
        self._run = folder
        self._env = env
        self._keep_last = config.checkpoint.keep_last
        self._background = config.checkpoint.background
        self._arena = Arena(pinned=env.device.type == "cuda")
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._step: int | None = None
        if env.is_main:
            manifest.remove_stale(folder)
        self._group = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=_WRITE_TIMEOUT))

    def reserve(self, state: State) -> None:
        """Make the copy's buffer now, optimizer moments included, so that the first save holds the loop no longer than others."""
        if self._background:
            self._arena.reserve(self._owned(expected_tensors(state)))

    def save(self, step: int, state: State) -> None:
        """Write checkpoint `step`. Returns when the state may change again; `poll` or `wait` says whether it was written.

        Waits for the previous save first. Nothing happens when `step` is the last one saved. Raises UserError.
        """
        self.wait()
        if step == self._step:
            return
        self._step = step
        temporary = self._make_folder(step)
        tensors = self._owned(model_tensors(state) | optimizer_tensors(state))
        record = {
            "step": step,
            "samples": state["progress"].get("samples"),
            "progress": numbers(state["progress"], "progress"),
            "task": numbers(state["task"], "task"),
            "torch": torch.__version__,
            "world_size": self._env.world_size,
        }
        write = self._writer(tensors, FileSystemWriter(temporary))
        self._thread = threading.Thread(target=self._finish, args=(write, temporary, record), name="checkpoint", daemon=True)
        self._thread.start()
        if not self._background:
            self.wait()

    def poll(self) -> None:
        """Raise the UserError of a background save that failed. Costs nothing; called at every step."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return when no save is in flight. Raises the UserError of one that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def load(self, path: Path, state: State) -> None:
        """Fill the state from a committed checkpoint, in place: modules, optimizers, and the progress and task dictionaries.

        The digests are `engine.runs.open_run`'s business. Raises UserError when the checkpoint cannot be read here or holds
        other tensors than the state wants.
        """
        self.wait()
        record = manifest.read_manifest(path)
        reader = FileSystemReader(path)
        saved = _saved_tensors(reader, path, record)
        wanted = model_tensors(state)
        _compare({key: value for key, value in saved.items() if not key.startswith("optim.")}, wanted, path)
        wanted |= make_optimizer_tensors(state, {key: value for key, value in saved.items() if key.startswith("optim.")})
        try:
            dcp.load(cast("dict[str, Any]", wanted), storage_reader=reader, process_group=self._group)
        except CheckpointException as error:
            raise UserError(f"{path} cannot be read: {_cause(error)}") from error
        for kind, modules in (("networks", state["networks"]), ("ema", state["ema"])):
            for name, module in modules.items():
                prefix = f"{kind}.{name}."
                set_model_state_dict(module, {key.removeprefix(prefix): value for key, value in wanted.items() if key.startswith(prefix)})
        state["progress"].update(record["progress"])
        state["task"].update(record["task"])
        self._step = record["step"]

    def _owned(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in tensors.items() if self._env.is_main or isinstance(value, DTensor)}

    def _make_folder(self, step: int) -> Path:
        """A fresh temporary folder, made by rank 0; its failure is everybody's."""
        temporary = self._run / "checkpoints" / f".{manifest.checkpoint_name(step)}.tmp"
        outcome = [""]
        if self._env.is_main:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                if (self._run / "config.yaml").is_file():
                    atomic_write_bytes(temporary / "config.yaml", (self._run / "config.yaml").read_bytes())
            except OSError as error:
                outcome = [str(error)]
        dist.broadcast_object_list(outcome, src=0, group=self._group, device=torch.device("cpu"))
        if outcome[0]:
            raise self._error(outcome[0])
        return temporary

    def _writer(self, tensors: dict[str, Tensor], writer: FileSystemWriter) -> Callable[[], Any]:
        """Copy the state, unless the caller waits anyway; returns what writes it.

        `dcp.async_save` is the same in two threads more and keeps the loop for some work on each tensor.
        """
        state = cast("dict[str, Any]", self._arena.copy(tensors) if self._background else tensors)
        return lambda: dcp.save(state, storage_writer=writer, process_group=self._group)

    def _finish(self, write: Callable[[], Any], temporary: Path, record: dict[str, Any]) -> None:
        """In the thread, on every rank: wait for the files, take their digests, let rank 0 commit, agree on the outcome."""
        try:
            if self._env.device.type == "cuda":
                torch.cuda.set_device(self._env.device)  # a new thread begins on GPU 0, which may be another rank's
            error = ""
            files: dict[str, dict[str, Any]] = {}
            try:
                write()
                own = (f"__{self._env.rank}_", *((".metadata", "config.yaml") if self._env.is_main else ()))
                files = manifest.digest_files(temporary, [place.name for place in temporary.iterdir() if place.name.startswith(own)])
            except (OSError, CheckpointException) as problem:
                error = _cause(problem)
            parts: list[Any] = [None] * self._env.world_size
            dist.all_gather_object(parts, (files, error), group=self._group)
            outcome = [next((problem for _, problem in parts if problem), "")]
            if self._env.is_main and not outcome[0]:
                outcome = [self._commit(temporary, record, {name: entry for part, _ in parts for name, entry in part.items()})]
            dist.broadcast_object_list(outcome, src=0, group=self._group, device=torch.device("cpu"))
            if outcome[0]:
                self._failure = self._error(outcome[0])
        except BaseException as problem:
            self._failure = problem

    def _commit(self, temporary: Path, record: dict[str, Any], files: dict[str, dict[str, Any]]) -> str:
        """Rank 0: make the checkpoint visible and delete old ones; returns what went wrong, or nothing."""
        identity = self._run / "identity"
        try:
            text = identity.read_text().strip() if identity.is_file() else ""
            final = manifest.commit(temporary, record | {"identity": text, "files": files})
            manifest.prune(self._run, self._keep_last, final)
        except OSError as error:
            return str(error)
        return ""

    def _error(self, reason: str) -> UserError:
        return UserError(
            f"the checkpoint of step {self._step} could not be written to {self._run / 'checkpoints'}: {reason}; "
            "mend that and start the same command again to go on from the checkpoint before it"
        )


def _saved_tensors(reader: FileSystemReader, path: Path, record: dict[str, Any]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> full shape and dtype of the tensors in a checkpoint."""
    try:
        entries = reader.read_metadata().state_dict_metadata
    except Exception as error:
        # Its format is a pickle of torch's own classes: a newer torch writes what an older one cannot read.
        raise UserError(
            f"{path / '.metadata'}, written by torch {record.get('torch')}, cannot be read by torch {torch.__version__} "
            f"({type(error).__name__}): resume with that version or a newer one; to move weights only, use the run's export/ (safetensors)"
        ) from error
    return {key: (entry.size, entry.properties.dtype) for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


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


def _cause(error: BaseException) -> str:
    """One line on what went wrong first."""
    if isinstance(error, CheckpointException):
        rank, (problem, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"{_cause(problem)} (rank {rank})"
    return " ".join(f"{error}".split()) or type(error).__name__
