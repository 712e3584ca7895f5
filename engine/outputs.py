"""What a run makes besides steps: evaluations, previews, the export."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from engine.best import Best
from engine.config import SCORE, RunConfig
from engine.describe import describe
from engine.feed import close, to_device
from engine.runs import Run
from engine.task import Batch, BatchSource, Scorer, Scoring, Task
from engine.team import Team
from launch.env import Env
from utils.errors import UserError
from utils.files import atomic_write_text
from utils.rng import SampleRng, derive_seed
from utils.weights import find_card, load_card, write_export

SHOWN = "shown"
"""File of a run folder with the last step that was followed by what was due after it."""

PREVIEW_SAMPLES = 8
"""Samples of the fixed batch that previews show."""


def evaluate(task: Task, team: Team, valid: BatchSource, config: RunConfig, env: Env, limit: int | None = None) -> dict[str, float]:
    """Metrics over the validation set, as `eval/<name>`, of `limit` global batches of its own size at most (None: `log.eval_batches`).

    Every rank calls it.
    """
    steps = min(config.log.eval_batches if limit is None else limit, valid.steps_per_epoch)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    batches = valid.batches(0)
    with team.evaluation() as networks:
        for _ in range(steps * config.train.accumulation):
            batch = to_device(next(batches), env.device)
            rng = SampleRng(derive_seed(config.train.seed, "evaluation"), batch["index"], env.device)
            for name, (value, count) in task.evaluate(networks, batch, rng).items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=env.device)) + value.double()
                counts[name] = counts.get(name, 0) + count
    close(batches)
    if not sums:
        return {}
    packed = torch.cat([torch.stack(list(sums.values())), torch.tensor(list(counts.values()), dtype=torch.float64, device=env.device)])
    dist.all_reduce(packed)
    totals, numbers = packed.view(2, -1).tolist()
    return {f"eval/{name}": total / number for name, total, number in zip(sums, totals, numbers, strict=True) if number}


def score(scorer: Scorer, task: Task, team: Team, config: RunConfig, env: Env) -> dict[str, float]:
    """The figure of what the networks make, as `score/<name>`. Every rank calls it. Raises Stopped after a signal."""
    assert isinstance(task, Scoring)
    seed = derive_seed(config.train.seed, "score")
    batches = scorer.source.batches(0)
    placed = (to_device(batch, env.device) for batch in islice(batches, scorer.steps * config.train.accumulation))
    try:
        with team.evaluation() as networks:
            made = ((batch["index"], task.make(networks, batch, SampleRng(seed, batch["index"], env.device))) for batch in placed)
            return {SCORE + scorer.name: scorer.measure(made)}
    finally:
        close(batches)


def measured(
    task: Task, team: Team, valid: BatchSource | None, scorer: Scorer | None, config: RunConfig, env: Env, done: int, ended: bool
) -> dict[str, float]:
    """The figures that are due after `done` steps, all when the run has `ended`. Every rank calls it. Raises Stopped after a signal."""
    values: dict[str, float] = {}
    if valid is not None and (ended or due(done, config.log.eval_every)):
        values |= evaluate(task, team, valid, config, env)
    if scorer is not None and (ended or due(done, config.score.every)):
        values |= score(scorer, task, team, config, env)
    return values


def due(done: int, *every: int) -> bool:
    """Whether something is due after `done` steps that is due every so many, 0 for never."""
    return any(number > 0 and done % number == 0 for number in every)


def preview(task: Task, team: Team, batch: Batch, config: RunConfig, env: Env) -> dict[str, Tensor]:
    """The task's pictures of the fixed batch. Every rank calls it."""
    rng = SampleRng(derive_seed(config.train.seed, "preview"), batch["index"], env.device)
    with team.evaluation() as networks:
        return task.preview(networks, batch, rng)


def export(run: Run, task: Task, team: Team, progress: Mapping[str, Any], config: RunConfig, env: Env, record: Mapping[str, Any]) -> str:
    """Write the first network, and its average where there is one, for later stages. Every rank calls it; rank 0 writes.

    `record`: what the card says beside the step. Returns, on every rank, why it could not be written (the export before it is then
    untouched), or nothing.
    """
    member = next(iter(team.members.values()))
    tensors = {"model": _full(member.module)}
    if member.ema:
        tensors["ema"] = _full(member.ema.module)
    outcome = [""]
    if env.is_main:
        state = {"task": task.name, "step": progress["step"], "samples": progress["samples"], "seed": config.train.seed}
        try:
            card = {**task.card(), **state, **describe(run.folder, config, progress["step"]), **record}
            write_export(run.folder / "export", tensors, card)
        except OSError as error:
            outcome = [f"the export could not be written to {run.folder}: {error}"]
    dist.broadcast_object_list(outcome, src=0, group=run.group, device=torch.device("cpu"))
    return outcome[0]


def finish(run: Run, task: Task, team: Team, progress: Mapping[str, Any], config: RunConfig, env: Env, best: Best, seen: int) -> str:
    """Export the last weights of a run at its end, unless there is a best evaluation's export or all is done; the line to say then.

    `seen`: the last step that had been saved and whose evaluation and pictures had been made when the run went on. Every rank calls it.
    """
    folder, reached = run.folder / "export", progress["step"]
    exported = _from_main(env, lambda: int(load_card(folder).get("step", -1)) if find_card(folder) else -1)
    if seen == reached and exported == (best.step or reached):
        more = "--patience" if best.exhausted(reached) else "--max-steps or --epochs"
        return f"nothing to do: the run is at step {reached} and exported; raise {more} to go on"
    reason = export(run, task, team, progress, config, env, {}) if best.step is None else ""
    if reason:
        raise UserError(f"{reason}; mend that and start the same command again: only the export is missing")
    return f"done: {run.folder / 'export'}" + (f" ({best})" if best.step else "")


def shown_step(folder: Path, first: int, env: Env) -> int:
    """The last step of a run whose evaluation and pictures, where due, have been made, as `mark_shown` noted; the same on every rank.

    It may be beyond `first`, the step that the run goes on from. A run of a version that noted nothing has made all up to there.
    """
    note = folder / SHOWN
    if first == 0:
        mark_shown(folder, 0, env)
    return _from_main(env, lambda: int(note.read_text()) if note.is_file() else first)


def mark_shown(folder: Path, step: int, env: Env) -> None:
    """Note that what is due after a step has been made. Every rank calls it; rank 0 writes."""
    if env.is_main:
        with suppress(OSError):  # a full disk: what was made is made again if the run goes on from here
            atomic_write_text(folder / SHOWN, f"{step}\n")


def _from_main(env: Env, read: Callable[[], int]) -> int:
    """What rank 0 reads."""
    found = [read() if env.is_main else 0]
    dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    return found[0]


def _full(module: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU: on rank 0 when the module is sharded."""
    return cast("dict[str, Tensor]", get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))
