"""What a run leaves to read: log.txt, metrics.jsonl, heartbeat.json, TensorBoard, samples/, and the lines or the bar on the terminal.

A file that cannot be written, as on a full disk, is reported once and given up: the run is worth more than its records.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from torch import Tensor
from tqdm import tqdm

from engine.config import SCORE, LogConfig
from engine.heartbeat import Heartbeat
from engine.ranks import Ranks
from launch.env import Stopped
from utils.errors import UserError
from utils.files import atomic_write_bytes, atomic_write_text
from utils.media import gif_bytes, grid, png_bytes, to_uint8, write_mp4

_OURS = ("datasets", "diffusion", "engine", "launch", "losses", "metrics", "models", "pipelines", "tasks", "utils")
_log = logging.getLogger(__name__)

MEASURED = ("eval/", SCORE)
"""How the names of figures begin that are measured between the steps."""

PREVIEW_FPS = 8.0
"""Frames per second of previews, slow enough to look at."""

_BEHIND = 0.05
"""Share of a step by which a rank must be behind the others, at two log lines in a row, to be named; metrics.jsonl has it always."""


class Recorder:
    """Writes on the main rank and does nothing on the others. A context manager: it owns open files and the logging handler."""

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        *,
        is_main: bool,
        step: int,
        total: int,
        seen: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`step`: where the run goes on; lines of metrics.jsonl beyond it are dropped, and evaluations beyond `seen` (None: `step`).

        `ranks`: what the meter knows of them, for the name of the slowest.
        """
        self._active = is_main
        self._folder = folder
        self._ranks = ranks
        if not is_main:
            return
        try:
            _cut(folder / "metrics.jsonl", step, step if seen is None else seen)
            self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
            self._text = (folder / "log.txt").open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be written: {error}") from None
        self._writer = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self._behind: int | None = None
        self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr) if sys.stderr.isatty() else None
        self._step, self._total = step, total
        self._heartbeat = Heartbeat(folder, step, total)
        self._quiet = 0.0 if self._bar is not None else config.status_every
        self._handler = _Handler(self._text, self._bar is not None, self._heartbeat)
        self._failed: set[str] = set()

    def __enter__(self) -> "Recorder":
        if self._active:
            root = logging.getLogger()
            self._level = root.level
            root.setLevel(logging.INFO)
            root.addHandler(self._handler)
            self._heartbeat.start(self._quiet, self.say)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._active:
            return
        self._heartbeat.stop("done" if kind is None else "stopped" if issubclass(kind, Stopped | KeyboardInterrupt) else "failed")
        if self._bar is not None:
            with suppress(OSError, ValueError):  # the terminal is gone
                self._bar.close()
        if self._writer is not None:
            with self._if_writable("TensorBoard's files"):
                self._writer.close()
        logging.getLogger().removeHandler(self._handler)
        logging.getLogger().setLevel(self._level)
        for file in (self._metrics, self._text):
            with suppress(OSError):  # what a full disk has not taken; it was reported
                file.close()

    def advance(self) -> None:
        """One more step is done."""
        if not self._active:
            return
        self._step += 1
        self._heartbeat.beat(self._step)
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.update()

    def say(self, *lines: str) -> None:
        """Lines to the terminal and log.txt; empty ones are left out."""
        for line in filter(None, lines if self._active else ()):
            _log.info("%s", line)

    def values(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """A line to metrics.jsonl (with step, samples and time), TensorBoard, terminal and log.txt."""
        if not self._active:
            return
        line: dict[str, object] = {"step": step, "samples": samples, "time": time.time()}
        line |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        slowest = ""
        if self._ranks and "time/slowest_rank" in values:
            line["time/ranks"] = [round(seconds, 5) for seconds in self._ranks.own]
            behind = int(values["time/slowest_rank"]) if values["time/spread"] > _BEHIND else None
            slowest = self._ranks.hosts[behind] if behind is not None and behind == self._behind else ""
            self._behind = behind
        with self._if_writable("metrics.jsonl"):
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        if self._writer is not None:
            with self._if_writable("TensorBoard's files"):
                for key, value in values.items():
                    self._writer.add_scalar(key, value, step)
        self.say(format_line(step, self._total, values, slowest))

    def preview(self, step: int, videos: Mapping[str, Tensor]) -> None:
        """Videos b c t h w or images b c h w in [-1, 1]: a grid of each as a file in samples/ and in TensorBoard, where it plays."""
        if not self._active:
            return
        for name, batch in videos.items():
            picture = grid(to_uint8(batch.detach().cpu()))
            path = self._folder / "samples" / f"step_{step:07d}_{name}"
            data = png_bytes(picture) if picture.ndim == 3 else gif_bytes(picture, PREVIEW_FPS)
            with self._if_writable("samples/"):
                atomic_write_bytes(path.with_suffix(".png" if picture.ndim == 3 else ".gif"), data)
                if picture.ndim == 4:
                    write_mp4(path.with_suffix(".mp4"), picture, PREVIEW_FPS)
            if self._writer is not None:
                with self._if_writable("TensorBoard's files"):
                    _add_image(self._writer, f"preview/{name}", data, picture, step)

    @contextmanager
    def _if_writable(self, what: str) -> Iterator[None]:
        """Give up what the block writes when the disk refuses it; say so the first time."""
        try:
            yield
        except OSError as error:
            if what not in self._failed:
                self._failed.add(what)
                _log.warning("%s in %s cannot be written (%s): the run goes on without", what, self._folder, error)


def format_line(step: int, total: int, values: Mapping[str, float], slowest: str = "") -> str:
    """The one log line format: step, then what is there of losses, metrics, norms, rates and pace; `slowest`: host of a rank to name."""
    width = len(str(total))
    parts = [f"step {step:>{width}}/{total}"]
    for key, value in values.items():
        if key.startswith(("loss", "train/", *MEASURED)):
            parts.append(f"{key.removeprefix('train/')} {value:.4g}")
    for key, value in values.items():
        if key.startswith("grad_norm/"):
            parts.append(f"{key.replace('grad_norm/', 'norm ')} {value:.3g}")
        elif key.startswith("lr/"):
            parts.append(f"{key.replace('lr/', 'lr ')} {value:.2e}")
    if "time/step" in values:
        parts.append(f"{values['time/step']:.3f} s/step, {values['time/data_wait']:.1%} waiting for data")
        parts.append(f"{values['clips_per_s']:.1f} clips/s")
        parts.append(f"{values['memory_gib']:.2f} GiB")
    if slowest:
        parts.append(f"slowest rank {values['time/slowest_rank']:.0f} ({slowest}) +{values['time/spread']:.0%}")
    if "mfu" in values:
        parts.append(f"mfu {values['mfu']:.1%}")
    if values.get("skipped"):
        parts.append(f"skipped {values['skipped']:.0f}")
    for key, value in values.items():
        if key.startswith("data/") and value:
            parts.append(f"{key.removeprefix('data/').replace('_', ' ')} {value:.0f}")
    if values.get("eta_s"):
        parts.append(f"eta {_duration(values['eta_s'])}")
    return " | ".join(parts)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _cut(path: Path, step: int, seen: int) -> None:
    """Drop the lines of metrics.jsonl beyond a step, evaluations beyond `seen` (both will be made again) and a half-written last one."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            if values["step"] <= (min(step, seen) if any(key.startswith(MEASURED) for key in values) else step):
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    atomic_write_text(path, "".join(kept))


def _add_image(writer: object, tag: str, data: bytes, picture: Tensor, step: int) -> None:
    """Encoded bytes as an image summary. `SummaryWriter.add_video` would need moviepy and writes nothing, silently, without it."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

    assert isinstance(writer, SummaryWriter)
    height, width = picture.shape[-2:]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


class _Handler(logging.Handler):
    """Our own messages, and warnings of others, to log.txt and to the terminal (above the progress bar where there is one)."""

    def __init__(self, file: TextIO, bar: bool, heartbeat: Heartbeat) -> None:
        super().__init__(logging.INFO)
        self._file = file
        self._bar = bar
        self._heartbeat = heartbeat
        self.setFormatter(logging.Formatter("%(asctime)s %(levelmark)s%(message)s", "%H:%M:%S"))

    def filter(self, record: logging.LogRecord) -> bool:
        record.levelmark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return record.levelno >= logging.WARNING or record.name.split(".")[0] in _OURS

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        self._heartbeat.mark()
        with suppress(OSError, ValueError):  # the terminal still has it
            self._file.write(line + "\n")
            self._file.flush()
        with suppress(OSError, ValueError):  # output into a full disk or a closed pipe is lost, and a run is worth more
            if self._bar:
                tqdm.write(line, file=sys.stderr)
            if not self._bar or not sys.stdout.isatty():
                print(line, flush=True)
