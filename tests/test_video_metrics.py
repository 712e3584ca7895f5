"""evaluate.py fvd and vis: what the networks are given, the figures, the protocol beside them, ranks, and the commands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import evaluate
from evaluation.quality import measure_fvd, measure_vis
from evaluation.settings import FvdConfig, VisConfig
from launch.env import Env
from launch.run import parse_launch
from metrics.detectors import Detector
from metrics.frechet import Moments, frechet_distance
from metrics.i3d import I3D, load_i3d
from metrics.inception_score import inception_score, probabilities
from tests import distributed
from tests.scripted_detectors import Long, Maps, ToyC3D, ToyI3D, level, save_script, write_arrays
from utils.errors import ConfigError, UserError

ALONE = Env.single()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real and generated videos, of which a real one is too short, and networks."""
    folder = tmp_path_factory.mktemp("metrics")
    write_arrays(folder / "real", [9, 6, 4, 12, 3, 7, 8, 5, 11])
    write_arrays(folder / "fake", [4, 5, 6, 7, 8, 9, 10], first=20)
    for name, net in (("i3d", ToyI3D()), ("c3d", ToyC3D()), ("maps", Maps()), ("long", Long())):
        save_script(net, folder / f"{name}.pt")
    return folder


def fvd_config(place: Path, **how: Any) -> FvdConfig:
    names = {"dir1": str(place / "real"), "dir2": str(place / "fake"), "i3d": str(place / "i3d.pt")}
    return FvdConfig(**{**names, "n_frames": 4, "num_videos": 7, **how})


def vis_config(place: Path, **how: Any) -> VisConfig:
    return VisConfig(**{"dir2": str(place / "fake"), "c3d": str(place / "c3d.pt"), "n_frames": 4, "num_videos": 7, "splits": 3, **how})


def features(levels: np.ndarray, low: float = -1.0, high: float = 1.0) -> Tensor:
    """What ToyI3D says of constant frames (videos, frames)."""
    frames = torch.from_numpy(levels).double() / 255 * (high - low) + low
    return torch.stack([frames[:, 0], frames[:, -1], frames.mean(dim=1), frames.mean(dim=1)], dim=1)


def distance(first: Tensor, second: Tensor, *, unbiased: bool = False) -> float:
    sets = []
    for rows in (first, second):
        sets.append(Moments(rows.shape[1]))
        sets[-1].update(rows)
    return frechet_distance(*sets, unbiased=unbiased)


# ---- what the networks are given


def test_the_network_gets_pixels_that_it_scales_itself(place: Path) -> None:
    """0..255 with rescale, resize and return_features, which is the same as [-1, 1]; VIDM's scripts gave [0, 1]."""
    videos = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = Detector(place / "i3d.pt", features=True)
    assert plain.options == {"rescale": True, "resize": True, "return_features": True}
    expected = (videos.double() / 127.5 - 1).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(plain(videos)[:, 3].double(), expected, rtol=0, atol=1e-6)
    release = Detector(place / "i3d.pt", features=True, unit_range=True)
    torch.testing.assert_close(release(videos)[:, 3].double(), (expected + 1) / 2, rtol=0, atol=1e-6)
    assert plain.identity()["pixels"] == "0..255" and release.identity()["pixels"] == "[0, 1]"
    assert Detector(place / "i3d.pt", features=False)(videos).sum(dim=1).allclose(torch.ones(2))
    assert Detector(place / "c3d.pt", features=False).options == {}


def test_weights_of_our_i3d_are_a_network_too(tmp_path: Path) -> None:
    save_file({name: value for name, value in I3D(5).state_dict().items() if value.ndim}, tmp_path / "i3d.safetensors")
    detector = Detector(tmp_path / "i3d.safetensors", features=True, weights=load_i3d)
    assert detector(torch.zeros(1, 3, 9, 8, 12, dtype=torch.uint8)).shape == (1, 5) and detector.identity()["kind"] == "i3d"
    with pytest.raises(UserError, match="classifies videos"):
        Detector(tmp_path / "i3d.safetensors", features=False)


@pytest.mark.parametrize(
    ("name", "frames", "words"),
    [
        ("gone", 4, "no such file"),
        ("maps", 4, r"maps.pt gives \[2, 4, 8, 8\] for 2 videos of 4 frames, 8 x 8"),
        ("long", 4, "long.pt cannot take videos of 4 frames, 8 x 8"),
    ],
)
def test_networks_that_do_not_fit_are_told_in_one_line(place: Path, name: str, frames: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        Detector(place / f"{name}.pt", features=True)(torch.zeros(2, 3, frames, 8, 8, dtype=torch.uint8))
    assert "\n" not in str(error.value)


class Broken(torch.nn.Module):
    """Gives no numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean(dim=(2, 3, 4)) * float("nan")


def test_a_network_of_no_numbers_is_told(tmp_path: Path) -> None:
    save_script(Broken(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt gives numbers that are not finite for videos of 4 frames, 8 x 8"):
        Detector(tmp_path / "a.pt", features=True)(torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8))


def test_a_damaged_network_is_told_in_one_line(place: Path, tmp_path: Path) -> None:
    whole = (place / "i3d.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.pt"):
        Detector(tmp_path / "a.pt", features=True)


# ---- FVD


def test_fvd_is_the_distance_of_the_features(place: Path) -> None:
    """Real clips from drawn frames on, generated ones from frame 0; the short real one is left out, and said so."""
    found = measure_fvd(fvd_config(place, num_videos=9, batch_size=3), ALONE)
    assert found["notes"] == [
        "8 real videos, --num-videos 9 were asked for, 1 shorter than 4 frames left out",
        "7 generated videos, --num-videos 9 were asked for",
    ]
    assert (found["real_videos"], found["generated_videos"]) == (8, 7)
    assert found["protocol"]["real"]["window"] == "consecutive frames, random offset (seed 0)"
    assert found["protocol"]["generated"]["window"] == "consecutive frames, from frame 0"
    assert len({measure_fvd(fvd_config(place, seed=seed), ALONE)["fvd"] for seed in range(4)}) == 4
    exact = measure_fvd(fvd_config(place, dir1=str(write_arrays(place / "exact", [4] * 6))), ALONE)
    real, fake = (np.array([[level(video, frame) for frame in range(4)] for video in videos]) for videos in (range(6), range(20, 27)))
    assert exact["fvd"] == pytest.approx(distance(features(real), features(fake)), rel=1e-5) and exact["fvd"] > 1
    assert exact["protocol"]["id"] == "fvd7_4f"


def test_the_releases_protocol_is_as_its_scripts_read(place: Path) -> None:
    """Spread frames and [0, 1]; it says that its figure compares with none."""
    config = fvd_config(place, protocol="release", resolution=8, num_videos=3, dir1=str(place / "real"), n_frames=2)
    found = measure_fvd(config, ALONE)
    lengths = {"real": [9, 6, 4], "fake": [4, 5, 6]}
    rows = {
        name: features(np.array([[level(first + v, i * t // 2) for i in range(2)] for v, t in enumerate(lengths[name])]), 0.0)
        for name, first in (("real", 0), ("fake", 20))
    }
    assert found["fvd"] == pytest.approx(distance(rows["real"], rows["fake"], unbiased=True), rel=1e-4)
    assert "compares with no published one" in found["notes"][0]
    assert found["protocol"]["detector"]["options"]["rescale"] is False
    assert found["protocol"]["id"] == "fvd3_2f_release", "a published name would stand for the published protocol"
    defaults = FvdConfig(protocol="release")
    assert (defaults.frames, defaults.size) == (128, (256, 256)) and (FvdConfig().frames, FvdConfig().size) == (16, None)


def test_a_singular_covariance_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = measure_fvd(fvd_config(place, num_videos=4), ALONE)
    assert "4 videos and 4 features: a covariance is singular" in few["notes"][-1]
    assert "note: 4 videos and 4 features" in capsys.readouterr().err
    assert not measure_fvd(fvd_config(place), ALONE)["notes"][1:]


# ---- VIS


def test_vis_is_the_score_of_shuffled_videos_whatever_the_batch(place: Path) -> None:
    """7 videos in 3 splits: neither they nor the batches divide each other. The release does not shuffle."""
    levels = torch.tensor([[level(20 + video, frame) for frame in range(4)] for video in range(7)])
    probs = probabilities(ToyC3D()(levels[:, None, :, None, None]))
    expected = inception_score(probs[torch.from_numpy(np.random.RandomState(42).permutation(7))], 3)
    for batch in (1, 2, 5, 7, 32):
        found = measure_vis(vis_config(place, batch_size=batch), ALONE)
        assert (found["vis"], found["vis_std"]) == pytest.approx(expected, rel=1e-5)
    assert found["protocol"]["shuffle"] == "RandomState(42)" and found["protocol"]["outputs"] == "logits"
    assert found["protocol"]["id"] == "isv7_4f" and expected != pytest.approx(inception_score(probs, 3), rel=1e-3)
    release = measure_vis(vis_config(place, protocol="release", resolution=8, c3d=str(place / "i3d.pt")), ALONE)
    assert release["protocol"]["shuffle"] == "none" and release["protocol"]["outputs"] == "probabilities"
    assert release["protocol"]["id"] == "isv7_4f_release"
    with pytest.raises(UserError, match="7 videos cannot be 10 splits"):
        measure_vis(vis_config(place, num_videos=20, splits=10), ALONE)


def test_every_video_is_in_one_split() -> None:
    """Certain answers, all different: a split of k videos scores k."""
    assert inception_score(torch.eye(7), 3) == pytest.approx((7 / 3, np.std([2, 2, 3])))
    assert inception_score(torch.full((6, 4), 0.25), 2) == pytest.approx((1.0, 0.0))
    with pytest.raises(ValueError, match="3 videos: 4 splits"):
        inception_score(torch.eye(3), 4)


def test_answers_may_be_logits_or_probabilities() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    expected = logits.double().softmax(dim=1)
    torch.testing.assert_close(probabilities(logits), expected)
    torch.testing.assert_close(probabilities(logits.softmax(dim=1)), expected, rtol=1e-5, atol=0)


# ---- ranks


def on_a_rank(env: Env, place: str) -> list[Any]:
    many, few = fvd_config(Path(place), batch_size=2), fvd_config(Path(place), num_videos=2)
    return [measure_fvd(many, env), measure_fvd(few, env), measure_vis(vis_config(Path(place)), env)]


def test_ranks_agree_with_one_process(place: Path) -> None:
    """7 videos on 3 ranks, and 2, of which one rank has none."""
    alone = on_a_rank(ALONE, str(place))
    for found in distributed.run(on_a_rank, processes=3, place=str(place)):
        for one, other in zip(found, alone, strict=True):
            assert one["protocol"] == json.loads(json.dumps(other["protocol"])) and one["notes"] == other["notes"]
            for name in {"fvd", "vis", "vis_std"} & set(other):
                assert one[name] == pytest.approx(other[name], rel=1e-9)


# ---- commands


def test_the_flags_of_the_scripts_work(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one dash, as their users write them; the JSON holds what was printed."""
    out = tmp_path / "fvd.json"
    folders = ["-dir1", str(place / "real"), f"-dir2={place / 'fake'}"]
    numbers = ["-b", "2", "-r", "8", "-n", "4", "-ns", "7"]
    evaluate.fvd(parse_launch("", [*folders, *numbers, "-i3d", str(place / "i3d.pt"), "--out", str(out)]))
    found = json.loads(out.read_text())
    assert found["fvd"] == pytest.approx(measure_fvd(fvd_config(place, resolution=8), ALONE)["fvd"], rel=1e-9)
    printed = capsys.readouterr().out
    assert f"{found['fvd']:.4f}" in printed and "fvd7_4f" in printed and found["protocol"]["detector"]["sha256"] in printed
    evaluate.vis(parse_launch("", [*folders[2:], *numbers, "-c3d", str(place / "c3d.pt"), "--splits", "2"]))
    assert "isv7_4f" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="unknown flag '--dir1'"):
        evaluate.vis(parse_launch("", [*folders, "-c3d", "a"]))


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("fvd", [], "--dir2"),
        ("fvd", ["--dir2", "a"], "--dir1"),
        ("fvd", ["--dir2", "a", "--dir1", "b"], "--i3d"),
        ("fvd", ["--dir2", "a", "--dir1", "b", "--i3d", "c", "-ns", "1"], "--num-videos 1"),
        ("vis", ["--dir2", "a"], "--c3d"),
        ("vis", ["--dir2", "a", "--c3d", "c", "--splits", "0"], "--splits 0"),
        ("vis", ["--dir2", "a", "--c3d", "c", "-b", "0"], "--batch-size 0"),
    ],
)
def test_settings_that_cannot_work_are_told(command: str, arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        evaluate.COMMANDS[command](parse_launch("", arguments))


def test_a_folder_that_is_not_there_is_told(place: Path) -> None:
    with pytest.raises(UserError, match=r"--dir1 .*nowhere: no such folder"):
        measure_fvd(fvd_config(place, dir1=str(place / "nowhere")), ALONE)


@pytest.mark.parametrize("side", ["dir1", "dir2"])
def test_a_distance_needs_two_videos(place: Path, tmp_path: Path, side: str) -> None:
    one = write_arrays(tmp_path, [4])
    with pytest.raises(UserError, match=f"--{side} {one}: one video of at least 4 frames; a distance needs two"):
        measure_fvd(fvd_config(place, **{side: str(one)}), ALONE)


def test_figures_that_cannot_be_written_are_told_before_they_are_measured(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "a.json"):
        with pytest.raises(UserError, match="--out"):
            evaluate.vis(parse_launch("", ["--dir2", str(place / "nowhere"), "--c3d", "none", "--out", str(out)]))
