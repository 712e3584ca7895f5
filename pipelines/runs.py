"""Exports inside a results folder: which run trained what, and on what."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.hub import fetch
from pipelines.saved import SavedFamily, open_saved
from utils.errors import UserError
from utils.weights import find_card, load_card, read_export


@dataclasses.dataclass(frozen=True)
class Export:
    """A finished run."""

    run: Path
    card: dict[str, Any]

    @property
    def system(self) -> str:
        return str(self.card.get("system", ""))

    @property
    def stage(self) -> str:
        return str(self.card.get("stage", ""))

    @property
    def ae_kind(self) -> str:
        """What its autoencoder is: "sd" for an image VAE from elsewhere, else one of ours."""
        return str(self.card.get("ae", {}).get("kind", ""))

    @property
    def ae_path(self) -> Path | None:
        """Where that was read, if something is still there."""
        recorded = self.card.get("ae", {}).get("path")
        return Path(recorded) if recorded and Path(recorded).exists() else None

    @property
    def ae_sha256(self) -> str:
        """Hash of the autoencoder weights that it was trained on; empty for an autoencoder."""
        return str(self.card.get("ae", {}).get("sha256", ""))


GENERATORS = {
    "cmd": ("content", "motion"),
    "hvdm": ("denoiser",),
    "latte": ("denoiser",),
    "pvdm": ("denoiser",),
    "vidm": ("motion", "content"),
}
"""System -> its stages after the autoencoder. The newest run of the first decides which autoencoder and which other runs are taken."""
OF_PIXELS = {"vidm"}
"""Systems without an autoencoder."""


def systems_in(results: str | Path) -> list[str]:
    """Systems of the finished runs below `results` that generate; of all finished runs where none does; that of a saved folder, which may
    be on the hub. Raises UserError for no folder."""
    saved = open_saved(fetch(results))
    if saved is not None:
        return [saved.system]
    exports = [export for export in _finished(Path(results)) if export.system in GENERATORS]
    return sorted({e.system for e in exports if e.stage in GENERATORS[e.system]} or {e.system for e in exports})


def find_family(results: str | Path, system: str = "cmd", without: Sequence[str] = ()) -> dict[str, Path]:
    """Stage -> run folder: the newest finished run of a system's first generator below `results`, its autoencoder (here, or where it was
    when the run was trained), and the newest runs of the other generators on that one. An image VAE from elsewhere is left out, and so
    are the stages `without` which it does. Of a saved folder, which may be on the hub, its parts.

    Raises UserError naming the stage that is missing.
    """
    saved = open_saved(fetch(results))
    if saved is not None:
        return _saved_family(results, saved, system, without)
    found = [export for export in _finished(Path(results)) if export.system == system]
    first, *others = (stage for stage in GENERATORS[system] if stage not in without)
    before = () if system in OF_PIXELS else ("autoencoder",)
    stages = {stage: [e for e in found if e.stage == stage] for stage in (*before, first, *others)}
    outside = bool(stages[first]) and (stages[first][0].ae_kind == "sd" or stages[first][0].ae_path is not None)
    missing = [stage for stage, exports in stages.items() if not exports and not (outside and stage == "autoencoder")]
    if missing:
        what = "no finished run" if len(missing) == len(stages) else f"no finished {' and no finished '.join(missing)} run"
        names = ", ".join(f"--{'ae' if stage == 'autoencoder' else stage}" for stage in stages)
        raise UserError(f"--run {results}: {what} in it (finished: it has export/config.json); train it, or give {names}")
    leader = stages[first][0]
    inside = bool(before) and leader.ae_kind != "sd"
    family = {"autoencoder": _autoencoder_of(leader, stages["autoencoder"])} if inside else {}
    family[first] = leader.run
    for stage in others:
        family[stage] = next((e for e in stages[stage] if e.ae_sha256 == leader.ae_sha256), stages[stage][0]).run
    return family


def _saved_family(results: str | Path, saved: SavedFamily, system: str, without: Sequence[str]) -> dict[str, Path]:
    """The parts that are wanted of a saved folder, if they are there."""
    if saved.system != system:
        raise UserError(f"--run {results}: it holds the networks of {saved.system}, not of {system}")
    missing = [stage for stage in GENERATORS[system] if stage not in without and stage not in saved.parts]
    if missing:
        raise UserError(f"--run {results}: no {' and no '.join(missing)} network in it; save the whole system, or give --{missing[0]}")
    return {stage: place for stage, place in saved.parts.items() if stage not in without}


def _autoencoder_of(export: Export, candidates: Sequence[Export]) -> Path:
    """The run whose weights a run was trained on, or else where they were then; failing both the newest, which the pipeline refuses."""
    weights = export.card.get("ae", {}).get("weights", "ema")
    trained_on = (e.run for e in candidates if read_export(e.run, which=weights)[2] == export.ae_sha256)
    return next(trained_on, export.ae_path or candidates[0].run)


def _finished(results: Path) -> Iterator[Export]:
    """Runs with an export, newest first."""
    if not results.is_dir():
        raise UserError(
            f"--run {results}: no such folder, and no <owner>/<name> on the Hugging Face hub; give the --results-dir of the training runs, "
            "or a folder of saved networks"
        )
    numbered = sorted((p for p in results.iterdir() if p.name[:3].isdecimal()), key=_number, reverse=True)
    for run in [*numbered, results]:
        if find_card(run / "export") is not None:
            yield Export(run, load_card(run / "export"))


def _number(run: Path) -> int:
    return int(run.name.split("-")[0]) if run.name.split("-")[0].isdecimal() else -1
