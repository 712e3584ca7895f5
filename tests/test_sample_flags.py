"""sample.py: the same flags for every system, batches that fit the memory, formats of videos, and what a killed run leaves."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evaluation.motion import measure_motion
from evaluation.videos import open_videos
from launch.env import Env
from pipelines import batches
from pipelines.batches import Batches
from pipelines.clip_sample import ClipSampleJob
from pipelines.cmd_sample import CMDSampleConfig, CMDSampleJob
from pipelines.systems import SYSTEMS
from pipelines.video_files import count, iterate, open_writer, video_path, write_video
from pipelines.vidm_sample import VIDMSampleConfig, VIDMSampleJob
from tests import cmd_family, hvdm_exports, latte_exports, pvdm_exports, vidm_exports
from tests.distributed import interrupt
from tests.sampling import CPU, config, contents, make
from utils.errors import ConfigError, UserError
from utils.files import remove_temporaries, writing_alone
from utils.media import to_uint8

FAMILIES: dict[str, Callable[[Path], object]] = {
    "cmd": cmd_family.family,
    "latte": latte_exports.family,
    "pvdm": pvdm_exports.family,
    "hvdm": hvdm_exports.family,
    "vidm": vidm_exports.family,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """System -> folder of tiny runs."""
    found = {}
    for system, write in FAMILIES.items():
        found[system] = tmp_path_factory.mktemp(system)
        write(found[system])
    return found


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


# ---- one set of flags


@pytest.mark.parametrize("system", list(SYSTEMS))
def test_every_system_takes_the_common_flags(runs: dict[str, Path], tmp_path: Path, system: str) -> None:
    line = ["--mode", "short", "--sampler", "ddim", "--steps", 2, "--num-frames", 3, "--num-videos", 2, "--seed", 5]
    if system != "vidm":
        line += ["--guidance-scale", 2]
    record = json.loads((make(tmp_path, runs[system], *line) / "settings.json").read_text())
    found = open_videos(tmp_path, "--dir2")
    assert (len(found), found.total(0), found.total(1)) == (2, 3, 3)
    assert (record["system"], record["seed"]) == (system, 5)
    samplings = {
        "cmd": lambda: [record["content"], record["motion"]],
        "vidm": lambda: list(record["sampling"].values()),
    }.get(system, lambda: [record["sampling"]])()
    assert {entry["sampler"] for entry in samplings} == {"ddim"}
    assert {entry["guidance"] for entry in samplings} == {1.0 if system == "vidm" else 2.0}
    assert all(entry["respacing"] == "trailing2" if entry.get("respacing") else entry["steps"] == 2 for entry in samplings)


def test_the_names_of_before_mean_the_same(runs: dict[str, Path]) -> None:
    assert config(runs["cmd"], "--num-samples", 3).num_videos == config(runs["cmd"], "--num-videos", 3).num_videos == 3
    assert config(runs["vidm"], "--num-samples", 3, "--frames", 4).num_frames == 4
    assert config(runs["cmd"], "--class-labels", "two", "--global-seed", 4).classes == ("two",)
    old, new = (config(runs["hvdm"], "--mode", mode, "--image", "x.png") for mode in ("i2v", "image"))
    assert old == new and old.mode == "image"
    assert config(runs["cmd"], "--gif").formats == config(runs["cmd"], "--format", "mp4", "gif").formats == ("mp4", "gif")


def test_steps_sampler_and_guidance_are_those_of_both_networks_unless_one_says_its_own(runs: dict[str, Path]) -> None:
    def both(*argv: object) -> list[tuple[Any, ...]]:
        found = config(runs["cmd"], *argv)
        assert isinstance(found, CMDSampleConfig)
        return [(s.steps, s.sampler, s.guidance) for s in (found.sampling("content"), found.sampling("motion"))]

    assert both() == [(50, "auto", 4.0), (100, "auto", 4.0)]
    common = ["--steps", 5, "--sampler", "ddpm", "--guidance-scale", 2]
    assert both(*common) == [(5, "ddpm", 2.0)] * 2
    own = ["--motion.steps", 7, "--motion.sampler", "ddim", "--motion.guidance-scale", 3]
    assert both(*common, *own) == [(5, "ddpm", 2.0), (7, "ddim", 3.0)]
    assert both(*common, "--content-steps", 3, "--motion_guidance_scale", "1") == [(3, "ddpm", 2.0), (5, "ddpm", 1.0)]
    found = config(runs["vidm"], "--steps", 4, "--content.steps", 2, "--motion.sampler", "dpm++")
    assert isinstance(found, VIDMSampleConfig)
    made = VIDMSampleJob(found, CPU).samplings
    assert [(made[stage].steps, made[stage].sampler) for stage in ("content", "motion")] == [(2, "ddpm"), (4, "dpm++")]


@pytest.mark.parametrize(
    ("system", "argv", "said"),
    [
        ("vidm", ["--guidance-scale", "2"], "--guidance-scale is not for vidm: its generators know no condition"),
        ("vidm", ["--class-labels", "1"], "--classes is not for vidm: VIDM knows no classes"),
        ("vidm", ["--mode", "short", "--num-frames", "9"], "--num-frames 9: videos of training have 6"),
        ("vidm", ["--mode", "image"], "--mode image: which picture"),
        ("cmd", ["--image", "x.png"], "--image is not for cmd: its videos begin at no picture, those of hvdm and vidm can"),
        ("latte", ["--image", "x.png"], "--image is not for latte"),
        ("pvdm", ["--image", "x.png"], "--image is not for pvdm"),
        ("pvdm", ["--mode", "image"], "--mode image: pvdm makes short and long videos only"),
        ("cmd", ["--mode", "long", "--num-frames", "9"], "--mode long is not for CMD"),
        ("cmd", ["--num-frames", "9"], "--num-frames 9: clips of CMD have 4"),
        ("pvdm", ["--num-frames", "9"], "--num-frames 9: a clip has 4"),
        ("cmd", ["--batch-size", "0"], "--batch-size 0: a whole number from 1, or auto"),
        ("cmd", ["--batch-size", "many"], "--batch-size many: a whole number"),
        ("cmd", ["--format", "avi"], "--format: 'avi' given, one of mp4, gif, png is wanted"),
        ("cmd", ["--guidance-scale", "nan"], "--guidance-scale nan: a number"),
        ("cmd", ["--motion.steps", "2", "--respacing", "3"], "--motion-steps 2 and --respacing 3: give one"),
    ],
)
def test_what_a_system_cannot_do_is_one_line(runs: dict[str, Path], system: str, argv: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        found = config(runs[system], *argv)
        SYSTEMS[system].job(found, CPU)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_guidance_that_has_no_condition_is_told(tmp_path: Path) -> None:
    cmd_family.family(tmp_path, clips=dataclasses.replace(cmd_family.CLIPS, classes=()))
    for given_scale, notes in (([], 0), (["--guidance-scale", "4"], 1), (["--guidance-scale", "1"], 0)):
        found = config(tmp_path, *given_scale)
        assert isinstance(found, CMDSampleConfig)
        assert sum("--guidance-scale 4 does nothing" in note for note in CMDSampleJob(found, CPU).notes) == notes


def test_records_of_older_samples_are_still_those_of_the_folder(runs: dict[str, Path], tmp_path: Path) -> None:
    """`mode` was i2v; clips of CMD had no n_frames."""
    picture = tmp_path / "picture.png"
    write_video(tmp_path / "frames", "png", torch.randint(0, 255, (3, 1, 8, 12), dtype=torch.uint8), 1)
    (tmp_path / "frames" / "000000.png").rename(picture)
    line = [runs["hvdm"], "--mode", "image", "--image", picture, "--steps", 2, "--num-videos", 1]
    out = make(tmp_path / "out", *line)
    place = out / "settings.json"
    new = place.read_text()
    place.write_text(new.replace('"mode": "image"', '"mode": "i2v"'))
    before = (out / "000000.mp4").stat().st_mtime_ns
    make(out, *line)
    assert place.read_text() == new and (out / "000000.mp4").stat().st_mtime_ns == before
    short = make(tmp_path / "cmd", runs["cmd"], "--steps", 2, "--num-videos", 1)
    assert "n_frames" not in json.loads((short / "settings.json").read_text())
    with pytest.raises(UserError, match="n_frames"):
        make(short, runs["cmd"], "--steps", 2, "--num-videos", 1, "--num-frames", 2)


def test_pictures_of_vidm_are_a_mode_of_it(runs: dict[str, Path], tmp_path: Path) -> None:
    write_video(tmp_path / "pictures", "png", torch.randint(0, 255, (3, 1, 8, 12), dtype=torch.uint8), 1)
    line = [runs["vidm"], "--image", tmp_path / "pictures", "--steps", 2, "--num-videos", 1, "--num-frames", 2]
    assert contents(make(tmp_path / "a", *line, "--mode", "image")) == contents(make(tmp_path / "b", *line))


# ---- batches


@pytest.mark.parametrize("size", ["1", "3", "auto"])
def test_any_batch_size_gives_the_same_files(runs: dict[str, Path], tmp_path: Path, size: str) -> None:
    line = [runs["pvdm"], "--steps", 2, "--num-videos", 5]
    assert contents(make(tmp_path / "a", *line, "--batch-size", size)) == contents(make(tmp_path / "b", *line, "--batch-size", 2))


def batches_of(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    """The sizes that are tried from here on; more than `limit` samples are too much for the memory."""
    tried: list[int] = []
    generate = ClipSampleJob.generate

    def narrow(self: ClipSampleJob, indices: Sequence[int]) -> dict[str, Tensor]:
        tried.append(len(indices))
        if len(indices) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(self, indices)

    monkeypatch.setattr(ClipSampleJob, "generate", narrow)
    return tried


def test_memory_that_runs_out_halves_the_batch(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [runs["pvdm"], "--steps", 2, "--num-videos", 7]
    whole = contents(make(tmp_path / "whole", *line))
    tried = batches_of(monkeypatch, 2)
    assert contents(make(tmp_path / "out", *line, "--batch-size", 6)) == whole
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1, 1]
    assert "memory does not hold 6 videos, now 3 videos at a time" in capsys.readouterr().err
    batches_of(monkeypatch, 0)
    with pytest.raises(UserError, match="cpu memory does not hold one sample"):
        make(tmp_path / "none", *line)


def test_a_long_video_whose_memory_ran_out_goes_on(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = [runs["pvdm"], "--mode", "long", "--num-frames", 9, "--steps", 2, "--num-videos", 4, "--no-exact"]
    whole = make(tmp_path / "whole", *line, "--batch-size", 1)
    sample_clip, tried = ClipSampleJob.sample_clip, []

    def narrow(self: ClipSampleJob, indices: Sequence[int], clip: int, previous: Tensor | None) -> Tensor:
        tried.append((len(indices), clip))
        if len(indices) > 2 and clip == 1:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return sample_clip(self, indices, clip, previous)

    monkeypatch.setattr(ClipSampleJob, "sample_clip", narrow)
    out = make(tmp_path / "out", *line, "--batch-size", 4)
    assert tried == [(4, 0), (4, 1), (2, 1), (2, 2), (2, 1), (2, 2)], "clips that are there are not made again"
    assert names(out) == names(whole)


def test_batches_grow_while_the_memory_lasts(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = batches_of(monkeypatch, 100)
    make(tmp_path / "free", runs["pvdm"], "--steps", 1, "--num-videos", 20, "--no-exact")
    assert tried == [1, 2, 4, 8, 5]
    tried.clear()
    make(tmp_path / "exact", runs["pvdm"], "--steps", 1, "--num-videos", 6)
    assert tried == [4, 2]


@given(free=st.integers(0, 100), each=st.integers(1, 30), fixed=st.integers(0, 20), processes=st.integers(1, 4), samples=st.integers(1, 40))
def test_batches_that_grow_stay_within_the_memory(free: int, each: int, fixed: int, processes: int, samples: int) -> None:
    """By a device whose use is `fixed` + `each` a sample: no sample is lost, and what is predicted is what is used at most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "available_memory", lambda: free * processes)
        found, left = Batches(None, CPU, processes), samples
        while left:
            size = min(found.size, left)
            patch.setattr(found, "_peak", lambda before, size=size: fixed + each * size)
            assert found.attempt(lambda: None, size)
            left -= size
            assert found.size == 1 or fixed + each * found.size <= max(batches.SHARE * free, fixed + each)
            assert found.size <= batches.MOST["cpu"]


def test_batches_of_a_gpu_grow_by_its_own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds 1000 bytes, of which networks take 300 and a sample 60."""
    used = {"now": 300, "most": 300}
    figures = {
        "memory_allocated": lambda *_: used["now"],
        "memory_reserved": lambda *_: used["now"] + 50,
        "max_memory_allocated": lambda *_: used["most"],
        "mem_get_info": lambda *_: (1000 - used["now"] - 50, 1000),
        "reset_peak_memory_stats": lambda *_: used.update(most=used["now"]),
        "empty_cache": lambda: None,
    }
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, figure)
    found, tried = Batches(None, torch.device("cuda")), []

    def make_batch(limit: int) -> None:
        tried.append(found.size)
        used["most"] = used["now"] + 60 * found.size
        if used["most"] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    done = [found.attempt(lambda limit=limit: make_batch(limit), found.size) for limit in (1000, 1000, 1000, 1000, 500, 1000)]
    # A fifth of the 700 free bytes stays free: 9 samples of 60 are 540 of the 560.
    assert tried == [1, 2, 4, 8, 9, 4] and done == [True] * 4 + [False, True]


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def fail() -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        Batches(4, CPU).attempt(fail, 4)
    assert batches.available_memory() > 0 and batches.resident_memory() > 0


# ---- formats


@pytest.mark.parametrize("mode", [[], ["--mode", "long", "--num-frames", "6"]], ids=["short", "long"])
def test_pictures_hold_the_frames_themselves(runs: dict[str, Path], tmp_path: Path, mode: list[str]) -> None:
    line = [runs["pvdm"], *mode, "--steps", 2, "--num-videos", 2]
    out = make(tmp_path / "out", *line, "--format", "png", "gif", "mp4")
    assert {"000000", "000000.gif", "000000.mp4", "000001", "000001.gif", "000001.mp4", "grid.gif"} - names(out) <= {"grid.gif"}
    assert json.loads((out / "settings.json").read_text())["samples"][1]["file"] == "000001", "of several files the exact ones are measured"
    found, frames = open_videos(out, "--dir2"), 6 if mode else 4
    assert found.is_pictures(0) and found.total(1) == frames
    job = SYSTEMS["pvdm"].job(config(*line), CPU)
    clip = to_uint8(job.generate([1])[""][0]).permute(1, 2, 3, 0).numpy()
    assert np.array_equal(found.read(1, range(4)), clip)
    motion = measure_motion(out, Env.single())
    assert motion["protocol"]["frames"] == "as stored, PNG" and motion["motion"] > 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name[0] == "0"}
    make(out, *line, "--format", "png")
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is there is kept"
    shutil.rmtree(out / "000001")
    make(out, *line, "--format", "png")
    assert np.array_equal(open_videos(out, "--dir2").read(1, range(4)), clip)
    assert names(make(tmp_path / "gif", *line, "--format", "gif")) >= {"000000.gif", "grid.mp4"}


@pytest.mark.parametrize("form", ["mp4", "gif", "png"])
def test_files_of_a_video_count_and_give_back_its_frames(tmp_path: Path, form: Any) -> None:
    """Also frames that are equal, of which a GIF stores one."""
    video = torch.zeros(3, 7, 8, 12, dtype=torch.uint8)
    video[:, 5:] = 200
    path = video_path(tmp_path, "clip", form)
    assert count(path, form, 8) == 0
    for _ in range(2):  # the second replaces the first
        with open_writer(path, form, 8) as writer:
            writer.write(video[:, :3])
            writer.write(video[:, 3:])
        assert writer.frames == count(path, form, 8) == 7
    levels = [frame.mean() for frame in iterate(path, form, 8)]
    assert np.allclose(levels, [0] * 5 + [200] * 2, atol=3)
    with pytest.raises(RuntimeError), open_writer(path, form, 8) as writer:
        writer.write(video[:, :1])
        raise RuntimeError
    assert count(path, form, 8) == 7 and names(tmp_path) == {path.name}


# ---- killed runs


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_the_next_does_not_clear(runs: dict[str, Path], tmp_path: Path) -> None:
    line = [str(runs["pvdm"]), "--mode", "long", "--num-frames", "120", "--num-videos", "1", "--steps", "2", "--format", "mp4", "png"]
    out = tmp_path / "out"
    kept = out / "latents" / "000000"
    interrupt(["sample.py", *line, "--out", out], lambda: (kept / "00003.safetensors").is_file())
    assert {path.suffix for path in out.glob(".*.tmp") if path.is_dir()} and [path for path in out.glob(".*.mp4.*.tmp") if path.is_file()]
    (kept / ".00004.safetensors.01234567.tmp").write_bytes(b"half")
    (out / ".mine.tmp").write_text("not ours")
    make(out, *line)
    (out / ".mine.tmp").unlink()
    assert contents(out) == contents(make(tmp_path / "one", *line))


def test_temporary_files_of_a_run_that_is_there_are_left(tmp_path: Path) -> None:
    (tmp_path / ".a.mp4.0123abcd.tmp").write_text("")
    (tmp_path / "a.mp4").write_text("")
    with writing_alone(tmp_path) as first, writing_alone(tmp_path) as second:
        assert (first, second) == (True, False)
    with writing_alone(tmp_path) as again:
        assert again and remove_temporaries(tmp_path) == 1 and names(tmp_path) == {"a.mp4"}
    with pytest.raises(ConfigError):
        config("--system", "cmd", "--run", tmp_path, "--format")
