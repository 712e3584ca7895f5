"""Official checkpoints of PVDM's first stage: every name and shape of the release, both directions exact, wrong files are named."""

import json
import re
from pathlib import Path

import pytest
import torch

from models.autoencoders.pvdm import PVDMAEConfig, PVDMAutoencoder
from models.discriminators import DiscriminatorConfig, Discriminators
from models.official import criterion as official_criterion
from models.official import pvdm

MANIFEST = json.loads((Path(__file__).parent / "parity" / "data" / "pvdm_statedict_manifest.json").read_text())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shapes(state: dict) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


def autoencoder(**changes) -> PVDMAutoencoder:
    defaults = {
        "dim": 32,
        "image_size": (16, 24),
        "n_frames": 4,
        "depth": 2,
        "heads": 2,
        "head_dim": 16,
        "plane_depth": 3,
        "plane_mlp_dim": 24,
    }
    return PVDMAutoencoder(PVDMAEConfig(**(defaults | changes)))


def empty(part: str) -> dict[str, torch.Tensor]:
    """The release's state dict without storage."""
    return {name: torch.empty(shape, device="meta") for name, shape in MANIFEST[part].items()}


def test_the_release_s_autoencoder():
    with torch.device("meta"):
        model = PVDMAutoencoder(PVDMAEConfig())
        official = pvdm.export_autoencoder(model.state_dict(), model.config)
    assert shapes(official) == MANIFEST["autoencoder"] and len(official) == 415
    ours = pvdm.import_autoencoder(empty("autoencoder"))
    assert shapes(ours) == shapes(model.state_dict())
    assert pvdm.autoencoder_config(empty("autoencoder")) == model.config == pvdm.autoencoder_config(official, (256, 256))


def test_autoencoder_there_and_back():
    model = autoencoder()
    official = pvdm.export_autoencoder(model.state_dict(), model.config)
    assert official["pre_xt.weight"].shape == (4, 32, 1, 1) and official["coords"].flatten().tolist() == pytest.approx(
        [-1, -1 / 3, 1 / 3, 1]
    )
    assert same(pvdm.import_autoencoder(official), model.state_dict())
    assert same(pvdm.export_autoencoder(pvdm.import_autoencoder(official), model.config), official)


def test_prefixes_and_missing_buffers():
    model = autoencoder()
    official = pvdm.export_autoencoder(model.state_dict(), model.config)
    assert same(pvdm.import_autoencoder({f"module.{name}": value for name, value in official.items()}), model.state_dict())
    without = {name: value for name, value in official.items() if "rot_emb" not in name and name != "coords"}
    assert same(pvdm.import_autoencoder(without), model.state_dict())
    assert pvdm.autoencoder_config(without, head_dim=16) == model.config


@pytest.mark.parametrize(
    "changes",
    [{}, {"plane_heads": 2, "plane_head_dim": 6}, {"n_frames": 8, "splits": 2}, {"patch_size": 4, "embed_dim": 3, "channels": 1}],
)
def test_config_from_tensors(changes):
    model = autoencoder(**changes)
    official = pvdm.export_autoencoder(model.state_dict(), model.config)
    told = pvdm.autoencoder_config(official, splits=model.config.splits, plane_heads=model.config.plane_heads)
    assert told == model.config
    with pytest.raises(ValueError, match="clips of 16 x 24, not 24 x 24"):
        pvdm.autoencoder_config(official, (24, 24))
    with pytest.raises(ValueError, match="plane_heads 5"):
        pvdm.autoencoder_config(official, plane_heads=5)


def test_corrected_variants_do_not_pass_for_the_release_s():
    for option in ({"frame_rotary": "corrected"}, {"readout": "token"}):
        model = autoencoder(**option)
        with pytest.raises(ValueError, match=f"cannot run this autoencoder: .*{next(iter(option.values()))}"):
            pvdm.export_autoencoder(model.state_dict(), model.config)


def test_wrong_state_dicts_are_named():
    model = autoencoder()
    official = pvdm.export_autoencoder(model.state_dict(), model.config)
    del official["post_xt.bias"]
    for read in (pvdm.import_autoencoder, pvdm.autoencoder_config):
        with pytest.raises(ValueError, match=re.escape("missing post_xt.bias; unknown quantizer.weight")):
            read(official | {"quantizer.weight": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"nothing is called encoder\.layers\.0\.\*"):
            read(empty("diffusion"))
        with pytest.raises(ValueError, match="no state dict in the checkpoint: it has epoch"):
            read({"epoch": 3})


def test_the_release_s_criterion():
    criterion = official_criterion.import_criterion({f"module.{name}": value for name, value in empty("first_stage_loss").items()})
    with torch.device("meta"):
        discriminators = Discriminators(DiscriminatorConfig())
    assert shapes(criterion.discriminators) == shapes(discriminators.state_dict())
    assert len(criterion.trunk) == 26 and criterion.trunk["features.28.weight"].shape == (512, 512, 3, 3)
    assert criterion.heads["lin4.model.1.weight"].shape == (1, 512, 1, 1)
    back = official_criterion.export_criterion(criterion)
    assert shapes(back) == MANIFEST["first_stage_loss"] and back["perceptual_loss.scaling_layer.shift"].flatten()[0] == pytest.approx(-0.03)
    with pytest.raises(ValueError, match=r"no tensor of it is called discriminator_2d"):
        official_criterion.import_criterion(empty("autoencoder"))
    damaged = {name: value for name, value in empty("first_stage_loss").items() if "lin3" not in name}
    with pytest.raises(ValueError, match=r"missing perceptual_loss\.lin3\.model\.1\.weight"):
        official_criterion.import_criterion(damaged)
