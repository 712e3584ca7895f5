"""The 3-D Haar transform: PyWavelets' numbers, the inverse, energy, gradients, precision, sizes that are refused."""

import pytest
import pywt
import torch

from models.layers.wavelet import BANDS, haar3d, inverse_haar3d


@pytest.mark.parametrize("shape", [(1, 3, 4, 8, 8), (2, 1, 2, 6, 10), (1, 2, 40, 8, 4)])
def test_the_bands_are_pywavelets(shape):
    """Also for more frames than pixels, which the release could not transform."""
    x = torch.randn(shape)
    bands = haar3d(x)
    assert bands.shape == (shape[0], 8, shape[1], *(size // 2 for size in shape[2:])) and bands.is_contiguous()
    expected = pywt.dwtn(x.double().numpy(), "haar", axes=(2, 3, 4))
    for number, band in enumerate(BANDS):
        theirs = torch.from_numpy(expected[band.replace("L", "a").replace("H", "d")])
        torch.testing.assert_close(bands[:, number].double(), theirs, atol=1e-6, rtol=1e-6)


def test_signs_and_scale():
    constant = haar3d(torch.ones(1, 1, 2, 2, 2)).flatten()
    assert constant[0].item() == pytest.approx(8**0.5) and constant[1:].abs().max() < 1e-6
    falling = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1).expand(1, 1, 2, 2, 2)  # the even frame is the brighter one
    assert haar3d(falling).flatten()[BANDS.index("HLL")] > 0


def test_inverse_and_energy():
    x = torch.randn(2, 3, 6, 8, 10)
    bands = haar3d(x)
    torch.testing.assert_close(inverse_haar3d(bands), x, atol=2e-6, rtol=0)
    torch.testing.assert_close(bands.square().sum(), x.square().sum())
    torch.testing.assert_close(haar3d(inverse_haar3d(bands)), bands, atol=2e-6, rtol=0)


def test_gradients():
    x = torch.randn(1, 2, 4, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(haar3d, x) and torch.autograd.gradcheck(inverse_haar3d, haar3d(x).detach().requires_grad_())
    weights = torch.randn(1, 8, 2, 2, 1, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((haar3d(x) * weights).sum(), x)
    torch.testing.assert_close(gradient, inverse_haar3d(weights))  # orthogonal: the backward pass is the inverse


def test_float32_whatever_autocast_says():
    x = torch.randn(1, 3, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(haar3d(x), haar3d(x.clone())) and haar3d(x).dtype == torch.float32
        torch.testing.assert_close(inverse_haar3d(haar3d(x)), x, atol=2e-6, rtol=0)
    assert haar3d(x.bfloat16()).dtype == torch.float32 and haar3d(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("shape", "axis"), [((1, 3, 3, 8, 8), "time is 3"), ((1, 3, 4, 7, 8), "height is 7"), ((1, 3, 4, 8, 1), "width is 1")]
)
def test_odd_sizes_are_refused(shape, axis):
    with pytest.raises(ValueError, match=f"{axis} in .*not an even number"):
        haar3d(torch.zeros(shape))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"takes clips \(b, c, t, h, w\)"):
        haar3d(torch.zeros(3, 4, 8, 8))
    with pytest.raises(ValueError, match=r"takes subbands \(b, 8, c, t, h, w\)"):
        inverse_haar3d(torch.zeros(1, 7, 3, 2, 4, 4))


def test_one_graph():
    x = torch.randn(1, 3, 4, 8, 8)
    compiled = torch.compile(haar3d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), haar3d(x))
