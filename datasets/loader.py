"""The training stream: batches of clips at addressed positions. It has no state, so a restart begins at any step for free.

Uncompressed clips are read by threads straight into the batch (the kernel copies, no lock is held); compressed clips are decoded
by worker processes, because decoding holds the interpreter's lock too long for a training process.
"""

import itertools
import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.config import DataConfig, resolve
from datasets.order import Order
from datasets.shards import ShardSet, frame_sums
from datasets.video import decode_window
from utils.errors import UserError
from utils.rng import SampleRng

Batch = dict[str, torch.Tensor]
MAX_THREADS = 2


class ClipReader:
    """Reads windows of `n_frames` out of a shard set. Opens files when first read, so that it survives fork and pickling."""

    def __init__(self, shards: ShardSet, n_frames: int) -> None:
        self.shards, self.n_frames = shards, n_frames
        self.files: dict[int, int] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"files": {}}

    def __del__(self) -> None:
        for fd in self.files.values():
            os.close(fd)

    def read(self, samples: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """uint8 (b, t, h, w, c): frames [start, start + t) of each sample. UserError naming shard and key of a bad sample."""
        out = np.empty((len(samples), self.n_frames, *self.shards.size, 3), dtype=np.uint8)
        if self.shards.codec == "npy":
            self._read_raw(samples, starts, out)
        else:
            for row, sample, start in zip(out, samples, starts, strict=True):
                row[:] = self._decode(int(sample), int(start))
        return out

    def _read_raw(self, samples: np.ndarray, starts: np.ndarray, out: np.ndarray) -> None:
        shards, frame_bytes = self.shards, out[0, 0].nbytes
        # Frames end where the member ends; what stands before them is the npy header.
        offsets = shards.offset[samples] + shards.nbytes[samples] + (starts - shards.frames[samples]) * frame_bytes
        # Plain numbers and one flat view: this loop holds the interpreter's lock between the reads.
        clip_bytes, flat = frame_bytes * self.n_frames, out.reshape(-1).data
        for row, (sample, shard, offset) in enumerate(zip(samples.tolist(), shards.shard[samples].tolist(), offsets.tolist(), strict=True)):
            file = self.files.get(shard) or self._open(shard)
            if os.preadv(file, [flat[row * clip_bytes : (row + 1) * clip_bytes]], offset) != clip_bytes:
                raise UserError(f"{shards.describe(sample)} is cut short: copy the shard again or rerun preprocess.py")
        sums = frame_sums(out.reshape(len(out), self.n_frames, frame_bytes))
        rows = (shards.first_sum[samples] + starts)[:, None] + np.arange(self.n_frames)
        bad = np.flatnonzero((sums != shards.sums[rows]).any(axis=1))
        if len(bad):
            raise UserError(f"{shards.describe(samples[bad[0]])} is damaged (checksum): copy the shard again or rerun preprocess.py")

    def _decode(self, sample: int, start: int) -> np.ndarray:
        shards = self.shards
        payload = os.pread(self._open(int(shards.shard[sample])), int(shards.nbytes[sample]), int(shards.offset[sample]))
        if zlib.crc32(payload) != shards.crc32[sample]:
            raise UserError(f"{shards.describe(sample)} is damaged (crc32): copy the shard again or rerun preprocess.py")
        try:
            return decode_window(payload, start, self.n_frames)[:, : shards.size[0], : shards.size[1]]
        except ValueError as error:
            raise UserError(f"{shards.describe(sample)} does not decode: {error}; rerun preprocess.py") from None

    def _open(self, shard: int) -> int:
        if shard not in self.files:
            path = self.shards.folder / self.shards.meta["shards"][shard]["name"]
            try:
                # Two threads may both come here: the one that is late closes its own.
                file = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from None
            if self.files.setdefault(shard, file) != file:
                os.close(file)
        return self.files[shard]


class ClipSource(Dataset[Batch | UserError]):
    """This rank's micro-batches of a shard set (`engine.task.BatchSource`).

    A batch: `video` uint8 (b, c, t, h, w), a view of frames that lie channels last; `label` int64 (b,), 0 when unlabelled;
    `index` int64 (b,), position in the endless sequence. Rank r has the r-th contiguous part of each global batch, cut into
    `accumulation` contiguous micro-batches. Raises ConfigError when a global batch does not divide or exceeds the set.
    """

    def __init__(
        self,
        shards: ShardSet,
        data: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.shards, self.data, self.seed = shards, resolve(data, shards), seed
        self.order = Order(
            shards.num_samples, seed=seed, global_batch=global_batch_size, accumulation=accumulation, rank=rank, world=world_size
        )
        self.reader = ClipReader(shards, self.data.n_frames)
        self.steps_per_epoch = self.order.steps_per_epoch

    def __getitem__(self, number: int) -> Batch | UserError:
        """Micro-batch number `step * accumulation + k`.

        A UserError is returned, not raised: a loader process would wrap it in a traceback.
        """
        indices = self.order.indices(*divmod(number, self.order.accumulation))
        samples = self.order.samples(indices)
        rng = SampleRng(self.seed, torch.from_numpy(indices))
        slack = torch.from_numpy(self.shards.frames[samples] - self.data.n_frames + 1)
        try:
            frames = self.reader.read(samples, rng.integers("data/window", slack).numpy())
        except UserError as error:
            return error
        if self.data.flip:
            mirrored = (rng.uniform("data/flip") < 0.5).numpy()
            frames[mirrored] = frames[mirrored][:, :, :, ::-1]
        return {
            "video": torch.from_numpy(frames).permute(0, 4, 1, 2, 3),
            "label": torch.from_numpy(self.shards.label[samples]),
            "index": torch.from_numpy(indices),
        }

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Micro-batches from `first_step` on, without end, in pinned memory when there is a GPU."""
        numbers = itertools.count(first_step * self.order.accumulation)
        items: Iterator[Batch | UserError] = map(self._pinned, numbers)
        if self.data.num_workers:
            items = self._from_threads(numbers) if self.shards.codec == "npy" else self._from_processes(numbers)
        for item in items:
            if isinstance(item, UserError):
                raise item
            yield item

    def _from_threads(self, numbers: Iterator[int]) -> Iterator[Batch | UserError]:
        # Reading runs at memory speed: more threads than this only contend.
        with ThreadPoolExecutor(min(self.data.num_workers, MAX_THREADS), thread_name_prefix="clips") as pool:
            waiting: deque[Future[Batch | UserError]] = deque()
            try:
                for number in numbers:
                    waiting.append(pool.submit(self._pinned, number))
                    if len(waiting) > self.data.prefetch:
                        yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _pinned(self, number: int) -> Batch | UserError:
        item = self[number]
        if isinstance(item, UserError) or not torch.cuda.is_available():
            return item
        return {name: value.pin_memory() for name, value in item.items()}

    def _from_processes(self, numbers: Iterator[int]) -> Iterator[Batch | UserError]:
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=numbers,
            num_workers=self.data.num_workers,
            prefetch_factor=max(1, self.data.prefetch),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_obey_parent_only,
        )
        yield from loader

    def describe(self, index: int) -> str:
        """Shard and key of the sample at a position, for reports."""
        return self.shards.describe(int(self.order.samples(np.array([index]))[0]))


def _obey_parent_only(worker: int) -> None:
    """In a loader process: signals of a launcher or a terminal, which reach all processes of a run, are left to the parent.

    It still needs its samples to end the step and save. SIGTERM from the parent itself ends the process, as multiprocessing expects.
    """
    numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    if not hasattr(signal, "sigwaitinfo"):  # macOS: no way to tell who sent it
        for number in numbers - {signal.SIGTERM}:
            signal.signal(number, signal.SIG_IGN)
        return

    def serve() -> None:
        while True:
            info = signal.sigwaitinfo(numbers)
            if info.si_signo == signal.SIGTERM and info.si_pid == os.getppid():
                os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    threading.Thread(target=serve, name="signals", daemon=True).start()
