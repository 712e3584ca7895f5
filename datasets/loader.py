"""The training stream: batches of clips at addressed positions. It has no state, so a restart begins at any step for free.

Uncompressed clips are read by threads straight into the batch (the kernel copies, no lock is held); compressed clips are decoded
by worker processes, because decoding holds the interpreter's lock too long for a training process.
"""

import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.config import DataConfig, resolve
from datasets.faults import Fault, FaultLog
from datasets.loader_process import check_temporary, obey_parent_only
from datasets.lookahead import Lookahead
from datasets.mixture import Collection
from datasets.order import Order
from datasets.pairs import PairReader
from datasets.picks import Picker, Picks, places
from datasets.reader import ClipReader
from datasets.shards import ShardSet
from datasets.strides import StrideReader, open_strides
from datasets.triples import Take, open_frames
from utils.errors import ConfigError, UserError
from utils.rng import SampleRng

Batch = dict[str, torch.Tensor]
Item = tuple[Batch, list[Fault]] | UserError
"""A micro-batch and the bad samples that were replaced in it; or why there is none."""
Reader = ClipReader | PairReader | StrideReader
MAX_THREADS = 2
MAX_ATTEMPTS = 64
"""Substitutes that are tried for a bad sample."""


class ClipSource(Dataset[Item]):
    """This rank's micro-batches of one or more shard sets (`engine.task.BatchSource`).

    A batch: `video` uint8 (b, c, t, h, w), a view of frames that lie channels last, or of latent sets their tensors by name
    (b, *shape) in the stored type; `label` int64 (b,), 0 when unlabelled; `index` int64 (b,), position in the endless sequence;
    `cond` float32 (b, numbers) where condition vectors are stored.
    With `data.previous` twice as many frames, of which the clip is the second half, and `has_previous` bool (b,): false where the
    first half is black for want of frames. With `strides` also `stride` int64 (b,), which of them its frames are apart. With `take`
    "first" the first frame alone of a window of `data.n_frames`; with "triple" three frames of it, the first, the one before the r-th
    and the r-th, and `frame` int64 (b,), which is r, any of 1 to n_frames - 1. With `data.images` also `images`, as many frames of
    other clips in place of t, and `image_label` int64 (b, images).
    Rank r has the r-th contiguous part of each global batch, cut into `accumulation` contiguous micro-batches. Raises ConfigError
    when a global batch does not divide or exceeds the set. Bad samples are errors, or replaced, as `data.on_bad_sample` says.
    """

    def __init__(
        self,
        shards: Collection | ShardSet,
        data: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        strides: Sequence[int] = (),
        take: Take = "window",
    ) -> None:
        """`strides`: distances of frames, one of which each sample draws, in place of `data.frame_interval`; `take`: what of a window."""
        self.shards = shards = Collection.over(shards)
        self.data, self.seed = resolve(data, shards), seed
        window = self.data.shuffle_shards if self.data.shuffle == "block" else 0
        self.ahead = shards.check_cache(window or 1)
        share = self.data.frame_sample_prob
        single = shards.single_frames(share, seed) if share else None
        self.order = Order(
            shards.sequence(seed, self.data.weights, window, single),
            global_batch=global_batch_size,
            accumulation=accumulation,
            rank=rank,
            world=world_size,
            shard=None if not window else shards.shard if single is None else shards.shard[single.sample],
        )
        self.reader = _reader(shards, self.data, strides, take)
        self.image_reader = ClipReader(shards, 1, handles=self.reader.handles)
        self.picker = Picker(self.order, self.reader, seed, single)
        self.faults = FaultLog(shards, self.data.max_bad_share, rank=rank) if self.data.on_bad_sample == "skip" else None
        self.steps_per_epoch = self.order.steps_per_epoch

    def __getitem__(self, number: int) -> Item:
        """Micro-batch number `step * accumulation + k`.

        A UserError is returned, not raised: a loader process would wrap it in a traceback.
        """
        indices = self.order.indices(*divmod(number, self.order.accumulation))
        try:
            batch, faults = self._clips(indices)
            if self.data.images:
                images, more = self._images(indices)
                batch |= images
                faults += more
        except UserError as error:
            return error
        batch["index"] = torch.from_numpy(indices)
        return batch, faults

    def _clips(self, indices: np.ndarray) -> tuple[Batch, list[Fault]]:
        """The clips at these positions, and the bad ones that others were put in place of."""

        def pick(rows: np.ndarray, attempt: int) -> Picks:
            return self.picker.clips(indices[rows], attempt)

        form = self.shards.cond
        vectors = np.empty((len(indices), form.values), dtype=np.float32) if form else None
        samples, starts, stored, faults = self._read(self.reader, len(indices), pick, vectors)
        batch = self._tensors(stored, self._mirrored("data/flip", indices))
        if vectors is not None:
            batch["cond"] = torch.from_numpy(vectors)
        return batch | self.reader.beside(samples, starts) | {"label": torch.from_numpy(self.shards.label[samples])}, faults

    def _images(self, indices: np.ndarray) -> tuple[Batch, list[Fault]]:
        """The images beside the clips at these positions, and the bad ones that others were put in place of."""
        shape = len(indices), self.data.images
        positions, slots = places(indices, self.data.images)

        def pick(rows: np.ndarray, attempt: int) -> Picks:
            return self.picker.images(positions[rows], slots[rows], attempt)

        samples, _, stored, faults = self._read(self.image_reader, len(positions), pick)
        columns = [self._mirrored(f"data/image/{slot}/flip", indices) for slot in range(self.data.images)]
        (images,) = self._tensors(stored.reshape(*shape, -1), np.stack(columns, axis=1)).values()
        return {"images": images, "image_label": torch.from_numpy(self.shards.label[samples].reshape(shape))}, faults

    def _read(
        self, reader: Reader, count: int, pick: Callable[[np.ndarray, int], Picks], vectors: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Fault]]:
        """Samples of `count` rows, where their windows begin, what is stored of them, uint8 (count, frames, bytes), and those that others
        were put in place of.

        `pick(rows, attempt)`: what is read into these rows; `vectors` is filled with their condition vectors.
        """
        samples, starts, out = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64), reader.empty(count)
        wanted, found = np.arange(count), list[Fault]()
        for attempt in range(MAX_ATTEMPTS):
            samples[wanted], starts[wanted] = pick(wanted, attempt)
            faults = reader.fill(out, wanted, samples[wanted], starts[wanted])
            if vectors is not None:
                good = np.delete(np.arange(len(wanted)), [k for k, _ in faults])
                faults += [(good[k], fault) for k, fault in reader.fill_vectors(vectors, wanted[good], samples[wanted[good]])]
            if not faults:
                return samples, starts, out, found
            if self.faults is None:
                raise UserError(faults[0][1].text)
            found += [fault for _, fault in faults]
            wanted = wanted[[k for k, _ in faults]]
        raise UserError(f"no good sample in {MAX_ATTEMPTS} attempts to replace a bad one; the last: {faults[0][1].text}")

    def _mirrored(self, stream: str, indices: np.ndarray) -> np.ndarray:
        """Whether what stands at these positions is mirrored, bool (b,)."""
        if not self.data.flip:
            return np.zeros(len(indices), dtype=bool)
        return (SampleRng(self.seed, torch.from_numpy(indices)).uniform(stream) < 0.5).numpy()

    def _tensors(self, stored: np.ndarray, mirrored: np.ndarray) -> Batch:
        """Stored bytes (b, rows, bytes) as tensors: clips or their frames mirrored, or latents by name."""
        if self.shards.is_latent:
            return self.reader.split(stored)
        frames = stored.reshape(*stored.shape[:2], *self.shards.size, 3)
        if mirrored.any():
            frames[mirrored] = frames[mirrored][..., ::-1, :]
        return {"video": torch.from_numpy(frames).permute(0, 4, 1, 2, 3)}

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Micro-batches from `first_step` on, without end, in pinned memory when there is a GPU.

        Under `on_bad_sample = "skip"` a UserError ends the stream when more are bad than `max_bad_share`.
        """
        numbers = itertools.count(first_step * self.order.accumulation)
        items: Iterator[Item] = map(self._pinned, numbers)
        if self.data.num_workers:
            items = self._from_processes(numbers) if self.shards.packed.any() else self._from_threads(numbers)
        with ExitStack() as stack:
            # After the loader's processes: a fork should not meet threads that may hold locks.
            ahead = stack.enter_context(closing(self._lookahead(first_step))) if self.shards.is_remote else None
            for number, item in enumerate(items, start=first_step * self.order.accumulation):
                if isinstance(item, UserError):
                    raise item
                batch, faults = item
                if self.faults is not None:
                    self.faults.record(len(batch["index"]) * (1 + self.data.images), faults)
                if ahead is not None:
                    ahead.reached(number // self.order.accumulation)
                yield batch

    def counters(self) -> dict[str, int | frozenset[str]]:
        """`data/bad_samples`: samples replaced by this rank so far; `data/bad_shards`: names of the bad shards it knows of."""
        return {} if self.faults is None else self.faults.counters()

    def describe(self, index: int) -> str:
        """Shard and key of the sample at a position, for reports."""
        samples, frames = self.picker.clips(np.array([index]))
        which = f" frame {frames[0]}" if self.data.frame_sample_prob else ""
        return self.shards.describe(int(samples[0])) + which

    def _lookahead(self, first_step: int) -> Lookahead:
        shards = self.shards

        def fetch(shard: int) -> None:
            os.close(shards.open_shard(shard))

        def wanted(step: int) -> np.ndarray:
            share = self.order.share(step)
            samples, _ = self.picker.images(*places(share, self.data.images))
            return shards.shard[np.concatenate([self.picker.clips(share)[0], samples])]

        return Lookahead(self.order, wanted, fetch, first_step=first_step, ahead=self.ahead, bad=frozenset(shards.bad))

    def _from_threads(self, numbers: Iterator[int]) -> Iterator[Item]:
        # Reading runs at memory speed: more threads than this only contend.
        pool = ThreadPoolExecutor(min(self.data.num_workers, MAX_THREADS), thread_name_prefix="clips")
        waiting: deque[Future[Item]] = deque()
        try:
            for number in numbers:
                waiting.append(pool.submit(self._pinned, number))
                if len(waiting) > self.data.prefetch:
                    yield waiting.popleft().result()
        finally:
            # A thread may be waiting for a store that stalls: the end of a run does not.
            pool.shutdown(wait=False, cancel_futures=True)

    def _pinned(self, number: int) -> Item:
        item = self[number]
        if isinstance(item, UserError) or not torch.cuda.is_available():
            return item
        return {name: value.pin_memory() for name, value in item[0].items()}, item[1]

    def _from_processes(self, numbers: Iterator[int]) -> Iterator[Item]:
        """The processes start now, not when the first item is asked for. Raises ConfigError where they could hand nothing over."""
        check_temporary()
        return iter(
            DataLoader(
                self,
                batch_size=None,
                sampler=numbers,
                num_workers=self.data.num_workers,
                prefetch_factor=max(1, self.data.prefetch),
                pin_memory=torch.cuda.is_available(),
                # They share the memory of the indices, and have this process for a parent; Python 3.14 would do otherwise.
                multiprocessing_context="fork" if sys.platform == "linux" else None,
                worker_init_fn=obey_parent_only,
                collate_fn=_as_is,
            )
        )


def _reader(shards: Collection, data: DataConfig, strides: Sequence[int], take: Take) -> Reader:
    """What reads the clips of a stream. Raises ConfigError for distances, or frames of windows, that it cannot have."""
    if take != "window":
        assert not strides
        return open_frames(shards, data, take)
    if data.window_step:
        raise ConfigError(
            f"--window-step {data.window_step}: this stage takes clips of neighbouring frames that begin anywhere; drop the flag"
        )
    if strides:
        return open_strides(shards, data, strides)
    if data.previous:
        return PairReader(shards, data.n_frames, interval=data.frame_interval)
    return ClipReader(shards, data.n_frames, interval=data.frame_interval, rule=data.clip_rule)


def _as_is(item: Any) -> Any:
    """A loader process hands on what `__getitem__` gave."""
    return item
