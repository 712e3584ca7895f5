"""What an export says of the run that made it, beside what the task says of the network: how it was trained, and how good it was found."""

import json
from pathlib import Path
from typing import Any

from engine.config import SCORE, RunConfig, ScoreConfig

_EVALUATION = "eval/"


def describe(run: Path, config: RunConfig, step: int) -> dict[str, Any]:
    """Plain values for the card of an export after `step` steps: `license`, `training`, and what was measured, where anything was.

    `evaluation` is the last one on the validation set up to there, `score` the last one of what the weights make, as metrics.jsonl of the
    run folder has them.
    """
    training = {
        "batch": config.train.global_batch_size,
        "learning_rate": config.optim.lr,
        "precision": config.parallel.precision,
        "ema_decay": config.ema.decay,
    }
    told = {"license": config.train.license.strip(), "training": training}
    batches, weights = config.log.eval_batches, "the averaged weights where there are any" if config.ema.decay else "the last weights"
    protocol = f"means over the validation set, of which at most {batches} global batches were taken, with {weights}"
    rows = _rows(run / "metrics.jsonl")
    if found := _last(rows, _EVALUATION, step):
        told["evaluation"] = {**found, "protocol": protocol}
    if found := _last(rows, SCORE, step):
        told["score"] = {**found, "protocol": _compared(config.score, weights)}
    return told


def _compared(setting: ScoreConfig, weights: str) -> str:
    """How scores are measured, in words."""
    network = Path(setting.i3d).name if setting.i3d else "EfficientNet-Lite0"
    rules = f" by the protocol {setting.protocol}" if setting.protocol else ""
    made = f"at most {setting.videos} samples that were made with {weights}"
    return f"Frechet distance of {made} from as many real ones, as {network} sees them{rules}; less is better"


def _rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl; none where the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
            found.append(row | {"step": int(row["step"])})
        except (ValueError, KeyError, TypeError):  # cut short by a full disk
            continue
    return found


def _last(rows: list[dict[str, Any]], prefix: str, step: int) -> dict[str, Any] | None:
    """Step and values of the last row up to a step that has names of that prefix; None where there is none."""
    for row in reversed(rows):
        measured = {name: value for name, value in row.items() if name.startswith(prefix)}
        if measured and row["step"] <= step:  # what was not finite is None there
            values = {name.removeprefix(_EVALUATION): value for name, value in measured.items() if value is not None}
            return {"step": row["step"], "values": values} if values else None
    return None
