"""The training loop: equal losses however it is spread, equal to a plain loop written here; skipped steps, stops, restarts."""

import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from distributed import run, torchrun
from toy_task import Critic, Net, ToySource, ToyTask, toy_config

from engine.loop import fit
from engine.optim import learning_rate
from engine.tally import Tally
from engine.task import Batch, LossOutput, Network
from engine.team import Team
from launch.env import Env, Stopped, distributed
from utils.errors import ConfigError, UserError
from utils.rng import SampleRng, derive_seed

MODES: dict[str, dict[str, Any]] = {
    "ddp": {"mode": "ddp"},
    "fsdp": {"mode": "fsdp"},
    "hsdp": {"mode": "hsdp", "shard_size": 1},
    "ddp-accumulated": {"mode": "ddp", "accumulation": 2},
    "fsdp-accumulated": {"mode": "fsdp", "accumulation": 2},
    "block": {"activation_checkpointing": "block"},
    "selective": {"activation_checkpointing": "selective"},
}


def train(env: Env, folder: str, changes: Mapping[str, Any], **task: Any) -> Path:
    config = toy_config(folder, **changes)
    return fit(ToyTask(config, **task), ToySource(config, env.rank, env.world_size), config, env)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_all(env: Env, folder: str, modes: Mapping[str, dict[str, Any]], methods: bool = False) -> dict[str, str]:
    """Run folder of each mode."""
    return {name: str(train(env, f"{folder}/{name}", changes, methods=methods)) for name, changes in modes.items()}


def reference(
    steps: int, gan: bool = False, **changes: Any
) -> tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A plain loop over whole batches: losses, norms, weights, average, critic's weights."""
    config = toy_config("unused", max_steps=steps, **changes)
    torch.manual_seed(derive_seed(config.train.seed, "weights"))
    net = Net()
    fixed = nn.Linear(16, 16)
    critic = Critic() if gan else nn.Identity()
    task = ToyTask(config, gan=gan)
    optim = config.optim
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=optim.weight_decay, foreach=False)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), weight_decay=optim.weight_decay, foreach=False) if gan else None
    average = {name: value.clone() for name, value in net.state_dict().items()}
    losses, norms = [], []
    batches = ToySource(config, 0, 1).batches(0)
    for step in range(steps):
        batch = next(batches)
        rng = SampleRng(config.train.seed, batch["index"])
        modules = {"net": net, "fixed": fixed, "critic": critic}
        loss = task.loss("net", modules, batch, rng).total / len(batch["index"])
        net.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), optim.clip_norm if step >= optim.clip_start else math.inf)))
        optimizer.param_groups[0]["lr"] = learning_rate(optim, step, steps)
        optimizer.step()
        losses.append(loss.item())
        for name, value in net.state_dict().items():
            average[name].lerp_(value, 0.1)
        if critic_optimizer is not None and step >= 2:
            critic.zero_grad()
            (task.loss("critic", modules, batch, rng).total / len(batch["index"])).backward()
            nn.utils.clip_grad_norm_(critic.parameters(), optim.clip_norm)
            critic_optimizer.param_groups[0]["lr"] = learning_rate(optim, step, steps) * 0.3
            critic_optimizer.step()
    return losses, norms, net.state_dict(), average, critic.state_dict()


def check_against_reference(run: Path, **changes: Any) -> None:
    losses, norms, weights, average, _ = reference(5, **changes)
    assert [line["loss"] for line in lines(run)] == pytest.approx(losses, rel=3e-7)
    assert [line["grad_norm/net"] for line in lines(run)] == pytest.approx(norms, rel=2e-6)
    for name, expected in (("model", weights), ("ema", average)):
        found = load_file(run / "export" / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=2e-5)


def test_one_process_agrees_with_a_plain_loop(tmp_path: Path) -> None:
    modes = {"ddp": MODES["ddp"], "fsdp": MODES["fsdp"], "fsdp-accumulated": MODES["fsdp-accumulated"]}
    with distributed(60) as env:
        for folder in train_all(env, str(tmp_path), modes).values():
            check_against_reference(Path(folder))


def test_clipping_starts_at_its_step_and_cuts_the_whole_accumulated_gradient(tmp_path: Path) -> None:
    """Not each micro-batch's running sum, and from the first step on no micro-batch more or less than the others have."""
    changes = {"clip_norm": 0.05, "clip_start": 3, "warmup_steps": 0, "schedule": "constant"}
    always, late = reference(5, **(changes | {"clip_start": 0})), reference(5, **changes)
    assert any(not torch.allclose(always[2][name], value, atol=1e-3) for name, value in late[2].items()), "the start makes a difference"
    with distributed(60) as env:
        folder = train(env, str(tmp_path), {"mode": "ddp", "accumulation": 4} | changes)
    check_against_reference(folder, **changes)


@pytest.mark.slow
def test_two_processes_agree_with_a_plain_loop(tmp_path: Path) -> None:
    folders = run(train_all, folder=str(tmp_path), modes=MODES)[0]
    for folder in folders.values():
        check_against_reference(Path(folder))
    weights = {name: (Path(folder) / "export/model.safetensors").read_bytes() for name, folder in folders.items()}
    assert weights["block"] == weights["selective"] == weights["fsdp"], "recomputed activations change nothing"
    methods = run(train_all, folder=str(tmp_path / "methods"), modes={name: MODES[name] for name in ("ddp", "fsdp")}, methods=True)[0]
    for folder in methods.values():
        check_against_reference(Path(folder))


@pytest.mark.slow
def test_bf16_agrees_between_ddp_and_fsdp(tmp_path: Path) -> None:
    modes = {name: {"mode": mode, "precision": "bf16"} for name, mode in (("ddp", "ddp"), ("fsdp", "fsdp"))}
    ddp, fsdp = (Path(folder) for folder in run(train_all, folder=str(tmp_path), modes=modes)[0].values())
    losses = [[line["loss"] for line in lines(folder)] for folder in (ddp, fsdp)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    exact = reference(5)[0]
    assert losses[0] == pytest.approx(exact, rel=0.05) and losses[0] != pytest.approx(exact, rel=1e-6), "bf16 is at work, and harmless"
    weights = [load_file(folder / "export/model.safetensors") for folder in (ddp, fsdp)]
    for key, value in weights[0].items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=2e-5)


class OneBlock(ToyTask):
    """A task with one compiled unit: one compilation is slow enough."""

    def networks(self) -> dict[str, Network]:
        nets = super().networks()
        nets["net"].units = lambda net: [net.blocks[0]]
        self.unit = nets["net"].module.blocks[0]
        return nets


@pytest.mark.slow
def test_a_compiled_unit_changes_only_rounding(tmp_path: Path) -> None:
    found = {}
    with distributed(60) as env:
        for compiled in ("off", "on"):
            config = toy_config(tmp_path / compiled, compile=compiled, max_steps=3)
            task = OneBlock(config)
            found[compiled] = fit(task, ToySource(config, 0, 1), config, env)
            assert (task.unit._compiled_call_impl is not None) == (compiled == "on")
    losses = [[line["loss"] for line in lines(folder)] for folder in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    off, on = (load_file(folder / "export/model.safetensors") for folder in found.values())
    assert off.keys() == on.keys(), "names in files do not tell of the compiler"


def test_adversarial_turns_keep_their_gradients_apart(tmp_path: Path) -> None:
    losses, _, weights, _, critic = reference(5, gan=True)
    config = toy_config(tmp_path)
    task = ToyTask(config, gan=True)
    with distributed(60) as env:
        folder = fit(task, ToySource(config, 0, 1), config, env)
    assert [line["loss"] for line in lines(folder)] == pytest.approx(losses, rel=1e-6)
    assert {"loss/critic", "lr/critic", "grad_norm/critic", "train/margin"} <= lines(folder)[-1].keys()
    assert set(task.gradients) == {("net", "net")}, "only the network in turn may require a gradient"
    found = load_file(folder / "export/model.safetensors")
    for key, value in weights.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-5)
    with distributed(60) as env:
        assert critic_of(env, task, config, folder)["layers.0.weight"].sub(critic["layers.0.weight"]).abs().max() < 2e-5


def critic_of(env: Env, task: ToyTask, config: Any, folder: Path) -> dict[str, Tensor]:
    """Weights of the critic in the last checkpoint of a run."""
    tensors = {f"networks.critic.{key}": value.clone() for key, value in Critic().state_dict().items()}
    dcp.load(tensors, checkpoint_id=str(next((folder / "checkpoints").glob("step_0000005"))))
    return {key.removeprefix("networks.critic."): value for key, value in tensors.items()}


def counting_hook(calls: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own exchange, counted."""
    calls[0] += 1
    return allreduce_hook(None, bucket)


class Collectives(TorchDispatchMode):
    """Names of the collectives inside the block. (`CommDebugMode` of torch 2.11 fails in its module tracker.)"""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        if function.namespace == "c10d":
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def count_collectives(env: Env, folder: str, mode: str) -> dict[str, list[int]]:
    """Gradient exchanges of a step without and with accumulation: bytes-free counts from the dispatcher (FSDP) or the hook (DDP)."""
    counts: dict[str, list[int]] = {"reduce_scatter": [], "packed": [], "hook": []}
    for accumulation in (1, 4):
        config = toy_config(folder, mode=mode, accumulation=accumulation)
        task, source = ToyTask(config), ToySource(config, env.rank, env.world_size).batches(0)
        torch.manual_seed(0)
        team = Team(task.networks(), config, env)
        hooks = [0]
        if mode == "ddp":
            team.members["net"].entry.ddp.register_comm_hook(hooks, counting_hook)
        tally = Tally(env)
        with Collectives() as step, team.turn("net") as modules:
            for number in range(accumulation):
                team.synchronise("net", last=number == accumulation - 1)
                batch = next(source)
                output = task.loss("net", modules, batch, SampleRng(0, batch["index"]))
                output.total.backward()
                tally.add(output)
        counts["reduce_scatter"].append(sum("reduce_scatter" in name for name in step.names))
        counts["hook"].append(hooks[0])
        with Collectives() as reduction:
            tally.reduce()
        counts["packed"].append(len(reduction.names))
    return counts


def test_accumulation_exchanges_gradients_once(tmp_path: Path) -> None:
    fsdp = run(count_collectives, folder=str(tmp_path), mode="fsdp")[0]
    assert fsdp["reduce_scatter"] == [4, 4], "three blocks and the root, whatever the accumulation"
    assert fsdp["packed"] == [1, 1], "losses, counts, stop and finite flags travel together"
    ddp = run(count_collectives, folder=str(tmp_path), mode="ddp")[0]
    assert ddp["hook"][0] == ddp["hook"][1] > 0


def skipping(env: Env, folder: str, mode: str) -> dict[str, Any]:
    """Train two good steps, then only bad ones on rank 0's samples: what is left of the weights and counters."""
    good = train(env, f"{folder}/good", {"max_steps": 2, "schedule": "constant", "mode": mode})
    bad = train(env, f"{folder}/bad", {"max_steps": 5, "schedule": "constant", "mode": mode}, bad_from=2)
    weights = [load_file(run / "export/model.safetensors") for run in (good, bad)]
    same = all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    return {"same": same, "last": lines(bad)[-1], "run": str(bad)}


@pytest.mark.parametrize(("processes", "mode"), [(2, "fsdp"), (1, "ddp")])
def test_steps_that_are_not_finite_change_nothing(tmp_path: Path, processes: int, mode: str) -> None:
    for result in run(skipping, processes, folder=str(tmp_path), mode=mode):
        assert result["same"]
        assert result["last"]["skipped"] == 3
        record = json.loads((Path(result["run"]) / "checkpoints/step_0000005/manifest.json").read_text())
        assert record["progress"]["skipped"] == 3
        steps = {"optim.net.head.weight.step": torch.zeros(())}
        dcp.load(steps, checkpoint_id=str(Path(result["run"]) / "checkpoints/step_0000005"), no_dist=True)
        assert steps["optim.net.head.weight.step"] == 2


def give_up(env: Env, folder: str, every: int) -> str:
    try:
        train(env, folder, {"max_steps": 9, "max_bad_steps": 3, "checkpoint.every": every}, bad_from=2)
    except UserError as error:
        return str(error)
    return ""


def complete(env: Env, folder: str) -> str:
    return str(train(env, folder, {"max_steps": 9}))


@pytest.mark.parametrize("every", [2, 100])
def test_too_many_bad_steps_in_a_row_end_the_run_at_its_last_good_state_and_name_the_samples(tmp_path: Path, every: int) -> None:
    for message in run(give_up, folder=str(tmp_path / "bad"), every=every):
        assert message.startswith("steps 3 to 5: loss or gradient not finite 3 times in a row")
        assert "rank 0" in message and "toy/16, toy/17, toy/18, toy/19" in message and "toy/20" not in message
        assert message.endswith("saved as step_0000002")
    (folder,) = (tmp_path / "bad").glob("*-toy")
    record = json.loads((folder / "checkpoints/step_0000002/manifest.json").read_text())
    assert record["progress"] == {"step": 2, "samples": 16, "skipped": 0}
    assert [place.name for place in (folder / "checkpoints").iterdir()] == ["step_0000002"]
    # Without what made them bad, the steps are done again and nothing is lost.
    whole = Path(run(complete, folder=str(tmp_path / "whole"))[0])
    assert run(complete, folder=str(tmp_path / "bad")) == [str(folder)] * 2
    assert (folder / "export/model.safetensors").read_bytes() == (whole / "export/model.safetensors").read_bytes()
    assert [line["step"] for line in lines(folder)] == list(range(1, 10))


def test_max_steps_is_exact_and_a_finished_run_goes_on_only_with_a_larger_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with distributed(60) as env:
        folder = train(env, str(tmp_path), {"max_steps": 3})
        assert [line["step"] for line in lines(folder)] == [1, 2, 3]
        before = (folder / "export/model.safetensors").read_bytes()
        capsys.readouterr()
        assert train(env, str(tmp_path), {"max_steps": 3}) == folder
        assert "nothing to do" in capsys.readouterr().out
        assert (folder / "export/model.safetensors").read_bytes() == before
        assert train(env, str(tmp_path), {"max_steps": 6}) == folder
        assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4, 5, 6]
        assert (folder / "export/model.safetensors").read_bytes() != before
        epochs = train(env, str(tmp_path / "epochs"), {"max_steps": 0, "epochs": 2})
        assert lines(epochs)[-1]["step"] == 8 and lines(epochs)[-1]["samples"] == 64


class Killed(ToyTask):
    """Its process receives a signal in one step, unless a file says that this has happened."""

    def __init__(self, config: Any, env: Env, step: int, number: int, rank: int, once: Path) -> None:
        super().__init__(config, gan=True)
        self.due = (step * config.train.global_batch_size, number, once) if rank == env.rank else None

    def loss(self, phase: str, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> LossOutput:
        if self.due and int(rng.index[0]) >= self.due[0] and not self.due[2].exists():
            self.due[2].touch()
            os.kill(os.getpid(), self.due[1])
        return super().loss(phase, networks, batch, rng)


def interrupted(env: Env, folder: str, step: int, number: int, rank: int, mode: str) -> str:
    changes = {"max_steps": 9, "checkpoint.every": 3, "mode": mode, "accumulation": 2, "log.every": 2, "background": False}
    config = toy_config(folder, **changes)
    task = Killed(config, env, step, number, rank, Path(folder) / "done") if step else ToyTask(config, gan=True)
    Path(folder).mkdir(exist_ok=True, parents=True)
    try:
        return str(fit(task, ToySource(config, env.rank, env.world_size), config, env))
    except Stopped:
        return "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp", "ddp"])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, mode: str) -> None:
    whole = Path(run(interrupted, folder=str(tmp_path / "whole"), step=0, number=0, rank=0, mode=mode)[0])
    arguments = {"folder": str(tmp_path / "killed"), "step": 4, "number": int(signal.SIGKILL), "rank": 1, "mode": mode}
    with pytest.raises(AssertionError):
        run(interrupted, **arguments)
    (folder,) = (tmp_path / "killed").glob("*-toy")
    assert [place.name for place in (folder / "checkpoints").glob("step_*")] == ["step_0000003"]
    assert run(interrupted, **arguments) == [str(folder)] * 2
    for name in ("model.safetensors", "ema.safetensors"):
        assert (folder / "export" / name).read_bytes() == (whole / "export" / name).read_bytes()
    kept = ("loss", "loss/critic", "grad_norm/net", "grad_norm/critic", "lr/net", "skipped", "samples", "step")
    ends = [[{key: line.get(key) for key in kept} for line in lines(run)][-2:] for run in (folder, whole)]
    assert ends[0] == ends[1]
    steps = [line["step"] for line in lines(folder)]
    assert steps == sorted(set(steps)), "lines of steps that were run again are dropped"


def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(tmp_path: Path) -> None:
    arguments = {"folder": str(tmp_path), "step": 4, "number": int(signal.SIGUSR1), "rank": 1, "mode": "fsdp"}
    assert run(interrupted, **arguments) == ["stopped", "stopped"]
    (folder,) = tmp_path.glob("*-toy")
    assert (folder / "checkpoints/step_0000005/manifest.json").is_file()
    assert run(interrupted, **arguments) == [str(folder)] * 2


def test_batch_that_does_not_divide(tmp_path: Path) -> None:
    with distributed(60) as env, pytest.raises(ConfigError, match="use 6 or 9"):
        train(env, str(tmp_path), {"accumulation": 3})


def test_a_script_under_torchrun_fails_with_its_output(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('no')\n")
    assert torchrun([str(script)], processes=1).returncode != 0
