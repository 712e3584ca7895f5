"""What an export says of the run that made it, beside what the task says of the network: how it was trained, and how good it was found."""

import json
from pathlib import Path
from typing import Any

from engine.config import RunConfig

_PREFIX = "eval/"


def describe(run: Path, config: RunConfig, step: int) -> dict[str, Any]:
    """Plain values for the card of an export after `step` steps: `license`, `training`, and `evaluation` where there was one.

    The evaluation is the last up to there, as metrics.jsonl of the run folder has it.
    """
    training = {
        "batch": config.train.global_batch_size,
        "learning_rate": config.optim.lr,
        "precision": config.parallel.precision,
        "ema_decay": config.ema.decay,
    }
    told = {"license": config.train.license.strip(), "training": training}
    found = _last_evaluation(run / "metrics.jsonl", step)
    if found is None:
        return told
    batches, weights = config.log.eval_batches, "the averaged weights where there are any" if config.ema.decay else "the last weights"
    protocol = f"means over the validation set, of which at most {batches} global batches were taken, with {weights}"
    return told | {"evaluation": {**found, "protocol": protocol}}


def _last_evaluation(path: Path, step: int) -> dict[str, Any] | None:
    """Step and values of the last evaluation up to a step; None where there is none or the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
            measured = {name: value for name, value in row.items() if name.startswith(_PREFIX)}
            at = int(row["step"])
        except (ValueError, KeyError, TypeError, AttributeError):  # cut short by a full disk
            continue
        if measured and at <= step:  # what was not finite is None there
            values = {name.removeprefix(_PREFIX): value for name, value in measured.items() if value is not None}
            return {"step": at, "values": values} if values else None
    return None
