"""PSNR, SSIM and the per-clip mean of a perceptual distance."""

import math

import numpy as np
import pytest
import torch

from metrics.frames import PSNR_CAP, SSIM_WINDOW, lpips, psnr, quantise, ssim


def levels(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random 8-bit values as [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).float() / 127.5 - 1


def test_psnr_of_a_constant_error_is_its_formula() -> None:
    clip = torch.zeros(2, 3, 4, 8, 8)
    shifted = clip + torch.tensor([2.0, 8.0]).view(2, 1, 1, 1, 1) / 127.5
    start = quantise(clip)[0, 0, 0, 0, 0].item() * 255
    errors = [quantise(shifted)[i, 0, 0, 0, 0].item() * 255 - start for i in range(2)]
    expected = [20 * math.log10(255 / error) for error in errors]
    assert psnr(clip, shifted).tolist() == pytest.approx(expected, rel=1e-5)


def test_psnr_averages_frames_and_per_clip_averages_errors() -> None:
    clip = torch.full((1, 3, 2, 4, 4), -1.0)
    other = clip.clone()
    other[:, :, 0] += 2 * 5 / 255
    other[:, :, 1] += 2 * 51 / 255
    frames = [20 * math.log10(255 / 5), 20 * math.log10(255 / 51)]
    assert psnr(clip, other).item() == pytest.approx(sum(frames) / 2, rel=1e-4)
    assert psnr(clip, other, per_clip=True).item() == pytest.approx(10 * math.log10(255**2 / ((25 + 2601) / 2)), rel=1e-4)


def test_values_are_clamped_and_rounded_first() -> None:
    clip = levels(1, 3, 2, 12, 12)
    assert psnr(clip, clip + 0.4 / 127.5 * 0.99).item() == PSNR_CAP  # less than half a level
    assert psnr(torch.ones(1, 3, 1, 4, 4), torch.full((1, 3, 1, 4, 4), 7.0)).item() == PSNR_CAP


def ssim_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Every whole window of one channel, weighted moments written out."""
    axis = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(axis, axis) / axis.sum() ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb, cov = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum(), (weights * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return float(np.mean(values))


def test_ssim_is_its_definition() -> None:
    a, b = levels(2, 3, 2, 13, 15), levels(2, 3, 2, 13, 15, seed=1)
    mixed = 0.8 * a + 0.2 * b
    x, y = quantise(a).double().numpy(), quantise(mixed).double().numpy()
    expected = [np.mean([ssim_by_definition(x[i, c, t], y[i, c, t]) for c in range(3) for t in range(2)]) for i in range(2)]
    assert ssim(a, mixed).tolist() == pytest.approx(expected, abs=1e-5)
    assert ssim(a, a).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_ssim_refuses_frames_smaller_than_its_window() -> None:
    small = torch.zeros(1, 3, 1, SSIM_WINDOW - 1, 32)
    with pytest.raises(ValueError, match="10, 32"):
        ssim(small, small)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_lpips_is_the_mean_over_frames_of_each_clip(chunk: int) -> None:
    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    a, b = levels(2, 3, 5, 4, 4), levels(2, 3, 5, 4, 4, seed=1)
    assert lpips(distance, a, b, chunk=chunk).tolist() == pytest.approx((a - b).abs().mean(dim=(1, 2, 3, 4)).tolist(), rel=1e-5)
