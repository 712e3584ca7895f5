"""Parts of the engine without a run: wrapping, optimiser, counting, records, plan."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from toy_task import ToySource, ToyTask, toy_config

from engine.config import OptimConfig, ParallelConfig
from engine.flops import count_flops, peak_of
from engine.optim import build_optimizer, learning_rate
from engine.plan import report
from engine.recorder import Recorder, format_line
from engine.shard import device_mesh, parallelize, precision_policy, samples_per_rank, shard_size
from engine.task import Network
from launch.env import Env, distributed
from utils.errors import ConfigError, UserError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.blocks[1].weight = self.blocks[0].weight


def test_tied_weights_over_units_are_refused() -> None:
    network = Network(Tied(), optim=OptimConfig(), units=lambda module: list(module.blocks))
    with distributed(60) as env:
        parallel = ParallelConfig(precision="fp32")
        with pytest.raises(UserError, match=r"blocks\.0\.weight and blocks\.1\.weight are one tied weight"):
            parallelize(network, parallel, env, device_mesh(parallel, env))
        network.units = None
        parallelize(network, parallel, env, device_mesh(parallel, env))


def test_an_optimizer_from_before_sharding_is_refused() -> None:
    module = nn.Linear(4, 4)
    before = list(module.parameters())
    with distributed(60) as env:
        parallel = ParallelConfig(precision="fp32")
        parallelize(Network(module, optim=OptimConfig()), parallel, env, device_mesh(parallel, env))
        with pytest.raises(AssertionError, match="after sharding"):
            build_optimizer(before, OptimConfig(), sharded=True)
        build_optimizer(list(module.parameters()), OptimConfig(), sharded=True)


def test_a_method_that_ddp_would_not_see_is_refused() -> None:
    with distributed(60) as env:
        parallel = ParallelConfig(mode="ddp", precision="fp32")
        task = ToyTask(toy_config("unused"))
        wrapped = parallelize(task.networks()["net"], parallel, env, None)
        with pytest.raises(AttributeError, match=r"list it in Network\.methods"):
            wrapped.features(torch.zeros(1, 6, 16), torch.zeros(1))


def test_learning_rate_of_a_warm_up_is_to_the_last_bit_what_it_was() -> None:
    """Runs of earlier versions go on with the same numbers."""
    config = OptimConfig(lr=1e-4, warmup_steps=1000)
    assert all(learning_rate(config, step, 5000) == 1e-4 * (step + 1) / 1000 for step in range(1000))


def test_learning_rate() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4, schedule="cosine", final_lr_ratio=0.1)
    assert [learning_rate(config, step, 14) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(config, 4, 14) == 2.0
    assert learning_rate(config, 9, 14) == pytest.approx(1.1)
    assert learning_rate(config, 14, 14) == pytest.approx(0.2)
    assert learning_rate(OptimConfig(lr=2.0), 99, 10) == 2.0


def test_shard_groups_and_batches_must_divide() -> None:
    assert shard_size(ParallelConfig(mode="hsdp"), 16, 8) == 8
    with pytest.raises(ConfigError, match="divisor of 6"):
        shard_size(ParallelConfig(mode="hsdp", shard_size=4), 6, 6)
    env = Env(0, 3, 0, 3, torch.device("cpu"), "gloo")
    with pytest.raises(ConfigError, match="use 6 or 9"):
        samples_per_rank(toy_config("unused"), env)


def test_weights_travel_in_bf16_and_are_reduced_in_fp32_on_a_gpu() -> None:
    policy = precision_policy(ParallelConfig(), torch.device("cuda"))
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert precision_policy(ParallelConfig(), torch.device("cpu")).param_dtype is None


class Linear(ToyTask):
    """One matrix product of known size."""

    def networks(self) -> dict[str, Network]:
        return {"net": Network(nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)), optim=OptimConfig())}

    def loss(self, phase, networks, batch, rng):  # type: ignore[no-untyped-def]
        from engine.task import LossOutput

        return LossOutput(networks["net"](batch["x"]).sum(), len(batch["x"]))


def test_flops_are_exact_and_peaks_known() -> None:
    task = Linear(toy_config("unused"))
    forward = 2 * 2 * 6 * 16 * 32
    # The first layer's input needs no gradient: one product less.
    assert count_flops(task, task.networks(), "net", 3) == 3 * forward - forward / 2
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_of("NVIDIA H100 PCIe", "fp32") == 378e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_of("NVIDIA A10G", "bf16") == 70e12
    assert peak_of("Some new GPU", "bf16") is None


def test_records_are_cut_to_the_step_and_play(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step}) for step in (1, 2, 3)] + ['{"step": 4, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    log = toy_config("unused", tensorboard=True).log
    with Recorder(tmp_path, log, is_main=True, step=2, total=5) as recorder:
        recorder.values(3, 24, {"loss": 0.5, "train/l1": math.nan})
        recorder.preview(3, {"clip": torch.rand(2, 3, 4, 8, 8), "frame": torch.rand(2, 3, 8, 8)})
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [1, 2, 3]
    assert found[-1]["loss"] == 0.5 and found[-1]["train/l1"] is None and found[-1]["samples"] == 24
    assert sorted(place.name for place in (tmp_path / "samples").iterdir()) == [
        "step_0000003_clip.gif",
        "step_0000003_clip.mp4",
        "step_0000003_frame.png",
    ]
    assert "loss 0.5" in (tmp_path / "log.txt").read_text()
    events = b"".join(place.read_bytes() for place in (tmp_path / "tensorboard").iterdir())
    assert b"GIF89a" in events and b"NETSCAPE2.0" in events, "an animated GIF lies in the event file"
    with Recorder(tmp_path / "absent", log, is_main=False, step=0, total=5) as silent:
        silent.values(1, 8, {"loss": 1.0})
    assert not (tmp_path / "absent").exists()


def test_log_line() -> None:
    values = {"loss": 0.5, "train/l1": 0.25, "lr/ae": 1e-4, "grad_norm/ae": 2.0, "time/step": 0.5, "time/data_wait": 0.01}
    values |= {"clips_per_s": 16.0, "memory_gib": 1.5, "mfu": 0.4, "skipped": 2.0, "eta_s": 3723.0}
    assert format_line(7, 100, values) == (
        "step   7/100 | loss 0.5 | l1 0.25 | lr ae 1.00e-04 | norm ae 2 | 0.500 s/step, 1.0% waiting for data | "
        "16.0 clips/s | 1.50 GiB | mfu 40.0% | skipped 2 | eta 1:02:03"
    )
    counters = {"data/bad_samples": 3.0, "data/bad_shards": 0.0}
    assert format_line(1, 1, {"loss": 0.5} | counters) == "step 1/1 | loss 0.5 | bad samples 3"


def test_plan_counts_what_each_gpu_holds() -> None:
    config = toy_config("unused", mode="fsdp", global_batch_size=32)
    task = ToyTask(config, gan=True)
    env = Env(0, 4, 0, 4, torch.device("cpu"), "gloo")
    text = report(task, ToySource(config, 0, 4), config, env)
    size = sum(parameter.numel() for parameter in task.networks()["net"].module.parameters())
    assert f"net (Net): {size:,}" in text
    assert "1/4 per GPU" in text and "whole on each GPU" in text and "frozen" in text
    assert "arithmetic of critic" in text and "not countable" not in text
    assert "steps per epoch: 4; steps of the run: 5 (160 samples)" in text
