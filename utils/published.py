"""Published weights files: where one lies, how to get it, and whether it is the whole of it."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.errors import UserError
from utils.files import sha256_file


@dataclass(frozen=True)
class WeightFile:
    """A weights file: its name ends in the first 8 hex digits of its SHA-256."""

    name: str
    size: str
    package: str = ""
    """Import name of the pip package that carries it; empty: it is downloaded into the torch hub cache."""
    flag: str = "--perceptual-weights"
    """That gives the file."""
    also: str = ""
    """What else the flag takes."""

    @property
    def digest(self) -> str:
        return self.name.rpartition(".")[0][-8:]

    def default_path(self) -> Path:
        """Where it lies when it has been downloaded or its package is installed."""
        if not self.package:
            return Path(torch.hub.get_dir()) / "checkpoints" / self.name
        spec = importlib.util.find_spec(self.package)
        folder = Path(spec.origin).parent if spec is not None and spec.origin else Path(self.package)
        return folder / "models" / self.name

    def sources(self) -> str:
        """How to supply it, for the message."""
        if self.package:
            return f"pip install {self.package.replace('_', '-')}, or give the file with {self.flag} FILE"
        also = f" (this file, or {self.also})" if self.also else ""
        return f"put it at {self.default_path()} (set TORCH_HOME for another cache), or give it with {self.flag} FILE{also}"

    def find(self, given: str = "") -> Path:
        """The file `given`, or the published one. UserError of one line where it is not there, or is damaged."""
        path = Path(given) if given else self.default_path()
        if not path.is_file():
            raise UserError(f"{f'{path} does not exist' if given else f'{self.name} ({self.size}) is not there'}: {self.sources()}")
        self.check(path)
        return path

    def check(self, path: Path) -> None:
        """UserError for a file of that name with other content."""
        if path.name == self.name and not sha256_file(path).startswith(self.digest):
            raise UserError(f"{path} is damaged: its SHA-256 does not begin with {self.digest}; delete it and fetch it again")
