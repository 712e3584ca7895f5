"""VIDM's two training commands from the stream to the export: however they are spread, restarts, evaluation on all ranks, mistakes."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine.manifest import find_damage
from launch.env import Env, distributed
from tests.distributed import run
from tests.scripts import commands, kill
from tests.shard_sets import write_set
from tests.vidm_stage import MODULES, SIZE, TINY, N, arguments, config, train, train_all
from utils.errors import ConfigError, UserError
from utils.rng import derive_seed
from utils.weights import read_card

STAGES = ("content", "motion")
ENV = Env(0, 1, 0, 1, torch.device("cpu"), "gloo")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 clips of 6 to 13 frames."""
    folder = tmp_path_factory.mktemp("vidm") / "clips"
    return write_set(folder, (6, 6), lengths=(N, 2 * N + 1), size=SIZE)


def script(stage: str) -> str:
    return f"train_{stage}_diffusion.py"


def alone(stage: str, argv: list[str], results: Path) -> Path:
    with distributed(60) as env:
        return Path(train(env, stage, [*argv, "--n-frames", str(N)], str(results)))


def losses(folder: str | Path, name: str = "loss") -> list[float]:
    lines = (json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def exported(folder: Path, which: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / f"{which}.safetensors")


def same_export(one: Path, two: Path) -> bool:
    names = ("model.safetensors", "ema.safetensors")
    return all((one / "export" / name).read_bytes() == (two / "export" / name).read_bytes() for name in names)


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_seed_gives_the_same_run(stage: str, data: Path, tmp_path: Path) -> None:
    """Whatever the accumulation, which the release needs to reach its batch of 48 on few devices, and whatever is recomputed."""
    first, again = (alone(stage, arguments(data), tmp_path / name) for name in ("first", "again"))
    assert same_export(first, again)
    for name, flags in {"parts": ["--accumulation", "2"], "recomputed": ["--activation-checkpointing", "block"]}.items():
        other = alone(stage, arguments(data, *flags), tmp_path / name)
        assert losses(other) == pytest.approx(losses(first), rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_it_goes_on_where_it_stopped_and_saves_the_last_step(stage: str, data: Path, tmp_path: Path) -> None:
    """With the optimiser, the average, the place in the stream and the noise. The release repeats a step, and never saves the last."""
    whole = alone(stage, arguments(data), tmp_path / "whole")
    alone(stage, arguments(data, "--max-steps", "3"), tmp_path / "parts")
    parts = alone(stage, arguments(data), tmp_path / "parts")
    assert losses(parts) == losses(whole) and len(losses(parts)) == 4
    assert same_export(parts, whole)
    last = whole / "checkpoints" / "step_0000004"
    assert last.is_dir() and find_damage(last) is None


def test_the_average_begins_as_a_copy_and_follows_every_step(data: Path, tmp_path: Path) -> None:
    flags = ["--ema-decay", "0.75", "--max-steps"]
    first, second = (alone("content", arguments(data, *flags, steps), tmp_path / steps) for steps in ("1", "2"))
    start = MODULES["content"].build(config("content", *arguments(data, "--n-frames", str(N))), ENV)[0]
    torch.manual_seed(derive_seed(start.config.train.seed, "weights"))
    average = start.networks()["model"].module.state_dict()
    for folder in (first, second):
        model, found = exported(folder, "model"), exported(folder, "ema")
        average = {name: 0.75 * average[name] + 0.25 * value for name, value in model.items()}
        assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in average.items())


def test_the_flow_network_is_trained_with_the_rest(data: Path, tmp_path: Path) -> None:
    """Jointly, by the same optimiser. A few steps are needed: what its flow is used for begins at zero."""
    few, more = (exported(alone("motion", arguments(data, "--max-steps", steps), tmp_path / steps), "model") for steps in ("2", "4"))
    moved = [name for name, value in more.items() if not torch.equal(value, few[name])]
    assert {name.split(".")[0] for name in moved} == {"encoder", "unet", "spynet"}
    names = [name for name in few if name.startswith("spynet.")]
    assert sum(name in moved for name in names) == len(names)
    # Decay alone would scale all weights alike.
    first = "spynet.levels.5.convs.4.weight"
    ratio = more[first] / few[first]
    assert ratio.std() > 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_in_bf16_stays_near(stage: str, data: Path, tmp_path: Path) -> None:
    exact, rounded = (alone(stage, arguments(data, "--precision", how), tmp_path / how) for how in ("fp32", "bf16"))
    assert losses(rounded) == pytest.approx(losses(exact), rel=2e-2) and losses(rounded) != losses(exact)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_processes_however_joined_agree_with_one(stage: str, data: Path, tmp_path: Path) -> None:
    """Also in evaluations and previews, for which the release asks one rank alone, which waits for the others for ever."""
    argv = arguments(data, "--n-frames", str(N), "--val-path", str(data), "--eval-every", "2", "--preview-every", "2")
    whole = alone(stage, argv, tmp_path / "one")
    assert len(losses(whole)) == 4 and len(losses(whole, "eval/loss")) == 2
    ways = {"ddp": argv, "fsdp": [*argv, "--parallel", "fsdp"]}
    for folder in map(Path, run(train_all, timeout=240, stage=stage, ways=ways, results=str(tmp_path))[0].values()):
        for name in ("loss", "eval/loss"):
            assert losses(folder, name) == pytest.approx(losses(whole, name), rel=1e-4)
        shown = {place.name.removeprefix("step_").partition(".")[0] for place in (folder / "samples").iterdir()}
        names = ("samples",) if stage == "content" else ("next", "video")
        assert shown == {f"{step:07}_{name}" for step in (2, 4) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_started_again_it_ends_with_the_same_bytes(stage: str, data: Path, tmp_path: Path) -> None:
    """Weights and average, on two processes, which the kill meets in the middle of an epoch and of a checkpoint."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    flags = ["--n-frames", str(N), "--parallel", "fsdp", "--max-steps", "5", "--ckpt-every", "2"]
    lines = [[*TINY, *arguments(data, *flags), "--results-dir", str(results)] for results in (killed, whole)]

    kill(script(stage), lines[0], "engine.manifest.digest_files", "step_0000004")
    (folder,) = killed.iterdir()
    places = folder / "checkpoints", folder / "export"
    assert {place.name for place in places[0].iterdir()} == {"step_0000002", ".step_0000004.tmp"}
    assert not places[1].exists()
    run(commands, timeout=240, script=script(stage), lines=lines)
    assert "from step 2 to 5, 2 process(es)" in (folder / "log.txt").read_text()
    assert losses(folder) == losses(whole / folder.name) and len(losses(folder)) == 5
    assert same_export(folder, whole / folder.name)
    assert (folder / "export" / "config.json").read_bytes() == (whole / folder.name / "export" / "config.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_compiled_step_changes_only_rounding(stage: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is one graph. What a compiler makes of the graphs takes minutes, and is not looked at here."""
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: original(self, backend="aot_eager", fullgraph=True, **how))
    plain, compiled = (alone(stage, arguments(data, "--max-steps", "2", "--compile", way), tmp_path / way) for way in ("off", "on"))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert exported(compiled, "ema").keys() == exported(plain, "ema").keys()


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_share_an_epoch_without_repeats(stage: str, data: Path) -> None:
    """The release shuffles on each rank by itself, so that some clips come twice and others never."""
    orders = []
    setting = config(stage, *arguments(data, "--n-frames", str(N)))
    streams = [MODULES[stage].build(setting, Env(rank, 2, rank, 2, torch.device("cpu"), "gloo"))[1] for rank in range(2)]
    steps = streams[0].steps_per_epoch
    for epoch in range(2):
        order = [stream.describe(4 * step + 2 * rank + k) for step in range(epoch * steps, (epoch + 1) * steps)
                 for rank, stream in enumerate(streams) for k in range(2)]  # fmt: skip
        assert max(Counter(order).values()) == 1 and len(order) == 12
        orders.append(order)
    assert orders[0] != orders[1], "each epoch has an order of its own"


@pytest.mark.parametrize("stage", STAGES)
def test_the_card_is_in_the_export(stage: str, data: Path, tmp_path: Path) -> None:
    card = read_card(alone(stage, arguments(data, "--max-steps", "1"), tmp_path))
    assert (card["system"], card["stage"], card["data"]["n_frames"]) == ("vidm", stage, N)


def test_latents_are_refused(data: Path, tmp_path: Path) -> None:
    held = write_set(tmp_path / "latents", (4,), codec="latent")
    with pytest.raises(UserError, match="holds latents: this stage learns from the frames of the clips they were made of"):
        MODULES["motion"].build(config("motion", *arguments(held)), ENV)


@pytest.mark.parametrize(
    ("stage", "argv", "message"),
    [
        ("motion", ["--n-frames", "1"], r"--n-frames 1: "),
        ("motion", ["--n-frames", "9"], r"its shortest video has 6 frames"),
        ("motion", ["--n-frames", "6", "--video-timesteps", "4"], r"--video-timesteps 4: at least --n-frames 6"),
        ("content", ["--n-frames", "6", "--image-size", "16", "16"], r"holds 8 12"),
        ("motion", ["--n-frames", "6", "--num-images", "2"], r"--num-images 2: nothing here learns from images"),
        ("content", ["--n-frames", "6", "--previous"], r"--previous: nothing here"),
        ("content", ["--n-frames", "6", "--global-batch-size", "5", "--accumulation", "2"], r"4|6"),
    ],
)
def test_mistakes_are_one_line(stage: str, argv: list[str], message: str, data: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        MODULES[stage].build(config(stage, *arguments(data, *argv)), ENV)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stage", STAGES)
def test_a_plan_and_a_mistake_of_the_command(stage: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TINY, *arguments(data, "--n-frames", str(N))]
    commands(ENV, script(stage), [[*argv, "--dry-run"]])
    planned = capsys.readouterr().out
    assert "GFLOP per sample, forward and backward" in planned and "not countable" not in planned
    assert "steps per epoch: 3; steps of the run: 4 (16 samples)" in planned
    with pytest.raises(ConfigError, match="did you mean '--n-frames'"):
        commands(ENV, script(stage), [[*argv, "--n-frame", "3"]])
