"""The copy of a background save is of the moment of the save, though it is made while the loop goes on."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.archive import PARTS, pack
from engine.checkpoint import Checkpointer, State, latest
from engine.config import RunConfig
from engine.loop import fit
from engine.staging import Arena, Copy
from engine.state import buffer_names, model_tensors, optimizer_tensors
from launch.env import Env, distributed
from tests.toy_task import ToySource, ToyTask, toy_config


@pytest.fixture(scope="module")
def env() -> Iterator[Env]:
    with distributed(60) as env:
        yield env


def test_only_what_may_change_at_once_is_copied_before_the_thread_begins() -> None:
    tensors = {"weight": torch.ones(3), "mean": torch.ones(2)}
    copy = Arena(pinned=False).copy(tensors, {"mean"})
    tensors["mean"].zero_()
    assert copy.tensors["mean"].tolist() == [1, 1] and copy.tensors["weight"].tolist() == [0, 0, 0]
    waiting = threading.Thread(target=copy.wait, daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive(), "the weights are not copied"
    copy.make()
    waiting.join(10)
    assert not waiting.is_alive() and copy.tensors["weight"].tolist() == [1, 1, 1]


def test_a_loop_does_not_wait_for_a_copy_that_failed() -> None:
    copy = Arena(pinned=False).copy({"weight": torch.ones(3)}, ())
    copy._on_host = [(torch.ones(2), torch.ones(3))]
    with pytest.raises(RuntimeError):
        copy.make()
    copy.wait()


def test_buffers_change_in_the_next_forward_pass_and_weights_after_the_wait(
    tmp_path: Path, env: Env, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(network.parameters(), 0.1)
    progress = {"step": 1, "samples": 8}
    state: State = {"networks": {"net": network}, "optim": {"net": optimizer}, "ema": {}, "progress": progress, "task": {}}
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def backward() -> None:
        network(x).square().mean().backward()

    def values() -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in (model_tensors(state) | optimizer_tensors(state)).items()}

    assert {name.rpartition(".")[2] for name in buffer_names(state)} == {"running_mean", "running_var", "num_batches_tracked"}
    assert buffer_names(state) < model_tensors(state).keys()
    backward()
    optimizer.step()
    checkpointer = Checkpointer(tmp_path, env, RunConfig())
    make, order = Copy.make, []

    def slowly(copy: Copy) -> None:
        time.sleep(0.3)
        make(copy)
        order.append("copied")

    monkeypatch.setattr(Copy, "make", slowly)
    before = values()
    checkpointer.save(1, state)
    backward()
    order.append("gradients")
    checkpointer.copied()
    order.append("update")
    optimizer.step()
    checkpointer.wait()
    assert order == ["gradients", "copied", "update"]
    after = values()
    assert not any(torch.equal(before[name], after[name]) for name in before if not name.endswith("bias"))
    saved = latest(tmp_path)
    assert saved is not None
    checkpointer.load(saved, state)
    assert all(torch.equal(before[name], value) for name, value in values().items())


@pytest.mark.parametrize("gan", [False, True])
def test_a_run_writes_the_same_checkpoints_however_long_copies_take(
    tmp_path: Path, env: Env, monkeypatch: pytest.MonkeyPatch, gan: bool
) -> None:
    def checkpoints(name: str) -> list[dict[str, Tensor]]:
        config = toy_config(tmp_path / name, max_steps=3, **{"checkpoint.every": 1})
        folder = fit(ToyTask(config, gan=gan), ToySource(config, 0, 1), config, env)
        files = []
        for checkpoint in sorted((folder / "checkpoints").iterdir()):
            pack(checkpoint, file := tmp_path / name / f"{checkpoint.name}.safetensors", list(PARTS))
            files.append(load_file(file))
        return files

    expected, make = checkpoints("quickly"), Copy.make

    def slowly(copy: Copy) -> None:
        time.sleep(0.2)
        make(copy)

    monkeypatch.setattr(Copy, "make", slowly)
    for one, other in zip(expected, checkpoints("slowly"), strict=True):
        assert one.keys() == other.keys() and not [name for name in one if not torch.equal(one[name], other[name])]
    assert len(expected) == 3
