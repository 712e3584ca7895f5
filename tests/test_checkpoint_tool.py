"""`python -m engine.checkpoint`: what checkpoints hold, whether they are whole, and moved through one file into another run folder."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine import manifest
from engine.checkpoint_tool import main
from engine.loop import fit
from launch.env import Env, distributed
from tests.distributed import command, run
from tests.toy_task import ToySource, ToyTask, toy_config

Tool = Callable[..., tuple[int, str, str]]


def train(env: Env, folder: str, steps: int) -> str:
    config = toy_config(folder, max_steps=steps, schedule="constant", **{"checkpoint.every": 2})
    return str(fit(ToyTask(config), ToySource(config, env.rank, env.world_size), config, env))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, sharded, with the checkpoints of steps 2 and 4."""
    return Path(run(train, folder=str(tmp_path_factory.mktemp("runs")), steps=4)[0])


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copies" / trained.name))


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    def call(*arguments: Any) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def refusal(said: tuple[int, str, str]) -> str:
    status, out, error = said
    assert status == 1 and not out and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_inspect_lists_checkpoints_and_what_the_newest_holds(trained: Path, tool: Tool) -> None:
    status, out, _ = tool("inspect", trained)
    first, second, *rest = out.splitlines()
    assert status == 0
    assert first.startswith(f"{trained}/checkpoints/step_0000002: step 2, 16 samples, ") and "2 process(es), torch" in first
    assert "step_0000004: step 4, 32 samples" in second
    assert [line.split()[:2] for line in rest] == [
        ["progress", "samples"], ["task", "seen"], ["ema", "net:"], ["optim", "net:"], ["weights", "net:"],
    ]  # fmt: skip
    count = sum(tensor.numel() for tensor in load_file(trained / "export/model.safetensors").values())
    assert f"{count:,} values" in rest[-1] and "float32" in rest[-1]
    _, listed, _ = tool("inspect", trained / "checkpoints/step_0000004", "--tensors")
    assert "  networks.net.position  float32 [1, 1, 16]" in listed.splitlines()
    assert "  optim.net.position.step  float32 []" in listed.splitlines()
    assert len(listed.splitlines()) > len(load_file(trained / "export/model.safetensors")) * 4


def test_verify_names_what_is_damaged(copy: Path, tool: Tool) -> None:
    status, out, _ = tool("verify", copy)
    assert status == 0 and [line.split(": ")[0][-1] for line in out.splitlines()] == ["2", "4"] and "all as written" in out
    data = copy / "checkpoints/step_0000002/__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (copy / "checkpoints/step_0000004/manifest.json").unlink()
    status, out, _ = tool("verify", copy / "checkpoints/step_0000002", copy)
    assert status == 1
    assert [line.split(" is ")[0] for line in out.splitlines()] == [str(data)] * 2 + [str(copy / "checkpoints/step_0000004/manifest.json")]
    status, out, _ = tool("inspect", copy)
    assert status == 1 and "step 2, 16 samples" in out and "step_0000004/manifest.json is missing" in out
    assert "another checkpoint" in refusal(tool("convert", copy / "checkpoints/step_0000002", copy / "file.safetensors"))
    assert not list(copy.glob("*.safetensors"))


def test_a_run_goes_on_from_a_file_as_if_nothing_had_been(trained: Path, copy: Path, tool: Tool, tmp_path: Path) -> None:
    file = tmp_path / "moved.safetensors"
    status, out, _ = tool("convert", trained, file)
    tensors = load_file(file)
    assert (status, out) == (0, f"{file}: {len(tensors)} tensors of {trained}/checkpoints/step_0000004\n")
    for name, tensor in load_file(trained / "export/model.safetensors").items():
        assert torch.equal(tensors[f"networks.net.{name}"], tensor)
    for name, tensor in load_file(trained / "export/ema.safetensors").items():
        assert torch.equal(tensors[f"ema.net.{name}"], tensor)
    moved = tmp_path / "elsewhere/000-toy"
    status, out, _ = tool("convert", file, moved)
    assert status == 0 and out.startswith(f"{moved}/checkpoints/step_0000004: made")
    assert tool("verify", moved)[0] == 0
    assert [place.name for place in moved.parent.iterdir()] == ["000-toy"]
    assert [place.name for place in (moved / "checkpoints").iterdir()] == ["step_0000004"]
    with distributed(60) as env:
        assert train(env, str(copy.parent), 7) == str(copy)
        assert train(env, str(moved.parent), 7) == str(moved)
    for name in ("model.safetensors", "ema.safetensors"):
        assert (moved / "export" / name).read_bytes() == (copy / "export" / name).read_bytes()
    # And back, into a run that has lost it.
    shutil.rmtree(copy / "checkpoints")
    tool("convert", file, copy)
    assert [place.name for place in manifest.committed(copy)] == ["step_0000004"]


def test_parts_of_a_state(trained: Path, tool: Tool, tmp_path: Path) -> None:
    averages, state = tmp_path / "ema.safetensors", tmp_path / "state.safetensors"
    assert tool("convert", trained, averages, "--parts", "ema")[0] == 0
    assert {name.split(".")[0] for name in load_file(averages)} == {"ema"}
    assert "no weights (it was made of ema)" in refusal(tool("convert", averages, tmp_path / "000-toy"))
    assert tool("convert", trained / "checkpoints/step_0000002", state, "--parts", "weights", "ema")[0] == 0
    with safe_open(state, "pt") as file:
        assert '"step": 2' in file.metadata()["kinoform"] and not [name for name in file.keys() if name.startswith("optim.")]  # noqa: SIM118
    # Without the optimiser's part a run goes on with fresh moments.
    assert tool("convert", state, tmp_path / "000-toy")[0] == 0
    with distributed(60) as env:
        assert train(env, str(tmp_path), 3) == str(tmp_path / "000-toy")


def test_what_cannot_be_converted_is_refused_in_one_line(trained: Path, copy: Path, tool: Tool, tmp_path: Path) -> None:
    file, foreign = tmp_path / "file.safetensors", tmp_path / "foreign.safetensors"
    tool("convert", trained, file)
    save_file({"a": torch.zeros(1)}, foreign)
    assert "was not made of a checkpoint" in refusal(tool("convert", foreign, tmp_path / "new"))
    assert "exists: delete it first" in refusal(tool("convert", file, copy))
    assert "is no run folder" in refusal(tool("convert", file, tmp_path))
    assert "--parts" in refusal(tool("convert", file, tmp_path / "new", "--parts", "ema"))
    assert "file.bin.safetensors" in refusal(tool("convert", trained, tmp_path / "file.bin"))
    assert "does not exist" in refusal(tool("convert", tmp_path / "none.safetensors", tmp_path / "new"))
    assert "does not exist" in refusal(tool("inspect", tmp_path / "nowhere"))
    assert "neither a run folder" in refusal(tool("verify", tmp_path))
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(flipped)
    line = refusal(tool("convert", tmp_path / "flipped.safetensors", tmp_path / "new"))
    assert "flipped.safetensors is damaged" in line and "sha256" in line
    (copy / "identity").write_text("0" * 64 + "\n")
    assert "other settings" in refusal(tool("convert", file, copy))
    (copy / "file").write_text("")
    assert "cannot be written" in refusal(tool("convert", trained, copy / "file/x.safetensors"))
    assert not (tmp_path / "new").exists()


def test_from_the_command_line(trained: Path) -> None:
    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return command(["-m", "engine.checkpoint", *arguments])

    done = call("verify", str(trained))
    assert done.returncode == 0 and done.stdout.count("all as written") == 2 and done.stderr == ""
    text = call("convert", "--help").stdout
    assert "FILE.safetensors" in text and "--parts" in text
    assert call("unpack").returncode == 2
