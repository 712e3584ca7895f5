"""What a run says of itself while it goes on: its slowest rank, its heartbeat, lines in silence, traces, memory that ran out."""

import errno
import gzip
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from distributed import run
from toy_task import ToySource, ToyTask, toy_config

from engine import manifest
from engine.config import LogConfig
from engine.heartbeat import read
from engine.loop import fit
from engine.profile import Profiler
from engine.ranks import Ranks, busy
from engine.recorder import Recorder, format_line
from engine.task import Batch, LossOutput
from launch.env import Env, distributed
from utils.errors import ConfigError
from utils.rng import SampleRng

DELAY = 0.4


def work(seconds: float) -> None:
    """Keep the processor busy for so many seconds of its time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class Laborious(ToyTask):
    """Its loss takes more work on one rank."""

    def __init__(self, config: Any, env: Env, rank: int) -> None:
        super().__init__(config)
        self.slow = env.rank == rank

    def loss(self, phase: str, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> LossOutput:
        if self.slow and networks["net"].training and batch["x"].device.type == "cpu":
            work(DELAY)
        return super().loss(phase, networks, batch, rng)


class Late(ToySource):
    """Samples that one rank waits for."""

    late = False

    def batches(self, first_step: int) -> Iterator[Batch]:
        for batch in super().batches(first_step):
            if self.late:
                time.sleep(DELAY)
            yield batch


def slowed(env: Env, folder: str, rank: int, how: str, mode: str) -> list[dict[str, Any]]:
    config = toy_config(folder, max_steps=6, mode=mode, **{"log.every": 3})
    task = Laborious(config, env, rank if how == "work" else -1)
    source = Late(config, env.rank, env.world_size)
    source.late = how == "data" and env.rank == rank
    place = fit(task, source, config, env)
    return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def profiled(env: Env, folder: str, ranks: str, steps: str) -> str:
    config = toy_config(folder, profile_steps=steps, profile_ranks=ranks, max_steps=4)
    return str(fit(ToyTask(config), ToySource(config, env.rank, env.world_size), config, env))


SLOWED = {"work": ("fsdp", 1), "data": ("ddp", 0)}


def observed(env: Env, folder: str) -> dict[str, Any]:
    """The lines of runs with a slow rank, and the folder of one with traces."""
    found: dict[str, Any] = {how: slowed(env, f"{folder}/{how}", rank, how, mode) for how, (mode, rank) in SLOWED.items()}
    return found | {"traces": profiled(env, f"{folder}/traces", ranks="all", steps="2:3")}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 of two found."""
    found: dict[str, Any] = run(observed, folder=str(tmp_path_factory.mktemp("pair")))[0]
    return found


@pytest.mark.parametrize("how", SLOWED)
def test_the_slowest_rank_is_known(pair: dict[str, Any], how: str) -> None:
    line, rank = pair[how][-1], SLOWED[how][1]
    assert line["time/slowest_rank"] == rank
    assert line["time/slowest_own"] == pytest.approx(line["time/ranks"][rank], abs=1e-4) and line["time/slowest_own"] > 0.9 * DELAY
    assert line["time/ranks"][1 - rank] < line["time/ranks"][rank] - DELAY / 4
    assert line["time/spread"] > 0.05


def test_a_thread_that_waits_is_not_busy() -> None:
    before = busy()
    time.sleep(0.2)
    waited = busy() - before
    work(0.1)
    assert waited < 0.1 <= busy() - before - waited + 1e-3


class Exchanged(Ranks):
    """Of three ranks, without processes."""

    def __init__(self) -> None:
        self._env = Env(0, 3, 0, 3, torch.device("cpu"), "gloo")
        self._probe = None
        self.hosts, self.own = ["a", "b", "c"], []


def test_the_slowest_is_held_against_the_middle_and_named_once_it_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = Exchanged()
    uneven = ranks.compare(1.0, [0.0, 0.0, 0.5], [0.1, 0.5, 0.02])
    assert uneven == {"time/slowest_rank": 2.0, "time/slowest_own": 0.52, "time/spread": pytest.approx(0.02)}, "not 42 % behind rank 0"
    behind, other = uneven | {"time/spread": 0.5}, {"time/slowest_rank": 0.0, "time/slowest_own": 0.5, "time/spread": 0.3}
    with Recorder(tmp_path, LogConfig(tensorboard=False), is_main=True, step=0, total=9, ranks=ranks) as recorder:
        for step, values in enumerate([behind, other, behind, uneven, behind, behind], start=1):
            recorder.values(step, 8 * step, values)
    lines = capsys.readouterr().out.splitlines()
    assert ["slowest" in line for line in lines] == [False] * 5 + [True], "what differs from line to line is noise"
    assert lines[-1].endswith("slowest rank 2 (c) +50%")


def test_one_rank_is_compared_with_nobody() -> None:
    with distributed(60) as env:
        assert Ranks(env).compare(1.0, [0.1], [0.5]) == {}
    line = {"time/slowest_rank": 3.0, "time/slowest_own": 0.5, "time/spread": 0.125}
    assert format_line(1, 2, line, "node-b") == "step 1/2 | slowest rank 3 (node-b) +12%"
    assert format_line(1, 2, line) == "step 1/2"


class Slow(ToyTask):
    """One of its steps takes a while."""

    def loss(self, phase: str, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> LossOutput:
        if int(rng.index[0]) == 3 * self.config.train.global_batch_size:
            time.sleep(2.0)
        return super().loss(phase, networks, batch, rng)


def test_a_slow_step_is_spoken_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path, **{"log.every": 100, "log.status_every": 0.3})
    with distributed(60) as env:
        folder = fit(Slow(config), ToySource(config, 0, 1), config, env)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "step 3/5 | " in line and line.endswith(" s ago")]
    assert len(lines) >= 2, out
    assert any("s/step, the last ended" in line for line in lines)
    assert "the last step ended" in lines[-1]
    assert lines[0] in (folder / "log.txt").read_text()
    beat = read(folder)
    assert (beat.step, beat.state) == (5, "done")


def test_a_fast_run_has_no_such_line_and_zero_turns_it_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for every in (60.0, 0.0):
        config = toy_config(tmp_path / str(every), **{"log.every": 100, "log.status_every": every, "max_steps": 4})
        with distributed(60) as env:
            fit(Slow(config), ToySource(config, 0, 1), config, env)
        assert "s ago" not in capsys.readouterr().out


class Full:
    """A file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None: ...

    def close(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_records_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Recorder(tmp_path, LogConfig(tensorboard=False), is_main=True, step=0, total=5) as recorder:
        full: TextIO = Full()  # type: ignore[assignment]
        recorder._metrics, recorder._text, recorder._handler._file = full, full, full
        (tmp_path / "samples").write_text("no folder")
        for step in (1, 2):
            recorder.values(step, 8, {"loss": 0.5})
            recorder.preview(step, {"frame": torch.rand(2, 3, 8, 8)})
    out = capsys.readouterr().out
    assert out.count("metrics.jsonl in ") == 1 and out.count("samples/ in ") == 1 and "No space left on device" in out
    assert "step 2/5 | loss 0.5" in out


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE])
def test_output_that_nobody_takes_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stdout", Broken())
    with Recorder(tmp_path, LogConfig(tensorboard=False), is_main=True, step=0, total=5) as recorder:
        recorder.values(1, 8, {"loss": 0.5})
        logging.getLogger("engine.checkpoint").warning("a warning of another thread")
    text = (tmp_path / "log.txt").read_text()
    assert "step 1/5 | loss 0.5" in text and "warning: a warning of another thread" in text
    assert read(tmp_path).state == "done"


def events(path: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_traces_of_the_asked_steps(pair: dict[str, Any]) -> None:
    folder = Path(pair["traces"])
    names = sorted(place.name for place in (folder / "profile").iterdir())
    assert names == [f"steps_0000002-0000003_rank_{rank}.{kind}" for rank in (0, 1) for kind in ("json.gz", "txt")]
    found = events(folder / "profile" / names[0])
    optimizer = [event for event in found if event.get("name", "").startswith("Optimizer.step#AdamW.step")]
    assert len(optimizer) == 2, "two steps, one network"
    assert "aten::" in (folder / "profile" / names[1]).read_text()
    assert "trace of steps 2 to 3" in (folder / "log.txt").read_text()


def test_a_trace_of_the_last_step_and_of_steps_that_are_over(tmp_path: Path) -> None:
    with distributed(60) as env:
        folder = Path(profiled(env, str(tmp_path / "last"), "first", "4:9"))
        assert [place.name for place in (folder / "profile").iterdir() if place.suffix == ".gz"] == ["steps_0000004-0000009_rank_0.json.gz"]
        profiler = Profiler(tmp_path, LogConfig(profile_steps="2:3"), env, first=2)
        with profiler:
            assert list(profiler.steps(range(2, 5))) == [2, 3, 4]
    assert not (tmp_path / "profile").exists()


def test_an_error_while_steps_are_recorded_drops_the_trace(tmp_path: Path) -> None:
    log = LogConfig(profile_steps="1:3")
    with pytest.raises(RuntimeError, match="the first"), Profiler(tmp_path, log, Env.single(), first=0) as profiler:
        for number in profiler.steps(range(3)):
            if number == 1:
                raise RuntimeError("the first")
    assert not (tmp_path / "profile").exists()


def test_what_a_kill_leaves_of_a_trace_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(active: object, place: str) -> None:
        Path(place).write_text("half a trace")
        os.link(place, kept / Path(place).name)
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", kill)
    with Profiler(tmp_path, LogConfig(profile_steps="1"), Env.single(), first=0) as profiler:
        list(profiler.steps(range(2)))
    assert not list((tmp_path / "profile").iterdir())
    (left,) = kept.iterdir()
    left.rename(tmp_path / "profile" / left.name)
    manifest.remove_leftovers(tmp_path)
    assert not list((tmp_path / "profile").iterdir())


@pytest.mark.parametrize("text", ["0:3", "5:4", "a", "3:", "1:2:3", "-1"])
def test_steps_that_cannot_be_profiled(text: str) -> None:
    with pytest.raises(ConfigError, match="--profile-steps"):
        toy_config("unused", profile_steps=text).validate()
    assert toy_config("unused", profile_steps="7").log.profiled == (7, 7)


def test_memory_that_runs_out_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda place: Path(place).write_bytes(b"snapshot"))
    gpu = Env(3, 4, 3, 4, torch.device("cuda", 3), "cpu:gloo,cuda:nccl")
    monkeypatch.delenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", raising=False)
    with pytest.raises(torch.OutOfMemoryError), Profiler(tmp_path, LogConfig(), gpu, 0):
        assert os.environ.pop("TORCH_NCCL_DEBUG_INFO_TEMP_FILE") == str(tmp_path / "faults" / "nccl_rank_")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    assert (tmp_path / "profile/out_of_memory_rank_3.pickle").read_bytes() == b"snapshot"
    assert "out_of_memory_rank_3.pickle" in caplog.text and "--memory-history" in caplog.text

    def fail(place: str) -> None:
        raise RuntimeError("no snapshot")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fail)
    with pytest.raises(torch.OutOfMemoryError), Profiler(tmp_path, LogConfig(), gpu, 0):
        raise torch.OutOfMemoryError("CUDA out of memory")
    os.environ.pop("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", None)
