"""What the watching of a run costs: stop signals, the watch for steps that hang, peers, the guard, metrics, log lines, heartbeat.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.watching

has all of it; one process has no other ranks to watch, to compare itself with and to gather from at log lines.

The same loop runs with all of it and without. Its step is a fixed piece of work of about 50 ms, and the exchange of the loss and of the
number of samples, which training itself needs and with which the flags for stops and bad losses travel. Three figures, each as a ratio to
a step: the time inside the calls that watch, which the loop pays; the processor time of the threads that watch beside it; and the whole
loop with against without, which on a busy machine is mostly noise.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import Clock, machine, processes
from engine.checkpoint import Checkpointer
from engine.config import LogConfig, ParallelConfig, RunConfig
from engine.feed import Feed
from engine.metrics import Meter
from engine.profile import Profiler
from engine.recorder import Recorder
from engine.tally import Guard, Sums, Tally
from engine.task import Batch, LossOutput
from engine.watch import Watch
from launch.env import Env

TARGET = 0.01
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.thread_time}
"""cpu: processor time of the loop's thread; but for the disk it is the wall time of a machine that does nothing else."""
_BATCH = 8


class Work:
    """A step of about `seconds` on this machine: products of matrices that stay in the cache, and the exchange of the loss."""

    def __init__(self, seconds: float, env: Env, clock: Clock) -> None:
        self.clock, self.loss = clock, torch.ones((), device=env.device)
        self._env, self._count = env, 1
        self._matrix = torch.ones(384, 384, device=env.device)
        self()
        while self._slowest(self.timed()) < seconds / 2:
            self._count *= 2
        for _ in range(2):
            self._count = max(1, round(self._count * seconds / self._slowest(min(self.timed() for _ in range(5)))))

    def __call__(self) -> Sums:
        for _ in range(self._count):
            torch.mm(self._matrix, self._matrix)
        tally = Tally(self._env)
        tally.add(LossOutput(self.loss * _BATCH, _BATCH, {"error": (self.loss * _BATCH, _BATCH)}))
        sums = tally.reduce()
        if self._env.device.type == "cuda":
            torch.cuda.synchronize()
        return sums

    def _slowest(self, seconds: float) -> float:
        """The most that a rank has: all do the same work."""
        most = torch.tensor(seconds, dtype=torch.float64, device=self._env.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.item()

    def timed(self) -> float:
        """Seconds that it takes now."""
        started = self.clock()
        self()
        return self.clock() - started


class Source:
    """Micro-batches that cost nothing."""

    steps_per_epoch = 1

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The same one without end."""
        return itertools.repeat({"index": torch.arange(_BATCH)})

    def describe(self, index: int) -> str:
        """No name."""
        return ""


@dataclass
class Times:
    """Seconds, one figure a step (of `threads` one a round)."""

    plain: list[float] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    threads: list[float] = field(default_factory=list)


class OtherThreads:
    """Processor time of Python's threads but this one since it was made: those that watch. (gloo's have the exchange to do.)"""

    def __init__(self) -> None:
        self._begun = self._now()

    def _now(self) -> float:
        numbers = [thread.ident for thread in threading.enumerate() if thread is not threading.current_thread()]
        return sum(time.clock_gettime(time.pthread_getcpuclockid(number)) for number in numbers if number)

    def seconds(self) -> float:
        """So far."""
        return self._now() - self._begun


def watched(work: Work, steps: int, folder: Path, log: LogConfig, env: Env, checkpointer: Checkpointer, times: Times) -> None:
    """The loop as `engine.loop.fit` watches it."""
    feed = Feed(Source(), 0, 1, env.device)
    meter, guard = Meter(env, feed, steps, "model", {}, None), Guard(env, 20, 0)
    recorder = Recorder(folder, log, is_main=env.is_main, step=0, total=steps, ranks=meter.ranks)
    with Watch(folder, ParallelConfig(step_timeout=60.0), env) as watch, recorder, Profiler(folder, log, env, 0) as profiler:
        numbers, others = iter(profiler.steps(watch.steps(range(steps)))), OtherThreads()
        for _ in range(steps):
            started = work.clock()
            step = next(numbers)
            feed.step()
            begun = work.clock()
            sums = work()
            worked = work.clock()
            _after(step, work.loss, sums, meter, guard, recorder, log, checkpointer)
            ended = work.clock()
            times.watched.append(ended - started)
            times.calls.append(begun - started + ended - worked)
        times.threads.append(others.seconds() / steps)
    feed.close()


def _after(
    step: int, loss: Tensor, sums: Sums, meter: Meter, guard: Guard, recorder: Recorder, log: LogConfig, checkpointer: Checkpointer
) -> None:
    """What the loop does for its records and its safety once the work of a step is done."""
    good = sums.finite(loss)
    checkpointer.copied()
    meter.turn("model", sums, loss, good, 1e-4, _BATCH)
    guard.end_step(step, [(sums, good)])
    meter.end_step(_BATCH, log.every)
    recorder.advance()
    checkpointer.poll()
    guard.stop(lambda bad, ranks: "")
    if (step + 1) % log.every == 0:
        recorder.values(step + 1, (step + 1) * _BATCH, meter.read(step + 1, guard.skipped()))


def report(times: Times, say: Callable[[str], None] = print) -> None:
    """Prints the ratios. The calls count by their mean: a log line is rare and dear."""
    step, whole = statistics.median(times.plain), statistics.median(times.watched)
    calls, threads = statistics.fmean(times.calls), statistics.fmean(times.threads)
    say(f"  step alone                 {step * 1e3:>8.3f} ms")
    say(f"  calls that watch           {calls * 1e3:>8.3f} ms   ratio {calls / step:.5f}")
    say(f"  threads that watch         {threads * 1e3:>8.3f} ms   ratio {threads / step:.5f}")
    say(f"  all watching               {(calls + threads) * 1e3:>8.3f} ms   ratio {(calls + threads) / step:.5f} (target below {TARGET})")
    say(f"  the same, of 50 ms                       ratio {(calls + threads) / 0.05:.5f} (the step alone is not always as long)")
    say(f"  step with all of it        {whole * 1e3:>8.3f} ms   ratio {whole / step:.3f} to the same loop without")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--step", type=float, default=0.05, help="seconds of a step, about (default 0.05)")
    parser.add_argument("--steps", type=int, default=100, help="steps of a round (default 100)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds with and without, in turns (default 3)")
    parser.add_argument(
        "--log-every", type=int, default=LogConfig.every, help=f"steps between log lines (default {LogConfig.every}, as in a run)"
    )
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor time, for a busy machine without a GPU")
    args = parser.parse_args()
    torch.set_num_threads(1)  # else the threads of the matrix products would count among those that watch
    log = LogConfig(every=args.log_every)
    with processes() as env, tempfile.TemporaryDirectory() as name:
        work, times = Work(args.step, env, CLOCKS[args.clock]), Times()
        if env.is_main:
            print(machine(env.device))
            what = f"{args.rounds} rounds of {args.steps} steps with and without, {args.clock} time"
            print(f"{env.world_size} process(es), {what}, a log line every {log.every}, TensorBoard on", flush=True)
        checkpointer = Checkpointer(Path(name), env, RunConfig())  # its process group has threads of its own, which watch nothing
        for number in range(args.rounds):
            folder = Path(name) / str(number)
            folder.mkdir(exist_ok=True)
            times.plain += [work.timed() for _ in range(args.steps)]
            with contextlib.redirect_stdout(io.StringIO()):
                watched(work, args.steps, folder, log, env, checkpointer, times)
        if env.is_main:
            report(times)


if __name__ == "__main__":
    main()
