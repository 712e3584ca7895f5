"""slurm/pipelines: every stage's command is one that its script takes, and needs only stages before it. No Slurm is needed."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

import train_ae
import train_content_diffusion
import train_dit
import train_motion_diffusion
from datasets.commands.parser import Parser
from pipelines.latents import add_latents_arguments
from tests.distributed import ROOT
from tests.test_launch_scripts import dry_run
from utils.config import load_config

SCRIPTS = {module.PROG: module for module in (train_ae, train_content_diffusion, train_dit, train_motion_diffusion)}
SYSTEMS = sorted(place.stem for place in (ROOT / "slurm/pipelines").glob("*.sh"))
PLACES = {"SHARDS": "/data/shards", "RUNS": "/data/runs"}


def stages(told: str) -> dict[str, tuple[list[str], list[str]]]:
    """Stage -> the stages that it needs, and its script with arguments; of what `slurm/pipeline.sh --dry-run` prints."""
    found = {}
    for line in told.splitlines():
        words = shlex.split(line)
        name = re.sub(r"--job-name=[a-z]+-", "", next(word for word in words if word.startswith("--job-name=")))
        needs = next((word for word in words if word.startswith("--dependency=")), "")
        script = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        found[name] = (re.findall(r"JOB-([\w-]+)", needs), words[script + 1 :])
    return found


def test_every_recipe_folder_has_a_pipeline() -> None:
    assert sorted(place.name for place in (ROOT / "configs").iterdir()) == SYSTEMS


@pytest.mark.parametrize("held_out", ["", "/data/held-out"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_commands_of_a_pipeline_are_complete(system: str, held_out: str) -> None:
    told = stages(dry_run("slurm/pipeline.sh", system, HELD_OUT=held_out, NODES="2", **PLACES))
    names, results = list(told), set()
    for name, (needed, (script, *arguments)) in told.items():
        assert set(needed) <= set(names[: names.index(name)])
        for wanted in re.findall(r"/data/runs/@([\w-]+)", " ".join(arguments)):
            assert wanted in results, f"{name} wants {wanted}, which no stage before it makes"
        if script in SCRIPTS:
            config = load_config(SCRIPTS[script].SCHEMAS, arguments, prog=script)
            config.validate()
            assert config.system == system
            assert config.data.val_path in ({held_out, "/data/runs/latents/held-out"} if held_out else {""})
            results.add(config.train.name or f"{system}-{config.stage}")
        elif script == "preprocess.py":
            parser = Parser(prog=script)
            add_latents_arguments(parser)
            assert arguments[0] == "latents" and isinstance(parser.parse_args(arguments[1:]), argparse.Namespace)
        else:
            assert (script, name) == ("sample.py", names[-1])
    assert len(told["samples"][0]) in (1, 2)


def test_shards_come_first_when_there_are_videos() -> None:
    told = stages(dry_run("slurm/pipeline.sh", "vidm", VIDEOS="/data/videos", PREPARE="--image-size 64 64", **PLACES))
    assert told["shards"] == ([], ["/data/videos", "--out", "/data/shards", "--image-size", "64", "64"])
    assert told["content"][0] == told["motion"][0] == ["shards"]


def test_a_pipeline_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.sh"
    file.write_text('TIME=1:00 stage one - sample.py "$RUNS"\nstage two one,none sample.py "$RUNS"\n')
    told = dry_run("slurm/pipeline.sh", str(file), code=2, **PLACES)
    assert f"error: {file}: two needs none, which is no stage before it" in told
    assert "--job-name=mine-one --time=1:00 " in told
    assert dry_run("slurm/pipeline.sh", "nothing", code=2, **PLACES).startswith("error: usage: ")
