"""sample.py called from a test: its settings and what one process writes."""

from pathlib import Path

import torch

import sample
from launch.env import Env
from pipelines.jobs import SampleConfig
from pipelines.systems import load_sampling

CPU = torch.device("cpu")


def config(*argv: object) -> SampleConfig:
    """Checked settings. A first word without dashes is the value of --run."""
    words = [str(word) for word in argv]
    found = load_sampling(words if words[0].startswith("-") else ["--run", *words], "sample.py", "")
    found.validate()
    return found


def make(out: Path, *argv: object, env: Env | None = None) -> Path:
    """The folder `out`, as one process writes it."""
    sample.generate(config(*argv, "--out", out), env or Env(0, 1, 0, 1, CPU, "gloo"))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
