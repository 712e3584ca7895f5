"""What a network says of the clips of one side: computed in blocks by all ranks, kept block by block, summed up in one order.

The result is the same, to the last bit, for any number of processes, and after an interruption; a network that rounds otherwise in
batches of another size is all that the batch size changes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from evaluation.clips import Clips, Look, raise_together
from evaluation.extractors import Extractor
from evaluation.store import FeatureStore, cache_folder
from evaluation.versions import package_versions
from launch.env import Env, Stopped
from metrics.frechet import Moments, update_halves
from utils.errors import UserError
from utils.rng import hash_indices

Batch = tuple[list[Look], Tensor]
"""What is seen of each clip, uint8 b 3 t h w."""
Compute = Callable[[Tensor, range], Tensor]
"""(uint8 b 3 t h w, their places) -> rows (b k, dim), k of each in their order."""
BLOCK = 32
"""Clips of a block: whose features one rank computes at a time, and of what an interruption loses at most one a rank."""


@dataclass(frozen=True)
class Reading:
    """How clips become features, which changes no feature."""

    batch_size: int = BLOCK
    """Clips at a time."""
    threads: int = 4
    cache: str | None = ""
    """Folder; empty: the user's own; None: nothing is kept."""


@dataclass(frozen=True)
class Side:
    """What came of one side."""

    clips: Clips
    digest: str | None
    """Of the clips' content."""
    halves: tuple[Moments, Moments]
    """Of two halves of the clips that a seed draws."""
    rows: Tensor | None
    """All features (clips x k, dim) float32 in the order of the clips, where they were asked for."""
    change: float
    """Mean absolute difference of consecutive frames, on [0, 1]; the mean over the clips."""
    static: float
    """Share of pixel values that hardly change from frame to frame."""
    marks: Tensor
    """(clips,) int64, of their pixels."""
    contents: list[str | None]
    """Digests of their videos."""

    @property
    def unique(self) -> int:
        """Clips of which no two are equal."""
        return len(self.marks.unique())

    @property
    def moments(self) -> Moments:
        """Of all clips."""
        return Moments.union(self.halves)


def measure_side(clips: Clips, extractor: Extractor, env: Env, reading: Reading, seed: int, *, keep_rows: bool = False) -> Side | None:
    """Features of all clips, on rank 0; the others work along and get None.

    Raises Stopped after a signal, AgreedError where a clip that is not made cannot be read.

    `seed`: of the halves. To be called by all ranks.
    """
    contents = clips.contents(env)
    digest = clips.digest(contents)
    store = open_store(digest, {"network": nameless(extractor)}, env, reading)
    kept = store.read(f"moments-{seed}") if store is not None and env.is_main and not keep_rows else None
    if _agreed(kept is not None, env):
        return _from_kept(clips, contents, kept) if kept is not None else None
    found = blocks(clips, lambda videos, _: extractor(videos), env, reading, store)
    side = _summed(clips, contents, found, seed, keep_rows, env)
    if store is not None and side is not None:
        store.write(f"moments-{seed}", _to_keep(side), {"protocol": clips.protocol.name, "role": clips.role})
    return side


def nameless(extractor: Extractor) -> dict[str, Any]:
    """All of a network's identity but what its file is called."""
    return {name: value for name, value in extractor.identity().items() if name != "file"}


def open_store(digest: str | None, about: Mapping[str, Any], env: Env, reading: Reading) -> FeatureStore | None:
    """Where blocks of the clips of that digest are kept, if they are. `about`: plain values, all else that they depend on."""
    if reading.cache is None or digest is None:
        return None
    shared = {"clips": digest, "device": env.device.type, "block": BLOCK, "versions": package_versions()}
    return FeatureStore(cache_folder(reading.cache), {**shared, **about})


def _agreed(answer: bool, env: Env) -> bool:
    """Rank 0's answer, on all ranks."""
    if env.world_size == 1:
        return answer
    answers = [answer]
    dist.broadcast_object_list(answers)
    return answers[0]


@dataclass(frozen=True)
class Block:
    """Features and looks of consecutive clips."""

    number: int
    rows: Tensor
    """(clips x k, dim) float32."""
    looks: Tensor
    """(clips, 2) float64: change and static."""
    marks: Tensor
    """(clips,) int64."""

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows, "looks": self.looks, "marks": self.marks}


def blocks(clips: Clips, compute: Compute, env: Env, reading: Reading, store: FeatureStore | None) -> Iterator[Block]:
    """All blocks in order, on rank 0; the others compute their share and get none. To be iterated to the end by all ranks.

    An interruption leaves blocks from the first one on, which are read once. Those behind a gap, as damage leaves it, are read before,
    to know what is to be computed, and when it is their turn.
    """
    count, first = -(-len(clips) // BLOCK), 0
    while env.is_main and first < count and (block := _stored(store, first, clips)) is not None:
        yield block
        first += 1
    behind = [n for n in range(first + 1, count) if _stored(store, n, clips) is not None] if env.is_main else []
    there = [*range(first), *behind]
    if env.world_size > 1:
        dist.broadcast_object_list(told := [there])
        there = told[0]
    present = set(there)
    made = _made(clips, compute, env, reading, store, [number for number in range(count) if number not in present])
    if not env.is_main:
        yield from made
        return
    for number in range(first, count):
        block = _stored(store, number, clips) if number in present else next(made)
        if block is None:
            raise UserError(f"{store.folder if store else ''}: block {number} was removed while it was used; start the same command again")
        assert block.number == number
        yield block
    for _ in made:
        raise AssertionError("a block too many")


def _stored(store: FeatureStore | None, number: int, clips: Clips) -> Block | None:
    found = store.read(f"{number:05d}") if store is not None else None
    return None if found is None else Block(number, found["rows"], found["looks"], found["marks"])


def _places(number: int, clips: Clips) -> range:
    return range(number * BLOCK, min((number + 1) * BLOCK, len(clips)))


def _made(clips: Clips, compute: Compute, env: Env, reading: Reading, store: FeatureStore | None, missing: list[int]) -> Iterator[Block]:
    """Blocks that are computed, in order on rank 0: in each round every rank computes one, of clips that all make where they are made."""
    shared = clips.videos.made and env.world_size > 1
    mine = missing[env.rank :: env.world_size]
    size = min(reading.batch_size, BLOCK)
    batches = [list(places[start : start + size]) for places in (_places(n, clips) for n in mine) for start in range(0, len(places), size)]
    total = sum(len(_places(n, clips)) for n in missing) if shared else sum(map(len, batches))
    whose = "videos" if shared else "videos of rank 0"
    with tqdm(total=total, desc=f"{clips.role} {whose}", unit="video", disable=None if env.is_main else True) as bar:
        read = _counted(clips.batches(batches, reading.threads), bar)
        for first in range(0, len(missing), env.world_size):
            numbers = missing[first : first + env.world_size]
            if shared:
                read = iter(_shared(clips, numbers, size, env, bar))
            block, wrong = None, None
            try:
                if env.rank < len(numbers):
                    block = _computed(numbers[env.rank], _places(numbers[env.rank], clips), read, compute, env)
            except UserError as error:
                wrong = error
            raise_together(wrong, env)
            for found in _gathered(block, env):
                if store is not None:
                    store.write(f"{found.number:05d}", found.tensors())
                yield found


def _counted(read: Iterator[Batch], bar: "tqdm[None]") -> Iterator[Batch]:
    for seen, videos in read:
        bar.update(len(seen))
        yield seen, videos


def _shared(clips: Clips, numbers: list[int], size: int, env: Env, bar: "tqdm[None]") -> list[Batch]:
    """Batches of the block of this rank, if it has one of these blocks, one a rank. All ranks make clips of all blocks.

    One clip takes minutes where a network makes it. So no rank waits for another longer than one clip takes, nor idles for a whole block.
    """
    own: list[tuple[Tensor, Look]] = []
    for owner, number in enumerate(numbers):
        places = _places(number, clips)
        for start in range(0, len(places), env.world_size):
            turn = places[start : start + env.world_size]
            made = clips.see(turn[env.rank]) if env.rank < len(turn) else None
            gathered: list[Any] | None = [None] * env.world_size if env.rank == owner else None
            dist.gather_object(made, gathered, dst=owner)
            own += (gathered or [])[: len(turn)]
            bar.update(len(turn))
            if env.stop:
                raise Stopped(agreed=False)
    places = _places(numbers[env.rank], clips) if own else range(0)
    return [clips.batch(own[start : start + size], places[start : start + size]) for start in range(0, len(own), size)]


def _computed(number: int, places: range, read: Iterator[Batch], compute: Compute, env: Env) -> Block:
    """One block, from as many batches as it takes."""
    looks: list[Look] = []
    rows: list[Tensor] = []
    while len(looks) < len(places):
        seen, videos = next(read)
        rows.append(compute(videos, places[len(looks) :][: len(seen)]).float().cpu())
        assert len(rows[-1]) and len(rows[-1]) % len(seen) == 0, f"{len(rows[-1])} rows of {len(seen)} videos"
        looks += seen
        if env.stop:
            raise Stopped(agreed=False)
    figures = torch.tensor([(one.change, one.static) for one in looks], dtype=torch.float64)
    return Block(number, torch.cat(rows), figures, torch.tensor([one.mark for one in looks]))


def _gathered(block: Block | None, env: Env) -> list[Block]:
    """The blocks of all ranks, on rank 0, in their order."""
    if env.world_size == 1:
        return [block] if block is not None else []
    gathered: list[Block | None] = [None] * env.world_size
    dist.all_gather_object(gathered, block)
    return [found for found in gathered if found is not None] if env.is_main else []


def halves(count: int, seed: int) -> np.ndarray:
    """bool (count,): which clips are in the first half, count // 2 of them."""
    first = np.zeros(count, dtype=bool)
    first[np.argsort(hash_indices(seed, "half", np.arange(count)), kind="stable")[: count // 2]] = True
    return first


def _summed(clips: Clips, contents: list[str | None], found: Iterator[Block], seed: int, keep_rows: bool, env: Env) -> Side | None:
    """Sums up blocks as they come; on rank 0."""
    half = halves(len(clips), seed)
    parts: list[Moments] = []
    rows, looks, marks = [], [], []
    for block in found:
        parts = parts or [Moments(block.rows.shape[1]) for _ in range(2)]
        update_halves((parts[0], parts[1]), block.rows, half[_places(block.number, clips).start :][: len(block.marks)])
        looks.append(block.looks)
        marks.append(block.marks)
        if keep_rows:
            rows.append(block.rows)
    if not env.is_main:
        return None
    seen = torch.cat(looks).mean(dim=0)
    whole = torch.cat(marks)
    assert len(whole) == len(clips), f"{len(whole)} videos were measured, {len(clips)} are there"
    kept = torch.cat(rows) if keep_rows else None
    digest = clips.digest(contents)
    return Side(clips, digest, (parts[0], parts[1]), kept, float(seen[0]), float(seen[1]), whole, contents)


def _to_keep(side: Side) -> dict[str, Tensor]:
    tensors = {"seen": torch.tensor([side.change, side.static], dtype=torch.float64), "marks": side.marks}
    for name, half in zip("ab", side.halves, strict=True):
        tensors |= {f"{name}.{label}": value for label, value in half.state().items()}
    return tensors


def _from_kept(clips: Clips, contents: list[str | None], kept: dict[str, Tensor]) -> Side:
    first, second = (
        Moments.from_state({label[2:]: value for label, value in kept.items() if label.startswith(f"{name}.")}) for name in "ab"
    )
    change, static = kept["seen"].tolist()
    return Side(clips, clips.digest(contents), (first, second), None, change, static, kept["marks"], contents)
