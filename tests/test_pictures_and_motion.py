"""Pictures that videos begin at as users have them, and videos whose motion is measured."""

import contextlib
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from evaluation import motion
from evaluation.motion import measure_motion
from launch.env import Env, Stopped
from launch.run import parse_launch
from models.layers.motion import motion_energy
from pipelines.pictures import find_pictures, hash_picture, read_picture
from tests.distributed import run
from utils.errors import ConfigError, UserError
from utils.media import write_mp4


def test_a_folder_gives_its_files_alone(tmp_path: Path) -> None:
    """In the order of their numbers; neither folders that are called like pictures nor links to nothing."""
    files = [tmp_path / name for name in ("a2.png", "a10.png")]
    for file in files:
        Image.new("RGB", (4, 4)).save(file)
    (tmp_path / "b.png").mkdir()
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    assert find_pictures([str(tmp_path)]) == files


def test_a_file_that_went_away_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--image .*gone.png cannot be read: No such file"):
        hash_picture(tmp_path / "gone.png")


def test_a_grey_picture_of_16_bits_is_that_of_8(tmp_path: Path) -> None:
    ramp = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "8.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "16.png")
    assert torch.equal(read_picture(tmp_path / "16.png", (8, 8)), read_picture(tmp_path / "8.png", (8, 8)))


def test_a_picture_is_upright_as_its_camera_says(tmp_path: Path) -> None:
    ramp = Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8))
    exif = ramp.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    ramp.save(tmp_path / "turned.png", exif=exif)
    ramp.save(tmp_path / "plain.png")
    plain = read_picture(tmp_path / "plain.png", (8, 8))
    assert torch.equal(read_picture(tmp_path / "turned.png", (8, 8)), plain.rot90(-1, (1, 2)))


def test_an_odd_row_or_column_does_not_count(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 9, 11, 1), dtype=np.uint8).repeat(3, axis=3)
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 11, 9, "yuv444p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    even = torch.from_numpy(frames[:, :8, :10]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    assert measure_motion(tmp_path, Env.single(), 4)["motion"] == pytest.approx(motion_energy(even).item(), rel=0.02)


def test_the_command_shows_its_settings_and_has_no_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--samples", str(tmp_path)]
    evaluate.motion(parse_launch("", [*line, "--print-config"]))
    assert f"- {tmp_path}\nclip_frames: 0" in capsys.readouterr().out and not (tmp_path / "motion.json").exists()
    with pytest.raises(ConfigError, match="unknown flag '--system'"):
        evaluate.motion(parse_launch("", [*line, "--system", "hvdm"]))


def test_a_signal_ends_a_measurement_after_the_video_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_mp4(tmp_path / f"{number}.mp4", torch.zeros(3, 4, 16, 16, dtype=torch.uint8), 8.0)
    env, read, plain = Env.single(), [], motion.iterate
    monkeypatch.setattr(motion, "iterate", lambda path, *how: (read.append(path.name), env.stop.set(), plain(path, *how))[2])
    with pytest.raises(Stopped):
        measure_motion(tmp_path, env, 4)
    assert read == ["0.mp4"]


def measured_together(env: Env, folder: str) -> dict[str, Any]:
    """By the command, as each rank sees it: what rank 0 writes, and which videos this one read."""
    read: list[str] = []
    plain = motion.iterate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(motion, "iterate", lambda path, *how: (read.append(path.name), plain(path, *how))[1])
        patch.setattr(evaluate, "distributed", lambda timeout: contextlib.nullcontext(env))
        out = Path(folder) / f"{env.world_size}-{env.rank}.json"
        evaluate.motion(parse_launch("", ["--samples", f"{folder}/videos", "--clip-frames", "4", "--out", str(out)]))
    return {"read": read, "figures": json.loads(out.read_text()) if out.exists() else None}


def test_processes_share_the_videos_and_find_the_same(tmp_path: Path) -> None:
    """To the last bit; the first writes."""
    (tmp_path / "videos").mkdir()
    for number in range(5):
        video = torch.randint(0, 256, (3, 9, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        write_mp4(tmp_path / f"videos/{number}.mp4", video, 8.0)
    alone = measured_together(Env.single(), str(tmp_path))
    assert alone["read"] == [f"{number}.mp4" for number in range(5)]
    for processes in (2, 3):
        first, *others = run(measured_together, processes, folder=str(tmp_path))
        assert first["figures"] == alone["figures"] and not any(one["figures"] for one in others)
        assert sorted(name for one in (first, *others) for name in one["read"]) == alone["read"] and all(one["read"] for one in others)
