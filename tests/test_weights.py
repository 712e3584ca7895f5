"""Exports and weights files: deterministic bytes, digests, refusals."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from engine.config import RunConfig, TrainConfig
from engine.runs import open_run
from launch.env import Env
from utils.errors import UserError
from utils.files import sha256_file
from utils.weights import load_tensors, read_export, write_export

MODEL = {"b.weight": torch.arange(6.0).view(2, 3), "a": torch.ones((), dtype=torch.int64), "c": torch.zeros(3, dtype=torch.bfloat16)}
EMA = {key: value + 1 for key, value in MODEL.items()}
CARD = {"system": "toy", "model": {"depth": 2, "rate": 1e-5}}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)


def test_round_trip_by_folder_run_and_file(tmp_path: Path) -> None:
    folder = tmp_path / "000-toy" / "export"
    write_export(folder, {"model": MODEL, "ema": EMA}, CARD)
    for path in (folder, folder.parent, folder / "ema.safetensors", str(folder)):
        state, card, digest = read_export(path)
        assert equal(state, EMA) and card == CARD and digest == sha256_file(folder / "ema.safetensors")
    assert equal(read_export(folder, "model")[0], MODEL)
    assert equal(read_export(folder / "model.safetensors", "ema")[0], MODEL)
    assert sorted(place.name for place in folder.iterdir()) == ["config.yaml", "ema.safetensors", "model.safetensors"]


def test_without_an_average_the_weights_are_read(tmp_path: Path) -> None:
    write_export(tmp_path, {"model": MODEL, "ema": EMA}, CARD)
    write_export(tmp_path, {"model": MODEL}, CARD)
    assert not (tmp_path / "ema.safetensors").exists()
    assert equal(read_export(tmp_path)[0], MODEL)


def test_bytes_depend_on_the_arguments_only(tmp_path: Path) -> None:
    shared = torch.arange(12.0).view(3, 4)
    write_export(tmp_path / "a", {"model": {"x": shared.t(), "y": shared[1], "z": shared}}, CARD)
    write_export(tmp_path / "b", {"model": {"z": shared.clone(), "y": shared[1].clone(), "x": shared.t().contiguous()}}, CARD)
    for name in ("model.safetensors", "config.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_mixture_of_two_exports_is_noticed(tmp_path: Path) -> None:
    write_export(tmp_path / "a", {"model": MODEL}, CARD)
    write_export(tmp_path / "b", {"model": EMA}, CARD)
    os.replace(tmp_path / "b/model.safetensors", tmp_path / "a/model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is not the file"):
        read_export(tmp_path / "a")


def test_what_is_no_export_is_said(tmp_path: Path) -> None:
    folder = open_run(RunConfig(train=TrainConfig(results_dir=tmp_path)), "toy", Env.single()).folder
    with pytest.raises(UserError, match="is a run that has no export yet"):
        read_export(folder)
    (tmp_path / "loose.safetensors").write_bytes(b"")
    for name, message in (("no", "does not exist"), (".", "is not an export"), ("loose.safetensors", "beside it")):
        with pytest.raises(UserError, match=message):
            read_export(tmp_path / name)
    write_export(tmp_path / "export", {"model": MODEL}, CARD)
    (tmp_path / "export/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        read_export(tmp_path / "export")


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": MODEL, "step": 3}, "good.pt")
    assert equal(load_tensors("good.pt")["ema"], MODEL)
    torch.save({"w": _Code()}, "code.pt")
    Path("code.pkl").write_bytes(pickle.dumps(_Code()))
    Path("cut.pt").write_bytes(Path("good.pt").read_bytes()[:300])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_bytes(b"junk")
    Path("cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    torch.save([1], "list.pt")
    for name in ("code.pt", "code.pkl", "cut.pt", "empty.pt", "text.pt", "cut.safetensors", "list.pt", "missing.pt", "."):
        with pytest.raises(UserError) as caught:
            load_tensors(name)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(name)
    assert not Path("ran").exists()
