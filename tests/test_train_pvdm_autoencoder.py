"""Runs of PVDM's first stage: both phases, restarts, several processes; the release loses half of its state in each of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.team import Team
from launch.env import Env, distributed
from tasks.pvdm_autoencoder import build
from tests.distributed import run
from tests.pvdm_stage import batch, config, task, train
from tests.shard_sets import write_set
from utils.errors import UserError
from utils.rng import SampleRng
from utils.weights import read_card


def lines(folder: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path | str) -> list[float]:
    """The autoencoder's and the discriminators' losses, in the order of the steps."""
    return [line[key] for line in lines(folder) for key in ("loss", "loss/disc") if key in line]


def weights(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "export" / "model.safetensors")


# ---- turns


def test_alternate_turns_update_one_network_a_step(tmp_path: Path) -> None:
    with distributed(60) as env:
        folder = train(env, tmp_path, "--adversarial --disc-start 2 --max-steps 6")
    turns = [("loss" in line, "loss/disc" in line) for line in lines(folder) if "loss" in line or "loss/disc" in line]
    assert turns == [(True, False), (True, False), (True, False), (False, True), (True, False), (False, True)]
    assert [step for step, line in enumerate(lines(folder)) if "train/adversarial" in line] == [2, 4]


def test_each_discriminator_is_clipped_on_its_own() -> None:
    """The norm of both together would make the one that is steady pay for the other."""
    made = task("--adversarial --parallel ddp --loss.adversarial.disc_clip_norm 1e-3 --global-batch-size 4")
    with distributed(60) as env:
        torch.manual_seed(0)
        team = Team(made.networks(), made.config, env)
        member = team.members["disc"]
        parts = [member.module.discriminator_2d, member.module.discriminator_3d]
        with team.turn("disc") as nets:
            samples = batch()
            made.loss("disc", nets, samples, SampleRng(0, samples["index"])).total.backward()
        raw = [norm_of(part) for part in parts]
        kept: list[float] = []
        member.optimizer.register_step_pre_hook(lambda *_: kept.extend(norm_of(part) for part in parts))
        one = torch.ones(())
        team.step("disc", 0, 10, team.gradient_norm("disc"), one, one > 0)
    assert min(raw) > 1e-2 and max(raw) / min(raw) > 1.05
    assert kept == pytest.approx([1e-3, 1e-3], rel=1e-2)


def norm_of(part: nn.Module) -> float:
    return torch.nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None]).item()


# ---- restarts


@pytest.mark.parametrize("turns", ["both", "alternate"])
def test_an_adversarial_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, turns: str) -> None:
    """Both networks, both optimisers, whose turn it is: bit for bit. The release begins again with fresh discriminators."""
    flags = f"--adversarial --disc-start 1 --disc-turns {turns} --accumulation 2 --ema-decay 0.9"
    with distributed(60) as env:
        whole = train(env, tmp_path / "whole", flags, "--max-steps 7")
        for steps in (3, 5, 7):
            parts = train(env, tmp_path / "parts", flags, f"--max-steps {steps}")
    assert losses(parts) == losses(whole)
    assert all(torch.equal(value, weights(parts)[name]) for name, value in weights(whole).items())


def restarted(env: Env, folder: str) -> list[str]:
    flags = "--adversarial --parallel ddp"
    whole = train(env, f"{folder}/whole", flags, "--max-steps 6")
    train(env, f"{folder}/parts", flags, "--max-steps 3")
    return [str(whole), str(train(env, f"{folder}/parts", flags, "--max-steps 6"))]


@pytest.mark.slow
def test_all_processes_go_on_with_the_optimisers_state(tmp_path: Path) -> None:
    """The release loads it on the first process only, after which the replicas differ."""
    whole, parts = run(restarted, folder=str(tmp_path))[0]
    assert losses(parts) == losses(whole)
    assert all(torch.equal(value, weights(parts)[name]) for name, value in weights(whole).items())


# ---- several processes


def modes(env: Env, folder: str, names: list[str]) -> list[str]:
    flags = "--adversarial --disc-turns both --disc-start 1 --max-steps 4 --loss.adversarial.disc_clip_norm 0.5"
    return [str(train(env, f"{folder}/{name}", flags, "--global-batch-size 8", f"--parallel {name}")) for name in names]


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    """Gradients are exchanged once (the release reduces those of its criterion twice), batch norms see the whole micro-batch."""
    two = run(modes, folder=str(tmp_path / "two"), names=["ddp", "fsdp"])[0]
    with distributed(60) as env:
        one = modes(env, str(tmp_path / "one"), ["ddp"])[0]
    for folder in two:
        assert losses(folder) == pytest.approx(losses(one), rel=1e-5)
        for name, value in weights(one).items():
            torch.testing.assert_close(weights(folder)[name], value, rtol=0, atol=2e-5)


# ---- phase one, then phase two


def test_the_second_run_starts_from_the_first_and_keeps_its_best(tmp_path: Path) -> None:
    with distributed(60) as env:
        first = train(env, tmp_path, "--max-steps 4")
        flags = f"--adversarial --init-from {first} --resume none --eval-every 1 --best-metric psnr --lr 1e-2 --max-steps 6"
        second = train(env, tmp_path, flags, held_out=True)
    assert (first.name, second.name) == ("000-pvdm-autoencoder", "001-pvdm-autoencoder")
    found = {line["step"]: line["eval/psnr"] for line in lines(second) if "eval/psnr" in line}
    best = max(found, key=lambda step: found[step])
    card = read_card(second)
    assert len(found) == 6 and card["step"] == best


def test_a_start_that_is_not_there_leaves_no_run(tmp_path: Path) -> None:
    with distributed(60) as env, pytest.raises(UserError, match="nowhere does not exist"):
        train(env, tmp_path, f"--init-from {tmp_path / 'nowhere'} --max-steps 1")
    assert not list(tmp_path.iterdir())


def test_what_is_evaluated_is_held_out(tmp_path: Path) -> None:
    """The release's test set is its training set."""
    for name, first in (("train", 0), ("val", 50)):
        write_set(tmp_path / name, (8,), lengths=(4,), size=(16, 24), first=first)
    data = f"--data-path {tmp_path / 'train'} --val-path {tmp_path / 'val'} --global-batch-size 4 --num-workers 0"
    _, source, valid = build(config(data), Env(0, 1, 0, 1, torch.device("cpu"), "gloo"))
    assert valid is not None
    seen = [{tuple(clip[:2, 0, 0, 1].tolist()) for clip in next(stream.batches(0))["video"]} for stream in (source, valid)]
    assert not seen[0] & seen[1]
