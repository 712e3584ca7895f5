"""What only a GPU shows: copies through page-locked memory, state in host memory, the peak against the estimate, memory that runs out."""

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from test_memory_plan import Denoiser
from toy_task import ToySource, ToyTask, toy_config

from engine.checkpoint import Checkpointer, State, latest
from engine.config import LogConfig, ParallelConfig, RunConfig
from engine.loop import fit
from engine.metrics import peak_memory
from engine.optim import local_parts
from engine.plan import build_on_meta, estimate_peak, measure
from engine.profile import Profiler
from engine.ranks import Probe
from engine.state import model_tensors
from engine.team import Team
from launch.env import Env, distributed
from models.transformers.dit import DiTConfig
from utils.rng import SampleRng

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def env() -> Iterator[Env]:
    with distributed(60) as env:
        yield env


def copies(state: State) -> dict[str, Tensor]:
    """What the networks and averages hold now."""
    tensors = model_tensors(state)
    return {name: part.clone() for name, part in zip(tensors, local_parts(tensors.values()), strict=True)}


@pytest.mark.parametrize("offload", [False, True])
def test_a_background_save_holds_what_the_weights_were(tmp_path: Path, env: Env, offload: bool) -> None:
    config = toy_config(tmp_path, mode="fsdp", compile="off", optim_offload=offload)
    member = Team(ToyTask(config).networks(), config, env).members["net"]
    assert member.ema is not None
    state: State = {
        "networks": {"net": member.module},
        "optim": {"net": member.optimizer},
        "ema": {"net": member.ema.module},
        "progress": {"step": 3, "samples": 24},
        "task": {},
    }
    checkpointer = Checkpointer(tmp_path, env, config)
    checkpointer.reserve(state)
    assert checkpointer._arena._buffer.is_pinned()
    before = copies(state)
    checkpointer.save(3, state)
    checkpointer.copied()
    with torch.no_grad():
        for part in local_parts(member.parameters):
            part.zero_()  # while the copy is being written
    checkpointer.wait()
    changed = copies(state)
    assert any(not torch.equal(value, changed[name]) for name, value in before.items())
    saved = latest(tmp_path)
    assert saved is not None
    checkpointer.load(saved, state)
    after = copies(state)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_offload_changes_nothing_but_the_rounding(tmp_path: Path, env: Env) -> None:
    found = {}
    for offload in (False, True):
        config = toy_config(tmp_path / str(offload), mode="fsdp", compile="off", optim_offload=offload, **{"checkpoint.every": 2})
        found[offload] = fit(ToyTask(config, gan=True), ToySource(config, 0, 1), config, env) / "export"
    for name in ("model.safetensors", "ema.safetensors"):
        plain, away = load_file(found[False] / name), load_file(found[True] / name)
        assert plain.keys() == away.keys()
        for key, value in plain.items():
            torch.testing.assert_close(away[key], value, rtol=1e-3, atol=1e-5, msg=key)  # AdamW of another device, over five steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["none", "block", "selective"])
@pytest.mark.parametrize(("mode", "offload"), [("ddp", False), ("fsdp", False), ("fsdp", True), ("hsdp", False)])
def test_the_estimate_is_within_15_percent_of_the_peak(env: Env, kind: str, precision: str, mode: str, offload: bool) -> None:
    count = 16
    task = Denoiser(DiTConfig((64, 64), 4, hidden_size=384, depth=8, num_heads=6))
    how = {"mode": mode, "optim_offload": offload, "activation_checkpointing": kind, "precision": precision}
    config = RunConfig(parallel=ParallelConfig(compile="off", **how))  # type: ignore[arg-type]
    networks = build_on_meta(task)  # type: ignore[arg-type]
    needs = [measure(name, network, 1) for name, network in networks.items()]
    planned = estimate_peak(task, networks, "model", count, needs, config)  # type: ignore[arg-type]
    assert planned is not None

    def step(number: int, team: Team) -> None:
        batch = {"x": torch.randn(count, 4, 64, 64, device=env.device), "index": torch.arange(count)}
        with team.turn("model") as modules:
            team.synchronise("model", last=True)
            with team.autocast():
                output = task.loss("model", modules, batch, SampleRng(0, batch["index"], env.device))
            output.total.backward()
        one = torch.ones((), device=env.device)
        team.step("model", number, 9, team.gradient_norm("model"), count * one, one.bool())

    before = torch.cuda.memory_allocated(env.device)
    team = Team(task.networks(), config, env)
    step(0, team)  # makes the moments
    peak_memory(env.device)
    step(1, team)
    assert peak_memory(env.device) - before == pytest.approx(planned.total, rel=0.15)


def test_memory_that_runs_out_leaves_a_snapshot(tmp_path: Path, env: Env) -> None:
    try:
        with pytest.raises(torch.OutOfMemoryError), Profiler(tmp_path, LogConfig(memory_history=True), env, 0):
            torch.empty(2**50, dtype=torch.uint8, device=env.device)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    snapshot = pickle.loads((tmp_path / "profile" / "out_of_memory_rank_0.pickle").read_bytes())
    assert "segments" in snapshot


def test_an_error_of_the_gpu_is_not_hidden_by_a_trace(tmp_path: Path, env: Env) -> None:
    with pytest.raises(RuntimeError, match="the first"), Profiler(tmp_path, LogConfig(profile_steps="1:3"), env, 0) as profiler:
        for number in profiler.steps(range(3)):
            torch.ones(8, device=env.device).sum()
            if number == 1:
                raise RuntimeError("the first")
    assert profiler._active is not None and not (tmp_path / "profile").exists()
    profiler._active.stop()


def test_the_probe_of_a_gpu_takes_about_as_long_each_time(env: Env) -> None:
    taken = [Probe(env.device).seconds() for _ in range(5)]
    assert min(taken) > 0 and max(taken) < 3 * min(taken)
