"""From command line to exit status: processes, errors in one line, signals; with plain python, torchrun, and two agents."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.agent import leave_start, leave_status
from launch.env import StopFlag, check_packages, distributed
from launch.run import parse_launch
from tests.distributed import Done, command, environment
from utils.errors import UserError

WORKER = str(Path(__file__).with_name("launch_worker.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--max-restarts=0"]
PAIR = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, *arguments], env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: "subprocess.Popen[str]", timeout: float = 60) -> tuple[int, str, list[str], str]:
    """Exit status, stdout, our own lines of stderr, all of stderr."""
    with process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("error:")], err


def alone(*arguments: str) -> Done:
    """One process that no launcher has started."""
    return command([WORKER, *arguments], timeout=60)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_one_process_without_a_launcher() -> None:
    status, out, errors, _ = finish(start(WORKER, "fine"))
    assert (status, errors) == (0, [])
    assert "rank 0 of 1 local 0" in out


@pytest.mark.parametrize(
    ("case", "expected", "line"),
    [
        ("settings", 2, "error: --lr fast: not a number"),
        ("mistake", 1, "error: the file of rank 0 is missing"),
        ("signalled", 75, None),
        ("alone", 75, None),
        ("interrupted", 130, None),
        (
            "full",
            1,
            "error: [Errno 28] No space left on device: 'some/file': make room, or write elsewhere, and start the same command "
            "again to go on from the last checkpoint",
        ),
    ],
)
def test_exit_status_and_line_of_one_process(case: str, expected: int, line: str | None) -> None:
    done = alone(case)
    assert done.returncode == expected
    assert done.stderr.splitlines() == ([line] if line else [])


def test_each_process_leaves_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's own is 1 whatever its workers end with."""
    monkeypatch.setenv("KINOFORM_STATUS_DIR", str(tmp_path))
    for case, status in (("interrupted", "130"), ("settings", "2"), ("fine", "0"), ("signalled", "75")):
        alone(case)
        assert (tmp_path / "0-0").read_text() == f"{status}\n"
    assert finish(start(*PAIR, WORKER, "killed", "1"))[0] == 1
    assert {place.name: place.read_text() for place in tmp_path.iterdir()} == {"0-0": "1\n"}


def test_a_status_is_not_named_by_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After another machine has joined, the same process of a machine has another one, and its old status must not stay."""
    for name, value in {"KINOFORM_STATUS_DIR": str(tmp_path), "RANK": "0", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    leave_start("step_2")
    leave_status(75)
    monkeypatch.setenv("RANK", "3")
    leave_status(None)
    assert [place.name for place in tmp_path.iterdir()] == ["begun"]
    leave_start("step_4")
    assert {place.name: place.read_text() for place in tmp_path.iterdir()} == {"begun": "step_4\n", "0-1": "training\n"}


def test_the_end_does_not_wait_for_threads() -> None:
    """Python's teardown would; it is also where torch 2.15 aborts now and then."""
    status, out, _, err = finish(start(WORKER, "threaded"))
    assert status == 0 and "rank 0 of 1" in out, err


def test_a_rank_may_leave_without_the_others() -> None:
    began = time.monotonic()
    status, _, _, err = finish(start(*PAIR, WORKER, "alone", "1"))
    assert status == 1 and re.search(r"exitcode\s*: 75", err) and 'launch_worker.py", line' not in err, err
    assert time.monotonic() - began < 40


def test_a_bug_keeps_its_traceback() -> None:
    done = alone("bug")
    assert done.returncode == 1 and "error:" not in done.stderr
    assert "ZeroDivisionError: ours" in done.stderr and "in misbehave" in done.stderr


@pytest.mark.parametrize(
    ("case", "who", "pattern"),
    [
        ("settings", "", r"error: (\[rank 1\] )?--lr fast: not a number"),
        ("mistake", "", r"error: (\[rank 1\] )?the file of rank [01] is missing"),
        ("mistake", "1", r"error: \[rank 1\] the file of rank 1 is missing"),
        ("killed", "1", r"error: the (run lost a rank|ranks lost each other): rank 1 on .* is gone: killed, or crashed"),
    ],
)
def test_one_line_for_two_ranks_within_seconds(case: str, who: str, pattern: str) -> None:
    """Whichever rank fails, and when both fail the same way, one line comes out, and both ranks are gone soon."""
    process = start(*PAIR, WORKER, case, *filter(None, [who]))
    status, _, errors, err = finish(process)
    assert status == 1
    assert len(errors) == 1 and re.fullmatch(pattern, errors[0]), err
    assert 'launch_worker.py", line' not in err, err


def test_a_bug_of_one_rank_ends_the_other() -> None:
    began = time.monotonic()
    status, _, _, err = finish(start(*PAIR, WORKER, "bug", "1"))
    assert status == 1 and "ZeroDivisionError: ours" in err
    assert time.monotonic() - began < 40


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
def test_workers_end_with_their_agent() -> None:
    """Else the workers of a killed command would write to the run folder beside those of the next one."""
    with start(*PAIR, WORKER, "patient") as agent:
        assert agent.stdout is not None
        workers = [int(agent.stdout.readline()) for _ in range(2)]
        agent.kill()
    assert ends_within(10, workers)


def ends_within(seconds: float, processes: list[int]) -> bool:
    """Whether the processes are gone, or dead and not yet collected, in time."""
    limit = time.monotonic() + seconds
    while alive := [process for process in processes if _state(process) not in ("", "Z")]:
        if time.monotonic() > limit:
            for process in alive:
                os.kill(process, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
def test_a_worker_whose_agent_is_gone_already_does_not_start(tmp_path: Path) -> None:
    """Killed while the workers were still importing: they are children of process 1 by the time they look."""
    shell = f"{sys.executable} {WORKER} fine > {tmp_path}/out 2> {tmp_path}/err & echo $! > {tmp_path}/pid"
    variables = {"TORCHELASTIC_RUN_ID": "gone", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    subprocess.run(["sh", "-c", shell], env=environment() | variables, check=True, timeout=30)
    assert ends_within(60, [int((tmp_path / "pid").read_text())])
    assert (tmp_path / "err").read_text() == "error: the torchrun agent that started this process is gone\n"


def test_a_signal_to_one_rank_stops_both_at_the_same_step() -> None:
    _, out, errors, err = finish(start(*PAIR, WORKER, "signalled", "1"))
    assert errors == [], err
    assert sorted(out.splitlines()) == ["rank 0 stopped at step 3", "rank 1 stopped at step 3"]
    assert re.findall(r"exitcode\s*: (\d+)", err) == ["75", "75"] or "exitcode: 75" in err, err


def test_two_agents() -> None:
    port = free_port()
    flags = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test"]
    done = [finish(agent) for agent in [start(*flags, WORKER, "fine") for _ in range(2)]]
    assert [status for status, *_ in done] == [0, 0], done
    lines = sorted(line for _, out, *_ in done for line in out.splitlines())
    assert lines == [f"rank {rank} of 2 local 0 argv ['fine']" for rank in (0, 1)]


def test_the_script_starts_torchrun_itself() -> None:
    status, out, _, err = finish(start(WORKER, "--nproc-per-node=2", "fine", "--nnodes", "1", "-1"))
    assert status == 0, err
    assert sorted(out.splitlines()) == [f"rank {rank} of 2 local {rank} argv ['fine', '-1']" for rank in (0, 1)]


@pytest.mark.slow
def test_the_script_starts_two_nodes_itself() -> None:
    flags = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "localhost", "--master_port", str(free_port())]
    done = [finish(node) for node in [start(WORKER, *flags, "--node_rank", str(rank), "fine") for rank in range(2)]]
    assert [status for status, *_ in done] == [0, 0], done
    assert sorted(out.strip() for _, out, *_ in done) == [f"rank {rank} of 2 local 0 argv ['fine']" for rank in (0, 1)]


def test_launcher_flags_are_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    launch = parse_launch("d", ["--lr", "1", "--nnodes=2", "--nproc-per-node", "4", "--dry-run", "--local-rank=0", "--model.depth=2"])
    assert launch.argv == ["--lr", "1", "--model.depth=2"]
    assert (launch.world_size, launch.local_world_size, launch.dry_run, launch.print_config) == (8, 4, True, False)
    assert launch.env().world_size == 8
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    launch = parse_launch("d", ["--nnodes", "7", "--master_addr", "nowhere.invalid", "x"])
    assert (launch.argv, launch.world_size) == (["x"], 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nnodes", "two"], "--nnodes two"),
        (["--nproc_per_node", "0"], "--nproc_per_node 0"),
        (["--nnodes"], "--nnodes needs a value"),
        (["--nnodes", "2"], "--master_addr"),
        (["--nnodes", "2", "--node_rank", "2", "--master_addr", "localhost"], "--node_rank 2"),
        (["--nnodes", "2", "--node_rank", "1", "--master_addr", "nowhere.invalid"], "cannot resolve the master address 'nowhere.invalid'"),
    ],
)
def test_launcher_flags_that_cannot_be(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=re.escape(message)):
        parse_launch("d", arguments)


def test_master_that_cannot_be_resolved_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**variables, "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "29511"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"nowhere\.invalid"), distributed(5.0):
        pass
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="torchrun"), distributed(5.0):
        pass


def test_processes_that_do_not_come_are_one_error() -> None:
    code = "from launch.env import distributed\nfrom launch.run import run_main\n"
    code += "def main():\n    with distributed(2.0): pass\nrun_main(main)"
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    command = [sys.executable, "-c", code]
    env = environment(**variables, MASTER_PORT=str(free_port()))
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if not line.startswith("[")][-1].startswith("error: rank 0 on "), done.stderr


def test_handlers_set_the_flag_and_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with distributed(10.0) as env:
        assert not env.stop
        os.kill(os.getpid(), signal.SIGUSR1)
        limit = time.monotonic() + 20
        while not env.stop and time.monotonic() < limit:
            time.sleep(0.01)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert env.stop and env.stop.received == signal.SIGUSR1
        struck = subprocess.run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"], check=False, timeout=20)
        assert struck.returncode == 0, "Slurm sends it to every process of a step, also to programs that a rank has started"
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert before == {number: signal.getsignal(number) for number in before}
    with pytest.raises(KeyboardInterrupt), distributed(10.0) as env:
        os.kill(os.getpid(), signal.SIGINT)
        assert env.stop
        os.kill(os.getpid(), signal.SIGINT)


def test_stop_flag_keeps_the_first_signal() -> None:
    flag = StopFlag()
    flag.set(signal.SIGINT)
    flag.set()
    assert flag.is_set() and flag.received == signal.SIGINT


def test_another_package_of_our_name_is_named(tmp_path: Path) -> None:
    check_packages()
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/__init__.py").write_text("")
    root = str(Path(WORKER).parent.parent)
    paths = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {root!r}]\n"
    code = f"{paths}import datasets\nfrom launch.env import check_packages\ncheck_packages()"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert f"`datasets` is not Kinoform's ({tmp_path}/datasets was found first)" in done.stderr
