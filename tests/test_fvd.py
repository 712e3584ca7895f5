"""Frechet distance, I3D and what becomes of a clip before it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from metrics.frechet import Moments, frechet_distance
from metrics.fvd import fvd, moments, preprocess
from metrics.i3d import I3D, load_i3d, pool, same
from utils.errors import UserError


def features(count: int, dim: int, seed: int, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + offset


def moments_of(rows: Tensor, *splits: int) -> Moments:
    found = Moments(rows.shape[1])
    for part in rows.split(list(splits) or [len(rows)]):
        found.update(part)
    return found


# ---- Frechet distance


def test_distance_of_known_gaussians():
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    first, second = (
        Moments.of(11, torch.tensor(mean, dtype=torch.float64), 10 * torch.diag(torch.tensor(deviation, dtype=torch.float64) ** 2))
        for mean, deviation in (([0.0, 1.0, 2.0], [1.0, 2.0, 0.0]), ([1.0, 1.0, 0.0], [3.0, 0.5, 1.0]))
    )
    assert frechet_distance(first, second) == pytest.approx(5 + 4 + 2.25 + 1, rel=1e-12)
    assert frechet_distance(first, second, unbiased=False) == pytest.approx(5 + (4 + 2.25 + 1) * 10 / 11, rel=1e-12)


def test_distance_agrees_with_the_square_root_of_the_product():
    """Against eigenvalues of the product S1 S2, which are those under the root; both ways round; a set from itself."""
    first, second = features(300, 12, 0), features(200, 12, 1) + 0.3
    one, two = moments_of(first), moments_of(second)
    covariances = [np.cov(rows.numpy(), rowvar=False) for rows in (first, second)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)).sum()
    expected = float((first.mean(0) - second.mean(0)).square().sum()) + np.trace(covariances[0] + covariances[1]) - 2 * roots
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(two, one) == pytest.approx(expected, rel=1e-10)
    assert abs(frechet_distance(one, one)) < 1e-10


def test_fewer_vectors_than_dimensions():
    """Against the nuclear norm of Xc Yc^T, which needs no root of a singular matrix."""
    first, second = features(6, 40, 2), features(9, 40, 3)
    centred = [rows - rows.mean(0) for rows in (first, second)]
    cross = torch.linalg.matrix_norm(centred[0] @ centred[1].T, "nuc") / math.sqrt(5 * 8)
    traces = centred[0].square().sum() / 5 + centred[1].square().sum() / 8
    expected = float((first.mean(0) - second.mean(0)).square().sum() + traces - 2 * cross)
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(expected, rel=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 1000), st.sampled_from([0.0, 1e4]))
def test_moments_do_not_depend_on_the_batches(sizes, seed, offset):
    rows = features(sum(sizes), 5, seed, offset)
    if len(rows) < 2:
        return
    found, whole = moments_of(rows, *sizes), Moments(5)
    for part in rows.split(sizes):
        whole.merge(moments_of(part))
    for one in (found, whole):
        assert one.n == len(rows)
        np.testing.assert_allclose(one.mean, rows.mean(0), rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(one.covariance(), np.cov(rows.numpy(), rowvar=False), rtol=1e-9, atol=1e-10)


def test_wrong_features_are_refused():
    found = Moments(4)
    with pytest.raises(ValueError, match="at least 2"):
        found.covariance()
    with pytest.raises(ValueError, match=r"\(any, 4\)"):
        found.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="not finite"):
        found.update(torch.tensor([[1.0, 2.0, float("nan"), 0.0]]))
    found.update(torch.zeros(0, 4))
    assert found.n == 0


# ---- clips


def test_the_shorter_side_fits_and_the_middle_is_taken():
    """A picture that is bright in its middle columns only: they stay, the sides go. The longer side is rounded up."""
    video = torch.zeros(1, 3, 2, 10, 31, dtype=torch.uint8)
    video[..., 10:21] = 255
    out = preprocess(video, 10)
    assert out.shape == (1, 3, 2, 10, 10) and out.dtype == torch.float32 and torch.equal(out, torch.ones_like(out))
    assert preprocess(video, 10, "stretch").amin() == -1
    seen = preprocess(torch.zeros(1, 3, 1, 7, 9, dtype=torch.uint8), 5)
    assert seen.shape == (1, 3, 1, 5, 5) and seen.amax() == -1
    with pytest.raises(ValueError, match="uint8"):
        preprocess(video.float())


class Mean(nn.Module):
    """Two numbers of a clip."""

    def forward(self, video: Tensor) -> Tensor:
        return torch.stack([video.mean(dim=(1, 2, 3, 4)), video.std(dim=(1, 2, 3, 4))], dim=1)


def test_fvd_of_sets_is_that_of_their_features():
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, high, (6, 3, 2, 8, 8), generator=generator, dtype=torch.uint8) for high in (256, 128))
    rows = [Mean()(preprocess(videos)).double() for videos in (real, fake)]
    expected = frechet_distance(moments_of(rows[0]), moments_of(rows[1]))
    assert fvd(Mean(), real.split(4), fake.split(1)) == pytest.approx(expected, rel=1e-5) and expected > 0.1
    with pytest.raises(ValueError, match="no videos"):
        moments(Mean(), [])


# ---- I3D


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 1), (3, 2), (2, 2), (1, 1)])
def test_padding_is_tensorflows(size, kernel, stride):
    """ceil(size / stride) windows; of an odd number of zeros the last side gets one more."""
    padded = same(torch.ones(1, 1, size, size, size), (kernel,) * 3, (stride,) * 3)[0, 0, :, size // 2, size // 2]
    windows = -(-size // stride)
    assert (len(padded) - kernel) // stride + 1 == windows
    front, behind = int(padded.argmax()), len(padded) - int(padded.argmax()) - size
    assert 0 <= behind - front <= 1
    assert pool(torch.rand(1, 1, size, size, size), (kernel,) * 3, (stride,) * 3).shape[2:] == (windows,) * 3


def test_i3d_has_the_published_size_and_refuses_other_clips():
    with torch.device("meta"):
        net = I3D()
        assert sum(parameter.numel() for parameter in net.parameters()) == 12_697_264  # 12.70 M
        assert net(torch.zeros(2, 3, 9, 224, 224)).shape == (2, 400) and not net.training
        for shape in ((2, 3, 8, 224, 224), (2, 3, 16, 256, 256), (2, 3, 16, 192, 192), (2, 1, 16, 224, 224), (3, 16, 224, 224)):
            with pytest.raises(ValueError, match="I3D takes"):
                net(torch.zeros(shape))


def test_weights_load_from_a_file_or_are_refused_in_one_line(tmp_path):
    net = I3D(7)
    state = {f"module.{name}": value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "i3d.safetensors")
    loaded = load_i3d(tmp_path / "i3d.safetensors")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in net.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training
    torch.save(net.state_dict(), tmp_path / "i3d.pt")
    load_i3d(tmp_path / "i3d.pt")
    for broken, message in (("Mixed_4c.b2b.bn.running_var", "missing"), ("Conv3d_1a_7x7.conv3d.weight", r"of shape \[1\]")):
        wrong = {**state, f"module.{broken}": torch.zeros(1)}
        if message == "missing":
            del wrong[f"module.{broken}"]
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(UserError, match=f"wrong.safetensors is not the I3D.*{broken} is {message}") as error:
            load_i3d(tmp_path / "wrong.safetensors")
        assert "\n" not in str(error.value)
