"""What figures of videos are measured on: videos in all their forms, which of them, which frames, how large."""

import json
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.clips import Clips, choose_clips
from evaluation.protocols import PROTOCOLS
from evaluation.videos import FolderVideos, open_videos
from launch.env import Env
from tests.scripted_detectors import known_frames, level, write_arrays, write_pictures
from tests.shard_sets import write_set
from tests.videos import write_video
from utils.errors import UserError
from utils.media import write_gif

ALONE = Env.single()


def clips_of(folder: Path, role: str = "generated", protocol: str = "stylegan-v", **how: object) -> Clips:
    options = {"count": 100, "frames": 4, "size": None, "seed": 0} | how
    return choose_clips(open_videos(folder, "--dir"), PROTOCOLS[protocol], role, ALONE, **options)  # type: ignore[arg-type]


def levels(clip: torch.Tensor) -> list[int]:
    """Brightness of the frames of uint8 3 t h w."""
    return clip[0, :, 0, 0].tolist()


# ---- forms


def test_every_form_of_a_video_is_read(tmp_path: Path) -> None:
    """The release's arrays, pictures in the order of their numbers, and what sample.py writes."""
    frames = known_frames(1, 12, (16, 16))
    np.save(tmp_path / "a.npy", frames.transpose(0, 3, 1, 2).astype(np.float32))
    write_gif(tmp_path / "b.gif", torch.from_numpy(frames).permute(3, 0, 1, 2), fps=10)
    write_pictures(tmp_path / "c", frames)
    write_video(tmp_path / "d.mp4", frames, qp="0")
    (tmp_path / "grid.mp4").write_bytes(b"an overview")
    videos = open_videos(tmp_path, "--dir2")
    assert [videos.name(number).rpartition("/")[2] for number in range(len(videos))] == ["a.npy", "b.gif", "c", "d.mp4"]
    for number, error in enumerate((0, 0, 0, 2)):  # H.264 stores colours in another space
        assert videos.total(number) == 12
        found = videos.read(number, [2, 3, 10]).astype(int)
        assert found.shape == (3, 16, 16, 3) and abs(found - frames[[2, 3, 10]]).max() <= error
    assert [videos.is_pictures(number) for number in range(4)] == [False, False, True, False]


@pytest.mark.parametrize("times", [[0, 100, 100, 0], [20, 30, 20, 30], [30, 30, 40, 30], [0, 0, 0, 0]])
def test_a_gif_of_uneven_times_holds_each_frame_once(tmp_path: Path, times: list[int]) -> None:
    """Frame rates that hundredths of a second do not divide, and times that are left to the player."""
    pictures = [Image.fromarray(frame) for frame in known_frames(0, len(times))]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=times)
    assert open_videos(tmp_path, "--dir2").total(0) == len(times)


def test_arrays_of_whole_numbers_are_read_and_beyond_the_ends_is_cut(tmp_path: Path) -> None:
    frames = known_frames(80, 4).transpose(0, 3, 1, 2)
    np.save(tmp_path / "a.npy", frames.astype(np.int64))
    np.save(tmp_path / "b.npy", np.where(frames > 50, 259.5, -4.0))
    np.save(tmp_path / "c.npy", np.zeros_like(frames, dtype=np.float32))
    videos = open_videos(tmp_path, "--dir2")
    assert videos.read(0, range(4))[:, 0, 0, 0].tolist() == [level(80, frame) for frame in range(4)]
    assert set(videos.read(1, range(4)).flatten()) == {0, 255} and videos.read(2, [0]).max() == 0


@pytest.mark.parametrize("range_", [(0, 1), (-1, 1), (0, 65535), (0, float("nan"))])
def test_arrays_of_another_range_are_told(tmp_path: Path, range_: tuple[float, float]) -> None:
    """They would be black or white videos, with a figure."""
    values = np.linspace(*range_, 4 * 3 * 64).reshape(4, 3, 8, 8)
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(UserError, match=r"a.npy cannot be read: pixels from .* numbers 0..255 are wanted"):
        open_videos(tmp_path, "--dir2").read(0, range(4))


def test_overviews_are_no_videos(tmp_path: Path) -> None:
    """A folder of sample.py without its settings."""
    frames = known_frames(0, 4)
    for name in ("0.mp4", "grid.mp4", "strip.mp4"):
        write_video(tmp_path / name, frames)
    for name in ("0.gif", "grid.gif"):
        write_gif(tmp_path / name, torch.from_numpy(frames).permute(3, 0, 1, 2))
    videos = open_videos(tmp_path, "--dir2")
    assert [videos.name(number).rpartition("/")[2] for number in range(len(videos))] == ["0.mp4"]


@pytest.mark.parametrize("text", ["[1, 2]", '{"samples": 5}', '{"samples": [{"name": "a"}]}', '{"model": "large"}', "{"])
def test_settings_of_something_else_are_told(tmp_path: Path, text: str) -> None:
    write_arrays(tmp_path, [4])
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(UserError, match=r"settings.json is damaged, or not of sample.py"):
        open_videos(tmp_path, "--dir2")


@pytest.mark.parametrize("cut", [20, 60, 100, 200, 400])
def test_a_gif_that_was_cut_is_told_or_read(tmp_path: Path, cut: int) -> None:
    """Whatever the decoder raises, it is one line."""
    frames = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    write_gif(tmp_path / "a.gif", torch.from_numpy(frames).permute(3, 0, 1, 2))
    place = tmp_path / "a.gif"
    place.write_bytes(place.read_bytes()[:-cut])
    with suppress(UserError):
        open_videos(tmp_path, "--dir2").total(0)


def test_a_gif_holds_equal_frames_once(tmp_path: Path) -> None:
    frames = known_frames(0, 6)[[0, 1, 1, 1, 2, 3]]
    write_gif(tmp_path / "a.gif", torch.from_numpy(frames).permute(3, 0, 1, 2), fps=10)
    videos = open_videos(tmp_path, "--dir2")
    assert videos.total(0) == 6 and np.array_equal(videos.read(0, range(6)), frames)


@pytest.mark.parametrize("order", [[0] * 6, [0, 0, 1, 1, 2, 2]])
def test_gifs_of_samples_have_the_frames_that_their_rate_says(tmp_path: Path, order: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """Also a frozen one, of which a single picture is stored: without the rate it is noted."""
    frames = known_frames(0, 3)[order]
    for name in ("a.gif", "b.gif"):
        write_gif(tmp_path / name, torch.from_numpy(frames).permute(3, 0, 1, 2), fps=8)
    bare = open_videos(tmp_path, "--dir2")
    stored = len(set(order))
    assert [bare.total(0), bare.total(1)] == [stored, stored]
    assert capsys.readouterr().err.count("a.gif stores one picture and counts as one frame") == (stored == 1)
    (tmp_path / "settings.json").write_text(json.dumps({"fps": 8.0, "samples": [{"file": "a.gif"}]}))
    videos = open_videos(tmp_path, "--dir2")
    assert videos.total(0) == 6 and np.array_equal(videos.read(0, range(6)), frames)
    assert videos.digest(0) != bare.digest(0)  # what was kept of it before is of other frames
    assert clips_of(tmp_path).dropped == 0 and not capsys.readouterr().err


def test_a_gif_is_decoded_once_for_all_frames_of_a_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gif(tmp_path / "a.gif", torch.from_numpy(known_frames(0, 6)).permute(3, 0, 1, 2))
    videos, opened, plain = open_videos(tmp_path, "--dir2"), [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or plain(path))
    assert len(videos.read(0, range(6))) == 6 and len(opened) == 1


def test_one_video_in_several_forms_is_read_once_and_in_the_exact_one(tmp_path: Path) -> None:
    frames = known_frames(3, 5)
    write_arrays(tmp_path, [5])
    write_gif(tmp_path / "000.gif", torch.from_numpy(frames).permute(3, 0, 1, 2))
    write_gif(tmp_path / "001.gif", torch.from_numpy(frames).permute(3, 0, 1, 2))
    write_video(tmp_path / "001.mp4", frames)
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures.png")  # an overview beside videos is no video
    videos = FolderVideos(tmp_path, "--dir2")
    assert [video.name for video in videos.videos] == ["000.npy", "001.mp4"]


def test_video_files_of_one_name_are_several_videos(tmp_path: Path) -> None:
    """Data sets have such pairs; what lies beside them may be of either."""
    for number, name in enumerate(("a.mp4", "a.mkv", "b.mp4", "b.MP4", "c.mp4")):
        write_video(tmp_path / name, known_frames(number, 4))
    for name in ("a", "c"):
        write_gif(tmp_path / f"{name}.gif", torch.from_numpy(known_frames(7, 4)).permute(3, 0, 1, 2))
    videos = FolderVideos(tmp_path, "--dir2")
    assert [video.name for video in videos.videos] == ["a.gif", "a.mkv", "a.mp4", "b.MP4", "b.mp4", "c.mp4"]


def test_samples_are_those_that_their_settings_list(tmp_path: Path) -> None:
    write_arrays(tmp_path, [4, 4, 4])
    (tmp_path / "settings.json").write_text(json.dumps({"samples": [{"file": "001.npy"}]}))
    videos = open_videos(tmp_path, "--dir2")
    assert len(videos) == 1 and videos.read(0, [0])[0, 0, 0, 0] == level(1, 0)


def test_a_shard_set_gives_its_stored_clips(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [3, 2], lengths=(6,))
    videos = open_videos(folder, "--dir1")
    assert len(videos) == 5 and videos.total(4) == 6
    whole = videos.read(3, range(6))
    assert np.array_equal(open_videos(folder.as_uri(), "--dir1").read(3, range(6)), whole)
    assert np.array_equal(videos.read(3, [1, 2, 5]), whole[[1, 2, 5]])
    found = clips_of(folder, "real", frames=3)
    for place, picks in enumerate(found.picks):
        assert np.array_equal(found.read(place).permute(1, 2, 3, 0), videos.read(found.numbers[place], picks))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda place: None, "holds no videos"),
        (lambda place: place.with_suffix(".mp4").write_bytes(b"nothing"), r"a.mp4 cannot be read"),
        (
            lambda place: np.save(place.with_suffix(".npy"), np.zeros((4, 8, 8, 3), np.float32)),
            r"a.npy cannot be read: float32 \[4, 8, 8, 3\]",
        ),
        (lambda place: place.with_suffix(".npy").write_bytes(b"nothing"), r"a.npy cannot be read"),
        (lambda place: place.with_suffix(".gif").write_bytes(b"nothing"), r"a.gif cannot be read"),
        (lambda place: np.save(place.with_suffix(".npy"), np.zeros((0, 3, 8, 8))), r"a.npy cannot be read: float64 \[0, 3, 8, 8\]"),
        (lambda place: np.save(place.with_suffix(".npy"), np.zeros((2, 3, 8, 8))), "have fewer than 4 frames"),
    ],
)
def test_what_is_no_video_is_told_in_one_line(tmp_path: Path, write: object, words: str) -> None:
    write(tmp_path / "a")  # type: ignore[operator]
    with pytest.raises(UserError, match=words) as error:
        clips_of(tmp_path)
    assert "\n" not in str(error.value)


def test_pictures_of_several_sizes_are_no_video(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a", known_frames(0, 4))
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "frame2.png")
    with pytest.raises(UserError, match="a cannot be read"):
        clips_of(tmp_path).read(0)


# ---- frames


def test_generated_clips_are_the_first_frames(tmp_path: Path) -> None:
    """Consecutive ones; the release spreads them over the whole video."""
    write_arrays(tmp_path, [16, 17])
    clips = clips_of(tmp_path)
    assert [levels(clips.read(place)) for place in (0, 1)] == [[level(video, frame) for frame in range(4)] for video in (0, 1)]
    release = clips_of(tmp_path, protocol="release", size=(8, 8))
    assert levels(release.read(0)) == [level(0, frame) for frame in (0, 4, 8, 12)]
    assert release.picks[1] == [0, 4, 8, 12]


def test_real_clips_begin_at_drawn_frames(tmp_path: Path) -> None:
    """Each offset comes, also the last; the same ones for the same seed, whatever else is in the folder is passed over."""
    write_arrays(tmp_path, [7] * 40 + [3])
    clips = clips_of(tmp_path, "real")
    assert {picks[0] for picks in clips.picks} == {0, 1, 2, 3}
    assert all(np.diff(picks).tolist() == [1, 1, 1] for picks in clips.picks)
    assert len(clips) == 40 and clips.dropped == 1
    assert clips_of(tmp_path, "real").picks == clips.picks != clips_of(tmp_path, "real", seed=1).picks
    assert all(picks == list(range(4)) for picks in clips_of(tmp_path, "generated").picks)


def test_real_videos_are_drawn_and_generated_ones_are_the_first(tmp_path: Path) -> None:
    """The first of a data set would be those of its first classes."""
    write_arrays(tmp_path, [4, 3] * 10)
    real = clips_of(tmp_path, "real", count=5)
    assert len(real) == 5 and set(real.numbers) <= set(range(0, 20, 2)) and real.numbers != [0, 2, 4, 6, 8]
    assert clips_of(tmp_path, count=5).numbers == [0, 2, 4, 6, 8]
    assert clips_of(tmp_path, "real", "release", count=5).numbers == [0, 1, 2, 3, 4]


def test_folders_of_pictures_obey_the_number_of_frames(tmp_path: Path) -> None:
    """The release takes all of them."""
    write_pictures(tmp_path / "a", known_frames(0, 12))
    assert levels(clips_of(tmp_path).read(0)) == [level(0, frame) for frame in range(4)]
    assert clips_of(tmp_path, protocol="release", size=(8, 8)).read(0).shape[1] == 12


def test_unequal_lengths_of_the_release_cannot_be_batched(tmp_path: Path) -> None:
    write_arrays(tmp_path, [9, 2])
    clips = clips_of(tmp_path, protocol="release", size=(8, 8))
    with pytest.raises(UserError, match=r"001.npy gives 2 frames, --dir .*000.npy gives 4 frames"):
        list(clips.batches([[0, 1]], 1))
    assert [len(videos) for _, videos in clips.batches([[0], [1]], 1)] == [1, 1]


# ---- sizes


def test_the_aspect_is_kept(tmp_path: Path) -> None:
    """A wide picture is cut to its middle, as training cuts it; the release squashes it."""
    frames = np.zeros((4, 8, 24, 3), dtype=np.uint8)
    frames[:, :, 8:16] = 255
    np.save(tmp_path / "a.npy", frames.transpose(0, 3, 1, 2))
    assert clips_of(tmp_path, size=(4, 4)).read(0).amin() == 255
    squashed = clips_of(tmp_path, protocol="release", size=(8, 8)).read(0)
    expected = np.asarray(Image.fromarray(frames[0]).resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(squashed[:, 0].permute(1, 2, 0), expected) and squashed.amin() < 10
    assert clips_of(tmp_path).size == (8, 24)


def test_batches_hold_every_clip_once_in_order(tmp_path: Path) -> None:
    write_arrays(tmp_path, [5] * 7)
    clips = clips_of(tmp_path)
    for batch in (1, 3, 7, 20):
        found = list(clips.batches([range(start, min(start + batch, 7)) for start in range(0, 7, batch)], 3))
        assert [len(looks) for looks, _ in found] == [len(videos) for _, videos in found]
        assert torch.equal(torch.cat([videos for _, videos in found]), torch.stack([clips.read(place) for place in range(7)]))


def test_videos_that_are_made_are_made_in_the_main_thread_between_batches(tmp_path: Path) -> None:
    """Flags of the process that a network sets while it looks at a batch would change their pixels."""
    seen: list[tuple[bool, bool]] = []

    class Made(FolderVideos):
        made = True

        def read(self, number: int, picks: Sequence[int]) -> np.ndarray:
            seen.append((threading.current_thread() is threading.main_thread(), torch.backends.cudnn.deterministic))
            return super().read(number, picks)

    write_arrays(tmp_path, [5] * 6)
    clips = choose_clips(Made(tmp_path, "--run"), PROTOCOLS["stylegan-v"], "generated", ALONE, count=6, frames=4, size=(8, 8), seed=0)
    for batch, (_, videos) in enumerate(clips.batches([[0, 1], [2, 3], [4, 5]], 3)):
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            assert len(seen) == 2 * (batch + 1)
        assert [levels(video) for video in videos] == [[level(2 * batch + one, frame) for frame in range(4)] for one in (0, 1)]
    assert seen == [(True, False)] * 6
