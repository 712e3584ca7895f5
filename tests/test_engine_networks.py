"""What a network may ask of the engine: parts clipped apart, batch norms over all ranks, an average at its own interval, a late warm-up."""

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from distributed import run
from toy_task import ToySource, ToyTask, toy_config

from engine.config import EmaConfig, OptimConfig, RunConfig
from engine.ema import Ema
from engine.loop import fit
from engine.norms import share_norms
from engine.optim import learning_rate
from engine.task import Network
from engine.team import Team
from launch.env import Env, distributed
from utils.errors import ConfigError
from utils.rng import SampleRng


class Pair(nn.Module):
    """Two parts and something beside them, of gradients of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.bare = nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return 100 * self.first(x) + self.second(x) + 0.01 * self.bare


PARTS = ("first", "second")


def clipped_steps(env: Env, mode: str, parts: tuple[str, ...] = PARTS) -> dict[str, list[float]]:
    """Weights after three steps of the team, at a quarter of the gradient, the second of which is not finite."""
    torch.manual_seed(0)
    optim = OptimConfig(lr=0.1, clip_norm=0.5, clip_start=1)
    team = Team({"net": Network(Pair(), optim=optim, clip_parts=tuple(parts))}, toy_config("unused", mode=mode), env)
    x = torch.randn(4, 4)[env.rank * 4 // env.world_size :][: 4 // env.world_size]
    norms = []
    for step in range(3):
        with team.turn("net") as modules:
            team.synchronise("net", last=True)
            modules["net"](x).square().sum().mul(float("nan") if step == 1 else 4.0 / len(x)).backward()
        norm, divisor = team.gradient_norm("net"), torch.tensor(4.0)
        norms.append(float(norm))
        team.step("net", step, 3, norm, divisor, norm.isfinite())
    values = team.members["net"].module.named_parameters()
    return {"norms": norms} | {name: (v.full_tensor() if mode == "fsdp" else v).flatten().tolist() for name, v in values}


def plain_steps(apart: bool) -> dict[str, list[float]]:
    """The two good steps, written plainly."""
    torch.manual_seed(0)
    net = Pair()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.0)
    x = torch.randn(4, 4)
    for step in range(2):
        optimizer.zero_grad()
        net(x).square().sum().div(4).backward()
        if step == 1:
            for part in [net.first, net.second, [net.bare]] if apart else [net]:
                nn.utils.clip_grad_norm_(part if isinstance(part, list) else part.parameters(), 0.5)
        optimizer.step()
    return {name: value.flatten().tolist() for name, value in net.named_parameters()}


def check_clipped(found: Mapping[str, list[float]], expected: Mapping[str, list[float]]) -> None:
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_parts_are_clipped_each_to_its_own_norm(mode: str) -> None:
    apart, together = plain_steps(apart=True), plain_steps(apart=False)
    assert any(apart[name] != pytest.approx(together[name], rel=1e-3) for name in apart), "it makes a difference"
    with distributed(60) as env:
        check_clipped(clipped_steps(env, mode), apart)
        check_clipped(clipped_steps(env, mode, parts=()), together)
        with pytest.raises(AssertionError, match="no trained child third"):
            clipped_steps(env, mode, parts=("first", "third"))


def clipped_in_both_modes(env: Env) -> list[dict[str, list[float]]]:
    return [clipped_steps(env, mode) for mode in ("ddp", "fsdp")]


@pytest.mark.slow
def test_parts_are_clipped_alike_on_two_ranks() -> None:
    for rank in run(clipped_in_both_modes):
        for found in rank:
            check_clipped(found, plain_steps(apart=True))


def adversarial_gradients(env: Env, mode: str, synced: bool) -> dict[str, list[float]]:
    """Gradients of a critic with batch norm and of the generator against it, of the same 8 samples over all ranks, and its statistics."""
    config = toy_config("unused", mode=mode)
    task = ToyTask(config, gan=True)
    torch.manual_seed(0)
    networks = task.networks()
    networks["critic"].sync_norms = synced
    team = Team(networks, config, env)
    source = ToySource(config, env.rank, env.world_size).batches(2)  # from step 2 on there is a critic
    batch = next(source)
    found: dict[str, list[float]] = {}
    for phase in ("critic", "net"):
        with team.turn(phase) as modules:
            team.synchronise(phase, last=True)
            task.loss(phase, modules, batch, SampleRng(0, batch["index"])).total.div(8 / env.world_size).backward()
        for name, value in team.members[phase].module.named_parameters():
            gradient = value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad
            found[f"{phase}.{name}"] = gradient.flatten().tolist()
    found |= {name: value.flatten().tolist() for name, value in team.members["critic"].module.named_buffers()}
    return found


def adversarial_gradients_of_all(env: Env, kinds: list[list[Any]]) -> list[dict[str, list[float]]]:
    return [adversarial_gradients(env, mode, synced) for mode, synced in kinds]


def apart(found: Mapping[str, list[float]], expected: Mapping[str, list[float]]) -> float:
    """Largest difference of any number."""
    assert found.keys() == expected.keys()
    return max(abs(x - y) for name, values in expected.items() for x, y in zip(found[name], values, strict=True))


@pytest.mark.slow
def test_two_ranks_with_shared_norms_are_one_process() -> None:
    with distributed(60) as env:
        expected = adversarial_gradients(env, "ddp", synced=True)
    for ddp, fsdp, alone in run(adversarial_gradients_of_all, kinds=[["ddp", True], ["fsdp", True], ["ddp", False]]):
        assert apart(ddp, expected) < 2e-6 and apart(fsdp, expected) < 2e-6
        assert apart(alone, expected) > 1e-2, "norms of each rank's own samples are something else"


def norm_errors(env: Env) -> list[float]:
    """Largest differences of shared norms from ones that see everything: outputs, gradients, second gradients, statistics, evaluation."""
    errors = []
    for kind, shape in ((nn.BatchNorm1d, (8, 5)), (nn.BatchNorm2d, (8, 5, 3, 4)), (nn.BatchNorm3d, (8, 5, 2, 3, 4))):
        for options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
            torch.manual_seed(0)
            whole = kind(5, dtype=torch.float32, **options)
            for parameter in whole.parameters():
                nn.init.normal_(parameter)
            part = copy.deepcopy(whole)
            share_norms(part)
            own = slice(env.rank * 8 // env.world_size, (env.rank + 1) * 8 // env.world_size)
            x, w = torch.randn(shape) * 2 + 5, torch.randn(shape)
            a, b = x.clone().requires_grad_(), x[own].clone().requires_grad_()
            for _ in range(2):
                y, z = whole(a), part(b)
            (da,) = torch.autograd.grad((y.square() * w).sum(), a, create_graph=True)
            (db,) = torch.autograd.grad((z.square() * w[own]).sum(), b, create_graph=True)
            da.square().sum().backward()
            db.square().sum().backward()
            pairs = [(y[own], z), (da[own], db), (a.grad[own], b.grad), *zip(whole.buffers(), part.buffers(), strict=True)]
            for ours, theirs in zip(whole.parameters(), part.parameters(), strict=True):
                if ours.grad is not None:
                    dist.all_reduce(theirs.grad)
                    pairs.append((ours.grad, theirs.grad))
            whole.eval(), part.eval()
            pairs.append((whole(x), part(x)) if whole.running_mean is not None else (whole(x)[own], part(x[own])))
            errors += [float((p - q).abs().max() / p.abs().max().clamp(min=1.0)) for p, q in pairs]
            assert whole.state_dict().keys() == part.state_dict().keys()
    return errors


@pytest.mark.parametrize("processes", [1, 2])
def test_shared_norms_are_those_of_one_process(processes: int) -> None:
    for errors in run(norm_errors, processes):
        assert max(errors) < 2e-5


def test_the_average_moves_at_its_interval() -> None:
    source, average = nn.Linear(2, 2), nn.Linear(2, 2)
    average.load_state_dict(source.state_dict())
    ema = Ema(average, source, EmaConfig(decay=0.25, warmup=True, every=3))
    expected = source.weight.detach().clone()
    for done in range(1, 10):
        nn.init.normal_(source.weight)
        ema.update(done)
        if done % 3 == 0:
            expected.lerp_(source.weight.detach(), 1 - {3: 2 / 11, 6: 0.25, 9: 0.25}[done])  # (1 + 2) / (10 + 2) is 0.25
        torch.testing.assert_close(average.weight.detach(), expected)


def test_the_average_of_a_run_that_is_too_short_for_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path, **{"ema.every": 9})
    with distributed(60) as env:
        folder = fit(ToyTask(config), ToySource(config, 0, 1), config, env)
    assert "ema.every 9: the run ends before the first update" in capsys.readouterr().out
    torch.manual_seed(0)
    values = [load_file(folder / "export" / f"{name}.safetensors")["head.weight"] for name in ("ema", "model")]
    assert not torch.equal(*values)


def test_a_warm_up_may_start_above_zero() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4, warmup_start=0.2)
    assert [learning_rate(config, step, 9) for step in range(6)] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    with pytest.raises(ConfigError, match=r"optim.warmup_start 1.5: a share of lr, at most 1"):
        RunConfig(optim=OptimConfig(warmup_start=1.5)).validate()
    with pytest.raises(ConfigError, match=r"ema.every 0: at least 1"):
        RunConfig(ema=EmaConfig(every=0)).validate()
