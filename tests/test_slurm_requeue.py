"""slurm/train.sbatch: how often a job that is stopped before it saves queues again; with stand-ins for Slurm."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.distributed import ROOT, environment

COMMANDS = {
    "srun": """
if [ -n "$BEGUN" ]; then echo training >"$KINOFORM_STATUS_DIR/0-0"; echo "$BEGUN" >"$KINOFORM_STATUS_DIR/begun"; fi
trap 'exit 1' USR1
kill -USR1 $PPID
for i in {1..300}; do sleep 0.1; done
""",
    "squeue": "echo RUNNING",
    "scontrol": 'if [ "$1" = show ]; then echo node0; fi',
}


class Job:
    """A job of one node, which is warned as soon as it trains, and does not save."""

    def __init__(self, folder: Path, restarts: int) -> None:
        self.folder, self.starts = folder, 0
        for name in ("launch", "slurm"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "train_ae.py").touch()
        (folder / "bin").mkdir()
        for name, text in COMMANDS.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / "bin" / name).chmod(0o755)
        job = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node0"}
        self.variables = {**job, "PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHON": "python", "RESTARTS": str(restarts)}

    def start(self, begun: str) -> tuple[int, str]:
        """Exit status and output of the next start, which goes on from this checkpoint."""
        env = environment(**self.variables, BEGUN=begun, SLURM_RESTART_COUNT=str(self.starts))
        command = ["bash", "slurm/train.sbatch", "train_ae.py"]
        done = subprocess.run(command, cwd=self.folder, env=env, text=True, capture_output=True, timeout=60, check=False)
        self.starts += 1
        return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("restarts", "begun", "queued"),
    [
        (1, ["None", "None", "None"], [True, True, False]),
        (0, ["None", "a b/step_2", "a b/step_2"], [True, True, False]),
        (1, ["None", "None", "step_2", "step_2", "step_2"], [True, True, True, True, False]),
        (0, ["", "", ""], [True, True, True]),
        (0, ["None", "", "None"], [True, True, False]),
    ],
    ids=["never saves", "no restarts", "saves now and then", "does not say", "does not say once"],
)
def test_a_job_that_does_not_get_on_does_not_queue_again_without_end(
    restarts: int, begun: list[str], queued: list[bool], tmp_path: Path
) -> None:
    job = Job(tmp_path, restarts)
    ends = [job.start(checkpoint) for checkpoint in begun]
    assert [status for status, _ in ends] == [0 if again else 1 for again in queued], ends
    assert ["job 7 queues again" in output for _, output in ends] == queued
    given_up = f"giving up after {restarts} requeues without a new checkpoint"
    assert [output.count(given_up) for _, output in ends] == [0 if again else 1 for again in queued]
    left = [place.name for place in tmp_path.iterdir() if place.name.startswith(".kinoform")]
    assert left == ([".kinoform-7.requeues"] if queued[-1] and begun[-1] else [])


def test_what_an_older_job_of_the_same_number_left_does_not_count(tmp_path: Path) -> None:
    job = Job(tmp_path, 0)
    job.start("None")
    job.starts = 0
    assert [job.start(begun)[0] for begun in ("", "None", "None")] == [0, 0, 1]


def test_a_full_disk_does_not_keep_a_job_from_the_queue(tmp_path: Path) -> None:
    job = Job(tmp_path, 0)
    (tmp_path / ".kinoform-7.requeues").mkdir()
    job.starts = 1
    assert job.start("None")[0] == 0
