"""train_dit.py for PVDM from the stream to the export: however it is spread, whatever the shards hold, restarts, mistakes."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from engine.loop import fit
from launch.env import Env, distributed
from tasks.pvdm import build
from tests.distributed import run
from tests.latent_sets import make
from tests.pvdm_denoiser import DIT, ENV, UNET, config
from tests.pvdm_exports import export_autoencoder
from tests.shard_sets import write_set
from tests.test_cli import command, complaint
from utils.config import load_yaml
from utils.errors import ConfigError, UserError
from utils.weights import read_card

SHORT = ["--global-batch-size", "4", "--max-steps", "4", "--num-workers", "0", "--no-tensorboard", "--precision", "fp32"]
SHORT += ["--log-every", "1", "--preview-every", "0", "--eval-every", "0", "--ckpt-every", "0", "--lr", "1e-3"]
SHORT += ["--parallel", "ddp", "--compile", "off"]
SHORT += ["--ema-every", "2", "--cond-prob", "0.5"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 clips of 10 or 5 frames of 16 x 16 in `pixels`, of 4 in `single`, of 8 in `pairs`, an autoencoder of 4 frames in `ae`."""
    folder = tmp_path_factory.mktemp("pvdm")
    write_set(folder / "pixels", (6, 6), lengths=(10, 5), size=(16, 16))
    write_set(folder / "single", (6, 6), lengths=(4,), size=(16, 16))
    write_set(folder / "pairs", (6, 6), lengths=(8,), size=(16, 16))
    export_autoencoder(folder / "ae")
    return folder


def arguments(root: Path, *argv: str, data: str = "pixels") -> list[str]:
    return [*SHORT, "--data-path", str(root / data), "--ae", str(root / "ae"), *argv]


def train(env: Env, argv: list[str], results: str, model: list[str] = UNET) -> str:
    """Trains in this process; the run's folder."""
    setting = config(*argv, "--results-dir", results, model=model)
    task, source, valid = build(setting, env)
    return str(fit(task, source, setting, env, valid=valid))


def train_all(env: Env, ways: dict[str, list[str]], results: str) -> dict[str, str]:
    """Run folder of each way."""
    return {name: train(env, argv, f"{results}/{name}") for name, argv in ways.items()}


def alone(argv: list[str], results: Path, model: list[str] = UNET) -> Path:
    with distributed(60) as env:
        return Path(train(env, argv, str(results), model))


def losses(folder: str | Path) -> list[float]:
    lines = (json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_the_same_seed_gives_the_same_run(root: Path, tmp_path: Path) -> None:
    """Whatever the accumulation. The release seeds its parent process alone, so that no two runs are alike."""
    first = alone(arguments(root), tmp_path / "first")
    again = alone(arguments(root), tmp_path / "again")
    for which in ("model", "ema"):
        one, two = ((folder / "export" / f"{which}.safetensors").read_bytes() for folder in (first, again))
        assert one == two
    parts = alone(arguments(root, "--accumulation", "2"), tmp_path / "parts")
    assert losses(parts) == pytest.approx(losses(first), rel=1e-5)
    assert losses(alone(arguments(root, "--seed", "1"), tmp_path / "other")) != pytest.approx(losses(first), rel=1e-3)


@pytest.mark.slow
def test_processes_however_joined_agree_with_one(root: Path, tmp_path: Path) -> None:
    expected = losses(alone(arguments(root), tmp_path / "one"))
    ways = {"ddp": arguments(root), "fsdp": arguments(root, "--parallel", "fsdp")}
    for folder in run(train_all, ways=ways, results=str(tmp_path))[0].values():
        assert losses(folder) == pytest.approx(expected, rel=1e-5)


def test_it_goes_on_where_it_stopped_with_its_average(root: Path, tmp_path: Path) -> None:
    """The release saves neither optimiser nor step, and its average under names that have lost their dots."""
    whole = alone(arguments(root), tmp_path / "whole")
    alone(arguments(root, "--max-steps", "3"), tmp_path / "parts")
    parts = alone(arguments(root), tmp_path / "parts")
    assert losses(parts) == losses(whole)
    for which in ("model", "ema"):
        one, two = ((folder / "export" / f"{which}.safetensors").read_bytes() for folder in (whole, parts))
        assert one == two
    model, average = (load_file(whole / "export" / f"{which}.safetensors") for which in ("model", "ema"))
    assert model.keys() == average.keys() and any(name.count(".") > 2 for name in average)
    assert any(not torch.equal(model[name], average[name]) for name in model)


def test_the_average_is_taken_every_so_many_steps(root: Path, tmp_path: Path) -> None:
    """Of steps 2 and 4, with the warm-up's decays 2/11 and 3/12."""
    runs = {steps: alone(arguments(root, "--max-steps", str(steps)), tmp_path / str(steps)) for steps in (2, 4)}
    setting = config(*arguments(root))
    weights = {steps: load_file(folder / "export" / "model.safetensors") for steps, folder in runs.items()}
    first = load_file(runs[2] / "export" / "ema.safetensors")
    final = load_file(runs[4] / "export" / "ema.safetensors")
    assert setting.ema.warmup and setting.ema.every == 2
    for name, value in final.items():
        torch.testing.assert_close(value, first[name] * 0.25 + weights[4][name] * 0.75, msg=name)


@pytest.mark.parametrize("model", [UNET, DIT], ids=["unet", "dit"])
def test_stored_latents_train_too(root: Path, tmp_path: Path, model: list[str]) -> None:
    held = make(root / "pairs", root / "ae", tmp_path / "pairs", "--dtype", "float32")
    index = json.loads((held / "index.json").read_text())
    assert index["tensors"] == {"latent": [4, 48], "previous": [4, 48]} and index["clip_length"] == 4 and index["samples"] == 12
    everyone = ["--cond-prob", "1"]
    pixels = alone(arguments(root, *everyone, data="pairs"), tmp_path / "a", model)
    latents = alone([*SHORT, *everyone, "--data-path", str(held), "--n-frames", "4"], tmp_path / "b", model)
    assert losses(latents) == pytest.approx(losses(pixels), rel=1e-4), "there is one pair in each clip"
    cards = [read_card(folder) for folder in (pixels, latents)]
    assert cards[0]["ae"]["sha256"] == cards[1]["ae"]["sha256"] and cards[1]["data"]["n_frames"] == 4


def test_which_latents_are_stored(root: Path, tmp_path: Path) -> None:
    """Pairs where clips are long enough; those that are not are left out, and counted."""
    for data, flags, samples, names in (
        ("pairs", [], 12, ["latent", "previous"]),
        ("pairs", ["--no-pairs"], 24, ["latent"]),
        ("pairs", ["--no-pairs", "--window-stride", "1"], 60, ["latent"]),
        ("single", [], 12, ["latent"]),
        ("pixels", ["--pairs"], 6, ["latent", "previous"]),
        ("pixels", ["--no-pairs"], 6 * 2 + 6, ["latent"]),
    ):
        out = tmp_path / f"{data}{len(list(tmp_path.iterdir()))}"
        index = json.loads((make(root / data, root / "ae", out, *flags) / "index.json").read_text())
        assert (index["samples"], sorted(index["tensors"])) == (samples, names)
    assert index["left_out"]["short"] == 0
    assert json.loads((tmp_path / "pixels4" / "index.json").read_text())["left_out"]["short"] == 6
    with pytest.raises(ConfigError, match=r"takes clips of 8 frames, those of .* have 4"):
        make(root / "single", root / "ae", tmp_path / "none", "--pairs")
    with pytest.raises(ConfigError, match="says itself how many frames"):
        make(root / "single", root / "ae", tmp_path / "none", "--n-frames", "4")


def test_a_run_goes_on_with_its_own_autoencoder_only(root: Path, tmp_path: Path) -> None:
    ae = export_autoencoder(tmp_path / "ae")
    argv = [*SHORT, "--data-path", str(root / "pixels"), "--ae", str(ae)]
    alone([*argv, "--max-steps", "2"], tmp_path / "runs")
    export_autoencoder(ae, seed=1)
    with pytest.raises(UserError, match=r"began with other weights of the autoencoder .*--resume none$"):
        alone(argv, tmp_path / "runs")


def test_a_scale_may_be_measured(root: Path, tmp_path: Path) -> None:
    held = make(root / "single", root / "ae", tmp_path / "latents", "--dtype", "float32")
    argv = ["--latent-scale", "0", "--cond-prob", "0", "--process", "flow", "--max-steps", "1"]
    pixels = alone(arguments(root, *argv, data="single"), tmp_path / "a")
    latents = alone([*SHORT, *argv, "--data-path", str(held)], tmp_path / "b")
    cards = [read_card(folder)["latent"] for folder in (pixels, latents)]
    assert cards[0]["scale"] == pytest.approx(cards[1]["scale"], rel=1e-5) and cards[0]["scale"] != 1
    assert read_card(pixels)["cond_prob"] == 0, "what sampling needs to know before it goes on after a clip"
    assert cards[0]["shift"] == pytest.approx(cards[1]["shift"], rel=1e-4)


def test_clips_that_nothing_comes_before_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"at most 4 frames, a clip and the one before it take 8; .*--clip-length 8 .*--cond-prob 0$"
    ) as error:
        build(config(*arguments(root, data="single")), ENV)
    assert "\n" not in str(error.value)
    made, source, _ = build(config(*arguments(root)), ENV)
    assert source.data.previous and source.data.n_frames == 4, "the autoencoder's"
    _, source, _ = build(config(*arguments(root, "--cond-prob", "0")), ENV)
    assert not source.data.previous
    assert made.name == "pvdm-denoiser"


def test_clips_without_an_autoencoder_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="which autoencoder"):
        build(config(*SHORT, "--data-path", str(root / "pixels")), ENV)


def test_a_mistake_is_one_line(root: Path) -> None:
    done = command("train_dit.py", "--system", "pvdm", *UNET, *arguments(root, data="single"))
    assert "--cond-prob 0" in complaint(done)


@pytest.mark.parametrize("recipe", ["ucf101", "sky", "dit", "tiny"])
def test_recipes_are_complete(recipe: str) -> None:
    path = Path(__file__).parent.parent / "configs" / "pvdm" / f"{recipe}.yaml"
    found = config("--config", os.fspath(path), model=[])
    assert found.system == "pvdm" and found.stage == "denoiser"
    settings = load_yaml(path)
    if recipe in ("ucf101", "sky"):
        assert found.cond_prob == {"ucf101": 0.3, "sky": 0.2}[recipe] and found.diffusion.schedule == "quad"
        assert (found.ema.every, found.optim.weight_decay, found.optim.clip_norm, found.parallel.precision) == (25, 0.01, 0.0, "fp32")
        assert settings["stages"].keys() == {"autoencoder", "denoiser"}
    if recipe == "dit":
        assert found.diffusion.process == "flow"
