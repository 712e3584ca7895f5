"""Checkpoints across wrappings and world sizes, in the background, under faults. Each case runs `checkpoint_worker.py` as a user's job."""

import json
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import manifest
from engine.checkpoint import latest
from tests.distributed import command, interrupt

WORKER = Path(__file__).with_name("checkpoint_worker.py")


def work(world: int, *arguments: object, before: Callable[[], None] | None = None) -> "subprocess.CompletedProcess[str]":
    return command([WORKER, *arguments], world, before=before)


def digests(world: int, *arguments: object) -> list[str]:
    result = work(world, *arguments)
    assert result.returncode == 0, result.stderr
    return [line.split()[1] for line in result.stdout.splitlines() if line.startswith("DIGEST")]


def errors(result: "subprocess.CompletedProcess[str]") -> list[str]:
    """Lines of our own; torchrun's summary begins its lines otherwise."""
    ours = re.findall(rf'File "{re.escape(str(WORKER.parent.parent))}/(?!\.venv).*', result.stderr)
    assert not ours, result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def seen(run: Path) -> dict[str, str]:
    """Digests of toy runs, by name: what two ranks and one process saved and then loaded from each other."""
    last = f"load:{run / 'quick'}/checkpoints"
    alone = {"plain1": "plain train:3 save:3 digest"}
    pair = {
        "fsdp2": "fsdp train:3 save:3 digest",
        "ddp2": "ddp train:3 save:3 digest",
        "fsdp2 -> ddp2": "ddp load digest",
        "ddp2 -> fsdp2": "fsdp load digest",
        "plain1 -> fsdp2": "fsdp load digest",
        "plain1 -> hsdp2": "hsdp load digest",
        "whole": "fsdp train:5 digest",
        "fsdp2 -> on": "fsdp load train:2 digest",
        "quick": "fsdp reserve train:1 save:1 train:1 save:2 digest train:1 save:3 train:2",
        "sync": "fsdp sync train:2 save:2 digest",
        "diverged": "ddp train:1 diverge save:1 digest",
    }
    back = {
        "fsdp2 -> plain1": "plain load digest",
        "fsdp2 -> fsdp1": "fsdp load digest",
        "ddp2 -> plain1": "plain load digest",
        "quick -> plain1": f"plain {last}/step_0000002 digest",
        "sync -> plain1": "plain load digest",
        "diverged -> plain1": "plain load digest",
    }
    found: dict[str, str] = {}
    for world, parts in ((1, alone), (2, pair), (1, back)):
        arguments = [word for name, actions in parts.items() for word in (run / name.split(" ->")[0], *actions.split(), "--")]
        found.update(zip(parts, digests(world, *arguments[:-1]), strict=True))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["fsdp2 -> ddp2", "ddp2 -> fsdp2", "plain1 -> fsdp2", "plain1 -> hsdp2", "fsdp2 -> plain1", "fsdp2 -> fsdp1", "ddp2 -> plain1"],
)
def test_loads_bitwise_under_another_wrapping_and_world_size(seen: dict[str, str], case: str) -> None:
    assert seen[case] == seen[case.split(" -> ")[0]]


def test_going_on_equals_never_stopping(seen: dict[str, str]) -> None:
    """Same world size: bit for bit, with the parameters that were never stepped still without optimizer state."""
    assert seen["fsdp2 -> on"] == seen["whole"] != seen["fsdp2"]


def test_saves_in_quick_succession_hold_the_state_of_their_own_moment(seen: dict[str, str], run: Path) -> None:
    """One in flight at a time, and training that goes on does not reach the copy; old checkpoints are pruned."""
    assert [place.name for place in manifest.committed(run / "quick")] == ["step_0000002", "step_0000003"]
    assert seen["quick -> plain1"] == seen["quick"]


def test_synchronous_save_is_the_same(seen: dict[str, str]) -> None:
    assert seen["sync -> plain1"] == seen["sync"]


def test_values_that_differ_between_ranks_are_those_of_rank_0(seen: dict[str, str], run: Path) -> None:
    """The trap of equal keys: torch would keep the value of one rank or the other. Only rank 0 writes what is not sharded."""
    assert seen["diverged -> plain1"] == seen["diverged"]
    record = json.loads((run / "diverged/checkpoints/step_0000001/manifest.json").read_text())
    assert record["task"] == {"factor": 0.0}
    assert (record["step"], record["samples"], record["world_size"], record["torch"]) == (1, 8, 2, torch.__version__)
    assert record["files"].get("__1_0.distcp", {"bytes": 0})["bytes"] == 0


def test_kill_during_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    before = digests(1, tmp_path, "plain", "width:256", "train:1", "save:1", "digest", "wait")
    temporary = tmp_path / "checkpoints/.step_0000002.tmp"
    interrupt([WORKER, tmp_path, "plain", "width:1024", "train:1", "save:2", "poll:60"], lambda: any(temporary.glob("__*")))
    assert temporary.is_dir(), "the save was over before the kill: nothing was tested"
    found = latest(tmp_path)
    assert found is not None and found.name == "step_0000001"
    assert manifest.find_damage(found) is None
    assert digests(1, tmp_path, "plain", "width:256", "load", "digest") == before
    manifest.remove_leftovers(tmp_path)
    assert not temporary.exists()


def small_files() -> None:
    """A disk that has no room for a checkpoint, until an `unlimit`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize("how", ["background", "sync"])
def test_full_disk_is_a_warning_and_the_next_save_tries_again(tmp_path: Path, how: str) -> None:
    """What was half written is deleted: it may be what the next try needs."""
    first = digests(2, tmp_path, "fsdp", "train:1", "save:1", "digest")
    actions = ["fsdp", "load", "digest", "train:1", "save:2", "train:1", "save:3", "poll:1", "unlimit", "train:1", "save:4", "digest"]
    result = work(2, tmp_path, *actions, *(["sync"] if how == "sync" else []), before=small_files)
    assert result.returncode == 0, result.stderr
    found = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("DIGEST")]
    assert found[:1] == first
    warnings = [line for line in result.stderr.splitlines() if "training goes on" in line]
    assert [f"checkpoint of step {step}" in line for step, line in zip((2, 3), warnings, strict=True)] == [True, True]
    assert all("too large" in line and str(tmp_path) in line and "step_0000001" in line for line in warnings)
    assert sorted(place.name for place in (tmp_path / "checkpoints").iterdir()) == ["step_0000001", "step_0000004"]
    assert digests(1, tmp_path, "plain", "load", "digest") == found[1:]


def test_full_disk_at_the_last_save_is_one_line_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    digests(2, tmp_path, "fsdp", "train:1", "save:1")
    began = time.monotonic()
    result = work(2, tmp_path, "fsdp", "load", "train:1", "save:2", "wait", before=small_files)
    assert result.returncode != 0 and time.monotonic() - began < 45
    (line,) = errors(result)
    assert "checkpoint of step 2" in line and "too large" in line and str(tmp_path) in line
    assert sorted(place.name for place in (tmp_path / "checkpoints").iterdir()) == ["step_0000001"]


def test_unwritable_folder_is_a_warning_and_at_the_last_save_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    result = work(2, tmp_path, "ddp", "train:1", "save:1", "poll:0.1", "train:1", "save:2", "wait")
    assert result.returncode != 0
    (line,) = errors(result)
    assert "checkpoint of step 2" in line and "no checkpoint" in line
    (warning,) = [line for line in result.stderr.splitlines() if "training goes on" in line]
    assert "checkpoint of step 1" in warning


def test_checkpoint_of_another_model_is_refused(seen: dict[str, str], run: Path) -> None:
    result = work(1, run / "plain1", "plain", "width:32", "load")
    (line,) = errors(result)
    assert result.returncode == 1 and "[64]" in line and "[32]" in line


def test_metadata_of_another_torch_points_at_the_export(seen: dict[str, str], run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "plain1", tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints/step_0000003/.metadata").write_bytes(b"\x80\x05cnowhere\nNothing\n.")
    result = work(1, tmp_path, "plain", "load")
    (line,) = errors(result)
    assert result.returncode == 1 and "export" in line and torch.__version__ in line
