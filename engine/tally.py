"""The sums of an optimiser turn, exchanged in one all-reduce, and what must follow from them on every rank at the same step."""

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
"""Samples that the error names, at most."""
Describe = Callable[[int, Mapping[int, int]], str]
"""Names the samples of a step, by what `Outcome.read` says of its bad ranks."""


@dataclass
class Sums:
    """Totals over ranks and micro-batches of one turn, float64 on the device; few small tensors, as each costs a step time."""

    names: list[str]
    packed: Tensor
    """(2 n + 1 + world,) with n = 1 + len(names): the loss and the metrics, the samples behind each of them, the ranks that were asked
    to stop, and for each rank 0, or of its micro-batches the number from the first on whose loss was not finite."""

    @property
    def values(self) -> Tensor:
        """(1 + len(names),): the loss, then the metrics."""
        return self.packed[: len(self.names) + 1]

    @property
    def count(self) -> Tensor:
        """Samples behind the loss, scalar."""
        return self.packed[len(self.names) + 1]

    def finite(self, norm: Tensor, turns: Sequence[tuple["Sums", Tensor]] = ()) -> Tensor:
        """Whether the loss and the norm of its gradient are finite and the `turns` of the step before this one were good, bool scalar."""
        finite = torch.hypot(self.packed[0], norm) < math.inf
        return finite & turns[-1][1] if turns else finite


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
        bad[env.rank] = _from_the_first_bad(outputs, own[0])
        packed = torch.cat([own, known.to(env.device, non_blocking=True), bad])
        dist.all_reduce(packed)
        return Sums(names, packed)


@dataclass
class Outcome:
    """Of a step, on its way to the host."""

    step: int
    turns: list[tuple[Sums, Tensor]]
    """Of each turn its totals and whether it was good, in host memory."""
    event: torch.cuda.Event | None
    """When they will be there."""

    def read(self) -> tuple[bool, bool, dict[int, int]]:
        """Whether a rank was asked to stop, whether all turns were good, and of ranks with a loss that was not finite how many
        micro-batches there are from the first such on."""
        if self.event is not None:
            self.event.synchronize()
        flags = [sums.packed.tolist()[2 * (len(sums.names) + 1) :] for sums, _ in self.turns]
        bad = {rank: int(most) for rank, most in enumerate(map(max, zip(*(ranks for _, *ranks in flags), strict=True))) if most}
        return any(stop for stop, *_ in flags), all(bool(good) for _, good in self.turns), bad


def _from_the_first_bad(outputs: list[LossOutput], loss: Tensor) -> Tensor:
    """How many micro-batches there are from the first with a loss that is not finite on; 0 where there is none. `loss`: their sum."""
    if len(outputs) == 1:
        return ~loss.isfinite()
    bad = ~torch.stack([output.total for output in outputs]).isfinite()
    return (bad * torch.arange(len(outputs), 0, -1, device=bad.device)).amax()


class Guard:
    """Counts skipped steps and reads, one step late where there is a GPU, whether to stop.

    So the host never waits for the step it has just queued, and still all ranks act at the same step.
    """

    def __init__(self, env: Env, max_bad_steps: int, skipped: int) -> None:
        self._is_main = env.is_main
        self._cuda = env.device.type == "cuda"
        self._max_bad_steps = max_bad_steps
        self._skipped = skipped
        self._pending: deque[Outcome] = deque()
        self._bad: list[tuple[int, dict[int, int]]] = []

    def end_step(self, step: int, turns: list[tuple[Sums, Tensor]]) -> None:
        """Record the turns of step `step`, each with whether it was good: a step of which one was left out is counted as skipped."""
        on_host = [(Sums(sums.names, sums.packed.to("cpu", non_blocking=True)), good.to("cpu", non_blocking=True)) for sums, good in turns]
        event = None
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
        self._pending.append(Outcome(step, on_host, event))

    def skipped(self) -> int:
        """Steps left out since the run began. Waits for the device."""
        return self._skipped + sum(not outcome.read()[1] for outcome in self._pending)

    def stop(self, describe: Describe) -> Stopped | UserError | None:
        """What to raise once the state is saved: Stopped where a rank was asked to stop, UserError after too many bad steps in a row."""
        stop = False
        while len(self._pending) > int(self._cuda and not self._too_many()):  # the step that is under way may have been a good one
            outcome = self._pending.popleft()
            asked, good, bad = outcome.read()
            stop = stop or asked
            if good:
                self._bad.clear()
                continue
            self._skipped += 1
            self._bad.append((outcome.step, bad))
            if len(self._bad) == 1 and self._is_main:
                what = self._beginning(describe)
                _log.warning(
                    "step %d skipped, loss or gradient not finite: %s; skipped steps that follow are only counted", outcome.step + 1, what
                )
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
            self._skipped -= len(self._bad)

    def _message(self, describe: Describe) -> str:
        first, last = self._bad[0][0], self._bad[-1][0]
        return (
            f"steps {first + 1} to {last + 1}: loss or gradient not finite {len(self._bad)} times in a row, all skipped "
            f"(train.max_bad_steps {self._max_bad_steps}); it began with {self._beginning(describe)}: "
            "look at these samples, lower --lr, set --clip-norm, or train in --precision fp32; "
            f"the state before them is saved as {checkpoint_name(first)}"
        )

    def _beginning(self, describe: Describe) -> str:
        """What was not finite in the first bad step of the row, and on which samples."""
        step, bad = self._bad[0]
        return f"{f'the loss of rank {min(bad)}' if bad else 'a gradient'} on {describe(step, bad)}"


def name_samples(
    source_describe: Callable[[int], str], step: int, bad: Mapping[int, int], global_batch_size: int, world_size: int, accumulation: int
) -> str:
    """Names of the samples of a step among which is what was not finite: the micro-batch of the first bad rank; without one, all."""
    first, count = step * global_batch_size, global_batch_size
    if bad:
        count = global_batch_size // (world_size * accumulation)
        first += (min(bad) * accumulation + accumulation - bad[min(bad)]) * count
    names = [source_describe(index) for index in range(first, first + min(count, _NAMED_SAMPLES))]
    return ", ".join(names) + (f" and {count - len(names)} more" if count > len(names) else "")
