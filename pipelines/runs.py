"""Exports inside a results folder: which run trained what, and on what."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.config import load_yaml
from utils.errors import UserError
from utils.weights import read_export


@dataclasses.dataclass(frozen=True)
class Export:
    """A finished run."""

    run: Path
    card: dict[str, Any]

    @property
    def stage(self) -> str:
        return str(self.card.get("stage", ""))

    @property
    def ae_sha256(self) -> str:
        """Hash of the autoencoder weights that it was trained on; empty for an autoencoder."""
        return str(self.card.get("ae", {}).get("sha256", ""))


def find_family(results: Path, system: str = "cmd") -> dict[str, Path]:
    """Stage -> run folder: the newest finished content run below `results`, its autoencoder, and the newest motion run on that one.

    Raises UserError naming the stage that is missing.
    """
    found = [export for export in _finished(results) if export.card.get("system") == system]
    stages = {stage: [e for e in found if e.stage == stage] for stage in ("autoencoder", "content", "motion")}
    missing = [stage for stage, exports in stages.items() if not exports]
    if missing:
        what = "no finished run" if len(missing) == 3 else f"no finished {' and no finished '.join(missing)} run"
        raise UserError(f"--run {results}: {what} in it (finished: it has export/config.yaml); train it, or give --ae, --content, --motion")
    content = stages["content"][0]
    motion = next((e for e in stages["motion"] if e.ae_sha256 == content.ae_sha256), stages["motion"][0])
    weights = content.card.get("ae", {}).get("weights", "ema")
    trained_on = (e for e in stages["autoencoder"] if read_export(e.run, which=weights)[2] == content.ae_sha256)
    autoencoder = next(trained_on, stages["autoencoder"][0])
    return {"autoencoder": autoencoder.run, "content": content.run, "motion": motion.run}


def _finished(results: Path) -> Iterator[Export]:
    """Runs with an export, newest first."""
    if not results.is_dir():
        raise UserError(f"--run {results}: no such folder; it is the --results-dir of the training runs")
    numbered = sorted((p for p in results.iterdir() if p.name[:3].isdecimal()), key=_number, reverse=True)
    for run in [*numbered, results]:
        card = run / "export" / "config.yaml"
        if card.is_file():
            yield Export(run, load_yaml(card))


def _number(run: Path) -> int:
    return int(run.name.split("-")[0]) if run.name.split("-")[0].isdecimal() else -1
