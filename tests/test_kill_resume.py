"""A training command killed at any moment, and the same command again: the export has the bytes of a run that was left alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import preprocessing
from tests.distributed import ROOT, environment, run
from tests.scripts import commands, kill

SETTINGS = ["--config", "configs/cmd/tiny.yaml", "--model.dim", "16", "--model.depth", "1", "--global-batch-size", "4"]
SETTINGS += ["--num-workers", "0", "--preview-every", "0", "--eval-every", "0", "--no-tensorboard"]
SETTINGS += ["--max-steps", "30", "--ckpt-every", "2", "--keep-last", "2"]


def arguments(shards: Path, results: Path) -> list[str]:
    return ["train_ae.py", *SETTINGS, "--data-path", str(shards), "--results-dir", str(results)]


def kill_when(due: Callable[[], bool], command: list[str], delay: float = 0.0) -> None:
    """Start the command under torchrun, and kill its process group `delay` seconds after `due` turned true."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command]
    child = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    limit = time.monotonic() + 300
    try:
        while not due():
            assert child.poll() is None, child.communicate()[0]
            assert time.monotonic() < limit
            time.sleep(0.002)
        time.sleep(delay)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


@pytest.mark.slow
def test_killed_at_three_moments_and_started_again(tmp_path: Path) -> None:
    shards, killed, whole = tmp_path / "shards", tmp_path / "killed", tmp_path / "whole"
    size = ["--num-videos", "8", "--image-size", "16", "16", "--clip-length", "8"]
    preprocessing.run("--dataset-name", "synthetic-digits", *size, "--out", shards)
    script, *line = arguments(shards, killed)

    kill(script, line, "engine.manifest.digest_files", "step_0000002")  # while the first checkpoint is written
    (folder,) = killed.iterdir()
    checkpoints = folder / "checkpoints"
    assert [place.name for place in checkpoints.iterdir()] == [".step_0000002.tmp"]

    kill_when(lambda: len(list(checkpoints.glob("step_*"))) > 1, [script, *line], delay=0.05)
    reached = max(place.name for place in checkpoints.glob("step_*"))
    assert "step_0000002" < reached < "step_0000030"

    kill(script, line, "os.replace", "export/model.safetensors")  # while the export is written
    assert (folder / "export" / "ema.safetensors").exists() and not (folder / "export" / "config.json").exists()

    _, *other = arguments(shards, whole)
    run(commands, script=script, lines=[line, other])
    for name in ("model.safetensors", "ema.safetensors", "config.json", "README.md"):
        assert (folder / "export" / name).read_bytes() == (whole / folder.name / "export" / name).read_bytes()
    assert sorted(place.name for place in checkpoints.iterdir()) == ["step_0000028", "step_0000030"]
