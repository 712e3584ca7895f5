"""Which folder a run writes to and where it goes on from. Rank 0 looks and decides, the others are told."""

import logging
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from engine import manifest
from engine.config import RunConfig
from engine.heartbeat import announce
from engine.identity import IDENTITY, differences, identity, is_run_of, settings_of, stage_of
from engine.launches import Launch
from engine.lock import RunLock
from launch.agent import leave_start, starter
from launch.env import Env
from utils.config import save_yaml, to_dict
from utils.errors import ConfigError, UserError
from utils.files import atomic_write_text

T = TypeVar("T")

_PATIENCE = timedelta(hours=1)
"""How long ranks wait for what others read or write: a slow file system may take long for that."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run folder, locked by rank 0 until `close`, and the checkpoint to go on from (None: from the start)."""

    folder: Path
    resume_from: Path | None
    note: str = ""
    """What to tell the user of a run that begins although there is one of its name."""
    lock: RunLock = field(default_factory=RunLock, compare=False, repr=False)
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    """What ranks meet on after one of them has written for all; None: there is one rank."""

    def close(self) -> None:
        """Let another command work on the run folder."""
        self.lock.close()


def patient_group() -> dist.ProcessGroup:
    """A group of all ranks that wait for each other's files longer than for each other's gradients. Making it is a collective."""
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=_PATIENCE))


def open_run(config: RunConfig, task_name: str, env: Env) -> Run:
    """Find or make the run folder <results-dir>/<NNN>-<name>, as `train.resume` says.

    auto: the newest run of this name and identity, else a new one, unless one of this name and stage has a checkpoint of other settings;
    none: a new one; a path: that run, or that checkpoint of it, which becomes its newest. A damaged checkpoint is passed over for the
    one before it, with a warning (auto), or refused (path). Later starts of a launch (`engine.launches`) go on with the run that it has
    begun: a path that was taken up stands for what the run has written since, none for auto, and no changed settings begin another run.
    Raises UserError or ConfigError, the same on every rank; also when another command works on the run.
    """
    lock, group = RunLock(), patient_group() if env.world_size > 1 else None
    results = config.train.results_dir

    def on_main(decide: Callable[[], T]) -> T:
        def attempt() -> T | None:
            try:
                return decide() if env.is_main else None
            except OSError as error:
                raise UserError(f"the results folder {results} cannot be used ({error}): give another --results-dir") from None

        return cast("T", _together(env, group, attempt)[0])

    launch = Launch.of(_together(env, group, starter))
    found = on_main(lambda: _find(config, task_name, lock, launch))
    checkpoint = _first_whole(found, env, group)
    on_main(lambda: _take_up(found, checkpoint, config, launch))
    leave_start(str(checkpoint))
    return Run(found.folder, checkpoint, found.note, lock, group)


@dataclass(frozen=True)
class _Found:
    """A run folder, locked, and what to go on from."""

    folder: Path
    checkpoints: list[Path] = field(default_factory=list)
    """The first of them that is whole."""
    strict: bool = False
    """Whether a damaged one is refused."""
    back_to: str = ""
    """The name of the checkpoint that the user goes back to."""
    note: str = ""


def _together(env: Env, group: dist.ProcessGroup | None, work: Callable[[], T]) -> list[T]:
    """What `work` returns on each rank; a UserError of any rank is raised on all."""
    own: T | UserError
    try:
        own = work()
    except UserError as error:
        own = error
    outcomes: list[Any] = [own] * env.world_size
    if env.world_size > 1:
        dist.all_gather_object(outcomes, own, group=group)
    for outcome in outcomes:
        if isinstance(outcome, UserError):
            raise outcome
    return outcomes


def _find(config: RunConfig, task_name: str, lock: RunLock, launch: Launch) -> _Found:
    """Rank 0: the run folder, and its checkpoints, that the settings name."""
    name = config.train.name or task_name
    if not re.fullmatch(r"[\w.+=-]+", name):
        raise ConfigError(f"--run-name {name!r}: letters, digits and . _ + = - only")
    results, resume = config.train.results_dir, config.train.resume
    results.mkdir(parents=True, exist_ok=True)
    if resume not in ("auto", "none"):
        return _named(Path(resume), config, lock, launch)
    runs = _runs(results, name)
    begun = [folder for folder in runs if launch.began(folder)]
    usable = begun or (runs if resume == "auto" else [])
    found = next((folder for folder in reversed(usable) if is_run_of(folder, config)), None)
    if found:
        _claim(found, lock)
        return _Found(found, manifest.folders(found)[::-1])
    if held := begun or [folder for folder in usable if _holds(folder, task_name)]:
        cure = ", though this launch began it: give" if begun else "; begin a new run with --resume none, or give"
        raise ConfigError(f"{_passed_over(held[-1], config)}{cure} another --run-name, or the same settings again")
    if resume == "none":
        return _Found(_create(results, name, task_name, config, lock))
    note = _passed_over(runs[-1], config) if runs else ""
    folder = _create(results, name, task_name, config, lock)
    before = _runs(results, name)
    if any(other not in runs and is_run_of(other, config) for other in before[: before.index(folder)]):
        lock.close()  # the same command was started twice at once: the other was quicker
        shutil.rmtree(folder)
        return _find(config, task_name, lock, launch)
    return _Found(folder, note=note)


def _first_whole(found: _Found, env: Env, group: dist.ProcessGroup | None) -> Path | None:
    """The first checkpoint whose files are what was written; damaged ones before it are reported and renamed out of the way.

    Every rank reads its share of the files.
    """

    def look() -> str | None:
        try:
            return manifest.find_damage(checkpoint, env.rank, env.world_size)
        except OSError as error:
            cure = f"start again when it can be; to go on from the one before, rename {checkpoint}"
            raise UserError(f"a checkpoint cannot be read, which is no damage ({error}): {cure}") from None

    for checkpoint in found.checkpoints:
        damage = next(filter(None, _together(env, group, look)), None)
        if damage is None:
            return checkpoint
        if found.strict:
            cure = "give an earlier checkpoint, or --resume auto to go back to the last good one"
            raise UserError(f"--resume {checkpoint}: {damage}; {cure}")
        if env.is_main:
            try:
                kept = f"kept as {manifest.set_aside(checkpoint, 'damaged').name}"
            except OSError as error:
                kept = f"it cannot be renamed ({error})"
            _log.warning("%s; %s, going back to the checkpoint before it", damage, kept)
    return None


def _take_up(found: _Found, checkpoint: Path | None, config: RunConfig, launch: Launch) -> None:
    """Rank 0: what others will find in the folder of a run that goes on, or begins."""
    if found.back_to and checkpoint:
        manifest.abandon_newer(found.folder, manifest.step_of(checkpoint))
    launch.note(found.folder, found.back_to)
    save_yaml(found.folder / "config.yaml", to_dict(config))


def _claim(folder: Path, lock: RunLock) -> None:
    """Take a run folder: from here on its heartbeat is ours, and what a killed process left half-written is nobody's."""
    lock.take(folder)
    announce(folder)
    manifest.remove_leftovers(folder)


def _runs(results: Path, name: str = "") -> list[Path]:
    """Folders of the runs of a name (empty: any), lowest number first."""
    pattern = re.compile(r"\d{3,}-" + (re.escape(name) if name else ".*"))
    return sorted((place for place in results.iterdir() if pattern.fullmatch(place.name) and place.is_dir()), key=_number)


def _number(run: Path) -> int:
    return int(run.name.partition("-")[0])


def _holds(run: Path, task_name: str) -> bool:
    """Whether a run of this name has what this stage could go on with, were its settings the same: stages may share a --run-name."""
    return bool(manifest.folders(run)) and (not (run / IDENTITY).is_file() or stage_of(run) in ("", task_name))


def _passed_over(run: Path, config: RunConfig) -> str:
    """Why a run of this name is not the one to go on with."""
    try:
        changes = differences(settings_of(run, config), to_dict(config))
    except (UserError, OSError):
        changes = ""
    return f"not going on with {run}, a run with other settings: {changes or 'they cannot be read'}"


def _create(results: Path, name: str, task_name: str, config: RunConfig, lock: RunLock) -> Path:
    """A new folder with the next number. It appears under its name by a rename, locked, with its identity inside."""
    temporary = results / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    _claim(temporary, lock)
    atomic_write_text(temporary / IDENTITY, f"{identity(config)}\n{task_name}\n")
    save_yaml(temporary / "config.yaml", to_dict(config))
    while True:
        number = max(map(_number, _runs(results)), default=-1) + 1
        folder = results / f"{number:03d}-{name}"
        try:
            temporary.rename(folder)  # fails on a folder that is not empty: another process took the number
        except OSError:
            if not folder.exists():
                raise
            continue
        return folder


def _named(place: Path, config: RunConfig, lock: RunLock, launch: Launch) -> _Found:
    """The run, or the checkpoint of a run, at a path that the user gave."""
    place = place.resolve()
    back_to = place.name if place.parent.name == "checkpoints" else ""
    folder = place.parent.parent if back_to else place
    again = launch.began(folder, back_to)
    if not (folder / IDENTITY).is_file() or not (place.exists() or again):
        what = "does not exist" if not place.exists() else "is neither a run folder nor one of its checkpoints"
        raise UserError(f"--resume {place}: {what}; give <results-dir>/<NNN>-<name> or .../checkpoints/step_<step>")
    if not is_run_of(folder, config):
        changes = differences(settings_of(folder, config), to_dict(config))
        raise UserError(f"--resume {place}: that run has other settings: {changes}; give the same ones, or start anew with --resume none")
    _claim(folder, lock)
    checkpoints = [place] if back_to and not again else manifest.folders(folder)[::-1]
    if not checkpoints:
        raise UserError(f"--resume {place}: the run has no checkpoint yet; --resume auto starts it again in its folder")
    return _Found(folder, checkpoints, strict=not again, back_to=back_to)
