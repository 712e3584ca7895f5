"""On a real Slurm of two nodes: training that is killed, preempted and queued again; a chain of jobs; an array that makes shards."""

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import ROOT, command
from tests.preprocessing import run
from tests.slurm_cluster import Cluster, slurm_cluster, unavailable, until
from tests.videos import folder_digests, write_tree

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(unavailable()), reason=unavailable())]
WORKER = "tests/cluster_worker.py"
TRAIN = ("--max-steps", 30, "--results-dir")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def checkpoints(results: Path) -> list[str]:
    return sorted(place.name for place in results.glob("*/checkpoints/step_*"))


def trains(cluster: Cluster, job: int, results: Path) -> None:
    """Wait until a job has written a checkpoint that was not there."""
    before = checkpoints(results)
    until(lambda: set(checkpoints(results)) - set(before), 120, lambda: f"{cluster.about(job)}\n{cluster.log(job)}")


def statuses(job: int) -> list[Path]:
    """The folder in which the processes of a job leave their statuses, while it is there."""
    return list(ROOT.glob(f".kinoform-{job}.*"))


def test_killed_and_preempted_it_ends_with_the_weights_of_an_undisturbed_run(cluster: Cluster, tmp_path: Path) -> None:
    disturbed, whole = tmp_path / "disturbed", tmp_path / "whole"
    job = cluster.submit(WORKER, *TRAIN, disturbed, "--seconds", 0.4, NODES=2, NAME="disturbed", BACKOFF=1)
    trains(cluster, job, disturbed)
    victims = re.findall(r"rank 1 is process (\d+)", cluster.log(job))
    os.kill(int(victims[-1]), signal.SIGKILL)
    until(lambda: "starting again in 1 s (1 of 5" in cluster.log(job), 60, lambda: cluster.log(job))
    trains(cluster, job, disturbed)

    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent", "--wrap=true"]
    other = int(cluster.run(*urgent))
    cluster.wait(other, "COMPLETED")
    about = cluster.wait(job, "PENDING")
    saved = re.findall(r"saved at step (\d+)", cluster.log(job))
    assert about["Restarts"] == "1" and f"job {job} queues again" in cluster.log(job)
    assert len(saved) == 1 and checkpoints(disturbed)[-1] == f"step_{int(saved[0]):07d}" < "step_0000030"
    cluster.start(job)
    about = cluster.wait(job, "COMPLETED", "FAILED", timeout=120)
    assert about["JobState"] == "COMPLETED", cluster.log(job)
    assert f"from step {saved[0]} to 30, 2 process(es)" in cluster.log(job)

    done = command([WORKER, *TRAIN, whole], 2)
    assert done.returncode == 0, done.stdout
    for name in ("model.safetensors", "ema.safetensors"):
        assert (disturbed / "000-toy/export" / name).read_bytes() == (whole / "000-toy/export" / name).read_bytes()
    assert not statuses(job)


def test_a_cancelled_job_does_not_queue_again(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(WORKER, *TRAIN, tmp_path, "--seconds", 1, NODES=1, NAME="cancelled")
    trains(cluster, job, tmp_path)
    cluster.run("scancel", job)
    about = cluster.wait(job, "CANCELLED")
    until(lambda: not cluster.run("squeue", "--noheader", "--jobs", job).strip(), 30)
    assert about["Restarts"] == "0" and cluster.about(job)["JobState"] == "CANCELLED"


def test_a_warning_that_comes_while_processes_start_is_not_lost(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(WORKER, *TRAIN, tmp_path, "--seconds", 2, NODES=1, NAME="warned")
    until(lambda: statuses(job), 60, lambda: cluster.log(job))
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    about = cluster.wait(job, "PENDING")
    assert about["Restarts"] == "1" and f"job {job} queues again" in cluster.log(job)
    cluster.run("scancel", job)


def test_a_job_whose_processes_are_told_to_end_queues_again(cluster: Cluster, tmp_path: Path) -> None:
    """As in a preemption without preempt_send_user_signal. The controller does not answer the first question."""
    squeue, words = tmp_path / "bin/squeue", tmp_path / "words"
    squeue.parent.mkdir()
    squeue.write_text(f'#!/bin/bash\nif mkdir {tmp_path}/asked; then exit 1; fi\nexec {shutil.which("squeue")} "$@"\n')
    inside = tmp_path / "inside"
    inside.write_text(f'#!/bin/bash\necho "$@" >{words}\nexec "${{@:2}}"\n')
    for place in (squeue, inside):
        place.chmod(0o755)
    within = {"RUN_IN": f"{inside} image", "SRUN_ARGS": "--label --unbuffered", "PATH": f"{squeue.parent}:{cluster.variables['PATH']}"}
    job = cluster.submit(WORKER, *TRAIN, tmp_path / "runs", "--seconds", 1, NODES=1, NAME="ended", **within)
    trains(cluster, job, tmp_path / "runs")
    cluster.run("scancel", "--signal=TERM", job)
    about = cluster.wait(job, "PENDING")
    assert about["Restarts"] == "1" and f"job {job} queues again" in cluster.log(job)
    assert re.search("^0: .*saved at step", cluster.log(job), re.MULTILINE), "srun has its arguments"
    assert words.read_text().startswith(f"image {cluster.variables['PYTHON']} -m torch.distributed.run ")
    cluster.run("scancel", job)


def test_wrong_settings_end_a_job_at_once(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(WORKER, "--max-steps", 0, "--results-dir", tmp_path, NODES=2, NAME="wrong")
    assert cluster.wait(job, "FAILED")["ExitCode"] == "2:0"
    assert "error: --max-steps 0: must be positive" in cluster.log(job) and "giving up with status 2" in cluster.log(job)
    newest = cluster.submit(WORKER, *TRAIN, f"{tmp_path}/@toy", NODES=1, NAME="newest")
    assert cluster.wait(newest, "FAILED")["ExitCode"] == "2:0"
    assert f"error: {tmp_path}/@toy: there is no run of the name toy in {tmp_path}" in cluster.log(newest)


STAGES = """
stage first - {script} first
stage left first {script} left "$RUNS/@cmd-autoencoder"
NODES=2 stage right first {script} right
stage last left,right {script} last
"""
SCRIPT = """
import pathlib, sys
runs = pathlib.Path({runs!r})
with (runs / "order").open("a") as file:
    print(*sys.argv[1:], file=file)
sys.exit(sys.argv[1] == "right" and not (runs / "mended").exists())
"""
AGENT = """#!/bin/bash
while [ "$1" != -- ]; do shift; done
exec python3 "${@:2}"
"""


def test_a_chain_of_jobs_runs_in_order_and_goes_on_after_a_failure(cluster: Cluster, tmp_path: Path) -> None:
    script, agent, pipeline = tmp_path / "stage.py", tmp_path / "agent", tmp_path / "chain.sh"
    (tmp_path / "007-cmd-autoencoder").mkdir()
    (tmp_path / "010-cmd-autoencoder").mkdir()
    (tmp_path / "012-my-cmd-autoencoder").mkdir()
    script.write_text(SCRIPT.format(runs=str(tmp_path)))
    agent.write_text(AGENT)
    agent.chmod(0o755)
    pipeline.write_text(STAGES.format(script=script))

    def start(**variables: object) -> dict[str, int]:
        told = cluster.run("slurm/pipeline.sh", pipeline, RUNS=tmp_path, PYTHON=agent, RESTARTS=0, BACKOFF=0, **variables)
        return {name: int(number) for name, number in re.findall(r"(\w+): job (\d+)", told)}

    def order() -> list[str]:
        return (tmp_path / "order").read_text().splitlines()

    jobs = start()
    assert list(jobs) == ["first", "left", "right", "last"]
    busy = tmp_path / "bin/squeue"
    busy.parent.mkdir()
    busy.write_text(f'#!/bin/bash\nif mkdir {tmp_path}/asked 2>/dev/null; then exit 1; fi\nexec {shutil.which("squeue")} "$@"\n')
    busy.chmod(0o755)
    again = start(PATH=f"{busy.parent}:{cluster.variables['PATH']}")
    assert again["last"] == jobs["last"], "submitted once more while it waits"
    assert cluster.wait(jobs["left"], "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    cluster.wait(jobs["right"], "FAILED")
    cluster.wait(jobs["last"], "CANCELLED")
    assert order()[0] == "first"
    assert sorted(set(order()[1:])) == [f"left {tmp_path}/010-cmd-autoencoder", "right"]

    (tmp_path / "mended").touch()
    (tmp_path / "order").unlink()
    again = start()
    assert again.keys() == jobs.keys() and set(again.values()).isdisjoint(jobs.values())
    assert cluster.wait(again["last"], "COMPLETED", "CANCELLED")["JobState"] == "COMPLETED"
    assert order()[0] == "first" and order()[-1] == "last" and order().count("right") == 2, "one on each of two nodes"


def test_an_array_makes_the_shards_of_one_process_and_goes_on_after_its_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/bash\n[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || exec sleep 100\n')
    slow.chmod(0o755)
    limited = cluster.submit("shards", tmp_path, "--out", tmp_path, ARRAY="0-0", PYTHON=slow, TIME="1:00", WARNING=50)
    videos = write_tree(tmp_path / "videos", [f"{label}/{i}.mp4" for label in "ab" for i in range(4)], 12)
    flags = ("--clip-length", 4, "--shard-size", 3, "--image-size", 16, 16, "--decoder", "pyav", "--name", "toy", "--parts", 3)
    job = cluster.submit("shards", videos, "--out", tmp_path / "array", *flags, ARRAY="0-2", CPUS=1)
    until(lambda: not cluster.run("squeue", "--noheader", "--jobs", job).strip(), 120)
    logs = "".join(place.read_text() for place in (cluster.folder / "logs").glob("kinoform-shards-*"))
    run(videos, "--out", tmp_path / "one", *flags)
    assert (tmp_path / "array/index.json").is_file(), logs
    assert folder_digests(tmp_path / "array") == folder_digests(tmp_path / "one")

    until(lambda: cluster.about(limited).get("Restarts") == "1", 90, lambda: f"{cluster.about(limited)}")
    cluster.start(limited)
    assert cluster.wait(limited, "COMPLETED", "FAILED", "TIMEOUT")["JobState"] == "COMPLETED"
