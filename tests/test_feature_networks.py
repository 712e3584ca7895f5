"""Networks that figures look through: FID's Inception and VideoMAE's ViT-g, against other implementations, and the files they load."""

import hashlib
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import inception as torchvisions

from evaluation.extractors import open_extractor
from evaluation.protocols import PROTOCOLS
from metrics import inception, videomae
from metrics.inception import FidInception, load_inception
from metrics.videomae import VideoMae, VideoMaeConfig, load_videomae, positions
from utils.errors import UserError
from utils.published import WeightFile

TINY = VideoMaeConfig(width=24, depth=2, heads=3, hidden=40, classes=5, frames=4, patch=56)


@pytest.fixture(scope="module")
def random_inception() -> FidInception:
    """With deviations that keep signals of the size of the input through all layers."""
    torch.manual_seed(0)
    net = FidInception()
    for name, value in net.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value)
        elif name.endswith("bn.bias"):
            value.normal_(std=0.1)
    return net


@pytest.fixture
def tiny_mae() -> VideoMae:
    torch.manual_seed(0)
    net = VideoMae(TINY)
    for value in net.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return net


# ---- Inception


def test_the_published_file_fits_inception() -> None:
    """Names and shapes are torchvision's with 1008 classes and without the auxiliary head, as the file's are."""
    with torch.device("meta"):
        ours = FidInception()
        theirs = torchvisions.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {n: v.shape for n, v in theirs.state_dict().items()}
    assert sum(value.numel() for value in ours.parameters()) == 23_850_960 and ours.fc.weight.shape == (1008, 2048)


def test_inception_is_torchvisions_but_for_three_poolings(random_inception: FidInception) -> None:
    """Torchvision's network with averages that count no padding and, in its last block, the largest."""
    with torch.device("meta"):
        theirs = torchvisions.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    theirs = theirs.to_empty(device="cpu").eval()
    theirs.load_state_dict(random_inception.state_dict())
    theirs.fc = torch.nn.Identity()
    images = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    average, calls = F.avg_pool2d, []

    def pool(x: Tensor, **how: int) -> Tensor:
        calls.append(x.shape)
        return F.max_pool2d(x, **how) if len(calls) == 9 else average(x, **how, count_include_pad=False)

    with torch.no_grad():
        found, plain = random_inception(images), theirs(images)
        with patch.object(torchvisions.F, "avg_pool2d", pool):
            expected = theirs(images)
    assert found.shape == (1, 2048) and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 0.01, "torchvision's own arithmetic gives other features"


def test_images_are_stretched_to_the_range_of_inception() -> None:
    images = torch.tensor([[0, 255]], dtype=torch.uint8).expand(1, 3, 4, 2)
    seen = inception.preprocess(images)
    assert seen.shape == (1, 3, 299, 299) and (seen.amin().item(), seen.amax().item()) == pytest.approx((-1, 1))
    assert (seen[0, 0, 0].diff() >= 0).all() and seen[0, 0, 0, 149] == pytest.approx(0, abs=1e-5), "half-pixel centres"
    with pytest.raises(ValueError, match="uint8 is wanted"):
        inception.preprocess(images.float())
    with pytest.raises(ValueError, match="Inception takes"):
        FidInception()(torch.zeros(1, 3, 224, 224))


def test_inception_loads_its_file_and_no_other(tmp_path: Path, random_inception: FidInception) -> None:
    state = {name: value for name, value in random_inception.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "own.safetensors")
    loaded = load_inception(tmp_path / "own.safetensors").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    google = {**state, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    lacking = {name: value for name, value in state.items() if name != "Mixed_7c.branch_pool.bn.bias"}
    for tensors, words in (
        (google, "torchvision's Inception v3 (1000 classes), another network than FID's"),
        (lacking, "Mixed_7c.branch_pool.bn.bias is missing"),
        (state | {"fc.weight": torch.zeros(7, 2048)}, "fc.weight is of shape [7, 2048]"),
    ):
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(UserError) as error:
            load_inception(tmp_path / "other.safetensors")
        assert words in str(error.value) and inception.FILE.name in str(error.value) and "\n" not in str(error.value)


# ---- VideoMAE


def test_the_published_file_fits_videomae() -> None:
    with torch.device("meta"):
        net = VideoMae()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert sum(value.numel() for value in net.parameters()) == 1_011_855_918 and len(shapes) == 2 + 40 * 13 + 4
    assert shapes["patch_embed.proj.weight"] == (1408, 3, 2, 14, 14) and shapes["head.weight"] == (174, 1408)
    assert shapes["blocks.39.attn.qkv.weight"] == (4224, 1408) and shapes["blocks.39.attn.v_bias"] == (1408,)
    assert shapes["blocks.0.mlp.fc1.weight"] == (6144, 1408) and shapes["fc_norm.bias"] == (1408,)
    assert "blocks.0.attn.qkv.bias" not in shapes and net.config.tokens == 2048


def test_videomae_is_the_one_of_transformers(tiny_mae: VideoMae) -> None:
    """Another implementation with the same weights gives the same features."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements-optional.txt)")
    config = transformers.VideoMAEConfig(
        image_size=224, patch_size=56, num_frames=4, tubelet_size=2, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, layer_norm_eps=1e-6, num_labels=5, use_mean_pooling=True,
    )  # fmt: skip
    theirs = transformers.VideoMAEForVideoClassification(config).eval()
    ours = tiny_mae.state_dict()
    state = {f"videomae.embeddings.patch_embeddings.projection.{kind}": ours[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias")}
    state |= {
        f"{there}.{kind}": ours[f"{here}.{kind}"]
        for here, there in (("fc_norm", "fc_norm"), ("head", "classifier"))
        for kind in ("weight", "bias")
    }
    pairs = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    for number in range(2):
        here, there = f"blocks.{number}.", f"videomae.encoder.layer.{number}."
        for own, other in pairs.items():
            state |= {f"{there}{other}.{kind}": ours[f"{here}{own}.{kind}"] for kind in ("weight", "bias")}
        q, k, v = ours[f"{here}attn.qkv.weight"].chunk(3)
        state |= {f"{there}attention.attention.{name}.weight": value for name, value in (("query", q), ("key", k), ("value", v))}
        state |= {f"{there}attention.attention.{name}.bias": ours[f"{here}attn.{name[0]}_bias"] for name in ("query", "value")}
    theirs.load_state_dict(state)
    theirs.classifier = torch.nn.Identity()
    video = torch.rand(2, 3, 4, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(tiny_mae(video), theirs(video.transpose(1, 2)).logits, rtol=1e-4, atol=1e-5)


def test_positions_are_sines_beside_cosines() -> None:
    table = positions(3, 4)
    torch.testing.assert_close(table[2, ::2], torch.tensor([2.0, 0.02]).sin())
    torch.testing.assert_close(table[2, 1::2], torch.tensor([2.0, 0.02]).cos())


@pytest.mark.parametrize("wrap", ["", "module", "model"])
def test_videomae_loads_its_file_and_no_other(tmp_path: Path, tiny_mae: VideoMae, wrap: str) -> None:
    state = tiny_mae.state_dict()
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "mae.pth")
    loaded = load_videomae(tmp_path / "mae.pth", TINY).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    with pytest.raises(UserError, match=r"mae\.pth is not VideoMAE's ViT-g/14 .*: .* is of shape \[24, 3, 2, 56, 56\], \[1408") as error:
        load_videomae(tmp_path / "mae.pth")
    assert "\n" not in str(error.value)


def test_videomae_sees_stretched_videos_of_its_length(tmp_path: Path, tiny_mae: VideoMae, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels / 255 with no mean and no deviation, as the protocol says; features, not classes."""
    monkeypatch.setattr(videomae, "VideoMaeConfig", lambda: TINY)
    torch.save({"module": tiny_mae.state_dict()}, tmp_path / "mae.pth")
    rules, cpu = PROTOCOLS["videomae"], torch.device("cpu")
    detector = open_extractor("videomae", str(tmp_path / "mae.pth"), "--i3d", rules, cpu)
    videos = torch.randint(0, 256, (2, 3, 4, 14, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = torch.stack([F.interpolate(video.float().transpose(0, 1), (224, 224), mode="bilinear").transpose(0, 1) for video in videos])
    rows = detector(videos)
    torch.testing.assert_close(rows, tiny_mae(seen / 255).detach(), rtol=1e-4, atol=1e-4)
    about = detector.identity()
    assert rows.shape == (2, 24) and (about["kind"], about["pixels"]) == ("videomae", "[0, 1]")
    assert about["sha256"] == hashlib.sha256((tmp_path / "mae.pth").read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"mae\.pth cannot take videos of 6 frames, 14 x 20: VideoMAE takes 4 frames of 224 x 224"):
        detector(torch.zeros(1, 3, 6, 14, 20, dtype=torch.uint8))
    with pytest.raises(UserError, match=rf"no such file; wanted is VideoMAE's ViT-g/14 \({videomae.FILE}, 1.0 billion weights\)"):
        open_extractor("videomae", str(tmp_path / "gone.pth"), "--i3d", rules, cpu)


# ---- files


def test_a_published_file_is_missing_damaged_or_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / inception.FILE.name
    with pytest.raises(UserError) as error:
        inception.FILE.find()
    words = str(error.value)
    assert all(part in words for part in (inception.FILE.name, "91 MB", str(place), "--inception FILE")) and "\n" not in words
    place.parent.mkdir(parents=True)
    place.write_bytes(b"cut")
    with pytest.raises(UserError, match="is damaged: its SHA-256 does not begin with 6726825d"):
        inception.FILE.find()
    with pytest.raises(UserError, match="gone does not exist: "):
        inception.FILE.find(str(tmp_path / "gone"))
    good = WeightFile(f"net-{hashlib.sha256(b'whole').hexdigest()[:8]}.pth", "5 B")
    (place.parent / good.name).write_bytes(b"whole")
    assert good.find() == place.parent / good.name == good.find(str(place.parent / good.name))
