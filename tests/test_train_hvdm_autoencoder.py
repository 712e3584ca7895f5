"""Runs of HVDM's first stage, from shards to the export: one process and two, with and without discriminators, restarts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from launch.env import Env, distributed
from pipelines.hvdm_loading import load_hvdm_autoencoder
from tests.distributed import run
from tests.hvdm_stage import SMALL, train
from tests.test_cli import command
from utils.weights import read_card


def lines(folder: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path | str) -> list[float]:
    """The autoencoder's and the discriminators' losses, in the order of the steps."""
    return [line[key] for line in lines(folder) for key in ("loss", "loss/disc") if key in line]


def weights(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "export" / "model.safetensors")


# ---- from clips to an autoencoder


def shards(folder: Path, name: str, seed: int) -> str:
    """Eight clips of moving digits, 4 frames of 16 x 16."""
    flags = ["--num-videos", "8", "--out", str(folder / name), "--image-size", "16", "16", "--clip-length", "4", "--workers", "1"]
    done = command("preprocess.py", "shards", "--dataset-name", "synthetic-digits", *flags, "--seed", str(seed))
    assert done.returncode == 0, done.stderr
    return str(folder / name)


def test_it_trains_evaluates_and_shows_on_one_process(tmp_path: Path) -> None:
    """The release ends in its first step: its evaluation passes clips without subbands, and one GPU has no `module`."""
    data, held_out = (shards(tmp_path, name, seed) for seed, name in enumerate(("train", "val")))
    argv = ["--system", "hvdm", *SMALL.split(), "--data-path", data, "--val-path", held_out, "--results-dir", str(tmp_path / "runs")]
    flags = "--max-steps 12 --global-batch-size 4 --accumulation 2 --num-workers 0 --lr 3e-3 --no-tensorboard --log-every 1"
    flags += " --precision fp32 --compile off --preview-every 6 --eval-every 6 --ckpt-every 6"
    done = command("train_ae.py", *argv, *flags.split())
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "000-hvdm-autoencoder"
    seen = lines(folder)
    assert [line["step"] for line in seen if "eval/psnr" in line] == [6, 12]
    assert all({"loss", "train/l1", "train/subbands"} <= line.keys() for line in seen if "loss" in line)
    found = losses(folder)
    assert len(found) == 12 and sum(found[-3:]) < 0.9 * sum(found[:3])
    assert [*folder.rglob("*reconstruction*")]
    loaded = load_hvdm_autoencoder(folder)
    with torch.no_grad():
        clip = torch.zeros(1, 3, 4, 16, 16)
        assert torch.equal(loaded.module.decode(loaded.module.encode(clip)), loaded.module(clip))
    assert loaded.card["data"]["n_frames"] == 4


def test_a_dry_run_counts_it(tmp_path: Path) -> None:
    """The released size on the meta device, by the recipe; perceptual weights need not be there."""
    data = shards(tmp_path, "train", 0)
    recipe = str(Path(__file__).resolve().parent.parent / "configs" / "hvdm" / "sky.yaml")
    sizes = ["--image-size", "16", "16", "--n-frames", "4", "--global-batch-size", "6"]
    done = command("train_ae.py", "--config", recipe, "--data-path", data, *sizes, "--results-dir", str(tmp_path / "runs"), "--dry-run")
    assert done.returncode == 0, done.stderr
    # 63.51 million at 256 x 256; here the projections know fewer positions.
    count = re.search(r"63[,.]4\d", done.stdout)
    assert count, done.stdout
    assert not (tmp_path / "runs").exists()


# ---- discriminators


def test_the_adversarial_run_starts_from_the_first_and_trains_both_sides(tmp_path: Path) -> None:
    """In the release the discriminators of such a run would stay the random networks that they begin as."""
    with distributed(60) as env:
        first = train(env, tmp_path, "--max-steps 3")
        flags = f"--adversarial --init-from {first} --run-name second --eval-every 2 --best-metric psnr --max-steps 6"
        second = train(env, tmp_path, flags, held_out=True)
    turns = [("loss" in line, "loss/disc" in line) for line in lines(second) if "loss" in line or "loss/disc" in line]
    assert turns == [(True, False), (False, True)] * 3
    played = [line["train/disc_2d"] + line["train/disc_3d"] for line in lines(second) if "loss/disc" in line]
    assert len(set(played)) == 3 and read_card(second)["step"] in (2, 4, 6)


@pytest.mark.parametrize("turns", ["both", "alternate"])
def test_an_adversarial_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, turns: str) -> None:
    flags = f"--adversarial --disc-start 1 --disc-turns {turns} --accumulation 2"
    with distributed(60) as env:
        whole = train(env, tmp_path / "whole", flags, "--max-steps 5")
        for steps in (2, 5):
            parts = train(env, tmp_path / "parts", flags, f"--max-steps {steps}")
    assert losses(parts) == losses(whole)
    assert all(torch.equal(value, weights(parts)[name]) for name, value in weights(whole).items())


# ---- several processes


WAYS = {
    "ddp": "--parallel ddp --accumulation 2",
    "fsdp": "--parallel fsdp --accumulation 2",
    # Batch norms see a whole micro-batch; accumulation would make it of other samples.
    "adversarial": "--parallel fsdp --adversarial --disc-turns both --disc-start 1",
}


def spread(env: Env, folder: str) -> dict[str, str]:
    return {name: str(train(env, f"{folder}/{name}", flags, "--max-steps 4 --global-batch-size 8")) for name, flags in WAYS.items()}


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    """Gradients are exchanged once a step, not for each micro-batch of it; both ways of spreading give the run of one process."""
    two = run(spread, folder=str(tmp_path / "two"))[0]
    with distributed(60) as env:
        one = spread(env, str(tmp_path / "one"))
    for name in WAYS:
        assert losses(two[name]) == pytest.approx(losses(one[name]), rel=2e-5)
        for key, value in weights(one[name]).items():
            if not re.search(r"convs\.\d\.bias", key):  # means are taken out behind them: their gradients are noise
                torch.testing.assert_close(weights(two[name])[key], value, rtol=0, atol=2e-4, msg=key)  # steps are of 1e-3


def restarted(env: Env, folder: str) -> list[str]:
    flags = "--adversarial --parallel ddp"
    whole = train(env, f"{folder}/whole", flags, "--max-steps 6")
    train(env, f"{folder}/parts", flags, "--max-steps 3")
    return [str(whole), str(train(env, f"{folder}/parts", flags, "--max-steps 6"))]


@pytest.mark.slow
def test_all_processes_go_on_with_the_optimisers_state(tmp_path: Path) -> None:
    """The release restores it on the first process alone, and replicas drift apart."""
    whole, parts = run(restarted, folder=str(tmp_path))[0]
    assert losses(parts) == losses(whole)
    assert all(torch.equal(value, weights(parts)[name]) for name, value in weights(whole).items())
