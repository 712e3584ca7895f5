"""An entry script with a toy stage: `cluster_worker.py --results-dir FOLDER --max-steps N [--seconds S] [--resume R]`.

S: what a step takes at least. Each process prints its rank and number. `--max-steps 0` is a wrong setting.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.loop import fit
from engine.task import Batch
from launch.env import distributed
from launch.run import run_main
from tests.toy_task import ToySource, ToyTask, toy_config
from utils.errors import ConfigError


class SlowSource(ToySource):
    """The toy's samples, not faster than one step in so many seconds."""

    seconds = 0.0

    def batches(self, first_step: int) -> Iterator[Batch]:
        for batch in super().batches(first_step):
            time.sleep(self.seconds)
            yield batch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results-dir", required=True)
    parser.add_argument("--max-steps", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--resume", default="auto")
    args = parser.parse_args()
    if args.max_steps < 1:
        raise ConfigError("--max-steps 0: must be positive")
    changes = {"max_steps": args.max_steps, "resume": args.resume, "checkpoint.every": 2, "parallel.mode": "ddp"}
    config = toy_config(args.results_dir, **changes)
    with distributed(60.0) as env:
        os.write(1, f"rank {env.rank} is process {os.getpid()}\n".encode())
        source = SlowSource(config, env.rank, env.world_size)
        source.seconds = args.seconds
        fit(ToyTask(config), source, config, env)


if __name__ == "__main__":
    run_main(main)
