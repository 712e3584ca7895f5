"""Exports and weights files: deterministic bytes, digests, refusals."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml

from engine.config import RunConfig, ScoreConfig, TrainConfig
from engine.describe import describe
from engine.identity import identity
from engine.runs import open_run
from launch.env import Env
from utils.config import save_yaml
from utils.errors import ConfigError, UserError
from utils.files import sha256_file
from utils.weights import load_tensors, read_card, read_export, write_export

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
    assert sorted(place.name for place in folder.iterdir()) == ["README.md", "config.json", "ema.safetensors", "model.safetensors"]


def test_without_an_average_the_weights_are_read(tmp_path: Path) -> None:
    write_export(tmp_path, {"model": MODEL, "ema": EMA}, CARD)
    write_export(tmp_path, {"model": MODEL}, CARD)
    assert not (tmp_path / "ema.safetensors").exists()
    assert equal(read_export(tmp_path)[0], MODEL)


def test_bytes_depend_on_the_arguments_only(tmp_path: Path) -> None:
    shared = torch.arange(12.0).view(3, 4)
    write_export(tmp_path / "a", {"model": {"x": shared.t(), "y": shared[1], "z": shared}}, CARD)
    write_export(tmp_path / "b", {"model": {"z": shared.clone(), "y": shared[1].clone(), "x": shared.t().contiguous()}}, CARD)
    for name in ("model.safetensors", "config.json", "README.md"):
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


def test_the_card_of_an_older_version_is_read_and_replaced(tmp_path: Path) -> None:
    write_export(tmp_path, {"model": MODEL}, CARD)
    digest = sha256_file(tmp_path / "model.safetensors")
    save_yaml(tmp_path / "config.yaml", {**CARD, "files": {"model.safetensors": digest}})
    (tmp_path / "config.json").unlink()
    assert read_export(tmp_path)[1:] == (CARD, digest) and read_card(tmp_path / "model.safetensors")["system"] == "toy"
    save_yaml(tmp_path / "config.yaml", {**CARD, "files": {"model.safetensors": "0" * 64}})
    with pytest.raises(UserError, match=r"is not the file that .*config\.yaml names"):
        read_export(tmp_path)
    write_export(tmp_path, {"model": EMA}, CARD | {"system": "newer"})
    assert not (tmp_path / "config.yaml").exists() and read_card(tmp_path)["system"] == "newer"


def test_a_card_that_is_none_is_one_line(tmp_path: Path) -> None:
    write_export(tmp_path, {"model": MODEL}, CARD)
    good = json.loads((tmp_path / "config.json").read_text())
    others = [("{", "cannot be read as JSON"), ("[1]", "holds a list"), ('{"_class_name": "AutoencoderKL"}', "not a card of Kinoform's")]
    others += [(json.dumps(good | {"format": 99}), "has format 99, this version reads up to 1"), ("[" * 100000, "cannot be read as JSON")]
    for text, message in others:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            read_export(tmp_path)
        assert "\n" not in str(caught.value)


def test_what_a_card_names_from_itself_on_is_found_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_export(tmp_path / "saved" / "denoiser", {"model": MODEL}, CARD | {"ae": {"path": "../autoencoder", "weights": "ema"}})
    os.replace(tmp_path / "saved", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert read_card("moved/denoiser")["ae"] == {"path": str(tmp_path / "moved/autoencoder"), "weights": "ema"}
    write_export(tmp_path / "bad", {"model": MODEL}, CARD | {"ae": {"path": "../../../etc"}})
    assert read_card(tmp_path / "bad")["ae"]["path"] == str(tmp_path / "etc"), "no further up than the saved folder"


def front_matter(folder: Path) -> tuple[dict[str, object], str]:
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_readme_says_what_the_card_says(tmp_path: Path) -> None:
    card = {
        "system": "toy", "stage": "denoiser", "step": 30, "samples": 240, "license": "Apache-2.0",
        "data": {"dataset": "a|b\nc", "digest": "f" * 64, "licence": "CC0", "n_frames": 16, "image_size": [64, 48], "fps": 8.0},
        "training": {"batch": 8, "learning_rate": 1e-4, "precision": "bf16", "ema_decay": 0.0},
        "evaluation": {"step": 20, "values": {"psnr": 21.5}, "protocol": "means over 3 batches"}, "best": {"metric": "psnr", "value": 21.5},
    }  # fmt: skip
    write_export(tmp_path, {"model": MODEL}, card)
    head, body = front_matter(tmp_path)
    assert head == {"library_name": "kinoform", "license": "apache-2.0", "tags": ["kinoform", "video-generation", "toy", "denoiser"]}
    for said in (
        "| data | a\\|b c (sha256 ffffffffffff...) |", "| licence of the data | CC0 |", "16 frames of 64x48 at 8.0 a second",
        "`model.safetensors`",
        "30 (240 samples)", "| batch | 8 |", "| psnr | 21.5 |", "After step 20, means over 3 batches", "their psnr, 21.5, is the best",
        "read_export",
    ):  # fmt: skip
        assert said in body, said
    assert "ema.safetensors" not in body, "there is none"
    write_export(tmp_path, {"model": MODEL, "ema": EMA}, CARD | {"license": "My own: ask me"})
    head, body = front_matter(tmp_path)
    assert (head["license"], head["license_name"]) == ("other", "my-own-ask-me") and "ema.safetensors" in body


def test_a_run_is_described_by_its_settings_and_its_last_evaluation(tmp_path: Path) -> None:
    config = RunConfig(train=TrainConfig(license=" mit ", global_batch_size=8))
    assert "evaluation" not in describe(tmp_path, config, 10)
    lines = [
        {"step": 4, "eval/psnr": 20.0},
        {"step": 8, "eval/psnr": 21.0, "eval/ssim": None},
        {"step": 9, "loss": 1.0},
        {"step": 12, "eval/psnr": 9.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 13, "eval/ps')
    told = describe(tmp_path, config, 10)
    assert (told["license"], told["training"]["batch"]) == ("mit", 8)
    assert (told["evaluation"]["step"], told["evaluation"]["values"]) == (8, {"psnr": 21.0})
    assert "score" not in told
    for wrong in ("", "two\nlines"):
        with pytest.raises(ConfigError, match="--license: one line"):
            RunConfig(train=TrainConfig(license=wrong)).validate()
    assert identity(config) == identity(RunConfig(train=TrainConfig(global_batch_size=8))), "it may change while a run goes on"


def test_scores_are_in_the_card_with_a_protocol_of_their_own(tmp_path: Path) -> None:
    """Also beside an evaluation, of the same step or another; of a run without one they are all there is."""
    config = RunConfig(score=ScoreConfig(every=2, videos=64, i3d="/somewhere/i3d.pt", protocol="pvdm"))
    lines = [{"step": 2, "score/fvd64_16f": 31.25}, {"step": 4, "eval/loss": 0.5, "score/fvd64_16f": 20.5}, {"step": 6, "eval/loss": 0.25}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = describe(tmp_path, config, 6)
    assert (told["evaluation"]["step"], told["evaluation"]["values"]) == (6, {"loss": 0.25})
    assert (told["score"]["step"], told["score"]["values"]) == (4, {"score/fvd64_16f": 20.5})
    write_export(tmp_path / "export", {"model": MODEL}, CARD | told | {"best": {"metric": "score/fvd64_16f", "value": 20.5}})
    body = (tmp_path / "export/README.md").read_text()
    for said in (
        "their score/fvd64_16f, 20.5, is the best", "| score/fvd64_16f | 20.5 |", "| loss | 0.25 |", "After step 6, means over",
        "After step 4, Frechet distance of at most 64 samples", "as i3d.pt sees them by the protocol pvdm",
    ):  # fmt: skip
        assert said in body, said
    assert "somewhere" not in body, "paths of a machine are nobody's business"
    metrics.write_text(json.dumps(lines[0]) + "\n")
    alone = describe(tmp_path, config, 6)
    assert "evaluation" not in alone and alone["score"]["values"] == {"score/fvd64_16f": 31.25}
