"""Which checkpoints of a run are whole: a folder counts when its manifest is there, and is good when every file has the digest it states.

`checkpoints/step_0000005/` holds the files of torch's distributed checkpoint, `config.yaml` and `manifest.json`. It is written
as `.step_0000005.tmp` and renamed last, so no name of this form is ever half written.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import atomic_write_text, fsync_path, sha256_file

MANIFEST = "manifest.json"
_COMMITTED = re.compile(r"step_(\d{7,})")
_TEMPORARY = re.compile(r"\.(step_\d{7,})\.(tmp|old)")


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
    """The manifest of a committed checkpoint. Raises UserError when it is missing or not readable."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest.pop("digest") != _digest(manifest):
            raise ValueError("its text was changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint / MANIFEST} is missing or damaged ({type(error).__name__}: {error})") from None
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def find_damage(checkpoint: Path) -> str | None:
    """One line on the first file that is missing or not what was written, with its full path; None: all as written."""
    try:
        files: Mapping[str, Mapping[str, Any]] = read_manifest(checkpoint)["files"]
    except UserError as error:
        return str(error)

    def check(name: str) -> str | None:
        path, expected = checkpoint / name, files[name]
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, {expected['bytes']} were written"
        return None if sha256_file(path) == expected["sha256"] else f"{path} is damaged (its sha256 is not the one in {MANIFEST})"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return next((line for line in pool.map(check, sorted(files)) if line), None)


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


def prune(run: Path, keep_last: int, newest: Path) -> None:
    """Delete all but the newest `keep_last` checkpoints (0: none deleted), never `newest`, the one just committed."""
    if keep_last <= 0:
        return
    others = [place for place in committed(run) if place != newest]
    for place in others[: max(len(others) - (keep_last - 1), 0)]:
        # Renamed first: at no moment does a name of the committed form hold half a checkpoint.
        temporary = place.with_name(f".{place.name}.tmp")
        place.rename(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(run: Path) -> None:
    """Delete what an interrupted save or pruning of an earlier process left behind."""
    places = run / "checkpoints"
    for place in sorted(places.iterdir()) if places.is_dir() else []:
        match = _TEMPORARY.fullmatch(place.name)
        if match and match.group(2) == "old" and not (places / match.group(1)).exists():
            place.rename(places / match.group(1))  # killed between the two renames of `commit`
        elif match:
            shutil.rmtree(place, ignore_errors=True)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint out of the way of readers and pruning; returns its new name."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)
