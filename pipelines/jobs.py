"""What `sample.py` asks of a system: settings that all of them have, and a job that makes sample number i."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from utils.config import flag
from utils.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """What every system's sampling can be told. A system's own adds its models and samplers."""

    system: str = ""
    """Which of the toolkit's systems; told from the runs where it is not given."""
    run: str = flag("", "results-dir")
    """Results folder of the training runs: the newest finished models in it that belong together are taken.
    The same as a bare first argument, which is what works under torchrun too (it may take --run for one of its own flags)."""
    weights: Literal["ema", "model"] = "ema"
    """Averaged weights (where there are any), or the last ones."""
    out: Path = Path("samples")
    """Folder to write to. Samples that are already there with the same settings are kept."""
    num_samples: int = 16
    """Clips, or long videos, to generate."""
    mode: Literal["short", "long", "i2v"] = "short"
    """short: clips as long as in training. long: videos of --num-frames frames, made clip after clip and written as they come. One that
    was stopped goes on at its last clip, whose latents are kept in <out>/latents; more --num-frames make it longer. i2v: the same,
    beginning at a given picture (HVDM)."""
    num_frames: int = 0
    """Frames of a long video, any number: the last clip is cut."""
    continue_from: str = ""
    """Long, i2v: a folder of shorter videos of the same settings; theirs are copied and go on in --out, as if made there from the start."""
    classes: tuple[str, ...] = ()
    """Classes by number or name, in turn; none given, or `all`: all of them."""
    seed: int = flag(0, "global-seed")
    """Seed of all noise. Sample number i of a seed is the same clip whatever else is generated with it."""
    batch_size: int = 4
    """Clips per write; with --no-exact also clips that go through the networks together."""
    exact: bool = True
    """Each clip alone through the networks, so that it is the same to the last bit with any batch size and number of processes."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks."""
    fps: float = 0.0
    """Frame rate of the files; 0: that of the training clips."""
    keep_latents: bool = True
    """Keep <out>/latents of long videos that are done, from which they can be made longer; those of a video that was stopped are kept."""
    gif: bool = False
    """Also write each clip as a GIF; the frames of a long video are held in memory for it."""
    timeout: float = 1800.0
    """Seconds that a process waits for the others."""

    modes: ClassVar[tuple[str, ...]] = ("short", "long")
    """Those that the system has; one that others have too it may refuse for a reason of its own."""

    @property
    def long(self) -> bool:
        """Whether samples are made clip after clip."""
        return self.mode != "short"

    @property
    def together(self) -> int:
        """Samples that a process makes at a time. Exact long videos are made one by one, so that stopping loses no more than one clip."""
        return 1 if self.long and self.exact else self.batch_size

    def validate(self) -> None:
        """Raises ConfigError on settings that cannot work."""
        if self.mode not in self.modes:
            raise ConfigError(f"--mode {self.mode}: {self.system} makes {' and '.join(self.modes)} videos only")
        self.at_least(1, "num_samples", "batch_size")
        self.at_least(0, "num_frames")
        if not 0 <= self.fps < float("inf"):
            raise ConfigError(f"--fps {self.fps}: above 0, or 0 for that of the training clips")
        if self.mode == "long" and not self.num_frames and "short" in self.modes:
            raise ConfigError("--mode long: how long? give --num-frames N")
        if self.mode == "short" and self.continue_from:
            raise ConfigError("--continue-from goes with --mode long: short clips have nothing to go on with")

    def at_least(self, lowest: int, *names: str) -> None:
        """Raises ConfigError for the first of the named settings that is given and below `lowest`."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: at least {lowest}")


@dataclasses.dataclass(frozen=True)
class Strip:
    """How some samples came about: clips at several moments of the sampling."""

    clips: Tensor
    """(samples * moments) 3 t h w in [-1, 1], the moments of the first sample first."""
    moments: int


class SampleJob(Protocol):
    """Makes sample number i. What it makes is a function of `settings()` alone, whatever else is made with it."""

    @property
    def labels(self) -> list[int]:
        """Classes that the samples take in turn; empty: there are none."""

    @property
    def fps(self) -> float:
        """Frame rate of the files."""

    @property
    def n_frames(self) -> int:
        """Frames of a clip."""

    @property
    def endings(self) -> tuple[str, ...]:
        """What follows a sample's name in the names of its videos: "" for the clip, and one for each further video."""

    @property
    def notes(self) -> list[str]:
        """What the user should know before it starts, a line each."""

    def name(self, index: int) -> str:
        """File name of a sample, without ending."""

    def label(self, index: int) -> int | None:
        """Class of a sample; None when the models have none."""

    def class_name(self, label: int | None) -> str:
        """Name of a class, where the training data had one."""

    def generate(self, indices: Sequence[int]) -> Mapping[str, Tensor]:
        """Ending -> videos b 3 t h w in [-1, 1] of these samples."""

    def strip(self) -> Strip | None:
        """How the first samples came about, where that was asked for."""

    def settings(self) -> dict[str, Any]:
        """Plain values: everything that a sample depends on."""

    def sources(self) -> dict[str, str]:
        """Where the networks were read."""


@runtime_checkable
class PictureJob(Protocol):
    """What can make videos that begin at a picture."""

    def picture(self, index: int) -> Tensor:
        """The picture 3 h w in [-1, 1] at which a sample begins."""

    def seen_picture(self, index: int) -> Tensor:
        """The same through the autoencoder alone, the best that a sample can begin with."""


def numbered(index: int, label: int | None) -> str:
    """The usual file name of a sample, without ending."""
    return f"{index:06d}" if label is None else f"{index:06d}-class{label:03d}"


def in_turn(labels: Sequence[int], index: int) -> int | None:
    """Class of a sample when they take `labels` in turn; None when there are none."""
    return labels[index % len(labels)] if labels else None


def choose_classes(wanted: Sequence[str], known: int, names: Sequence[str]) -> list[int]:
    """Numbers of the classes asked for by number or name; of all `known` ones when none is, or `all`. Raises UserError."""
    if not known:
        if wanted:
            raise UserError("--classes: these models know no classes")
        return []
    if not wanted or tuple(wanted) == ("all",):
        return list(range(known))
    return [_class_number(item, known, names) for item in wanted]


def load_vectors(paths: Sequence[str], width: int, model: str) -> Tensor | None:
    """Condition vectors (n, width) float32 of .npy files with one each, of any shape; None for a model that takes none.

    Raises UserError for files that are not that, and when the model takes vectors and there are none.
    """
    if not width:
        if paths:
            raise UserError(f"--cond: {model} takes no condition vectors")
        return None
    if not paths:
        raise UserError(f"{model} is conditioned on vectors: give --cond FILE.npy ..., one vector of {width} numbers each, taken in turn")
    rows = []
    for path in paths:
        try:
            row = np.load(path, allow_pickle=False)
            values = torch.from_numpy(np.asarray(row, dtype=np.float32).reshape(-1).copy())
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise UserError(f"--cond {path} cannot be read as an array: {str(error).splitlines()[0]}") from None
        if len(values) != width or not bool(values.isfinite().all()):
            raise UserError(f"--cond {path} holds {len(values)} numbers, {model} takes {width} finite ones")
        rows.append(values)
    return torch.stack(rows)


def class_name(names: Sequence[str], label: int | None) -> str:
    """Name of a class, where there is one."""
    return names[label] if label is not None and label < len(names) else ""


def _class_number(item: str, known: int, names: Sequence[str]) -> int:
    if item in names:
        return names.index(item)
    if item.isdecimal() and int(item) < known:
        return int(item)
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    raise UserError(f"--classes {item}: no such class; 0 to {known - 1}" + (f", or {listed}" if names else ""))
