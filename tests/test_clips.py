"""datasets.prepare.clips: which frames of which source end in which clip, and what is left out."""

import io
import json
import tarfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from datasets.frames import linspace, spread
from datasets.prepare.clips import ClipRules, Facts, samples
from datasets.prepare.filters import FilterRules, Rejection
from datasets.prepare.writer import Sample
from datasets.sources.base import Video
from datasets.stored_video import decode_window
from datasets.transforms import resize_clip
from datasets.video import VideoError, decode, ffmpeg_program, probe
from tests.videos import DECODERS, noise_frames, write_video

RULES = ClipRules(size=(20, 36), clip_length=4, clip_stride=4, decoder="pyav")


def write_timed(path: Path, frames: np.ndarray, milliseconds: list[int]) -> Path:
    """A video whose frames are shown at these times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "12", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = frames.shape[2], frames.shape[1], "yuv420p", 4_000_000
        stream.codec_context.time_base = Fraction(1, 1000)
        for frame, time in zip(frames, milliseconds, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = time, stream.codec_context.time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def make(source: Path | Video, rules: ClipRules) -> tuple[list[tuple[Sample, Facts]], list[Rejection]]:
    video = source if isinstance(source, Video) else Video(source, source.name)
    rejected: list[Rejection] = []
    return list(samples(video, rules, None, rejected)), rejected


def card(sample: Sample) -> dict[str, object]:
    return json.loads(sample.members["json"])


def native(path: Path) -> np.ndarray:
    return np.stack(list(decode(path, probe(path), "pyav")))


def expect(found: list[tuple[Sample, Facts]], path: Path, picks: list[list[int]], rules: ClipRules) -> None:
    """The clips hold exactly these frames of the file."""
    frames = native(path)
    assert len(found) == len(picks)
    for (sample, _), numbers in zip(found, picks, strict=True):
        stored = np.lib.format.read_array(io.BytesIO(sample.members["npy"]))
        assert (stored == resize_clip(frames[numbers], rules.size)).all(), numbers


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_target_rate_follows_the_time_stamps(tmp_path: Path, decoder: str) -> None:
    times = [0, 40, 80, 120, 320, 360, 400, 700, 740, 780]
    path = write_timed(tmp_path / "vfr.mkv", noise_frames(10), times)
    rules = replace(RULES, fps=10.0, decoder=decoder)
    found, _ = make(path, rules)
    # 0 100 200 300 | 400 500 600 700: the frame nearest to each; 500 repeats 400, and 600 is as near to 700.
    expect(found, path, [[0, 2, 3, 4], [6, 6, 7, 7]], rules)
    assert [sample.key.split("_")[1] for sample, _ in found] == ["000000", "000004"]
    assert all(facts.fps == 10 for _, facts in found) and card(found[1][0])["span"] == [6, 8]


def test_a_faster_source_gives_every_third_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 40, rate=30, bf="2")
    rules = replace(RULES, fps=10.0)
    expect(make(path, rules)[0], path, [[0, 3, 6, 9], [12, 15, 18, 21], [24, 27, 30, 33]], rules)


def test_files_without_time_stamps_have_a_constant_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.h264", 30, bf="2")
    assert probe(path).stamps is None
    rules = replace(RULES, fps=12.5)
    expect(make(path, rules)[0], path, [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 20, 22]], rules)


def test_absurd_time_stamps_are_not_believed(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "a.mkv", noise_frames(6), [0, 40, 80, 120, 160, 900_000_000])
    found, _ = make(path, replace(RULES, fps=25.0))
    assert len(found) <= 30


def test_windows_overlap_as_asked(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 15)
    rules = replace(RULES, clip_stride=2, frame_stride=2)
    expect(make(path, rules)[0], path, [[0, 2, 4, 6], [4, 6, 8, 10], [8, 10, 12, 14]], rules)
    expect(make(path, replace(rules, max_clips=2))[0], path, [[0, 2, 4, 6], [4, 6, 8, 10]], rules)


def test_linspace_and_spread(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 27)
    rules = replace(RULES, clip_stride=3, frame_stride=3, rule="linspace")
    expect(make(path, rules)[0], path, [linspace(0, 27, 4, 3), linspace(9, 27, 4, 3)], rules)
    rules = replace(RULES, clip_length=10, rule="spread")
    found, _ = make(path, rules)
    expect(found, path, [spread(27, 10)], rules)
    assert found[0][1].fps == pytest.approx(25 * 10 / 27, abs=1e-3)
    short = replace(RULES, clip_length=30, rule="spread")
    with pytest.raises(VideoError, match="fewer than 30"):
        make(path, short)
    expect(make(path, replace(short, on_short="pad"))[0], path, [[*range(27), 26, 26, 26]], short)


def test_short_videos_are_padded_when_asked(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    rules = replace(RULES, on_short="pad")
    found, _ = make(path, rules)
    expect(found, path, [[0, 1, 2, 2]], rules)
    assert card(found[0][0])["padded_frames"] == 1 and card(found[0][0])["span"] == [0, 3]
    with pytest.raises(VideoError, match="fewer than"):
        make(path, replace(rules, min_frames=4))


def test_a_span_is_a_part_of_the_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 50)
    video = Video(path, "a.mp4@0.4-1", span=(0.4, 1.0))
    found, _ = make(video, RULES)
    expect(found, path, [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 21]], RULES)
    assert found[0][1].source_seconds == pytest.approx(0.6) and card(found[0][0])["seconds"] == [0.4, 0.52]
    rules = replace(RULES, fps=12.5)
    expect(make(replace(video, span=(1.0, float("inf"))), rules)[0], path, [[25, 27, 29, 31], [33, 35, 37, 39], [41, 43, 45, 47]], rules)
    expect(make(replace(video, span=(0.4, 0.8)), rules)[0], path, [[10, 12, 14, 16]], rules)
    with pytest.raises(VideoError, match=r"2\.00 s"):
        make(replace(video, span=(2.5, 3.0)), RULES)


def test_a_member_of_a_tar_is_read_in_place(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 10)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(path, "a.mp4")
    with tarfile.open(tmp_path / "t.tar") as tar:
        offset, size = tar.getmember("a.mp4").offset_data, path.stat().st_size
    found, _ = make(Video(tmp_path / "t.tar", "t/a.mp4", member=(offset, size)), RULES)
    expect(found, path, [[0, 1, 2, 3], [4, 5, 6, 7]], RULES)
    with pytest.raises(VideoError, match=r"t\.tar ends"):
        make(Video(tmp_path / "t.tar", "t/a.mp4", member=(offset, size + 100_000)), RULES)
    for member in ((0, size), (offset, size // 2)):
        with pytest.raises(VideoError) as caught:
            make(Video(tmp_path / "t.tar", "t/a.mp4", member=member), RULES)
        assert str(tmp_path) not in str(caught.value) and "/tmp" not in str(caught.value), "messages must not differ from run to run"


def shots(lengths: list[int]) -> np.ndarray:
    return np.concatenate([noise_frames(n, seed=seed) // (1 + seed % 2 * 3) for seed, n in enumerate(lengths)])


def test_scenes_too_short_for_a_clip_are_left_out_by_name(tmp_path: Path) -> None:
    shots = [np.full((count, 48, 64, 3), level, np.uint8) for count, level in ((9, 40), (3, 200), (9, 90))]
    path = write_video(tmp_path / "a.mp4", np.concatenate(shots))
    found, rejected = make(path, replace(RULES, scenes="split"))
    assert len(found) == 4 and rejected == [Rejection(9, "scene too short", "frame 9: 3 frames")]
    with pytest.raises(VideoError, match="3 of 3 clips") as caught:
        make(path, replace(RULES, scenes="split", clip_length=10))
    assert caught.value.reason == "scene too short"
    assert make(path, replace(RULES, scenes="split", on_short="pad"))[1] == []


def test_a_strip_is_not_blown_up(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", noise_frames(5, (2, 2048)))
    rules = replace(RULES, size=(512, 512), resize="shorter-side")
    with pytest.raises(VideoError, match=r"2048x2 would have to be scaled by 256"):
        make(path, rules)
    assert len(make(path, replace(rules, resize="crop"))[0]) == 1


def test_frames_hours_apart_have_a_rate(tmp_path: Path) -> None:
    rules = replace(RULES, clip_length=1, frame_stride=100_000, codec="mp4")
    ((sample, facts),) = make(write_video(tmp_path / "a.mp4", 9), rules)[0]
    assert facts.fps == 0.001 and decode_window(sample.members["mp4"], 0, 1).shape == (1, 20, 36, 3)


@pytest.mark.parametrize("decoder", DECODERS)
def test_no_clip_crosses_a_cut(tmp_path: Path, decoder: str) -> None:
    path = write_video(tmp_path / "a.mp4", shots([10, 7, 3]))
    rules = replace(RULES, scenes="split", decoder=decoder)
    found, _ = make(path, rules)
    expect(found, path, [[0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 12, 13]], rules)
    assert [card(sample)["scene"] for sample, _ in found] == [0, 0, 1] == [facts.scene for _, facts in found]
    whole = replace(rules, clip_length=0, min_frames=5)
    expect(make(path, whole)[0], path, [list(range(10)), list(range(10, 17))], whole)


def test_frame_folders_follow_the_same_rules(tmp_path: Path) -> None:
    frames = shots([9, 9])
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    found, _ = make(Video(tmp_path, "v", is_frames=True), replace(RULES, scenes="split", size=(48, 64), fps=12.5))
    stored = [np.lib.format.read_array(io.BytesIO(sample.members["npy"])) for sample, _ in found]
    assert len(stored) == 2 and (stored[0] == frames[:8:2]).all() and (stored[1] == frames[10:17:2]).all()
    assert found[0][1].source_size == (48, 64)


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        (FilterRules(min_fps=26), "frame rate out of bounds"),
        (FilterRules(max_fps=24), "frame rate out of bounds"),
        (FilterRules(min_size=49), "too small"),
        (FilterRules(max_pixels=48 * 63), "too large"),
        (FilterRules(min_seconds=0.7), "length out of bounds"),
        (FilterRules(max_seconds=0.5), "length out of bounds"),
        (FilterRules(min_motion=0.5), "too little motion"),
        (FilterRules(max_motion=0.001), "too much motion"),
    ],
)
@pytest.mark.parametrize("is_frames", [False, True])
def test_filters_name_their_reason(tmp_path: Path, filters: FilterRules, reason: str, is_frames: bool) -> None:
    frames = noise_frames(16)
    if is_frames:
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / f"{number}.png")
    else:
        write_video(tmp_path / "a.mp4", frames)
    video = Video(tmp_path if is_frames else tmp_path / "a.mp4", "a", is_frames=is_frames)
    assert make(video, replace(RULES, filters=FilterRules(25, 25, 48, 48 * 64, 0.6, 0.65, 0.001, 0.5)))[0]
    with pytest.raises(VideoError) as caught:
        make(video, replace(RULES, filters=filters))
    assert caught.value.reason == reason


def test_clips_are_left_out_one_by_one(tmp_path: Path) -> None:
    frames = noise_frames(16)
    frames[4:8] = 0
    frames[8:12] = frames[8]
    path = write_video(tmp_path / "a.mp4", frames)
    found, rejected = make(path, replace(RULES, filters=FilterRules(drop_black=True)))
    assert [card(sample)["span"][0] for sample, _ in found] == [0, 8, 12]  # type: ignore[index]
    assert [(row.start, row.reason) for row in rejected] == [(4, "black")]
    found, rejected = make(path, replace(RULES, filters=FilterRules(min_motion=0.01), max_clips=2))
    assert [card(sample)["span"][0] for sample, _ in found] == [0, 12] and len(rejected) == 2  # type: ignore[index]
    assert found[0][1].motion > 0.05 and found[0][1].fingerprint


def test_a_file_that_ends_early_is_spread_over_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.prepare import reels

    path = write_video(tmp_path / "a.mp4", 30)
    monkeypatch.setattr(reels, "probe", lambda path, pixels: replace(probe(path, pixels), frames=31, stamps=None))
    rules = replace(RULES, rule="spread", clip_length=10)
    expect(make(path, rules)[0], path, [spread(30, 10)], rules)
    rules = replace(RULES, clip_length=31, on_short="pad")
    found, _ = make(path, rules)
    expect(found, path, [[*range(30), 29]], rules)
    assert card(found[0][0])["padded_frames"] == 1


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("max_clips", [0, 1])
def test_damage_after_the_last_clip_voids_the_video_but_not_a_span(tmp_path: Path, decoder: str, max_clips: int) -> None:
    path = write_video(tmp_path / "a.mp4", 43, movflags="")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        last = max(packet.pos for packet in container.demux(container.streams.video[0]) if packet.size)
    data[last : last + 40] = bytes(40)
    path.write_bytes(data)
    rules = replace(RULES, decoder=decoder, max_clips=max_clips)
    with pytest.raises(VideoError):
        make(path, rules)
    assert make(Video(path, "a", span=(0.0, 0.3)), rules)[0]


def test_huge_frames_are_not_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", noise_frames(4, (96, 96)))
    assert probe(path, 96 * 96)
    with pytest.raises(VideoError, match="more than 9215 pixels"):
        probe(path, 96 * 96 - 1)
    path = write_video(tmp_path / "large.mp4", noise_frames(2, (800, 800)))
    info = replace(probe(path), max_pixels=10_000)
    for decoder in ("pyav", *(["ffmpeg"] if ffmpeg_program() else [])):
        with pytest.raises(VideoError):
            list(decode(path, info, decoder))


def test_a_clip_of_endless_frames_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.prepare import clips

    monkeypatch.setattr(clips, "MAX_CLIP_BYTES", 20 * 36 * 3 * 9)
    with pytest.raises(VideoError, match="clip-length"):
        make(write_video(tmp_path / "a.mp4", 10), replace(RULES, clip_length=0))


def test_what_the_library_raises_on_damage_is_a_video_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import video

    def slip(*_: object) -> None:
        raise IndexError("list index out of range")  # PyAV, on a transport stream whose packets name a stream that is not there

    path = write_video(tmp_path / "a.mp4", 10)
    with monkeypatch.context() as patch, pytest.raises(VideoError, match="list index"):
        patch.setattr(video, "_best_stream", slip)
        probe(path)
    info = probe(path)
    with monkeypatch.context() as patch, pytest.raises(VideoError, match="list index"):
        patch.setattr(video, "open_video", slip)
        list(decode(path, info, "pyav"))
