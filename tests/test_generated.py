"""Videos that are generated while they are measured: those of sample.py, pixel for pixel, and evaluate.py --run."""

import json
from pathlib import Path

import numpy as np
import pytest

import evaluate
from evaluation.generated import generated_videos
from evaluation.videos import open_videos
from launch.run import parse_launch
from tests import pvdm_exports, vidm_exports
from tests.sampling import CPU, make
from tests.scripted_detectors import ToyI3D, save_script, write_arrays
from utils.errors import ConfigError


@pytest.fixture(scope="module")
def pvdm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pvdm")
    pvdm_exports.family(root)
    return root


@pytest.mark.parametrize("flags", ["--steps 2 --seed 3", "--steps 2 --mode long --num-frames 7", "--steps 2 --num-frames 3"])
def test_they_are_what_sample_writes(pvdm: Path, tmp_path: Path, flags: str) -> None:
    out = make(tmp_path / "out", pvdm, *flags.split(), "--num-videos", 3, "--format", "png")
    written, made = open_videos(out, "--dir2"), generated_videos(str(pvdm), flags, 3, CPU)
    assert len(made) == 3 and not made.is_pictures(0)
    for number in (2, 0, 1):
        total = written.total(number)
        assert made.total(number) == total
        assert np.array_equal(made.read(number, range(total)), written.read(number, range(total)))
    assert np.array_equal(made.read(1, [0, 2]), written.read(1, [0, 2]))


def test_frame_after_frame_too(tmp_path: Path) -> None:
    vidm_exports.family(tmp_path / "runs")
    out = make(tmp_path / "out", tmp_path / "runs", "--steps", 2, "--num-videos", 1, "--format", "png")
    made = generated_videos(str(tmp_path / "runs"), "--steps 2", 1, CPU)
    assert made.total(0) == 6 and np.array_equal(made.read(0, range(6)), open_videos(out, "--dir2").read(0, range(6)))


def test_a_digest_names_what_a_sample_depends_on(pvdm: Path) -> None:
    def digest(flags: str, number: int = 0) -> str:
        return generated_videos(str(pvdm), flags, 3, CPU).digest(number)

    first = digest("--steps 2")
    assert first == digest("--steps 2 --batch-size 3 --num-videos 5")
    assert len({first, digest("--steps 3"), digest("--steps 2 --seed 1"), digest("--steps 2", 1), digest("--steps 2 --num-frames 2")}) == 5


def test_the_figure_is_that_of_the_folder(pvdm: Path, tmp_path: Path) -> None:
    write_arrays(tmp_path / "real", [9, 6, 4, 12, 7])
    save_script(ToyI3D(), tmp_path / "i3d.pt")
    make(tmp_path / "fake", pvdm, "--steps", 2, "--num-videos", 4, "--format", "png")
    common = ["--dir1", tmp_path / "real", "--i3d", tmp_path / "i3d.pt", "--num-videos", 4, "--n-frames", 4]
    sides = {
        "folder": ["--dir2", tmp_path / "fake"],
        "run": ["--run", pvdm, "--sampling=--steps 2"],
        "bare": [pvdm, "--sampling=--steps 2"],
    }
    found = {}
    for name, side in sides.items():
        out = tmp_path / f"{name}.json"
        evaluate.fvd(parse_launch("", [*map(str, (*side, *common)), "--out", str(out)]))
        found[name] = json.loads(out.read_text())
    assert found["run"] == found["bare"] and found["run"]["fvd"] == found["folder"]["fvd"]
    assert "steps" in json.dumps(found["run"]["protocol"]) and str(pvdm) in json.dumps(found["run"]["protocol"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--dir2", "a", "--run", "b"], "which videos"),
        (["--dir2", "a", "--sampling", "steps=2"], "--sampling 'steps=2' goes with --run"),
        (["--run", "{pvdm}", "--sampling=--smapler ddim"], "--sampler"),
    ],
)
def test_mistakes_are_one_line(pvdm: Path, argv: list[str], said: str) -> None:
    line = [part.format(pvdm=pvdm) for part in argv]
    with pytest.raises(ConfigError, match=said):
        evaluate.fvd(parse_launch("", [*line, "--dir1", "x", "--i3d", "y"]))
