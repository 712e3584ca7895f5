"""Features that were computed before: blocks of clips in files, found by the content of the clips and of the network.

    CACHE/features/<key>/about.json   00000.safetensors  00001.safetensors ...   moments-<seed>.safetensors

The key is a hash of all that the numbers depend on, so nothing in the folder can be out of date: another file, another key.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from utils.errors import ConfigError
from utils.files import atomic_write_bytes, atomic_write_text

SCHEMA = 1


def check_cache(cache: str, no_cache: bool) -> None:
    """Raises ConfigError on a folder that would not be used."""
    if cache and no_cache:
        raise ConfigError(f"--cache {cache}: --no-cache neither reads nor keeps it; drop one of the two")


def cache_folder(chosen: str = "") -> Path:
    """The folder that is named, that of $KINOFORM_CACHE, or kinoform in the user's cache."""
    if named := chosen or os.environ.get("KINOFORM_CACHE", ""):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kinoform"


class FeatureStore:
    """Files of one key, written and read by one rank. What cannot be written is said once, and is no error."""

    def __init__(self, root: Path, about: Mapping[str, Any]) -> None:
        """`about`: plain values, all that the features depend on."""
        text = json.dumps({"schema": SCHEMA, **about}, sort_keys=True, indent=2)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.folder = root / "features" / self.key
        self._about, self._writes = text + "\n", True

    def write(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
        """Keeps tensors under a name."""
        if not self._writes:
            return
        whole = {label: value.detach().cpu().contiguous() for label, value in tensors.items()}
        # One entry: safetensors writes several in any order, and equal features would be unequal files.
        metadata = {"about": json.dumps({**(about or {}), "key": self.key, "sha256": _digest(whole)})}
        try:
            if not (self.folder / "about.json").is_file():
                atomic_write_text(self.folder / "about.json", self._about)
            atomic_write_bytes(self.folder / f"{name}.safetensors", save(whole, metadata))
        except OSError as error:
            self._writes = False
            print(f"note: {self.folder}: {error.strerror}; features are not kept (--cache FOLDER)", file=sys.stderr, flush=True)

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a name; None where there are none, and where the file is damaged, which is said in one line."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get("about", "{}"))
                tensors = {label: file.get_tensor(label) for label in file.keys()}  # noqa: SIM118 (no mapping)
            if (metadata.get("key"), metadata.get("sha256")) == (self.key, _digest(tensors)):
                return tensors
            reason = "its contents are not those that were written"
        except (SafetensorError, OSError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0]
        print(f"note: {path} is damaged ({reason[:200]}): it is computed again", file=sys.stderr, flush=True)
        return None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()
