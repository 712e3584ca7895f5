"""A training run, from its folder to its export: `fit`."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from engine.best import Best, check_metric
from engine.checkpoint import Checkpointer, State
from engine.config import RunConfig
from engine.ema import late_averages
from engine.feed import Feed, fixed_batch
from engine.flops import count_flops, peak_flops
from engine.metrics import Meter, counted
from engine.outputs import PREVIEW_SAMPLES, due, evaluate, export, finish, mark_shown, measured, preview, shown_step
from engine.profile import Profiler
from engine.recorder import Recorder
from engine.runs import open_run
from engine.shard import samples_per_rank
from engine.tally import Guard, Sums, Tally, name_samples
from engine.task import BatchSource, Measuring, Scorer, Task
from engine.team import Team
from engine.watch import Watch
from launch.env import Env, Stopped
from utils.rng import SampleRng, derive_seed


def fit(
    task: Task, source: BatchSource, config: RunConfig, env: Env, valid: BatchSource | None = None, scorer: Scorer | None = None
) -> Path:
    """Train `task` on `source` to the step that the config names, going on where the run was left; returns the run's folder.

    Every rank calls it, inside `launch.env.distributed`. Raises Stopped after a stop signal, once a checkpoint is written, and
    UserError for what the user can mend. `valid`: another source with the same batch sizes, for evaluations and previews. `scorer`:
    compares what is made with what is real.
    """
    train, log = config.train, config.log
    check_metric(config, valid, scorer)
    global_batch, share = train.global_batch_size, samples_per_rank(config, env)
    total = train.max_steps or train.epochs * source.steps_per_epoch

    # Built on the CPU with the same seed everywhere, then wrapped: the weights do not depend on the number of ranks.
    torch.set_float32_matmul_precision("high")  # fp32 products in TF32 on GPUs that have it
    torch.manual_seed(derive_seed(train.seed, "weights"))
    networks = task.networks()  # before there is a folder: weights to start from may be missing
    run = open_run(config, task.name, env)
    peak = peak_flops(env.device, config.parallel.precision)
    trained = [name for name, network in networks.items() if network.strategy != "frozen"]
    flops = {name: count_flops(task, networks, name, share // train.accumulation) for name in trained} if peak else {}
    team = Team(networks, config, env)

    state: State = {
        "networks": {name: member.module for name, member in team.members.items()},
        "optim": {name: member.optimizer for name, member in team.members.items()},
        "ema": {name: member.ema.module for name, member in team.members.items() if member.ema},
        "progress": {"step": 0, "samples": 0, "skipped": 0},
        "task": dict(task.state()),
    }
    progress = state["progress"]
    checkpointer = Checkpointer(run.folder, env, config)
    _take_up(task, state, checkpointer, run.resume_from)
    checkpointer.reserve(state)
    first, seen = progress["step"], shown_step(run.folder, progress["step"], env)
    best = Best(run, config, env)
    guard = Guard(env, train.max_bad_steps, progress["skipped"])
    shown = fixed_batch(valid or source, PREVIEW_SAMPLES, env)
    feed, watch = Feed(source, first, train.accumulation, env.device), Watch(run.folder, config.parallel, env)
    meter = Meter(env, feed, total, trained[0], flops, peak, watch.rest)
    profiler = Profiler(run.folder, log, env, first)
    recorder = Recorder(run.folder, log, is_main=env.is_main, step=first, total=total, seen=seen, ranks=meter.ranks)

    def save() -> None:
        team.share_statistics()
        progress["skipped"] = guard.skipped()
        state["task"].update(task.state())
        checkpointer.save(progress["step"], state)

    def show(ended: bool) -> bool:
        """The evaluation and the pictures that are due, all when the run has `ended`; returns whether it ends here."""
        done = progress["step"]
        with _stopping(save, checkpointer, recorder, done):
            values = measured(task, team, valid, scorer, config, env, done, ended)
        if values:
            recorder.values(done, progress["samples"], values)
            recorder.say(best.keep(values, done, partial(export, run, task, team, progress, config, env)))
        ended = ended or best.exhausted(done)
        if ended or due(done, log.preview_every):
            recorder.preview(done, preview(task, team, shown, config, env))
        mark_shown(run.folder, done, env)
        return ended

    with watch, closing(feed), recorder, profiler:
        begun = f"{run.folder}: from step {first} to {total}, {env.world_size} process(es) on {env.device.type}"
        recorder.say(run.note, begun, *late_averages(networks, total), scorer.about if scorer else "")
        if best.unknown and valid is not None and first < total:
            best.check(evaluate(task, team, valid, config, env, limit=1))
        ended = show(first >= total) if seen < first else first >= total or best.exhausted(first)
        for step in profiler.steps(watch.steps(range(first, first if ended else total))):
            batches = feed.step()
            torch.manual_seed(derive_seed(train.seed, f"step {step} rank {env.rank}"))  # for dropout; all else is addressed
            turns: list[tuple[Sums, Tensor]] = []
            for phase in task.phases(step):
                tally = Tally(env)
                with team.turn(phase) as modules:
                    for number, batch in enumerate(batches, start=1):
                        team.synchronise(phase, last=number == len(batches))
                        with team.autocast():
                            output = task.loss(phase, modules, batch, SampleRng(train.seed, batch["index"], env.device))
                        # The ranks' gradients are averaged; `divisor` makes that the mean over the samples that really counted.
                        (output.total / share).backward()
                        tally.add(output)
                sums, norm = tally.reduce(), team.gradient_norm(phase)
                divisor, good = sums.count / global_batch, sums.finite(norm, turns)
                checkpointer.copied()
                rate = team.step(phase, step, total, norm, divisor, good)
                meter.turn(phase, sums, norm, good, rate, global_batch)
                turns.append((sums, good))
            done = step + 1
            team.average(done)
            progress |= {"step": done, "samples": progress["samples"] + global_batch}
            guard.end_step(step, turns)
            meter.end_step(global_batch, log.every)
            recorder.advance()
            checkpointer.poll()

            stop = guard.stop(lambda at, bad: name_samples(source.describe, at, bad, global_batch, env.world_size, train.accumulation))
            ended = done == total
            if stop or ended or due(done, log.every):
                recorder.values(done, progress["samples"], meter.read(done, guard.skipped()) | counted(source) | checkpointer.read())
            guard.take_back(progress, global_batch)
            if stop or ended or (due(done, config.checkpoint.every) and not guard.failing):
                with meter.paused():
                    save()
            if stop:
                _leave(stop, checkpointer, recorder, progress["step"])
            if ended or due(done, log.eval_every, log.preview_every, config.score.every):
                with meter.paused():
                    ended = show(ended)
            if ended:
                save()  # the same step, unless the one above could not be written, or there is patience no longer
                break

        feed.close()
        checkpointer.wait()
        recorder.say(finish(run, task, team, progress, config, env, best, min(first, seen)))
    run.close()  # here alone: after an error a checkpoint may still be being written, and the end of the process frees the lock
    return run.folder


def _take_up(task: Task, state: State, checkpointer: Checkpointer, checkpoint: Path | None) -> None:
    """Fills the state from a checkpoint; without one the task measures what it starts with."""
    if checkpoint is not None:
        checkpointer.load(checkpoint, state)
        task.load_state(state["task"])
    elif isinstance(task, Measuring):
        task.measure()


def _leave(stop: Exception, checkpointer: Checkpointer, recorder: Recorder, step: int) -> NoReturn:
    checkpointer.wait()
    recorder.say(f"stopped, and saved at step {step}: the same command goes on from here")
    raise stop


@contextmanager
def _stopping(save: Callable[[], None], checkpointer: Checkpointer, recorder: Recorder, step: int) -> Iterator[None]:
    """A stop signal in the block ends the run once it is saved: what is due after the step is made when the run goes on."""
    try:
        yield
    except Stopped as stop:
        save()
        _leave(stop, checkpointer, recorder, step)
