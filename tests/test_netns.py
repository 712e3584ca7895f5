"""Two network namespaces as two hosts: launch/multi_node.sh trains over them, the link is cut in mid-step, and comes back."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import ROOT, environment
from tests.processes import saved, until

WORKER = str(Path(__file__).with_name("chaos_worker.py"))
HOSTS = ("kinoform-a", "kinoform-b")
STEPS, STEP_TIMEOUT = 100, 10
ENDED_WITHIN = 60
"""Seconds from the cut: a step's time, the questions, and the grace of a hung agent, on a busy machine."""


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True, timeout=20)


class Net:
    """Namespaces <host>, each with its own hosts file, joined by a pair of virtual interfaces.

    As Debian does it, a host's own name is an address of its loopback: the launch script has to find the interface by itself.
    """

    def __init__(self) -> None:
        suffix = os.getpid() % 100000
        self.spaces = [f"{host}-{suffix}" for host in HOSTS]
        self.links = [f"kf{end}{suffix}" for end in "ab"]
        subnet = f"10.{77 + suffix % 100}.{suffix % 250}"
        self.addresses = [f"{subnet}.1", f"{subnet}.2"]
        self.processes: list[subprocess.Popen[str]] = []

    def make(self) -> None:
        for space, host, address, other in zip(self.spaces, HOSTS, reversed(self.addresses), reversed(HOSTS), strict=True):
            ip("netns", "add", space)
            folder = Path("/etc/netns") / space
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host}\n{address} {other}\n")
        ip("link", "add", self.links[0], "netns", self.spaces[0], "type", "veth", "peer", "name", self.links[1], "netns", self.spaces[1])
        for space, link, address in zip(self.spaces, self.links, self.addresses, strict=True):
            ip("-n", space, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", link, "up")

    def remove(self) -> None:
        for process in self.processes:
            process.kill()
        for space in self.spaces:
            inside = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, timeout=20, check=False).stdout.split()
            for number in inside:
                subprocess.run(["kill", "-9", number], check=False, capture_output=True, timeout=20)
            ip("netns", "del", space, check=False)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)

    def link(self, state: str) -> None:
        ip("-n", self.spaces[0], "link", "set", self.links[0], state)

    def start(self, node: int, results: Path, log: Path, *options: str) -> "subprocess.Popen[str]":
        """The launch script on a host, under the host's own name, with one rank."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {HOSTS[node]}; exec "$@"', "sh"]
        command = [str(ROOT / "launch/multi_node.sh"), WORKER, str(results), *options]
        variables = {"HOST": self.addresses[0], "NODES": "2", "PROCESSES": "1", "JOIN_TIMEOUT": "120", "BACKOFF": "1"}
        variables = environment(**variables, RESULTS=str(results), PYTHON=sys.executable)
        with log.open("w") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.spaces[node], *named, *command],
                cwd=ROOT,
                env=variables,
                text=True,
                stdout=output,
                stderr=output,
            )
        self.processes.append(process)
        return process


@pytest.fixture
def net() -> Iterator[Net]:
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare"))):
        pytest.skip("network namespaces need root and the commands ip (iproute2) and unshare (util-linux)")
    made = Net()
    probe = subprocess.run(["ip", "netns", "add", f"{made.spaces[0]}-probe"], capture_output=True, text=True, timeout=20, check=False)
    if probe.returncode:
        pytest.skip(f"network namespaces cannot be made here: {probe.stderr.strip()}")
    ip("netns", "del", f"{made.spaces[0]}-probe")
    try:
        made.make()
        yield made
    finally:
        made.remove()


@pytest.mark.slow
def test_a_cut_link_ends_both_sides_and_they_go_on_once_it_is_back(net: Net, tmp_path: Path) -> None:
    results, pace = tmp_path / "results", tmp_path / "pace"
    logs = [tmp_path / f"{host}.txt" for host in HOSTS]
    options = ["--steps", str(STEPS), "--pace", str(pace), "--step-timeout", str(STEP_TIMEOUT), "--timeout", "60"]
    pace.write_text("0.2")
    nodes = [net.start(node, results, log, *options) for node, log in enumerate(logs)]
    assert until(lambda: saved(results) >= 4, 90), [log.read_text() for log in logs]

    net.link("down")  # for less than a step may take
    time.sleep(1.5)
    net.link("up")
    reached = saved(results)
    assert until(lambda: saved(results) >= reached + 4, 30), [log.read_text() for log in logs]

    net.link("down")
    cut = time.monotonic()
    assert until(lambda: all("starting again" in log.read_text() for log in logs), ENDED_WITHIN), [log.read_text() for log in logs]
    print(f"both sides ended {time.monotonic() - cut:.1f} s after the cut")
    for log, peer in zip(logs, reversed(HOSTS), strict=True):
        line = next(line for line in log.read_text().splitlines() if line.startswith("error: "))
        assert re.search(rf"step \d+ did not end within {STEP_TIMEOUT} s: rank \d on {peer} \(process \d+\) is out of reach", line), line
    reached = saved(results)
    assert reached < STEPS

    pace.unlink()
    net.link("up")
    assert until(lambda: all(node.poll() is not None for node in nodes), 180), [log.read_text() for log in logs]
    assert [node.returncode for node in nodes] == [0, 0], [log.read_text() for log in logs]
    assert f"from step {reached} to {STEPS}" in logs[0].read_text() + logs[1].read_text()
    assert saved(results) == STEPS
    assert len(list(results.iterdir())) == 1, "the same run went on"
