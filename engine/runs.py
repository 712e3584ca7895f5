"""Which folder a run writes to and where it goes on from. Rank 0 looks and decides, the others are told."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine import manifest
from engine.config import RunConfig
from launch.env import Env
from utils.config import from_dict, load_yaml, save_yaml, to_dict
from utils.errors import ConfigError, UserError
from utils.files import atomic_write_text

T = TypeVar("T")

IDENTITY = "identity"
"""File of a run folder with the digest of the settings that make the run what it is."""

FREE = (
    "train.results_dir", "train.max_steps", "train.epochs", "train.resume", "train.accumulation", "train.max_bad_steps",
    "log", "checkpoint", "parallel", "best.patience", "data.num_workers", "data.prefetch",
    "data.on_bad_sample", "data.max_bad_share", "data.cache_dir", "data.cache_gib", "data.fetch_timeout", "data.fetch_retries",
)  # fmt: skip
"""Settings, or groups of them, that may change when a run goes on: they say how far, how often, where and on what it runs."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run folder and the checkpoint to go on from (None: from the start)."""

    folder: Path
    resume_from: Path | None


def identity(config: RunConfig) -> str:
    """SHA-256 of the settings without the FREE ones: equal for the same run, whatever it runs on."""
    return hashlib.sha256(json.dumps(_fixed(to_dict(config)), sort_keys=True).encode()).hexdigest()


def open_run(config: RunConfig, task_name: str, env: Env) -> Run:
    """Find or make the run folder <results-dir>/<NNN>-<name>, as `train.resume` says.

    auto: the newest run of this name and identity, else a new one; none: a new one; a path: that run, or that checkpoint of it.
    A damaged checkpoint is passed over for the one before it, with a warning (auto), or refused (path).
    Raises UserError or ConfigError, the same on every rank.
    """
    return _on_main(env, lambda: _open(config, config.train.name or task_name))


def _on_main(env: Env, decide: Callable[[], T]) -> T:
    """Result of `decide`, called on rank 0 only; its UserError is raised on every rank."""
    outcome: list[Any] = [None]
    if env.is_main:
        try:
            outcome = [decide()]
        except UserError as error:
            outcome = [error]
    if env.world_size > 1:
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def _open(config: RunConfig, name: str) -> Run:
    if not re.fullmatch(r"[\w.+=-]+", name):
        raise ConfigError(f"--run-name {name!r}: letters, digits and . _ + = - only")
    results = config.train.results_dir
    try:
        results.mkdir(parents=True, exist_ok=True)
        if config.train.resume == "auto":
            run = _newest(results, name, config) or Run(_create(results, name, config), None)
        elif config.train.resume == "none":
            run = Run(_create(results, name, config), None)
        else:
            run = _named(Path(config.train.resume), config)
        save_yaml(run.folder / "config.yaml", to_dict(config))
    except OSError as error:
        raise UserError(f"the results folder {results} cannot be used ({error}): give another --results-dir") from None
    return run


def _runs(results: Path, name: str = "") -> list[tuple[int, Path]]:
    """Number and folder of the runs of a name (empty: any), lowest number first."""
    pattern = re.compile(rf"(\d{{3,}})-{re.escape(name)}" + ("" if name else ".*"))
    matches = ((pattern.fullmatch(place.name), place) for place in results.iterdir())
    return sorted((int(match.group(1)), place) for match, place in matches if match and place.is_dir())


def _newest(results: Path, name: str, config: RunConfig) -> Run | None:
    for _, folder in reversed(_runs(results, name)):
        if (folder / IDENTITY).is_file() and _is_run_of(folder, config):
            return Run(folder, _newest_good(folder))
    return None


def _is_run_of(folder: Path, config: RunConfig) -> bool:
    """Whether a run folder is of these settings. One of an older version counts with the defaults of the settings added since."""
    wanted = identity(config)
    if (folder / IDENTITY).read_text().strip() == wanted:
        return True
    try:
        return identity(from_dict(type(config), load_yaml(folder / "config.yaml"), str(folder))) == wanted
    except UserError:
        return False


def _newest_good(folder: Path) -> Path | None:
    """Newest checkpoint whose files are what was written; damaged newer ones are reported and renamed out of the way."""
    for checkpoint in reversed(manifest.folders(folder)):
        damage = manifest.find_damage(checkpoint)
        if damage is None:
            return checkpoint
        aside = manifest.set_aside(checkpoint)
        _log.warning("%s; kept as %s, going back to the checkpoint before it", damage, aside.name)
    return None


def _create(results: Path, name: str, config: RunConfig) -> Path:
    """A new folder with the next number. It appears under its name by a rename, with its identity inside."""
    temporary = results / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    atomic_write_text(temporary / IDENTITY, identity(config) + "\n")
    save_yaml(temporary / "config.yaml", to_dict(config))
    while True:
        number = max((number for number, _ in _runs(results)), default=-1) + 1
        folder = results / f"{number:03d}-{name}"
        try:
            temporary.rename(folder)  # fails on a folder that is not empty: another process took the number
        except OSError:
            if not folder.exists():
                raise
            continue
        return folder


def _named(place: Path, config: RunConfig) -> Run:
    """The run, or checkpoint of a run, at a path that the user gave."""
    place = place.resolve()
    is_checkpoint = place.parent.name == "checkpoints"
    folder = place.parent.parent if is_checkpoint else place
    if not place.exists() or not (folder / IDENTITY).is_file():
        what = "does not exist" if not place.exists() else "is neither a run folder nor one of its checkpoints"
        raise UserError(f"--resume {place}: {what}; give <results-dir>/<NNN>-<name> or .../checkpoints/step_<step>")
    if not _is_run_of(folder, config):
        changes = _differences(load_yaml(folder / "config.yaml"), to_dict(config))
        raise UserError(f"--resume {place}: that run has other settings: {changes}; give the same ones, or start anew with --resume none")
    checkpoint = place if is_checkpoint else next(reversed(manifest.folders(folder)), None)
    if checkpoint is None:
        raise UserError(f"--resume {place}: the run has no checkpoint yet; --resume auto starts it again in its folder")
    damage = manifest.find_damage(checkpoint)
    if damage is not None:
        raise UserError(f"--resume {place}: {damage}; give an earlier checkpoint, or --resume auto to go back to the last good one")
    return Run(folder, checkpoint)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings that belong to the identity."""
    return {key: value for key, value in _flatten(config).items() if key not in FREE and key.split(".")[0] not in FREE}


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    before, now = _fixed(theirs), _fixed(ours)
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    listed = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys[:5])
    return listed + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
