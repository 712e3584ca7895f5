"""VIDM's generators under each way of training: sharded, recomputed, compiled."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import launch.env
from engine.config import EmaConfig, OptimConfig, ParallelConfig, RunConfig
from engine.shard import parallelize
from engine.task import Network
from engine.team import Team
from launch.env import Env
from tests import distributed
from tests.vidm_networks import content, motion, pictures, times

PLANS: dict[str, dict[str, Any]] = {
    "ddp": {"mode": "ddp"},
    "fsdp": {"mode": "fsdp"},
    "recomputed": {"mode": "fsdp", "activation_checkpointing": "block"},
    "selective": {"mode": "ddp", "activation_checkpointing": "selective"},
    "both": {"mode": "fsdp", "compile": "on", "activation_checkpointing": "selective"},
}


def trained(env: Env, kind: str, plans: list[str]) -> dict[str, list[float]]:
    """Gradient norm and a digest of weights and average after one step of each plan; every rank takes its share of four frames."""
    (x, previous, first), (t, frame) = pictures(4), times(2)
    told = [x, t.repeat(2)] + ([frame.repeat(2), previous, first] if kind == "motion" else [])
    mine = slice(env.rank * 4 // env.world_size, (env.rank + 1) * 4 // env.world_size)
    results = {}
    for plan in plans:
        torch._dynamo.reset()
        optim, ema = OptimConfig(lr=1e-2, clip_norm=1.0), EmaConfig(decay=0.5)
        model = motion() if kind == "motion" else content()
        network = Network(model, optim=optim, ema=ema, units=lambda module: module.units())
        team = Team({"model": network}, RunConfig(parallel=ParallelConfig(precision="fp32", **PLANS[plan])), env)
        with team.turn("model") as modules:
            team.synchronise("model", last=True)
            modules["model"](*(value[mine] for value in told)).square().mean().backward()
        norm = team.gradient_norm("model")
        team.step("model", 0, 1, norm, torch.ones(()), torch.tensor(True))
        member = team.members["model"]
        assert member.ema is not None
        weights = [p.full_tensor() if isinstance(p, DTensor) else p for m in (member.module, member.ema.module) for p in m.parameters()]
        results[plan] = [float(norm), *(float(w.detach().double().square().sum()) for w in weights)]
    return results


def check_plans(kind: str, plans: list[str]) -> None:
    ranks = distributed.run(trained, processes=2, timeout=300, kind=kind, plans=["ddp", *plans])
    assert ranks[0] == ranks[1]
    for plan in plans:
        torch.testing.assert_close(torch.tensor(ranks[0][plan]), torch.tensor(ranks[0]["ddp"]), rtol=1e-4, atol=1e-5, msg=plan)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["content", "motion"])
def test_sharded_and_recomputed_training_agree_over_two_processes(kind: str) -> None:
    """The release's motion network took a flag for checkpointing and paid no heed; here it changes memory, and no number."""
    check_plans(kind, ["fsdp", "recomputed", "selective"])


@pytest.mark.slow
def test_compiled_training_agrees_over_two_processes() -> None:
    check_plans("motion", ["both"])


def test_checkpointing_forgets_activations() -> None:
    """What the backward pass of the motion network holds on to, with and without."""
    (x, previous, first), (t, frame) = pictures(), times()
    held = {}
    for kind in ("none", "block"):
        parallel = ParallelConfig(mode="ddp", precision="fp32", activation_checkpointing=kind)  # type: ignore[arg-type]
        network = Network(motion(), optim=OptimConfig(), units=lambda module: module.units())
        kept: dict[int, Tensor] = {}

        def keep(value: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[value.data_ptr()] = value
            return value

        with launch.env.distributed(60) as env, torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            out = parallelize(network, parallel, env, None)(x, t, frame, previous, first)
            weights = {parameter.data_ptr() for parameter in network.module.parameters()}
            held[kind] = sum(value.numel() for place, value in kept.items() if place not in weights)
        del out
    assert held["block"] < held["none"] / 3
