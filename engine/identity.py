"""What makes a run the run that it is: the settings that may not change while it goes on, and how two sets of them differ."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config import RunConfig
from utils.config import from_dict, load_yaml, to_dict
from utils.errors import UserError

IDENTITY = "identity"
"""File of a run folder: the digest of the settings that make the run what it is, and its stage."""

FREE = (
    "train.results_dir", "train.max_steps", "train.epochs", "train.resume", "train.accumulation", "train.micro_batch",
    "train.max_bad_steps", "train.license", "log", "checkpoint", "parallel", "score", "preview.guidance", "best.patience",
    "data.num_workers", "data.prefetch", "data.on_bad_sample", "data.max_bad_share", "data.cache_dir", "data.cache_gib",
    "data.fetch_timeout", "data.fetch_retries",
)  # fmt: skip
"""Settings, or groups of them, that may change when a run goes on: they say how far, how often, where and on what it runs."""


def identity(config: RunConfig) -> str:
    """SHA-256 of the settings without the FREE ones: equal for the same run, whatever it runs on."""
    return _digest(to_dict(config))


def is_run_of(folder: Path, config: RunConfig) -> bool:
    """Whether a run folder is of these settings. One of an older version counts with the defaults of the settings added since."""
    if not (folder / IDENTITY).is_file():
        return False
    if _lines(folder)[0] == identity(config):
        return True
    try:
        return _digest(settings_of(folder, config)) == identity(config)
    except UserError:
        return False


def stage_of(folder: Path) -> str:
    """The stage of a run, <system>-<stage>; nothing where its version did not note it."""
    return _lines(folder)[1]


def _lines(folder: Path) -> tuple[str, str]:
    """Digest and stage."""
    digest, _, stage = (folder / IDENTITY).read_text().strip().partition("\n")
    return digest, stage


def settings_of(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Settings of a run, completed by the defaults of those that `config` has and the run's version had not. Raises UserError."""
    written = load_yaml(folder / "config.yaml")
    try:
        return to_dict(from_dict(type(config), written, str(folder)))
    except UserError:  # another stage's, or of a version with other settings
        return written


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


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_fixed(config), sort_keys=True, default=str).encode()).hexdigest()


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first settings of the identity in which two runs differ, with both values; nothing where there are none."""
    before, now = _fixed(theirs), _fixed(ours)
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    listed = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys[:5])
    return listed + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
