"""Official checkpoints of HVDM's autoencoder: every name and shape of the release, both directions exact, wrong files are named."""

import json
import re
from pathlib import Path

import pytest
import torch

from models.autoencoders.hvdm import HVDMAEConfig, HVDMAutoencoder
from models.official import hvdm

MANIFEST = json.loads((Path(__file__).parent / "parity" / "data" / "hvdm_release_manifest.json").read_text())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shapes(state: dict) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


def autoencoder(**changes) -> HVDMAutoencoder:
    defaults = {"dim": 32, "image_size": (16, 24), "n_frames": 4, "depth": 2, "heads": 2, "head_dim": 16, "plane_depth": 3}
    defaults |= {"plane_mlp_dim": 24, "freq_widths": (4, 6, 8, 10), "fusion_depth": 1}
    return HVDMAutoencoder(HVDMAEConfig(**(defaults | hvdm.RELEASE | changes)))


def empty(part: str) -> dict[str, torch.Tensor]:
    """The release's state dict without storage."""
    return {name: torch.empty(shape, device="meta") for name, shape in MANIFEST[part].items()}


def test_the_release_s_autoencoder():
    with torch.device("meta"):
        model = HVDMAutoencoder(HVDMAEConfig(**hvdm.RELEASE))
        official = hvdm.export_autoencoder(model.state_dict(), model.config)
    assert shapes(official) == MANIFEST["autoencoder"] and len(official) == 401
    ours = hvdm.import_autoencoder(empty("autoencoder"))
    assert shapes(ours) == shapes(model.state_dict())
    assert hvdm.autoencoder_config(empty("autoencoder")) == model.config == hvdm.autoencoder_config(official, (256, 256))


def test_there_and_back():
    model = autoencoder()
    official = hvdm.export_autoencoder(model.state_dict(), model.config)
    assert official["pre_freq.weight"].shape == (4, 32, 1, 1, 1) and official["post_freq.weight"].shape == (32, 4, 1, 1, 1)
    assert official["high_freq.3.weight"].shape == (6, 4, 1, 3, 3) and official["low_freq_mid.0.weight"].shape == (32, 10, 1, 3, 3)
    assert same(hvdm.import_autoencoder(official), model.state_dict())
    assert same(hvdm.export_autoencoder(hvdm.import_autoencoder(official), model.config), official)


def test_prefixes_and_missing_buffers():
    model = autoencoder()
    official = hvdm.export_autoencoder(model.state_dict(), model.config)
    assert same(hvdm.import_autoencoder({f"module.{name}": value for name, value in official.items()}), model.state_dict())
    without = {name: value for name, value in official.items() if "rot_emb" not in name and name != "coords"}
    assert same(hvdm.import_autoencoder(without), model.state_dict())
    assert hvdm.autoencoder_config(without, head_dim=16) == model.config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"plane_heads": 2, "plane_head_dim": 6},
        {"n_frames": 6, "freq_widths": (4, 6), "fusion_depth": 3},
        {"patch_size": 4, "embed_dim": 3, "channels": 1, "freq_widths": (5,)},
    ],
)
def test_config_from_tensors(changes):
    model = autoencoder(**changes)
    official = hvdm.export_autoencoder(model.state_dict(), model.config)
    assert hvdm.autoencoder_config(official, plane_heads=model.config.plane_heads) == model.config
    with pytest.raises(ValueError, match="clips of 16 x 24, not 24 x 24"):
        hvdm.autoencoder_config(official, (24, 24))
    with pytest.raises(ValueError, match="plane_heads 5"):
        hvdm.autoencoder_config(official, plane_heads=5)


@pytest.mark.parametrize("option", [{"frame_rotary": "corrected"}, {"readout": "token"}, {"wavelet_time": "repeat"}])
def test_corrected_variants_do_not_pass_for_the_release_s(option):
    model = autoencoder(**option)
    with pytest.raises(ValueError, match=f"cannot run this autoencoder: .*{next(iter(option.values()))}"):
        hvdm.export_autoencoder(model.state_dict(), model.config)


def test_wrong_state_dicts_are_named():
    model = autoencoder()
    official = hvdm.export_autoencoder(model.state_dict(), model.config)
    del official["post_freq.bias"]
    for read in (hvdm.import_autoencoder, hvdm.autoencoder_config):
        with pytest.raises(ValueError, match=re.escape("missing post_freq.bias; unknown quantizer.weight")):
            read(official | {"quantizer.weight": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"nothing is called encoder\.layers\.0\.\*"):
            read(empty("unet"))
        with pytest.raises(ValueError, match="no state dict in the checkpoint: it has epoch"):
            read({"epoch": 3})
