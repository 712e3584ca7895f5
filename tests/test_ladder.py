"""evaluate.py ladder: reconstruction, motion given true content and full generation upon the same real clips."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
from evaluation.clips import Clips, choose_clips
from evaluation.generated import GeneratedVideos, open_job
from evaluation.ladder import LadderConfig, measure_ladder
from evaluation.protocols import PROTOCOLS
from evaluation.rungs import RungVideos, labels_of, rungs_of
from evaluation.videos import open_videos
from launch.env import Env
from launch.run import parse_launch
from pipelines.cmd import CMDPipeline
from pipelines.cmd_sample import CMDSampleJob
from tests import cmd_family, distributed, hvdm_exports, latte_exports, pvdm_exports, vidm_exports
from tests.sampling import CPU
from tests.scripted_detectors import ToyI3D, save_script, write_arrays
from tests.shard_sets import frames_of, write_set
from utils.errors import ConfigError, UserError
from utils.media import to_float, to_uint8

ALONE = Env.single()
CLIPS = 40
"""Two blocks."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ladder")
    cmd_family.family(folder / "runs")
    write_set(folder / "shards", [20, 25], lengths=(6,), size=(16, 24), classes=("three", "one", "two"))
    save_script(ToyI3D(), folder / "i3d.pt")
    return folder


def config(place: Path, **how: Any) -> LadderConfig:
    files = {"run": str(place / "runs"), "data_path": str(place / "shards"), "i3d": str(place / "i3d.pt")}
    return LadderConfig(**{**files, "num_videos": CLIPS, "steps": 2, **how})


def real_clips(place: Path, count: int = CLIPS) -> Clips:
    videos = open_videos(place / "shards", "--data-path")
    return choose_clips(videos, PROTOCOLS["stylegan-v"], "real", ALONE, count=count, frames=4, size=(16, 24), seed=0)


def made(place: Path, real: Clips, *flags: str) -> dict[str, RungVideos]:
    job, _ = open_job(str(place / "runs"), ["--steps", "2", *flags], CPU)
    assert isinstance(job, CMDSampleJob)
    labels = labels_of(real, job.pipeline.classes, 3)
    return {name: RungVideos(real, name, rung, CPU, labels if rung.classes else None) for name, rung in rungs_of(job)[0].items()}


def test_three_figures_upon_the_same_clips(place: Path) -> None:
    """Each is what `evaluate.py fvd` says of that rung's videos."""
    found = measure_ladder(config(place), ALONE)
    assert [name for name in found if name.startswith("fvd_")] == ["fvd_reconstruction", "fvd_motion", "fvd_full"]
    assert [one["protocol"]["id"] for one in found["rungs"].values()] == [f"fvd{CLIPS}_4f_{name}" for name in found["rungs"]]
    assert len({one["protocol"]["real"]["content_sha256"] for one in found["rungs"].values()}) == 1
    assert {one["fvd"] for one in found["rungs"].values()} == {found[f"fvd_{name}"] for name in found["rungs"]}
    out = place / "full.json"
    line = ["--dir1", place / "shards", "--run", place / "runs", "--i3d", place / "i3d.pt", "--sampling=--steps 2", "--out", out]
    evaluate.fvd(parse_launch("", [*map(str, line), "--num-videos", str(CLIPS), "--n-frames", "4"]))
    assert json.loads(out.read_text())["fvd"] == found["fvd_full"]
    truth = real_clips(place)
    for name, videos in made(place, truth).items():
        arrays = place / name
        arrays.mkdir()
        for number in range(CLIPS):
            np.save(arrays / f"{number:03d}.npy", videos.read(number, range(4)).transpose(0, 3, 1, 2))
        line = ["--dir1", place / "shards", "--dir2", arrays, "--i3d", place / "i3d.pt", "--out", out]
        evaluate.fvd(parse_launch("", [*map(str, line), "--num-videos", str(CLIPS), "--n-frames", "4"]))
        assert json.loads(out.read_text())["fvd"] == found[f"fvd_{name}"]


def test_the_rungs_are_the_pipeline_s(place: Path) -> None:
    """The clip that is encoded, the class by name, and noise by the number of the stored clip."""
    real = real_clips(place, 5)
    rungs = made(place, real, "--seed", "3", "--motion.steps", "1")
    pipeline = CMDPipeline.from_exports(*(place / "runs" / name for name in ("000-cmd-autoencoder", "001-cmd-content", "002-cmd-motion")))
    job, _ = open_job(str(place / "runs"), ["--steps", "2", "--motion.steps", "1"], CPU)
    assert isinstance(job, CMDSampleJob)
    for row in (3, 0):
        number, first = real.numbers[row], real.picks[row][0]
        clip = torch.from_numpy(frames_of(number, 6, (16, 24))[first : first + 4]).permute(3, 0, 1, 2)[None]
        content, motion = pipeline.encode(to_float(clip))
        drawn = pipeline.animate(content, [number], [(2, 0, 1)[number % 3]], seed=3, motion=job.motion)
        for name, wanted in {"reconstruction": pipeline.decode(content, motion), "motion": drawn}.items():
            assert np.array_equal(rungs[name].read(row, range(4)), to_uint8(wanted)[0].permute(1, 2, 3, 0).numpy()), name


def test_a_digest_names_what_a_rung_depends_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the code, of generated videos too."""

    def digests(*flags: str) -> dict[str, str | None]:
        return {name: videos.digest(0) for name, videos in made(place, real_clips(place), *flags).items()}

    first, other_motion, other_content = digests(), digests("--motion.steps", "1"), digests("--content.steps", "1")
    assert len(set(first.values())) == 2 and None not in first.values()
    assert other_content == first
    assert other_motion["reconstruction"] == first["reconstruction"] and other_motion["motion"] != first["motion"]
    ae = place / "runs" / "000-cmd-autoencoder"
    other = cmd_family.export(cmd_family.content_task(ae), tmp_path / "content", 5)
    assert digests("--content", str(other)) == first
    rungs = made(place, real_clips(place))
    assert len({videos.digest(number) for videos in rungs.values() for number in range(CLIPS)}) == 2 * CLIPS
    generated = GeneratedVideos(*open_job(str(place / "runs"), [], CPU), 1).digest(0)
    monkeypatch.setattr("evaluation.versions.source_sha256", lambda: "mended")
    mended = digests()
    assert not set(mended.values()) & set(first.values())
    assert GeneratedVideos(*open_job(str(place / "runs"), [], CPU), 1).digest(0) != generated


def test_a_second_run_generates_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one with other content steps reconstruct again."""
    first = measure_ladder(config(place, cache=str(tmp_path)), ALONE)
    read: list[str] = []
    plain = RungVideos.read
    monkeypatch.setattr(RungVideos, "read", lambda self, number, picks: (read.append(self._name), plain(self, number, picks))[1])
    assert measure_ladder(config(place, cache=str(tmp_path)), ALONE) == first and not read
    measure_ladder(config(place, cache=str(tmp_path), steps=0, sampling="--content.steps 2 --motion.steps 1"), ALONE)
    assert read == ["motion"] * CLIPS


def on_a_rank(env: Env, place: str, cache: str) -> dict[str, Any]:
    return measure_ladder(config(Path(place), cache=cache, bootstrap=2), env)


def test_two_processes_find_the_same_bits(place: Path, tmp_path: Path) -> None:
    alone = json.loads(json.dumps(on_a_rank(ALONE, str(place), str(tmp_path / "one"))))
    assert distributed.run(on_a_rank, place=str(place), cache=str(tmp_path / "two")) == [alone, alone]


FAMILIES = {"pvdm": pvdm_exports.family, "hvdm": hvdm_exports.family, "latte": latte_exports.family, "vidm": vidm_exports.family}
SIZES = {"pvdm": (16, 16), "hvdm": (16, 16), "latte": (8, 12), "vidm": (8, 12)}


@pytest.mark.parametrize("system", FAMILIES)
def test_other_systems_have_the_rungs_that_make_sense(place: Path, tmp_path: Path, system: str) -> None:
    FAMILIES[system](tmp_path / "runs")
    write_set(tmp_path / "shards", [5], lengths=(8,), size=SIZES[system])
    found = measure_ladder(config(tmp_path, i3d=str(place / "i3d.pt"), num_videos=5, steps=1), ALONE)
    there, lacking = ("motion", "reconstruction") if system == "vidm" else ("reconstruction", "motion")
    assert list(found["rungs"]) == [there, "full"] and list(found["protocol"]["left out"]) == [lacking]
    assert f"fvd_{lacking}" not in found and found["rungs"]["full"]["generated_videos"] == 5


def test_videos_of_vidm_begin_at_true_frames(tmp_path: Path) -> None:
    vidm_exports.family(tmp_path / "runs")
    write_set(tmp_path / "shards", [3], lengths=(8,), size=(8, 12))
    job, _ = open_job(str(tmp_path / "runs"), ["--steps", "1", "--num-frames", "3"], CPU)
    videos = open_videos(tmp_path / "shards", "--data-path")
    real = choose_clips(videos, PROTOCOLS["stylegan-v"], "real", ALONE, count=3, frames=3, size=(8, 12), seed=0)
    found = RungVideos(real, "motion", rungs_of(job)[0]["motion"], CPU, None).read(1, range(3))
    truth = real.read(1).permute(1, 2, 3, 0).numpy()
    assert np.array_equal(found[0], truth[0]) and not np.array_equal(found[1], truth[1])


def test_real_clips_are_as_far_apart_as_in_training(place: Path, tmp_path: Path) -> None:
    ae = latte_exports.export_vae(tmp_path / "runs" / "000-latte-autoencoder")
    data = latte_exports.DATA | {"frame_interval": 2}
    latte_exports.export_denoiser(tmp_path / "runs" / "001-latte-denoiser", latte_exports.identity(ae), data=data)
    write_set(tmp_path / "shards", [5], lengths=(8,), size=(8, 12))
    how = {"i3d": str(place / "i3d.pt"), "num_videos": 5, "steps": 1}
    about = measure_ladder(config(tmp_path, **how), ALONE)["protocol"]
    assert about["real"]["stride"] == 2 and about["full"]["generated"]["stride"] == 1
    assert measure_ladder(config(tmp_path, **how, real_stride=1), ALONE)["protocol"]["real"]["stride"] == 1


def test_a_table_and_a_file(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Notes of the real clips are printed once, and the settings are taken back."""
    files = ["--run", place / "runs", "--data-path", place / "shards", "--i3d", place / "i3d.pt"]
    line = [*map(str, files), "--num-videos", "50", "--steps", "1", "--out", str(tmp_path / "l.json"), "--markdown", str(tmp_path / "l.md")]
    evaluate.ladder(parse_launch("", line))
    shown = capsys.readouterr()
    assert shown.err.count("note: 45 real videos, --num-videos 50 were asked for") == 1
    assert "fvd_motion" in shown.out and "content frames of real clips, generated motion" in shown.out
    rows = (tmp_path / "l.md").read_text().splitlines()
    named = [row.split("|")[1].strip() for row in rows[2:]]
    assert named == ["fvd45_4f_reconstruction", "fvd45_4f_motion", "fvd45_4f_full"]
    assert json.loads((tmp_path / "l.json").read_text())["rungs"]["motion"]["fvd"] > 0
    evaluate.ladder(parse_launch("", [*line, "--print-config"]))
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    evaluate.ladder(parse_launch("", ["--config", str(tmp_path / "again.yaml"), "--print-config"]))
    assert capsys.readouterr().out == (tmp_path / "again.yaml").read_text()


def test_there_is_no_flag_for_what_the_networks_decide(place: Path) -> None:
    for flag in ("--dir1", "--dir2", "--preset", "--stride", "--resolution"):
        with pytest.raises(ConfigError, match=f"unknown flag '{flag}'"):
            evaluate.ladder(parse_launch("", [flag, "1"]))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"run": ""}, "which networks"),
        ({"data_path": ""}, "upon which clips"),
        ({"i3d": ""}, "by which network"),
        ({"steps": -1}, "--steps -1: at least 1"),
        ({"protocol": "release"}, "--protocol release: known are stylegan-v, pvdm, videomae"),
    ],
)
def test_settings_that_cannot_work(place: Path, how: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(place, **how).validate()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"n_frames": 3}, "--n-frames 3: the autoencoder takes clips of 4"),
        ({"n_frames": 5}, "--num-frames 5: clips of CMD have 4"),
        ({"real_stride": 9}, r"28 frames \(4, 9 apart\)"),
        ({"data_path": "{folder}"}, "has no class, of which the networks know 3"),
        ({"data_path": "{other}"}, "is of the class 'four', which is none of the 3"),
        ({"sampling": "--mode long --num-frames 9"}, "--mode long is not for CMD"),
        ({"sampling": "--smapler ddim"}, "--sampler"),
    ],
)
def test_mistakes_are_one_line(place: Path, tmp_path: Path, how: dict[str, Any], said: str) -> None:
    write_arrays(tmp_path / "folder", [6, 6], size=(16, 24))
    write_set(tmp_path / "other", [3], lengths=(6,), size=(16, 24), classes=("one", "four"))
    named = {
        name: value.format(folder=tmp_path / "folder", other=tmp_path / "other") if name == "data_path" else value
        for name, value in how.items()
    }
    with pytest.raises(UserError, match=said) as caught:
        measure_ladder(config(place, **named), ALONE)
    assert len(str(caught.value).splitlines()) == 1


def test_long_videos_have_no_ladder(place: Path, tmp_path: Path) -> None:
    pvdm_exports.family(tmp_path / "runs")
    with pytest.raises(ConfigError, match="as long as in training: no --mode long"):
        measure_ladder(config(place, run=str(tmp_path / "runs"), sampling="--mode long --num-frames 7"), ALONE)
