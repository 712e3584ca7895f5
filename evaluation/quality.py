"""Figures of sets of videos, by what networks see in them: Frechet and kernel video distance (FVD, KVD), inception score (VIS)."""

from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evaluation.clips import AgreedError, Clips, choose_clips, other_clips
from evaluation.extractors import Extractor, open_extractor
from evaluation.features import Reading, Side, measure_side
from evaluation.protocols import Role, Size
from evaluation.report import report, too_few
from evaluation.settings import DistanceConfig, FrechetConfig, FvdConfig, KvdConfig, PairConfig, VideosConfig, VisConfig
from evaluation.videos import VideoSet, open_videos
from launch.env import Env, Stopped
from metrics.frechet import frechet_distance
from metrics.inception_score import SHUFFLE_SEED, inception_score, is_distribution, probabilities
from metrics.kernel import kernel_distance
from metrics.resampling import bootstrap_frechet, bootstrap_kernel, bootstrap_score, frechet_limit, interval
from utils.errors import UserError

LEAST_FOR_LIMIT = 8
LEAST_FOR_FLOOR = 4
Figures = dict[str, Any]


@dataclass(frozen=True)
class Extra:
    """Other real clips, in place of generated ones, for the noise floor: a perfect generator's."""

    clips: Clips | None = None
    """None where there are not so many, or none are wanted."""
    side: Side | None = None
    """What came of them, on rank 0, once they are measured."""
    note: str = ""
    """Why there are none, where a reader of the figures has to know it."""


def measure_fvd(config: FvdConfig, env: Env, generated: VideoSet | None = None) -> Figures:
    """Figures and protocol, on all ranks; the processes share the videos, each is counted once. `generated`: in place of --dir2."""
    extractor = _extractor(config, env)
    return measure_frechet(config, env, extractor, generated)


def measure_frechet(config: FrechetConfig, env: Env, extractor: Extractor, generated: VideoSet | None = None) -> Figures:
    """As `measure_fvd`, by a network that is there already. To be called by all ranks."""
    clips = sides(config, env, generated)
    extra = other_real(config, *clips, env)
    keep = bool(config.bootstrap or config.fd_inf)
    real, fake = (measured(config, one, extractor, env, keep_rows=keep) for one in clips)
    more = more_real(config, extra, extractor, env)
    if not env.is_main:
        meet(env, config.bootstrap)
        return agreed(None, env)
    return agreed(frechet_figures(config, extractor, real, fake, more, env), env)


def measure_kvd(config: KvdConfig, env: Env, generated: VideoSet | None = None) -> Figures:
    """Figures and protocol, on all ranks; the processes share the videos, each is counted once. `generated`: in place of --dir2."""
    extractor = _extractor(config, env)
    clips = sides(config, env, generated)
    real, fake = (measured(config, one, extractor, env, keep_rows=True) for one in clips)
    return agreed(_kernel_figures(config, extractor, real, fake) if env.is_main else None, env)


def measure_vis(config: VisConfig, env: Env, generated: VideoSet | None = None) -> Figures:
    """Figures and protocol, on all ranks; the processes share the videos, each is counted once. `generated`: in place of --dir2."""
    extractor = open_extractor("c3d", config.c3d, "--c3d", config.rules, env.device, config.c3d_sha256)
    clips = clips_of(config, generated or open_videos(config.dir2, "--dir2"), "generated", env, config.size, config.step)
    if len(clips) < config.splits:
        raise UserError(f"--dir2 {config.dir2}: {len(clips)} videos cannot be {config.splits} splits; give more videos, or --splits")
    side = measured(config, clips, extractor, env, keep_rows=True)
    return agreed(None if side is None else _score_figures(config, extractor, side), env)


def _extractor(config: DistanceConfig, env: Env) -> Extractor:
    return open_extractor(config.rules.network, config.i3d, "--i3d", config.rules, env.device, config.i3d_sha256)


def sides(config: PairConfig, env: Env, generated: VideoSet | None) -> tuple[Clips, Clips]:
    """Real and generated clips. Raises UserError where one side has fewer than two."""
    fake = clips_of(config, generated or open_videos(config.dir2, "--dir2"), "generated", env, config.size, config.step)
    real = clips_of(config, open_videos(config.dir1, "--dir1"), "real", env, fake.size, config.real_stride or config.step)
    for name, clips in (("--dir1", real), ("--dir2", fake)):
        if len(clips) < 2:
            raise UserError(f"{name} {getattr(config, name[2:])}: one video of at least {config.frames} frames; a distance needs two")
    return real, fake


def clips_of(config: VideosConfig, videos: VideoSet, role: Role, env: Env, size: Size | None, stride: int) -> Clips:
    """The clips of one side, as the settings say. To be called by all ranks."""
    return choose_clips(
        videos, config.rules, role, env, count=config.count, frames=config.frames, size=size, seed=config.seed, stride=stride
    )


def measured(config: VideosConfig, clips: Clips, extractor: Extractor, env: Env, *, keep_rows: bool) -> Side | None:
    """`measure_side`, as the settings say."""
    reading = Reading(config.batch_size, config.num_workers, None if config.no_cache else config.cache)
    return measure_side(clips, extractor, env, reading, config.seed, keep_rows=keep_rows)


def other_real(config: FrechetConfig, real: Clips, generated: Clips, env: Env) -> Extra:
    """As many other real clips as there are generated ones, to be chosen before anything is measured. To be called by all ranks.

    None where there are not so many, and of protocols that take videos by name, of which the next would be of other classes.
    """
    if not (config.noise_floor and config.rules.drawn):
        return Extra()
    stride = config.real_stride or config.step
    try:
        return Extra(other_clips(real, env, count=len(generated), frames=config.frames, seed=config.seed, stride=stride))
    except AgreedError as error:
        return _without(error)


def more_real(config: FrechetConfig, extra: Extra, extractor: Extractor, env: Env) -> Extra:
    """Measures them, where there are any: one that cannot be read costs the floor, and not the figure. To be called by all ranks."""
    if extra.clips is None:
        return extra
    try:
        return Extra(extra.clips, measured(config, extra.clips, extractor, env, keep_rows=False))
    except AgreedError as error:
        return _without(error)


def _without(error: AgreedError) -> Extra:
    return Extra(note=f"no noise floor of other real videos: {error}")


def meet(env: Env, times: int = 1) -> None:
    """So often the ranks meet: rank 0 after each resampled set, so that the others, who have nothing to do, do not wait too long for it.

    Raises an agreed Stopped after a signal.
    """
    for _ in range(times):
        stop = torch.tensor(env.stop.is_set(), dtype=torch.int32)
        if env.world_size > 1:
            dist.all_reduce(stop)
        if stop:
            raise Stopped


def agreed(figures: Figures | None, env: Env) -> Figures:
    """Rank 0's figures, on all ranks."""
    told = [figures]
    if env.world_size > 1:
        dist.broadcast_object_list(told)
    assert told[0] is not None
    return told[0]


def frechet_figures(
    config: FrechetConfig,
    extractor: Extractor,
    real: Side | None,
    generated: Side | None,
    extra: Extra,
    env: Env,
    told: Container[str] = (),
) -> Figures:
    """Distance and all that goes with it, on rank 0; the others call `meet` for each resampled set.

    `extra`: of `more_real`; `told`: notes that were printed before.
    """
    assert real is not None and generated is not None
    unbiased, name = config.rules.unbiased, config.rules.figure
    moments = [side.moments for side in (real, generated)]
    value = frechet_distance(moments[0], moments[1], unbiased=unbiased)
    figures: Figures = {name: value}
    notes = too_few(min(side.n for side in moments), moments[0].dim, config.unit)
    if config.bootstrap:
        rows, pace = (rows_of(real), rows_of(generated)), partial(meet, env)
        low, high = interval(value, bootstrap_frechet(*rows, config.bootstrap, config.seed, unbiased=unbiased, after_each=pace))
        figures |= {f"{name}_low": max(low, 0.0), f"{name}_high": high}
    least = min(len(real.clips), len(generated.clips))
    if config.fd_inf and least < LEAST_FOR_LIMIT:
        notes.append(f"{least} videos: --fd-inf needs at least {LEAST_FOR_LIMIT}")
    elif config.fd_inf:
        limit, by_size = frechet_limit(rows_of(real), rows_of(generated), config.seed, unbiased=unbiased)
        figures |= {"fd_inf": limit, "fd_by_size": {str(size): one for size, one in by_size.items()}}
    if config.noise_floor:
        figures |= _floor(config, real, generated, extra.side)
    if f"floor_{config.unit}" in figures:
        notes += _low_floor(real, extra.side)
    notes += filter(None, [extra.note])
    described = {"id": config.name(name, len(generated.clips)), "covariance": config.rules.covariance, "dim": moments[0].dim}
    if extra.side is not None:
        described["floor"] = {"videos": len(extra.side.clips), "content_sha256": extra.side.digest}
    return report(config, figures, notes, described, extractor, [real, generated], told)


def _floor(config: FrechetConfig, real: Side, generated: Side, more: Side | None) -> Figures:
    """The distance of the real videos from other real ones, which stand for the generated ones.

    Where there are not so many: of one half of them from the other, and beside it that of as many generated ones from a half.
    """
    unbiased, name = config.rules.unbiased, config.rules.figure
    if more is not None:
        ends = real.moments, more.moments
        return {"noise_floor": frechet_distance(*ends, unbiased=unbiased), f"floor_{config.unit}": [end.n for end in ends]}
    if min(len(real.clips), len(generated.clips)) < LEAST_FOR_FLOOR:
        return {}
    return {
        "noise_floor_of_halves": frechet_distance(*real.halves, unbiased=unbiased),
        f"floor_{config.unit}": [half.n for half in real.halves],
        f"{name}_of_halves": frechet_distance(real.halves[0], generated.halves[0], unbiased=unbiased),
        f"half_{config.unit}": [side.halves[0].n for side in (real, generated)],
    }


def _low_floor(real: Side, more: Side | None) -> list[str]:
    """What to know of a floor whose clips are copies of one another, or of the clips that they are compared with."""
    seen: set[int | str | None] = set()
    copied = 0
    for side in (real,) if more is None else (real, more):
        copied = 0  # of the last side: copies among the real clips alone are noted with them
        for own in zip(side.marks.tolist(), side.contents, strict=True):
            copied += not seen.isdisjoint(own)
            seen.update(name for name in own if name is not None)
    if not copied:
        return []
    return [f"{copied} of {len((more or real).clips)} real clips of the noise floor are of videos that are there twice: it is too low"]


def _kernel_figures(config: KvdConfig, extractor: Extractor, real: Side | None, generated: Side | None) -> Figures:
    assert real is not None and generated is not None
    one, two = rows_of(real).flatten(0, 1), rows_of(generated).flatten(0, 1)
    value, deviation = kernel_distance(one, two, subsets=config.subsets, size=config.subset_size, seed=config.seed)
    figures: Figures = {"kvd": value, "kvd_std": deviation}
    if config.bootstrap:
        figures |= dict(
            zip(("kvd_low", "kvd_high"), interval(value, bootstrap_kernel(one, two, config.bootstrap, config.seed)), strict=True)
        )
    described = {
        "id": config.name("kvd", len(generated.clips)),
        "kernel": "(x y / d + 1)^3, unbiased MMD^2",
        "subsets": config.subsets,
        "subset_size": min(config.subset_size, len(one), len(two)),
        "dim": one.shape[1],
    }
    return report(config, figures, [], described, extractor, [real, generated])


def _score_figures(config: VisConfig, extractor: Extractor, side: Side) -> Figures:
    assert side.rows is not None
    probs = probabilities(side.rows)
    shuffle = SHUFFLE_SEED if config.rules.shuffled else None
    value, deviation = inception_score(probs, config.splits, shuffle)
    figures: Figures = {"vis": value, "vis_std": deviation}
    if config.bootstrap:
        resampled = bootstrap_score(probs, config.splits, config.bootstrap, config.seed, shuffle)
        figures |= dict(zip(("vis_low", "vis_high"), interval(value, resampled), strict=True))
    described = {
        "id": config.name("isv", len(side.clips)),
        "splits": config.splits,
        "shuffle": "none" if shuffle is None else f"RandomState({shuffle})",
        "classes": probs.shape[1],
        "outputs": "probabilities" if is_distribution(side.rows) else "logits",
    }
    return report(config, figures, [], described, extractor, [side])


def rows_of(side: Side) -> Tensor:
    """Features (clips, k, dim)."""
    assert side.rows is not None
    return side.rows.unflatten(0, (len(side.clips), -1))
