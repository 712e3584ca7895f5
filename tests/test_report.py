"""The page that launch.report writes: which runs and which samples are on it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import report
from tests.distributed import ROOT
from utils.errors import UserError
from utils.media import write_gif, write_mp4, write_png


def logged(results: Path, name: str, system: str, stage: str, steps: int, init_from: str = "") -> None:
    """What training leaves for the report; the number of steps is how it is told from others."""
    run = results / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"system: {system}\nstage: {stage}\nmodel: {{init_from: '{init_from}'}}\n")
    lines = [{"step": step, "loss": 1.0 / step} for step in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def sampled(folder: Path, film: bool = False, **settings: Any) -> Path:
    """What sample.py leaves."""
    folder.mkdir()
    video = torch.zeros(3, 2, 8, 8, dtype=torch.uint8)
    if settings.get("mode") == "long":
        write_mp4(folder / "000000.mp4", video, 8.0)
    else:
        write_gif(folder / "000000.gif", video, 8.0)
    if film:
        write_png(folder / "film.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def headings(page: str) -> list[str]:
    return [part.split("</h2>")[0] for part in page.split("<h2>")[1:]]


def test_both_runs_of_pvdms_autoencoder_and_long_videos_beside_short_ones(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    logged(runs, "000-pvdm-autoencoder", "pvdm", "autoencoder", 3)
    logged(runs, "001-pvdm-adversarial", "pvdm", "autoencoder", 4, init_from=str(runs / "000-pvdm-autoencoder" / "export"))
    logged(runs, "002-pvdm-denoiser", "pvdm", "denoiser", 5)
    logged(runs, "003-pvdm-denoiser", "pvdm", "denoiser", 6)
    logged(runs, "004-cmd-content", "cmd", "content", 7)
    short = sampled(tmp_path / "short", system="pvdm", mode="short")
    long = sampled(tmp_path / "long", film=True, system="pvdm", mode="long", num_frames=64)
    page = report.build(runs, [short, long], None)
    assert headings(page) == [
        "Generated clips",
        "Long videos: 64 frames, clip after clip",
        "Triplane autoencoder",
        "Triplane autoencoder: 001-pvdm-adversarial, which went on from 000-pvdm-autoencoder",
        "Denoiser",
    ]
    assert all((f">step {steps}<" in page) == shown for steps, shown in ((3, True), (4, True), (5, False), (6, True), (7, False)))
    assert page.count("data:image/gif") == page.count("data:video/mp4") == 1 and report.FILM in page and report.STRIP not in page
    assert headings(report.build(runs, [short], None))[:2] == ["Generated clips", "Triplane autoencoder"]


def test_of_several_runs_of_one_name_the_newest_is_shown(tmp_path: Path) -> None:
    for number, steps in enumerate((3, 4)):
        logged(tmp_path / "runs", f"00{number}-pvdm-autoencoder", "pvdm", "autoencoder", steps)
    logged(tmp_path / "runs", "002-pvdm-denoiser", "pvdm", "denoiser", 5, init_from="ema_model_850000.pth")
    page = report.build(tmp_path / "runs", [sampled(tmp_path / "out")], None)
    assert headings(page) == ["Generated clips", "Triplane autoencoder", "Denoiser"] and ">step 4<" in page and ">step 3<" not in page


def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    logged(runs, "000-pvdm-autoencoder", "pvdm", "autoencoder", 3)
    with pytest.raises(UserError, match="no run of the denoiser stage"):
        report.build(runs, [sampled(tmp_path / "out", system="pvdm")], None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no GIF"):
        report.build(runs, [tmp_path / "out", tmp_path / "empty"], None)


def test_samples_may_be_given_several_times(tmp_path: Path) -> None:
    logged(tmp_path / "runs", "000-pvdm-denoiser", "pvdm", "denoiser", 3)
    folders = [sampled(tmp_path / name, system="pvdm", mode=name, num_frames=32) for name in ("short", "long")]
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "launch.report", str(tmp_path / "runs"), "--out", str(page)]
    command += [part for folder in folders for part in ("--samples", str(folder))]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert headings(page.read_text()) == ["Generated clips", "Long videos: 32 frames, clip after clip", "Denoiser"]
