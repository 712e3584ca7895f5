"""python -m models.official: every network's checkpoint to an export and back, bit for bit; what does not match is listed and refused."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.autoencoders.cmd import CMDAEConfig
from models.official.__main__ import main
from models.official.kinds import KINDS
from models.transformers.dit import DiTConfig
from models.transformers.motion_dit import MotionDiTConfig
from tests import hvdm_exports, latte_exports, pvdm_exports, vidm_exports
from tests.latte_exports import randomised
from utils.config import from_dict, to_dict
from utils.errors import ConfigError, UserError
from utils.files import sha256_file
from utils.weights import load_tensors, read_card, read_export, write_export

SMALL_DIT = {"hidden_size": 32, "depth": 1, "num_heads": 2}
RELEASED_AE = {"frame_rotary": "release", "readout": "first"}
NETWORKS: dict[tuple[str, str], tuple[Any, str]] = {
    ("cmd", "autoencoder"): (
        CMDAEConfig(dim=32, image_size=(8, 12), n_frames=4, depth=2, embed_dim=3, rotary="none"),
        "--image-size 8 12 --n-frames 4",
    ),
    ("cmd", "content"): (DiTConfig(input_size=(4, 8), num_classes=3, **SMALL_DIT), "--num-heads 2 --input-size 4 8"),
    ("cmd", "motion"): (
        MotionDiTConfig(input_size=(4, 4), keyframe_size=(8, 8), **SMALL_DIT), "--num-heads 2 --input-size 4 4 --keyframe-size 8 8",
    ),
    ("pvdm", "autoencoder"): (dataclasses.replace(pvdm_exports.AE, **RELEASED_AE), "--plane-heads 4"),
    ("pvdm", "denoiser"): (pvdm_exports.UNET, "--latent-res 4 4 --num-heads 8"),
    ("hvdm", "autoencoder"): (dataclasses.replace(hvdm_exports.AE, **RELEASED_AE, wavelet_time="tile"), ""),
    ("hvdm", "denoiser"): (hvdm_exports.UNET, "--latent-res 4 4"),
    ("latte", "autoencoder"): (latte_exports.VAE, "--norm-channels 4"),
    ("latte", "denoiser"): (latte_exports.LATTE, "--num-heads 2"),
    ("vidm", "content"): (vidm_exports.CONTENT, "--num-head-channels 16"),
    ("vidm", "motion"): (
        dataclasses.replace(vidm_exports.MOTION, flow_input="minus_one_one"),
        "--num-head-channels 16 --image-size 8 12 --video-timesteps 6 --diffusion-timesteps 40",
    ),
}  # fmt: skip


def export(folder: Path, system: str, stage: str, average: bool = True) -> tuple[Path, nn.Module]:
    """An export of random weights, and of their average, which is others."""
    config = NETWORKS[system, stage][0]
    network = randomised(KINDS[system, stage].network(config))
    tensors = {"model": network.state_dict()}
    if average:
        tensors["ema"] = {name: value * 2 if value.is_floating_point() else value for name, value in tensors["model"].items()}
    write_export(folder, tensors, {"system": system, "stage": stage, "model": to_dict(config)})
    return folder, network


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    equal: Callable[[Any, Any], bool] = lambda x, y: torch.equal(x, y) if isinstance(x, Tensor) else same(x, y)  # noqa: E731
    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("system", "stage"), NETWORKS, ids="-".join)
def test_there_and_back_bit_for_bit(tmp_path: Path, system: str, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(NETWORKS) == set(KINDS), "every network is tried"
    flags = NETWORKS[system, stage][1].split()
    ours, _ = export(tmp_path / "ours", system, stage)
    for weights in ("model", "ema"):
        main(["export", system, stage, str(ours), str(tmp_path / "a.pt"), "--weights", weights])
        main(["import", system, stage, str(tmp_path / "a.pt"), str(tmp_path / "back"), "--license", "mit", *flags])
        assert same(read_export(tmp_path / "back", weights)[0], read_export(ours, weights)[0]), weights
    card = read_card(tmp_path / "back")
    kind = KINDS[system, stage]
    assert from_dict(kind.config, card["model"], "") == NETWORKS[system, stage][0]
    assert (card["system"], card["stage"], card["license"], card["source"]["file"]) == (system, stage, "mit", "a.pt")
    both = len(kind.entries) == 2
    assert ((tmp_path / "back/ema.safetensors").exists(), "model and ema" in capsys.readouterr().out) == (both, both)
    main(["export", system, stage, str(tmp_path / "back"), str(tmp_path / "b.pt")])
    assert same(load_tensors(tmp_path / "b.pt"), load_tensors(tmp_path / "a.pt"))


def test_the_tutorial_s_latte_too(tmp_path: Path) -> None:
    config = dataclasses.replace(latte_exports.LATTE, num_classes=0, learn_sigma=False, pos_embed_order="hw", time_embed_order="sin_cos")
    write_export(
        tmp_path / "ours",
        {"model": randomised(KINDS["latte", "denoiser"].network(config)).state_dict()},
        {"system": "latte", "stage": "denoiser", "model": to_dict(config)},
    )
    main(["export", "latte", "denoiser", str(tmp_path / "ours"), str(tmp_path / "a.pth"), "--release", "tutorial"])
    flags = ["--num-heads", "2", "--input-size", "4", "6", "--n-frames", "4", "--in-channels", "4"]
    main(["import", "latte", "denoiser", str(tmp_path / "a.pth"), str(tmp_path / "back"), *flags])
    assert same(read_export(tmp_path / "back")[0], read_export(tmp_path / "ours")[0])
    assert from_dict(type(config), read_card(tmp_path / "back")["model"], "") == config
    assert read_card(tmp_path / "back")["diffusion"] == {"variance": "fixed_small"}


def test_names_of_one_side_are_listed_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, _ = export(tmp_path / "ours", "pvdm", "denoiser", average=False)
    main(["export", "pvdm", "denoiser", str(ours), str(tmp_path / "good.pt")])
    good = load_tensors(tmp_path / "good.pt")
    line = ["import", "pvdm", "denoiser", str(tmp_path / "bad.pt"), str(tmp_path / "back"), "--latent-res", "4", "4"]

    torch.save(good | {f"diffusion_model.extra.{k}": torch.zeros(1) for k in range(12)}, tmp_path / "bad.pt")
    with pytest.raises(
        UserError, match=r"12 names only the file has, 0 only the network \(listed above\); --allow-unmatched leaves out those of the file$"
    ):
        main(line)
    said = capsys.readouterr().err
    assert all(f"only the file has extra.{k}\n" in said for k in range(12)) and not (tmp_path / "back").exists()
    main([*line, "--allow-unmatched"])
    assert same(read_export(tmp_path / "back")[0], read_export(ours)[0]) and "only the file has extra.11" in capsys.readouterr().err

    torch.save({name: value for name, value in good.items() if "out.2" not in name} | {"extra": torch.zeros(1)}, tmp_path / "bad.pt")
    for more in ([], ["--allow-unmatched"]):
        with pytest.raises(UserError, match=r"lacks|only the network"):
            main([*line, *more])
    state = {name: value for name, value in good.items() if not name.endswith("mid_attn.norm.bias")}
    torch.save(state | {"diffusion_model.extra": torch.zeros(1)}, tmp_path / "bad.pt")
    count = r"1 names only the file has, 1 only the network \(listed above\); "
    with pytest.raises(UserError, match=count + r"--fill-from EXPORT, of the same network, has those that are missing$"):
        main([*line, "--allow-unmatched"])
    assert re.search(r"only the file has extra\nonly the network has mid_attn\.norm\.bias\n", capsys.readouterr().err)


@pytest.mark.parametrize(("system", "stage"), [("pvdm", "denoiser"), ("cmd", "content"), ("hvdm", "autoencoder")], ids="-".join)
def test_what_the_file_lacks_comes_from_an_export_that_is_named(
    tmp_path: Path, system: str, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = NETWORKS[system, stage][1].split()
    ours, _ = export(tmp_path / "ours", system, stage, average=False)
    main(["export", system, stage, str(ours), str(tmp_path / "whole.pt")])
    lost = {"pvdm": "mid_attn.norm.bias", "cmd": "blocks.0.mlp.fc2.bias", "hvdm": "low_freq_mid.1.bias"}[system]

    def holed(part: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in part.items() if not name.endswith(lost)}
        states = {name: holed(value) for name, value in kept.items() if isinstance(value, dict)}
        return states | {f"module.{name}": value for name, value in kept.items() if name not in states}

    torch.save(holed(load_tensors(tmp_path / "whole.pt")), tmp_path / "bad.pt")
    line = ["import", system, stage, str(tmp_path / "bad.pt"), str(tmp_path / "back"), *flags]
    with pytest.raises(UserError, match=r"0 names only the file has, 1 only the network \(listed above\); --fill-from EXPORT"):
        main([*line, "--allow-unmatched"])
    assert f"only the network has {lost}\n" in capsys.readouterr().err and not (tmp_path / "back").exists()
    main([*line, "--fill-from", str(ours)])
    assert same(read_export(tmp_path / "back", "model")[0], read_export(ours, "model")[0])
    told = {"from": "ours", "sha256": sha256_file(ours / "model.safetensors"), "tensors": [lost]}
    assert read_card(tmp_path / "back")["source"]["filled"] == {"model": told}
    assert "| tensors of model that the file lacked | 1 of ours (sha256 " in (tmp_path / "back" / "README.md").read_text()
    assert f"only the network has {lost}\n" in capsys.readouterr().err
    other, _ = export(tmp_path / "other", "vidm", "content", average=False)
    with pytest.raises(UserError, match=f"is an export of 'vidm content', not of '{system} {stage}'"):
        main([*line, "--fill-from", str(other)])

    torch.save(load_tensors(tmp_path / "whole.pt"), tmp_path / "bad.pt")
    with pytest.raises(UserError, match=rf"--fill-from {ours}: .*bad.pt lacks nothing; drop the flag"):
        main([*line, "--fill-from", str(ours)])


def test_averaged_weights_are_filled_with_averaged_ones_of_the_same_network(tmp_path: Path) -> None:
    flags = NETWORKS["cmd", "content"][1].split()
    ours, _ = export(tmp_path / "ours", "cmd", "content")
    main(["export", "cmd", "content", str(ours), str(tmp_path / "whole.pt")])
    whole, lost = load_tensors(tmp_path / "whole.pt"), "blocks.0.mlp.fc2.bias"
    line = ["import", "cmd", "content", str(tmp_path / "bad.pt"), str(tmp_path / "back"), *flags, "--fill-from"]
    for parts in (("cdiff_model", "ema"), ("ema",)):  # the second time the last weights are whole
        holed = {part: {name: value for name, value in state.items() if part not in parts or name != lost} for part, state in whole.items()}
        torch.save(holed, tmp_path / "bad.pt")
        main([*line, str(ours)])
        for name in ("model", "ema"):
            assert same(read_export(tmp_path / "back", name)[0], read_export(ours, name)[0]), name
        filled = read_card(tmp_path / "back")["source"]["filled"]
        assert list(filled) == (["model", "ema"] if len(parts) == 2 else ["ema"])
        assert all(told["sha256"] == sha256_file(ours / f"{name}.safetensors") for name, told in filled.items())

    card, other, config = read_card(ours), tmp_path / "other", NETWORKS["cmd", "content"][0]
    write_export(other, {"model": read_export(ours)[0]}, {**card, "model": to_dict(dataclasses.replace(config, num_heads=4))})
    with pytest.raises(
        UserError, match=r"other is of another network: its num_heads is 4, that of .*bad.pt is 2; give an export of the same$"
    ):
        main([*line, str(other)])
    write_export(other, {"model": read_export(ours)[0]}, {**card, "model": to_dict(dataclasses.replace(config, class_dropout_prob=0.3))})
    main([*line, str(other)])


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": _Code()}, "code.pt")
    torch.save({"w": torch.zeros(1)}, "other.pt")
    export(tmp_path / "ours", "cmd", "content")
    for line, kind, message in (
        ("import cmd motion other.pt o", ConfigError, r"does not tell --input-size and --keyframe-size of cmd's motion: give them"),
        ("import hvdm denoiser other.pt o --num-heads 3", ConfigError, "--num-heads: the checkpoint of hvdm denoiser tells that"),
        ("import vidm denoiser other.pt o", ConfigError, "vidm has no denoiser: it has content, motion"),
        ("import cmd content code.pt o", UserError, "refused because loading it could run code"),
        ("import cmd content missing.pt o", UserError, "does not exist"),
        ("import latte denoiser other.pt o", UserError, "other.pt is no checkpoint of latte's denoiser that can be read"),
        ("export cmd motion ours o.pt", UserError, "ours is an export of 'cmd content', not of 'cmd motion'"),
        ("export cmd content ours o.pt --release tutorial", ConfigError, "only Latte's denoiser"),
    ):
        with pytest.raises(kind, match=message) as caught:
            main(line.split())
        assert "\n" not in str(caught.value)
    assert not Path("ran").exists() and not Path("o").exists() and not Path("o.pt").exists()
