"""Streams of shards that are fetched: the same batches as from disk, shards fetched ahead of their time and once, trouble named."""

import shlex
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets.config import DataConfig, open_shards, resolve
from datasets.loader import ClipSource
from datasets.lookahead import Lookahead
from datasets.order import Order, Shuffled
from tests.shard_sets import crc, spoil, write_set
from utils.errors import ConfigError, UserError

SHARDS = [6, 5, 7, 6, 4, 8, 6, 6]


class Store:
    """A shard set behind a command that notes what it is asked for."""

    def __init__(self, folder: Path, **kind: Any) -> None:
        self.folder, self.log, self.cache = write_set(folder / "set", SHARDS, lengths=(4,), **kind), folder / "log", folder / "cache"
        self.log.touch()
        self.location = f"pipe:echo {{}} >> {shlex.quote(str(self.log))}; cat {shlex.quote(str(self.folder))}/{{}}"

    def data(self, **more: Any) -> DataConfig:
        given: dict[str, Any] = {
            "path": (self.location,),
            "num_workers": 0,
            "shuffle_shards": 2,
            "cache_dir": str(self.cache),
            "flip": True,
        }
        return DataConfig(**given | {"fetch_retries": 0, "fetch_timeout": 20.0, "n_frames": 2} | more)

    def source(self, batch: int = 8, **more: Any) -> ClipSource:
        cut = {name: more.pop(name) for name in ("rank", "world_size") if name in more}
        data = self.data(**more)
        return ClipSource(open_shards(data), data, seed=4, global_batch_size=batch, **cut)

    def fetched(self) -> Counter[str]:
        """Tars that were asked for."""
        return Counter(line for line in self.log.read_text().split() if line.endswith(".tar"))


def take(stream: ClipSource, first: int, count: int) -> list[int]:
    batches = stream.batches(first)
    found = [crc(batch) for batch in islice(batches, count)]
    batches.close()  # type: ignore[attr-defined]
    return found


def fetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fetch-")]


def until(condition: Any, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.parametrize(("kind", "workers"), [({}, 0), ({}, 2), ({"codec": "mp4", "size": (16, 16)}, 1)])
def test_batches_are_those_of_the_local_set_and_each_shard_is_fetched_once(tmp_path: Path, kind: dict[str, Any], workers: int) -> None:
    store = Store(tmp_path, **kind)
    local = store.source(path=(str(store.folder),), shuffle="block")
    want = take(local, 3, 9)
    assert store.source().data.shuffle == "block" and store.source(path=(str(store.folder),)).data.shuffle == "full"
    for rank in range(2):
        one = store.source(path=(str(store.folder),), shuffle="block", rank=rank, world_size=2)
        assert take(store.source(rank=rank, world_size=2, num_workers=workers), 3, 9) == take(one, 3, 9)
    assert take(store.source(num_workers=workers), 3, 9) == want
    assert until(lambda: not fetchers()), "the threads end with the stream"
    assert set(store.fetched().values()) == {1}, "the ranks of a machine and all their processes share a cache"


def test_coming_shards_are_fetched_before_they_are_wanted_but_not_all(tmp_path: Path) -> None:
    store = Store(tmp_path)
    stream = store.source(batch=4)
    batches = stream.batches(0)
    next(batches)
    # Two shards are in use and two may be fetched ahead.
    assert until(lambda: len(store.fetched()) == 4)
    time.sleep(0.7)
    assert len(store.fetched()) == 4
    order = stream.order
    coming = [
        int(shard) for step in range(order.steps_per_epoch) for shard in np.unique(stream.shards.shard[order.samples(order.share(step))])
    ]
    first = {f"shard-{shard:05d}.tar" for shard in list(dict.fromkeys(coming))[:4]}
    assert set(store.fetched()) == first
    for _ in range(5):
        next(batches)
    assert until(lambda: len(store.fetched()) >= 5)
    assert fetchers()
    batches.close()  # type: ignore[attr-defined]
    assert until(lambda: not fetchers())


def test_a_cache_without_room_for_the_shards_in_use_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    size = max(path.stat().st_size for path in store.folder.glob("*.tar"))
    assert store.source(cache_gib=3.2 * size / 2**30).ahead == 1
    assert store.source().ahead == 2
    with pytest.raises(ConfigError, match=r"--cache-gib") as caught:
        store.source(cache_gib=1.2 * size / 2**30)
    assert "\n" not in str(caught.value)
    # A cache that holds little more than what is in use gives the same batches.
    tight = store.source(cache_gib=3.2 * size / 2**30, cache_dir=str(tmp_path / "tight"))
    assert take(tight, 0, 12) == take(store.source(), 0, 12)
    assert sum(path.stat().st_size for path in (tmp_path / "tight").iterdir()) <= 3.2 * size


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_shard_that_cannot_be_fetched_is_fatal_or_skipped(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    tar = store.folder / "shard-00004.tar"
    if damage == "gone":
        tar.unlink()
    elif damage == "cut":
        tar.write_bytes(tar.read_bytes()[:-512])
    else:
        spoil(store.folder, 24)
    with pytest.raises(UserError, match=r"shard-00004.tar") as caught:
        take(store.source(), 0, 12)
    assert "\n" not in str(caught.value)
    skipping = store.source(on_bad_sample="skip", max_bad_share=0.5)
    found = take(skipping, 0, 12)
    counters = skipping.counters()
    assert len(found) == 12 and counters["data/bad_samples"] >= 4
    assert [name.count("shard-00004.tar") > 0 for name in counters["data/bad_shards"]] == [True]  # type: ignore[union-attr]
    assert take(store.source(on_bad_sample="skip", max_bad_share=0.5), 6, 6) == found[6:]


def test_a_store_that_stalls_is_given_up_and_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    stalling = f"pipe:case {{}} in *.tar) sleep 60;; *) cat {shlex.quote(str(store.folder))}/{{}};; esac"
    stream = store.source(path=(stalling,), fetch_timeout=0.5)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"shard-0000\d.tar.*: no bytes for 0.5 s"):
        take(stream, 0, 1)
    assert time.monotonic() - started < 10


def test_a_stream_ends_at_once_while_the_store_stalls(tmp_path: Path) -> None:
    store = Store(tmp_path)
    order = store.source(batch=4).order
    shard = open_shards(store.data()).shard
    last = f"shard-{shard[order.samples(np.arange(48))][-1]:05d}.tar"
    stalling = store.location.replace("; cat", f"; [ {{}} = {last} ] && sleep 60; cat")
    batches = store.source(batch=4, path=(stalling,), num_workers=2, prefetch=12, fetch_timeout=4.0).batches(0)
    next(batches)
    assert until(lambda: last in store.fetched())
    time.sleep(0.5)
    started = time.monotonic()
    batches.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 2


def test_lookahead_survives_trouble_and_ends_while_it_waits() -> None:
    shard = np.repeat(np.arange(12), 4)
    order = Order(Shuffled(48, seed=0, shard=shard, window=3), global_batch=4, shard=shard)
    asked: list[int] = []

    def fetch(number: int) -> None:
        asked.append(number)
        if number % 2:
            raise UserError("not there")

    ahead = Lookahead(order, lambda step: shard[order.samples(order.share(step))], fetch, first_step=0, ahead=3, bad={5})
    for step in range(1, 12):
        ahead.reached(step)
        time.sleep(0.01)
    assert until(lambda: set(asked) >= set(range(12)) - {5}) and 5 not in asked
    ahead.close()
    assert until(lambda: not fetchers())


def test_resolve_says_block_only_where_shards_are_fetched(tmp_path: Path) -> None:
    store = Store(tmp_path)
    mixed = store.data(path=(store.location, str(write_set(tmp_path / "other", [4], lengths=(4,)))))
    assert resolve(mixed, open_shards(mixed)).shuffle == "block"
    assert resolve(store.data(shuffle="full"), open_shards(store.data())).shuffle == "full"
