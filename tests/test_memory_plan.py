"""Memory: what a run is said to need against what is counted while it runs, and optimiser state in host memory."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from distributed import ROOT, environment, run
from toy_task import ToySource, ToyTask, toy_config

from engine.activations import Activations, Ledger, count_activations
from engine.checkpoint import Checkpointer
from engine.config import OptimConfig, ParallelConfig
from engine.loop import fit
from engine.plan import build_on_meta, gathered, measure, report
from engine.task import Batch, LossOutput, Network
from engine.team import Team
from launch.env import Env
from models.transformers.dit import ContentDiT, DiTConfig
from tasks.clips import units
from utils.errors import ConfigError
from utils.rng import SampleRng

FP32 = ParallelConfig(mode="ddp", precision="fp32")
MIB = 2**20


class Denoiser:
    """A small DiT on noise: the loss of a real stage without its data."""

    name = "denoiser"

    def __init__(self, config: DiTConfig) -> None:
        self.config = config

    def networks(self) -> dict[str, Network]:
        return {"model": Network(ContentDiT(self.config), optim=OptimConfig(), units=units)}

    def phases(self, step: int) -> tuple[str, ...]:
        return ("model",)

    def loss(self, phase: str, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> LossOutput:
        x = batch["x"]
        t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return LossOutput((networks["model"](x, t).float()[:, : x.shape[1]] - x).square().mean((1, 2, 3)).sum(), len(x))

    def batch_spec(self, batch_size: int) -> Batch:
        return {"x": torch.empty(batch_size, self.config.in_channels, *self.config.input_size, device="meta")}


SMALL = DiTConfig((32, 32), 4, hidden_size=64, depth=3, num_heads=2)


def saved_bytes(task: Any, count: int) -> int:
    """Bytes that the backward pass of a real forward pass keeps, but for weights and samples."""
    torch.manual_seed(0)
    networks = task.networks()
    module = networks["model"].module
    batch = {"x": torch.randn(task.batch_spec(count)["x"].shape), "index": torch.arange(count)}
    known = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers(), batch["x"])}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss("model", {"model": module}, batch, SampleRng(0, batch["index"])).total
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def counted(task: Any, count: int, **parallel: Any) -> Activations:
    found = count_activations(task, task.networks(), "model", count, dataclasses.replace(FP32, **parallel), kept=0.0)
    assert found is not None
    return found


def test_what_is_counted_is_what_a_real_pass_keeps() -> None:
    task = Denoiser(SMALL)
    for count in (4, 8):
        samples = count * 4 * 32 * 32 * 4
        assert counted(task, count).saved - samples == pytest.approx(saved_bytes(task, count), rel=0.03)


def test_the_peak_is_that_of_a_real_pass() -> None:
    task = Denoiser(SMALL)
    torch.manual_seed(0)
    module = task.networks()["model"].module
    for parameter in filter(lambda parameter: parameter.requires_grad, module.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    ledger = Ledger()
    ledger.know((*module.parameters(), *module.buffers()))
    with ledger:
        batch = {"x": torch.randn(4, 4, 32, 32), "index": torch.arange(4)}
        task.loss("model", {"model": module}, batch, SampleRng(0, batch["index"])).total.backward()
    found = counted(task, 4)
    assert found.peak == pytest.approx(ledger.peak, rel=0.05)
    assert found.peak > found.saved


def test_a_chain_of_layers_by_hand() -> None:
    """Two layers of width 512 in bf16: the first saves its input, the activation its input, the second its own."""

    class Chain(Denoiser):
        def networks(self) -> dict[str, Network]:
            return {"model": Network(nn.Sequential(nn.Linear(512, 512, bias=False), nn.GELU(), nn.Linear(512, 512, bias=False)))}

        def loss(self, phase: str, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> LossOutput:
            return LossOutput(networks["model"](batch["x"]).sum(), 1)

        def batch_spec(self, batch_size: int) -> Batch:
            return {"x": torch.empty(batch_size, 512, device="meta")}

    task, row = Chain(SMALL), 64 * 512
    in_fp32, in_bf16 = 4 * 3 * row + 512, 4 * row + 2 * 3 * row + 512
    assert counted(task, 64).saved == in_fp32, "samples, input of the activation, of the second layer; the loss"
    weights = 2 * 512 * 512
    assert counted(task, 64, precision="bf16").saved == in_bf16 + weights, "samples are rounded, and weights that a gradient passes"
    assert counted(task, 64, precision="bf16", mode="fsdp").saved == in_bf16, "the weights are gathered in bf16"


def test_checkpointing_is_in_the_count() -> None:
    task = Denoiser(dataclasses.replace(SMALL, depth=6))
    found = {kind: counted(task, 8, activation_checkpointing=kind) for kind in ("none", "block", "selective")}
    assert found["block"].saved < found["selective"].saved < found["none"].saved
    assert found["block"].peak < 0.5 * found["none"].peak
    tokens = 8 * 256 * 64 * 4
    assert found["block"].saved > 6 * tokens, "each block keeps its input"
    bf16 = {kind: counted(task, 8, activation_checkpointing=kind, precision="bf16").peak for kind in ("none", "block", "selective")}
    assert bf16["block"] < bf16["selective"] < bf16["none"] < 0.8 * found["none"].peak


MEASURE = """
import sys, torch
from pathlib import Path
from test_memory_plan import LARGER, Denoiser
from engine.shard import recompute
from utils.rng import SampleRng
def most():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
task = Denoiser(LARGER)
def step(network, count):
    batch = {"x": torch.randn(count, 4, 64, 64), "index": torch.arange(count)}
    task.loss("model", {"model": network.module}, batch, SampleRng(0, batch["index"])).total.backward()
for kind in sys.argv[1:]:
    network = task.networks()["model"]
    for unit in network.units(network.module):
        recompute(unit, kind)
    step(network, 1)
    Path("/proc/self/clear_refs").write_text("5")
    before = most()
    step(network, 6)
    print(most() - before)
"""
LARGER = DiTConfig((64, 64), 4, hidden_size=128, depth=6, num_heads=4)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of a process, and to set it back")
def test_the_estimate_is_near_what_a_process_takes() -> None:
    """Counted in pages, by another allocator than a GPU's, with the workspaces of this CPU's kernels; the gradients are there before."""
    variables = environment(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")  # and one thread
    kinds = ("none", "block")
    done = subprocess.run([sys.executable, "-c", MEASURE, *kinds], cwd=ROOT, env=variables, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind, taken in zip(kinds, done.stdout.split(), strict=True):
        assert int(taken) == pytest.approx(counted(Denoiser(LARGER), 6, activation_checkpointing=kind).peak, rel=0.15), kind


def planned(tmp: str, world: int = 4, **changes: Any) -> str:
    config = toy_config(tmp, global_batch_size=32, **changes)
    return report(ToyTask(config, gan=True), ToySource(config, 0, world), config, Env(0, world, 0, world, torch.device("cpu"), "gloo"))


def size(text: str) -> float:
    value, unit = text.split()
    return float(value) * {"MiB": 1, "GiB": 1024}[unit]


def test_the_plan_adds_up(tmp_path: Path) -> None:
    text = planned(str(tmp_path), mode="fsdp", accumulation=2)
    for phase in ("net", "critic"):
        head, parts = re.search(rf"peak per GPU in the turn of {phase}, estimated, without .*: (.*)\n  (.*)\n", text).groups()  # type: ignore[union-attr]
        found = [re.search(r"([\d.]+ [MG]iB)$", part)[1] for part in parts.split(" + ")]  # type: ignore[index]
        assert size(head) == pytest.approx(sum(map(size, found)), abs=0.04)
        assert ("accumulated gradients" in parts and "waiting samples" in parts) or phase == "critic"
    kinds = re.search(r"by --activation-checkpointing: none (.*), block (.*), selective (.*) \(this run: none\)", text)
    assert kinds is not None


def test_hybrid_sharding_and_offload_in_the_plan(tmp_path: Path) -> None:
    networks = build_on_meta(ToyTask(toy_config(tmp_path), gan=True))
    whole, cut = measure("net", networks["net"], 1), measure("net", networks["net"], 4)
    buffers = 6 * 16 * 4
    assert cut.weights - buffers == (whole.weights - buffers) // 4
    away = measure("net", networks["net"], 4, offload=True)
    assert (away.weights, away.gradients, away.optimizer) == (buffers, 0, 0)
    assert away.host == cut.total - 2 * buffers
    assert measure("critic", networks["critic"], 1, offload=True).host == 0, "a replicated network stays"
    text = planned(str(tmp_path), mode="hsdp", shard_size=2, optim_offload=True)
    assert re.search(r"1/2, [\d.]+ MiB in host memory per GPU", text)
    assert "1/2 per GPU" in planned(str(tmp_path), mode="hsdp", shard_size=2)


def host(tmp: Path, **changes: Any) -> dict[str, float]:
    """MiB of the parts of the host memory in a plan, and of rank 0's node of 4 processes."""
    found = re.search(r"host memory kept by a process: (.*); by rank 0's node of 4 process\(es\): (.*)\n", planned(str(tmp), **changes))
    assert found is not None
    parts = re.findall(r"([^+]*?) ([\d.]+ [MG]iB)(?: \+ |$)", found[1])
    return {name: size(text) for name, text in parts} | {"node": size(found[2])}


def test_host_memory_in_the_plan(tmp_path: Path) -> None:
    whole = host(tmp_path, mode="ddp")
    assert whole.keys() == {"the same of what is not cut, on rank 0", "node"}, "one process writes for all"
    cut = host(tmp_path, mode="fsdp", optim_offload=True)
    shards, copy, rest, node = cut.values()
    assert node == pytest.approx(4 * (shards + copy) + rest, abs=0.05) and 4 * copy + rest == pytest.approx(whole["node"], abs=0.05)
    assert "host memory" not in planned(str(tmp_path), mode="fsdp", **{"checkpoint.background": False})


def test_gathered_weights() -> None:
    network = ToyTask(toy_config("unused")).networks()["net"]
    sizes = [sum(p.numel() for p in block.parameters()) for block in network.module.blocks]
    root = sum(p.numel() for p in network.module.parameters()) - sum(sizes)
    bf16 = ParallelConfig(mode="fsdp", precision="bf16")
    assert gathered(network, bf16, trained=False) == 2 * (root + 2 * sizes[0])
    assert gathered(network, bf16, trained=True) == 2 * (root + 2 * sizes[0]) + 6 * sizes[0]
    assert gathered(network, ParallelConfig(mode="ddp"), trained=True) == 0


def test_a_loss_that_cannot_be_counted_says_so(tmp_path: Path) -> None:
    class Odd(ToyTask):
        def loss(self, phase: str, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> LossOutput:
            if batch["x"].sum().item() > 0:
                pass
            return super().loss(phase, networks, batch, rng)

    config = toy_config(tmp_path)
    text = report(Odd(config), ToySource(config, 0, 1), config, Env.single())
    assert "peak per GPU in the turn of net: not countable" in text


def offloaded(env: Env, folder: str, mode: str) -> list[str]:
    """Run folders without and with offload, of a run with a critic that stays where it is, clipping and averages."""
    places = []
    for offload in (False, True):
        config = toy_config(f"{folder}/{offload}", mode=mode, shard_size=0, optim_offload=offload, **{"checkpoint.every": 2})
        places.append(str(fit(ToyTask(config, gan=True), ToySource(config, env.rank, env.world_size), config, env)))
    return places


def offload(env: Env, folder: str) -> tuple[list[str], list[bool], int]:
    return offloaded(env, folder, "hsdp"), *where_it_lies(env, folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two ranks found of offload."""
    return run(offload, folder=str(tmp_path_factory.mktemp("offload")))


def test_offload_trains_the_same_on_a_cpu(pair: list[Any]) -> None:
    """That wrapping, clipping, averaging and saving go with it. Nothing moves here: whether the copies are right shows on a GPU."""
    plain, away = map(Path, pair[0][0])
    for name in ("model.safetensors", "ema.safetensors"):
        left, right = load_file(plain / "export" / name), load_file(away / "export" / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(value, right[key]) for key, value in left.items())


def where_it_lies(env: Env, folder: str) -> tuple[list[bool], int]:
    """Whether FSDP keeps the shards of the network and of its average away from the device; bytes of the buffer for checkpoints."""
    config = toy_config(folder, mode="fsdp", optim_offload=True)
    team = Team(ToyTask(config).networks(), config, env)
    member = team.members["net"]
    assert member.ema is not None and all(isinstance(parameter, DTensor) for parameter in member.parameters)
    modules = [member.module, *member.module.blocks, member.ema.module, *member.ema.module.blocks]
    checkpointer = Checkpointer(Path(folder), env, config)
    state = {"networks": {"net": member.module}, "optim": {"net": member.optimizer}, "ema": {"net": member.ema.module}}
    checkpointer.reserve({**state, "progress": {}, "task": {}})  # type: ignore[typeddict-item]
    offloaded = [module._get_fsdp_state()._fsdp_param_group.fsdp_params[0].offload_to_cpu for module in modules]
    return offloaded, len(checkpointer._arena._buffer)


def test_offload_reaches_every_unit_and_the_average_and_the_plan_knows_the_copy(pair: list[Any], tmp_path: Path) -> None:
    assert [reached for _, reached, _ in pair] == [[True] * 8] * 2
    need = measure("net", build_on_meta(ToyTask(toy_config(tmp_path)))["net"], 2)
    padding = 4 * 64 * 50  # each of the tensors begins at a multiple of 64 bytes
    for rank, (*_, taken) in enumerate(pair):
        planned = need.copied + need.copied_once * (rank == 0)
        assert planned <= taken <= planned + padding, (rank, planned, taken)
    assert need.copied > 2 * padding


def test_offload_is_for_sharded_networks() -> None:
    with pytest.raises(ConfigError, match="--parallel fsdp or hsdp"):
        toy_config("unused", mode="ddp", optim_offload=True).validate()
    toy_config("unused", mode="hsdp", optim_offload=True).validate()
