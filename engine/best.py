"""The best evaluation of a run: its weights are the run's export, and its card is all that is remembered of it."""

import logging
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.config import SCORE, RunConfig
from engine.runs import Run
from engine.task import BatchSource, Scorer
from launch.env import Env
from utils.errors import ConfigError, UserError
from utils.files import sha256_file
from utils.weights import load_card

_log = logging.getLogger(__name__)


def check_metric(config: RunConfig, valid: BatchSource | None, scorer: Scorer | None) -> None:
    """Raises ConfigError where nothing can measure what the best weights are chosen by."""
    best = config.best
    if best.scored and (scorer is None or best.name != SCORE + scorer.name):
        there = f"the figure of this run is {SCORE}{scorer.name}" if scorer else "this run measures no score"
        raise ConfigError(f"--best-metric {best.metric}: {there}")
    if best.metric and not best.scored and valid is None:
        raise ConfigError(f"--best-metric {best.metric} compares evaluations: give the samples for them with --val-path")


class Best:
    """Says which evaluations are worth an export and when to give up; the same on every rank.

    A run that goes on from a checkpoint before its best evaluation makes the same weights and numbers once more and finds the
    export there: nothing has to be in the checkpoint. An export that a kill has cut short counts as none.
    """

    def __init__(self, run: Run, config: RunConfig, env: Env) -> None:
        """Every rank makes one."""
        self._env = env
        self._config = config.best
        self._every = config.score.every if config.best.scored else config.log.eval_every
        self.metric = config.best.name
        self._key = self.metric if config.best.scored else f"eval/{self.metric}"
        self.step: int | None = None
        """Of the best evaluation; None: there is none yet, or the run keeps its last weights."""
        self.value = math.nan
        if self.metric:
            found: list[Any] = [_read(run.folder / "export", self.metric) if env.is_main else None]
            dist.broadcast_object_list(found, src=0, group=run.group, device=torch.device("cpu"))
            self.step, self.value = found[0] or (None, math.nan)

    @property
    def unknown(self) -> bool:
        """Whether the metric is one of the validation set, and no evaluation has had it yet."""
        return bool(self.metric) and not self._config.scored and self.step is None

    def check(self, values: Collection[str]) -> None:
        """Raises ConfigError when an evaluation's values (`eval/<name>`) lack the metric."""
        if self._key not in values:
            there = ", ".join(name.removeprefix("eval/") for name in values) or "nothing"
            raise ConfigError(f"--best-metric {self.metric}: the evaluation of this stage measures {there}")

    def keep(self, values: Mapping[str, float], step: int, export: Callable[[Mapping[str, Any]], str]) -> str:
        """Export the weights of the evaluation after `step` steps when it is the best so far; returns what there is to say of that.

        `export` takes what the card says of it and returns why it could not be written, or nothing. Then the best before remains.
        """
        value = values.get(self._key, math.nan)
        if not math.isfinite(value) or (self.step is not None and self._config.sign * (value - self.value) <= 0):
            return ""
        reason = export({"best": {"metric": self.metric, "value": value}})
        if reason:
            if self._env.is_main:
                _log.warning("%s %.6g at step %d is the best, but %s; training goes on", self.metric, value, step, reason)
            return ""
        self.step, self.value = step, value
        return f"{self}: exported"

    def exhausted(self, done: int) -> bool:
        """Whether, after `done` steps, as many evaluations as the run is patient for have passed without a better one."""
        if not self._config.patience or self.step is None:
            return False
        return done // self._every - self.step // self._every >= self._config.patience

    def __str__(self) -> str:
        return f"best {self.metric} {self.value:.6g} at step {self.step}"


def _read(export: Path, metric: str) -> tuple[int, float] | None:
    """Step and value of a whole export that was the best by this metric."""
    try:
        card = load_card(export)
        if card["best"]["metric"] == metric and all(sha256_file(export / name) == digest for name, digest in card["files"].items()):
            return int(card["step"]), float(card["best"]["value"])
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return None
    return None
