"""evaluate.py reconstruct: which clips are measured, of which sizes and lengths; settings that cannot work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluate
from evaluation.reconstruction import measure_reconstruction
from evaluation.reconstruction_config import ReconstructConfig
from evaluation.videos import FolderVideos
from launch.env import Env
from launch.run import parse_launch
from tests import distributed
from tests.latte_exports import export_vae
from tests.pvdm_exports import export_autoencoder
from tests.scripted_detectors import write_noise
from tests.shard_sets import write_set
from utils.errors import ConfigError

ALONE = Env.single()


def test_videos_of_several_sizes_and_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of lengths that differ 16 frames are taken; sizes that differ have to become one, and are told."""
    write_noise(tmp_path / "a", 2, frames=20)
    np.save(tmp_path / "a" / "x.npy", np.full((17, 3, 24, 16), 40, dtype=np.uint8))
    np.save(tmp_path / "a" / "y.npy", np.full((3, 3, 16, 16), 40, dtype=np.uint8))
    how = {"data_path": str(tmp_path / "a"), "recon": str(tmp_path / "a"), "perceptual": "none"}
    with pytest.raises(ConfigError, match=r"videos of 2 sizes \(16 x 16, 24 x 16\); say --resolution"):
        measure_reconstruction(ReconstructConfig(**how), ALONE)
    found = measure_reconstruction(ReconstructConfig(**how, resolution=16, stride=2, n_frames=8), ALONE)
    assert (found["clips"], found["protocol"]["frames"], found["protocol"]["stride"]) == (3, 8, 2)
    found = measure_reconstruction(ReconstructConfig(**how, resolution=16), ALONE)
    assert (found["clips"], found["protocol"]["frames"], found["psnr"]) == (3, 16, 100.0)
    assert found["notes"] == ["1 videos are shorter than the clips, and left out"] and "note: 1 videos" in capsys.readouterr().err


def on_mixed_videos(env: Env, place: str, cache: str) -> list[Any]:
    """Notes of an autoencoder of clips; sizes of clips as one of single frames takes them, of all and without the one of another size."""
    how: dict[str, Any] = {"data_path": f"{place}/mixed", "perceptual": "none", "cache": cache}
    found = measure_reconstruction(ReconstructConfig(ae=f"{place}/pvdm", **how), env)
    try:
        measure_reconstruction(ReconstructConfig(ae=f"{place}/latte", **how, n_frames=4), env)
    except ConfigError as error:
        refused = str(error)
    square = measure_reconstruction(ReconstructConfig(ae=f"{place}/latte", **how, n_frames=4, resolution=16), env)
    same = measure_reconstruction(ReconstructConfig(ae=f"{place}/latte", **how, n_frames=5), env)
    return [found["notes"], refused, square["notes"], same["protocol"]["size"]]


def test_sizes_of_all_clips_are_looked_at(tmp_path: Path) -> None:
    """Not only that of the first: what was resized is counted, and autoencoders that take any size have to be told one."""
    export_autoencoder(tmp_path / "pvdm")
    export_vae(tmp_path / "latte")
    write_noise(tmp_path / "mixed", 1, frames=4)
    np.save(tmp_path / "mixed" / "x.npy", np.full((5, 3, 32, 16), 40, dtype=np.uint8))
    np.save(tmp_path / "mixed" / "y.npy", np.full((5, 3, 32, 16), 80, dtype=np.uint8))
    notes, refused, square, size = on_mixed_videos(ALONE, str(tmp_path), str(tmp_path / "cache"))
    assert notes == ["2 of 3 videos of 32 x 16 became 16 x 16"]
    assert "videos of 2 sizes (16 x 16, 32 x 16); say --resolution" in refused
    assert square[0] == "2 of 3 videos of 32 x 16 became 16 x 16" and size == [32, 16]
    ranks = distributed.run(on_mixed_videos, place=str(tmp_path), cache=str(tmp_path / "two"))
    assert ranks == [[notes, refused, square, size]] * 2


def test_only_videos_that_may_be_measured_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_vae(tmp_path / "ae")
    write_noise(tmp_path / "videos", 6, frames=3)
    settings = ReconstructConfig(ae=str(tmp_path / "ae"), data_path=str(tmp_path / "videos"), perceptual="none", max_clips=3)
    opened: list[int] = []
    total = FolderVideos.total
    monkeypatch.setattr(FolderVideos, "total", lambda self, number: opened.append(number) or total(self, number))
    assert measure_reconstruction(settings, ALONE)["protocol"]["frames"] == 3
    assert set(opened) == {0, 1, 2}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data-path", "a"], "which autoencoder"),
        (["--recon", "a"], r"--data-path \(--dir1\) FOLDER"),
        (["--dir1", "a", "--dir2", "b", "--ae", "c"], "--ae c: no autoencoder runs with --recon \\(--dir2\\)"),
        (["--dir1", "a", "--dir2", "b", "--weights", "model"], "--weights model: no autoencoder"),
        (["--dir1", "a", "--dir2", "b", "--stride", "0"], "--stride 0: at least 1"),
        (["--dir1", "a", "--dir2", "b", "--bootstrap", "-1"], "--bootstrap -1: 0, or at least 20"),
        (["--dir1", "a", "--dir2", "b", "--bootstrap", "19"], "--bootstrap 19: 0, or at least 20"),
        (["--dir1", "a", "--dir2", "b", "--perceptual", "none", "--perceptual-weights", "c"], "--perceptual-weights c: --perceptual none"),
        (["--dir1", "a", "--dir2", "b", "--cache", "c", "--no-cache"], "--cache c: --no-cache neither"),
        (["--dir1", "a", "--ae", "b.pt", "--scale-factor", "2"], "--scale-factor 2.0: it is of latents between --ae and --vae"),
        (["--dir1", "a", "--vae", "b", "--scale-factor", "2"], "--scale-factor 2.0: it is of latents between --ae and --vae"),
        (["--dir1", "a", "--vae", "b", "--weights", "model"], "--weights model: --vae b has one kind of weights"),
        (["--dir1", "a", "--ae", "b.pt", "--weights", "model"], "--weights model: b.pt has one kind of weights"),
    ],
)
def test_settings_that_cannot_work_are_one_line(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        evaluate.reconstruct(parse_launch("", flags))


def test_shard_sets_are_no_pairs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_set(tmp_path / name, [2])
    with pytest.raises(ConfigError, match="matched by name, of two folders of videos; one of these is a shard set"):
        measure_reconstruction(ReconstructConfig(data_path=str(tmp_path / "a"), recon=str(tmp_path / "b")), ALONE)
