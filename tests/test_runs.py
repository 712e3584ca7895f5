"""Run folders: numbers, identity, what auto, none and a path find, damaged checkpoints, agreement of the ranks."""

import dataclasses
import logging
import multiprocessing
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from engine import manifest
from engine.config import RunConfig, TrainConfig
from engine.identity import identity
from engine.runs import open_run
from launch.env import Env
from tests.distributed import run
from utils.config import flag, load_yaml, save_yaml
from utils.errors import ConfigError, UserError

ENV = Env.single()


@dataclass(frozen=True)
class ModelConfig:
    depth: int = flag(4)
    size: tuple[int, int] = flag((8, 8))


@dataclass(frozen=True)
class ToyConfig(RunConfig):
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)


def config(results: Path, depth: int = 4, **train: Any) -> ToyConfig:
    return ToyConfig(train=TrainConfig(results_dir=results, **train), model=ModelConfig(depth=depth))


def save(folder: Path, step: int) -> Path:
    """A committed checkpoint of one file."""
    temporary = folder / "checkpoints" / f".{manifest.checkpoint_name(step)}.tmp"
    temporary.mkdir(parents=True)
    (temporary / "__0_0.distcp").write_bytes(bytes(100))
    return manifest.commit(temporary, {"step": step, "files": manifest.digest_files(temporary, ["__0_0.distcp"])})


def test_auto_finds_its_run_again_and_numbers_new_ones(tmp_path: Path) -> None:
    first = open_run(config(tmp_path), "toy", ENV)
    assert (first.folder, first.resume_from) == (tmp_path / "000-toy", None)
    assert load_yaml(first.folder / "config.yaml")["model"] == {"depth": 4, "size": [8, 8]}
    assert open_run(config(tmp_path), "toy", ENV) == first
    assert open_run(config(tmp_path, depth=5), "toy", ENV).folder.name == "001-toy"
    assert open_run(config(tmp_path), "other", ENV).folder.name == "002-other"
    assert open_run(config(tmp_path, name="named"), "toy", ENV).folder.name == "003-named"
    assert open_run(config(tmp_path, resume="none"), "toy", ENV).folder.name == "004-toy"
    save(tmp_path / "004-toy", 5)
    newest = save(tmp_path / "004-toy", 10)
    found = open_run(config(tmp_path, max_steps=20, epochs=9, accumulation=2), "toy", ENV)
    assert (found.folder.name, found.resume_from) == ("004-toy", newest)
    assert load_yaml(found.folder / "config.yaml")["train"]["max_steps"] == 20
    assert sorted(place.name for place in tmp_path.iterdir() if place.name.startswith(".")) == []


def test_identity_leaves_out_what_may_change(tmp_path: Path) -> None:
    base = config(tmp_path)
    for same in (
        config(tmp_path / "elsewhere", max_steps=3, epochs=2, resume="none", accumulation=4, max_bad_steps=1),
        replace(base, log=replace(base.log, every=1), checkpoint=replace(base.checkpoint, every=1)),
        replace(base, parallel=replace(base.parallel, mode="ddp")),
    ):
        assert identity(same) == identity(base)
    other = (config(tmp_path, seed=1), config(tmp_path, depth=5), replace(base, optim=replace(base.optim, lr=2e-4)))
    assert len({identity(base), *map(identity, other)}) == 4


def test_a_run_of_an_older_version_goes_on_with_the_defaults_of_what_was_added(tmp_path: Path) -> None:
    """Settings that did not exist when the run began were at their defaults: auto and a path find it, but not for other values."""
    folder = open_run(config(tmp_path), "toy", ENV).folder
    older = load_yaml(folder / "config.yaml")
    del older["model"]["size"]

    def as_before() -> None:
        save_yaml(folder / "config.yaml", older)
        (folder / "identity").write_text("0" * 64 + "\n")

    as_before()
    assert open_run(config(tmp_path), "toy", ENV).folder == folder
    as_before()
    saved = save(folder, 5)
    assert open_run(config(tmp_path, resume=str(folder)), "toy", ENV).resume_from == saved
    as_before()
    other = replace(config(tmp_path), model=ModelConfig(size=(4, 4)))
    for resume in ("auto", str(folder)):
        with pytest.raises(UserError, match=r"model\.size"):
            open_run(replace(other, train=replace(other.train, resume=resume)), "toy", ENV)


def test_a_new_run_says_which_of_its_name_it_is_not_and_why(tmp_path: Path) -> None:
    assert open_run(config(tmp_path), "toy", ENV).note == ""
    assert open_run(config(tmp_path), "toy", ENV).note == "", "it goes on"
    assert open_run(config(tmp_path), "other", ENV).note == ""
    note = open_run(config(tmp_path, depth=6, seed=3), "toy", ENV).note
    assert note.startswith(f"not going on with {tmp_path / '000-toy'}, a run with other settings: ") and "\n" not in note
    assert "model.depth was 4 and is 6" in note and "train.seed was 0 and is 3" in note
    older = load_yaml(tmp_path / "000-toy/config.yaml")
    del older["model"]["size"]
    save_yaml(tmp_path / "002-toy/config.yaml", older)
    assert open_run(config(tmp_path, depth=7), "toy", ENV).note.endswith("model.depth was 4 and is 7"), (
        "what was added since is no difference"
    )
    (tmp_path / "003-toy/config.yaml").write_text("[")
    assert open_run(config(tmp_path, depth=8), "toy", ENV).note.endswith("they cannot be read")
    assert open_run(config(tmp_path, depth=9, resume="none"), "toy", ENV).note == ""


def test_auto_refuses_changed_settings_where_a_run_has_checkpoints(tmp_path: Path) -> None:
    """A run is not begun again by a mistyped setting; none and another name say that a new one is wanted."""
    folder = open_run(config(tmp_path), "toy", ENV).folder
    save(folder, 5)
    with pytest.raises(ConfigError) as caught:
        open_run(config(tmp_path, depth=6), "toy", ENV)
    assert str(caught.value) == (
        f"not going on with {folder}, a run with other settings: model.depth was 4 and is 6; begin a new run with --resume none, or "
        "give another --run-name, or the same settings again"
    )
    assert [place.name for place in tmp_path.iterdir()] == ["000-toy"]
    assert open_run(config(tmp_path, depth=6, name="deep"), "toy", ENV).folder.name == "001-deep"
    begun = open_run(config(tmp_path, depth=6, resume="none"), "toy", ENV).folder
    assert begun.name == "002-toy"
    assert open_run(config(tmp_path, depth=6), "toy", ENV).folder == begun, "it goes on, though it has no checkpoint yet"
    assert open_run(config(tmp_path), "toy", ENV).folder == folder, "so does the first"
    assert open_run(config(tmp_path, depth=7, name="toy"), "other-stage", ENV).folder.name == "003-toy", "stages may share a name"
    (folder / "config.yaml").write_text("[")
    with pytest.raises(ConfigError, match="they cannot be read; begin a new run"):
        open_run(config(tmp_path, depth=7), "toy", ENV)


def test_auto_goes_back_past_damaged_checkpoints_and_says_which(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = open_run(config(tmp_path), "toy", ENV).folder
    good, flipped, bare = save(folder, 5), save(folder, 10), save(folder, 15)
    (flipped / "__0_0.distcp").write_bytes(bytes(99) + b"\x01")
    (bare / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert open_run(config(tmp_path), "toy", ENV).resume_from == good
    assert [str(flipped / "__0_0.distcp") in record.getMessage() for record in caplog.records] == [False, True]
    assert str(bare / "manifest.json") in caplog.records[0].getMessage()
    # Set aside: pruning and the next start do not meet them again.
    assert manifest.folders(folder) == [good]
    manifest.prune(folder, 1, save(folder, 7))
    assert [manifest.step_of(place) for place in manifest.folders(folder)] == [7]


def test_a_path_names_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    folder = open_run(config(tmp_path / "a"), "toy", ENV).folder
    older, newer = save(folder, 5), save(folder, 10)
    elsewhere = tmp_path / "b"
    assert open_run(config(elsewhere, resume=str(folder)), "toy", ENV).resume_from == newer
    found = open_run(config(elsewhere, resume=str(older)), "toy", ENV)
    assert (found.folder, found.resume_from) == (folder, older)
    assert list(elsewhere.iterdir()) == []


def test_a_path_that_will_not_do_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = open_run(config(tmp_path), "toy", ENV).folder

    def refusal(path: Path, **changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            open_run(config(tmp_path, resume=str(path), **changes), "toy", ENV)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "neither a run folder" in refusal(tmp_path)
    assert "no checkpoint yet" in refusal(folder)
    checkpoint = save(folder, 5)
    text = refusal(folder, depth=6, seed=3)
    assert "model.depth was 4 and is 6" in text and "train.seed was 0 and is 3" in text and "max_steps" not in text
    (checkpoint / "__0_0.distcp").write_bytes(b"short")
    assert f"{checkpoint / '__0_0.distcp'} has 5 bytes" in refusal(checkpoint)
    assert checkpoint.is_dir()
    assert "does not exist" in refusal(folder / "checkpoints/step_0000099")


def test_a_results_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--results-dir"):
        open_run(config(tmp_path / "file"), "toy", ENV)
    with pytest.raises(ConfigError, match="--run-name"):
        open_run(config(tmp_path, name="a/b"), "toy", ENV)


def _open_many(results: str, barrier: Any, count: int) -> None:
    barrier.wait()
    for _ in range(count):
        open_run(config(Path(results), resume="none"), "toy", ENV)


def test_runs_started_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_open_many, args=(str(tmp_path), barrier, 5)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(place.name for place in tmp_path.iterdir()) == [f"{number:03d}-toy" for number in range(20)]


def open_on_each_rank(env: Env, results: str) -> list[str | None]:
    found = open_run(config(Path(results), max_steps=env.rank), "toy", env)
    with pytest.raises(UserError, match=re.escape("does not exist")) as caught:
        open_run(config(Path(results), resume=f"{results}/nowhere"), "toy", env)
    return [str(found.folder), str(found.resume_from), str(caught.value)]


def test_ranks_agree(tmp_path: Path) -> None:
    here = open_run(config(tmp_path), "toy", ENV)
    here.close()
    checkpoint = save(here.folder, 5)
    first, second = run(open_on_each_rank, results=str(tmp_path))
    assert first == second
    assert first[1] == str(checkpoint)
