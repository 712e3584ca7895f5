"""datasets.video: frames as they are in the file, damage found, transforms."""

import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, VideoReformatter

from datasets import video
from datasets.stored_video import decode_window
from datasets.video import (
    VideoError,
    decode,
    ffmpeg_command,
    ffmpeg_program,
    probe,
    to_rgb,
)
from tests.videos import DECODERS, needs_ffmpeg, noise_frames, write_video
from utils.media import encode_mp4


def read(path: Path, decoder: str) -> np.ndarray:
    return np.stack(list(decode(path, probe(path), decoder)))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a b:c'%03d.mkv", "libx264"), ("-x.mov", "mpeg4")])
def test_all_frames_come_in_order(tmp_path: Path, decoder: str, name: str, codec: str) -> None:
    frames = noise_frames(30)
    found = read(write_video(tmp_path / name, frames, codec, bf="2"), decoder)
    assert found.shape == frames.shape
    errors = np.abs(found.astype(int) - frames).mean(axis=(1, 2, 3))
    off_by_one = np.abs(found[1:].astype(int) - frames[:-1]).mean(axis=(1, 2, 3))
    assert errors.max() < 8 < off_by_one.min()


@needs_ffmpeg
def test_both_decoders_give_the_same_pixels(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", noise_frames(20), bf="2")
    assert (read(path, "ffmpeg") == read(path, "pyav")).all()


PIXELS = "yuv420p yuvj420p yuv422p yuv444p yuv411p yuv440p yuva420p nv12 yuyv422 gray gray16le yuv420p10le yuv444p12le p010le gbrp bgr0"


@pytest.mark.parametrize("pixels", PIXELS.split())
@pytest.mark.parametrize("size", [(64, 64), (121, 171), (47, 33), (256, 340)])
def test_conversion_does_not_depend_on_the_number_of_threads(pixels: str, size: tuple[int, int]) -> None:
    height, width = size
    picture = av.VideoFrame.from_ndarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8), format="rgb24")
    frame = picture.reformat(width, height, pixels)
    for color_range in ("UNSPECIFIED", "MPEG", "JPEG"):
        frame.color_range = ColorRange[color_range]
        found = to_rgb(frame, VideoReformatter())
        assert found.shape == (height, width, 3)
        for options in ({}, {"threads": 3}) if video.CONVERTS_IN_THREADS else ({},):
            assert (VideoReformatter().reformat(frame, width, height, "rgb24", **options).to_ndarray() == found).all()


@needs_ffmpeg
@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotation_is_that_of_ffmpeg_in_both_decoders(tmp_path: Path, angle: int) -> None:
    plain = write_video(tmp_path / "plain.mp4", noise_frames(3, (32, 48)))
    turned = tmp_path / "turned.mp4"
    tool = [ffmpeg_program(), "-v", "error", "-nostdin"]
    ways = ["-display_rotation", str(angle), "-i", plain], ["-i", plain, "-metadata:s:v", f"rotate={angle}"]  # the second until ffmpeg 5
    runs = (subprocess.run([*tool, *way, "-c", "copy", "-y", turned], capture_output=True, timeout=60) for way in ways)
    assert any(run.returncode == 0 for run in runs)
    assert not np.array_equal(read(turned, "pyav"), read(plain, "pyav"))
    raw = subprocess.run(
        [*tool, "-i", turned, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, capture_output=True, timeout=60
    ).stdout
    height, width = (32, 48) if angle == 180 else (48, 32)
    upright = np.frombuffer(raw, np.uint8).reshape(3, height, width, 3)
    for decoder in ("ffmpeg", "pyav"):
        found = read(turned, decoder)
        assert found.shape == upright.shape
        # ffmpeg turns before it converts colours, we after: chroma is interpolated along other borders.
        assert np.abs(found.astype(int) - upright).mean() < 2


@needs_ffmpeg
def test_the_command_names_one_stream_and_cannot_be_misread() -> None:
    from datasets.video import VideoInfo

    program = ffmpeg_program()
    assert program is not None
    command = ffmpeg_command(program, Path("-x:y.mp4"), VideoInfo(3, 4, 4, 0, 25.0, 1))
    assert f"file:{Path('-x:y.mp4').absolute()}" in command
    assert command[command.index("-map") + 1] == "0:3"
    assert {"-nostdin", "-xerror"} <= set(command)


def test_the_best_stream_is_taken_not_cover_art_or_the_first(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    small, large = noise_frames(10, (16, 16)), noise_frames(10, (64, 80))
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in range(2)]
        for stream, frames in zip(streams, (small, large), strict=True):
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for pair in zip(small, large, strict=True):
            for stream, frame in zip(streams, pair, strict=True):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    info = probe(path)
    assert (info.stream, info.height, info.width) == (1, 64, 80)


def damaged(folder: Path, kind: str) -> Path:
    path = write_video(folder / ("a.avi" if kind == "cut avi" else "a.mp4"), 60, "mpeg4" if kind == "cut avi" else "libx264", movflags="")
    data = path.read_bytes()
    content = {
        "empty": b"",
        "text": b"not a video at all\n" * 50,
        "random": np.random.default_rng(0).bytes(5000),
        "cut mp4": data[: len(data) // 2],
        "cut avi": data[: len(data) // 2],
        "flipped": data[:400] + bytes(255 - byte for byte in data[400:1500]) + data[1500:],
    }[kind]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["empty", "text", "random", "cut mp4", "cut avi", "flipped"])
def test_damage_is_found_and_named(tmp_path: Path, decoder: str, kind: str) -> None:
    path = damaged(tmp_path, kind)
    with pytest.raises(VideoError) as caught:
        read(path, decoder)
    assert caught.value.reason in ("empty file", "not a readable video", "truncated", "damaged", "no frames", "no video stream")
    assert "\n" not in str(caught.value) and " 0x" not in str(caught.value)


@needs_ffmpeg
def test_a_cut_with_an_edit_list_is_whole(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 100)
    cut = tmp_path / "cut.mp4"
    subprocess.run([ffmpeg_program(), "-v", "error", "-nostdin", "-ss", "1.0", "-i", path, "-c", "copy", cut], check=True, timeout=60)
    lengths = {len(read(cut, decoder)) for decoder in ("pyav", "ffmpeg")}
    assert len(lengths) == 1 and lengths.pop() in range(70, 80)


def test_sound_without_pictures_has_no_video_stream(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError) as caught:
        probe(path)
    assert caught.value.reason == "no video stream"


@pytest.mark.parametrize("start", [0, 1, 11, 12, 13, 24])
def test_a_window_of_our_own_mp4_is_exact(start: int) -> None:
    payload = encode_mp4(noise_frames(40), 29.97, gop=12)
    whole = decode_window(payload, 0, 40)
    assert (decode_window(payload, start, 16) == whole[start : start + 16]).all()


def test_a_window_past_the_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="of 16 frames"):
        decode_window(encode_mp4(noise_frames(20), 25), 10, 16)
    with pytest.raises(ValueError):
        decode_window(b"\0" * 100, 0, 1)


def test_a_stored_clip_of_an_unknown_codec_is_an_error() -> None:
    payload = encode_mp4(noise_frames(4), 25)
    assert payload.count(b"avc1") >= 1
    with pytest.raises(ValueError):
        decode_window(payload.replace(b"avc1", b"zzzz"), 0, 4)


def test_the_system_has_a_decoder_program_or_says_so() -> None:
    assert ffmpeg_program() is None or shutil.which(ffmpeg_program())


@needs_ffmpeg
def test_an_ffmpeg_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 5)
    monkeypatch.setattr(video, "ffmpeg_command", lambda program, path, info: ["sleep", "60"])
    monkeypatch.setattr("datasets.ffmpeg.PATIENCE", 0.1)
    with pytest.raises(VideoError, match=r"gave nothing for 0.1 seconds"):
        read(path, "ffmpeg")
