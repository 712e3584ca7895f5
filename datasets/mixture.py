"""Several shard sets as one: their samples in one row of columns, their classes merged."""

import hashlib
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import numpy as np

from datasets.conditions import CondFormat
from datasets.order import STREAM, Sequence, Shuffled
from datasets.proportions import Mixture
from datasets.shards import ShardSet
from datasets.single_frames import SingleFrames
from datasets.tables import COND_COLUMNS, by_frame
from utils.errors import ConfigError


@dataclass(frozen=True)
class Collection:
    """One or more open shard sets. Columns and names are those of `ShardSet`, over all samples and all shards."""

    sets: tuple[ShardSet, ...]
    classes: list[str]
    """Class names in label order: those of the first set, then what the others add."""
    shard: np.ndarray
    offset: np.ndarray
    nbytes: np.ndarray
    crc32: np.ndarray
    frames: np.ndarray
    label: np.ndarray
    sums: np.ndarray
    first_sum: np.ndarray
    cond_offset: np.ndarray | None = None
    cond_crc32: np.ndarray | None = None

    @classmethod
    def of(cls, *sets: ShardSet) -> "Collection":
        """Raises ConfigError where the sets do not fit together (size, kind, tensors, some labelled and some not), or one is empty."""
        for item in sets:
            if not item.num_samples:
                raise ConfigError(f"{item.where} holds no samples: its report.json says what preprocess.py left out")
        _check_alike(sets)
        classes = list(dict.fromkeys(name for item in sets for name in item.classes))
        if len(sets) == 1:
            one = sets[0]
            columns = (one.shard, one.offset, one.nbytes, one.crc32, one.frames, one.label, one.sums, one.first_sum)
            return cls(sets, classes, *columns, one.cond_offset, one.cond_crc32)
        shards = np.cumsum([0, *(len(item.meta["shards"]) for item in sets)])
        sums = np.cumsum([0, *(len(item.sums) for item in sets)])
        number = {name: label for label, name in enumerate(classes)}
        labels = [np.array([number[name] for name in item.classes] or [0], dtype=np.int64)[item.label] for item in sets]
        names = ("offset", "nbytes", "crc32", "frames", "sums", *(COND_COLUMNS if sets[0].cond else ()))
        joined = {name: np.concatenate([getattr(item, name) for item in sets]) for name in names}
        ends = {name: np.cumsum([len(getattr(item, name)) for item in sets])[:-1] for name in joined}
        parts: dict[str, list[Any]] = {name: np.split(column, ends[name]) for name, column in joined.items()}
        # The sets go on with views of the joined columns: a large collection is not held twice.
        views = tuple(replace(item, **{name: column[k] for name, column in parts.items()}) for k, item in enumerate(sets))
        return cls(
            views,
            classes,
            shard=np.concatenate([item.shard + first for item, first in zip(sets, shards, strict=False)]),
            label=np.concatenate(labels),
            first_sum=np.concatenate([item.first_sum + first for item, first in zip(sets, sums, strict=False)]),
            **joined,
        )

    @classmethod
    def over(cls, shards: "Collection | ShardSet") -> "Collection":
        """The collection itself, or that of one set."""
        return shards if isinstance(shards, cls) else cls.of(cast(ShardSet, shards))

    def numbered_after(self, classes: list[str]) -> "Collection":
        """The same samples, whose labels count these classes first: one name has one number in what a model learns and is tested on."""
        if not self.classes:
            return self
        merged = list(dict.fromkeys([*classes, *self.classes]))
        number = {name: label for label, name in enumerate(merged)}
        return replace(self, classes=merged, label=np.array([number[name] for name in self.classes], dtype=np.int64)[self.label])

    @cached_property
    def _firsts(self) -> tuple[np.ndarray, np.ndarray]:
        """First sample and first shard of each set, and the ends."""
        samples = np.cumsum([0, *(item.num_samples for item in self.sets)])
        return samples, np.cumsum([0, *(len(item.meta["shards"]) for item in self.sets)])

    @property
    def num_samples(self) -> int:
        return len(self.shard)

    @property
    def meta(self) -> dict[str, Any]:
        """index.json of the set; of several, the first's."""
        return self.sets[0].meta

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a latent set by name, in the order they are stored, of one frame if framewise; empty for clips."""
        return {name: tuple(shape) for name, shape in sorted(self.meta.get("tensors", {}).items())} if self.is_latent else {}

    @property
    def is_latent(self) -> bool:
        return self.sets[0].codec == "latent"

    @cached_property
    def by_frame(self) -> bool:
        """Whether frames can be taken out of a sample: of clips, and of latents of single frames."""
        return by_frame(self.meta)

    @cached_property
    def packed(self) -> np.ndarray:
        """Whether each sample must be decoded, bool (n,)."""
        return np.repeat([item.codec not in ("npy", "latent") for item in self.sets], [item.num_samples for item in self.sets])

    @property
    def is_remote(self) -> bool:
        """Whether shards must be fetched before they are read."""
        return any(item.is_remote for item in self.sets)

    @property
    def stored_length(self) -> int:
        """Frames of every clip; 0 where they differ."""
        lengths = {int(item.meta["clip_length"]) for item in self.sets}
        return lengths.pop() if len(lengths) == 1 else 0

    @cached_property
    def clip_length(self) -> int:
        """Frames of every clip; of the shortest one where they differ."""
        return int(self.frames.min()) if self.by_frame else self.stored_length

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.sets[0].size

    @property
    def cond(self) -> CondFormat | None:
        """What the condition vectors beside the samples are; None where there are none."""
        return self.sets[0].cond

    @property
    def fps(self) -> float:
        """Frame rate of most clips of the largest set."""
        return max(self.sets, key=lambda item: item.num_samples).fps

    @property
    def name(self) -> str:
        return "+".join(item.name for item in self.sets)

    @property
    def location(self) -> str:
        """Where the sets are, for messages."""
        return ", ".join(item.where for item in self.sets)

    @property
    def digest(self) -> str:
        """Names the exact data: sha256 of index.json; of several sets, of their digests."""
        if len(self.sets) == 1:
            return self.sets[0].digest
        return hashlib.sha256("".join(item.digest for item in self.sets).encode()).hexdigest()

    @cached_property
    def bad(self) -> dict[int, str]:
        """Shards that are known not to be readable, and why."""
        return {int(first) + shard: why for item, first in zip(self.sets, self._firsts[1], strict=False) for shard, why in item.bad.items()}

    @cached_property
    def bad_samples(self) -> dict[int, str]:
        """Further samples that are known not to be usable, and why."""
        firsts = self._firsts[0]
        return {int(first) + row: why for item, first in zip(self.sets, firsts, strict=False) for row, why in item.bad_samples.items()}

    def check_cache(self, window: int) -> int:
        """How many shards may be fetched before their time, `window` at most, while `window` others are in use.

        ConfigError when the cache has no room for those in use.
        """
        room = 2 * window
        for item in self.sets:
            item.check_cache(window)
            if item.storage.capacity is not None:
                room = min(room, item.storage.capacity // max(1, item.largest_shard))
        return max(1, room - window)

    def open_shard(self, shard: int) -> int:
        """A descriptor of the tar, fetched first where it is remote; the caller closes it. UserError when that cannot be."""
        item, own = self._shard(shard)
        return item.open_shard(own)

    def describe(self, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        number = int(np.searchsorted(self._firsts[0], sample, side="right")) - 1
        return self.sets[number].describe(sample - int(self._firsts[0][number]))

    def describe_shard(self, shard: int) -> str:
        """Where a shard is, for messages."""
        item, own = self._shard(shard)
        return item.shard_name(own)

    def _shard(self, shard: int) -> tuple[ShardSet, int]:
        """The set of a shard, and its number there."""
        number = int(np.searchsorted(self._firsts[1], shard, side="right")) - 1
        return self.sets[number], shard - int(self._firsts[1][number])

    def sequence(self, seed: int, weights: Items[float], window: int, single: SingleFrames | None = None) -> Sequence:
        """The endless order: one permutation an epoch over all sets, or with `weights` (one a set) the sets in that proportion.

        `window`: shuffle by blocks of so many shards; 0: over everything. `single`: over these frames in place of the samples.
        """
        shard = self.shard if single is None else self.shard[single.sample] if window else None
        if not weights:
            return Shuffled(self.num_samples if single is None else len(single), seed=seed, shard=shard, window=window)
        if len(weights) != len(self.sets):
            raise ConfigError(f"--data-weights has {len(weights)} numbers for {len(self.sets)} shard sets: give one for each --data-path")
        firsts = self._firsts[0] if single is None else single.bounds(self._firsts[0])
        parts = [
            Shuffled(
                last - first,
                seed=seed,
                shard=None if shard is None else shard[first:last],
                window=window,
                stream=f"{STREAM}/{number}",
            )
            for number, (first, last) in enumerate(pairwise(firsts.tolist()))
        ]
        return Mixture(parts, weights, seed=seed)

    def single_frames(self, share: float, seed: int) -> SingleFrames:
        """The frames that are kept of all samples. ConfigError where none is kept of a set."""
        found = SingleFrames.draw(self.frames, share, seed)
        for item, count in zip(self.sets, np.diff(found.bounds(self._firsts[0])).tolist(), strict=True):
            if not count:
                raise ConfigError(
                    f"--frame-sample-prob {share:g} keeps no frame of {item.where} ({item.frames.sum()} frames): use a larger one"
                )
        return found


def _check_alike(sets: Items[ShardSet]) -> None:
    first = sets[0]
    for other in sets[1:]:
        both = f"{first.where} and {other.where} do not mix"
        if (first.codec == "latent") != (other.codec == "latent"):
            raise ConfigError(f"{both}: one holds latents, the other clips")
        if first.size != other.size:
            sizes = [" x ".join(map(str, item.size)) for item in (first, other)]
            raise ConfigError(f"{both}: {sizes[0]} and {sizes[1]} pixels; preprocess both with one --image-size")
        if bool(first.classes) != bool(other.classes):
            raise ConfigError(f"{both}: one has class labels, the other has none")
        if first.cond != other.cond:
            kinds = [f"condition vectors {item.cond}" if item.cond else "no condition vectors" for item in (first, other)]
            raise ConfigError(f"{both}: {kinds[0]} and {kinds[1]}; prepare both alike")
        if first.codec == "latent":
            for name in ("tensors", "codec") if by_frame(first.meta) else ("tensors", "codec", "clip_length"):
                if first.meta.get(name) != other.meta.get(name):
                    raise ConfigError(f"{both}: their {name} differ; encode both with one autoencoder and one --dtype")
            if _maker(first) != _maker(other):
                raise ConfigError(f"{both}: they hold latents of different autoencoders; encode both with one")


def _maker(latents: ShardSet) -> list[Any]:
    """What identifies the autoencoder of a latent set, wherever its export lay."""
    return [latents.meta["autoencoder"].get(name) for name in ("system", "sha256", "vae")]
