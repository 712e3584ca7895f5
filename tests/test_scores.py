"""Figures of what a stage makes, while it is trained: of each stage, on any number of ranks, over restarts; broken generators, mistakes."""

import dataclasses
import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from datasets.config import DataConfig, open_shards
from datasets.loader import ClipSource
from engine.config import BestConfig, LogConfig, RunConfig, ScoreConfig
from engine.loop import fit
from engine.task import Batch, Made, Scored, Scoring
from evaluation.quality import measure_fvd
from evaluation.settings import FvdConfig
from launch.env import Env, Stopped, distributed
from tasks.scores import open_scorer
from tests import cmd_family, hvdm_denoiser, hvdm_exports, latte_denoiser, pvdm_denoiser, pvdm_stage, vidm_stage
from tests.distributed import run
from tests.pvdm_denoiser import ENV, UNET
from tests.pvdm_exports import export_autoencoder
from tests.scripted_detectors import ToyI3D, save_script
from tests.scripts import commands
from tests.shard_sets import write_set
from tests.test_cli import command, complaint
from tests.toy_task import ToySource, ToyTask, toy_config
from utils.errors import ConfigError, UserError
from utils.rng import SampleRng

SHORT = "--global-batch-size 4 --max-steps 4 --num-workers 0 --precision fp32 --log-every 1 --preview-every 0 --eval-every 0 --ckpt-every 2"
SHORT += " --lr 1e-4 --parallel fsdp --compile off --ema-every 1 --cond-prob 0"
NAME = "score/fvd6_4f"
HVDM = ["--cond-prob", "0", "--img-prob", "0", "--frame-strides", "2", "3"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 clips of 10 or 5 frames of 16 x 16 in `pixels`, an autoencoder of 4 frames in `ae`, a network that sees brightness."""
    folder = tmp_path_factory.mktemp("scores")
    write_set(folder / "pixels", (6, 6), lengths=(10, 5), size=(16, 16))
    export_autoencoder(folder / "ae")
    save_script(ToyI3D(), folder / "i3d.pt")
    return folder


def arguments(root: Path, results: Path, *argv: str) -> list[str]:
    given = ["--data-path", str(root / "pixels"), "--ae", str(root / "ae"), "--results-dir", str(results)]
    score = ["--score-every", "2", "--score-videos", "6", "--score-i3d", str(root / "i3d.pt"), "--score-cache", str(root / "cache")]
    return ["--system", "pvdm", *UNET, *SHORT.split(), *given, *score, *argv]


def train(lines: list[list[str]]) -> None:
    with distributed(60) as env:
        commands(env, "train_dit.py", lines)


def scores(results: Path, name: str = NAME) -> dict[int, float]:
    """Step -> figure."""
    lines = map(json.loads, (next(results.iterdir()) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def test_any_number_of_ranks_and_restarts_give_the_same_figures(root: Path, tmp_path: Path) -> None:
    """Six of two global batches of four; the real ones are looked at once."""
    whole, parts, ranks = (tmp_path / name for name in ("whole", "parts", "ranks"))
    train([arguments(root, whole, "--best-metric", NAME)])
    found = scores(whole)
    assert list(found) == [2, 4] and found[2] > 0 and found[4] > 0 and found[2] != found[4]
    kept = {path: path.stat().st_mtime_ns for path in (root / "cache").rglob("*.safetensors")}
    assert len(kept) == 2, "one block and its moments"

    run(commands, script="train_dit.py", lines=[arguments(root, ranks)])
    assert scores(ranks) == pytest.approx(found, rel=1e-6)
    train([arguments(root, parts, "--max-steps", "2"), arguments(root, parts)])
    assert scores(parts) == found and len(list(parts.iterdir())) == 1
    assert kept == {path: path.stat().st_mtime_ns for path in (root / "cache").rglob("*.safetensors")}

    folder = next(whole.iterdir())
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {event.step: event.value for event in events.Scalars(NAME)} == pytest.approx(found)
    log = (folder / "log.txt").read_text()
    assert f"{NAME}, every 2 steps: 6 videos of 4 frames generated, compared with 6 of" in log and f"{NAME} {found[4]:.4g}" in log
    best = min(found, key=lambda step: found[step])
    assert json.loads((folder / "export/config.json").read_text())["step"] == best


def test_what_is_scored_may_change_when_a_run_goes_on(root: Path, tmp_path: Path) -> None:
    train([arguments(root, tmp_path, "--max-steps", "2"), arguments(root, tmp_path, "--max-steps", "3", "--score-videos", "5")])
    assert list(scores(tmp_path)) == [2] and list(scores(tmp_path, "score/fvd5_4f")) == [3]


class Images:
    """A task that makes pictures or videos that are given."""

    def __init__(self, scored: Scored) -> None:
        self._scored = scored

    def scored(self) -> Scored:
        return self._scored

    def make(self, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> Made:
        raise AssertionError


def source_of(folder: Path, frames: int = 4, batch: int = 4) -> ClipSource:
    data = DataConfig(path=(str(folder),), n_frames=frames, num_workers=0)
    return ClipSource(open_shards(data), data, seed=0, global_batch_size=batch)


def in_parts(made: Tensor, originals: Tensor | None = None, size: int = 4) -> Iterator[tuple[Tensor, Made]]:
    """Micro-batches in another order than the samples'."""
    for part in reversed(torch.arange(len(made)).split(size)):
        yield part, Made(made[part], None if originals is None else originals[part])


def opened(root: Path, scored: Scored, env: Env = ENV, **changes: Any) -> Any:
    setting = ScoreConfig(every=2, videos=6, i3d=str(root / "i3d.pt"), cache=str(root / "cache"))
    config = RunConfig(score=ScoreConfig(**(vars(setting) | changes)))
    return open_scorer(config, Images(scored), source_of(root / "pixels", scored.frames), env)  # type: ignore[arg-type]


def test_the_figure_is_evaluates_and_grows_with_what_is_broken(root: Path, tmp_path: Path) -> None:
    scorer = opened(root, Scored("generated", 4, (16, 16)))
    assert scorer.name == "fvd6_4f" and scorer.steps == 2
    clean = torch.stack([next(source_of(root / "pixels", 4, 1).batches(step))["video"][0] for step in range(8)])
    found = []
    for share in (0.0, 0.3, 1.0):
        noise = torch.randint(0, 256, clean.shape, generator=torch.Generator().manual_seed(0))
        broken = torch.lerp(clean.float(), noise.float(), share).round()
        found.append(scorer.measure(in_parts(broken / 127.5 - 1)))
        folder = tmp_path / f"{share}"
        folder.mkdir()
        for number, video in enumerate(broken[:6]):
            import numpy as np

            np.save(folder / f"{number}.npy", video.permute(1, 0, 2, 3).numpy().astype(np.float32))
        config = FvdConfig(dir1=str(root / "pixels"), dir2=str(folder), i3d=str(root / "i3d.pt"), num_videos=6, n_frames=4, no_cache=True)
        assert measure_fvd(config, ENV)["fvd"] == pytest.approx(found[-1], rel=1e-9), "samples beyond the sixth do not count"
    assert found[0] < found[1] < found[2]


class Brightness(nn.Module):
    """Of the first and the last frame, in whatever range."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean(dim=(1, 3, 4))[:, [0, -1]]


def test_reconstructions_are_compared_with_their_originals(root: Path) -> None:
    save_script(Brightness(), root / "plain.pt")
    scorer = opened(root, Scored("given back", 4, (16, 16), label="r", originals=True), i3d=str(root / "plain.pt"))
    assert scorer.name == "rfvd6_4f_pvdm"
    clips = torch.rand(8, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert scorer.measure(in_parts(clips, clips)) == pytest.approx(0, abs=1e-6)
    darker = (clips - 1) / 2
    assert scorer.measure(in_parts(darker, darker)) > 0.1, "the originals were seen"
    whole = opened(root, Scored("given back", 4, (16, 16), originals=True), videos=256, protocol="stylegan-v")
    assert whole.count == 12, "each once"


def test_pictures_without_a_download(root: Path) -> None:
    scorer = opened(root, Scored("generated", 1, (16, 16)), i3d="", videos=4)
    assert scorer.name == "fd_content_effl0_4_1f" and "singular" in scorer.about
    noise = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert scorer.measure(in_parts(noise)) > 0


def of_ranks(env: Env, root: str) -> list[float]:
    """Figures of 31 videos with originals, twice, and of 6 without: of three ranks one sees none of these."""
    clips = torch.rand(36, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mine = list(torch.arange(36).split(3))[env.rank :: env.world_size]
    given_back = opened(Path(root), Scored("given back", 4, (16, 16), originals=True), env, protocol="stylegan-v")
    given_back.count = 31
    generated = opened(Path(root), Scored("generated", 4, (16, 16)), env)
    found = [given_back.measure((part, Made(clips[part] / 2, clips[part])) for part in mine) for _ in range(2)]
    return [*found, generated.measure((part, Made(clips[part] / 2)) for part in mine)]


def test_sums_of_ranks_are_those_of_one_process(root: Path) -> None:
    """To the rounding of the sums; the originals are looked at the first time."""
    alone = of_ranks(ENV, str(root))
    assert alone[0] == alone[1] > 0 and alone[2] > 0
    for processes in (2, 3):
        for found in run(of_ranks, processes, root=str(root)):
            assert found == pytest.approx(alone, rel=1e-12)


def test_features_are_summed_up_and_not_kept(root: Path) -> None:
    scorer, seen = opened(root, Scored("generated", 4, (16, 16))), []
    extractor = scorer._extractor

    def noted(videos: Tensor) -> Tensor:
        rows = extractor(videos).numpy()
        seen.append(weakref.ref(rows))
        return torch.from_numpy(rows)

    def watched() -> Iterator[tuple[Tensor, Made]]:
        for part in in_parts(torch.rand(8, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), size=1):
            yield part
            assert all(rows() is None for rows in seen)

    scorer._extractor = noted
    assert scorer.measure(watched()) > 0 and len(seen) == 6


def stages(root: Path) -> dict[str, tuple[Any, Batch, tuple[int, ...], str]]:
    """Stage -> task, batch, shape of what it makes of one sample, label."""
    ae = cmd_family.family(root / "cmd")["ae"]
    clip, tall = (3, 4, 16, 24), {"video": torch.randint(0, 256, (2, 3, 4, 16, 24), dtype=torch.uint8)}
    common = {"label": torch.tensor([0, 1]), "index": torch.arange(2)}
    square = {"video": torch.randint(0, 256, (2, 3, 4, 16, 16), dtype=torch.uint8)}
    steps = ("--preview.steps", "2")
    hvdm_ae = hvdm_exports.export_autoencoder(root / "hvdm-ae")
    strided = dataclasses.replace(hvdm_denoiser.SINGLE, strides=(2, 3))
    return {
        "cmd-autoencoder": (cmd_family.autoencoder_task(), tall | common, clip, "r"),
        "cmd-content": (cmd_family.content_task(ae, *steps), tall | common, (3, 16, 24), "content_"),
        "cmd-motion": (cmd_family.motion_task(ae, *steps), tall | common, clip, "motion_"),
        "pvdm-autoencoder": (pvdm_stage.task(), tall | common, clip, "r"),
        "pvdm": (pvdm_denoiser.task(root / "ae", "--cond-prob", "0", clips=pvdm_denoiser.SINGLE), square | common, (3, 4, 16, 16), ""),
        "hvdm": (hvdm_denoiser.task(hvdm_ae, *HVDM, clips=strided), square | common, (3, 4, 16, 16), ""),
        "latte": (latte_denoiser.task(latte_denoiser.vae_export(root / "vae")), tall | common, clip, ""),
        "vidm-content": (vidm_stage.task("content"), vidm_stage.batch("content", 2), (3, 8, 12), ""),
        "vidm-motion": (vidm_stage.task("motion"), vidm_stage.batch("motion", 2), (3, 6, 8, 12), "motion_"),
    }


def test_every_stage_makes_what_it_says(root: Path) -> None:
    for name, (task, batch, shape, label) in stages(root).items():
        assert isinstance(task, Scoring), name
        scored = task.scored()
        assert (scored.frames, scored.size, scored.label) == (1 if len(shape) == 3 else shape[1], shape[-2:], label), name
        assert scored.stride == (2 if name == "hvdm" else 1), name
        torch.manual_seed(0)
        networks = {key: network.module.eval() for key, network in task.networks().items()}
        with torch.no_grad():
            both = task.make(networks, batch, SampleRng(1, batch["index"]))
            second = {key: value[1:] for key, value in batch.items()}
            alone = task.make(networks, second, SampleRng(1, second["index"]))
        assert both.videos.shape == (2, *shape) and both.videos.abs().max() <= 1, name
        assert torch.allclose(both.videos[1:], alone.videos, atol=1e-4), f"{name}: the noise is the sample's own"
        assert (both.originals is not None) == scored.originals, name
        assert both.originals is None or both.originals.shape == both.videos.shape, name


class Interrupted:
    """A scorer that a signal meets the first time."""

    name, about, steps = "toy", "", 2

    def __init__(self, source: ToySource, stops: bool) -> None:
        self.source, self.stops = source, stops

    def measure(self, made: Iterator[tuple[Tensor, Made]]) -> float:
        seen = [int(number) for index, _ in made for number in index]
        if self.stops:
            raise Stopped
        return float(len(seen))


class Making(ToyTask):
    """Makes pictures."""

    def scored(self) -> Scored:
        return Scored("generated", 1, (6, 16))

    def make(self, networks: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> Made:
        assert not networks["net"].training and not torch.is_grad_enabled()
        return Made(self._output(networks, batch["x"], rng)[:, None])


def test_a_signal_while_it_is_measured_loses_nothing(tmp_path: Path) -> None:
    def go(folder: Path, stops: bool) -> Path:
        config = toy_config(folder, **{"score.every": 3, "checkpoint.every": 2})
        with distributed(60) as env:
            source = ToySource(config, env.rank, env.world_size)
            return fit(Making(config), source, config, env, scorer=Interrupted(source, stops))  # type: ignore[arg-type]

    with pytest.raises(Stopped):
        go(tmp_path / "cut", stops=True)
    assert [path.name for path in sorted((tmp_path / "cut").glob("*/checkpoints/step_*"))][-1] == "step_0000003"
    go(tmp_path / "cut", stops=False)
    go(tmp_path / "whole", stops=False)
    assert scores(tmp_path / "cut", "score/toy") == scores(tmp_path / "whole", "score/toy") == {3: 16.0, 5: 16.0}


MISTAKES = [
    (["--score-i3d", "gone.pt"], "--score-i3d gone.pt: no such file"),
    (["--score-protocol", "stylegan"], "--score-protocol stylegan: known are stylegan-v"),
    (["--score-real", "nowhere"], "--score-real nowhere: no such folder"),
    (["--score-videos", "1"], "score.videos 1: at least 2"),
    (["--best-metric", "score/fvd2048_16f"], "the figure of this run is score/fvd6_4f"),
    (["--best-metric", "score/fvd6_4f", "--score-every", "0"], "set --score-every"),
]


@pytest.mark.parametrize(("argv", "said"), MISTAKES)
def test_mistakes_are_one_line_before_there_is_a_run(root: Path, tmp_path: Path, argv: list[str], said: str) -> None:
    """Also of a dry run."""
    line = arguments(root, tmp_path / "results", *argv)
    for go in (lambda: train([line]), lambda: commands(ENV, "train_dit.py", [[*line, "--dry-run"]])):
        with pytest.raises(UserError, match=said) as error:
            go()
        assert "\n" not in str(error.value) and not (tmp_path / "results").exists()


def test_a_dry_run_says_what_is_compared_and_measures_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*arguments(root, tmp_path / "results"), "--score-cache", str(tmp_path / "cache"), "--best-metric", NAME, "--dry-run"]
    commands(ENV, "train_dit.py", [line])
    assert f"{NAME}, every 2 steps: 6 videos of 4 frames generated, compared with 6 of" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    write_set(tmp_path / "short", (3,), lengths=(3,), size=(16, 16))
    with pytest.raises(UserError, match="have fewer than 4 frames"):
        commands(ENV, "train_dit.py", [[*line, "--score-real", str(tmp_path / "short")]])


def test_what_cannot_be_measured_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="this stage makes single frames"):
        opened(root, Scored("generated", 1, (16, 16)))
    with pytest.raises(ConfigError, match="nothing decodes"):
        opened(root, Scored("generated", 4, (16, 16), missing="nothing decodes"))
    with pytest.raises(UserError, match="have fewer than 13 frames"):
        opened(root, Scored("generated", 4, (16, 16), stride=4))
    with pytest.raises(ConfigError, match="compared with its originals; drop the flag"):
        opened(root, Scored("given back", 4, (16, 16), originals=True), real=str(root / "pixels"))
    with pytest.raises(ConfigError, match="makes nothing"):
        open_scorer(RunConfig(score=ScoreConfig(every=1)), ToyTask(toy_config(root)), source_of(root / "pixels"), ENV)
    assert open_scorer(RunConfig(), ToyTask(toy_config(root)), source_of(root / "pixels"), ENV) is None


def test_settings_that_contradict_each_other() -> None:
    assert BestConfig("score/fvd256_16f").sign == -1
    RunConfig(best=BestConfig("score/x", patience=2), score=ScoreConfig(every=1), log=LogConfig(eval_every=0)).validate()
    with pytest.raises(ConfigError, match="--score-protocol pvdm is one of video distances"):
        RunConfig(score=ScoreConfig(every=1, protocol="pvdm")).validate()


def test_the_commands_have_the_flags(root: Path, tmp_path: Path) -> None:
    done = command("train_dit.py", *arguments(root, tmp_path, "--score-i3d", "gone.pt"))
    assert complaint(done).startswith("--score-i3d gone.pt: no such file")
