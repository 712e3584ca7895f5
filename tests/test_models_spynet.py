"""SPyNet: warping, sides of any size, its file of trained weights."""

import re
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from engine.shard import unit_policy
from models.layers.spynet import SpyNet, load_spynet
from models.layers.warp import warp
from tests.vidm_networks import pictures, randomised
from utils.errors import UserError


def test_whole_pixels_are_taken_from_where_the_flow_points() -> None:
    picture = torch.arange(30.0).reshape(1, 1, 5, 6)
    flow = torch.zeros(1, 2, 5, 6)
    assert torch.allclose(warp(picture, flow), picture, atol=1e-5)
    flow[:, 0], flow[:, 1] = 2, -1  # two columns right, one row up
    moved = warp(picture, flow)
    assert torch.allclose(moved[0, 0, 1:, :4], picture[0, 0, :4, 2:], atol=1e-5)
    assert torch.allclose(moved[0, 0, 0, :4], picture[0, 0, 0, 2:], atol=1e-5)  # beyond the edge: the edge
    assert torch.allclose(moved[0, 0, 1:, 5], picture[0, 0, :4, 5], atol=1e-5)
    flow[:, 0], flow[:, 1] = 0.5, 0
    assert torch.allclose(warp(picture, flow)[..., :5], picture[..., :5] + 0.5, atol=1e-5)
    assert torch.equal(warp(picture[..., :1, :1], torch.zeros(1, 2, 1, 1)), picture[..., :1, :1])


@pytest.mark.parametrize("size", [(32, 64), (20, 33), (1, 1), (128, 40)])
def test_any_size(size: tuple[int, int]) -> None:
    model, (ref, supp) = randomised(SpyNet()), pictures(1, size, kinds=2)
    assert model(ref, supp).shape == (1, 2, *size)


def test_flow_of_resized_pictures_is_in_pixels_of_the_given_ones() -> None:
    model, (ref, supp) = SpyNet(), pictures(1, (16, 48), kinds=2)  # computed at 32 x 64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.levels[-1].convs[-1].bias.copy_(torch.tensor([4.0, 8.0]))
        flow = model(ref, supp)
    assert flow[0, 0].unique().tolist() == [4.0 * 48 / 64] and flow[0, 1].unique().tolist() == [8.0 * 16 / 32]


def test_flow_doubles_from_level_to_level() -> None:
    model, (ref, supp) = SpyNet(), pictures(1, (32, 32), kinds=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.levels[0].convs[-1].bias.copy_(torch.tensor([0.25, -0.5]))
        flow = model(ref, supp)
    torch.testing.assert_close(flow[0, :, 3, 4], torch.tensor([0.25 * 32, -0.5 * 32]))


def official(model: SpyNet) -> dict[str, torch.Tensor]:
    """Its weights as mmediting's file names them."""
    pattern = re.compile(r"levels\.(\d)\.convs\.(\d)\.")
    return {pattern.sub(r"basic_module.\1.basic_module.\2.conv.", name): value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("layout", ["bare", "buffers", "wrapped"])
def test_trained_weights_are_read(tmp_path: Path, layout: str) -> None:
    model = randomised(SpyNet())
    content = official(model) | ({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)} if layout == "buffers" else {})
    torch.save({"state_dict": content} if layout == "wrapped" else content, tmp_path / "spynet.pth")
    again = SpyNet()
    again.load_state_dict(load_spynet(tmp_path / "spynet.pth"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_file_that_is_missing_or_another_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pth does not exist: give mmediting's spynet_20210409-c6c1bd09\.pth"):
        load_spynet(tmp_path / "none.pth")
    for name, content in (("few", official(SpyNet(levels=5))), ("other", {"weight": torch.zeros(2)})):
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=rf"{name}\.pth has not the tensors of a SPyNet of 6 levels"):
            load_spynet(tmp_path / f"{name}.pth")


def test_sharding_leaves_its_weights_whole() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert unit_policy(SpyNet(), policy).param_dtype is None
    assert unit_policy(SpyNet().levels[0], policy) is policy
