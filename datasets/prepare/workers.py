"""Worker processes that turn source videos into encoded clips, a little ahead of the one writer that asks for them in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import BinaryIO

import torch

from datasets.prepare.clips import ClipRules, Facts, samples
from datasets.prepare.filters import Rejection
from datasets.prepare.writer import Sample
from datasets.sources.base import Video
from datasets.video import VideoError
from utils.errors import UserError

Job = tuple[Video, ClipRules, str | None, Path, int, bool]
"""The arguments of `prepare`."""


IN_MEMORY, IN_MEMORY_ALONE = 16 << 20, 256 << 20
"""Bytes of clips of one video that go to the writer without a file: from each of several workers, and within one process."""


@dataclass(frozen=True)
class Prepared:
    """Clips of one video: for each its sample without payloads and (extension, size) of its members. Their bytes follow each other in
    `payloads`, or in a spool file where they are many."""

    rows: list[tuple[Sample, list[tuple[str, int]], Facts]]
    skipped: tuple[str, str, str] | None = None
    rejected: tuple[Rejection, ...] = ()
    payloads: list[bytes] | None = None


def prepare(
    video: Video, rules: ClipRules, class_name: str | None, spool: Path, in_memory: int = IN_MEMORY, fingerprints: bool = True
) -> Prepared:
    """Decodes a video into clips; `spool` is where they go if they have more than `in_memory` bytes. A video that cannot be used gives
    the reason instead."""
    rows, rejected = [], list[Rejection]()
    held, nbytes = list[bytes](), 0
    with ExitStack() as stack:
        file: BinaryIO | None = None
        try:
            for sample, facts in samples(video, rules, class_name, rejected, fingerprints):
                held += sample.members.values()
                sizes = [(extension, len(payload)) for extension, payload in sample.members.items()]
                rows.append((replace(sample, members={}), sizes, facts))
                nbytes += sum(size for _, size in sizes)
                if nbytes > in_memory:
                    file = file or stack.enter_context(spool.open("wb"))
                    file.writelines(held)
                    held = []
        except VideoError as error:
            return Prepared([], (video.name, error.reason, str(error)), payloads=[])
    return Prepared(rows, rejected=tuple(rejected), payloads=held if file is None else None)


def read_spool(prepared: Prepared, spool: Path) -> Iterator[tuple[Sample, Facts]]:
    """(sample, what is known of it) for each clip of a video."""
    with ExitStack() as stack:
        pieces: Iterator[bytes]
        if prepared.payloads is None:
            file = stack.enter_context(spool.open("rb"))
            pieces = (file.read(size) for _, sizes, _ in prepared.rows for _, size in sizes)
        else:
            pieces = iter(prepared.payloads)
        for sample, sizes, facts in prepared.rows:
            yield replace(sample, members={extension: next(pieces) for extension, _ in sizes}), facts


def _start_worker(stop: Connection) -> None:
    """Workers leave Ctrl-C to the parent, use one core each, and end when the parent is killed or closes its end of `stop`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel, stop])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until a worker has been started: one that is started by halves would complain. The worker itself never hears it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned workers that are gone at once when the block is left, whatever they were doing."""
    context = multiprocessing.get_context("spawn")
    stop_reader, stop_writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(stop_reader,))
    try:
        yield pool
    finally:
        stop_writer.close()
        pool.shutdown(cancel_futures=True)
        stop_reader.close()


def prepare_all(
    videos: list[Video], numbers: range, rules: ClipRules, classes: list[str], folder: Path, workers: int, fingerprints: bool = True
) -> Iterator[tuple[int, Prepared, Path]]:
    """(number, clips, spool file) of the videos of these numbers, in order, prepared by `workers` processes a little ahead."""
    in_memory = IN_MEMORY_ALONE if workers <= 1 else IN_MEMORY

    def job(number: int) -> Job:
        video = videos[number]
        return video, rules, classes[video.label] if classes else None, _spool(folder, number), in_memory, fingerprints

    if workers <= 1:
        yield from ((number, prepare(*job(number)), _spool(folder, number)) for number in numbers)
        return
    while numbers:
        try:
            for number, prepared in _in_order(numbers, job, workers):
                yield number, prepared, _spool(folder, number)
                numbers = numbers[1:]
        except BrokenProcessPool:
            # Nobody knows which of those that were in work it was: each of them is tried alone.
            for number in numbers[: 2 * workers + 1]:
                yield number, _alone(*job(number)), _spool(folder, number)
                numbers = numbers[1:]


def _in_order(numbers: range, job: Callable[[int], Job], workers: int) -> Iterator[tuple[int, Prepared]]:
    """(number, clips) in order, with a few videos in work ahead. BrokenProcessPool when a worker dies."""
    ahead: deque[tuple[int, Future[Prepared]]] = deque()
    with worker_pool(workers) as pool:
        for number in numbers:
            with _undisturbed():
                ahead.append((number, pool.submit(prepare, *job(number))))
            if len(ahead) > 2 * workers:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()


def _alone(video: Video, *rest: object) -> Prepared:
    """Prepares one video in a process of its own: when a decoder crashes on it, it is left out. UserError when it was killed."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    stop_reader, stop_writer = context.Pipe(duplex=False)
    process = context.Process(target=_prepare_and_send, args=(sender, stop_reader, video, *rest))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        trouble = f"the process ended with {_signal_name(process.exitcode)}"
        result = Prepared([], (video.name, "crashes the decoder", trouble), payloads=[])
        if process.exitcode == -signal.SIGKILL:
            raise UserError(
                f"the process that prepared {video.name} was killed, probably for lack of memory: "
                "run the same command again on a machine with more, or without the file"
            ) from None
    finally:
        stop_writer.close()
        process.join()
    if isinstance(result, OSError):
        raise result
    return result


def _prepare_and_send(sender: Connection, stop: Connection, *job: *Job) -> None:
    _start_worker(stop)
    try:
        sender.send(prepare(*job))
    except OSError as error:
        sender.send(error)


def _signal_name(exitcode: int | None) -> str:
    return signal.Signals(-exitcode).name if exitcode and exitcode < 0 else f"status {exitcode}"


def _spool(folder: Path, number: int) -> Path:
    return folder / f"{number}.spool"
