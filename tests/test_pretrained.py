"""Every system from training to a saved folder that another process samples from: the same videos bit for bit, and the same pipeline."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.env import Env
from pipelines.pretrained import from_pretrained, main
from pipelines.sampling import Sampling
from tests.distributed import ROOT, environment, run
from tests.sampling import contents, make
from tests.scripts import commands
from tests.shard_sets import write_set
from utils.weights import read_card

AE, CONTENT, MOTION, DIT = "train_ae.py", "train_content_diffusion.py", "train_motion_diffusion.py", "train_dit.py"
SHORT = ["--max-steps", "2", "--epochs", "1", "--global-batch-size", "4", "--num-workers", "0", "--no-tensorboard"]
SHORT += ["--log-every", "1", "--preview-every", "0", "--eval-every", "2", "--log.eval-batches", "1", "--license", "cc-by-4.0"]
FEW = ["--preview.samples", "1", "--preview.steps", "2"]
DEPTH = ["--model.hidden_size", "32", "--model.depth", "2", "--model.num_heads", "2"]
PLANES = ["--model.dim", "32", "--model.depth", "1", "--model.heads", "2", "--model.head_dim", "16", "--model.plane_mlp_dim", "32"]
UNET = ["--model.channel_mult", "1", "1", "--model.attention_resolutions", "2"]
STAGES: dict[str, dict[str, list[str]]] = {
    "cmd": {
        AE: ["--model.dim", "32", "--model.depth", "1"],
        CONTENT: [*DEPTH, *FEW],
        MOTION: [*DEPTH, *FEW],
    },
    "latte": {AE: ["--model.down_channels", "8", "8", "16", "--model.mid_channels", "16"], DIT: [*DEPTH, *FEW]},
    "pvdm": {AE: PLANES, DIT: [*DEPTH, *FEW]},
    "hvdm": {AE: [*PLANES, "--model.freq_widths", "8", "8", "16", "16"], DIT: [*DEPTH, *FEW, "--model.dynamics_bins", "2"]},
    "vidm": {CONTENT: [*UNET, *FEW], MOTION: [*UNET, *FEW, "--preview.frames", "2"]},
}
"""Tiny recipes, made smaller still."""
SAMPLES = {name: ["--steps", "2", "--num-samples", "2", "--seed", "5"] for name in STAGES}
SAMPLES["vidm"] += ["--num-frames", "3"]


def train(env: Env, data: str, results: str) -> None:
    """All stages of all systems, by their scripts."""
    for system, stages in STAGES.items():
        for script, flags in stages.items():
            frames = [] if (system, script) == ("latte", AE) else ["--n-frames", "8"]
            line = [
                "--config",
                str(ROOT / "configs" / system / "tiny.yaml"),
                "--data-path",
                data,
                "--val-path",
                data,
                *SHORT,
                *frames,
                *flags,
            ]
            first = ["--ae", f"{results}/{system}/000-{system}-autoencoder"] if AE in stages and script != AE else []
            commands(env, script, [[*line, *first, "--results-dir", f"{results}/{system}"]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of each system's training."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_set(folder / "clips", (6, 6), lengths=(16,), size=(16, 16))
    run(train, processes=1, timeout=300, data=str(data), results=str(folder))
    return folder


def digest(source: str) -> str:
    """Of what a pipeline generates, to the last bit."""
    pipeline = from_pretrained(source)
    steps = Sampling(steps=2)
    how: dict[str, Any] = {"sampling": steps, "labels": [1]}
    if pipeline.system == "cmd":
        how = {"content": steps, "motion": steps, "labels": [1]}
    if pipeline.system == "vidm":
        from pipelines.vidm import Drawing

        how = {"drawing": Drawing(content=steps, motion=steps), "n_frames": 2}
    if how.get("labels") and not getattr(pipeline, "num_classes", 0):
        del how["labels"]
    torch.set_num_threads(1)
    return hashlib.sha256(pipeline.generate([1], **how).contiguous().numpy().tobytes()).hexdigest()


def sampled(folder: Path, sources: Path) -> None:
    """What sample.py makes of each system below `sources`, and what its pipeline generates, in this process."""
    for system in STAGES:
        make(folder / system, sources / system, *SAMPLES[system])
        (folder / system / "pipeline").write_text(digest(str(sources / system)))


def test_every_system_travels(trained: Path, tmp_path: Path) -> None:
    """Saved, and sampled by another process with the runs out of its sight."""
    sampled(tmp_path / "here", trained)
    for system in STAGES:
        main(["save", str(trained / system), str(tmp_path / "saved" / system)])
        told = "".join(path.read_text() for path in (tmp_path / "saved" / system).rglob("*") if path.suffix in (".json", ".md"))
        assert str(trained) not in told and str(ROOT) not in told, "no places of this machine"
    hidden = trained.rename(trained.with_name("hidden"))
    code = "from pathlib import Path; from tests.test_pretrained import sampled; sampled(Path('there'), Path('saved'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment(), cwd=tmp_path)
    hidden.rename(trained)
    assert done.returncode == 0, done.stderr
    here, there = (contents(tmp_path / name) for name in ("here", "there"))
    assert here.keys() == there.keys() and sum(name.endswith(".mp4") for name in here) >= 3 * len(STAGES)
    differ = {name for name in here if here[name] != there[name] and not name.endswith(".html")}
    assert differ == {f"{system}/settings.json" for system in STAGES}, "which say where the networks lie"
    for name in differ:
        ours, theirs = (json.loads(files[name]) for files in (here, there))
        assert [key for key in ours if ours[key] != theirs[key]] == ["sources"]


def test_the_card_tells_of_the_run(trained: Path) -> None:
    for system in STAGES:
        runs = sorted((trained / system).glob("[0-9]*"))
        assert len(runs) == len(STAGES[system])
        for place in runs:
            card, readme = read_card(place), (place / "export/README.md").read_text()
            assert (card["step"], card["samples"], card["license"]) == (2, 8, "cc-by-4.0")
            assert card["evaluation"]["step"] == 2 and card["evaluation"]["values"]
            for said in (
                "license: cc-by-4.0",
                "library_name: kinoform",
                f"- {system}",
                "## Evaluation",
                card["data"]["digest"][:12],
                "sample.py",
            ):
                assert said in readme, (place, said)
