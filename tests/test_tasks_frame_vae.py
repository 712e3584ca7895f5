"""Latte's first stage as a task: its losses by hand and against recorded numbers, whose gradient goes where, accumulation, restarts."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.loop import fit
from engine.task import Batch, Network
from engine.team import Team
from launch.env import Env, distributed
from models.autoencoders.frame_vae import FrameVAEConfig
from models.official import frame_vae as official
from tasks.clips import ClipInfo
from tasks.frame_vae import FrameVAETask
from tasks.frame_vae_config import FrameVAERunConfig
from tests.distributed import run
from tests.parity.case import Case
from utils.config import from_dict, load_config
from utils.media import to_channels, to_float
from utils.rng import SampleRng

ROOT = Path(__file__).resolve().parent.parent
CLIPS = ClipInfo(n_frames=1, image_size=(16, 24), dataset="toy", digest="0")
SMALL = "--model.down_channels 8 16 --model.mid_channels 16 --model.down_sample true --model.attn_down false --model.norm_channels 4"
SMALL += " --model.num_down_layers 1 --model.num_up_layers 1 --perceptual none --loss.adversarial.conv_channels 8 8"
QUIET = "--parallel ddp --precision fp32 --compile off --log-every 1 --preview-every 0 --eval-every 0 --ckpt-every 100 --no-tensorboard"


def config(*flags: str) -> FrameVAERunConfig:
    argv = [word for line in (SMALL, *flags) for word in line.split()]
    setting = load_config({"latte": FrameVAERunConfig}, argv, prog="train_ae.py")
    setting.validate()
    return setting


def batch(count: int = 4, first: int = 0, size: tuple[int, int] = CLIPS.image_size) -> Batch:
    index = torch.arange(first, first + count)
    noise = SampleRng(5, index).normal("picture", (3, 1, *size))
    return {"video": (128 + 60 * noise).clamp(0, 255).to(torch.uint8), "label": torch.zeros(count, dtype=torch.int64), "index": index}


def modules(task: FrameVAETask, seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {name: network.module for name, network in task.networks().items()}


class Frames:
    """Frames that are a function of their index."""

    steps_per_epoch = 4

    def __init__(self, setting: FrameVAERunConfig, env: Env) -> None:
        self.share = setting.train.global_batch_size // env.world_size
        self.micro = self.share // setting.train.accumulation
        self.total, self.offset = setting.train.global_batch_size, env.rank * self.share

    def batches(self, first_step: int) -> Iterator[Batch]:
        step = first_step
        while True:
            for start in range(0, self.share, self.micro):
                yield batch(self.micro, step * self.total + self.offset + start)
            step += 1

    def describe(self, index: int) -> str:
        return str(index)


def train(env: Env, folder: str, *flags: str) -> Path:
    setting = config(QUIET, f"--results-dir {folder} --global-batch-size 8 --lr 1e-3", *flags)
    return fit(FrameVAETask(setting, CLIPS), Frames(setting, env), setting, env)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "export" / "model.safetensors")


# ---- losses


@pytest.mark.parametrize("channels", [3, 1])
def test_loss_is_its_formula(channels: int) -> None:
    """Squared error (a mean), divergence (a sum), the perceptual distance and the fooled discriminator; summed over samples."""
    flags = f"--kl-weight 1e-3 --disc-weight 0.5 --disc-start 0 --loss.perceptual.weight 0.7 --model.channels {channels}"
    task = FrameVAETask(config(flags), CLIPS)
    nets, samples = modules(task), batch()
    nets["perceptual"] = lambda a, b: (a - b)[:, :3].abs().mean((1, 2, 3)) * (a.shape[1] == b.shape[1] == 3)
    rng = SampleRng(0, samples["index"])
    x = to_channels(to_float(samples["video"])[:, :, 0], channels)
    recon, mean, logvar = nets["ae"](x, rng.normal("vae", task.latent_shape))
    terms = {
        "mse": (recon - x).square().mean(),
        "kl": 0.5 * (logvar.exp() + mean.square() - 1 - logvar).sum((1, 2, 3)).mean(),
        "perceptual": (recon - x).abs().mean(),
        "adversarial": (nets["disc"](recon) - 1).square().mean(),
    }
    out = task.loss("ae", nets, samples, rng)
    expected = terms["mse"] + 1e-3 * terms["kl"] + 0.7 * terms["perceptual"] + 0.5 * terms["adversarial"]
    assert out.count == 4 and out.total.item() / 4 == pytest.approx(expected.item(), rel=1e-5)
    for name, value in terms.items():
        assert out.metrics[name][0].item() / 4 == pytest.approx(value.item(), rel=1e-5)
    real, fake = nets["disc"](x), nets["disc"](recon)
    expected = 0.5 * ((real - 1).square().mean() + fake.square().mean()) / 2
    assert task.loss("disc", nets, samples, rng).total.item() / 4 == pytest.approx(expected.item(), rel=1e-5)


def test_the_discriminator_sees_what_the_autoencoder_s_turn_made() -> None:
    """Before its update; without such a turn it is made anew. Nothing of another step is ever taken."""
    task = FrameVAETask(config("--disc-start 0 --global-batch-size 4"), CLIPS)
    nets, samples = modules(task), batch()
    rng = SampleRng(0, samples["index"])
    alone = task.loss("disc", nets, samples, rng)
    task.loss("ae", nets, samples, rng)
    with torch.no_grad():
        for parameter in nets["ae"].parameters():
            parameter.add_(0.1)
    kept, anew = task.loss("disc", nets, samples, rng), task.loss("disc", nets, samples, rng)
    assert kept.total.item() == pytest.approx(alone.total.item(), rel=1e-6)
    assert abs(anew.total.item() - kept.total.item()) > 1e-4
    later = batch(first=4)
    task.loss("ae", nets, samples, rng)
    task.loss("ae", nets, later, SampleRng(0, later["index"]))
    assert list(task._made) == [(1, 4)]


def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[FrameVAETask, Case, dict[str, Network]]:
    """A task with the settings, weights, frames and noise of the recorded step of the release."""
    case = Case(ROOT / "tests/parity/data/latte_expl-aeloss_c0.safetensors")
    plain = dict(case.config("vae"))
    plain["channels"] = plain.pop("im_channels")
    model = from_dict(FrameVAEConfig, plain, "the recorded config")
    setting = config(f"{QUIET} --disc-start 0 --global-batch-size 4 --kl-weight {case.config('kl_weight')}")
    adversarial = dataclasses.replace(
        setting.loss.adversarial, conv_channels=tuple(case.config("disc.conv_channels")), weight=case.config("disc_weight")
    )
    setting = dataclasses.replace(setting, model=model, loss=dataclasses.replace(setting.loss, adversarial=adversarial))
    x, noise = case.input("x"), case.input("eps")
    task = FrameVAETask(setting, dataclasses.replace(CLIPS, image_size=tuple(x.shape[-2:])))
    monkeypatch.setattr(task, "_frames", lambda _: x)
    monkeypatch.setattr(task, "_noise", lambda _: noise)
    networks = task.networks()
    for name, ours in (("vae", "ae"), ("disc", "disc")):
        networks[ours].module.load_state_dict(case.state(f"{name}."))
    return task, case, networks


def norms(prefix: str, module: nn.Module) -> dict[str, float]:
    return {f"{prefix}.{name}": p.grad.norm().item() for name, p in module.named_parameters() if p.grad is not None}


def test_the_discriminator_s_gradient_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the engine's turns both gradients are the recorded ones that are required."""
    task, case, networks = recorded(monkeypatch)
    index = torch.arange(4)
    with distributed(60) as env:
        team = Team(networks, task.config, env)
        for phase in task.phases(0):
            with team.turn(phase) as nets:
                out = task.loss(phase, nets, {"index": index}, SampleRng(0, index))
                (out.total / out.count).backward()
        found = norms("vae", team.members["ae"].module) | norms("disc", team.members["disc"].module)
    expected = {name.removeprefix("grad_norm/"): case.tensor(name).item() for name in case.names("grad_norm/")}
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_release_s_discriminator_learns_the_generator_s_aim_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the turns are for: with every parameter awake and nothing cleared in between, the release's wrong norms appear."""
    task, case, networks = recorded(monkeypatch)
    nets, index = {name: network.module for name, network in networks.items()}, torch.arange(4)
    for phase in task.phases(0):
        out = task.loss(phase, nets, {"index": index}, SampleRng(0, index))
        (out.total / out.count).backward()
    wrong = {name.removeprefix("peer_grad_norm/"): case.tensor(name).item() for name in case.names("peer_grad_norm/disc.")}
    right = {name: case.tensor(f"grad_norm/{name}").item() for name in wrong}
    assert norms("disc", nets["disc"]) == pytest.approx(wrong, rel=1e-3, abs=1e-5)
    assert all(wrong[name] > 1.5 * right[name] for name in wrong)


# ---- runs


def test_accumulation_changes_nothing_without_batch_norm(tmp_path: Path) -> None:
    """Batch norm takes its statistics from a micro-batch: with it accumulation is another, equally valid, discriminator."""
    with distributed(60) as env:
        flags = ("--max-steps 4 --disc-start 2 --loss.adversarial.norm group",)
        once, twice = (train(env, str(tmp_path / str(n)), *flags, f"--accumulation {n}") for n in (1, 2))
        batched = [train(env, str(tmp_path / f"bn{n}"), "--max-steps 4 --disc-start 2", f"--accumulation {n}") for n in (1, 2)]
    for a, b in zip(lines(once), lines(twice), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a.get("grad_norm/disc") == (pytest.approx(b["grad_norm/disc"], rel=1e-4) if "grad_norm/disc" in b else None)
    for name, value in weights(once).items():
        torch.testing.assert_close(value, weights(twice)[name], rtol=0, atol=2e-5)
    first = [line["loss"] for line in lines(batched[0])], [line["loss"] for line in lines(batched[1])]
    assert first[0][:2] == pytest.approx(first[1][:2], rel=1e-5) and first[0][3] != pytest.approx(first[1][3], rel=1e-5)


def test_the_start_of_the_discriminator_survives_a_restart(tmp_path: Path) -> None:
    """It counts steps of the run (the release's count began again), and the restarted run is the uninterrupted one, bit for bit."""
    flags = "--disc-start 3 --accumulation 2"
    with distributed(60) as env:
        whole = train(env, str(tmp_path / "whole"), flags, "--max-steps 6")
        train(env, str(tmp_path / "parts"), flags, "--max-steps 2")
        parts = train(env, str(tmp_path / "parts"), flags, "--max-steps 4")
        assert parts == train(env, str(tmp_path / "parts"), flags, "--max-steps 6")
    steps = {line["step"] for line in lines(whole) if "disc" in line or "grad_norm/disc" in line}
    assert steps == {4, 5, 6}, "from the fourth step on"
    assert steps == {line["step"] for line in lines(parts) if "disc" in line or "grad_norm/disc" in line}
    assert all(torch.equal(value, weights(parts)[name]) for name, value in weights(whole).items())


def test_the_discriminator_may_start_between_two_log_lines(tmp_path: Path) -> None:
    """The loss gets a term, which is the mean over the steps that had it; the others are the mean over all steps."""
    with distributed(60) as env:
        each, seldom = (
            lines(train(env, str(tmp_path / every), "--disc-start 3 --max-steps 6", f"--log-every {every}")) for every in ("1", "6")
        )
    (after,) = [line for line in seldom if line["step"] == 6 and "loss" in line]
    for key in ("loss", "loss/disc", "train/mse", "train/adversarial", "train/disc_real", "grad_norm/ae", "grad_norm/disc"):
        values = [line[key] for line in each if key in line]
        assert len(values) == (6 if key in ("loss", "train/mse", "grad_norm/ae") else 3), key
        assert after[key] == pytest.approx(sum(values) / len(values), rel=1e-5), key


def train_modes(env: Env, folder: str, modes: list[str]) -> list[str]:
    flags = "--max-steps 3 --disc-start 1 --loss.adversarial.norm group"
    return [str(train(env, f"{folder}/{mode}", flags, f"--parallel {mode}")) for mode in modes]


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    two = run(train_modes, folder=str(tmp_path / "two"), modes=["ddp", "fsdp"])[0]
    with distributed(60) as env:
        one = train_modes(env, str(tmp_path / "one"), ["ddp"])[0]
    for folder in two:
        assert [line["loss"] for line in lines(Path(folder))] == pytest.approx([line["loss"] for line in lines(Path(one))], rel=1e-5)
        for name, value in weights(Path(one)).items():
            torch.testing.assert_close(weights(Path(folder))[name], value, rtol=0, atol=2e-5)


def test_an_export_is_a_checkpoint_of_the_release(tmp_path: Path) -> None:
    with distributed(60) as env:
        folder = train(env, str(tmp_path), "--max-steps 1 --disc-weight 0")
    state, read = official.load(weights(folder), norm_channels=4)
    assert state.keys() == weights(folder).keys() and read.down_channels == (8, 16)
    assert sorted(path.name for path in (folder / "export").iterdir()) == ["README.md", "config.json", "model.safetensors"], (
        "no average by default"
    )


# ---- what it shows and hands on


@pytest.mark.parametrize("channels", [3, 1])
def test_evaluation_previews_and_card(channels: int) -> None:
    task = FrameVAETask(config(f"--model.channels {channels}"), CLIPS)
    nets, samples = modules(task), batch()
    rng = SampleRng(0, samples["index"])
    with torch.no_grad():
        values = {name: (total / count).item() for name, (total, count) in task.evaluate(nets, samples, rng).items()}
        picture = task.preview(nets, samples, rng)["reconstruction"]
        frames = task._frames(samples)
        mean, logvar = nets["ae"].moments(frames)
        z = mean + (0.5 * logvar).exp() * rng.normal("vae", task.latent_shape)
        made = nets["ae"].decode(z).clamp(-1, 1)
    assert frames.shape == (4, channels, 16, 24)
    assert values["latent_mean"] == pytest.approx(z.mean().item(), abs=1e-6)
    assert values["latent_std"] == pytest.approx(z.std(correction=0).item(), rel=1e-5)
    assert values["l1"] == pytest.approx((made - frames).abs().mean().item(), rel=1e-5)
    assert values.keys() == {"l1", "psnr", "ssim", "latent_mean", "latent_std"}
    assert picture.shape == (4, 3, 32, 24)
    assert torch.equal(picture[:, :, :16], frames.expand(-1, 3, -1, -1)) and torch.equal(picture[:, :, 16:], made.expand(-1, 3, -1, -1))
    card = task.card()
    assert (card["system"], card["stage"]) == ("latte", "autoencoder")
    assert from_dict(FrameVAEConfig, card["model"], "card") == task.config.model
