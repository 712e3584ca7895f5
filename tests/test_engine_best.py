"""The export of the best evaluation: which one it is, when a run gives up, and that no kill changes a byte of it."""

import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from distributed import run
from toy_task import ToySource, ToyTask, toy_config

import engine.outputs
import utils.weights
from engine.config import BestConfig, LogConfig, RunConfig
from engine.loop import fit
from engine.task import Batch, LossOutput, Network
from launch.env import Env, Stopped, distributed
from tests.test_engine_loop import lines
from utils.errors import ConfigError, UserError
from utils.rng import SampleRng
from utils.weights import load_card, read_export, write_export

PSNR = {2: 20.0, 4: 21.0, 6: 23.0, 8: 22.0, 10: 22.5, 12: 23.0, 14: 24.0}
"""What the evaluation after so many steps finds."""


class Scripted(ToyTask):
    """Its network counts its steps, and evaluations say what the script has for that many."""

    def __init__(self, config: RunConfig, script: Mapping[int, float]) -> None:
        super().__init__(config)
        self.script = script
        self.evaluated: list[int] = []

    def networks(self) -> dict[str, Network]:
        nets = super().networks()
        nets["net"].module.register_buffer("count", torch.zeros(()))
        return nets

    def loss(self, phase: str, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> LossOutput:
        networks["net"].count += 1
        return super().loss(phase, networks, batch, rng)

    def evaluate(self, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> dict[str, tuple[Tensor, int]]:
        step, count = int(networks["net"].count), len(batch["index"])
        self.evaluated.append(step)
        return {"psnr": (torch.tensor(self.script.get(step, 0.0)) * count, count), "loss": (torch.tensor(float(step)) * count, count)}


def settings(folder: Path | str, **changes: Any) -> RunConfig:
    fixed = {"max_steps": 10, "schedule": "constant", "eval_every": 2, "eval_batches": 1, "metric": "psnr", "checkpoint.every": 3}
    return toy_config(folder, **(fixed | changes))


def train(env: Env, config: RunConfig, script: Mapping[int, float] | None = None) -> Path:
    task = Scripted(config, PSNR if script is None else script)
    source, valid = (ToySource(config, env.rank, env.world_size) for _ in range(2))
    return fit(task, source, config, env, valid)


def card(folder: Path) -> dict[str, Any]:
    return load_card(folder / "export")


KINDS = [("psnr", "auto", 6), ("eval/psnr", "auto", 6), ("psnr", "min", 2), ("loss", "auto", 2)]


@pytest.mark.parametrize(("metric", "mode", "step"), KINDS)
def test_the_export_is_the_best_evaluations(tmp_path: Path, metric: str, mode: str, step: int) -> None:
    with distributed(60) as env:
        folder = train(env, settings(tmp_path / "best", metric=metric, **{"best.mode": mode}))
        plain = train(env, settings(tmp_path / "plain", metric="", max_steps=step))
    assert lines(folder)[-1]["step"] == 10, "the run went on to its end"
    name = metric.removeprefix("eval/")
    assert card(folder)["step"] == step and card(folder)["samples"] == 8 * step
    assert card(folder)["best"] == {"metric": name, "value": PSNR[step] if name == "psnr" else step}
    assert "best" not in card(plain)
    for file in ("model.safetensors", "ema.safetensors"):
        assert (folder / "export" / file).read_bytes() == (plain / "export" / file).read_bytes()


def test_patience_ends_the_run_and_more_of_it_lets_it_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with distributed(60) as env:
        folder = train(env, settings(tmp_path, patience=2, max_steps=40))
        assert [line["step"] for line in lines(folder) if "loss" in line][-1] == 10, "6 was the best, 8 and 10 were not better"
        assert (folder / "checkpoints/step_0000010").is_dir() and card(folder)["step"] == 6
        assert list((folder / "samples").glob("step_0000010_*")), "pictures of the last step"
        before = {place.name: place.read_bytes() for place in (folder / "export").iterdir()}
        capsys.readouterr()
        assert train(env, settings(tmp_path, patience=2, max_steps=40)) == folder
        assert "nothing to do: the run is at step 10 and exported; raise --patience to go on" in capsys.readouterr().out
        assert {place.name: place.read_bytes() for place in (folder / "export").iterdir()} == before
        assert train(env, settings(tmp_path, patience=3, max_steps=16)) == folder
        assert lines(folder)[-1]["step"] == 12, "equal is not better"
        assert train(env, settings(tmp_path, patience=4, max_steps=16)) == folder
        assert lines(folder)[-1]["step"] == 16 and card(folder)["step"] == 14


def test_a_run_whose_last_checkpoint_is_lost_does_not_say_that_there_was_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with distributed(60) as env:
        folder = train(env, settings(tmp_path))
        shutil.rmtree(folder / "checkpoints/step_0000010")
        capsys.readouterr()
        assert train(env, settings(tmp_path)) == folder
    said = capsys.readouterr().out
    assert "from step 9 to 10" in said and "nothing to do" not in said and "(best psnr 23 at step 6)" in said


def test_a_finished_run_is_not_evaluated_again_and_goes_on_with_more_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with distributed(60) as env:
        folder = train(env, settings(tmp_path, max_steps=7))
        assert card(folder)["step"] == 6, "the last evaluation is at step 7"
        capsys.readouterr()
        config = settings(tmp_path, max_steps=7)
        task = Scripted(config, PSNR)
        assert fit(task, ToySource(config, 0, 1), config, env, ToySource(config, 0, 1)) == folder
        assert task.evaluated == [] and "raise --max-steps or --epochs to go on" in capsys.readouterr().out
        assert train(env, settings(tmp_path, max_steps=14)) == folder
        assert card(folder)["step"] == 14


def test_values_that_are_not_finite_are_never_the_best(tmp_path: Path) -> None:
    nothing = dict.fromkeys(range(1, 30), float("nan"))
    with distributed(60) as env:
        found = train(env, settings(tmp_path / "some"), {**nothing, 4: 1.0, 8: float("inf")})
        assert card(found)["step"] == 4
        without = train(env, settings(tmp_path / "none", max_steps=4), nothing)
        assert card(without)["step"] == 4 and "best" not in card(without)


def test_a_full_disk_at_the_best_evaluation_keeps_the_best_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = utils.weights.save_file
    full = [6, 12]  # the 2nd file of the export after 6 steps, and what comes at the end of a run without a metric

    def refuse(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        if "ema" in path.name and int(tensors["count"]) in full:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(tensors, path, **options)

    monkeypatch.setattr(utils.weights, "save_file", refuse)
    with distributed(60) as env:
        folder = train(env, settings(tmp_path / "best", **{"ema.every": 1}))
        said = capsys.readouterr().out
        assert "warning: psnr 23 at step 6 is the best, but the export could not be written" in said and "No space left" in said
        assert card(folder)["step"] == 10 and read_export(folder)[1]["best"]["value"] == 22.5, "better than that after 4 steps"
        full += [10]
        with pytest.raises(UserError, match=r"the export could not be written to .*No space left.*only the export is missing"):
            train(env, settings(tmp_path / "last", metric=""))
        full.clear()
        train(env, settings(tmp_path / "last", metric=""))


def test_an_export_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_export(tmp_path, {"model": {"a": torch.zeros(1)}, "ema": {"a": torch.zeros(1)}}, {"step": 1})
    before = {place.name: place.read_bytes() for place in tmp_path.iterdir()}
    save = utils.weights.save_file

    def refuse(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        if "ema" in path.name:
            raise SafetensorError("No space left on device")
        save(tensors, path, **options)

    monkeypatch.setattr(utils.weights, "save_file", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_export(tmp_path, {"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}, {"step": 2})
    assert {place.name: place.read_bytes() for place in tmp_path.iterdir()} == before


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    config = settings(tmp_path, metric="ssim")
    with distributed(60) as env:
        with pytest.raises(ConfigError, match="give the samples for them with --val-path"):
            fit(Scripted(config, PSNR), ToySource(config, 0, 1), config, env)
        assert list(tmp_path.iterdir()) == [], "refused before a run folder is made"
        with pytest.raises(ConfigError, match="--best-metric ssim: the evaluation of this stage measures psnr, loss"):
            train(env, config)
    for best, message in (
        (BestConfig("sharpness"), "--best-mode min or max"),
        (BestConfig(patience=3), "--patience: name what should get better"),
        (BestConfig("psnr", patience=-1), "best.patience -1: at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            RunConfig(best=best).validate()
    with pytest.raises(ConfigError, match="set --eval-every"):
        RunConfig(best=BestConfig("psnr", patience=3), log=LogConfig(eval_every=0)).validate()
    RunConfig(best=BestConfig("sharpness", mode="max", patience=3)).validate()


def cut_short(step: int, once: Path) -> None:
    """Let the export of a step end with the process, when its weights are written and its card is not."""

    def write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        if values["step"] == step and not once.exists():
            once.touch()
            write_export(folder.parent / "other", tensors, values)
            os.replace(folder.parent / "other" / "model.safetensors", folder / "model.safetensors")
            os.kill(os.getpid(), signal.SIGKILL)
        write_export(folder, tensors, values)

    engine.outputs.write_export = write


def killed(env: Env, folder: str, moment: str) -> str:
    """A run of patience, killed on one rank in the step after its best evaluation, in that evaluation's export, or not."""
    changes = {"patience": 2, "max_steps": 40, "background": False, "ema.every": 2, "warmup": True}
    config = settings(folder, **changes)
    task = Scripted(config, PSNR)
    once = Path(folder) / "done"
    once.parent.mkdir(exist_ok=True, parents=True)
    if moment == "export" and env.rank == 0:
        cut_short(6, once)
    if moment in ("step", "stop"):
        task.loss = interrupting(task, once, signal.SIGKILL if moment == "step" else signal.SIGUSR1, 7 if moment == "step" else 6)
    source, valid = (ToySource(config, env.rank, env.world_size) for _ in range(2))
    try:
        return str(fit(task, source, config, env, valid))
    except Stopped:
        return "stopped"


def interrupting(task: ToyTask, once: Path, number: int, step: int) -> Any:
    """The task's loss, that sends a signal to its own process in the step after `step - 1` steps."""
    loss = task.loss

    def call(phase: str, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> LossOutput:
        if int(rng.index[0]) == (step - 1) * 8 and not once.exists():  # of rank 0
            once.touch()
            os.kill(os.getpid(), number)
        return loss(phase, networks, batch, rng)

    return call


@pytest.mark.slow
def test_a_killed_run_keeps_the_same_best(tmp_path: Path) -> None:
    whole = Path(run(killed, folder=str(tmp_path / "whole"), moment="")[0])
    assert card(whole)["step"] == 6
    for moment in ("step", "export", "stop"):
        arguments = {"folder": str(tmp_path / moment), "moment": moment}
        if moment == "stop":
            assert run(killed, **arguments) == ["stopped", "stopped"]
        else:
            with pytest.raises(AssertionError):
                run(killed, **arguments)
        (folder,) = (tmp_path / moment).glob("*-toy")
        assert run(killed, **arguments) == [str(folder)] * 2
        for name in ("model.safetensors", "ema.safetensors", "config.json", "README.md"):
            assert (folder / "export" / name).read_bytes() == (whole / "export" / name).read_bytes(), (moment, name)
        seen = [[(line["step"], line["eval/psnr"]) for line in lines(place) if "eval/psnr" in line] for place in (folder, whole)]
        assert seen[0] == seen[1], f"{moment}: no evaluation is left out"
        assert sorted(place.name for place in (folder / "checkpoints").iterdir())[-1] == "step_0000010"
    weights = read_export(whole)[0]
    assert weights["count"] == 6
