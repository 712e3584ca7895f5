"""PVDM's first stage as a task: losses by hand, whose turn it is and what is left out then, what it shows."""

import dataclasses

import pytest
import torch
from torch import nn

from engine.team import Team
from launch.env import distributed
from models.autoencoders.pvdm import PVDMAEConfig, PVDMAutoencoder
from tests.pvdm_stage import CLIPS, batch, modules, task
from utils.config import from_dict
from utils.media import to_float
from utils.rng import SampleRng


class Counting(nn.Module):
    """A network that counts its passes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, *inputs: torch.Tensor) -> object:
        self.calls += 1
        return self.net(*inputs)


def rng(samples: dict[str, torch.Tensor]) -> SampleRng:
    return SampleRng(0, samples["index"])


# ---- losses


def test_the_first_phase_is_its_formula() -> None:
    """4 L1 over all frames and 4 LPIPS on one frame of each clip, the same of both sides, addressed by the sample."""
    clips = dataclasses.replace(CLIPS, n_frames=6)
    made = task(clips=clips)
    nets, samples = modules(made), batch(32, clips=clips)
    seen: list[torch.Tensor] = []

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.extend((a, b))
        return (a - b).square().mean((1, 2, 3))

    nets["perceptual"] = distance
    out = made.loss("ae", nets, samples, rng(samples))
    x = to_float(samples["video"])
    recon = nets["ae"](x)
    frame = rng(samples).integers("loss-frame", 6)
    assert set(frame.tolist()) == set(range(6))
    assert torch.equal(seen[0], x[torch.arange(32), :, frame]) and torch.equal(seen[1], recon[torch.arange(32), :, frame])
    expected = 4 * (x - recon).abs().mean() + 4 * distance(seen[0], seen[1]).mean()
    assert out.count == 32 and out.total.item() / 32 == pytest.approx(expected.item(), rel=1e-5)
    assert out.metrics.keys() == {"l1", "perceptual"}


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_the_second_phase_is_its_formula(kind: str) -> None:
    made = task(f"--adversarial --disc-loss {kind} --loss.adversarial.weight 0.5 --global-batch-size 4")
    nets, samples = modules(made), batch()
    x = to_float(samples["video"])
    recon, frame = nets["ae"](x), rng(samples).integers("loss-frame", 4)
    real, fake = (nets["disc"](clips[torch.arange(4), :, frame], clips) for clips in (x, recon))
    fooled = -sum(stages[-1].mean() for stages in fake)
    matched = sum((f - r).abs().mean() for r2, f2 in zip(real, fake, strict=True) for r, f in zip(r2[:-1], f2[:-1], strict=True))
    expected = 4 * (x - recon).abs().mean() + 0.5 * fooled + 4 * matched
    assert made.loss("ae", nets, samples, rng(samples)).total.item() / 4 == pytest.approx(expected.item(), rel=1e-5)
    cost = {"hinge": lambda z: nn.functional.relu(1 + z), "vanilla": nn.functional.softplus}[kind]
    expected = 0.5 * sum(cost(-r[-1]).mean() + cost(f[-1]).mean() for r, f in zip(real, fake, strict=True))
    out = made.loss("disc", nets, samples, rng(samples))
    assert out.total.item() / 4 == pytest.approx(expected.item(), rel=1e-5)
    assert sum(value.item() for value, _ in out.metrics.values()) == pytest.approx(out.total.item(), rel=1e-5)


def test_the_loss_of_a_batch_is_the_sum_over_its_parts() -> None:
    made = task("--loss.l2 0.5")
    nets, samples = modules(made), batch(6)
    parts = [{name: value[part] for name, value in samples.items()} for part in (slice(0, 1), slice(1, 6))]
    whole = made.loss("ae", nets, samples, rng(samples)).total.item()
    assert whole == pytest.approx(sum(made.loss("ae", nets, part, rng(part)).total.item() for part in parts), rel=1e-5)


# ---- turns


@pytest.mark.parametrize("start", [0, 4])
def test_the_turns_and_the_loss_set_in_at_the_same_optimiser_step(start: int) -> None:
    """The release compares its start with micro-batches for the one and with steps for the other."""
    flags = f"--adversarial --disc-start {start} --global-batch-size 4 --disc-turns"
    both, alternate = task(flags, "both"), task(flags, "alternate")
    later = [both.phases(step) for step in range(start, start + 4)], [alternate.phases(step) for step in range(start, start + 4)]
    assert later == ([("ae", "disc")] * 4, [("ae",), ("disc",), ("ae",), ("disc",)])
    assert all(made.phases(step) == ("ae",) for made in (both, alternate) for step in range(start))
    nets = modules(alternate)
    for step in range(start + 2):
        samples = batch(2, 4 * step + 2)  # the second micro-batch of the step
        terms = alternate.loss("ae", nets, samples, rng(samples)).metrics
        assert ("adversarial" in terms) == ("feature_matching" in terms) == (step >= start)


def test_discriminators_do_nothing_while_they_do_not_count() -> None:
    """The release runs them in its first phase and multiplies by 0."""
    assert "disc" not in task().networks(), "without an adversarial phase they do not exist"
    made = task("--adversarial --disc-start 3 --global-batch-size 4")
    nets = modules(made)
    nets["disc"] = Counting(nets["disc"])
    before = {name: value.clone() for name, value in nets["disc"].state_dict().items()}
    for step in range(3):
        samples = batch(4, 4 * step)
        made.loss("ae", nets, samples, rng(samples))
    assert nets["disc"].calls == 0
    assert all(torch.equal(value, before[name]) for name, value in nets["disc"].state_dict().items()), "statistics of batch norm too"
    samples = batch(4, 12)
    made.loss("ae", nets, samples, rng(samples))
    assert nets["disc"].calls == 2


def test_a_turn_s_gradient_reaches_its_own_network_alone() -> None:
    """The generator's loss also trained the release's discriminators."""
    made = task("--adversarial --parallel ddp --global-batch-size 4")
    with distributed(60) as env:
        torch.manual_seed(0)
        team = Team(made.networks(), made.config, env)
        for phase, other in (("ae", "disc"), ("disc", "ae")):
            with team.turn(phase) as nets:
                samples = batch()
                made.loss(phase, nets, samples, rng(samples)).total.backward()
            assert all(p.grad is not None for p in team.members[phase].parameters)
            assert team.gradient_norm(phase) > 0
            assert all(p.grad is None for p in team.members[other].parameters)
            for parameter in team.members[phase].parameters:
                parameter.grad = None


def test_discriminators_have_an_optimiser_of_their_own() -> None:
    network = task("--adversarial --lr 3e-4").networks()["disc"]
    assert network.strategy == "ddp" and network.sync_norms and network.clip_parts == ("discriminator_2d", "discriminator_3d")
    assert network.optim is not None
    assert (network.optim.lr, network.optim.betas, network.optim.weight_decay, network.optim.clip_norm) == (3e-4, (0.5, 0.9), 0.01, 1.0)
    other = task("--adversarial --loss.adversarial.disc_lr 1e-5 --loss.adversarial.no-sync-norms").networks()["disc"]
    assert other.optim is not None and other.optim.lr == 1e-5 and not other.sync_norms


# ---- what it shows and hands on


def test_evaluation_previews_and_card() -> None:
    made = task()
    nets, samples = modules(made), batch()
    nets["perceptual"] = lambda a, b: (a - b).square().mean((1, 2, 3))
    x, frame = to_float(samples["video"]), rng(samples).integers("loss-frame", 4)
    with torch.no_grad():
        found = {name: (value / count).item() for name, (value, count) in made.evaluate(nets, samples, rng(samples)).items()}
        recon = nets["ae"](x)
        shown = made.preview(nets, samples, rng(samples))["reconstruction"]
    error = (x - recon).square()
    assert found.keys() == {"l1", "psnr", "ssim", "perceptual"}
    assert found["l1"] == pytest.approx((x - recon).abs().mean().item(), rel=1e-5)
    assert found["perceptual"] == pytest.approx(error[torch.arange(4), :, frame].mean().item(), rel=1e-5)
    assert torch.equal(shown, torch.cat([x, recon], dim=3))
    card = made.card()
    assert (card["system"], card["stage"], made.name) == ("pvdm", "autoencoder", "pvdm-autoencoder")
    again = PVDMAutoencoder(from_dict(PVDMAEConfig, card["model"], "card"))
    assert again.config == made.model_config


def test_other_resolutions_follow_the_patch() -> None:
    """128 pixels with patches of 4, which crashes the release: its latents are 8 times smaller whatever the patch is."""
    clips = dataclasses.replace(CLIPS, n_frames=2, image_size=(128, 128))
    made = task(clips=clips)
    assert made.model_config.grid == (32, 32)
    nets, samples = modules(made), batch(1, clips=clips)
    with torch.no_grad():
        assert made.loss("ae", nets, samples, rng(samples)).total.isfinite()
