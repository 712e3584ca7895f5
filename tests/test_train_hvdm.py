"""train_dit.py for HVDM from the stream to the export: what it measures, however it is spread, whatever the shards hold, restarts."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from engine.loop import fit
from launch.env import Env, distributed
from tasks import hvdm
from tasks.hvdm import build
from tests import pvdm_exports, shard_sets
from tests.distributed import run
from tests.hvdm_denoiser import DIT, ENV, SIDE, UNET, config, space_of
from tests.hvdm_exports import export_autoencoder
from tests.latent_sets import make
from tests.shard_sets import write_set
from tests.test_cli import command, complaint
from utils.config import load_yaml
from utils.errors import ConfigError, UserError
from utils.rng import SampleRng
from utils.weights import read_card

SHORT = ["--global-batch-size", "4", "--max-steps", "4", "--num-workers", "0", "--no-tensorboard", "--precision", "fp32"]
SHORT += ["--log-every", "1", "--preview-every", "0", "--eval-every", "0", "--ckpt-every", "0", "--lr", "1e-3"]
SHORT += ["--parallel", "ddp", "--compile", "off", "--ema-every", "2"]
ALL = ["--cond-prob", "0.4", "--img-prob", "0.3", "--dynamics-bins", "3"]


def flickering(number: int, count: int, size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    """Random frames, of a contrast that grows with the number."""
    noise = np.random.default_rng(number).integers(-1, 2, (count, *size, 3))
    return (128 + (number + 1) * 5 * noise).astype(np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 clips of 16 x 16 in each of `pixels` (16 or 5 frames), `single` (4), `pairs` (8), `long` (16); an autoencoder of 4 in `ae`."""
    folder = tmp_path_factory.mktemp("hvdm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_sets, "frames_of", flickering)
        for name, lengths in (("pixels", (16, 5)), ("single", (4,)), ("pairs", (8,)), ("long", (16,))):
            write_set(folder / name, (6, 6), lengths=lengths, size=(SIDE, SIDE))
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
    """Whatever the accumulation."""
    first = alone(arguments(root, *ALL), tmp_path / "first")
    again = alone(arguments(root, *ALL), tmp_path / "again")
    for which in ("model", "ema"):
        one, two = ((folder / "export" / f"{which}.safetensors").read_bytes() for folder in (first, again))
        assert one == two
    parts = alone(arguments(root, *ALL, "--accumulation", "2"), tmp_path / "parts")
    assert losses(parts) == pytest.approx(losses(first), rel=1e-5)


@pytest.mark.slow
def test_processes_however_joined_agree_with_one(root: Path, tmp_path: Path) -> None:
    """The first measures the motion, all use it."""
    whole = alone(arguments(root, *ALL), tmp_path / "one")
    ways = {"ddp": arguments(root, *ALL), "fsdp": arguments(root, *ALL, "--parallel", "fsdp")}
    for folder in run(train_all, ways=ways, results=str(tmp_path))[0].values():
        assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)
        assert read_card(folder)["dynamics"] == read_card(whole)["dynamics"]


def test_it_goes_on_where_it_stopped(root: Path, tmp_path: Path) -> None:
    """With the optimiser, the average and the classes of motion that it began with: the release's denoiser cannot go on at all."""
    whole = alone(arguments(root, *ALL), tmp_path / "whole")
    alone(arguments(root, *ALL, "--max-steps", "3"), tmp_path / "parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hvdm, "measure_motion", lambda *_: pytest.fail("they are measured when a run begins, once"))
        parts = alone(arguments(root, *ALL), tmp_path / "parts")
    assert losses(parts) == losses(whole)
    assert read_card(parts)["dynamics"] == read_card(whole)["dynamics"]
    for which in ("model", "ema"):
        one, two = ((folder / "export" / f"{which}.safetensors").read_bytes() for folder in (whole, parts))
        assert one == two
    assert {"task_emb.weight", "dynamics_emb.weight"} <= load_file(whole / "export" / "ema.safetensors").keys()


def test_motion_is_measured_on_the_first_clips(root: Path, tmp_path: Path) -> None:
    argv = ["--cond-prob", "0", "--dynamics-bins", "3"]
    card = read_card(alone(arguments(root, *argv, data="single"), tmp_path / "run"))
    low, high = card["dynamics"]["edges"]
    task, _, _ = build(config(*arguments(root, *argv, data="single")), ENV)
    space = space_of(task)
    task.measure()
    assert 0 < low < high and space.told.dynamics is not None and list(space.told.dynamics.edges) == [low, high]
    counts = torch.zeros(3)
    for number in range(12):
        clip = torch.from_numpy(flickering(number, 4)).permute(3, 0, 1, 2)[None]
        energy = space.energy({"video": clip}, _nobody())
        counts[torch.bucketize(energy.double(), torch.tensor([low, high], dtype=torch.float64))] += 1
    assert counts.tolist() == [4, 4, 4], "each class has as many clips"
    few = config(*arguments(root, *argv, "--dynamics-clips", "3", data="single"))
    task, _, _ = build(few, ENV)
    task.measure()
    other = space_of(task).told.dynamics
    assert other is not None and list(other.edges) != [low, high]
    assert card["model"]["dynamics_bins"] == 3 and card["cond_prob"] == 0


def test_motion_is_measured_on_the_sets_as_they_are_weighted(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of mostly still clips the stiller half does not move; of mostly lively ones it does."""
    monkeypatch.setattr(shard_sets, "frames_of", lambda number, count, size=(SIDE, SIDE): np.full((count, *size, 3), 128, np.uint8))
    write_set(tmp_path / "still", (6, 6), lengths=(4,), size=(SIDE, SIDE))
    edges = []
    for weights in (("9", "1"), ("1", "9")):
        sets = ["--data-path", str(root / "single"), str(tmp_path / "still"), "--data-weights", *weights]
        argv = [*SHORT, *sets, "--ae", str(root / "ae"), "--cond-prob", "0", "--dynamics-bins", "2"]
        task, _, _ = build(config(*argv), ENV)
        task.measure()
        dynamics = space_of(task).told.dynamics
        assert dynamics is not None
        edges.append(dynamics.edges[0])
    assert edges[0] > 0 and edges[1] == 0


def _nobody() -> SampleRng:
    return SampleRng(0, torch.arange(1))


@pytest.mark.parametrize("model", [UNET, DIT], ids=["unet", "dit"])
def test_stored_latents_train_too(root: Path, tmp_path: Path, model: list[str]) -> None:
    held = make(root / "pairs", root / "ae", tmp_path / "pairs", "--dtype", "float32")
    index = json.loads((held / "index.json").read_text())
    latent = [4, 4, 4, 4]
    assert index["tensors"] == {"latent": latent, "previous": latent, "dynamics": [1], "previous_dynamics": [1]}
    assert index["clip_length"] == 4 and index["samples"] == 12
    everyone = ["--cond-prob", "1", "--dynamics-bins", "3"]
    pixels = alone(arguments(root, *everyone, data="pairs"), tmp_path / "a", model)
    latents = alone([*SHORT, *everyone, "--data-path", str(held), "--n-frames", "4"], tmp_path / "b", model)
    assert losses(latents) == pytest.approx(losses(pixels), rel=1e-4), "there is one pair in each clip"
    cards = [read_card(folder) for folder in (pixels, latents)]
    assert cards[0]["ae"]["sha256"] == cards[1]["ae"]["sha256"] and cards[1]["data"]["n_frames"] == 4
    assert cards[0]["dynamics"]["edges"] == pytest.approx(cards[1]["dynamics"]["edges"], rel=1e-5)


def test_stored_stills_train_too(root: Path, tmp_path: Path) -> None:
    held = make(root / "single", root / "ae", tmp_path / "single", "--dtype", "float32", "--stills")
    assert json.loads((held / "index.json").read_text())["tensors"].keys() == {"latent", "still", "dynamics"}
    argv = ["--cond-prob", "0", "--img-prob", "0.5"]
    pixels = alone(arguments(root, *argv, data="single"), tmp_path / "a")
    latents = alone([*SHORT, *argv, "--data-path", str(held)], tmp_path / "b")
    assert losses(latents) == pytest.approx(losses(pixels), rel=1e-4)
    with pytest.raises(UserError, match="choose another --out"):
        make(root / "single", root / "ae", tmp_path / "single", "--dtype", "float32")


def test_half_precision_keeps_the_classes(root: Path, tmp_path: Path) -> None:
    """What is stored by default: eleven bits of the motion."""
    edges = []
    for dtype in ("float16", "float32"):
        held = make(root / "single", root / "ae", tmp_path / dtype, "--dtype", dtype)
        setting = config(*SHORT, "--cond-prob", "0", "--dynamics-bins", "3", "--data-path", str(held))
        task, _, _ = build(setting, ENV)
        task.measure()
        dynamics = space_of(task).told.dynamics
        assert dynamics is not None
        edges.append(list(dynamics.edges))
    assert edges[0] == pytest.approx(edges[1], rel=2e-3)


def test_stills_are_of_systems_that_start_from_pictures(root: Path, tmp_path: Path) -> None:
    other = pvdm_exports.export_autoencoder(tmp_path / "pvdm")
    with pytest.raises(ConfigError, match=r"--stills: the denoisers of pvdm start from no pictures; drop the flag$"):
        make(root / "single", other, tmp_path / "out", "--stills")


def test_frames_at_drawn_distances_train(root: Path, tmp_path: Path) -> None:
    argv = [*ALL, "--frame-strides", "1", "2"]
    folder = alone(arguments(root, *argv), tmp_path / "a")
    card = read_card(folder)
    assert card["model"]["strides"] == 2 and card["data"]["frame_strides"] == [1, 2]
    assert losses(folder) != losses(alone(arguments(root, *ALL), tmp_path / "b"))
    apart = read_card(alone(arguments(root, "--cond-prob", "0", "--frame-interval", "3", data="long"), tmp_path / "c"))
    assert apart["data"]["frame_interval"] == 3


def test_clips_that_nothing_comes_before_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"at most 4 frames, a clip and the one before it take 8; .*--cond-prob 0$") as error:
        build(config(*arguments(root, data="single")), ENV)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"at most 8 frames, a clip and the one before it take 15; "):
        build(config(*arguments(root, "--frame-strides", "2", data="pairs")), ENV)
    task, source, _ = build(config(*arguments(root)), ENV)
    assert source.data.previous and source.data.n_frames == 4 and task.name == "hvdm-denoiser"
    _, source, _ = build(config(*arguments(root, "--cond-prob", "0", "--img-prob", "0.5")), ENV)
    assert not source.data.previous, "a picture needs nothing before it"


def test_images_beside_the_clips_are_refused(root: Path) -> None:
    """They would be read and never looked at."""
    with pytest.raises(ConfigError, match=r"^--num-images 2: nothing here learns from images beside the clips; drop the flag$"):
        build(config(*arguments(root, "--cond-prob", "0", "--num-images", "2")), ENV)


def test_a_mistake_is_one_line_and_a_plan_measures_nothing(root: Path) -> None:
    argv = ["--system", "hvdm", *UNET]
    assert "--cond-prob 0" in complaint(command("train_dit.py", *argv, *arguments(root, data="single")))
    planned = command("train_dit.py", *argv, *arguments(root, *ALL, "--latent-scale", "0"), "--dry-run")
    assert planned.returncode == 0 and "motion of" not in planned.stderr, planned.stderr


@pytest.mark.parametrize("recipe", ["ucf101", "sky", "taichi"])
def test_recipes_are_complete(recipe: str) -> None:
    path = Path(__file__).parent.parent / "configs" / "hvdm" / f"{recipe}.yaml"
    found = config("--config", os.fspath(path), model=[])
    assert (found.system, found.stage, found.diffusion.schedule) == ("hvdm", "denoiser", "quad")
    assert found.cond_prob == (0.2 if recipe == "sky" else 0.3)
    assert (found.ema.every, found.ema.decay, found.optim.weight_decay, found.optim.clip_norm) == (25, 0.9999, 0.01, 0.0)
    assert load_yaml(path)["stages"].keys() == {"autoencoder", "denoiser"}
