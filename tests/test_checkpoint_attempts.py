"""What a command goes on from when it is started again: by hand, by a launch script, by Slurm; and twice at once."""

import os
from pathlib import Path
from typing import Any

import pytest

from engine import manifest, runs
from engine.config import RunConfig
from engine.runs import open_run
from launch.agent import starter
from launch.env import Env
from tests.distributed import run as run_ranks
from tests.test_runs import config, save
from utils.errors import ConfigError, UserError
from utils.files import sha256_file


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KINOFORM_LAUNCH", "TORCHELASTIC_RUN_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def start(results: Path, resume: str | Path = "auto", **changes: Any) -> tuple[Path, str]:
    """Run folder, and the name of the checkpoint to go on from."""
    run = open_run(config(results, resume=str(resume), **changes), "toy", Env.single())
    run.close()
    return run.folder, run.resume_from.name if run.resume_from else ""


def names(folder: Path) -> list[str]:
    return sorted(place.name for place in (folder / "checkpoints").iterdir())


def test_a_later_attempt_does_not_leave_its_run_for_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path)
    monkeypatch.setenv("KINOFORM_LAUNCH", "one")
    folder, _ = start(tmp_path, depth=5)
    assert folder.name == "001-toy", "000 is an older launch's"
    with pytest.raises(ConfigError, match=r"001-toy, a run with other settings: model\.depth was 5 and is 6, though this launch began it"):
        start(tmp_path, depth=6)
    assert start(tmp_path, "none", depth=5)[0] == folder, "none makes one run a launch"
    monkeypatch.setenv("KINOFORM_LAUNCH", "two")
    assert start(tmp_path, depth=6)[0].name == "002-toy"
    monkeypatch.delenv("KINOFORM_LAUNCH")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert [start(tmp_path, "none", depth=6)[0].name for _ in range(2)] == ["003-toy", "004-toy"], "two commands of one job"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("KINOFORM_LAUNCH", "three")  # a job that is queued again has another one
    with pytest.raises(ConfigError, match="004-toy"):
        start(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert start(tmp_path)[0].name == "000-toy"


def start_on_machines(env: Env, results: str, machines: list[str], resume: str) -> list[str]:
    """A start whose ranks are on machines with launch scripts of these names."""
    os.environ["KINOFORM_LAUNCH"] = machines[env.rank]
    run = open_run(config(Path(results), resume=resume), "toy", env)
    run.close()
    return [run.folder.name, run.resume_from.name if run.resume_from else ""]


def test_an_elastic_launch_knows_its_run_when_machines_join_and_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's start for a machine that joins looks like the first one; rank 0 may then be there, and any machine may be lost."""

    def starts(machines: str, resume: str | Path = "none") -> tuple[str, ...]:
        if len(machines) > 1:
            first, other = run_ranks(start_on_machines, results=str(tmp_path), machines=list(machines), resume=str(resume))
            assert first == other
            return tuple(first)
        monkeypatch.setenv("KINOFORM_LAUNCH", machines)
        folder, checkpoint = start(tmp_path, resume)
        return folder.name, checkpoint

    assert starts("A") == ("000-toy", "")
    for step in (5, 10):
        save(tmp_path / "000-toy", step)
    assert starts("BA") == ("000-toy", "step_0000010"), "B joins and has rank 0"
    assert starts("A") == starts("B") == starts("A") == ("000-toy", "step_0000010"), "any of them is lost, and comes back alone"
    assert starts("BC") == starts("C") == ("000-toy", "step_0000010"), "the last that were in the first start have gone"
    assert starts("D") == ("001-toy", ""), "another launch"
    path = tmp_path / "000-toy/checkpoints/step_0000005"
    assert starts("E", path) == ("000-toy", "step_0000005")
    save(tmp_path / "000-toy", 7)
    assert starts("FE", path) == starts("F", path) == ("000-toy", "step_0000007"), "it goes back once"
    save(tmp_path / "000-toy", 9)
    assert starts("F", path.with_name("step_0000007")) == ("000-toy", "step_0000007"), "to another checkpoint it does"


def test_what_starts_a_process_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert starter() == "", "by hand"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    agent = starter()
    assert f"-{os.getppid()}-" in agent and starter() == agent
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert starter() != agent
    monkeypatch.setenv("KINOFORM_LAUNCH", "one")
    assert starter() == "one"


def test_going_back_to_a_checkpoint_leaves_no_newer_one_to_go_on_from(tmp_path: Path) -> None:
    folder, _ = start(tmp_path)
    for step in (5, 10, 15):
        save(folder, step)
    (folder / "checkpoints/step_0000005/__0_0.distcp").write_bytes(b"short")
    with pytest.raises(UserError, match="has 5 bytes"):
        start(tmp_path, folder / "checkpoints/step_0000005")
    assert len(manifest.committed(folder)) == 3, "nothing was gone back from"
    assert start(tmp_path, folder / "checkpoints/step_0000010") == (folder, "step_0000010")
    assert names(folder) == ["step_0000005", "step_0000010", "step_0000015.abandoned"]
    assert start(tmp_path) == (folder, "step_0000010")


def test_a_path_goes_back_once_in_a_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = start(tmp_path)
    for step in (5, 10):
        save(folder, step)
    path = folder / "checkpoints/step_0000005"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert start(tmp_path, path)[1] == "step_0000005", "the first attempt had not got so far"
    assert start(tmp_path, path)[1] == "step_0000005"
    save(folder, 8)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert start(tmp_path, path)[1] == "step_0000008"
    manifest.prune(folder, 1, save(folder, 12))
    assert names(folder) == ["step_0000012"]
    assert start(tmp_path, path) == start(tmp_path, folder) == (folder, "step_0000012"), "though the checkpoint of the path is gone"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    with pytest.raises(UserError, match="does not exist"):
        start(tmp_path, path)
    save(folder, 14)
    assert start(tmp_path, folder / "checkpoints/step_0000012")[1] == "step_0000012"
    assert start(tmp_path, folder / "checkpoints/step_0000012")[1] == "step_0000012", "by hand it goes back each time"


def test_half_a_replacement_is_undone_before_a_checkpoint_is_chosen(tmp_path: Path) -> None:
    folder, _ = start(tmp_path)
    checkpoint = save(folder, 5)
    checkpoint.rename(checkpoint.with_name(".step_0000005.old"))
    assert start(tmp_path) == (folder, "step_0000005")


def test_what_cannot_be_read_for_now_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = start(tmp_path)
    save(folder, 5)
    failures = [OSError(116, "Stale file handle")] * 2

    def read(path: Path) -> str:
        if failures:
            raise failures.pop()
        return sha256_file(path)

    monkeypatch.setattr(manifest, "sha256_file", read)
    monkeypatch.setattr(manifest, "_PAUSE", 0.0)
    assert start(tmp_path) == (folder, "step_0000005") and not failures
    failures += [OSError(5, "Input/output error")] * 3
    with pytest.raises(UserError, match=r"no damage \(.*Input/output error\): start again when it can be"):
        start(tmp_path)
    assert names(folder) == ["step_0000005"]
    monkeypatch.setattr(Path, "read_text", read)
    failures += [OSError(5, "Input/output error")] * 3
    with pytest.raises(OSError, match="Input/output error"):
        manifest.read_manifest(folder / "checkpoints/step_0000005")


def test_the_same_command_started_twice_at_once_makes_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, made = runs._create, []

    def slowly(results: Path, name: str, stage: str, settings: RunConfig, lock: runs.RunLock) -> Path:
        """Another process comes between the look for runs and the making of one."""
        made.append(create(results, name, stage, settings, runs.RunLock()))
        return create(results, name, stage, settings, lock)

    monkeypatch.setattr(runs, "_create", slowly)
    assert start(tmp_path)[0] == made[0]
    assert [place.name for place in tmp_path.iterdir()] == ["000-toy"]


def test_ranks_share_the_reading_of_files(tmp_path: Path) -> None:
    temporary = tmp_path / "checkpoints/.step_0000005.tmp"
    temporary.mkdir(parents=True)
    for number in range(5):
        (temporary / f"__{number}_0.distcp").write_bytes(bytes(100))
    files = manifest.digest_files(temporary, [place.name for place in temporary.iterdir()])
    checkpoint = manifest.commit(temporary, {"step": 5, "files": files})
    for number in range(5):
        file = checkpoint / f"__{number}_0.distcp"
        file.write_bytes(bytes(99) + b"\x01")
        assert [manifest.find_damage(checkpoint, part, 3) is not None for part in range(3)] == [part == number % 3 for part in range(3)]
        file.write_bytes(bytes(100))
