"""A run whose disk is full, or becomes read-only, for some steps: it lives, says so, and goes on writing when it can."""

import errno
import logging
import re
import subprocess
import unittest.mock
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from engine import manifest
from engine.config import RunConfig
from engine.loop import fit
from engine.task import Batch, LossOutput
from launch.env import Env
from tests.distributed import run
from tests.toy_task import ToySource, ToyTask, toy_config
from utils.errors import UserError
from utils.rng import SampleRng

BROKEN, MENDED, STEPS = 2, 5, 7
"""The step, from 0, before whose loss the disk fills up; before which it has room again; how many there are."""


REASONS = {"full": "No space left on device", "read-only": "Read-only file system", "no mkdir": "Read-only file system"}
"""How it breaks -> what is said of it."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no small file system can be mounted here: {made.stderr.strip()}")
    yield place
    for mounted in (place / "000-toy/checkpoints", place):  # the first only after a test that failed
        subprocess.run(["umount", "--lazy", str(mounted)], capture_output=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def seal(folder: Path) -> None:
    """Make a folder read-only, for root too."""
    for options in (["--bind", str(folder)], ["--options", "remount,bind,ro"]):
        subprocess.run(["mount", *options, str(folder)], check=True)


def unseal(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Breaking(ToyTask):
    """Breaks the disk on the first rank, mends it later, and may ask for a stop meanwhile."""

    def __init__(self, config: RunConfig, env: Env, how: str) -> None:
        super().__init__(config)
        self.env, self.how, self.disk = env, how, config.train.results_dir
        self.broken = ExitStack()

    @contextmanager
    def breaking(self, checkpoints: Path) -> Iterator[None]:
        if self.how == "no mkdir":
            with unittest.mock.patch.object(Path, "mkdir", side_effect=OSError(errno.EROFS, REASONS[self.how])):
                yield
        elif self.how == "read-only":
            seal(checkpoints)
            yield
            unseal(checkpoints)
        else:
            fill(self.disk)
            yield
            (self.disk / "filler").unlink()

    def loss(self, phase: str, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> LossOutput:
        step = int(rng.index[0]) // self.config.train.global_batch_size
        checkpoints = self.disk / "000-toy/checkpoints"
        if self.env.is_main and step == BROKEN:
            self.broken.enter_context(self.breaking(checkpoints))
        if self.env.is_main and step == BROKEN + 1 and self.how == "stopped":
            self.env.stop.set()
        if self.env.is_main and step == MENDED:
            self.broken.close()
        return super().loss(phase, networks, batch, rng)


def train(env: Env, folder: str, how: str) -> dict[str, Any]:
    config = toy_config(folder, max_steps=STEPS, **{"checkpoint.every": 1, "keep_last": 0, "background": how == "background"})
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    error = ""
    try:
        fit(Breaking(config, env, how), ToySource(config, env.rank, env.world_size), config, env)
    except UserError as problem:
        error = str(problem)
    return {"error": error, "messages": [message for message in messages if message.startswith("the checkpoint of step")]}


def steps(disk: Path) -> list[int]:
    return [manifest.step_of(place) for place in manifest.committed(disk / "000-toy")]


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_the_run_lives_and_goes_on_saving_when_it_can(disk: Path, how: str) -> None:
    lives(disk, how)


def test_the_run_lives_where_no_folder_can_be_made(tmp_path: Path) -> None:
    """What can be tested without a file system of our own."""
    lives(tmp_path, "no mkdir")


def lives(disk: Path, how: str) -> None:
    first, second = run(train, folder=str(disk), how=how)
    assert first["error"] == second["error"] == ""
    assert steps(disk) == [1, 2, 6, 7]
    names = sorted(place.name for place in (disk / "000-toy/checkpoints").iterdir())
    assert names == [manifest.checkpoint_name(step) for step in steps(disk)]
    assert not any(manifest.find_damage(place) for place in manifest.committed(disk / "000-toy"))
    assert (disk / "000-toy/export/model.safetensors").is_file()
    assert second["messages"] == [], "one rank says it"
    assert len(first["messages"]) == MENDED - BROKEN
    for step, message in enumerate(first["messages"], start=BROKEN + 1):
        assert message.startswith(f"the checkpoint of step {step} could not be written to {disk}")
        assert REASONS[how] in message and "training goes on" in message and message.endswith("step_0000002")


def test_in_the_background_too(disk: Path) -> None:
    first, _ = run(train, folder=str(disk), how="background")
    assert first["error"] == ""
    assert steps(disk)[0] == 1 and steps(disk)[-1] == STEPS
    # The save that is in flight when the disk fills up may fail too, and the one when it is mended may not.
    missing = sorted(set(range(1, STEPS)) - set(steps(disk)))
    assert {BROKEN + 1, BROKEN + 2} <= set(missing)
    assert [int(re.findall(r"of step (\d+) could not be written", message)[0]) for message in first["messages"]] == missing
    assert all(REASONS["full"] in message and "training goes on" in message for message in first["messages"])


def test_a_stop_that_cannot_be_saved_is_an_error(disk: Path) -> None:
    for result in run(train, folder=str(disk), how="stopped"):
        assert result["error"].startswith("the checkpoint of step 4 could not be written") and "No space left" in result["error"]
        assert result["error"].endswith("go on from step_0000002")
    assert steps(disk) == [1, 2]
