"""The entry scripts as a user meets them: help, recipes, the release's flags, and mistakes that end in one clear line on every rank."""

import re
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig
from tasks.autoencoder_config import CMDAutoencoderConfig
from tasks.content import CMDContentConfig
from tasks.frame_vae_config import FrameVAERunConfig
from tasks.latent_config import LatteRunConfig
from tasks.motion import CMDMotionConfig
from tests import distributed
from utils.config import load_config, load_yaml, to_dict
from utils.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "configs" / "cmd" / "tiny.yaml")
STAGES = {"train_ae.py": CMDAutoencoderConfig, "train_content_diffusion.py": CMDContentConfig, "train_motion_diffusion.py": CMDMotionConfig}
LATTE = {"train_ae.py": FrameVAERunConfig, "train_dit.py": LatteRunConfig}
SMALL = ["--config", TINY, "--model.dim", "16", "--model.depth", "1", "--global-batch-size", "4", "--num-workers", "0", "--log-every", "1"]
SMALL += ["--preview-every", "0", "--eval-every", "0", "--ckpt-every", "1", "--no-tensorboard"]


def command(script: str, *argv: str, ranks: int = 1) -> distributed.Done:
    """A script in processes of its own."""
    return distributed.command([script, *argv], ranks, timeout=180, COLUMNS="100")


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed command has to say, without a traceback of ours."""
    assert done.returncode != 0
    ours = re.findall(rf'File "{re.escape(str(ROOT))}/(?!\.venv).*', done.stderr)
    assert not ours, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight clips of moving digits, 16 x 16."""
    folder = tmp_path_factory.mktemp("shards")
    flags = ["--num-videos", "8", "--out", str(folder), "--image-size", "16", "16", "--clip-length", "4", "--workers", "1"]
    done = command("preprocess.py", "shards", "--dataset-name", "synthetic-digits", *flags)
    assert done.returncode == 0, done.stderr
    return str(folder)


HELPED = [*((script, "cmd") for script in STAGES), *((script, system) for script in LATTE for system in ("latte", "hvdm"))]
HELPED += [(script, "vidm") for script in STAGES if "diffusion" in script]


@pytest.mark.parametrize(("script", "system"), HELPED)
def test_help_documents_every_flag(script: str, system: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--system", system, "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script))["main"]()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert said.count("usage:") == 1
    assert max(map(len, said.splitlines())) <= 140
    words = " ".join(re.sub("[\u2502|]", " ", said).split())
    launcher = "--nnodes --nproc_per_node --node_rank --master_addr --master_port --dry-run --print-config --config"
    assert [flag for flag in launcher.split() if flag not in words] == []
    undocumented = re.findall(r"(--[\w.-]*\w)(?: (?:[A-Z]+|\{[^ ]*))* \(default:", words)
    assert not undocumented, f"no help text: {undocumented}"
    aliases = "--data-path --results-dir --global-batch-size --lr --epochs --ckpt-every --log-every --max-steps --parallel"
    assert [alias for alias in aliases.split() if f"{alias} " not in words] == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "cmd").glob("*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize("script", STAGES)
def test_every_recipe_serves_every_stage(script: str, recipe: Path) -> None:
    load_config({"cmd": STAGES[script]}, ["--config", str(recipe)], prog=script).validate()


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "latte").glob("*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize("script", LATTE)
def test_recipes_of_latte_serve_the_stages_that_they_have(script: str, recipe: Path) -> None:
    """The official release trains no autoencoder: its recipes are of the one stage."""
    held = load_yaml(recipe)
    if held.get("stage", LATTE[script].stage) != LATTE[script].stage:
        with pytest.raises(ConfigError, match=r"config of the stage 'denoiser'.*use train_dit\.py"):
            load_config({"latte": LATTE[script]}, ["--config", str(recipe)], prog=script)
        return
    load_config({"latte": LATTE[script]}, ["--config", str(recipe)], prog=script).validate()


def test_flags_of_the_release_mean_what_they_did() -> None:
    flags = "--data-path D --dataset-name UCF101 --mode pixel --image-size 64 64 --n-frames 16 --embed-dim 8 --lr 1e-5 --epochs 2000"
    flags += " --global-batch-size 256 --global-seed 0 --num-workers 4 --log-every 100 --ckpt-every 50000"
    flags += " --scale-factor 0.18215 --results-dir R --resume"
    config = load_config({"cmd": CMDAutoencoderConfig}, flags.split(), prog="train_ae.py")
    assert (config.data.image_size, config.model.embed_dim, config.checkpoint.every, config.train.resume) == ((64, 64), 8, 50000, "auto")
    config.validate()
    extra = " --motion-model-config MotionDiT-S/2 --keyframe-patch-size 8 --num-classes 101 --use-text-embed"
    motion = load_config({"cmd": CMDMotionConfig}, (flags + extra).replace("-size", "_size").split(), prog="train_motion_diffusion.py")
    assert (motion.model.name, motion.model.keyframe_patch_size, motion.condition.num_classes) == ("MotionDiT-S/2", 8, 101)
    motion.validate()
    content = load_config({"cmd": CMDContentConfig}, [*flags.split(), "--num-classes", "101", "--final"], prog="train_content_diffusion.py")
    assert (content.condition.num_classes, content.final) == (101, True)
    content.validate()


@pytest.mark.parametrize("script", STAGES)
def test_print_config_goes_back_in(script: str, tmp_path: Path) -> None:
    first = command(script, "--config", TINY, "--lr", "3e-7", "--data-path", "some where", "--print-config")
    assert first.returncode == 0, first.stderr
    path = tmp_path / "again.yaml"
    path.write_text(first.stdout)
    config = load_config({"cmd": STAGES[script]}, ["--config", str(path)], prog=script)
    assert to_dict(config) == load_yaml(path)
    assert (config.optim.lr, config.data.path) == (3e-7, ("some where",))


def test_dry_run_reports_and_starts_nothing(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no perceptual weights, and says that they are missing."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    flags = ("--data-path", shards, "--results-dir", str(tmp_path / "runs"), "--perceptual", "lpips-vgg", "--nproc_per_node", "2")
    done = command("train_ae.py", *SMALL, *flags, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "vgg16-397923af.pth" in done.stderr
    for word in ("parameters", "memory per gpu", "optimizer", "steps per epoch", "checkpoint"):
        assert word in done.stdout.lower(), done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "message", "ranks"),
    [
        (["--lrr", "1"], r"unknown flag '--lrr'; did you mean '--lr'\?", 2),
        (["--data-path", "{tmp}/nowhere"], r"no shard set at \S*/nowhere: the folder does not exist", 2),
        (["--data-path", "{tmp}/empty"], r"/empty .*preprocess.py shards", 1),
        (["--data-path", "{tmp}/ucf"], r"/ucf .*preprocess.py shards", 1),
        (["--data-path", "{shards}", "--global-batch-size", "5"], r"5.*(4|6)", 2),
        (
            ["--data-path", "{shards}", "--config", "{tmp}/vidm.yaml"],
            r"vidm.yaml: this is a config of the system 'vidm'; \S+ trains: cmd",
            1,
        ),
        (
            ["--data-path", "{shards}", "--config", "{tmp}/motion.yaml"],
            r"motion.yaml: .* the stage 'motion'.*: use train_motion_diffusion.py",
            1,
        ),
        ([], r"--data-path", 1),
    ],
    ids=["flag", "missing", "empty", "raw-ucf101", "batch", "system", "stage", "no-data"],
)
def test_a_mistake_is_one_line(shards: str, tmp_path: Path, argv: list[str], message: str, ranks: int) -> None:
    """Two ranks where the mistake is met: before they join, in what both read, and when they share the work."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "ucf" / "ApplyEyeMakeup").mkdir(parents=True)
    (tmp_path / "ucf" / "ApplyEyeMakeup" / "v_ApplyEyeMakeup_g01_c01.avi").write_bytes(b"RIFF")
    (tmp_path / "vidm.yaml").write_text("system: vidm\n")
    (tmp_path / "motion.yaml").write_text("system: cmd\nstage: motion\n")
    filled = [word.format(tmp=tmp_path, shards=shards) for word in argv]
    started = time.monotonic()
    done = command("train_ae.py", *SMALL, "--results-dir", str(tmp_path / "runs"), *filled, ranks=ranks)
    assert re.search(message, complaint(done))
    assert time.monotonic() - started < 60
    assert 0 not in done.statuses, "no rank may end as if all were well"
    assert not list((tmp_path / "runs").glob("*/checkpoints/*"))


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("train", {"accumulation": 0}, "train.accumulation 0: at least 1"),
        ("train", {"max_steps": -1}, "train.max_steps -1: at least 0"),
        ("optim", {"lr": float("nan")}, "optim.lr nan: at least 0"),
        ("optim", {"betas": (0.9, 1.0)}, "optim.betas 0.9 1.0: 0 or more, and below 1"),
        ("ema", {"decay": 1.5}, "ema.decay 1.5: 0 or more, and below 1"),
    ],
)
@pytest.mark.parametrize("schema", STAGES.values())
def test_numbers_that_cannot_be_are_refused(schema: type[RunConfig], group: str, change: dict[str, Any], message: str) -> None:
    config = schema()
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        replace(config, **{group: replace(getattr(config, group), **change)}).validate()


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_refused_by_name(shards: str, tmp_path: Path) -> None:
    base = [*SMALL, "--data-path", shards, "--results-dir", str(tmp_path)]
    first = command("train_ae.py", *base, "--max-steps", "1")
    assert first.returncode == 0, first.stderr
    (checkpoint,) = tmp_path.glob("*/checkpoints/step_0000001")
    payload = max(checkpoint.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(payload.read_bytes())
    data[len(data) // 2] ^= 1
    payload.write_bytes(bytes(data))
    done = command("train_ae.py", *base, "--max-steps", "2", "--resume", str(checkpoint), ranks=2)
    text = complaint(done)
    assert payload.name in text and str(checkpoint) in text


@pytest.mark.slow
def test_both_ways_to_start_train_two_ranks(shards: str, tmp_path: Path) -> None:
    """`python script --nproc_per_node 2` starts itself through torchrun; its run is then found finished by the torchrun form."""
    base = [*SMALL, "--data-path", shards, "--results-dir", str(tmp_path), "--max-steps", "1"]
    first = command("train_ae.py", "--nnodes", "1", "--nproc_per_node", "2", *base)
    assert first.returncode == 0, first.stderr
    (export,) = tmp_path.glob("*/export/model.safetensors")
    written = export.stat().st_mtime_ns
    again = distributed.torchrun(["train_ae.py", *base])
    assert again.returncode == 0, again.stdout
    assert export.stat().st_mtime_ns == written
    assert len(list(tmp_path.glob("*/export/model.safetensors"))) == 1
