"""A stream cut over ranks, micro-batches, workers and stops, and put together again."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from hypothesis import strategies as st

from datasets.config import DataConfig
from datasets.loader import ClipSource
from datasets.mixture import Collection

Batches = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Cut:
    """How a global batch is divided and loaded."""

    batch: int
    world: int
    accumulation: int
    workers: int


def draw_cut(data: st.DataObject, n: int) -> Cut:
    """A random one for a set of `n` samples."""
    world = data.draw(st.sampled_from([w for w in (1, 2, 4, 8) if w <= n]))
    accumulation = data.draw(st.sampled_from([k for k in (1, 2) if k * world <= n]))
    batch = world * accumulation * data.draw(st.integers(1, n // (world * accumulation)))
    return Cut(batch, world, accumulation, data.draw(st.sampled_from([0, 1, 4])))


def take(shards: Collection, data: DataConfig, first: int, steps: int, **cut: int) -> Batches:
    """Micro-batches of `steps` steps from `first` on."""
    stream = ClipSource(shards, data, seed=5, **cut).batches(first)
    found = list(islice(stream, steps * cut.get("accumulation", 1)))
    stream.close()  # type: ignore[attr-defined]
    return found


def joined(shards: Collection, settings: dict[str, Any], cut: Cut, first: int, steps: int) -> Batches:
    """The global batches of `steps` steps, put together from what all ranks get."""
    data = DataConfig(num_workers=cut.workers, **settings)
    given = {"global_batch_size": cut.batch, "accumulation": cut.accumulation, "world_size": cut.world}
    parts = [take(shards, data, first, steps, rank=rank, **given) for rank in range(cut.world)]
    assert {len(part) for part in parts} == {steps * cut.accumulation}, "as many batches on every rank"
    places = [[part[step * cut.accumulation + k] for part in parts for k in range(cut.accumulation)] for step in range(steps)]
    return [{name: torch.cat([batch[name] for batch in step]) for name in step[0]} for step in places]


def equal(one: Batches, other: Batches) -> bool:
    """Whether they hold the same keys and values."""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, other, strict=True)
    )


def replaced(source: ClipSource) -> int:
    """Bad samples that others were put in place of so far."""
    found = source.counters()["data/bad_samples"]
    assert isinstance(found, int)
    return found
