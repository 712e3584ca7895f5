"""preprocess.py shards --task-id: parts of one set made by many tasks, in any order, at once, killed at will; full disks; duplicates."""

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.prepare import build, writer
from datasets.prepare.windows import ClipRules
from datasets.prepare.workers import prepare_all, read_spool
from datasets.shards import ShardSet
from datasets.sources.base import Video
from tests.preprocessing import call, command, report, run
from tests.videos import folder_digests, write_tree, write_video
from utils.errors import UserError

FLAGS = ("--clip-length", 4, "--shard-size", 6, "--image-size", 16, 16, "--decoder", "pyav", "--name", "toy")
COPY_FLAGS = ("--clip-length", 8, "--clip-stride", 1, "--image-size", 32, 32, "--decoder", "pyav", "--shard-size", 4)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_tree(tmp_path_factory.mktemp("videos"), [f"{name}/{i}.mp4" for name in "ab" for i in range(5)], 16)
    (root / "a" / "bad.mp4").write_bytes(b"no video")
    return root


@pytest.fixture(scope="module")
def whole(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set in three parts, made by one task without a stop."""
    out = tmp_path_factory.mktemp("sets") / "whole"
    run(videos, "--out", out, *FLAGS, "--parts", 3)
    return out


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 1, 0, 2, 2)])
def test_tasks_in_any_order_make_the_same_set(videos: Path, whole: Path, tmp_path: Path, order: tuple[int, ...]) -> None:
    for number, task in enumerate(order):
        printed = run(videos, "--out", tmp_path / "set", *FLAGS, "--task-id", task, "--num-tasks", 3)
        waiting = 3 - len(set(order[: number + 1]))
        assert f"{waiting} parts of the set are still to be made" in printed if waiting else "of 11 videos" in printed
        assert (tmp_path / "set" / "index.json").exists() == (waiting == 0)
    assert folder_digests(tmp_path / "set") == folder_digests(whole)
    before = folder_digests(tmp_path / "set")
    assert "was complete already" in run(videos, "--out", tmp_path / "set", *FLAGS, "--task-id", 1, "--num-tasks", 3)
    assert folder_digests(tmp_path / "set") == before


def test_parts_are_disjoint_and_complete(videos: Path, whole: Path, tmp_path: Path) -> None:
    run(videos, "--out", tmp_path / "one", *FLAGS)
    one, parts = ShardSet.open(tmp_path / "one"), ShardSet.open(whole)
    assert len(set(parts.keys)) == len(parts.keys) and parts.keys == one.keys
    assert {entry["name"].split("-")[1] for entry in parts.meta["shards"]} == {"0000", "0001", "0002"}
    same = ("videos", "used", "clips", "clips_per_class", "histograms", "skipped")
    assert [report(whole)[name] for name in same] == [report(tmp_path / "one")[name] for name in same]
    assert [row["file"] for rows in report(whole)["skipped"].values() for row in rows] == ["a/bad.mp4"]  # type: ignore[attr-defined]


def test_the_number_of_tasks_and_of_workers_does_not_matter(videos: Path, whole: Path, tmp_path: Path) -> None:
    run(videos, "--out", tmp_path / "set", *FLAGS, "--task-id", 0, "--num-tasks", 4, "--parts", 3)
    run(videos, "--out", tmp_path / "set", *FLAGS, "--parts", 3, "--workers", 2)
    assert folder_digests(tmp_path / "set") == folder_digests(whole)


def test_more_parts_than_videos(videos: Path, tmp_path: Path) -> None:
    run(videos, "--out", tmp_path / "set", *FLAGS, "--parts", 30)
    assert "is whole" in call("verify", tmp_path / "set", "--workers", 1)
    assert ShardSet.open(tmp_path / "set").meta["videos"] == 10


def test_tasks_at_once_and_killed(videos: Path, whole: Path, tmp_path: Path) -> None:
    rng, out = random.Random(1), tmp_path / "set"

    def start(task: int) -> subprocess.Popen[bytes]:
        flags = (*FLAGS, "--workers", 1, "--task-id", task, "--num-tasks", 3)
        return subprocess.Popen(command(videos, "--out", out, *flags), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)

    tasks = [start(task) for task in range(3)]
    while not (out / ".work").exists():
        time.sleep(0.01)
    time.sleep(rng.uniform(0.05, 0.3))
    for process in tasks:
        process.kill()
        process.communicate()
    tasks = [start(task) for task in range(3)]
    for process in tasks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert folder_digests(out) == folder_digests(whole)


def test_a_part_is_made_by_one_process(videos: Path, tmp_path: Path) -> None:
    run(videos, "--out", tmp_path / "set", *FLAGS, "--task-id", 0, "--num-tasks", 3)
    (tmp_path / "set/.work/part-0001").mkdir()
    with (tmp_path / "set/.work/part-0001/lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = run(videos, "--out", tmp_path / "set", *FLAGS, "--task-id", 1, "--num-tasks", 3, code=1)
        assert "another preprocess.py is writing part 1" in said
        run(videos, "--out", tmp_path / "set", *FLAGS, "--task-id", 2, "--num-tasks", 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--task-id", 3, "--num-tasks", 3), "must be below --num-tasks 3; tasks are counted from 0"),
        (("--task-id", 1), "must be below --num-tasks 1"),
        (("--num-tasks", 2), "say which of them this is with --task-id, from 0 to 1"),
        (("--task-id", -1, "--num-tasks", 2), "not a whole number"),
        (("--task-id", 0, "--num-tasks", 2, "--overwrite"), "delete each other's work"),
        (("--task-ids", 0), "did you mean --task-id?"),
    ],
)
def test_a_wrong_task_is_one_line(videos: Path, tmp_path: Path, flags: tuple[object, ...], words: str) -> None:
    said = run(videos, "--out", tmp_path / "set", *flags, code=2)
    assert words in said and len(said.splitlines()) == 1 and not (tmp_path / "set").exists()


def test_an_unfinished_set_names_its_parts(videos: Path, tmp_path: Path) -> None:
    run(videos, "--out", tmp_path / "set", *FLAGS, "--task-id", 0, "--num-tasks", 3)
    assert "say --parts 3" in run(videos, "--out", tmp_path / "set", *FLAGS, code=1)
    assert "other settings" in run(videos, "--out", tmp_path / "set", *FLAGS, "--parts", 3, "--seed", 1, code=1)


def test_underscores_are_dashes(videos: Path, whole: Path, tmp_path: Path) -> None:
    flags = [flag.replace("-", "_").replace("__", "--", 1) if isinstance(flag, str) else flag for flag in FLAGS]
    run(f"--data_path={videos}", "--out", tmp_path / "set", *flags, "--parts", 3)
    assert folder_digests(tmp_path / "set") == folder_digests(whole)


def full_disk(after: int) -> Callable[[Path, bytes], None]:
    """Writes files until `after` of them are there."""
    left = [after]
    real = writer.atomic_write_bytes

    def write(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    return write


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    videos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    flags = (videos, "--out", tmp_path / "set", *FLAGS, "--parts", 3)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "atomic_write_bytes", full_disk(after))
        said = run(*flags, code=1)
    assert said == f"cannot write to {tmp_path / 'set'}: No space left on device; mend that and run the same command again, it goes on\n"
    assert not list((tmp_path / "set").rglob("*.tmp")) and not list((tmp_path / "set").rglob("*.spool"))
    run(*flags)
    assert folder_digests(tmp_path / "set") == folder_digests(whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_cannot_grow_leaves_nothing_half_written(videos: Path, whole: Path, tmp_path: Path, workers: int) -> None:
    """The kernel's own limit: spool files and tars hit it in the middle of a write."""
    flags = (videos, "--out", tmp_path / "set", *FLAGS, "--parts", 3, "--workers", workers)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    done = subprocess.run(command(*flags), capture_output=True, text=True, timeout=120, preexec_fn=limit, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: cannot write to") and len(done.stderr.splitlines()) == 1, done.stderr
    run(*flags)
    assert folder_digests(tmp_path / "set") == folder_digests(whole)


def test_a_shard_lost_before_the_end_is_made_again(videos: Path, whole: Path, tmp_path: Path) -> None:
    for task in (0, 1):
        run(videos, "--out", tmp_path / "set", *FLAGS, "--task-id", task, "--num-tasks", 3)
    (tmp_path / "set/shard-0001-00000.tar").write_bytes(b"")
    assert "1 parts" in run(videos, "--out", tmp_path / "set", *FLAGS, "--task-id", 2, "--num-tasks", 3)
    run(videos, "--out", tmp_path / "set", *FLAGS, "--task-id", 1, "--num-tasks", 3)
    assert folder_digests(tmp_path / "set") == folder_digests(whole)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos, of which 3 to 5 show what 0 to 2 show, compressed again; windows of one video overlap."""
    root = tmp_path_factory.mktemp("copies")
    for i in range(6):
        picture = Image.fromarray(np.random.default_rng(i % 3).integers(0, 255, (12, 12, 3), np.uint8)).resize((64, 64))
        frames = np.stack([np.roll(np.asarray(picture), 2 * t, axis=1) for t in range(12)])
        write_video(root / f"{i}.mp4", frames, crf="20" if i < 3 else "30")
    return root


@pytest.mark.parametrize("parts", [1, 6])
def test_duplicates_of_other_videos_go_and_windows_stay(copies: Path, tmp_path: Path, parts: int) -> None:
    flags = (copies, *COPY_FLAGS, "--parts", parts)
    run(*flags, "--out", tmp_path / "all")
    assert ShardSet.open(tmp_path / "all").num_samples == 30
    printed = run(*flags, "--out", tmp_path / "set", "--dedupe", 20)
    index = json.loads((tmp_path / "set/index.json").read_text())
    assert index["samples"] == report(tmp_path / "set")["clips"] == 15 and "left out 15 clips: duplicate" in printed
    assert bool(index["dropped"]) == (parts > 1)
    found = json.loads((tmp_path / "set/report.json").read_text())
    assert [len(named) for named in found["first_rejected_clips"].values()] == [15] and (parts > 1 or len(*found["skipped"].values()) == 3)
    assert "is whole" in call("verify", tmp_path / "set", "--workers", 1)
    kept = ShardSet.open(tmp_path / "set")
    assert kept.num_samples == 15 and len({key.split("_")[0] for key in kept.keys}) == 3


def test_duplicates_are_the_same_after_a_kill(copies: Path, tmp_path: Path) -> None:
    flags = (copies, *COPY_FLAGS, "--dedupe", 20)
    run(*flags, "--out", tmp_path / "whole")
    index = json.loads((tmp_path / "whole/index.json").read_text())
    for keep in range(len(index["shards"])):
        half = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"half{keep}"))
        for name in ("index.json", "report.json", "sheet.png"):
            (half / name).unlink()
        for entry in index["shards"][keep:]:
            (half / entry["name"]).unlink()
        (half / ".work").mkdir()
        (half / ".work/plan").write_text(json.dumps({"plan": index["plan"], "parts": 1}))
        run(*flags, "--out", half)
        assert folder_digests(half) == folder_digests(tmp_path / "whole")


def test_a_task_that_comes_second_at_the_end_is_done_too(
    videos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another task writes the index and takes the work folder away, just when this one looks into it."""

    def meanwhile(*_: object) -> int:
        shutil.copytree(whole, tmp_path / "set", dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "set/.work")
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(build, "_finish", meanwhile)
    assert "of 11 videos" in run(videos, "--out", tmp_path / "set", *FLAGS, "--parts", 3)


def test_too_many_rejects_end_with_status_1(videos: Path, tmp_path: Path) -> None:
    flags = (videos, "--out", tmp_path / "set", *FLAGS)
    for _ in range(2):  # the second time the set is complete already
        assert "1 of 11 videos (9.1%) gave no clip, more than --max-rejects 0.05" in run(*flags, "--max-rejects", 0.05, code=1)
    run(*flags, "--max-rejects", 0.1)


def test_stopping_with_ctrl_c_leaves_a_set_that_goes_on(videos: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    process = subprocess.Popen(command(videos, "--out", out, *FLAGS, "--parts", 3, "--workers", 2), stderr=subprocess.PIPE)
    while not (out / ".work/part-0000").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in errors
    run(videos, "--out", out, *FLAGS, "--parts", 3)
    assert folder_digests(out) == folder_digests(whole)


class Bomb:
    """Ends the process that unpickles it, as a decoder does that crashes."""

    name, label = "bomb.mp4", 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[object, ...]:
        return os.kill, (_OwnPid(), self.number)


class _OwnPid:
    def __reduce__(self) -> tuple[object, ...]:
        return os.getpid, ()


@pytest.mark.slow
def test_a_video_that_crashes_the_decoder_is_left_out_and_named(videos: Path, tmp_path: Path) -> None:
    paths = sorted((videos / "b").iterdir())
    sources = [Video(path, path.name) for path in paths]
    mixed = [sources[0], Bomb(signal.SIGSEGV), *sources[1:], Bomb(signal.SIGABRT)]
    rules = ClipRules(size=(16, 16), clip_length=4, clip_stride=4, decoder="pyav")
    done = list(prepare_all(mixed, range(len(mixed)), rules, [], tmp_path, 2))  # type: ignore[arg-type]
    assert [number for number, _, _ in done] == list(range(len(mixed)))
    assert [prepared.skipped for _, prepared, _ in done if prepared.skipped] == [
        ("bomb.mp4", "crashes the decoder", "the process ended with SIGSEGV"),
        ("bomb.mp4", "crashes the decoder", "the process ended with SIGABRT"),
    ]
    assert [any(read_spool(prepared, spool)) for _, prepared, spool in done] == [not prepared.skipped for _, prepared, _ in done]
    with pytest.raises(UserError, match=r"prepared bomb\.mp4 was killed, probably for lack of memory"):
        list(prepare_all([sources[0], Bomb(signal.SIGKILL)], range(2), rules, [], tmp_path, 2))  # type: ignore[list-item]
