"""Official checkpoints of CMD and DiT: both directions are exact, the config is read from the tensors, wrong files are named."""

import re

import pytest
import torch

from models import resolve
from models.autoencoders.cmd import CMDAEConfig, CMDAutoencoder
from models.discriminators import DiscriminatorConfig, Discriminators
from models.official import cmd, dit
from models.transformers.dit import ContentDiT, DiTConfig
from models.transformers.motion_dit import MotionDiT, MotionDiTConfig


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def autoencoder() -> CMDAutoencoder:
    return CMDAutoencoder(CMDAEConfig(dim=32, image_size=(8, 12), n_frames=4, depth=2, embed_dim=3, rotary="none"))


def test_autoencoder_there_and_back():
    model = autoencoder()
    official = cmd.export_autoencoder(model.state_dict())
    assert official["pre_xt.weight"].shape == (3, 32, 1, 1) and official["to_logit.1.weight"].shape == (32, 3, 2, 2)
    assert official["decoder.frame_rot_emb.inv_freqs"].shape == (32,) and abs(official["encoder.image_rot_emb.scales"][-1] - 5) < 1e-5
    assert same(cmd.import_autoencoder(official), model.state_dict())
    assert same(cmd.export_autoencoder(cmd.import_autoencoder(official)), official)
    assert cmd.autoencoder_config(official, (8, 12), 4) == model.config


def test_training_checkpoints_prefixes_and_missing_buffers():
    model = autoencoder()
    official = cmd.export_autoencoder(model.state_dict())
    wrapped = {"autoenc": {f"module.{name}": value for name, value in official.items()}, "opt": {}, "args": object()}
    assert same(cmd.import_autoencoder(wrapped), model.state_dict())
    without = {name: value for name, value in official.items() if "rot_emb" not in name}
    assert same(cmd.import_autoencoder(without), model.state_dict())


def test_the_averaged_weights_are_taken():
    model = ContentDiT(DiTConfig(input_size=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=3))
    plain = model.state_dict()
    average = {name: value + 1 for name, value in plain.items()}
    for entry, load in (("cdiff_model", cmd.import_content), ("model", dit.import_dit)):
        assert same(load({entry: plain, "ema": average}), average) and same(load({entry: plain}), plain)


def test_configs_from_tensors():
    with torch.device("meta"):
        content = ContentDiT(resolve("DiT-S/4"))
        motion = MotionDiT(resolve("MotionDiT-S/2", keyframe_size=(32, 64), keyframe_patch_size=8))
    assert dit.dit_config(content.state_dict()) == content.config == cmd.content_config(content.state_dict(), (32, 32))
    assert cmd.motion_config(motion.state_dict(), (16, 64), (32, 64)) == motion.config
    odd = ContentDiT(DiTConfig(input_size=(4, 4), hidden_size=32, depth=1, num_heads=2)).state_dict()
    with pytest.raises(ValueError, match="heads cannot be told from width 32"):
        dit.dit_config(odd)


def test_wrong_state_dicts_are_named():
    official = cmd.export_autoencoder(autoencoder().state_dict())
    del official["post_xt.bias"]
    with pytest.raises(ValueError, match=re.escape("missing post_xt.bias; unknown quantizer.weight")):
        cmd.import_autoencoder(official | {"quantizer.weight": torch.zeros(1)})
    motion = MotionDiT(MotionDiTConfig(input_size=(4, 4), hidden_size=32, depth=1, num_heads=2)).state_dict()
    with pytest.raises(ValueError, match=r"unknown keyframe_embedder\.proj\.bias, keyframe_embedder\.proj\.weight, keyframe_pos_embed"):
        cmd.import_content({"cdiff_model": motion})
    with pytest.raises(ValueError, match=r"nothing is called blocks\.0\.\*"):
        cmd.import_motion(official)
    with pytest.raises(ValueError, match="no state dict in the checkpoint: it has epoch, expected one of autoenc"):
        cmd.import_autoencoder({"epoch": 3})


def test_discriminators_are_the_release_s():
    model = Discriminators(DiscriminatorConfig())
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.discriminator_2d, model.discriminator_3d)]
    assert [round(count / 1e6, 2) for count in counts] == [2.77, 11.06]
    names = {name.rpartition(".")[0] for name in model.state_dict() if "3d" in name}
    places = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0)]
    assert names == {f"discriminator_3d.model{k}.{i}" for k, i in places}
    conv, norm, _ = model.discriminator_2d.model2
    assert abs(conv.weight.std() - 0.02) < 1e-3 and abs(norm.weight.mean() - 1) < 0.01 and norm.bias.abs().max() == 0
    assert conv.weight.shape == (256, 128, 4, 4) and conv.stride == (2, 2) and conv.padding == (2, 2)


def test_discriminator_widths_stop_at_512():
    model = Discriminators(DiscriminatorConfig(ndf=256, n_layers=3))
    assert [model.discriminator_2d.get_submodule(f"model{k}.0").out_channels for k in range(5)] == [256, 512, 512, 512, 1]
    frames, clips = model(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 4, 16, 16))
    assert len(frames) == len(clips) == 5 and frames[-1].shape[1] == clips[-1].shape[1] == 1
    with pytest.raises(ValueError, match="at least 1"):
        DiscriminatorConfig(n_layers=0)
