"""datasets.transforms: each way to crop and resize, against what it is defined by."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from datasets.transforms import RELEASES, RESIZE_MODES, aspect_part, centre_crop, resize, resize_clip
from tests.videos import noise_frames


@pytest.mark.parametrize(
    ("size", "expected"), [((1, 1), (48, 48)), ((2, 1), (48, 24)), ((1, 4), (16, 64)), ((48, 64), (48, 64)), ((3, 5), (38, 64))]
)
def test_the_largest_part_of_an_aspect(size: tuple[int, int], expected: tuple[int, int]) -> None:
    frames = np.broadcast_to(np.arange(48)[:, None, None], (48, 64, 3))
    assert aspect_part(frames, size) == expected
    assert centre_crop(frames, expected)[0, 0, 0] == (48 - expected[0]) // 2


def test_an_odd_rest_leans_as_asked() -> None:
    frames = np.broadcast_to(np.arange(9)[:, None, None], (9, 7, 1))
    for rest, floor, even in ((1, 0, 0), (3, 1, 2), (5, 2, 2), (7, 3, 4)):
        assert centre_crop(frames, (9 - rest, 7), "floor")[0, 0, 0] == floor
        assert centre_crop(frames, (9 - rest, 7), "round")[0, 0, 0] == even


def test_antialias_averages_and_plain_bilinear_does_not() -> None:
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::4] = 255
    smooth, sharp = (resize(stripes, (8, 8), antialias=antialias) for antialias in (True, False))
    assert smooth[:, :, 1:-1].std() < 12 and abs(smooth.mean() - 64) < 3
    assert abs(sharp.astype(int).mean() - 64) > 20


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("source", "size"), [((60, 80), (32, 32)), ((50, 37), (24, 40)), ((20, 31), (48, 32)), ((90, 41), (40, 41))])
def test_bytes_and_floats_agree(mode: str, antialias: bool, source: tuple[int, int], size: tuple[int, int]) -> None:
    frames = noise_frames(3, source)
    whole = resize_clip(frames, size, mode, antialias=antialias)  # type: ignore[arg-type]
    exact = resize_clip(frames.astype(np.float32), size, mode, antialias=antialias)  # type: ignore[arg-type]
    assert whole.shape == exact.shape == (3, *size, 3) and whole.dtype == np.uint8 and exact.dtype == np.float32
    assert np.abs(whole - np.clip(exact, 0, 255)).max() < 2


def test_releases_scale_crop_and_stretch_the_square() -> None:
    frames = noise_frames(4, (60, 80)).astype(np.float32) / 127.5 - 1
    square = torch.from_numpy(frames[:, :, 10:70]).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=(32, 48), mode="bilinear", align_corners=False).permute(0, 2, 3, 1).numpy()
    assert (resize_clip(frames, (32, 48), "square", antialias=False) == expected).all()


@pytest.mark.parametrize("source", [(48, 64), (67, 45), (33, 91)])
def test_torchvision_mode_is_torchvisions(source: tuple[int, int]) -> None:
    frames = torch.from_numpy(noise_frames(2, source)).permute(0, 3, 1, 2)
    expected = v2.CenterCrop(32)(v2.Resize(32, antialias=True)(frames)).permute(0, 2, 3, 1).numpy()
    found = resize_clip(noise_frames(2, source), (32, 32), "torchvision", centre="round")
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_shorter_side_keeps_the_exact_factor() -> None:
    frames = noise_frames(1, (40, 57)).astype(np.float32)
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)
    scaled = F.interpolate(x, scale_factor=32 / 40, mode="bilinear", align_corners=False)[..., 6:38].permute(0, 2, 3, 1).numpy()
    assert (resize_clip(frames, (32, 32), "shorter-side", antialias=False) == scaled).all()


@pytest.mark.parametrize("side", range(30, 130))
def test_covering_sizes_never_fall_short(side: int) -> None:
    frames = np.zeros((1, side, side + 3, 1), np.uint8)
    assert resize_clip(frames, (64, 64), "shorter-side").shape == (1, 64, 64, 1)
    assert resize_clip(frames, (64, 64), "box-halving").shape == (1, 64, 64, 1)


def test_box_halving_is_pillows() -> None:
    frame = noise_frames(1, (150, 211))[0]
    image = Image.fromarray(frame)
    for size in ((105, 75), (52, 37)):
        image = image.resize(size, Image.Resampling.BOX)
    image = image.resize((round(52 * 32 / 37), 32), Image.Resampling.BICUBIC)
    left = (image.width - 32) // 2
    assert (resize_clip(frame[None], (32, 32), "box-halving")[0] == np.asarray(image)[:, left : left + 32]).all()


def test_every_release_has_a_complete_setting() -> None:
    for settings in RELEASES.values():
        assert set(settings) == {"resize", "antialias", "centre"} and settings["resize"] in RESIZE_MODES
