"""launch/multi_node.sh: how machines find HOST, which may not be known yet, and what is refused; with stand-ins for torchrun and DNS."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.distributed import ROOT, environment
from tests.test_launch_scripts import Play, dry_run

GETENT = """#!/bin/bash
# The n-th question for the name gets the n-th line of $PLAY/addresses; the last line holds from then on. - is no answer.
if [ "$2" != pod-0.pods ]; then exec {getent} "$@"; fi
echo >>"$PLAY/asked"
address=$(sed -n "$(wc -l <"$PLAY/asked")p" "$PLAY/addresses")
address=${{address:-$(tail -n 1 "$PLAY/addresses")}}
[ "$address" != - ] && echo "$address STREAM pod-0.pods"
"""


def stand_in(folder: Path, name: str, text: str) -> str:
    """PATH with a program of this text and name."""
    place = folder / "bin" / name
    place.parent.mkdir(exist_ok=True)
    place.write_text(text)
    place.chmod(0o755)
    return f"{place.parent}:{os.environ['PATH']}"


def meet(folder: Path, addresses: list[str], lines: list[str], **variables: str) -> tuple[int, int, str]:
    """Exit status, number of torchrun's starts and output of a launch whose HOST has these addresses, one question after the other."""
    play = Play(folder, lines)
    (folder / "starts").touch()
    (folder / "addresses").write_text("\n".join(addresses) + "\n")
    path = stand_in(folder, "getent", GETENT.format(getent=shutil.which("getent")))
    return play.end(play.start(script="multi_node", HOST="pod-0.pods", NODES="2", PATH=path, **variables))


def test_what_would_be_run() -> None:
    told = dry_run("launch/multi_node.sh", "train_ae.py", HOST="127.0.0.1", NODES="1:4", PORT="1234", PROCESSES="2", RUN_ID="one")
    assert " --nnodes=1:4 --nproc-per-node=2 " in told and " --rdzv-endpoint=127.0.0.1:1234 --rdzv-id=one " in told
    assert "is_host" not in told
    assert " '--rdzv-endpoint=[::1]:29400' " in dry_run("launch/multi_node.sh", "train_ae.py", HOST="::1", NODES="2")
    assert "error: usage: " in dry_run("launch/multi_node.sh", "train_ae.py", code=2, NODES="2")
    told = dry_run("launch/multi_node.sh", "train_ae.py", NODES="2", HOST="nowhere.invalid")
    assert " --rdzv-endpoint=nowhere.invalid:29400 " in told and "error" not in told, "it may be known later"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"HOST": "http://node0"}, "HOST=http://node0 is neither a name nor an IP address"),
        ({"HOST": "node0:29400"}, "HOST=node0:29400 is neither a name nor an IP address"),
        ({"PORT": "65536"}, "PORT=65536 is no port: "),
        ({"NODES": "1-4"}, "NODES=1-4: give how many machines"),
    ],
)
def test_what_cannot_be_right_is_refused_at_once(variables: dict[str, str], words: str) -> None:
    told = dry_run("launch/multi_node.sh", "train_ae.py", code=2, **{"HOST": "node0", "NODES": "2", **variables})
    assert told.startswith(f"error: {words}") and told.count("\n") == 1


def test_a_host_that_is_not_known_yet_is_waited_for(tmp_path: Path) -> None:
    """A pod's name has no address before the pod runs."""
    ended = meet(tmp_path, ["-", "-", "-", "127.0.0.1"], ["exit 0"])
    assert ended[:2] == (0, 1), ended[2]


def test_a_host_that_comes_back_with_another_address_is_found(tmp_path: Path) -> None:
    """192.0.2.0/24 is nobody's."""
    ended = meet(tmp_path, ["127.0.0.1", "192.0.2.1", "192.0.2.1", "127.0.0.2"], ["exit 1", "exit 0"], JOIN_TIMEOUT="30")
    assert ended[:2] == (0, 2), ended[2]


def test_a_host_that_stays_unknown_is_named(tmp_path: Path) -> None:
    status, starts, output = meet(tmp_path, ["-"], ["exit 0"], JOIN_TIMEOUT="1", RESTARTS="0")
    assert (status, starts) == (1, 0)
    assert re.search(r"kinoform: \S+ knows no address of HOST=pod-0.pods: give a name or an IP address that every machine knows\n", output)


def test_a_host_that_does_not_listen_is_named(tmp_path: Path) -> None:
    status, starts, output = meet(tmp_path, ["192.0.2.1"], ["exit 0"], JOIN_TIMEOUT="1", RESTARTS="0")
    assert (status, starts) == (1, 0)
    assert "nobody listens at pod-0.pods:29400: start the same line on pod-0.pods" in output


@pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip (Debian: iproute2)")
def test_the_interface_decides_the_address() -> None:
    told = dry_run("launch/multi_node.sh", "train_ae.py", HOST="192.0.2.1", NODES="2", INTERFACE="lo")
    assert " --local-addr=127.0.0.1 " in told and ",is_host=0 " in told
    told = dry_run("launch/multi_node.sh", "train_ae.py", code=2, HOST="127.0.0.1", NODES="2", INTERFACE="none0")
    assert "has no INTERFACE=none0 with an address" in told


@pytest.mark.parametrize(("visible", "processes"), [("", 1), ("0", 1), ("2,3", 2), (None, 3)])
def test_one_process_for_each_gpu_that_may_be_seen(visible: str | None, processes: int, tmp_path: Path) -> None:
    """None: the variable is not set, and nvidia-smi is asked. Where it is set and empty there is no GPU."""
    path = stand_in(tmp_path, "nvidia-smi", '#!/bin/bash\nfor i in 0 1 2; do echo "GPU $i: (UUID: $i)"; done\n')
    variables = environment(PATH=path)
    del variables["CUDA_VISIBLE_DEVICES"]
    if visible is not None:
        variables["CUDA_VISIBLE_DEVICES"] = visible
    command = ["launch/single_node.sh", "--dry-run", "train_ae.py"]
    told = subprocess.run(command, cwd=ROOT, env=variables, text=True, capture_output=True, timeout=30, check=True).stdout
    assert f" --nproc-per-node={processes} " in told


def test_the_job_of_the_docs_is_one_that_kubernetes_takes() -> None:
    """It refuses a podFailurePolicy with any other restartPolicy, and one without a limit of new pods would be cut off after six."""
    text = (ROOT / "docs/clusters.md").read_text()
    lines = re.findall(r"^    (.*)$", text[text.index("    apiVersion: batch/v1") : text.index("These lines follow")], re.MULTILINE)
    job = yaml.safe_load("\n".join(lines))["spec"]
    assert job["podFailurePolicy"]["rules"][0] == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] > 6
