"""Reading samples out of shards: windows of frames, or the tensors of latents, each checked against its checksum."""

import os
import zlib
from math import prod

import numpy as np
import torch

from datasets.conditions import TYPES
from datasets.faults import Fault
from datasets.frames import linspace, linspace_last_start
from datasets.handles import Handles
from datasets.mixture import Collection
from datasets.shards import ShardSet, frame_sums
from datasets.stored_video import decode_window
from datasets.tables import TENSOR_BYTES, frame_bytes
from utils.errors import ConfigError, UserError

_AGAIN = "copy the shard again or rerun preprocess.py"


class ClipReader:
    """Reads windows of `n_frames`, `interval` apart, or spread by the rule `linspace`; of latent sets the whole sample.

    Opens files when first read, so that it survives fork and pickling.
    """

    def __init__(
        self,
        shards: Collection | ShardSet,
        n_frames: int,
        *,
        interval: int = 1,
        rule: str = "consecutive",
        handles: Handles | None = None,
    ) -> None:
        """`handles`: those of another reader of the same shards, whose open files are shared."""
        self.shards = Collection.over(shards)
        self.handles = handles or Handles(self.shards)
        self.n_frames, self.interval, self.rule = n_frames, interval, rule
        self.rows = n_frames if self.shards.by_frame else 1
        """Frames of a sample; latents of a whole clip count as one."""
        self.row_bytes = frame_bytes(self.shards.meta)

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """How many windows each sample has, int64 (b,)."""
        frames = self.shards.frames[samples]
        if not self.shards.by_frame:
            return np.ones_like(frames)
        if self.rule == "linspace":
            return np.array([linspace_last_start(total, self.n_frames, self.interval) + 1 for total in frames.tolist()], dtype=np.int64)
        return frames - (self.n_frames - 1) * self.interval

    def empty(self, count: int) -> np.ndarray:
        """Room for `count` samples, uint8 (count, rows, bytes)."""
        return np.empty((count, self.rows, self.row_bytes), dtype=np.uint8)

    def read(self, samples: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """uint8 (b, t, h, w, c): the window of each sample that begins at `starts`. UserError naming shard and key of a bad sample."""
        out = self.empty(len(samples))
        for _, fault in self.fill(out, np.arange(len(samples)), samples, starts):
            raise UserError(fault.text)
        return out.reshape(len(samples), self.rows, *self.shards.size, 3)

    def split(self, stored: np.ndarray) -> dict[str, torch.Tensor]:
        """Latents by name (b, *shape), in the stored type, of stored bytes (b, 1, bytes); of frames (b, t, bytes) -> (b, c, t, h, w)."""
        kind = self.shards.meta["codec"]["dtype"]
        if self.shards.by_frame:
            ((name, shape),) = self.shards.tensors.items()
            values = torch.from_numpy(stored).view(getattr(torch, kind)).reshape(*stored.shape[:2], *shape)
            return {name: values.transpose(1, 2)}
        rows, first, found = torch.from_numpy(stored[:, 0]), 0, {}
        for name, shape in self.shards.tensors.items():
            last = first + TENSOR_BYTES[kind] * prod(shape)
            found[name] = rows[:, first:last].contiguous().view(getattr(torch, kind)).reshape(len(rows), *shape)
            first = last
        return found

    def beside(self, samples: np.ndarray, starts: np.ndarray) -> dict[str, torch.Tensor]:
        """What a batch says of these windows beside their frames."""
        return {}

    def fill(self, out: np.ndarray, rows: np.ndarray, samples: np.ndarray, starts: np.ndarray) -> list[tuple[int, Fault]]:
        """Reads sample k into row `rows[k]` of `out`, uint8 (b, rows, bytes). Returns (k, fault) for those that are bad."""
        known, left = self.shards.bad_samples, np.ones(len(samples), dtype=bool)
        faults = []
        for k, sample in enumerate(samples.tolist() if known else ()):
            if sample in known:
                left[k] = False
                faults.append((k, self._fault(sample, known[sample], f"is left out: {known[sample]}")))
        packed = self.shards.packed[samples]
        for k in np.flatnonzero(packed & left).tolist():
            fault = self._decode(out[rows[k]], int(samples[k]), int(starts[k]))
            faults += [(k, fault)] if fault else []
        raw = np.flatnonzero(~packed & left)
        if len(raw):
            faults += [(int(raw[k]), fault) for k, fault in self._fill_raw(out, rows[raw], samples[raw], starts[raw])]
        return faults

    def fill_vectors(self, out: np.ndarray, rows: np.ndarray, samples: np.ndarray) -> list[tuple[int, Fault]]:
        """Reads the condition vector of sample k into row `rows[k]` of `out`, float32 (b, numbers). Returns (k, fault) for the bad ones."""
        shards, form = self.shards, self.shards.cond
        assert form is not None and shards.cond_offset is not None and shards.cond_crc32 is not None
        nbytes, faults = shards.meta["cond_nbytes"], []
        for k, sample in enumerate(samples.tolist()):
            try:
                file = self.handles.get(int(shards.shard[sample]))  # held while it is read: another thread may let go of it
                payload = os.pread(file.fd, nbytes, int(shards.cond_offset[sample]))
            except (UserError, OSError) as error:
                faults.append((k, self._unreadable(sample, error)))
                continue
            if zlib.crc32(payload) != shards.cond_crc32[sample]:
                faults.append((k, self._fault(sample, "checksum", f"has a damaged condition vector (crc32): {_AGAIN}")))
                continue
            out[rows[k]] = np.frombuffer(payload, TYPES[form.dtype], offset=nbytes - form.data_bytes)
        return faults

    def _fill_raw(self, out: np.ndarray, rows: np.ndarray, samples: np.ndarray, starts: np.ndarray) -> list[tuple[int, Fault]]:
        shards, size = self.shards, self.row_bytes
        frames = self._frames(samples, starts)
        # Frames end where the member ends; what stands before them is the npy header.
        base = shards.offset[samples] + shards.nbytes[samples] - shards.frames[samples] * size
        # Neighbouring frames come in one read, others in one each.
        first = frames[:, :1] if self._in_one else frames
        reads, length = first.shape[1], self.rows // first.shape[1] * size
        sources = (base[:, None] + first * size).reshape(-1).tolist()
        targets = ((rows[:, None] * reads + np.arange(reads)) * length).reshape(-1).tolist()
        which = np.repeat(np.arange(len(samples)), reads)
        # Plain numbers and one flat view: this loop holds the interpreter's lock between the reads.
        flat, faults = out.reshape(-1).data, dict[int, Fault]()
        for k, shard, source, target in zip(which.tolist(), shards.shard[samples][which].tolist(), sources, targets, strict=True):
            try:
                file = self.handles.get(shard)
                if os.preadv(file.fd, [flat[target : target + length]], source) != length:
                    faults[k] = self._fault(samples[k], "cut short", f"is cut short: {_AGAIN}")
            except (UserError, OSError) as error:
                faults[k] = self._unreadable(samples[k], error)
        there = np.array([k for k in range(len(rows)) if k not in faults], dtype=np.int64) if faults else np.arange(len(rows))
        in_order = np.array_equal(rows[there], np.arange(len(out)))  # all of it: no copy is needed
        sums = frame_sums(out if in_order else out[rows[there]])
        wrong = (sums != shards.sums[shards.first_sum[samples[there]][:, None] + frames[there]]).any(axis=1)
        for k in there[wrong].tolist():
            faults[k] = self._fault(samples[k], "checksum", f"is damaged (checksum): {_AGAIN}")
        return list(faults.items())

    @property
    def _in_one(self) -> bool:
        return not self.shards.by_frame or (self.interval == 1 and self.rule == "consecutive")

    def _frames(self, samples: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Numbers of the frames of each window, int64 (b, rows)."""
        if self.rule == "linspace" and self.shards.by_frame:
            totals = self.shards.frames[samples].tolist()
            found = [linspace(start, total, self.n_frames, self.interval) for start, total in zip(starts.tolist(), totals, strict=True)]
            return np.array(found, dtype=np.int64).reshape(len(samples), self.rows)
        return starts[:, None] + np.arange(self.rows) * self.interval

    def _decode(self, row: np.ndarray, sample: int, start: int) -> Fault | None:
        """Reads one compressed sample into uint8 (rows, bytes)."""
        shards = self.shards
        try:
            file = self.handles.get(int(shards.shard[sample]))  # held while it is read: another thread may let go of it
            payload = os.pread(file.fd, int(shards.nbytes[sample]), int(shards.offset[sample]))
        except (UserError, OSError) as error:
            return self._unreadable(sample, error)
        if zlib.crc32(payload) != shards.crc32[sample]:
            return self._fault(sample, "checksum", f"is damaged (crc32): {_AGAIN}")
        height, width = shards.size
        place = 0
        try:
            for frames in self._spans(self._frames(np.array([sample]), np.array([start]))[0]):
                low, high = int(frames.min()), int(frames.max())
                clip = decode_window(payload, low, high - low + 1, shards.size)[frames - low, :height, :width]
                row[place : place + len(frames)] = clip.reshape(len(frames), -1)
                place += len(frames)
        except ValueError as error:
            return self._fault(sample, "decode", f"does not decode: {error}; rerun preprocess.py")
        return None

    def _spans(self, frames: np.ndarray) -> list[np.ndarray]:
        """The frames of a window, in parts that are decoded each by itself."""
        return [frames]

    def _fault(self, sample: int, reason: str, trouble: str) -> Fault:
        return Fault(int(sample), int(self.shards.shard[sample]), reason, f"{self.shards.describe(int(sample))} {trouble}")

    def _unreadable(self, sample: int, error: Exception) -> Fault:
        shard = int(self.shards.shard[sample])
        if isinstance(error, ConfigError):
            raise error
        if shard not in self.handles.bad:
            return self._fault(sample, "unreadable", f"cannot be read: {error}")
        return Fault(int(sample), shard, "unreadable shard", self.handles.bad[shard], whole_shard=True)
