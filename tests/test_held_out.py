"""Validation clips: their labels mean what the training set's mean, and they have the condition that the model is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from datasets.conditions import CondFormat
from tasks.latte import build
from tests.latte_denoiser import ENV, config, vae_export
from tests.shard_sets import sample_of, write_set
from utils.errors import ConfigError

SIX, FIVE = CondFormat((2, 3), "float16"), CondFormat((5,), "float16")


def opened(root: Path, train: dict[str, Any], held_out: dict[str, Any], *argv: str) -> Any:
    """The validation stream of a run on one set, with the other held out."""
    for name, kind in (("train", train), ("val", held_out)):
        write_set(root / name, (8,), lengths=(8,), size=(16, 24), **kind)
    data = ["--data-path", str(root / "train"), "--val-path", str(root / "val"), "--global-batch-size", "8", "--num-workers", "0"]
    given = config(*data, "--ae", str(vae_export(root / "ae")), "--latent-scale", "1", *argv)
    given.validate()
    return build(given, ENV)[2]


def test_labels_are_numbered_as_in_the_training_set(tmp_path: Path) -> None:
    valid = opened(tmp_path, {"classes": ("no one", "odd", "even")}, {"classes": ("even", "odd")}, "--num-classes", "-1")
    batch = next(valid.batches(0))
    numbers = [sample for sample, _ in sample_of(batch["video"])]
    assert batch["label"].tolist() == [2 - number % 2 for number in numbers]


@pytest.mark.parametrize(
    ("train", "held_out", "argv", "message"),
    [
        ({}, {"classes": ("even", "strange")}, ["--num-classes", "-1"], "has the class strange, which the training set lacks"),
        ({}, {"classes": ()}, ["--num-classes", "2"], "has no classes, the training set some"),
        ({"cond": SIX}, {}, ["--use-text-embed"], "holds no condition vectors, the training set such of 6 numbers"),
        ({"cond": SIX}, {"cond": FIVE}, ["--use-text-embed"], "holds condition vectors float16 5, the training set such of 6"),
    ],
)
def test_what_the_model_cannot_be_told_is_refused(
    tmp_path: Path, train: dict[str, Any], held_out: dict[str, Any], argv: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"--val-path .*val {message}") as error:
        opened(tmp_path, train, held_out, *argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("held_out", [{"classes": ()}, {"classes": ("strange", "odd")}, {"cond": SIX}])
def test_a_model_that_is_told_nothing_is_tested_on_any_set(tmp_path: Path, held_out: dict[str, Any]) -> None:
    assert opened(tmp_path, {}, held_out).steps_per_epoch == 1


def test_a_stage_that_learns_single_clips_refuses_what_was_before_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--previous: nothing here goes on after the clip before; drop the flag$"):
        opened(tmp_path, {}, {}, "--previous", "--n-frames", "3")


@pytest.mark.parametrize(("splits", "leaks"), [(("all", "test"), True), (("train", "test"), False), (("all", "all"), False)])
def test_validation_clips_that_are_trained_on_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, splits: tuple[str, str], leaks: bool
) -> None:
    """As in the release of VIDM, which trains on all splits."""
    opened(tmp_path, {}, {})
    for name, split in zip(("train", "val"), splits, strict=True):
        index = tmp_path / name / "index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"name": "UCF-101", "split": split}))
    data = ["--data-path", str(tmp_path / "train"), "--val-path", str(tmp_path / "val"), "--global-batch-size", "8", "--num-workers", "0"]
    build(config(*data, "--ae", str(tmp_path / "ae"), "--latent-scale", "1"), ENV)
    assert ("prepared with --split all" in caplog.text) == leaks
