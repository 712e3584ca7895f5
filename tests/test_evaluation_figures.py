"""Figures of sets of videos: protocols, presets, what grows with damage to videos, intervals, floors, tables, temporal checks."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import evaluate
from evaluation.clips import choose_clips, look, other_clips
from evaluation.protocols import PRESETS, PROTOCOLS
from evaluation.quality import measure_fvd, measure_kvd, measure_vis
from evaluation.report import append_row, digits, row
from evaluation.settings import FvdConfig, KvdConfig, VisConfig
from evaluation.similarity import ClipsimConfig
from evaluation.videos import FolderVideos, open_videos
from launch.env import Env
from launch.run import parse_launch
from metrics.detectors import Detector
from metrics.frechet import Moments, frechet_distance
from metrics.fvd import preprocess
from tests.scripted_detectors import ToyC3D, ToyI3D, level, save_script, write_arrays
from utils.errors import ConfigError, UserError
from utils.files import sha256_file

ALONE = Env.single()


class RandomConv(nn.Module):
    """Features of a random 3-D convolution network: of motion as well as of pictures."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Conv3d(3, 12, 3, stride=(1, 2, 2)), nn.Conv3d(12, 16, 3, stride=2)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        video = x.float() / 127.5 - 1 if rescale else x.float()
        return self.second(torch.relu(self.first(video))).mean(dim=(2, 3, 4))


class Shape(nn.Module):
    """Size, range and mean of what it is given."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False) -> Tensor:
        assert not rescale and not resize
        row = torch.stack([torch.tensor(float(x.shape[4])), x.min(), x.max(), x.mean()])
        return row.expand(x.shape[0], 4)


COUNT, FRAMES, SIDE = 48, 8, 16


def blobs(count: int, seed: int) -> np.ndarray:
    """Soft spots that move evenly, uint8 (count, t, h, w, 3)."""
    rng = np.random.default_rng(seed)
    start, speed = rng.uniform(4, 12, (count, 2)), rng.uniform(-0.8, 0.8, (count, 2))
    centre = start[:, None] + np.arange(FRAMES)[None, :, None] * speed[:, None]
    rows, columns = np.mgrid[:SIDE, :SIDE]
    apart = (rows - centre[..., 0, None, None]) ** 2 + (columns - centre[..., 1, None, None]) ** 2
    colour = rng.uniform(80, 250, (count, 1, 1, 1, 3))
    return (np.exp(-apart / 8)[..., None] * colour).astype(np.uint8)


def noise(videos: np.ndarray, amount: int, rng: np.random.Generator) -> np.ndarray:
    return (videos + rng.normal(0, 12 * amount, videos.shape)).clip(0, 255).astype(np.uint8)


def blur(videos: np.ndarray, amount: int, rng: np.random.Generator) -> np.ndarray:
    for _ in range(2 * amount):
        videos = sum(np.roll(videos.astype(np.uint16), step, axis=axis) for axis in (2, 3) for step in (-1, 0, 1)) // 6
    return videos.astype(np.uint8)


def shuffle(videos: np.ndarray, amount: int, rng: np.random.Generator) -> np.ndarray:
    """Frames change places within windows of 2, 4 and 8."""
    window = 2**amount
    order = np.concatenate([start + rng.permutation(window) for start in range(0, FRAMES, window)])
    return videos[:, order]


def jitter(videos: np.ndarray, amount: int, rng: np.random.Generator) -> np.ndarray:
    """Every frame moves by up to `amount` pixels of its own."""
    out = videos.copy()
    for video in out:
        for number, (down, right) in enumerate(rng.integers(-amount, amount + 1, (FRAMES, 2))):
            video[number] = np.roll(video[number], (down, right), axis=(0, 1))
    return out


def write(folder: Path, videos: np.ndarray) -> str:
    folder.mkdir(parents=True)
    for number, video in enumerate(videos):
        np.save(folder / f"{number:03d}.npy", video.transpose(0, 3, 1, 2))
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    write(folder / "real", blobs(COUNT, 0))
    write(folder / "fake", noise(blobs(COUNT, 1), 4, np.random.default_rng(0)))
    write_arrays(folder / "long", [40] * 6)
    for name, net in (("conv", RandomConv()), ("shape", Shape()), ("i3d", ToyI3D()), ("c3d", ToyC3D())):
        save_script(net, folder / f"{name}.pt")
    return folder


def fvd_config(place: Path, **how: Any) -> FvdConfig:
    names = {"dir1": str(place / "real"), "dir2": str(place / "fake"), "i3d": str(place / "conv.pt")}
    return FvdConfig(**{**names, "n_frames": FRAMES, "num_videos": COUNT, **how})


# ---- what the figures say


def test_a_set_is_at_no_distance_from_itself(place: Path) -> None:
    found = measure_fvd(fvd_config(place, dir2=str(place / "real")), ALONE)
    apart = measure_fvd(fvd_config(place), ALONE)["fvd"]
    assert abs(found["fvd"]) < 1e-9 < 1e-4 * apart and found["frame_difference_ratio"] == 1
    assert found["noise_floor_of_halves"] > 0 and found["floor_videos"] == [24, 24] == found["half_videos"]


@pytest.mark.parametrize("damage", [noise, blur, shuffle, jitter], ids=lambda damage: damage.__name__)
def test_the_distance_grows_with_the_damage(
    place: Path, tmp_path: Path, damage: Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
) -> None:
    """Of pictures, and of the order and place of frames that are intact each."""
    found = [measure_fvd(fvd_config(place, dir2=str(place / "real")), ALONE)]
    for amount in (1, 2, 3):
        videos = damage(blobs(COUNT, 0), amount, np.random.default_rng(1))
        found.append(measure_fvd(fvd_config(place, dir2=write(tmp_path / str(amount), videos)), ALONE))
    values = [one["fvd"] for one in found]
    assert values == sorted(values) and values[1] > 1e-6 and values[3] > 1.5 * values[1], values
    moved = [one["frame_difference_ratio"] for one in found]
    assert moved[3] < moved[0] if damage is blur else moved[3] > 1.2


def test_the_kernel_distance_needs_no_more_videos_than_features(place: Path, tmp_path: Path) -> None:
    """Near zero for other videos of the kind, whatever their number; its interval is about it."""
    other = write(tmp_path / "other", blobs(COUNT, 5))
    names = {"dir1": str(place / "real"), "i3d": str(place / "conv.pt"), "n_frames": FRAMES, "num_videos": COUNT}
    damaged, alike = (measure_kvd(KvdConfig(**names, dir2=folder, bootstrap=50), ALONE) for folder in (str(place / "fake"), other))
    assert alike["kvd_low"] < 0 < alike["kvd_high"] < damaged["kvd_low"] < damaged["kvd"] < damaged["kvd_high"]
    few = measure_kvd(KvdConfig(**names, dir2=other, subset_size=12, subsets=30), ALONE)
    assert few["kvd_std"] > 0 and few["protocol"]["subset_size"] == 12 and few["protocol"]["id"] == f"kvd{COUNT}_8f"


def test_the_floor_is_of_as_many_other_real_videos_as_there_are_generated_ones(place: Path) -> None:
    """It is the figure that a generator gets which makes those. Of a set of fewer there is none."""
    found = measure_fvd(fvd_config(place, num_videos=20), ALONE)
    assert found["floor_videos"] == [20, 20] and not {"noise_floor_of_halves", "fvd_of_halves", "half_videos"} & found.keys()
    assert 0 < found["noise_floor"] < found["fvd"] and found["protocol"]["floor"]["videos"] == 20
    assert f"| {digits(found['noise_floor'])} |" in row(found)
    clips = choose_clips(
        open_videos(place / "real", ""), fvd_config(place).rules, "real", ALONE, count=20, frames=FRAMES, size=None, seed=0
    )
    other = other_clips(clips, ALONE, count=20, frames=FRAMES, seed=0)
    assert other is not None and not set(clips.numbers) & set(other.numbers) and len(set(other.numbers)) == 20
    folder = place / "others"
    folder.mkdir()
    for number in other.numbers:
        (folder / f"{number:03d}.npy").symlink_to(place / f"real/{number:03d}.npy")
    assert measure_fvd(fvd_config(place, num_videos=20, dir2=str(folder)), ALONE)["fvd"] == pytest.approx(found["noise_floor"], rel=1e-9)
    assert other_clips(clips, ALONE, count=COUNT - 19, frames=FRAMES, seed=0) is None
    assert other_clips(clips, ALONE, count=COUNT - 20, frames=FRAMES, seed=0) is not None
    assert "noise_floor_of_halves" in measure_fvd(fvd_config(place, num_videos=25), ALONE), "48 are not 50"


def test_a_floor_of_videos_that_are_there_twice_is_noted(place: Path, tmp_path: Path) -> None:
    """Also where other frames of them are seen; and one of halves."""
    for name, length in (("short", FRAMES), ("long", 40)):
        write_arrays(tmp_path / name / "a", [length] * 12, first=5)
        shutil.copytree(tmp_path / name / "a", tmp_path / name / "b")
        for count, note in ((10, " of 10 real clips of the noise floor are"), (24, "12 of 24 real clips of the noise floor are")):
            found = measure_fvd(fvd_config(place, dir1=str(tmp_path / name), num_videos=count), ALONE)
            assert ("noise_floor" in found) == (count == 10)
            assert len([one for one in found["notes"] if note in one and one.endswith("twice: it is too low")]) == 1, found["notes"]
    assert not [one for one in measure_fvd(fvd_config(place, num_videos=20), ALONE)["notes"] if "too low" in one]


def test_other_clips_are_long_enough(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no video is looked at twice for its length."""
    looked: list[int] = []
    plain = FolderVideos.total
    monkeypatch.setattr(FolderVideos, "total", lambda self, number: (looked.append(number), plain(self, number))[1])
    write_arrays(tmp_path, [4, 8] * 6)
    clips = choose_clips(open_videos(tmp_path, ""), PROTOCOLS["stylegan-v"], "real", ALONE, count=3, frames=5, size=None, seed=0)
    other = other_clips(clips, ALONE, count=3, frames=5, seed=0)
    assert other is not None and sorted(clips.numbers + other.numbers) == [1, 3, 5, 7, 9, 11]
    assert len(looked) == len(set(looked))
    assert other_clips(clips, ALONE, count=4, frames=5, seed=0) is None


def test_without_so_many_the_floor_is_of_halves_of_the_real_videos(place: Path) -> None:
    """And the distance beside it of as many; the figure itself is of all."""
    found = measure_fvd(fvd_config(place, fd_inf=True), ALONE)
    assert found["notes"] == ["fd_inf is from sets of 12 videos on, with 16 features: the line is not straight there, it is off"]
    assert found["fvd_of_halves"] > found["fvd"] > found["noise_floor_of_halves"] > 0 and "noise_floor" not in found
    assert f"| {digits(found['noise_floor_of_halves'])} of halves |" in row(found)
    bare = measure_fvd(fvd_config(place, noise_floor=False), ALONE)
    assert not [key for key in bare if "floor" in key or "halves" in key] and bare["fvd"] == found["fvd"]
    names = {"dir1": str(place / "long"), "dir2": str(place / "long")}
    small = measure_fvd(fvd_config(place, **names, num_videos=3, fd_inf=True), ALONE)
    assert small["floor_videos"] == [3, 3] and "fd_inf" not in small and "3 videos: --fd-inf needs at least 8" in small["notes"]


def test_a_score_has_an_interval(place: Path) -> None:
    found = measure_vis(VisConfig(dir2=str(place / "long"), c3d=str(place / "c3d.pt"), n_frames=4, splits=2, bootstrap=20), ALONE)
    assert found["vis_low"] <= found["vis"] <= found["vis_high"] and found["generated_frame_difference"] > 0


def test_copies_are_noted(place: Path, tmp_path: Path) -> None:
    """Videos that are repeated to make up a number."""
    folder = write(tmp_path / "copies", np.tile(blobs(COUNT // 4, 0), (4, 1, 1, 1, 1)))
    found = measure_fvd(fvd_config(place, dir2=folder), ALONE)
    assert f"36 of {COUNT} generated clips are copies of others: the figure is that of fewer" in found["notes"]
    assert found["protocol"]["generated"]["unique"] == 12 and found["protocol"]["real"]["unique"] == COUNT


def test_looks_measure_motion() -> None:
    frames = np.zeros((3, 2, 2, 3), dtype=np.uint8)
    frames[1], frames[2, 0] = 51, 52
    found = look(frames)
    assert found.change == pytest.approx((51 + (1 + 51) / 2) / 2 / 255) and found.static == pytest.approx((0 + 0.5) / 2)
    assert look(frames[:1]).static == 1 and look(frames[:1]).change == 0
    assert found.mark == look(frames.copy()).mark != look(frames[::-1]).mark


# ---- protocols


def test_each_protocol_gives_the_network_its_own_pixels(place: Path, tmp_path: Path) -> None:
    """pvdm: 224, the middle, [-1, 1]; videomae: 224, squeezed, [0, 1]."""
    wide = np.zeros((1, 3, 4, 20, 40), dtype=np.uint8)
    wide[..., 8:32] = 255
    video = torch.from_numpy(wide)
    crop, stretch = (Detector(place / "shape.pt", features=True, fit=fit, unit_range=fit == "stretch") for fit in ("crop", "stretch"))
    assert crop(video)[0].tolist() == pytest.approx([224, 1, 1, 1])
    assert stretch(video)[0].tolist() == pytest.approx([224, 0, 1, 0.6], abs=1e-2)
    assert crop.identity()["resize"] == "shorter side to 224, centre crop, bilinear without antialias"
    torch.testing.assert_close(crop(video)[0, 3], preprocess(video, fit="crop").mean())


def test_the_protocols_are_those_that_were_published() -> None:
    """Network, how frames become its size, [0, 1] or not, n - 1 or not, drawn or not."""
    told = {name: (one.network, one.fit, one.unit_range, one.unbiased, one.drawn) for name, one in PROTOCOLS.items()}
    assert told == {
        "stylegan-v": ("i3d", "network", False, False, True),
        "pvdm": ("i3d", "crop", False, True, True),
        "videomae": ("videomae", "stretch", True, False, True),
        "release": ("i3d", "network", True, True, False),
    }


@pytest.mark.parametrize(("protocol", "unbiased"), [("stylegan-v", False), ("pvdm", True), ("videomae", False), ("release", True)])
def test_each_protocol_has_its_own_covariance(place: Path, protocol: str, unbiased: bool) -> None:
    how = {"resolution": SIDE} if protocol == "release" else {}
    net = place / "conv.pt"
    config = fvd_config(place, protocol=protocol, num_videos=6, **how)
    found = measure_fvd(config, ALONE)
    rules = PROTOCOLS[protocol]
    detector = Detector(net, features=True, unit_range=rules.unit_range, fit=rules.fit)
    sides = []
    for role, folder in (("real", "real"), ("generated", "fake")):
        videos = open_videos(place / folder, "--dir")
        clips = choose_clips(videos, rules, role, ALONE, count=6, frames=FRAMES, size=(SIDE, SIDE), seed=0)  # type: ignore[arg-type]
        sides.append(Moments(16))
        sides[-1].update(detector(torch.stack([clips.read(place) for place in range(6)])))
    assert found["fvd"] == pytest.approx(frechet_distance(*sides, unbiased=unbiased), rel=1e-5)
    assert found["protocol"]["covariance"].startswith("unbiased" if unbiased else "population")
    assert found["protocol"]["id"] == "fvd6_8f" + ("" if protocol == "stylegan-v" else f"_{protocol}")


def test_presets_are_the_published_names() -> None:
    for name, preset in PRESETS.items():
        config = FvdConfig(dir1="a", dir2="b", i3d="c", preset=name)
        config.validate()
        assert config.name("fvd", config.count) == name
        assert (config.count, config.frames, config.step) == (preset.videos, preset.frames, preset.stride)
    assert FvdConfig(num_videos=7, preset="fvd2048_16f").count == 7
    assert (FvdConfig().count, FvdConfig().step, FvdConfig(stride=3).name("fvd", 5)) == (2048, 1, "fvd5_48f_subsample3f")


def test_strides_take_frames_that_far_apart(place: Path, tmp_path: Path) -> None:
    """Of videos that were generated with a stride, only the real side's."""
    shown = write_arrays(tmp_path / "b", [5] * 6, first=20)
    config = fvd_config(place, dir1=str(place / "long"), dir2=str(shown), i3d=str(place / "i3d.pt"), n_frames=5, real_stride=4)
    found = measure_fvd(config, ALONE)
    assert found["protocol"]["real"]["window"] == "every 4th frame, random offset (seed 0)" and found["protocol"]["real"]["stride"] == 4
    assert found["protocol"]["generated"]["window"] == "consecutive frames, from frame 0"
    real = choose_clips(open_videos(place / "long", ""), config.rules, "real", ALONE, count=6, frames=5, size=None, seed=0, stride=4)
    assert all(np.diff(picks).tolist() == [4] * 4 and picks[-1] < 40 for picks in real.picks) and len({tuple(p) for p in real.picks}) > 1
    assert real.read(0)[0, :, 0, 0].tolist() == [level(0, frame) for frame in real.picks[0]]
    with pytest.raises(UserError, match=r"fewer than 45 frames \(12, 4 apart\)"):
        measure_fvd(fvd_config(place, dir2=str(place / "long"), n_frames=12, stride=4), ALONE)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"cache": "c", "no_cache": True}, "--cache c: --no-cache neither"),
        ({"protocol": "styleganv"}, r"--protocol styleganv: known are .*stylegan-v"),
        ({"preset": "fvd2048"}, "--preset fvd2048: known are fvd2048_16f"),
        ({"preset": "fvd2048_16f", "num_videos": 0, "n_frames": 8}, "--n-frames 8 is not --preset fvd2048_16f, which says 16"),
        ({"protocol": "release", "stride": 2}, "spreads frames over the whole video"),
        ({"protocol": "release", "real_stride": 2}, "--real-stride 2"),
        ({"bootstrap": -1}, "--bootstrap -1: 0, or at least 20"),
        ({"num_videos": 1}, "--num-videos 1: at least 2"),
    ],
)
def test_settings_that_contradict_each_other_are_told(place: Path, how: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fvd_config(place, **how).validate()


@pytest.mark.parametrize("protocol", ["videomae", "pvdm"])
def test_protocols_of_distances_have_no_score(protocol: str) -> None:
    with pytest.raises(ConfigError, match=f"--protocol {protocol} is one of distances"):
        VisConfig(dir2="a", c3d="b", protocol=protocol).validate()


def test_videos_that_are_generated_have_no_texts_to_be_compared_with() -> None:
    with pytest.raises(ConfigError, match="--run RUNS: its videos are generated without texts"):
        ClipsimConfig(run="RUNS", clip="b").validate()


# ---- networks


def test_a_missing_network_is_one_line_with_the_file_and_the_hash(place: Path) -> None:
    with pytest.raises(UserError, match=r"--i3d .*gone.pt: no such file; wanted is .*i3d_torchscript.pt.* with sha256 abc123") as error:
        measure_fvd(fvd_config(place, i3d=str(place / "gone.pt"), i3d_sha256="abc123"), ALONE)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"--c3d .*gone.pt: no such file; wanted is .*c3d_ucf101.pt"):
        measure_vis(VisConfig(dir2=str(place / "fake"), c3d=str(place / "gone.pt")), ALONE)


def test_another_file_than_expected_is_refused(place: Path) -> None:
    """A prefix is enough; both hashes are told."""
    sha256 = sha256_file(place / "conv.pt")
    found = measure_fvd(fvd_config(place, i3d_sha256=sha256[:8].upper()), ALONE)
    assert found["protocol"]["detector"]["sha256"] == sha256
    with pytest.raises(UserError, match=f"another file than expected: its sha256 is {sha256}, --i3d-sha256 says 00ff"):
        measure_fvd(fvd_config(place, i3d_sha256="00ff"), ALONE)


# ---- commands


def test_small_figures_keep_their_digits() -> None:
    assert [digits(value) for value in (123.45678, 0.25, 0.0, 0.00123456, -0.00001)] == [
        "123.4568",
        "0.2500",
        "0.0000",
        "0.001235",
        "-1e-05",
    ]


def test_kvd_prints_a_row_and_appends_it_to_a_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = tmp_path / "new" / "table.md", tmp_path / "kvd.json"
    flags = ["--dir1", str(place / "real"), "--dir2", str(place / "fake"), "--network", str(place / "conv.pt"), "-n", "8"]
    flags += ["--no-cache", "--markdown", str(table), "--out", str(out)]
    for seed in ("0", "1"):
        evaluate.COMMANDS["kvd"](parse_launch("", [*flags, "--seed", seed]))
    printed = capsys.readouterr().out
    lines = table.read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("| figure | value |") and lines[1].startswith("| --- |") and lines[3] in printed
    found = json.loads(out.read_text())
    assert f"| {found['protocol']['id']} | {digits(found['kvd'])} |" in lines[3]
    assert len({line.count("|") for line in lines}) == 1
    protocol = found["protocol"]
    always = {"python", "torch", "numpy", "scipy", "av", "pillow", "lpips", "timm"}
    assert set(protocol["versions"]) - {"diffusers", "transformers"} == always and protocol["seed"] == 1 and protocol["dim"] == 16
    assert protocol["real"] | {"measured": 48, "unique": 48, "too_short": 0, "stride": 1} == protocol["real"]


def test_a_table_that_cannot_be_written_is_told_first(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flags = ["--dir1", "a", "--dir2", "b", "--i3d", "c", "--markdown", str(tmp_path / "file" / "a.md")]
    with pytest.raises(UserError, match="--markdown"):
        evaluate.COMMANDS["fvd"](parse_launch("", [*flags, "--out", str(tmp_path / "new" / "a.json")]))
    with pytest.raises(UserError, match="--i3d c: no such file"):
        evaluate.COMMANDS["fvd"](parse_launch("", [*flags[:-1], str(tmp_path / "new" / "a.md")]))
    assert not (tmp_path / "new").exists(), "no folders of figures that are never measured"


def test_rows_of_processes_that_write_at_once_are_all_there(tmp_path: Path) -> None:
    figures: dict[str, Any] = {"fvd": 1.0, "generated_videos": 2}
    figures["protocol"] = {"id": "fvd2_16f", "frames": 16, "size": [8, 8], "name": "pvdm", "detector": {}, "seed": 0}
    path = tmp_path / "table.md"
    path.write_text("| by hand |")
    with ThreadPoolExecutor(8) as pool:  # flock is of an open file: threads lock each other out as processes do
        list(pool.map(lambda _: append_row(path, figures), range(32)))
    lines = path.read_text().splitlines()
    assert lines[0] == "| by hand |" and len(lines) == 33 and set(lines[1:]) == {row(figures)}
    assert [place.name for place in tmp_path.iterdir()] == ["table.md"]


def test_a_table_of_other_columns_ends_where_rows_of_these_begin(tmp_path: Path) -> None:
    figures: dict[str, Any] = {"fvd": 1.0, "generated_videos": 2}
    figures["protocol"] = {"id": "fvd2_16f", "frames": 16, "size": [8, 8], "name": "pvdm", "detector": {}, "seed": 0}
    path = tmp_path / "table.md"
    path.write_text("| figure | value | seed |\n| --- | --- | --- |\n| a | b | c |\n")
    append_row(path, figures)
    append_row(path, figures)
    lines = path.read_text().splitlines()
    assert lines[3] == "" and lines[4].startswith("| figure | value | 95 % interval | noise floor |") and len(lines) == 8
    path.write_text("\n".join([*lines, "", *lines[:3], ""]))
    append_row(path, figures)
    lines = path.read_text().splitlines()
    assert lines[12:14] == ["", lines[4]] and len(lines) == 16, "the last table counts"
