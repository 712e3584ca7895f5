"""The sums of an optimiser turn, exchanged in one all-reduce, and what must follow from them on every rank at the same step."""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.manifest import checkpoint_name
from engine.task import LossOutput
from launch.env import Env, Stopped
from utils.errors import UserError

_log = logging.getLogger(__name__)

_NAMED_SAMPLES = 8
"""Samples of a bad micro-batch that the error names, at most."""


@dataclass
class Sums:
    """Totals over ranks and micro-batches of one turn; tensors are float64 on the device."""

    names: list[str]
    values: Tensor
    """(1 + len(names),): the loss, then the metrics."""
    counts: Tensor
    """Samples behind each of `values`."""
    stop: Tensor
    """Ranks that were asked to stop, scalar."""
    bad: Tensor
    """(world,): 1 for each rank whose own loss was not finite."""

    @property
    def finite(self) -> Tensor:
        """Whether the loss is finite, bool scalar."""
        return self.values[0].isfinite()


class Tally:
    """Adds up the micro-batches of one turn on this rank."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self._outputs: list[LossOutput] = []

    def add(self, output: LossOutput) -> None:
        output.total = output.total.detach()
        self._outputs.append(output)

    def reduce(self) -> Sums:
        """All ranks' sums, in one collective and without waiting for the device."""
        outputs, env = self._outputs, self._env
        names = list(outputs[0].metrics)
        assert all(list(output.metrics) == names for output in outputs), "a loss must report the same metrics for every micro-batch"
        values = [sum(output.total.double() for output in outputs)]
        values += [sum(output.metrics[name][0].detach().double() for output in outputs) for name in names]
        counts = [sum(output.count for output in outputs)] + [sum(output.metrics[name][1] for output in outputs) for name in names]
        known = torch.tensor([*counts, float(bool(env.stop))], dtype=torch.float64, pin_memory=env.device.type == "cuda")
        bad = torch.zeros(env.world_size, dtype=torch.float64, device=env.device)
        own = torch.stack([torch.as_tensor(value, device=env.device) for value in values])
        bad[env.rank] = ~own[0].isfinite()
        packed = torch.cat([own, known.to(env.device, non_blocking=True), bad])
        dist.all_reduce(packed)
        n = len(values)
        return Sums(names, packed[:n], packed[n : 2 * n], packed[2 * n], packed[2 * n + 1 :])


class Guard:
    """Counts skipped steps on the device and reads, one step late where there is a GPU, whether to stop.

    So the host never waits for the step it has just queued, and still all ranks act at the same step.
    """

    def __init__(self, env: Env, max_bad_steps: int, skipped: int) -> None:
        self._is_main = env.is_main
        self._cuda = env.device.type == "cuda"
        self._max_bad_steps = max_bad_steps
        self.skipped = torch.full((), float(skipped), dtype=torch.float64, device=env.device)
        """Steps left out since the run began, float64 scalar on the device."""
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._bad: list[tuple[int, list[int]]] = []

    def end_step(self, step: int, finite: Tensor, turns: list[Sums]) -> None:
        """Record the outcome of step `step`: `finite` is false when any of its turns was left out."""
        self.skipped += ~finite
        bad = torch.stack([turn.bad for turn in turns]).amax(0)
        packed = torch.cat([turns[-1].stop.view(1), finite.double().view(1), bad])
        event = None
        if self._cuda:
            packed = packed.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, packed, event))

    def stop(self, describe: Callable[[int, list[int]], str]) -> Stopped | UserError | None:
        """What to raise once the state is saved: Stopped where a rank was asked to stop, UserError after too many bad steps in a row.

        `describe(step, ranks)` names samples of a step for the message.
        """
        stop = False
        while len(self._pending) > int(self._cuda and not self._too_many()):  # the step that is under way may have been a good one
            step, packed, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            asked, finite, *bad = packed.tolist()
            stop = stop or asked > 0
            if finite:
                self._bad.clear()
                continue
            self._bad.append((step, [rank for rank, flag in enumerate(bad) if flag]))
            if len(self._bad) == 1 and self._is_main:
                what = self._beginning(describe)
                _log.warning("step %d skipped, loss or gradient not finite: %s; skipped steps that follow are only counted", step + 1, what)
        if self._too_many():
            return UserError(self._message(describe))
        return Stopped() if stop else None

    @property
    def failing(self) -> bool:
        """Whether the last steps were bad: a checkpoint now would only hide the last good one from a run that starts again."""
        return len(self._bad) > 1

    def _too_many(self) -> bool:
        return 0 < self._max_bad_steps <= len(self._bad)

    def take_back(self, progress: dict[str, int], global_batch_size: int) -> None:
        """Let bad steps that end the run, as they have changed no weights, count as not done."""
        if self._too_many():
            progress["step"] -= len(self._bad)
            progress["samples"] -= len(self._bad) * global_batch_size
            self.skipped -= len(self._bad)

    def _message(self, describe: Callable[[int, list[int]], str]) -> str:
        first, last = self._bad[0][0], self._bad[-1][0]
        return (
            f"steps {first + 1} to {last + 1}: loss or gradient not finite {len(self._bad)} times in a row, all skipped "
            f"(train.max_bad_steps {self._max_bad_steps}); it began with {self._beginning(describe)}: "
            "look at these samples, lower --lr, set --clip-norm, or train in --precision fp32; "
            f"the state before them is saved as {checkpoint_name(first)}"
        )

    def _beginning(self, describe: Callable[[int, list[int]], str]) -> str:
        """What was not finite in the first bad step of the row, and on which samples."""
        step, ranks = self._bad[0]
        return f"{f'the loss of rank {ranks[0]}' if ranks else 'a gradient'} on {describe(step, ranks)}"


def name_samples(source_describe: Callable[[int], str], step: int, ranks: list[int], global_batch_size: int, world_size: int) -> str:
    """Names of the first samples that the first of `ranks` (none: rank 0) read in a step."""
    share = global_batch_size // world_size
    first = step * global_batch_size + (ranks[0] if ranks else 0) * share
    names = [source_describe(index) for index in range(first, first + min(share, _NAMED_SAMPLES))]
    return ", ".join(names) + (f" and {share - len(names)} more" if share > len(names) else "")
