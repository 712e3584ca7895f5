"""One run on another machine every few steps: other numbers of processes, other ways to share them out, another precision.

And what a run says of its checkpoints, and goes on from after it has given up.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.loop import fit
from launch.env import Env, distributed
from tests.distributed import run
from tests.toy_task import ToySource, ToyTask, toy_config
from utils.errors import UserError

PLACES: list[tuple[int, dict[str, Any]]] = [
    (2, {"mode": "fsdp"}),
    (1, {"mode": "ddp", "accumulation": 4}),
    (2, {"mode": "hsdp", "shard_size": 1}),
    (2, {"mode": "ddp", "accumulation": 2}),
    (1, {"mode": "fsdp"}),
]
"""Processes and settings of each start; each does two steps more than the one before."""


def train(env: Env, folder: str, steps: int, changes: dict[str, Any]) -> str:
    config = toy_config(folder, max_steps=steps, schedule="constant", **changes)
    return str(fit(ToyTask(config), ToySource(config, env.rank, env.world_size), config, env))


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_strategies_and_precision(tmp_path: Path) -> None:
    steps = 2 * len(PLACES)
    whole = Path(run(train, folder=str(tmp_path / "whole"), steps=steps + 2, changes={"mode": "ddp"})[0])
    for number, (processes, changes) in enumerate(PLACES, start=1):
        found = run(train, processes, folder=str(tmp_path / "moved"), steps=2 * number, changes=changes)
        assert set(found) == {str(tmp_path / "moved/000-toy")}
    moved = Path(found[0])
    assert list(losses(moved)) == list(range(1, steps + 1))
    assert losses(moved) == pytest.approx({step: loss for step, loss in losses(whole).items() if step <= steps}, rel=2e-4)
    run(train, folder=str(tmp_path / "moved"), steps=steps + 2, changes={"precision": "bf16"})
    last = {step: loss for step, loss in losses(moved).items() if step > steps}
    assert last == pytest.approx({step: loss for step, loss in losses(whole).items() if step > steps}, rel=3e-2)
    assert last != {step: loss for step, loss in losses(whole).items() if step > steps}


def refused(env: Env, folder: str, resume: str) -> str:
    with pytest.raises(UserError) as caught:
        train(env, folder, 4, {"resume": resume, "lr": 1e-3, "seed": 4})
    return str(caught.value)


def test_what_makes_it_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    (folder,) = run(train, 1, folder=str(tmp_path), steps=2, changes={})
    (line,) = run(refused, 1, folder=str(tmp_path), resume=folder)
    assert "optim.lr was 0.01 and is 0.001, train.seed was 3 and is 4" in line and "\n" not in line


def test_a_run_that_gives_up_does_not_go_on_from_a_bad_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first bad step of the row was due for a checkpoint, and had one."""
    settings = {"max_steps": 8, "max_bad_steps": 3, "checkpoint.every": 2, "background": False}

    def start(bad_from: int | None) -> Path:
        config = toy_config(tmp_path, **settings)
        return fit(ToyTask(config, bad_from=bad_from), ToySource(config, 0, 1), config, env)

    with distributed(60) as env:
        with pytest.raises(UserError, match="saved as step_0000003"):
            start(3)
        names = sorted(place.name for place in (tmp_path / "000-toy/checkpoints").iterdir())
        assert names == ["step_0000002", "step_0000003", "step_0000004.abandoned"]
        capsys.readouterr()
        folder = start(None)
    assert "from step 3 to 8" in capsys.readouterr().out
    assert json.loads((folder / "checkpoints/step_0000008/manifest.json").read_text())["progress"]["skipped"] == 0


def test_a_run_says_what_its_checkpoints_take(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(tmp_path, max_steps=5, **{"checkpoint.every": 2, "background": False})
    with distributed(60) as env:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "toy")
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0.000001")
        folder = fit(ToyTask(config), ToySource(config, 0, 1), config, env)
    said = capsys.readouterr().out
    assert [f"checkpoint of step {step}: " in said for step in (1, 2, 4, 5)] == [False, True, True, True]
    assert said.count("warning: a stop may have to wait for two checkpoints") == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if 0 < line.get("time/checkpoint", 0) == line["time/checkpoint_held"]] == [3, 5]
