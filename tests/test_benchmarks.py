"""Each benchmark runs at a tiny size, prints its ratios and does the work it claims to time. Nothing is timed here."""

import argparse
import json
import re
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import (
    checkpoint,
    evaluation,
    formats,
    hvdm_step,
    latte_step,
    long_video,
    plain_tokens,
    preprocess,
    products,
    pvdm_step,
    stream,
    task_step,
    train_step,
    vidm_frame,
    vidm_step,
    watching,
    wavelet,
)
from datasets.prepare.clips import ClipRules
from engine.checkpoint import latest
from engine.config import EmaConfig, OptimConfig, ParallelConfig
from engine.manifest import find_damage
from launch.env import Env, distributed
from models.transformers.dit import DiTBlock
from models.unets.vidm_motion import MotionUNet

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def env() -> Iterator[Env]:
    with distributed(60) as env:
        yield env


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a benchmark's `main` with arguments; returns what it printed."""

    def run(main: Callable[[], None], *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        main()
        return capsys.readouterr().out

    return run


def ratios(text: str) -> list[float]:
    found = [float(number) for number in re.findall(r"ratio ([\d.]+)", text)]
    assert all(0 <= ratio < float("inf") for ratio in found)
    return found


def test_train_step_prints_ratios_of_every_stage(output: Callable[..., str]) -> None:
    text = output(train_step.main, "--size", "tiny", "--device", "cpu", "--rounds", "1", "--variants", "eager bf16")
    assert [line.split(":")[0] for line in text.splitlines() if "M parameters" in line] == list(train_step.STAGES)
    assert text.count("ms/step") == 6
    assert ratios(text)[::2] == [1.0, 1.0, 1.0]
    assert "torch " + torch.__version__ in text.splitlines()[0]


def test_vidm_step_prints_ratios_of_every_stage(output: Callable[..., str]) -> None:
    flags = ("--size", "tiny", "--device", "cpu", "--rounds", "1", "--variants", "eager bf16")
    text = output(vidm_step.main, *flags, "--stages", *vidm_step.STAGES)
    assert [line.split(":")[0] for line in text.splitlines() if "M parameters" in line] == list(vidm_step.STAGES)
    assert text.count("ms/step") == 4 and ratios(text)[::2] == [1.0, 1.0] and "2 frames 8x8 a step" in text


def test_vidm_s_release_size_is_the_release_s() -> None:
    task = vidm_step.make_task("motion", vidm_step.SIZES["release"])
    with torch.device("meta"):
        network = task.networks()["model"].module
    assert sum(parameter.numel() for parameter in network.parameters()) == 194_178_226


def test_latte_step_compares_equal_networks(output: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ("--device", "cpu", "--size", "4", "--frames", "2", "--depth", "2", "--rounds", "1", "--variants", "plain bf16", "eager bf16")
    text = output(latte_step.main, *tiny)
    assert text.count("ms/step") == 3 and text.count("products alone") == 1 and "1.00 times as fast as plain bf16" in text
    assert "Latte-S/2, 1 clip(s) of 2x4x4 latents" in text
    monkeypatch.setattr(latte_step.PlainBlock, "attention", lambda self, x: x)
    with pytest.raises(AssertionError, match="not the same"):
        output(latte_step.main, *tiny)


def test_pvdm_step_compares_equal_networks(output: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ("--device", "cpu", "--size", "32", "--frames", "4", "--rounds", "1", "--variants", "plain bf16", "eager bf16")
    tiny += ("--ae-dim", "32", "--ae-depth", "1", "--channel-mult", "1", "--res-blocks", "1")
    text = output(pvdm_step.main, *tiny)
    assert text.count("ms/step") == 6 and text.count("1.00 times as fast as plain bf16") == text.count("products alone") == 2
    assert "planes 4x4, 4x4, 4x4" in text
    for module, name in ((pvdm_step, "plain_block"), (plain_tokens, "plain_feed_forward")):
        with monkeypatch.context() as broken:
            broken.setattr(module, name, lambda layer, x: x)
            with pytest.raises(AssertionError, match="not the same"):
                output(pvdm_step.main, *tiny)


def test_hvdm_step_compares_equal_networks(output: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ("--device", "cpu", "--size", "16", "--frames", "4", "--rounds", "1", "--variants", "plain bf16", "eager bf16")
    tiny += ("--dim", "32", "--depth", "1", "--freq-widths", "4", "4", "4", "4")
    text = output(hvdm_step.main, *tiny)
    assert text.count("ms/step") == 3 and "1.00 times as fast as plain bf16" in text
    assert "autoencoder, 1 clip(s) of 4x16x16, width 32, depth 1" in text
    monkeypatch.setattr(plain_tokens, "plain_cross", lambda layer, x, keys, values, tables: x)
    with pytest.raises(AssertionError, match="not the same"):
        output(hvdm_step.main, *tiny)


def test_products_of_a_step_are_counted_and_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, conv = nn.Linear(8, 24), nn.Conv2d(3, 8, 3)
    q, k, v = torch.randn(3, 2, 4, 100, 8, requires_grad=True).unbind(0)
    with products.Products() as recorded:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
        layer(torch.randn(5, 8, requires_grad=True)).sum().backward()
        conv(torch.randn(2, 3, 12, 12)).sum().backward()
    counted = Counter[str]()
    for (func, _), count in recorded.calls.items():
        counted[func.__name__.removesuffix(".default")] += count
    # A linear layer's product and two gradients; a convolution and its gradients in one; two products of attention, four backward.
    assert counted == {"addmm": 1, "mm": 2, "convolution": 1, "convolution_backward": 1, "bmm": 6}

    shapes = set[tuple[int, ...]]()

    def computed(work: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
        out = work()
        shapes.add(tuple((out if isinstance(out, torch.Tensor) else out[1]).shape))
        return 2.0

    monkeypatch.setattr(products, "seconds", computed)
    line = products.bound_line(lambda: layer(torch.ones(5, 8)), {"plain bf16": 6.0}, 1, time.perf_counter)
    assert "2000.0 ms/step   3.00 times as fast as plain bf16" in line
    assert recorded.seconds(time.perf_counter) == 2.0 * 11
    assert shapes == {(5, 24), (24, 8), (5, 8), (2, 8, 10, 10), (8, 3, 3, 3), (8, 100, 100), (8, 100, 8)}


def test_frames_of_vidm_are_the_same_with_shared_work(output: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--image-size", "8", "12", "--model-channels", "32", "--channel-mult", "1", "1", "--num-res-blocks", "1")
    tiny = ("--device", "cpu", "--videos", "3", "--rounds", "1", *small)
    text = output(vidm_frame.main, *tiny)
    assert text.count(" ms a frame") == 4 and "3 videos one by one: pixels apart by at most 0.0e+00, 0 allowed" in text
    maps = MotionUNet.maps
    monkeypatch.setattr(MotionUNet, "maps", lambda self, t, frame, size: maps(self, t, frame + 9, size))
    with pytest.raises(AssertionError, match="not the same"):
        output(vidm_frame.main, *tiny)


def test_wavelet_forms_are_the_same(output: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ("--device", "cpu", "--shape", "1", "2", "4", "8", "8", "--rounds", "1")
    text = output(wavelet.main, *tiny)
    assert text.count(" ms ") == 2 * len(wavelet.FORMS) - 1 and text.count("1.00 times the time of ours") >= 2
    monkeypatch.setitem(wavelet.FORMS, "strided corners", lambda x: wavelet.corners(x.flip(2)))
    with pytest.raises(AssertionError, match="not the same"):
        output(wavelet.main, *tiny)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_train_step_compiles(backend: str, output: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor makes code of the trained block alone: of everything it takes minutes."""
    original = nn.Module.compile

    def compiled(self: nn.Module, **how: Any) -> None:
        original(self, backend=backend if isinstance(self, DiTBlock) else "aot_eager", **how)

    monkeypatch.setattr(nn.Module, "compile", compiled)
    torch._dynamo.utils.counters.clear()
    tiny = ("--size", "tiny", "--device", "cpu", "--rounds", "1", "--stages", "content")
    text = output(train_step.main, *tiny, "--variants", "compiled bf16")
    assert "compiled bf16" in text
    assert len(ratios(text)) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert bool(torch._dynamo.utils.counters["inductor"]) == (backend == "inductor")


@pytest.mark.parametrize("stage", train_step.STAGES)
def test_train_step_trains(stage: str, env: Env) -> None:
    size = train_step.SIZES["tiny"]
    task = train_step.make_task(stage, size, OptimConfig(lr=1e-2, clip_norm=1.0), EmaConfig(decay=0.5))
    batch = train_step.make_batch(size, 2, env.device)
    trainer = task_step.Trainer(task, batch, ParallelConfig(mode="ddp", precision="fp32", compile="off"), env)
    member = next(iter(trainer.team.members.values()))
    assert member.ema is not None
    trained = [name for name, parameter in member.module.named_parameters() if parameter.requires_grad]
    for module in (member.module, member.ema.module):
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        for _ in range(3):
            trainer.step()
        assert all(not torch.equal(before[name], module.get_parameter(name)) for name in trained)


def test_checkpoint_prints_the_ratio(output: Callable[..., str], tmp_path: Path) -> None:
    text = output(checkpoint.main, "--millions", "0.3", "--rounds", "1", "--steps", "1", "--folder", str(tmp_path))
    assert len(ratios(text)) >= 3
    assert "loop held by a background save" in text
    assert not list(tmp_path.iterdir())


def test_checkpoint_saves_the_whole_state(env: Env, tmp_path: Path) -> None:
    training = checkpoint.Training(0.3, 2, "fsdp", env)
    checkpointer = checkpoint.Checkpointer(tmp_path, env, training.config)
    training.step()
    times = checkpoint.measure(training, checkpointer, tmp_path, argparse.Namespace(rounds=1, steps=1), env)
    newest = latest(tmp_path)
    assert newest is not None
    assert find_damage(newest) is None
    weights, tensors = training.parameters, training.tensors()
    saved = sum(value.numel() for value in tensors.values())
    assert 3.5 * weights < saved < 4.5 * weights  # weights, average, two moments (of those that are trained)
    assert sum(file.stat().st_size for file in newest.iterdir()) >= sum(value.nbytes for value in tensors.values())
    assert [len(figures) for figures in (times.held, times.synchronous, times.total, times.busy_total)] == [1, 1, 1, 1]


def test_watching_prints_ratios_to_a_step(output: Callable[..., str]) -> None:
    text = output(watching.main, "--step", "0.002", "--steps", "12", "--rounds", "2", "--log-every", "4")
    calls, threads, together, of_50_ms, _ = ratios(text)
    assert of_50_ms < together, "the step is shorter than 50 ms"
    assert 0 < calls <= together == pytest.approx(calls + threads, abs=2e-5)
    assert "2 rounds of 12 steps" in text and "step 4/12" not in text, "log lines are written, but not between the figures"


def test_stream_prints_ratios_to_the_raw_read_and_to_webdataset(output: Callable[..., str]) -> None:
    text = output(stream.main, "--videos", "1", "--batch", "4", "--rounds", "1", "--workers", "0")
    assert [line.split(":")[0] for line in text.splitlines() if "clips 16x64x64" in line] == ["npy", "mp4"]
    assert text.count("clips/s") == 8
    assert ratios(text)[::4] == [1.0, 1.0]
    assert text.count("to webdataset") == 2


def test_stream_baselines_read_every_clip(tmp_path: Path) -> None:
    shards = stream.digits(tmp_path, ClipRules(size=(16, 16), clip_length=4, clip_stride=4), videos=2)
    with tarfile.open(shards.shard_path(0)) as tar:
        stored = {json.load(tar.extractfile(name))["source"]: None for name in tar.getnames() if name.endswith("json")}  # type: ignore[arg-type]
    assert set(stored) == {"0/video_00000.mp4", "1/video_00001.mp4"}
    clips = [clip for clip, _ in stream.OriginalVideos(shards, tmp_path / "source")]
    source = stream.ClipSource(shards, stream.DataConfig(num_workers=0), seed=0, global_batch_size=16)
    read = next(source.batches(0))["video"]
    assert {clip.numpy().tobytes() for clip in clips} == {clip.contiguous().numpy().tobytes() for clip in read}


def test_preprocess_prints_ratios_and_every_variant_cuts_all_clips(output: Callable[..., str]) -> None:
    text = output(preprocess.main, "--count", "2", "--frames", "40", "--sizes", "32", "--rounds", "1")
    assert [line.split(":")[0] for line in text.splitlines() if "videos to" in line] == list(preprocess.KINDS)
    assert re.search(r"^ffmpeg program: \S+, ffmpeg version \S+; \d+ ms", text, re.MULTILINE)
    assert [int(count) for count in re.findall(r"(\d+) clips ", text)] == [4] * 12
    assert ratios(text)[::6] == [1.0, 1.0]
    reached = re.findall(r"--decoder ffmpeg: ([\d.]+), and ([\d.]+) if it only decoded", text)
    assert [float(ours) for ours, _ in reached] == ratios(text)[1::6]
    assert [float(floor) for _, floor in reached] == ratios(text)[2::6]


def test_formats_prints_size_speed_and_fidelity(output: Callable[..., str]) -> None:
    text = output(formats.main, "--clips", "2", "--sizes", "32", "--rounds", "1")
    assert re.findall(r"^  (\w+)", text, re.MULTILINE) == ["npy", "mp4", "npz", "jpeg"]
    assert ratios(text)[:2] == [1.0, 1.0]
    fidelity = [float(value) for value in re.findall(r"PSNR (\S+) dB", text)]
    assert fidelity[0] == fidelity[2] == float("inf") and all(20 < value < 60 for value in fidelity[1::2])


def test_make_bench_runs_every_benchmark() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    (names,) = re.findall(r"for name in ([\w ]+);.*\n.* -m benchmarks\.\$\$name \|\| exit 1; done", (ROOT / "Makefile").read_text())
    assert scripts == set(names.split())


@pytest.mark.parametrize("system", ["pvdm", "hvdm", "vidm"])
def test_long_video_measures_each_length_in_its_own_process(output: Callable[..., str], system: str) -> None:
    tiny = ("--system", system, "--device", "cpu", "--image-size", "64", "--clip-frames", "8", "--steps", "1", "1")
    text = output(long_video.main, *tiny, "--frames", "9", "17")
    assert [int(number) for number in re.findall(r"(\d+) frames: +[\d.]+ MiB at most", text)] == [9, 17]
    assert "17 frames need" in text and "all frames as numbers: 0.8 MiB" in text


def test_evaluation_prints_ratios_and_memory_of_both_ways(output: Callable[..., str]) -> None:
    """That the values agree it asserts itself."""
    text = output(evaluation.main, "--clips", "300", "--dims", "24", "--rounds", "1")
    found = ratios(text)
    assert len(found) == 12 and found[2::3] == [1.0] * 4 and min(found) > 0, "as a whole and the distance alone, one thread and all cores"
    assert re.findall(r"memory, (.+?) +300 clips -?\d+ MiB, 2400 clips -?\d+ MiB", text) == list(evaluation.WAYS)
