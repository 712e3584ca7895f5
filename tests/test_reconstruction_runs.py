"""evaluate.py reconstruct: shard sets, folders and pairs of folders give equal figures, on any number of processes and after a kill."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation import reconstruction
from evaluation.quality import meet
from evaluation.reconstruction import measure_reconstruction
from evaluation.reconstruction_config import ReconstructConfig
from evaluation.store import FeatureStore
from launch.env import Env, Stopped
from metrics import resampling
from metrics.frechet import frechet_distance
from pipelines.latte import LattePipeline
from tests import distributed
from tests.latte_exports import export_vae
from tests.pvdm_exports import export_autoencoder
from tests.scripted_detectors import Pooled, save_script, write_noise, write_pictures
from tests.shard_sets import frames_of, write_set
from utils.errors import ConfigError, UserError
from utils.media import encode_mp4, to_float, to_uint8
from utils.rng import SampleRng

ALONE = Env.single()
CLIPS = 70
"""Three blocks."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The autoencoder is one that draws samples."""
    folder = tmp_path_factory.mktemp("reconstruction")
    export_vae(folder / "ae")
    write_noise(folder / "videos", CLIPS, frames=3)
    save_script(Pooled(), folder / "network.pt")
    return folder


def config(place: Path, **how: Any) -> ReconstructConfig:
    files = {"ae": str(place / "ae"), "data_path": str(place / "videos"), "i3d": str(place / "network.pt")}
    return ReconstructConfig(**{**files, "inception": files["i3d"], "perceptual": "none", "batch_size": 5, "bootstrap": 3, **how})


def plain(figures: dict[str, Any]) -> Any:
    return json.loads(json.dumps(figures))


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Any:
    return plain(measure_reconstruction(config(place, no_cache=True), ALONE))


def blocks_of(cache: Path) -> list[Path]:
    return sorted(cache.glob("features/*/0*.safetensors"))


def killed_on_a_rank(env: Env, place: str, cache: str) -> None:
    """Rank 0 is killed as soon as it has written a block."""
    write = FeatureStore.write

    def killed(self: FeatureStore, *rest: Any) -> None:
        write(self, *rest)
        os.kill(os.getpid(), signal.SIGKILL)

    FeatureStore.write = killed  # type: ignore[method-assign]
    measure_reconstruction(config(Path(place), cache=cache), env)


def test_a_killed_run_goes_on_where_it_was(place: Path, tmp_path: Path, reads: list[int], undisturbed: Any) -> None:
    """On another number of processes; in the end nothing is read again."""
    with pytest.raises(AssertionError, match="-9"):
        distributed.run(killed_on_a_rank, place=str(place), cache=str(tmp_path))
    assert len(blocks_of(tmp_path)) == 1 and not list(tmp_path.rglob("*.tmp"))
    again = config(place, cache=str(tmp_path))
    assert plain(measure_reconstruction(again, ALONE)) == undisturbed
    assert sorted(reads) == list(range(32, CLIPS))
    assert plain(measure_reconstruction(again, ALONE)) == undisturbed and len(reads) == CLIPS - 32


def on_a_rank(env: Env, place: str, cache: str) -> list[Any]:
    """All clips, and 2, of which one rank has none."""
    return [measure_reconstruction(config(Path(place), cache=cache, max_clips=clips), env) for clips in (0, 2)]


def test_two_processes_find_the_same_bits(place: Path, tmp_path: Path, undisturbed: Any) -> None:
    ranks = distributed.run(on_a_rank, place=str(place), cache=str(tmp_path))
    assert ranks == [[undisturbed, plain(measure_reconstruction(config(place, max_clips=2), ALONE))]] * 2


def stopped_on_a_rank(env: Env, place: str) -> list[Any]:
    """Rank 1 is to stop before it meets rank 0 for the third time. Whether the ranks agreed, and distances that this one computed."""
    sets: list[None] = []

    def counted(*sums: Any, **how: Any) -> float:
        sets.append(None)
        return frechet_distance(*sums, **how)

    def stopping(env: Env, times: int) -> None:
        meet(env, 2)
        env.stop.set()
        meet(env, times - 2)

    resampling.frechet_distance, reconstruction.meet = counted, stopping
    try:
        measure_reconstruction(config(Path(place), no_cache=True, max_clips=8, bootstrap=1000), env)
    except Stopped as stopped:
        return [stopped.agreed, len(sets)]
    return [None, len(sets)]


def test_ranks_meet_after_each_resampled_set_and_stop_together(place: Path) -> None:
    """A thousand sets of wide rows take hours, in which nobody is to wait too long for the first rank, nor a signal to be unheard."""
    assert distributed.run(stopped_on_a_rank, place=str(place)) == [[True, 3], [True, 0]]


def test_other_weights_settings_and_code_are_measured_again(
    place: Path, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another autoencoder, figure or network; not another name of the same files, nor another number of resampled sets."""
    export_vae(tmp_path / "other", seed=3)
    how = {"cache": str(tmp_path / "cache"), "max_clips": 4}
    first = measure_reconstruction(config(place, **how), ALONE)
    shutil.copytree(place, tmp_path / "copy")
    for same in (config(tmp_path / "copy", **how), config(place, **how, bootstrap=0)):
        del reads[:]
        assert measure_reconstruction(same, ALONE)["psnr"] == first["psnr"] and not reads
    for other in ({"ae": str(tmp_path / "other")}, {"psnr_per_clip": True}, {"n_frames": 2}, {"inception": ""}):
        del reads[:]
        found = measure_reconstruction(config(place, **{**how, **other}), ALONE)
        assert len(reads) == 4 and (found["psnr"] != first["psnr"]) == ("inception" not in other), other
    monkeypatch.setattr("evaluation.versions.source_sha256", lambda: "mended")
    del reads[:]
    assert measure_reconstruction(config(place, **how), ALONE)["psnr"] == first["psnr"] and len(reads) == 4
    with pytest.raises(ConfigError, match="--precision bf16: autoencoders of single frames run in fp32"):
        measure_reconstruction(config(place, precision="bf16"), ALONE)


def made_elsewhere(place: Path, folder: Path) -> Path:
    """What the autoencoder makes of the videos, as arrays and, of every third, pictures in a folder below."""
    pipeline = LattePipeline.from_exports(ae=str(place / "ae"))
    for number, path in enumerate(sorted((place / "videos").iterdir())):
        video = to_float(torch.from_numpy(np.load(path)).transpose(0, 1)[None])
        made = to_uint8(pipeline.reconstruct(video, SampleRng(0, torch.tensor([number]))))[0].transpose(0, 1).numpy()
        if number % 3:
            folder.mkdir(exist_ok=True)
            np.save(folder / path.name, made)
        else:
            write_pictures(folder / path.stem, made.transpose(0, 2, 3, 1))
    return folder


def on_two_folders(env: Env, place: str, made: str, cache: str) -> Any:
    return measure_reconstruction(config(Path(place), ae="", recon=made, cache=cache), env)


def test_two_folders_are_measured_as_what_made_them(place: Path, tmp_path: Path, undisturbed: Any, reads: list[int]) -> None:
    """Matched by name whatever the form. All is measured in 8 bits; one process and three agree, and a second run reads nothing."""
    made = made_elsewhere(place, tmp_path / "made")
    alone = plain(on_two_folders(ALONE, str(place), str(made), str(tmp_path / "cache")))
    assert len(reads) == 2 * CLIPS
    figures = [name for name, value in undisturbed.items() if isinstance(value, float)]
    assert {"psnr", "ssim", "rfvd", "rfid_low"} <= set(figures)
    # The autoencoder rounds otherwise in batches of another size, which a pixel or two show.
    assert {name: alone[name] for name in figures} == pytest.approx({name: undisturbed[name] for name in figures}, rel=1e-3)
    about = alone["protocol"]
    assert (about["folder"], about["reconstructions"], about["frames"]) == ("videos", "made", 3) and "autoencoder_sha256" not in about
    assert distributed.run(on_two_folders, processes=3, place=str(place), made=str(made), cache=str(tmp_path / "three")) == [alone] * 3
    assert plain(on_two_folders(ALONE, str(place), str(made), str(tmp_path / "cache"))) == alone and len(reads) == 2 * CLIPS
    np.save(made / "001.npy", 255 - np.load(made / "001.npy"))
    assert on_two_folders(ALONE, str(place), str(made), str(tmp_path / "cache"))["psnr"] != alone["psnr"] and len(reads) == 4 * CLIPS


def test_equal_folders_are_equal(place: Path) -> None:
    found = measure_reconstruction(config(place, ae="", recon=str(place / "videos"), max_clips=30, bootstrap=0), ALONE)
    assert (found["psnr"], found["l1"]) == (100.0, 0.0) and found["ssim"] == pytest.approx(1) and abs(found["rfvd"]) < 1e-6


def test_every_pair_that_does_not_match_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_noise(tmp_path / "a" / "deep", 6).parent, tmp_path / "b"
    shutil.copytree(first, second)
    (second / "deep" / "001.npy").unlink()
    (second / "deep" / "002.npy").rename(second / "deep" / "new.npy")
    np.save(second / "deep" / "003.npy", np.zeros((5, 3, 16, 16)))
    np.save(second / "deep" / "004.npy", np.zeros((4, 3, 16, 8)))
    (second / "other").mkdir()
    (second / "deep" / "005.npy").rename(second / "other" / "005.npy")
    with pytest.raises(UserError, match=r"^--recon \(--dir2\) .*b: 7 videos do not match those of --data-path \(--dir1\) .*a \(above\)$"):
        measure_reconstruction(ReconstructConfig(data_path=str(first), recon=str(second), perceptual="none"), ALONE)
    assert capsys.readouterr().err.splitlines() == [
        "mismatch: deep/001.npy has no reconstruction",
        "mismatch: deep/002.npy has no reconstruction",
        "mismatch: deep/005.npy has no reconstruction",
        "mismatch: deep/new.npy has no original",
        "mismatch: other/005.npy has no original",
        "mismatch: deep/003.npy is 4 frames of 16 x 16, its reconstruction 5 frames of 16 x 16",
        "mismatch: deep/004.npy is 4 frames of 16 x 16, its reconstruction 4 frames of 16 x 8",
    ]


def test_videos_that_differ_in_their_suffix_alone_are_matched_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """one.mp4 and one.mkv are two videos; where there is but one.mkv, nothing says of which it was made."""
    video = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    for path in ("a/one.mp4", "a/one.mkv", "b/one.mp4", "b/one.mkv", "c/one.mkv"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(encode_mp4(255 - video if path.endswith("mkv") else video, 8.0))
    settings = ReconstructConfig(data_path=str(tmp_path / "a"), recon=str(tmp_path / "b"), perceptual="none")
    assert measure_reconstruction(settings, ALONE)["psnr"] == 100
    with pytest.raises(UserError, match="3 videos do not match"):
        measure_reconstruction(dataclasses.replace(settings, recon=str(tmp_path / "c")), ALONE)
    assert "mismatch: one.mkv has no original" in capsys.readouterr().err


def test_a_folder_is_measured_as_the_shard_set_of_its_videos(tmp_path: Path) -> None:
    """An autoencoder of clips takes as many frames as it was made for, in its size."""
    export_autoencoder(tmp_path / "ae")
    write_set(tmp_path / "shards", [4, 3], lengths=(5,), size=(16, 16))
    for number in range(7):
        write_pictures(tmp_path / "videos" / f"{number}", frames_of(number, 5, (16, 16)))
    how: dict[str, Any] = {"ae": str(tmp_path / "ae"), "perceptual": "none"}
    one, other = (measure_reconstruction(ReconstructConfig(data_path=str(tmp_path / name), **how), ALONE) for name in ("shards", "videos"))
    assert [one[name] for name in ("psnr", "ssim", "l1", "clips")] == [other[name] for name in ("psnr", "ssim", "l1", "clips")]
    assert other["protocol"]["frames"] == 4 and other["protocol"]["folder"] == "videos" and one["protocol"]["dataset"] == "shards"
    named = ["the first, in the order of the set", "the first by name"]
    assert [found["protocol"]["which"] for found in (one, other)] == named
    write_noise(tmp_path / "large", 2, size=(32, 48))
    large = measure_reconstruction(ReconstructConfig(data_path=str(tmp_path / "large"), **how), ALONE)
    assert large["notes"] == ["videos of 32 x 48 became 16 x 16"] and large["protocol"]["size"] == [16, 16]
    for wrong, words in (({"n_frames": 8}, "--n-frames 8: the autoencoder takes clips of 4"), ({"resolution": 8}, "takes 16 x 16; drop")):
        with pytest.raises(ConfigError, match=words):
            measure_reconstruction(ReconstructConfig(data_path=str(tmp_path / "videos"), **how, **wrong), ALONE)
