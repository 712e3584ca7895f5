"""Which checkpoints of a run are whole: a folder counts when its manifest is there, and is good when every file has the digest it states.

`checkpoints/step_0000005/` holds the files of torch's distributed checkpoint, `config.yaml` and `manifest.json`. It is written
as `.step_0000005.tmp` and renamed last, so no name of this form is ever half written.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

from utils.errors import UserError
from utils.files import atomic_write_text, fsync_path, sha256_file

T = TypeVar("T")

MANIFEST = "manifest.json"
_COMMITTED = re.compile(r"step_(\d{7,})")
_TEMPORARY = re.compile(r"\.(step_\d{7,})(?:\.damaged|\.abandoned)?\.(tmp|old)")
_ASIDE = re.compile(r"step_(\d{7,})\.(?:damaged|abandoned)")
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""What a file that is written whole is named until it is (see `utils.files.atomic_path`)."""

_TRIES, _PAUSE = 3, 1.0
"""How often a file is read, and seconds between, before an error of the file system counts: a server may have been away."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint of an optimiser step."""
    return f"step_{step:07d}"


def folders(run: Path) -> list[Path]:
    """Folders of a run that are named like checkpoints, oldest step first; one without a manifest is damaged."""
    places = run / "checkpoints"
    return sorted((place for place in places.iterdir() if _COMMITTED.fullmatch(place.name)), key=step_of) if places.is_dir() else []


def committed(run: Path) -> list[Path]:
    """Committed checkpoints of a run folder, oldest step first."""
    return [place for place in folders(run) if (place / MANIFEST).is_file()]


def step_of(checkpoint: Path) -> int:
    """Step of a checkpoint folder, from its name."""
    match = _COMMITTED.fullmatch(checkpoint.name)
    if match is None:
        raise UserError(f"{checkpoint} is not a checkpoint: its folder should be named like {checkpoint_name(5)}")
    return int(match.group(1))


def latest(run: Path) -> Path | None:
    """Newest committed checkpoint of a run folder, its digests not looked at."""
    return next(reversed(committed(run)), None)


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name -> bytes and sha256 of files of a checkpoint."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in sorted(names)}


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint. Raises UserError when it is missing or damaged, OSError when it cannot be read."""
    try:
        next(checkpoint.iterdir(), None)  # so that a network file system does not go by what it remembers of the folder
        manifest = json.loads(_patiently((checkpoint / MANIFEST).read_text))
        if manifest.pop("digest") != _digest(manifest):
            raise ValueError("its text was changed")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint / MANIFEST} is missing or damaged ({type(error).__name__}: {error})") from None
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def find_damage(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """One line on the first file that is missing or not what was written, with its full path; None: all as written.

    `part` of `parts`: of the files only every so-many-th is read, for processes that share them out. Raises OSError for what cannot be
    read though it is there: that is no damage.
    """
    try:
        files: Mapping[str, Mapping[str, Any]] = read_manifest(checkpoint)["files"]
    except UserError as error:
        return str(error)

    def check(name: str) -> str | None:
        path, expected = checkpoint / name, files[name]
        try:
            size = _patiently(path.stat).st_size
            if size != expected["bytes"]:
                return f"{path} has {size} bytes, {expected['bytes']} were written"
            digest = _patiently(lambda: sha256_file(path))
        except FileNotFoundError:
            return f"{path} is missing"
        return None if digest == expected["sha256"] else f"{path} is damaged (its sha256 is not the one in {MANIFEST})"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return next((line for line in pool.map(check, sorted(files)[part::parts]) if line), None)


def _patiently(read: Callable[[], T]) -> T:
    """What `read` returns, after some more tries where the file system fails (but not where there is no such file)."""
    for _ in range(_TRIES - 1):
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(_PAUSE)
    return read()


def commit(temporary: Path, manifest: Mapping[str, Any]) -> Path:
    """Write the manifest, flush everything and rename the temporary folder to its final name, which it returns.

    An older folder of that name (a damaged one, set against it by a resumed run) is replaced.
    """
    final = temporary.with_name(temporary.name.removeprefix(".").removesuffix(".tmp"))
    record = {**manifest, "digest": _digest(manifest)}
    atomic_write_text(temporary / MANIFEST, json.dumps(record, indent=1, sort_keys=True) + "\n")
    fsync_path(temporary)
    aside = temporary.with_suffix(".old")
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    fsync_path(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
    return final


def prune(run: Path, keep_last: int, newest: Path, keep_every: int = 0) -> None:
    """Delete all but the newest `keep_last` checkpoints (0: none deleted), never `newest`, the one just committed.

    Those whose step is a multiple of `keep_every` (0: none) stay too. What was set aside goes with the checkpoints of its age.
    """
    if keep_last <= 0:
        return
    others = [place for place in committed(run) if place != newest]
    cut = max(len(others) - (keep_last - 1), 0)
    old = [place for place in others[:cut] if not keep_every or step_of(place) % keep_every]
    oldest = min(step_of(place) for place in [newest, *others[cut:]])
    aside = ((place, _ASIDE.fullmatch(place.name)) for place in newest.parent.iterdir())
    old += [place for place, match in aside if match and int(match.group(1)) < oldest]
    for place in old:
        # Renamed first: at no moment does a name of the committed form hold half a checkpoint.
        temporary = place.with_name(f".{place.name}.tmp")
        place.rename(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_stale(run: Path) -> None:
    """Delete what an interrupted save or pruning left behind, and undo half a replacement."""
    places = run / "checkpoints"
    for place in sorted(places.iterdir()) if places.is_dir() else []:
        match = _TEMPORARY.fullmatch(place.name)
        if match and match.group(2) == "old" and not (places / match.group(1)).exists():
            place.rename(places / match.group(1))  # killed between the two renames of `commit`
        elif match:
            shutil.rmtree(place, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """Delete what an earlier process of the run has half written. Only for who has the run's lock and writes nothing yet."""
    _remove_stale(run)
    for folder in (run, run / "export", run / "samples", run / "profile"):
        for place in sorted(folder.iterdir()) if folder.is_dir() else []:
            if _LEFTOVER.fullmatch(place.name) and place.is_file():
                place.unlink(missing_ok=True)


def set_aside(checkpoint: Path, why: Literal["damaged", "abandoned"]) -> Path:
    """Rename a checkpoint out of the way of readers and pruning; returns its new name."""
    aside = checkpoint.with_name(f"{checkpoint.name}.{why}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def abandon_newer(run: Path, step: int) -> None:
    """Set aside the checkpoints after a step: the run goes on from there, and from none of them."""
    for checkpoint in reversed(folders(run)):  # the newest first: a kill leaves no gap
        if step_of(checkpoint) > step:
            set_aside(checkpoint, "abandoned")
