"""What a checkpoint folder holds, read by one process: names, shapes and whole tensors. No process group is needed."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from utils.errors import UserError


def saved_tensors(reader: FileSystemReader, path: Path, record: Mapping[str, Any]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> full shape and dtype of the tensors in a checkpoint; `record`: its manifest. Raises UserError."""
    try:
        entries = reader.read_metadata().state_dict_metadata
    except Exception as error:
        # Its format is a pickle of torch's own classes: a newer torch writes what an older one cannot read.
        raise UserError(
            f"{path / '.metadata'}, written by torch {record.get('torch')}, cannot be read by torch {torch.__version__} "
            f"({type(error).__name__}): resume with that version or a newer one, or move it in a file that every version reads "
            "(`python -m engine.checkpoint convert` there, then here); the run's export/ has the weights"
        ) from error
    return {key: (entry.size, entry.properties.dtype) for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_tensors(path: Path, record: Mapping[str, Any], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint, on the CPU, whose names begin with one of `prefixes`, by name. Raises UserError."""
    reader = FileSystemReader(path)
    saved = saved_tensors(reader, path, record)
    tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in sorted(saved.items()) if key.startswith(prefixes)}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(cast("dict[str, Any]", tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise UserError(f"{path} cannot be read: {cause(error)}") from error
    return tensors


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """Write whole tensors, on the CPU, as the files of a checkpoint of one process; returns the files' names. Raises OSError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(dict(tensors), storage_writer=FileSystemWriter(folder, per_thread_copy_ahead=0), no_dist=True)
    except CheckpointException as error:
        raise OSError(cause(error)) from error
    return sorted(place.name for place in folder.iterdir())


def cause(error: BaseException) -> str:
    """One line on what went wrong first."""
    if isinstance(error, CheckpointException):
        rank, (problem, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"{cause(problem)} (rank {rank})"
    return " ".join(f"{error}".split()) or type(error).__name__
