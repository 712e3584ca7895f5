"""utils.media: ranges, grids and files that play."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from utils.media import VideoWriter, encode_mp4, gif_bytes, grid, png_bytes, to_float, to_uint8, write_gif, write_mp4, write_png


def test_uint8_to_float_and_back_is_exact() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_float(levels)
    assert values[0] == -1 and values[255] == 1
    assert torch.equal(to_uint8(values), levels)


def test_to_uint8_clamps_before_it_rounds() -> None:
    assert to_uint8(torch.tensor([-1.5, -1.0, 1.0, 3.0])).tolist() == [0, 0, 255, 255]
    # Half a level above 100 must round, not truncate.
    assert to_uint8(torch.tensor([100.6 / 127.5 - 1])).item() == 101


def test_to_float_of_a_channels_last_view_is_contiguous() -> None:
    video = torch.randint(0, 255, (2, 4, 6, 8, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    out = to_float(video)
    assert out.is_contiguous() and torch.equal(out, video / 127.5 - 1)


def test_grid_places_every_video() -> None:
    videos = torch.arange(1, 6, dtype=torch.uint8)[:, None, None, None, None].expand(5, 3, 2, 4, 6)
    out = grid(videos, columns=3, gap=1)
    assert out.shape == (3, 2, 4 * 2 + 1, 6 * 3 + 2)
    assert out[0, 0, 0, 0] == 1 and out[0, 0, 0, 7] == 2 and out[0, 0, 5, 7] == 5
    assert out[0, 0, 4, 0] == 255 and out[0, 0, 5, 14] == 255
    assert grid(videos[:, :, 0].float()).shape == (3, 4 * 2 + 2, 6 * 3 + 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_mp4_holds_the_frames(tmp_path: Path, channels: int) -> None:
    video = torch.zeros(channels, 10, 33, 47, dtype=torch.uint8)
    for t in range(10):
        video[:, t] = 20 * t + 10
    path = tmp_path / "a" / "video.mp4"
    path.parent.mkdir()
    write_mp4(path, video, fps=12.5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate == 12.5 and stream.codec_context.name == "h264"
    assert len(frames) == 10 and frames[0].shape == (34, 48, 3)
    assert all(abs(frame.mean() - (20 * t + 10)) < 3 for t, frame in enumerate(frames))
    assert [p.name for p in path.parent.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize("size", [32, 34])
def test_mp4_has_the_same_bytes_each_time(size: int) -> None:
    frames = np.zeros((10, size, size, 3), np.uint8) + np.arange(10, 210, 20, dtype=np.uint8)[:, None, None, None]
    rng, spoiled, found = np.random.default_rng(0), [], set()
    for _ in range(60):
        # Memory that others have used before, as in a long run: an encoder that reads what it has not written shows it.
        spoiled = [*spoiled[-5:], np.full(rng.integers(1000, 300000), rng.integers(255), np.uint8)]
        found.add(encode_mp4(frames, 12.5))
    assert len(found) == 1


def test_gif_plays_all_frames_for_ever(tmp_path: Path) -> None:
    video = torch.randint(0, 255, (3, 7, 16, 16), dtype=torch.uint8)
    write_gif(tmp_path / "video.gif", video, fps=10)
    with Image.open(io.BytesIO(gif_bytes(video, fps=10))) as image:
        assert image.n_frames == 7 and image.info["loop"] == 0 and image.info["duration"] == 100
        assert len(list(ImageSequence.Iterator(image))) == 7
    assert (tmp_path / "video.gif").read_bytes() == gif_bytes(video, fps=10)


def test_png_is_exact(tmp_path: Path) -> None:
    image = torch.randint(0, 255, (3, 5, 9), dtype=torch.uint8)
    write_png(tmp_path / "image.png", image)
    assert (np.asarray(Image.open(tmp_path / "image.png")) == image.permute(1, 2, 0).numpy()).all()
    assert Image.open(io.BytesIO(png_bytes(image[:1]))).size == (9, 5)


def test_a_float_video_is_refused_with_its_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to_uint8"):
        write_mp4(tmp_path / "video.mp4", torch.zeros(3, 4, 8, 8))


def test_a_video_written_in_pieces_is_the_same_file(tmp_path: Path) -> None:
    video = torch.randint(0, 255, (3, 21, 17, 22), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, cuts in (("whole", (21,)), ("pieces", (5, 9, 1, 6))):
        with VideoWriter(tmp_path / f"{name}.mp4", 8.0) as writer:
            for part in video.split(cuts, dim=1):
                writer.write(part)
        assert writer.frames == 21
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "pieces.mp4").read_bytes()
    assert (tmp_path / "whole.mp4").read_bytes() == encode_mp4(
        np.pad(video.permute(1, 2, 3, 0), ((0, 0), (0, 1), (0, 0), (0, 0)), "edge"), 8, gop=16
    )
    with av.open(str(tmp_path / "whole.mp4")) as container:
        assert container.streams.video[0].frames == 21


def test_a_video_that_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError, match="stop"), VideoWriter(path, 8.0) as writer:
        writer.write(torch.zeros(3, 4, 8, 8, dtype=torch.uint8))
        raise RuntimeError("stop")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
