"""A checkpoint as one safetensors file, and back into a run: for another version of torch, for other programs, to be kept.

The tensors have the names that they have in the checkpoint (`networks.`, `ema.` or `optim.`, then network and parameter); all that
a run needs besides is text in the file's header. Everything goes through the memory of one process.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine import manifest
from engine.contents import read_tensors, write_tensors
from engine.identity import IDENTITY
from engine.lock import RunLock
from utils.errors import UserError
from utils.files import atomic_path, atomic_write_text
from utils.weights import load_tensors

PARTS = {"weights": "networks.", "ema": "ema.", "optim": "optim."}
"""Part of a state -> how the names of its tensors begin."""

_HEADER = "kinoform"
_CONFIG = "config.yaml"


def pack(checkpoint: Path, target: Path, parts: Collection[str]) -> int:
    """Write `parts` of a checkpoint to a file, whole or not at all; returns the number of tensors. Raises UserError."""
    damage = manifest.find_damage(checkpoint)
    if damage:
        raise UserError(f"{damage}: another checkpoint of the run may be whole (`verify` says)")
    record = manifest.read_manifest(checkpoint)
    tensors = read_tensors(checkpoint, record, tuple(PARTS[part] for part in parts))
    if not tensors:
        raise UserError(f"{checkpoint} has nothing of {', '.join(parts)}")
    config = checkpoint / _CONFIG
    kept = {key: value for key, value in record.items() if key != "files"}
    header = {"record": kept, "parts": sorted(parts), "config": config.read_text() if config.is_file() else ""}
    header["sha256"] = {name: _digest(tensor) for name, tensor in tensors.items()}
    try:
        with atomic_path(target) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", _HEADER: json.dumps(header, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target} cannot be written: {error}") from None
    return len(tensors)


def unpack(source: Path, run: Path) -> Path:
    """Make the checkpoint of a file that `pack` wrote in a run folder, of the same run or new; returns it. Raises UserError."""
    tensors = load_tensors(source)
    header = _read_header(source)
    record = header["record"]
    changed = [name for name, digest in header.get("sha256", {}).items() if name not in tensors or _digest(tensors[name]) != digest]
    if changed:
        raise UserError(f"{source} is damaged: {changed[0]} is not what was written (sha256); make the file again")
    if not any(name.startswith(PARTS["weights"]) for name in tensors):
        raise UserError(f"{source} has no weights (it was made of {', '.join(header['parts'])}): a run cannot go on from it")
    name = manifest.checkpoint_name(record["step"])
    lock = RunLock()
    try:
        if (run / IDENTITY).is_file():
            _check_target(source, run, record)
            lock.take(run)
            return _commit(run, name, tensors, header)
        if run.exists():
            raise UserError(f"{run} exists and is no run folder: give that of the run, or one that does not exist yet")
        if not record.get("identity") or not header["config"]:
            raise UserError(f"{source} does not say which settings its run had: give the folder of that run")
        return _new_run(run, tensors, header) / "checkpoints" / name
    except OSError as error:
        raise UserError(f"{run} cannot be written: {error}") from None
    finally:
        lock.close()


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _read_header(source: Path) -> dict[str, Any]:
    try:
        with safe_open(source, "pt") as file:
            return json.loads((file.metadata() or {})[_HEADER])
    except (SafetensorError, KeyError, ValueError):
        raise UserError(f"{source} was not made of a checkpoint by `convert`: it does not say which step of which run it is") from None


def _check_target(source: Path, run: Path, record: Mapping[str, Any]) -> None:
    """Raise UserError when the run has other settings than the file's, or that checkpoint already."""
    if (run / IDENTITY).read_text().strip() != record.get("identity"):
        raise UserError(f"{run} is a run with other settings than the one that {source} was made of: give a folder that does not exist yet")
    existing = run / "checkpoints" / manifest.checkpoint_name(record["step"])
    if existing.exists():
        raise UserError(f"{existing} exists: delete it first, or give a folder that does not exist yet")


def _new_run(run: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """A run folder with one checkpoint; it appears under its name when it is complete."""
    temporary = run.with_name(f".{run.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        atomic_write_text(temporary / IDENTITY, header["record"]["identity"] + "\n")
        atomic_write_text(temporary / _CONFIG, header["config"])
        _commit(temporary, manifest.checkpoint_name(header["record"]["step"]), tensors, header)
        return temporary.rename(run)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _commit(run: Path, name: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    temporary = run / "checkpoints" / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        if header["config"]:
            atomic_write_text(temporary / _CONFIG, header["config"])
        files = manifest.digest_files(temporary, write_tensors(temporary, tensors))
        return manifest.commit(temporary, {**header["record"], "torch": torch.__version__, "world_size": 1, "files": files})
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
