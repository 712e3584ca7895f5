"""sample.py and evaluate.py as commands: equal files from any number of processes, resumed output, one-line errors, every clip once."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cmd_family import CLIPS, family
from tests.distributed import command, interrupt, torchrun
from tests.sampling import contents

SETTINGS = ["--num-samples", "7", "--steps", "2", "--seed", "3"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    family(root)
    return root


@pytest.fixture(scope="module")
def samples(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("samples") / "one"
    done = script("sample.py", "--run", str(results), "--out", str(out), *SETTINGS)
    assert done.returncode == 0, done.stdout
    return out


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command, with all that it says in `stdout`."""
    done = command(arguments)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout + done.stderr)


def test_one_file_a_sample_a_grid_and_the_settings(samples: Path) -> None:
    record = json.loads((samples / "settings.json").read_text())
    assert [entry["file"] for entry in record["samples"]] == [f"{i:06d}-class{i % 3:03d}.mp4" for i in range(7)]
    assert record["samples"][1]["class_name"] == "two"
    assert record["seed"] == 3 and record["content"]["steps"] == 2 and len(record["sha256"]["motion"]) == 64
    assert set(contents(samples)) == {entry["file"] for entry in record["samples"]} | {
        "settings.json",
        "grid.mp4",
        "grid.png",
        "index.html",
    }


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "batch"), [(2, 1), (3, 2)])
def test_processes_and_batches_change_no_byte(samples: Path, results: Path, tmp_path: Path, processes: int, batch: int) -> None:
    """7 samples do not divide by the processes: none is lost, none is made twice. Two are started by torchrun itself."""
    out = tmp_path / "out"
    arguments = ["sample.py", str(results), "--out", str(out), "--batch-size", str(batch), *SETTINGS]
    done = torchrun(arguments) if processes == 2 else command(arguments, processes)
    assert done.returncode == 0, done.stdout + (done.stderr or "")
    assert contents(out) == contents(samples)


def test_samples_that_are_there_are_kept_and_missing_ones_made(samples: Path, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(samples, out)
    missing, kept = out / "000004-class001.mp4", out / "000002-class002.mp4"
    missing.unlink()
    before = kept.stat().st_mtime_ns
    done = script("sample.py", "--run", str(results), "--out", str(out), *SETTINGS)
    assert done.returncode == 0 and "6 were there already" in done.stdout
    assert kept.stat().st_mtime_ns == before
    assert contents(out) == contents(samples)


@pytest.mark.slow
def test_a_stopped_run_goes_on(samples: Path, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["sample.py", "--run", str(results), "--out", str(out), "--batch-size", "1", *SETTINGS]
    status = interrupt(line, lambda: list(out.glob("*.mp4")), signal.SIGTERM)
    assert status in (75, 0), status  # 0: it was through before the signal came
    assert script(*line).returncode == 0
    assert contents(out) == contents(samples)


def test_other_settings_are_not_mixed_in(samples: Path, results: Path) -> None:
    done = script("sample.py", "--run", str(results), "--out", str(samples), *SETTINGS, "--seed", "4")
    assert done.returncode == 1
    assert done.stdout.strip().startswith("error:") and "seed differ" in done.stdout and "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["sample.py"], 2, "--run"),
        (["sample.py", "--run", "nowhere"], 1, "no such folder"),
        (["sample.py", "nowhere", "--steps", "2"], 1, "--run nowhere: no such folder"),
        (["sample.py", "--run", "{results}", "--classes", "nine", "--out", "{tmp}"], 1, "no such class"),
        (["sample.py", "--run", "{results}", "--smapler", "ddim"], 2, "--sampler"),
        (["evaluate.py", "reconstruckt"], 2, "reconstruct"),
        (["evaluate.py", "reconstruct", "--ae", "a", "--data-path", "b", "--max-clips", "-3"], 2, "--max-clips -3"),
        (["evaluate.py", "reconstruct", "--ae", "{results}/000-cmd-autoencoder"], 2, "--data-path"),
        (["evaluate.py", "reconstruct", "--ae", "{results}/000-cmd-autoencoder", "--data-path", "{results}"], 1, "holds no videos"),
    ],
)
def test_mistakes_are_one_line(results: Path, tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    done = script(*(part.format(results=results, tmp=tmp_path / "out") for part in arguments))
    lines = done.stdout.strip().splitlines()
    assert (done.returncode, len(lines)) == (status, 1), done.stdout
    assert words in lines[0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shards"
    sizes = ["--image-size", *map(str, CLIPS.image_size), "--clip-length", str(CLIPS.n_frames)]
    done = script("preprocess.py", "shards", "--dataset-name", "synthetic-digits", "--num-videos", "5", "--out", str(out), *sizes)
    assert done.returncode == 0, done.stdout
    return out


def test_reconstruction_figures_count_every_clip_once(results: Path, shards: Path, tmp_path: Path) -> None:
    """An odd number of clips on one and on two processes gives the same figures, and another batch size too."""
    arguments = ["evaluate.py", "reconstruct", "--ae", str(results / "000-cmd-autoencoder"), "--data-path", str(shards), "--max-clips", "7"]
    hidden = {"TORCH_HOME": str(tmp_path)}
    two = torchrun([*arguments, "--out", str(tmp_path / "two.json")], 2, **hidden)
    assert two.returncode == 0, two.stdout
    assert "lpips-alex is left out" in two.stdout and two.stdout.count("left out") == 1
    one = script(*arguments, "--out", str(tmp_path / "one.json"), "--batch-size", "3", "--perceptual", "none")
    assert one.returncode == 0 and "psnr" in one.stdout and "left out" not in one.stdout
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    for name in ("psnr", "ssim", "l1"):
        assert first[name] == pytest.approx(second[name], rel=1e-6)
    assert first["clips"] == second["clips"] == 7
    assert second["protocol"]["perceptual"] == "none: weights missing"
    assert first["protocol"]["frames"] == 4 and first["protocol"]["size"] == [16, 24]
