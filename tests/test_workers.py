"""datasets.prepare.workers: clips of a video travel in memory or in a file, and come out the same."""

from pathlib import Path

import pytest

from datasets.prepare.clips import ClipRules
from datasets.prepare.workers import IN_MEMORY, prepare, read_spool
from datasets.sources.base import Video
from tests.videos import noise_frames, write_video

RULES = ClipRules(size=(16, 16), clip_length=4, clip_stride=4, decoder="pyav")


@pytest.mark.parametrize("limit", [0, 5000])
def test_many_clips_go_through_a_file(tmp_path: Path, limit: int) -> None:
    video = Video(write_video(tmp_path / "a.mp4", noise_frames(24)), "a.mp4")
    few = prepare(video, RULES, "class", tmp_path / "few")
    assert few.payloads and not (tmp_path / "few").exists()
    many = prepare(video, RULES, "class", tmp_path / "many", limit)
    assert many.payloads is None and (tmp_path / "many").read_bytes() == b"".join(few.payloads)
    clips = list(read_spool(few, tmp_path / "few"))
    assert len(clips) == 6 and clips == list(read_spool(many, tmp_path / "many"))
    assert [list(sample.members) for sample, _ in clips] == [["npy", "json", "cls"]] * 6


@pytest.mark.parametrize("limit", [0, IN_MEMORY])
def test_a_video_that_breaks_off_late_gives_no_clip(tmp_path: Path, limit: int) -> None:
    whole = write_video(tmp_path / "a.mkv", noise_frames(60)).read_bytes()
    (tmp_path / "a.mkv").write_bytes(whole[: len(whole) * 2 // 3] + bytes(len(whole) // 3))
    prepared = prepare(Video(tmp_path / "a.mkv", "a.mkv"), RULES, None, tmp_path / "spool", limit)
    assert prepared.skipped and prepared.skipped[0] == "a.mkv"
    assert list(read_spool(prepared, tmp_path / "spool")) == []
