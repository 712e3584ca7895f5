"""preprocess.py shards as a user runs it: layouts, exact frames, reports, errors in one line, kills."""

import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.prepare.parts import Part, locked
from datasets.shards import ShardSet
from datasets.sources.base import Video
from datasets.transforms import resize_clip
from datasets.video import decode, probe
from tests.distributed import interrupt
from tests.preprocessing import command, report, run
from tests.videos import folder_digests, noise_frames, write_tree, write_video


def clip(shards: ShardSet, sample: int) -> np.ndarray:
    with tarfile.open(shards.shard_path(sample)) as tar:
        return np.load(io.BytesIO(tar.extractfile(f"{shards.keys[sample]}.npy").read()))  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(
        tmp_path_factory.mktemp("videos"), [f"{name}/{i}.{kind}" for name in ("a10", "a2") for i, kind in ((0, "mp4"), (1, "avi"))], 30
    )


def test_every_clip_is_the_sequential_decode(videos: Path, tmp_path: Path) -> None:
    flags = ("--clip-length", 6, "--clip-stride", 5, "--frame-stride", 2, "--image-size", 16, 24, "--licence", "CC0")
    run(videos, "--out", tmp_path / "set", *flags)
    shards = ShardSet.open(tmp_path / "set")
    assert shards.meta["licence"] == "CC0" and shards.classes == ["a2", "a10"] and shards.fps == 12.5
    counts = dict.fromkeys((path.relative_to(videos).as_posix() for path in videos.rglob("*.*")), 0)
    for sample in range(shards.num_samples):
        with tarfile.open(shards.shard_path(sample)) as tar:
            card = json.load(tar.extractfile(f"{shards.keys[sample]}.json"))  # type: ignore[arg-type]
        path = videos / card["source"]
        frames = np.stack(list(decode(path, probe(path), "pyav")))
        first, last = card["span"]
        assert first == counts[card["source"]] * 10 and last - first == 12
        assert (clip(shards, sample) == resize_clip(frames[first:last:2], (16, 24))).all()
        counts[card["source"]] += 1
    assert all(
        count == ((len(list(decode(videos / name, probe(videos / name), "pyav"))) + 1) // 2 - 6) // 5 + 1 for name, count in counts.items()
    )


def test_workers_do_not_change_a_byte(videos: Path, tmp_path: Path) -> None:
    flags = ("--clip-length", 8, "--shard-size", 3, "--image-size", 16, 16)
    for workers in (1, 2):
        run(videos, "--out", tmp_path / str(workers), *flags, "--workers", workers)
    before = folder_digests(tmp_path / "2")
    assert folder_digests(tmp_path / "1") == before
    run(videos, "--out", tmp_path / "2", *flags)
    assert folder_digests(tmp_path / "2") == before


@pytest.mark.slow
def test_kills_at_any_moment_leave_nothing_behind(tmp_path: Path) -> None:
    videos = write_tree(tmp_path / "videos", [f"{i}.mp4" for i in range(24)], 40)
    (videos / "bad.mp4").write_bytes(b"no video")
    flags = (videos, "--clip-length", 4, "--shard-size", 16, "--image-size", 32, 32, "--decoder", "pyav", "--workers", 2, "--name", "toy")
    run(*flags, "--out", tmp_path / "whole")
    rng, out, stops = random.Random(0), tmp_path / "killed", set()
    for _ in range(4):
        wanted, delay = len(list(out.glob("shard-*.index.json"))) + rng.randrange(3), rng.uniform(0, 0.2)

        def due(wanted: int = wanted, delay: float = delay) -> bool:
            there = len(list(out.glob("shard-*.index.json"))) >= wanted
            time.sleep(delay if there else 0)
            return there

        # The parent alone, or with its workers: those that it leaves must end by themselves.
        interrupt(["preprocess.py", "shards", *flags, "--out", out], due, group=rng.random() < 0.5, timeout=60)
        stops.add(len(list(out.glob("shard-*.index.json"))))
    run(*flags, "--out", out)
    assert len(stops) > 1, "the kills did not fall into the work"
    assert folder_digests(out) == folder_digests(tmp_path / "whole")


def test_a_shard_damaged_after_a_kill_is_made_again(videos: Path, tmp_path: Path) -> None:
    flags = (videos, "--clip-length", 8, "--shard-size", 3, "--image-size", 16, 16)
    run(*flags, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    plan = json.loads((tmp_path / "half" / "index.json").read_text())["plan"]
    (tmp_path / "half" / "index.json").unlink()
    (tmp_path / "half" / ".work").mkdir()
    (tmp_path / "half" / ".work" / "plan").write_text(json.dumps({"plan": plan, "parts": 1}))
    data = bytearray((tmp_path / "half" / "shard-00001.tar").read_bytes())
    data[5000] ^= 1
    (tmp_path / "half" / "shard-00001.tar").write_bytes(data)
    for name in (".index.json.1234abcd.tmp", ".report.json.1234abcd.tmp", ".shard-00000.index.json.1234abcd.tmp"):
        (tmp_path / "half" / name).write_bytes(b"half written")
    run(*flags, "--out", tmp_path / "half")
    assert folder_digests(tmp_path / "half") == folder_digests(tmp_path / "whole")


def test_files_that_cannot_be_used_are_named_with_the_reason(videos: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(videos, tmp_path / "source"))
    whole = (source / "a2/0.mp4").read_bytes()
    bad = {"zero.mp4": b"", "text.avi": b"hello " * 99, "cut.mp4": whole[: len(whole) * 2 // 3]}
    for name, content in bad.items():
        (source / "a2" / name).write_bytes(content)
    write_video(source / "a2" / "short.mp4", 5)
    (source / "notes.txt").write_text("not a video, not looked at")
    printed = run(source, "--out", tmp_path / "set", "--image-size", 16, 16)
    found = {row["file"] for rows in report(tmp_path / "set")["skipped"].values() for row in rows}  # type: ignore[attr-defined]
    assert found == {f"a2/{name}" for name in (*bad, "short.mp4")}
    assert "short.mp4" in printed and "empty file" in printed
    assert report(tmp_path / "set")["used"] == 4
    run(source, "--out", tmp_path / "padded", "--image-size", 16, 16, "--on-short", "pad")
    assert report(tmp_path / "padded")["used"] == 5


def test_any_name_of_a_file_goes_through_and_breaks_no_terminal(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "source", ["a b.mp4", "-x.mp4", "a:b.mp4", "%03d.mp4", "new\nline.mp4", "\x1b[31mred.mp4", "q'u\"o.mp4"])
    (root / "a b.mp4").rename(root / os.fsdecode(b"a \xff b.mp4"))
    (root / "gone.mp4").symlink_to("nowhere")
    (root / "\x1b[2J\xe9.mp4").write_bytes(b"")
    (root / ".hidden.mp4").write_bytes(b"")
    flags = (root, "--out", tmp_path / "set", "--image-size", 16, 16, "--clip-length", 8, "--min-motion", 1e-9)
    plain = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command(*flags, "--workers", 1), capture_output=True, timeout=120, check=False, env=plain)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert b"\x1b" not in done.stdout and b"\\x1b[2J\\xe9.mp4" in done.stdout
    assert {name for rows in report(tmp_path / "set")["skipped"].values() for name in (row["file"] for row in rows)} == {  # type: ignore[attr-defined]
        "gone.mp4",
        "\x1b[2J\xe9.mp4",
    }
    assert report(tmp_path / "set")["used"] == 7


def test_ucf101_lists_folds_and_classes(videos: Path, tmp_path: Path) -> None:
    names = [f"{c}/v_{c}_g{g:02d}_c01.avi" for c in ("Archery", "Biking") for g in (1, 2)]
    root = write_tree(tmp_path / "UCF-101", names)
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist02.txt").write_text(f"{names[2]} 2\n{names[3]} 2\nBiking/v_Biking_g09_c01.avi 2\n")
    (lists / "testlist02.txt").write_text(f"{names[0]}\r\n{names[1]}\r\n")
    flags = ("--image-size", 16, 16)
    run(root, "--out", tmp_path / "train", "--split", "train", "--fold", 2, *flags)
    train = ShardSet.open(tmp_path / "train")
    assert (train.num_samples, train.classes, set(train.label)) == (2, ["Archery", "Biking"], {1})
    assert train.meta["source"] == train.name == "UCF101"
    assert report(tmp_path / "train")["skipped"]["missing"][0]["file"].endswith("g09_c01.avi")  # type: ignore[index]
    run("--data-path", root, "--dataset-name", "UCF101", "--out", tmp_path / "test", "--split", "test", "--fold", 2, *flags)
    assert set(ShardSet.open(tmp_path / "test").label) == {0}
    assert "testlist01.txt" in run(root, "--out", tmp_path / "x", "--split", "test", code=1)


def test_frame_folders_are_videos(tmp_path: Path) -> None:
    frames = noise_frames(12, (20, 30))
    for name in ("b", "a"):
        (tmp_path / "frames" / name).mkdir(parents=True)
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / "frames" / name / f"{number}.png")
    Image.fromarray(frames[0][:10]).save(tmp_path / "frames" / "b" / "5.png")
    run(tmp_path / "frames", "--out", tmp_path / "set", "--clip-length", 12, "--image-size", 20, 30, "--frames-fps", 10)
    shards = ShardSet.open(tmp_path / "set")
    assert shards.num_samples == 1 and shards.fps == 10 and (clip(shards, 0) == frames).all()
    assert "frames differ in size" in report(tmp_path / "set")["skipped"]  # type: ignore[operator]


def test_a_split_by_name_is_a_partition(videos: Path, tmp_path: Path) -> None:
    parts = []
    shares = sorted(int(Video(path, path.relative_to(videos).as_posix()).key, 16) / 2**64 for path in videos.rglob("*.*"))
    for split in ("train", "test"):
        run(videos, "--out", tmp_path / split, "--split", split, "--val-fraction", (shares[0] + shares[1]) / 2, "--image-size", 16, 16)
        parts.append({key.split("_")[0] for key in ShardSet.open(tmp_path / split).keys})
    assert (len(parts[0]), len(parts[1])) == (3, 1) and not parts[0] & parts[1]


def test_moving_digits_are_video_files_that_become_shards(tmp_path: Path) -> None:
    flags = ("--dataset-name", "synthetic-digits", "--num-videos", 20, "--image-size", 32, 32, "--clip-length", 8)
    run(*flags, "--out", tmp_path / "a")
    run(*flags, "--out", tmp_path / "b")
    shards = ShardSet.open(tmp_path / "a")
    assert shards.num_samples == 80 and shards.classes == list("0123456789") and len(list((tmp_path / "a").glob("source/*/*.mp4"))) == 20
    assert folder_digests(tmp_path / "a") == folder_digests(tmp_path / "b")
    for sample in range(shards.num_samples):
        frames = clip(shards, sample).astype(int)
        assert frames.max() > 200 and np.abs(frames[-1] - frames[0]).sum() > 1000, "the digits must move"
    run(*flags, "--out", tmp_path / "c", "--seed", 1)
    assert folder_digests(tmp_path / "c") != folder_digests(tmp_path / "a")


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("{tmp}/nowhere", "--out", "{tmp}/o"), 1, "does not exist"),
        (("{tmp}/empty", "--out", "{tmp}/o"), 1, "holds no videos"),
        (("--out", "{tmp}/o"), 2, "which folder"),
        (("{videos}", "--out", "{videos}"), 2, "is the source folder"),
        (("{videos}", "--out", "{tmp}/o", "--dataset-name", "synthetic-digits"), 2, "makes its own videos"),
        (("{videos}", "--out", "{tmp}/o", "--split", "test"), 1, "--val-fraction"),
        (("{videos}", "--out", "{tmp}/o", "--clip-length", "500"), 1, "no clip could be made"),
        (("{videos}", "--out", "{tmp}/o", "--clip-length", "zero"), 2, "not a whole number"),
        (("{videos}", "--out", "{tmp}/o", "--val-fraction", "2"), 2, "not a share"),
        (("{videos}", "--out", "/proc/nowhere"), 1, "cannot write"),
    ],
)
def test_a_mistake_is_one_clear_line(videos: Path, tmp_path: Path, flags: tuple[str, ...], code: int, words: str) -> None:
    (tmp_path / "empty").mkdir()
    assert words in run(*(flag.format(videos=videos, tmp=tmp_path) for flag in flags), code=code).strip().splitlines()[-1]


def test_the_script_prints_an_error_as_one_line() -> None:
    done = subprocess.run(command("nowhere", "--out", "nothing"), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stderr == "error: no video folder at nowhere: it does not exist\n"


def test_other_settings_do_not_touch_a_set(videos: Path, tmp_path: Path) -> None:
    flags = (videos, "--out", tmp_path / "set", "--image-size", 16, 16)
    run(*flags)
    before = folder_digests(tmp_path / "set")
    assert "--overwrite" in run(*flags, "--clip-length", 8, code=1)
    assert folder_digests(tmp_path / "set") == before
    run(*flags, "--clip-length", 8, "--overwrite")
    assert ShardSet.open(tmp_path / "set").clip_length == 8


def test_overwrite_deletes_a_set_and_nothing_else(videos: Path, tmp_path: Path) -> None:
    flags = (videos, "--out", tmp_path / "set", "--image-size", 16, 16)
    run(*flags)
    (tmp_path / "set/mine.tmp").write_text("not made here")
    before = folder_digests(tmp_path / "set")
    run(tmp_path / "mistyped", "--out", tmp_path / "set", "--overwrite", code=1)
    assert folder_digests(tmp_path / "set") == before
    (tmp_path / "set/.work").mkdir()
    with locked(Part(tmp_path / "set", 3, 0, 1)):
        assert "another preprocess.py is writing part 3" in run(*flags, "--overwrite", code=1)
    assert before.items() <= folder_digests(tmp_path / "set").items()
    run(*flags, "--clip-length", 8, "--overwrite")
    assert (tmp_path / "set/mine.tmp").exists()
    (tmp_path / "web").mkdir()
    (tmp_path / "web/index.json").write_text('{"pages": []}')
    assert "holds a shard set made of other" in run(videos, "--out", tmp_path / "web", code=1)
    for text in ('{"pages": []}', "[]", "page"):
        (tmp_path / "web/index.json").write_text(text)
        assert "is not of a shard set" in run(videos, "--out", tmp_path / "web", "--overwrite", code=1)
        assert (tmp_path / "web/index.json").read_text() == text


def test_help_documents_every_flag() -> None:
    text = run("--help")
    for flag in ("--out", "--dataset-name", "--image-size", "--clip-length", "--codec", "--decoder", "--on-short", "--overwrite", "--fold"):
        assert flag in text
