"""Saved folders: all networks of a system in one place, which works wherever it lies, for sample.py and in code; what is wrong is said."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.official.__main__ import main as official
from pipelines.cmd import CMDPipeline
from pipelines.hvdm import HVDMPipeline
from pipelines.latte import LattePipeline
from pipelines.pretrained import from_pretrained, main
from pipelines.pvdm import PVDMPipeline
from pipelines.sampling import Sampling
from tests import cmd_family, hvdm_exports, latte_exports, pvdm_exports, vidm_exports
from tests.sampling import contents, make
from utils.errors import UserError
from utils.files import sha256_file
from utils.weights import load_card, read_card, read_export, write_export

FAMILIES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "cmd": (cmd_family.family, ["autoencoder", "content", "motion"]),
    "latte": (latte_exports.family, ["autoencoder", "denoiser"]),
    "pvdm": (pvdm_exports.family, ["autoencoder", "denoiser"]),
    "hvdm": (hvdm_exports.family, ["autoencoder", "denoiser"]),
    "vidm": (vidm_exports.family, ["motion", "content"]),
}
STEPS = ("--steps", 2, "--num-samples", 2, "--seed", 3)
FEW = Sampling(steps=2)


def samples(out: Path, runs: Path) -> dict[str, Any]:
    """What sample.py writes, but for where the networks were read, which settings and a page of them say."""
    length = ("--num-frames", 3) if "vidm" in out.name else ()
    files: dict[str, Any] = contents(make(out, runs, *STEPS, *length))
    settings = json.loads(files.pop("settings.json"))
    del settings["sources"]
    files.pop("index.html", None)
    return files | {"settings": settings}


def pvdm(root: Path) -> Path:
    """Results of training, whose denoiser has an average."""
    runs = pvdm_exports.family(root)
    state, card, _ = read_export(runs["denoiser"])
    average = {name: value * 0.9 for name, value in state.items()}
    write_export(runs["denoiser"] / "export", {"model": state, "ema": average}, card | {"license": "mit"})
    return root


@pytest.mark.parametrize("system", FAMILIES)
def test_a_saved_folder_is_the_runs_wherever_it_lies(tmp_path: Path, system: str, capsys: pytest.CaptureFixture[str]) -> None:
    family, stages = FAMILIES[system]
    family(tmp_path / "runs")
    expected = samples(tmp_path / f"{system}-a", tmp_path / "runs")
    main(["save", str(tmp_path / "runs"), str(tmp_path / "saved")])
    assert f"saved: {system} with {', '.join(stages)}\n" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "runs")
    os.replace(tmp_path / "saved", tmp_path / "moved")
    everything = "".join(path.read_text() for path in (tmp_path / "moved").rglob("*") if path.suffix in (".json", ".md"))
    assert str(tmp_path) not in everything, "no places of this machine"
    assert samples(tmp_path / f"{system}-b", tmp_path / "moved") == expected
    pipeline = from_pretrained(tmp_path / "moved")
    assert pipeline.system == system
    again = pipeline.save_pretrained(tmp_path / "again")
    assert contents(again) == contents(tmp_path / "moved"), "saving what was saved changes nothing"


def test_both_weights_or_those_in_use(tmp_path: Path) -> None:
    runs = pvdm(tmp_path / "runs")
    main(["save", str(runs), str(tmp_path / "both")])
    main(["save", str(runs), str(tmp_path / "used"), "--weights", "used", "--license", "apache-2.0"])
    names = {place: sorted(path.name for path in (tmp_path / place / "denoiser").iterdir()) for place in ("both", "used")}
    assert names["both"] == ["README.md", "config.json", "ema.safetensors", "model.safetensors"]
    assert names["used"] == ["README.md", "config.json", "ema.safetensors"]
    digest = sha256_file(runs / "001-pvdm-denoiser/export/ema.safetensors")
    assert all(sha256_file(tmp_path / place / "denoiser/ema.safetensors") == digest for place in names)
    plain = [from_pretrained(place, weights="model").generate([0], sampling=FEW) for place in (runs, tmp_path / "both")]
    average = [from_pretrained(place).generate([0], sampling=FEW) for place in (runs, tmp_path / "used")]
    assert torch.equal(*plain) and torch.equal(*average) and not torch.equal(plain[0], average[0])
    told = {place: load_card(tmp_path / place)["license"] for place in names}
    assert told == {"both": "see each network", "used": "apache-2.0"}
    assert read_card(tmp_path / "both/denoiser")["license"] == "mit"
    readme = (tmp_path / "used/README.md").read_text()
    assert (
        readme.startswith("---\nlibrary_name: kinoform\nlicense: apache-2.0\n") and "from_pretrained" in readme and "## denoiser" in readme
    )


def test_networks_of_a_release_are_saved_as_ours(tmp_path: Path) -> None:
    places = hvdm_exports.official(tmp_path / "release")
    pipeline = HVDMPipeline.from_exports(places["denoiser"], places["ae"])
    saved = pipeline.save_pretrained(tmp_path / "saved", license="other terms")
    again = from_pretrained(saved)
    clips = [made.generate([0], sampling=FEW) for made in (pipeline, again)]
    assert torch.equal(*clips) and read_card(saved / "denoiser")["license"] == "other terms"
    assert not pipeline.ae.antialias and not again.ae.antialias, "its frames were made smaller without a filter"
    assert torch.equal(HVDMPipeline.from_exports(saved / "denoiser").generate([0], sampling=FEW), clips[0])


def test_a_released_latte_is_saved_with_its_image_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = latte_exports.family(tmp_path / "runs")
    official(["export", "latte", "denoiser", str(runs["denoiser"]), str(tmp_path / "latte.pt")])
    vae = str(latte_exports.sd_folder(tmp_path / "vae", monkeypatch))
    pipeline = LattePipeline.from_exports(tmp_path / "latte.pt", vae=vae, num_heads=2, image_size=(8, 8))
    saved = pipeline.save_pretrained(tmp_path / "saved")
    again = from_pretrained(saved)
    assert again.clip_shape == pipeline.clip_shape == (4, 8, 8) and again.scale == pipeline.scale == 0.18215
    assert torch.equal(again.generate([0], [1], sampling=FEW), pipeline.generate([0], [1], sampling=FEW))
    assert make(tmp_path / "out", saved, "--steps", 1, "--num-samples", 1).is_dir()


def test_one_network_of_a_saved_folder_finds_its_autoencoder(tmp_path: Path) -> None:
    main(["save", str(pvdm(tmp_path / "runs")), str(tmp_path / "saved")])
    shutil.rmtree(tmp_path / "runs")
    alone = PVDMPipeline.from_exports(tmp_path / "saved/denoiser")
    assert torch.equal(alone.generate([0], sampling=FEW), from_pretrained(tmp_path / "saved").generate([0], sampling=FEW))


def test_an_image_vae_from_elsewhere_is_saved_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = latte_exports.sd_folder(tmp_path / "vae", monkeypatch)
    (vae / "code.py").write_text("raise SystemExit")
    told = {"sha256": sha256_file(vae / "diffusion_pytorch_model.safetensors"), "weights": "model", "path": str(vae), "kind": "sd"}
    latte_exports.export_denoiser(tmp_path / "runs/000-latte-denoiser", told)
    main(["save", str(tmp_path / "runs"), str(tmp_path / "saved")])
    expected = from_pretrained(tmp_path / "runs").generate([0], [1], sampling=FEW)
    shutil.rmtree(vae)
    pipeline = from_pretrained(tmp_path / "saved")
    assert isinstance(pipeline, LattePipeline) and torch.equal(pipeline.generate([0], [1], sampling=FEW), expected)
    assert sorted(path.name for path in (tmp_path / "saved/vae").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]

    places = cmd_family.family(tmp_path / "cmd")
    state, card, _ = read_export(places["ae"])
    latent = card | {"model": card["model"] | {"mode": "latent"}}
    latte_exports.sd_folder(tmp_path / "vae", monkeypatch)
    write_export(places["ae"] / "export", {"model": state}, latent | {"vae": {"scale_factor": 0.5, "sha256": told["sha256"]}})
    ours = CMDPipeline.from_exports(places["ae"], vae=str(tmp_path / "vae"), scale_factor=0.5)
    ours.save_pretrained(tmp_path / "saved-cmd")
    shutil.rmtree(tmp_path / "vae")
    again = CMDPipeline.from_exports(tmp_path / "saved-cmd/autoencoder")
    assert again.vae is not None and again.vae.scale_factor == 0.5


def test_what_is_wrong_with_a_saved_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = pvdm(tmp_path / "runs")
    main(["save", "runs", "saved"])
    before = contents(tmp_path / "saved")
    with pytest.raises(UserError, match="saved is there already: give another folder, or delete it"):
        main(["save", "runs", "saved"])
    assert contents(tmp_path / "saved") == before

    def broken(name: str, change: Callable[[Path], Any]) -> str:
        shutil.copytree("saved", name)
        change(tmp_path / name)
        with pytest.raises(UserError) as caught:
            from_pretrained(name)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def rewrite(**changes: Any) -> Callable[[Path], Any]:
        return lambda place: (place / "config.json").write_text(json.dumps(json.loads((place / "config.json").read_text()) | changes))

    assert "is not whole: it has no autoencoder/" in broken("a", lambda place: shutil.rmtree(place / "autoencoder"))
    assert "names parts that no system has" in broken("b", rewrite(parts=["../../etc"]))
    assert "is an export of 'pvdm autoencoder', not of 'hvdm autoencoder'" in broken("c", rewrite(system="hvdm"))
    assert "no denoiser network in it" in broken("d", rewrite(parts=["autoencoder"]))
    assert "has format 7" in broken("e", rewrite(format=7))
    assert "is not the file that" in broken(
        "f", lambda place: shutil.copy(place / "denoiser/model.safetensors", place / "denoiser/ema.safetensors")
    )
    write_export(runs / "000-pvdm-autoencoder/export", {"model": {"w": torch.zeros(1)}}, read_card(runs / "000-pvdm-autoencoder"))
    for call, message in (
        (lambda: read_export("saved"), "holds the networks of a whole system"),
        (lambda: make(tmp_path / "out", "saved", "--system", "hvdm"), "it holds the networks of pvdm, not of hvdm"),
        (lambda: main(["push", "runs", "me/model"]), "runs is no saved folder"),
        (lambda: from_pretrained("nowhere"), "no such folder"),
        (lambda: from_pretrained("saved", system="toy"), "system toy: there are cmd"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_weights_that_have_changed_since_are_not_saved(tmp_path: Path) -> None:
    runs = pvdm(tmp_path / "runs")
    pipeline = from_pretrained(runs)
    state, card, _ = read_export(runs / "001-pvdm-denoiser", "model")
    write_export(runs / "001-pvdm-denoiser/export", {"model": {name: value + 1 for name, value in state.items()}}, card)
    with pytest.raises(UserError, match="has other weights now than when it was read"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"], "nothing half made is left"
