"""A process of the fault tests: the real engine on a toy task, under torchrun or alone.

`chaos_worker.py RESULTS [--shards SET] [--pace FILE] [--fault CASE --rank R --at STEP] ...`. With SET its samples come through the real
loader and a process of it. FILE, while it is there, holds the seconds that each step is made to last. CASE: what becomes of rank R in
step STEP (from 0): killed, deserted (the others do not notice by themselves), frozen, asleep, starved, bug.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from toy_task import TOKENS, WIDTH, ToySource, ToyTask, toy_config

from datasets.config import DataConfig, open_shards
from datasets.loader import ClipSource
from engine.config import RunConfig
from engine.elastic import for_ranks
from engine.loop import fit
from engine.task import Batch, LossOutput
from launch.env import Env, distributed
from launch.run import run_main
from utils.rng import SampleRng


class Clips:
    """Clips as the vectors that the toy task wants."""

    def __init__(self, config: RunConfig, shards: str, env: Env) -> None:
        train = config.train
        data = DataConfig(path=(shards,), num_workers=1, prefetch=2)
        self._clips = ClipSource(
            open_shards(data),
            data,
            seed=train.seed,
            global_batch_size=train.global_batch_size,
            accumulation=train.accumulation,
            rank=env.rank,
            world_size=env.world_size,
        )
        self.steps_per_epoch = self._clips.steps_per_epoch
        self.describe = self._clips.describe

    def batches(self, first_step: int) -> Iterator[Batch]:
        for batch in self._clips.batches(first_step):
            values = batch["video"].flatten(1)[:, : TOKENS * WIDTH].float() / 127.5 - 1
            yield {"x": values.unflatten(1, (TOKENS, WIDTH)), "index": batch["index"]}


class Late:
    """A source that has nothing to give from a step on."""

    def __init__(self, source: ToySource, step: int) -> None:
        self.steps_per_epoch, self.describe = source.steps_per_epoch, source.describe
        self._source, self._step = source, step

    def batches(self, first_step: int) -> Iterator[Batch]:
        for step, batch in enumerate(self._source.batches(first_step), start=first_step):
            if step >= self._step:
                time.sleep(3600)
            yield batch


class Faulty(ToyTask):
    """Something becomes of this rank in one step."""

    def __init__(self, config: RunConfig, options: argparse.Namespace, env: Env) -> None:
        super().__init__(config)
        self.options = options
        self.rank = env.rank

    def loss(self, phase: str, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> LossOutput:
        pace = Path(self.options.pace)
        if self.options.pace and pace.exists():
            time.sleep(float(pace.read_text() or 0))
        if int(rng.index[0]) // self.config.train.global_batch_size == self.options.at:
            if self.options.rank == self.rank:
                self.suffer(self.options.fault)
            elif self.options.fault == "deserted":
                time.sleep(3600)  # as a collective that nothing ends
        return super().loss(phase, networks, batch, rng)

    def suffer(self, fault: str) -> None:
        if fault in ("killed", "deserted"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault == "asleep":
            time.sleep(3600)
        elif fault == "bug":
            raise ZeroDivisionError("ours")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results")
    for name, default in (("shards", ""), ("pace", ""), ("fault", "")):
        parser.add_argument(f"--{name}", default=default)
    for name, default in (("steps", 8), ("every", 2), ("rank", 1), ("at", 3), ("batch", 8), ("micro-batch", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("timeout", 60.0), ("step-timeout", 0.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    options = parser.parse_args()
    changes = {"max_steps": options.steps, "checkpoint.every": options.every, "keep_last": 2, "log.every": 20, "mode": "fsdp"}
    changes |= {"timeout": options.timeout, "step_timeout": options.step_timeout, "warmup_steps": 0, "schedule": "constant"}
    changes |= {"global_batch_size": options.batch, "micro_batch": options.micro_batch}
    config = toy_config(options.results, **changes)
    with distributed(config.parallel.timeout) as env:
        config = for_ranks(config, env)
        source = Clips(config, options.shards, env) if options.shards else ToySource(config, env.rank, env.world_size)
        if options.fault == "starved" and options.rank == env.rank:
            source = Late(source, options.at)
        fit(Faulty(config, options, env), source, config, env)


if __name__ == "__main__":
    run_main(main)
