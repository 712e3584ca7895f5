"""train_dit.py from the stream to the export: equal losses however it is spread and whatever the shards hold, restarts, plans, mistakes."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from engine.loop import fit
from launch.env import Env, distributed
from tasks.content import CMDContentConfig
from tasks.frame_vae_config import FrameVAERunConfig
from tasks.latent_config import LatteRunConfig
from tasks.latte import build
from tests.distributed import ROOT, run
from tests.latent_sets import make
from tests.latte_denoiser import ENV, TINY, config, vae_export
from tests.scripts import commands, kill
from tests.shard_sets import write_set
from tests.test_cli import command, complaint
from utils.config import load_config
from utils.errors import ConfigError, UserError
from utils.rng import SampleRng, derive_seed
from utils.weights import read_card

SHORT = [
    "--global-batch-size",
    "8",
    "--max-steps",
    "4",
    "--num-workers",
    "0",
    "--no-tensorboard",
    "--precision",
    "fp32",
    "--compile",
    "off",
]
SHORT += ["--log-every", "1", "--preview-every", "0", "--eval-every", "0", "--ckpt-every", "0", "--preview.samples", "2", "--lr", "1e-3"]
JOINT = ["--n-frames", "4", "--frame-interval", "2", "--clip-rule", "linspace", "--num-images", "2", "--num-classes", "2"]
JOINT += ["--clip-norm", "0.05", "--clip-start", "2", "--ema-decay", "0.9", "--parallel", "ddp"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips of 8 frames of 16 x 16 in `pixels`, a frame VAE in `ae`."""
    folder = tmp_path_factory.mktemp("dit")
    write_set(folder / "pixels", (12, 12), lengths=(8,), size=(16, 16))
    vae_export(folder / "ae")
    return folder


def arguments(root: Path, *argv: str, data: str = "pixels") -> list[str]:
    given = ["--ae", str(root / "ae")] if data == "pixels" else []
    return [*SHORT, "--data-path", str(root / data), *given, *argv]


def train(env: Env, argv: list[str], results: str) -> str:
    """Trains in this process; the run's folder."""
    setting = config(*argv, "--results-dir", results)
    task, source, valid = build(setting, env)
    return str(fit(task, source, setting, env, valid=valid))


def train_all(env: Env, ways: dict[str, list[str]], results: str) -> dict[str, str]:
    """Run folder of each way."""
    return {name: train(env, argv, f"{results}/{name}") for name, argv in ways.items()}


def alone(argv: list[str], results: Path) -> Path:
    with distributed(60) as env:
        return Path(train(env, argv, str(results)))


def losses(run: str | Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(run) / "metrics.jsonl").read_text().splitlines() if "loss" in json.loads(line)]


def weights(run: str | Path, which: str = "model") -> dict[str, Tensor]:
    return load_file(Path(run) / "export" / f"{which}.safetensors")


def reference(argv: list[str]) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """A plain loop over whole batches, written without the engine: losses, weights and average."""
    setting = config(*argv)
    task, source, _ = build(setting, ENV)
    torch.manual_seed(derive_seed(setting.train.seed, "weights"))
    networks = {name: network.module for name, network in task.networks().items()}
    model = networks["model"].train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.optim.lr, weight_decay=0.0, foreach=False)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    found, batches = [], source.batches(0)
    for step in range(setting.train.max_steps):
        batch = next(batches)
        loss = task.loss("model", networks, batch, SampleRng(setting.train.seed, batch["index"])).total / len(batch["index"])
        model.zero_grad()
        loss.backward()
        limit = setting.optim.clip_norm if step >= setting.optim.clip_start else math.inf
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        found.append(loss.item())
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - setting.ema.decay)
    return found, model.state_dict(), average


def check(run: str | Path, expected: tuple[list[float], dict[str, Tensor], dict[str, Tensor]]) -> None:
    """Losses agree at each step, and so do weights and average."""
    assert losses(run) == pytest.approx(expected[0], rel=2e-6)
    for which, values in (("model", expected[1]), ("ema", expected[2])):
        found = weights(run, which)
        assert found.keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=5e-5, msg=name)


def test_every_step_counts_from_the_first_whatever_the_accumulation(root: Path, tmp_path: Path) -> None:
    """The official release skips its first step, so that its first update sums one micro-batch too many, and clips partial sums."""
    expected = reference(arguments(root, *JOINT))
    assert len(set(expected[0])) == 4
    for parts in ("1", "2", "4"):
        check(alone(arguments(root, *JOINT, "--gradient-accumulation", parts), tmp_path / parts), expected)
    first = alone(arguments(root, *JOINT, "--accumulation", "2", "--max-steps", "1"), tmp_path / "first")
    moved = weights(first)["final_layer.linear.weight"].abs().max().item()
    assert moved == pytest.approx(1e-3, rel=1e-2), "the first step moves the zero weights by the learning rate"


@pytest.mark.slow
def test_processes_however_joined_agree_with_a_plain_loop(root: Path, tmp_path: Path) -> None:
    base = arguments(root, *JOINT)
    expected = reference(base)
    ways = {
        "ddp": base,
        "fsdp": [*base, "--parallel", "fsdp"],
        "fsdp-accumulated": [*base, "--parallel", "fsdp", "--accumulation", "2"],
        "fsdp-recomputed": [*base, "--parallel", "fsdp", "--activation-checkpointing", "block"],
    }
    for folder in run(train_all, ways=ways, results=str(tmp_path))[0].values():
        check(folder, expected)


def test_pixel_shards_and_latent_shards_train_alike(root: Path, tmp_path: Path) -> None:
    """Windows, images and draws are the same; even a scale that nobody gave, measured on all clips here."""
    latents = make(root / "pixels", root / "ae", tmp_path / "latents", "--dtype", "float32")
    automatic = ["--n-frames", "8", "--num-images", "1", "--run-name", "automatic"]
    for argv, tolerance in (([*JOINT, "--latent-scale", "2"], 1e-5), (automatic, 1e-4)):
        encoded = alone(arguments(root, *argv), tmp_path / "encoded")
        read = alone([*arguments(root, *argv), "--data-path", str(latents)], tmp_path / "read")
        assert losses(read) == pytest.approx(losses(encoded), rel=tolerance)
        without = alone([*SHORT, *argv, "--data-path", str(latents)], tmp_path / "without")
        assert losses(without) == losses(read), "latents need no autoencoder"
    cards = [read_card(folder)["latent"] for folder in (encoded, read)]
    assert cards[0]["scale"] == pytest.approx(cards[1]["scale"], rel=1e-3) and cards[0]["scale"] != 1
    draws = make(root / "pixels", root / "ae", tmp_path / "draws", "--store", "sample")
    assert len(losses(alone([*SHORT, *JOINT, "--data-path", str(draws)], tmp_path / "drawn"))) == 4, "ready posterior samples do as well"
    half = make(root / "pixels", root / "ae", tmp_path / "half")
    rounded = alone([*arguments(root, *JOINT, "--latent-scale", "2"), "--data-path", str(half)], tmp_path / "rounded")
    assert losses(rounded) == pytest.approx(reference(arguments(root, *JOINT, "--latent-scale", "2"))[0], rel=1e-2)


def test_a_measured_scale_is_one_over_the_deviation_and_survives(root: Path, tmp_path: Path) -> None:
    made = alone(arguments(root, "--n-frames", "8", "--ema-decay", "0"), tmp_path)
    card = read_card(made)
    assert {place.name for place in (made / "export").iterdir()} == {"model.safetensors", "config.json", "README.md"}, (
        "without an average none is handed on"
    )
    setting = config(*arguments(root, "--n-frames", "8"))
    task, source, _ = build(setting, ENV)
    networks = {name: network.module for name, network in task.networks().items()}
    drawn = []
    for step, batch in zip(range(3), source.batches(0), strict=False):
        assert step < 3
        drawn.append(task.space.latents(networks, batch, SampleRng(7, batch["index"]))[0])
    latents = torch.cat(drawn)
    assert latents.std().item() == pytest.approx(1, abs=0.02) and latents.mean().item() == pytest.approx(0, abs=0.02)
    assert task.state().items() >= {"latent_scale": card["latent"]["scale"], "latent_shift": card["latent"]["shift"]}.items()


def measured_losses(env: Env, argv: list[str], results: str) -> list[Any]:
    """Losses with a scale that is measured, on rank 0; and what a set that cannot be read says on this rank."""
    folder = train(env, argv, results)
    flat = [*argv, "--latent.measure_clips", "1"]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tasks.frame_latents.measure", _fails)
            build(config(*flat), env)
    except UserError as error:
        return [losses(folder), str(error)]
    return []


def _fails(*_: Any) -> None:
    raise UserError("the first clip is damaged")


@pytest.mark.slow
def test_all_processes_use_what_one_measures(root: Path, tmp_path: Path) -> None:
    argv = arguments(root, "--n-frames", "8", "--max-steps", "2")
    expected = losses(alone(argv, tmp_path / "one"))
    for found, error in run(measured_losses, argv=argv, results=str(tmp_path / "two")):
        assert found == pytest.approx(expected, rel=1e-5)
        assert error == "the first clip is damaged", "on every rank, and nobody waits"


def test_evaluation_and_previews_of_a_validation_set(root: Path, tmp_path: Path) -> None:
    made = alone(arguments(root, *JOINT, "--val-path", str(root / "pixels"), "--max-steps", "1", "--process", "flow"), tmp_path)
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/loss" in line for line in lines)
    assert {place.name for place in (made / "samples").iterdir()} >= {"step_0000001_samples.mp4"}
    card = read_card(made)
    assert card["diffusion"]["process"] == "flow" and not card["model"]["learn_sigma"]


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_bytes(root: Path, tmp_path: Path) -> None:
    """Weights, moments of the optimiser and average, on two processes, which the kill meets in mid-epoch and while they save."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    flags = [*TINY, *arguments(root, *JOINT, "--parallel", "fsdp", "--max-steps", "12", "--ckpt-every", "2")]
    lines = [[*flags, "--results-dir", str(results)] for results in (killed, whole)]

    kill("train_dit.py", lines[0], "engine.manifest.digest_files", "step_0000006")
    (folder,) = killed.iterdir()
    assert {place.name for place in (folder / "checkpoints").iterdir()} == {"step_0000002", "step_0000004", ".step_0000006.tmp"}
    assert not (folder / "export").exists()
    run(commands, script="train_dit.py", lines=lines)
    assert "from step 4 to 12, 2 process(es)" in (folder / "log.txt").read_text()
    assert losses(folder) == losses(whole / folder.name) and len(losses(folder)) == 12
    for name in ("model.safetensors", "ema.safetensors", "config.json", "README.md"):
        assert (folder / "export" / name).read_bytes() == (whole / folder.name / "export" / name).read_bytes()


@pytest.mark.slow
def test_a_compiled_step_changes_only_rounding(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is one graph. What a compiler makes of such graphs is seen with the engine's."""
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: original(self, backend="aot_eager", fullgraph=True, **how))
    short = arguments(root, *JOINT, "--max-steps", "2")
    plain, compiled = (alone([*short, "--compile", way], tmp_path / way) for way in ("off", "on"))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    assert weights(compiled).keys() == weights(plain).keys()


def test_a_dry_run_tells_what_a_run_needs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands(ENV, "train_dit.py", [[*TINY, *arguments(root, *JOINT), "--dry-run"]])
    said = capsys.readouterr().out
    assert "model (Latte): " in said and "vae (ImageVae): " in said
    assert "GFLOP per sample, forward and backward" in said and "not countable" not in said
    assert "steps per epoch: 3; steps of the run: 4 (32 samples)" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ae", "nowhere"], "nowhere"),
        (["--ae", ""], "which autoencoder"),
        (["--n-frames", "9"], "8 frames"),
        (["--num-clases", "1"], "did you mean '--num-classes'"),
        (["--num-classes", "1"], "has 2 classes"),
        (["--use-text-embed"], "no condition vectors"),
        (["--global-batch-size", "25"], "24"),
    ],
)
def test_mistakes_are_one_line(root: Path, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build(config(*arguments(root), *argv), ENV)
    assert "\n" not in str(error.value)


def test_a_mistake_ends_the_script_with_its_line(root: Path) -> None:
    done = command("train_dit.py", *TINY, *arguments(root), "--ae", "nowhere")
    assert "nowhere" in complaint(done)


def test_recipes_of_other_systems_and_stages_are_named() -> None:
    def refused(schema: type, system: str, prog: str, recipe: str) -> str:
        with pytest.raises(ConfigError) as error:
            load_config({system: schema}, ["--config", str(ROOT / "configs" / recipe)], prog=prog)
        return str(error.value)

    assert "system 'cmd'; train_dit.py trains: latte" in refused(LatteRunConfig, "latte", "train_dit.py", "cmd/tiny.yaml")
    assert "system 'latte'" in refused(CMDContentConfig, "cmd", "train_content_diffusion.py", "latte/tiny.yaml")
    assert "use train_dit.py" in refused(FrameVAERunConfig, "latte", "train_ae.py", "latte/ffs-official.yaml")
